"""What a pickle makes and takes off its stack again: calls for their effect, recursion, and what is dropped.

- The sixth item of ``__reduce__`` is a function that is called with the object and its state, and whose result
  does not matter (``Lib/pickle.py`` ``save_reduce``: ``setter``, ``(obj, state)``, REDUCE, POP).  cloudpickle keeps
  functions and classes so.  The call belongs to the object, which is on top of the stack once its result is popped.
- dill calls ``setattr`` likewise once the outermost function or class is there, for parts of it: the cells of closures,
  and the names of classes (``dill/_dill.py`` ``_save_with_postproc``).  The call belongs to what is on top then.
  It sets the globals of a function so, too, once what they name is there: GET, SETITEMS, POP.
- What contains itself as its own argument is there already when its pickler has written the arguments, and pops
  them: elements of a tuple, or the result of a call that was made before (``save_tuple``, ``save_reduce``).
- Anything else that is popped is made for nothing that can be known, and is dropped by whoever loads the pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ckptkit.checkpoint import TensorEntry
from ckptkit.pickling.inert import ABSENT, ITSELF, Global, InertDict, InertSet, Object, children, effects_of, walk
from ckptkit.pickling.reach import sets_first_argument

__all__ = ["Popped"]

_SCALARS = (str, int, float, bytes, type(None))

_REDUCE, _BINGET, _LONG_BINGET, _GET = b"Rhjg"

_MOST_PASSES = 8
"""How often what is left is looked at again: what changes a part follows what made it."""

_MOST_PAIRS = 1_000_000
"""Nodes that are compared in one pickle."""


class _Value(NamedTuple):
    """Something that was popped, as it was then."""

    value: object
    top: object  # of the stack, without it
    filled: object  # how far the top was
    end: int  # position after the POP
    is_new: bool  # whether it is the result of a call that was made right before, and is kept nowhere
    before: int | None  # pairs that it had before some were set right before it was popped


class Popped:
    """Collects what one pickle pops, and says at its end what that is."""

    def __init__(self) -> None:
        self._values: list[_Value] = []
        self._pairs_left = _MOST_PAIRS

    def take(
        self,
        value: object,
        top: object,
        data: bytes,
        at: int,
        memo: Mapping[int, object],
        before: int | None = None,
    ) -> None:
        """Collect a value.

        Args:
            value: that was popped.
            top: what is on top of the stack now; ``None``: nothing.
            data: the pickle, at least to the POP.
            at: position of the POP.
            memo: what the pickle can still refer to.
            before: how many pairs it had before some were set right before the POP; ``None``: none were.
        """
        if isinstance(value, _SCALARS) or value == ():
            return
        # The argument of an opcode that memoizes a value, or gets it, may look like REDUCE.
        is_new = isinstance(value, Object) and data[at - 1] == _REDUCE and memo.get(_REDUCE) is not value
        self._values.append(_Value(value, top, _filled(top), at + 1, is_new, before))

    def settle(self, root: object, data: bytes, memo: Mapping[int, object]) -> tuple[object, ...]:
        """Give the calls made for their effect to the nodes they belong to; what is left was made and dropped.

        Args:
            root: the tree.
            data: the pickle, to its end.
            memo: as it is then.
        """
        if not self._values:
            return ()
        self._order = {id(popped.value): number for number, popped in enumerate(self._values)}
        left = []
        for popped in self._values:
            if self._is_made_again(popped, data, memo):
                continue
            if _is_kept_by(popped) and popped.value.args[0] is popped.top:  # type: ignore[attr-defined]
                self._give(popped)
            else:
                left.append(popped)
        reached: set[int] = set()
        _enter(root, reached)
        for _ in range(_MOST_PASSES):
            waiting, left = left, []
            for popped in waiting:
                if id(popped.value) in reached:
                    self._set_late(popped, data, memo)
                    continue
                if id(popped.top) in reached and _is_kept_by(popped) and _changes_any(popped.value, reached):
                    self._give(popped)
                    _enter(popped.value, reached)
                else:
                    left.append(popped)
            if len(left) == len(waiting):
                break
        return tuple(popped.value for popped in left)

    def _give(self, popped: _Value) -> None:
        call, top = popped.value, popped.top
        if isinstance(call, Object) and call.args and call.args[0] is top:
            call.args = (ITSELF, *call.args[1:])
        effects = sorted((*effects_of(top), call), key=lambda each: self._order[id(each)])
        object.__setattr__(top, "effects", tuple(effects))  # a tensor's entry is frozen

    def _set_late(self, popped: _Value, data: bytes, memo: Mapping[int, object]) -> None:
        """Note that a dict got pairs after what is on top was made; not where a tuple that contains itself is left."""
        target, top = popped.value, popped.top
        if popped.before is None or not isinstance(target, InertDict) or not isinstance(top, Object):
            return
        if target.late_from is not None or _filled(top) != popped.filled:
            return
        found = _gotten(data, popped.end, memo)
        if not isinstance(found, tuple) or not any(part is target for part in found):
            target.late_from = popped.before
            call = Object("setitems", target, ())
            self._order[id(call)] = self._order[id(target)]
            self._give(popped._replace(value=call))

    def _is_made_again(self, popped: _Value, data: bytes, memo: Mapping[int, object]) -> bool:
        """Whether a call's result is popped for that of an equal call, which its arguments led to."""
        value, kept = popped.value, _gotten(data, popped.end, memo)
        if not isinstance(value, Object) or not isinstance(kept, Object) or kept.how != value.how:
            return False
        return self._are_alike([(value.cls, kept.cls), (value.args, kept.args), (value.kwargs, kept.kwargs)])

    def _are_alike(self, stack: list[tuple[object, object]]) -> bool:
        """Whether nodes in pairs, and all below them, are equal; tensors are where they are the same view."""
        seen: set[tuple[int, int]] = set()
        while stack:
            a, b = stack.pop()
            if a is b or (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            self._pairs_left -= 1
            below, others = children(a), children(b)
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
    """What the pickle takes from the memo at a position, after other POPs; ``None``: nothing."""
    while data[at : at + 1] == b"0":
        at += 1
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


def _changes_any(call: object, reached: set[int]) -> bool:
    """Whether a call sets something of an object that the tree holds."""
    if not isinstance(call, Object) or not sets_first_argument(call):
        return False
    return id(call.args[0]) in reached and isinstance(call.args[0], (Object, InertDict))


def _enter(root: object, reached: set[int]) -> None:
    for _ in walk(root, reached):
        pass
