"""Selecting tensors of the state_dict, and the weights from what stands beside them.

A glob is matched as `fnmatch.fnmatchcase` does: ``*`` crosses dots, and case counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice

from ckptkit.arguments import several
from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, TensorEntry
from ckptkit.errors import RewriteError
from ckptkit.normalize.nested import Nested
from ckptkit.normalize.roles import tensor_role
from ckptkit.normalize.sections import MAX_SECTION_DEPTH, join
from ckptkit.normalize.shapes import is_optimizer, parts
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.report import count_of, listed
from ckptkit.rewrite.names import module_paths

__all__ = ["Select", "WeightsOnly"]

_MAX_LISTED = 5
"""Names in a message."""

_MAX_COMPARED = 2000
"""Names that a pattern is compared with to find close ones: each takes a fraction of a millisecond."""

_MAX_NAME = 200
"""Characters of names that are compared, or shown."""

_SCALARS = (str, int, float, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Select:
    """Keep the values of the state_dict whose name matches; their order stays.

    A pattern matches a name as it is, or as ``rename`` makes it.  What stands beside the weights stays, and so
    do the versions of modules that keep something.

    Args:
        include: globs; a name is kept if it matches one of them.  None keeps all.
        exclude: globs; a name that matches one of them is dropped all the same.
        rename: from a name to the one it will have once what follows was applied, as the ``rename``
            of `ckptkit.Rename` and the others gives it.  It is no part of what this is.

    Raises (when applied):
        RewriteError: a pattern of ``include`` matches nothing, nothing is left, or a parameter would be
            dropped while there is an optimizer, whose state goes by the position of parameters.
    """

    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    rename: Callable[[str], str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, several(getattr(self, name)))

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        state_dict = checkpoint.state_dict
        names = list(state_dict.everything)
        included = self._matching(self.include, names)
        for pattern, found in included.items():
            if not found:
                raise RewriteError(f"no name matches {pattern!r}; {_suggestions(pattern, names)}")
        wanted = set().union(*included.values()) if self.include else set(names)
        wanted.difference_update(*self._matching(self.exclude, names).values())
        everything = {name: value for name, value in state_dict.everything.items() if name in wanted}
        if len(everything) == len(names):
            return checkpoint
        if not everything:
            raise RewriteError(f"none of {count_of(len(names), 'name')} is left; {_suggestions('', names)}")
        _check_optimizer(checkpoint, everything)
        versions = state_dict.versions
        if versions is not None:
            kept = {"", *(path for name in everything for path in module_paths(name))}
            versions = {path: entry for path, entry in versions.items() if path in kept}
        return checkpoint.replace(state_dict=state_dict.holding(everything, versions))

    def unmatched(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The patterns of ``exclude`` that match no name."""
        matching = self._matching(self.exclude, list(checkpoint.state_dict.everything))
        return tuple(pattern for pattern, found in matching.items() if not found)

    def _matching(self, patterns: Sequence[str], names: list[str]) -> dict[str, set[str]]:
        """The names that each pattern matches."""
        found: dict[str, set[str]] = {}
        renamed = {name: self.rename(name) for name in names} if self.rename is not None and patterns else {}
        for pattern in patterns:
            found[pattern] = {
                name
                for name in names
                if fnmatchcase(name, pattern) or (renamed and fnmatchcase(renamed[name], pattern))
            }
        return found


def _suggestions(pattern: str, names: list[str]) -> str:
    """Some of the names there are, those like a pattern first."""
    from difflib import get_close_matches

    short = [name for name in names[:_MAX_COMPARED] if len(name) <= _MAX_NAME]
    close = get_close_matches(pattern[:_MAX_NAME].replace("*", ""), short, cutoff=0.5) if pattern else []
    others = (name for name in names if name not in close)
    return f"there is {_listed([*close, *islice(others, _MAX_LISTED)], len(names))}"


def _listed(names: list[str], count: int) -> str:
    """The first of the names, and how many of ``count`` are left."""
    return listed([repr(name[:_MAX_NAME]) for name in names], _MAX_LISTED, total=count) or "none"


def _check_optimizer(checkpoint: Checkpoint, kept: dict[str, object]) -> None:
    """Refuse to drop parameters that an optimizer counts.

    Raises:
        RewriteError: it does.
    """
    known = checkpoint.module is not None
    lost = [
        name
        for name, value in checkpoint.state_dict.everything.items()
        if name not in kept and _may_be_parameter(name, value, known=known)
    ]
    optimizers = list(_optimizers(checkpoint.rest)) if lost else []
    if optimizers:
        import shlex

        remedy = " ".join(f"--leave-out {shlex.quote(path[:_MAX_NAME])}" for path in optimizers[:_MAX_LISTED])
        raise RewriteError(
            f"{_listed(lost, len(lost))} would be dropped, but the optimizer's state is keyed by position among the "
            f"parameters; {remedy} drops it"
        )


def _may_be_parameter(name: str, value: object, *, known: bool) -> bool:
    if isinstance(value, TensorEntry):
        return tensor_role(name, value, known=known)[0] == "parameter"
    return is_tensor_like(value)


def _optimizers(root: object) -> Iterator[str]:
    """The paths of optimizers, with tensors in their state or without."""
    seen: set[int] = set()
    stack = [("", root, 0)]
    while stack:
        path, node, depth = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if is_optimizer(node):
            yield path
        elif depth < MAX_SECTION_DEPTH:
            below = ((key, value) for key, value in reversed(parts(node)) if not isinstance(value, _SCALARS))
            stack.extend((join(path, key), value, depth + 1) for key, value in below)


@dataclass(frozen=True, slots=True)
class WeightsOnly:
    """Keep the state_dict alone: no optimizer, scheduler, epoch or arguments.

    Raises (when applied):
        RewriteError: there is no state_dict to keep.
    """

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        if not checkpoint.state_dict.everything:
            raise RewriteError("there is no state_dict to keep")
        state_dict = checkpoint.state_dict
        if state_dict.is_module:
            state_dict = state_dict.holding(state_dict.everything, state_dict.versions)
        elif isinstance(state_dict.container, Nested):
            container = state_dict.container.flat(state_dict.versions)
            state_dict = StateDict(state_dict.everything, versions=state_dict.versions, container=container)
        return checkpoint.replace(state_dict=state_dict, rest=STATE_DICT, discarded=())
