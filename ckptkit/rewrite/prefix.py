"""Prefixes of names: strip and add them by whole leading segments.

Names are dotted paths.  A prefix is stripped only where it is a leading run of whole segments:
``mlp_module.layer`` does not begin with ``module.``, and a name without the prefix is left alone.
The module versions (``_metadata``) and the names an optimizer keeps its state by, or beside it
(``param_names``), move along with the names they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import RewriteError
from ckptkit.normalize.wrappers import MODULE, unwrapped, unwrapped_path
from ckptkit.rewrite.names import renamed, wrapper_versions

__all__ = ["AddModule", "AddPrefix", "StripModule", "StripPrefix"]


@dataclass(frozen=True, slots=True)
class StripModule:
    """Take every wrapper off the names: ``module.``, ``_orig_mod.`` and others, nested in any order.

    What a wrapper's prefix is says `ckptkit.normalize.wrappers`.  Names that carry none are left as they are, so it
    is safe to apply twice.

    Raises (when applied):
        KeyCollisionError: two names would become one.
    """

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``."""
        return unwrapped(name)

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        return _renamed(checkpoint, unwrapped, unwrapped_path)


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

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``."""
        return name.removeprefix(self.prefix.rstrip(".") + ".")

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        dotted = self.prefix.rstrip(".") + "."

        def strip_path(path: str) -> str:
            # The modules that the prefix names fall together with the root, unless they keep other tensors.
            if not dotted.startswith(path + "."):
                return self.rename(path)
            names = checkpoint.state_dict.everything
            keeps = any(name.startswith(path + ".") and not name.startswith(dotted) for name in names)
            return path if keeps else ""

        return _renamed(checkpoint, self.rename, strip_path)


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

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``."""
        return f"{self.prefix.rstrip('.')}.{name}"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        bare = self.prefix.rstrip(".")
        versions = checkpoint.state_dict.versions
        if versions is not None:
            inner = {f"{bare}.{path}" if path else bare: entry for path, entry in versions.items()}
            versions = {**wrapper_versions(bare), **inner}
        return renamed(checkpoint, self.rename, versions)


@dataclass(frozen=True, slots=True)
class AddModule:
    """Put ``module.`` before every name, as a model in DataParallel saves itself."""

    def rename(self, name: str) -> str:
        """The new name of what is called ``name``."""
        return f"{MODULE}.{name}"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        return AddPrefix(MODULE)(checkpoint)


def _require(prefix: str) -> None:
    if not prefix.strip("."):
        raise RewriteError(f"the prefix {prefix!r} is empty; give at least one segment, such as 'module.'")


def _renamed(checkpoint: Checkpoint, rename: Callable[[str], str], rename_path: Callable[[str], str]) -> Checkpoint:
    """The checkpoint with tensor names, and what goes by them, renamed."""
    versions = checkpoint.state_dict.versions
    return renamed(checkpoint, rename, None if versions is None else _renamed_versions(versions, rename_path))


def _renamed_versions(versions: Mapping[str, object], rename_path: Callable[[str], str]) -> dict[str, object]:
    """Module paths renamed.  Where a wrapper and what it wraps fall together the inner one counts."""
    origin: dict[str, str] = {}
    for path in versions:
        target = rename_path(path)
        if target not in origin or len(path) > len(origin[target]):
            origin[target] = path
    return {target: versions[path] for target, path in origin.items()}
