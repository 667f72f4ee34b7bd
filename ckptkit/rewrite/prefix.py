"""Prefixes of names: strip and add them by whole leading segments.

Names are dotted paths.  A prefix is stripped only where it is a leading run of whole segments:
``mlp_module.layer`` does not begin with ``module.``, and a name without the prefix is left alone.
The module versions (``_metadata``) and the parameter names an optimizer keeps (``param_names``)
move along with the names they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import RewriteError
from ckptkit.pickling.inert import InertDict, TreeMap, walk

__all__ = ["AddModule", "AddPrefix", "StripModule", "StripPrefix", "unwrapped"]

_MODULE = "module"
"""The attribute DataParallel and DistributedDataParallel keep the wrapped model under."""

_COMPILED = "_orig_mod"
"""The attribute ``torch.compile`` keeps the original module under; it wraps submodules too."""


def unwrapped(name: str) -> str:
    """The name without wrappers.

    Leading ``module`` and ``_orig_mod`` segments go, in any order, and ``_orig_mod`` anywhere
    (``model._orig_mod.layer``).  The last segment is never taken away.
    """
    if not name.startswith((_MODULE + ".", _COMPILED + ".")) and f".{_COMPILED}." not in name:
        return name
    *parents, last = name.split(".")
    leading = 0
    while leading < len(parents) and parents[leading] in (_MODULE, _COMPILED):
        leading += 1
    return ".".join([*(part for part in parents[leading:] if part != _COMPILED), last])


@dataclass(frozen=True, slots=True)
class StripModule:
    """Take every wrapper off the names: ``module.``, ``_orig_mod.``, nested in any order.

    Names that carry none are left as they are, so it is safe to apply twice.

    Raises (when applied):
        KeyCollisionError: two names would become one.
    """

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        def strip_path(path: str) -> str:
            # A module path has no tensor name at its end; a stand-in keeps the last segment apart.
            return unwrapped(path + ".x" if path else "x")[:-2]

        return _renamed(checkpoint, unwrapped, strip_path)


@dataclass(frozen=True, slots=True)
class StripPrefix:
    """Strip one leading ``prefix`` from the names that carry it.

    Args:
        prefix: one or more whole segments; ``"module"`` and ``"module."`` mean the same.

    Raises:
        RewriteError: the prefix is empty.
        KeyCollisionError: (when applied) two names would become one.
    """

    prefix: str

    def __post_init__(self) -> None:
        _require(self.prefix)

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        dotted = self.prefix.rstrip(".") + "."

        def strip(name: str) -> str:
            return name.removeprefix(dotted)

        def strip_path(path: str) -> str:
            # The modules that the prefix names fall together with the root, unless they keep other tensors.
            if not dotted.startswith(path + "."):
                return strip(path)
            names = checkpoint.state_dict.everything
            keeps = any(name.startswith(path + ".") and not name.startswith(dotted) for name in names)
            return path if keeps else ""

        return _renamed(checkpoint, strip, strip_path)


@dataclass(frozen=True, slots=True)
class AddPrefix:
    """Put ``prefix`` before every name.

    Args:
        prefix: one or more whole segments; ``"module"`` and ``"module."`` mean the same.

    Raises:
        RewriteError: the prefix is empty.
    """

    prefix: str

    def __post_init__(self) -> None:
        _require(self.prefix)

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        bare = self.prefix.rstrip(".")
        wrapped = _renamed(checkpoint, lambda name: f"{bare}.{name}", lambda path: f"{bare}.{path}" if path else bare)
        versions = wrapped.state_dict.versions
        if versions is None:
            return wrapped
        # The wrappers' own entries, as Module.state_dict() writes them for a module of version 1.
        steps = bare.split(".")
        own = {".".join(steps[:depth]): InertDict([("version", 1)]) for depth in range(len(steps))}
        return _with_versions(wrapped, {**own, **versions})


@dataclass(frozen=True, slots=True)
class AddModule:
    """Put ``module.`` before every name, as a model in DataParallel saves itself."""

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        return AddPrefix(_MODULE)(checkpoint)


def _require(prefix: str) -> None:
    if not prefix.strip("."):
        raise RewriteError(f"the prefix {prefix!r} is empty; give at least one segment, such as 'module.'")


def _renamed(checkpoint: Checkpoint, rename: Callable[[str], str], rename_path: Callable[[str], str]) -> Checkpoint:
    """The checkpoint with tensor names, and what goes by them, renamed."""
    versions = checkpoint.state_dict.versions
    if versions is not None:
        versions = _renamed_versions(versions, rename_path)
    state_dict = checkpoint.state_dict.renamed(rename, versions)
    return checkpoint.replace(state_dict=state_dict, rest=_renamed_rest(checkpoint, rename))


def _renamed_rest(checkpoint: Checkpoint, rename: Callable[[str], str]) -> object:
    """The rest, with the names of the state_dict's tensors in the optimizers' ``param_names`` renamed.

    They are for people and tools: torch matches an optimizer's state by position, not by name.
    """
    replaced: list[tuple[object, object]] = []
    for node in walk(checkpoint.rest):
        if not isinstance(node, InertDict) or "params" not in node or "param_names" not in node:
            continue
        names = node["param_names"]
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            known = checkpoint.state_dict.everything
            renamed = [rename(name) if name in known else name for name in names]
            if renamed != names:
                replaced.append((names, renamed))
    return TreeMap(lambda leaf: leaf, replaced)(checkpoint.rest) if replaced else checkpoint.rest


def _renamed_versions(versions: Mapping[str, object], rename_path: Callable[[str], str]) -> dict[str, object]:
    """Module paths renamed.  Where a wrapper and what it wraps fall together the inner one counts."""
    origin: dict[str, str] = {}
    for path in versions:
        target = rename_path(path)
        if target not in origin or len(path) > len(origin[target]):
            origin[target] = path
    return {target: versions[path] for target, path in origin.items()}


def _with_versions(checkpoint: Checkpoint, versions: Mapping[str, object]) -> Checkpoint:
    return checkpoint.replace(state_dict=checkpoint.state_dict.renamed(lambda name: name, versions))
