"""map_location: rewrite the device tags of every storage, with no such device at hand.

torch keeps a tag with each storage (``"cpu"``, ``"cuda:1"``) and restores it there at load, which
fails on a machine without that device.  The tag is all that differs; no tensor byte changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.errors import RewriteError
from ckptkit.pickling.inert import TreeMap

__all__ = ["LocationMap", "MapLocation"]

LocationMap = str | Mapping[str, str] | Callable[[Storage, str], object]
"""A location for everything; a dict from old to new; or ``f(storage, location)``."""

_LOCATION = re.compile(r"[a-z][a-z0-9_]*(:[0-9]{1,5})?\Z")
_BARE_CPU = re.compile(r"cpu(:0)?\Z")


@dataclass(frozen=True, slots=True)
class MapLocation:
    """Rewrite device tags: of the weights, the optimizer's state, and everything else in the file.

    Args:
        location: as ``torch.load``'s ``map_location``: a string (or ``torch.device``) for everything;
            a dict, in which tags that are no key stay; or a callable ``f(storage, location)``.
            The callable gets the `Storage` and its tag, and returns the new tag, ``None`` to keep
            it, or the storage itself, which (as in torch, where it is given on the CPU) means
            ``"cpu"``.

    Raises:
        RewriteError: what is given, or returned, is no location.
    """

    location: LocationMap

    def __post_init__(self) -> None:
        if isinstance(self.location, Mapping):
            for old, new in self.location.items():
                _location(old)
                _location(new)
        elif not _is_function(self.location):
            _location(self.location)

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        moved: dict[int, tuple[Storage, Storage]] = {}  # the old one is kept so that its id stays taken

        def move(storage: Storage) -> Storage:
            if id(storage) not in moved:
                target = self._target(storage)
                new = storage if target == storage.location else replace(storage, location=target)
                moved[id(storage)] = (storage, new)
            return moved[id(storage)][1]

        def leaf(node: object) -> object:
            if isinstance(node, TensorEntry):
                storage = move(node.storage)
                return node if storage is node.storage else replace(node, storage=storage)
            return move(node) if isinstance(node, Storage) else node

        mapped = TreeMap(leaf)
        return checkpoint.replace(
            state_dict=checkpoint.state_dict.with_values(mapped),
            rest=mapped(checkpoint.rest),
            module=mapped(checkpoint.module),
        )

    def _target(self, storage: Storage) -> str:
        wanted: object
        if isinstance(self.location, Mapping):
            tags = {str(old): new for old, new in self.location.items()}  # keys may be torch.device, too
            if storage.location not in tags:
                return storage.location
            wanted = tags[storage.location]
        elif _is_function(self.location):
            wanted = self.location(storage, storage.location)
            if wanted is None:
                return storage.location
            if wanted is storage:
                return "cpu"
        else:
            wanted = self.location
        return _location(wanted)


def _is_function(given: object) -> TypeGuard[Callable[[Storage, str], object]]:
    """Whether it is the callable form; a ``torch.device`` can be called in some versions (as a decorator)."""
    return callable(given) and type(given).__name__ != "device"


def _location(given: object) -> str:
    """A location tag from a string or whatever prints as one (``torch.device``).

    Raises:
        RewriteError: it is none, or ``meta``, where tensors have no bytes.
    """
    text = str(given)
    if not _LOCATION.match(text) or text.startswith("meta"):
        raise RewriteError(f"{text!r} is no device location; expected 'cpu', 'cuda:0', 'mps' or the like")
    return "cpu" if _BARE_CPU.match(text) else text
