"""Values that a pickle makes and pops off its stack: calls for their effect, recursion, and discarded values.

- The sixth item of ``__reduce__`` is a function that is called with the object and its state, and whose result
  does not matter (``Lib/pickle.py`` ``save_reduce``: ``setter``, ``(obj, state)``, REDUCE, POP).  cloudpickle keeps
  functions and classes so.  The call belongs to the object, which is on top of the stack once its result is popped.
- dill calls ``setattr`` likewise once the outermost function or class is there, for parts of it: the cells of closures,
  and the names of classes (``dill/_dill.py`` ``_save_with_postproc``).  The call belongs to what is on top then.
  It sets the globals of a function so, too, once what they name is there: GET, SETITEMS, POP.
- What contains itself as its own argument is there already when its pickler has written the arguments, and pops
  them: elements of a tuple, or the result of a call that was made before (``save_tuple``, ``save_reduce``).
- Anything else that is popped has no known purpose, and loading the pickle discards it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ckptkit.checkpoint import TensorEntry
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.calls import sets_first_argument
from ckptkit.pickling.inert import ABSENT, ITSELF, SCALARS, Global, InertDict, InertSet, Object, children, walk

__all__ = ["Popped"]


_POP, _REDUCE, _BINGET, _LONG_BINGET, _GET = b"0Rhjg"

_MOST_PASSES = 8
"""How often the rest is examined again: a change of a part follows its making."""


class _Value(NamedTuple):
    """Something that was popped, as it was then."""

    value: object
    top: object  # of the stack, without it
    filled: object  # how far the top was
    end: int  # position after the POP
    is_new: bool  # whether it is the result of the call right before, and is kept nowhere
    before: int | None  # pairs that it had before some were set right before it was popped


class Popped:
    """Collects what one pickle pops, and says at its end what that is."""

    def __init__(self) -> None:
        self._values: list[_Value] = []
        self._pairs_left = DEFAULT_LIMITS.compared_nodes
        self._given: dict[int, list[tuple[int, Object]]] = {}  # id of what has effects -> its calls, numbered
        self._tops: dict[int, object] = {}

    def take(
        self, value: object, top: object, data: bytes, at: int, memo: Mapping[int, object], before: int | None = None
    ) -> None:
        """Collect a value.

        Args:
            value: that was popped.
            top: the top of the stack now; ``None``: nothing.
            data: the pickle, at least to the POP.
            at: position of the POP.
            memo: the values that the pickle can still refer to.
            before: how many pairs it had before some were set right before the POP; ``None``: none were.
        """
        if isinstance(value, SCALARS) or value == ():
            return
        # The argument of an opcode that memoizes a value, or gets it, may look like REDUCE.
        is_new = isinstance(value, Object) and data[at - 1] == _REDUCE and memo.get(_REDUCE) is not value
        self._values.append(_Value(value, top, _filled(top), at + 1, is_new, before))

    def settle(self, root: object, data: bytes, memo: Mapping[int, object]) -> tuple[object, ...]:
        """Give the calls made for their effect to the nodes they belong to; what is left was made and dropped.

        Args:
            root: the tree.
            data: the pickle, to its end.
            memo: its state at that point.
        """
        if not self._values:
            return ()
        left = []
        for number, popped in enumerate(self._values):
            call = popped.value
            if self._is_made_again(popped, data, memo):
                continue
            if isinstance(call, Object) and _is_kept_by(popped) and call.args[0] is popped.top:
                call.args = (ITSELF, *call.args[1:])
                self._give(number, popped.top, call)
            else:
                left.append((number, popped))
        self._set_effects()
        reached: set[int] = set()
        _enter(root, reached)
        for _ in range(_MOST_PASSES):
            waiting, left = left, []
            for number, popped in waiting:
                call = popped.value
                if id(call) in reached:
                    self._set_late(number, popped, data, memo)
                elif id(popped.top) in reached and isinstance(call, Object) and _changes_part(popped, call, reached):
                    self._give(number, popped.top, call)
                    _enter(call, reached)
                else:
                    left.append((number, popped))
            if len(left) == len(waiting):
                break
        self._set_effects()
        return tuple({id(popped.value): popped.value for _, popped in left}.values())

    def _give(self, number: int, top: object, call: Object) -> None:
        self._tops[id(top)] = top
        self._given.setdefault(id(top), []).append((number, call))

    def _set_effects(self) -> None:
        for place, calls in self._given.items():
            effects = tuple(call for _, call in sorted(calls, key=lambda numbered: numbered[0]))
            object.__setattr__(self._tops[place], "effects", effects)  # a tensor's entry is frozen

    def _set_late(self, number: int, popped: _Value, data: bytes, memo: Mapping[int, object]) -> None:
        """Note that a dict got pairs after what is on top was made; not where a tuple that contains itself is left."""
        target, top = popped.value, popped.top
        if popped.before is None or not isinstance(target, InertDict) or not isinstance(top, Object):
            return
        if target.late_from is not None or _filled(top) != popped.filled:
            return
        found = _gotten(data, popped.end, memo)
        if not isinstance(found, tuple) or not any(part is target for part in found):
            target.late_from = popped.before
            self._give(number, top, Object("setitems", target, ()))

    def _is_made_again(self, popped: _Value, data: bytes, memo: Mapping[int, object]) -> bool:
        """Whether a call's result is popped for that of an equal call, which its arguments led to."""
        value, kept = popped.value, _gotten(data, popped.end, memo)
        if not isinstance(value, Object) or not isinstance(kept, Object) or kept.how != value.how:
            return False
        return self._are_alike([(value.cls, kept.cls), (value.args, kept.args), (value.kwargs, kept.kwargs)])

    def _are_alike(self, stack: list[tuple[object, object]]) -> bool:
        """Whether nodes in pairs, and all below them, are equal; tensors are if they are the same view."""
        seen: set[tuple[int, int]] = set()
        while stack:
            a, b = stack.pop()
            if a is b or (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            below, others = children(a), children(b)
            self._pairs_left -= 1 + len(below)
            if type(a) is not type(b) or len(below) != len(others) or self._pairs_left < 0:
                return False
            if isinstance(a, Object) and isinstance(b, Object):
                if (a.how, len(a.args), _filled(a)) != (b.how, len(b.args), _filled(b)):
                    return False
            elif isinstance(a, TensorEntry) and isinstance(b, TensorEntry):
                if a.view != b.view or (a.is_parameter, a.requires_grad) != (b.is_parameter, b.requires_grad):
                    return False
            elif not below and not isinstance(a, (list, tuple, InertDict)) and a != b:
                return False
            stack.extend(zip(below, others, strict=True))
        return True


def _gotten(data: bytes, at: int, memo: Mapping[int, object]) -> object:
    """The entry that the pickle takes from the memo at a position, after two more POPs at most; ``None``: none."""
    at += 2 if data[at : at + 2] == b"00" else data[at] == _POP
    op, argument = data[at], data[at + 1 : at + 5]
    if op == _GET:
        text = data[at + 1 : at + 21].partition(b"\n")[0]
        return memo.get(int(text)) if text.isdigit() else None
    if op == _BINGET:
        return memo.get(argument[0])
    return memo.get(int.from_bytes(argument, "little")) if op == _LONG_BINGET else None


def _filled(node: object) -> object:
    """How far a node is filled."""
    if isinstance(node, Object):
        return len(node.items), len(node.pairs), node.state is ABSENT
    return len(node.pairs) if isinstance(node, InertDict) else len(node.members) if isinstance(node, InertSet) else 0


def _is_kept_by(popped: _Value) -> bool:
    """Whether a call can be kept with what is on top: it has effects, and was complete by then."""
    has_effects = isinstance(popped.top, (Object, InertDict, InertSet, Global, TensorEntry))
    is_call = popped.is_new and isinstance(popped.value, Object) and bool(popped.value.args)
    return has_effects and is_call and _filled(popped.top) == popped.filled


def _changes_part(popped: _Value, call: Object, reached: set[int]) -> bool:
    """Whether a call that can be kept sets something of another object that the tree holds."""
    if not _is_kept_by(popped) or not sets_first_argument(call):
        return False
    return id(call.args[0]) in reached and isinstance(call.args[0], (Object, InertDict))


def _enter(root: object, reached: set[int]) -> None:
    for _ in walk(root, reached):
        pass
