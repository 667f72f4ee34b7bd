"""map_location: rewrite the device tags of every storage, with no such device at hand.

torch keeps a tag with each storage (``"cpu"``, ``"cuda:1"``) and restores it there at load, which
fails on a machine without that device.  The tag is all that differs; no tensor byte changes.

Some tensors have no storage on their device, and name it in the call that makes them, which
``torch.load`` maps too (``torch/_utils.py`` ``_get_restore_location``): tensors of XLA and the like, saved
as a tensor on the CPU or a numpy array, and subclasses that wrap other tensors.  Tensors on ``meta``
have no bytes; like torch, this leaves them there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from ckptkit.arguments import device_problem
from ckptkit.checkpoint import Checkpoint, Storage, TensorEntry
from ckptkit.errors import RewriteError
from ckptkit.pickling.inert import Global, Object, is_global
from ckptkit.pickling.layouts import device_of
from ckptkit.rewrite.storages import with_tensors_replaced

__all__ = ["LocationMap", "MapLocation"]

LocationMap = str | Mapping[str, str] | Callable[[Storage, str], object]
"""A location for everything; a dict from old to new; or ``f(storage, location)``."""

_LOCATION = re.compile(r"[a-z][a-z0-9_]*(:[0-9]{1,5})?\Z")
_BARE_CPU = re.compile(r"cpu(:0)?\Z")

_DEVICE_ARGUMENT = {
    "_rebuild_device_tensor_from_cpu_tensor": 2,
    "_rebuild_device_tensor_from_numpy": 2,
    "_rebuild_xla_tensor": 2,
    "_rebuild_wrapper_subclass": 6,
}
"""The functions of ``torch._utils`` that are given a device, and the place of that argument."""


@dataclass(frozen=True, slots=True)
class MapLocation:
    """Rewrite device tags: of the weights, the optimizer's state, and everything else in the file.

    Args:
        location: as ``torch.load``'s ``map_location``: a string (or ``torch.device``) for everything;
            a dict, in which tags that are no key stay; or a callable ``f(storage, location)``.
            The callable gets the `Storage` and its tag, and returns the new tag, ``None`` to keep
            it, or the storage itself, which (as in torch, where it is given on the CPU) means
            ``"cpu"``.

    Attributes:
        met: the tags of what it was applied to, as they were.

    Raises:
        RewriteError: what is given, or returned, is not a device of torch; (when applied) a callable is given and
            there are tensors that have no storage it could be asked about.  torch refuses them, too.
    """

    location: LocationMap
    met: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.location, Mapping):
            for old, new in self.location.items():
                _tag(old)
                _location(new)
        elif not _is_function(self.location):
            _location(self.location)

    @property
    def unmet(self) -> tuple[str, ...]:
        """The tags of a dict that nothing had it was applied to."""
        tags = map(str, self.location) if isinstance(self.location, Mapping) else ()
        return tuple(tag for tag in tags if tag not in self.met)

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

        def change(node: Object) -> None:
            if isinstance(node.cls, Global):
                node.args = self._with_device(node.cls, node.args)

        return with_tensors_replaced(checkpoint, leaf, change=change, module=True)

    def _with_device(self, function: Global, args: tuple[object, ...]) -> tuple[object, ...]:
        """The arguments of a call with the device among them mapped, if one is."""
        if is_global(function, "torch._tensor", "_rebuild_from_type_v2") and len(args) == 4:
            inner, arguments = args[0], args[2]  # the function that makes the tensor, and its arguments
            if isinstance(inner, Global) and isinstance(arguments, tuple):
                mapped = self._with_device(inner, arguments)
                return args if mapped is arguments else (*args[:2], mapped, args[3])
            return args
        place = _DEVICE_ARGUMENT.get(function.name) if function.module == "torch._utils" else None
        if place is None or place >= len(args):
            return args
        old = device_of(args[place])
        if old is None:
            return args
        if _is_function(self.location):
            raise RewriteError(
                f"a tensor on {old!r:.60} is saved without a storage there ({function.name}), so a function has "
                "nothing to be asked about; give a location or a dict of them"
            )
        tag = self._mapped(old)
        if tag == old:
            return args
        new: object = tag
        if isinstance(args[place], Object):
            kind, _, index = tag.partition(":")
            new = Object("reduce", Global("torch", "device"), (kind, int(index)) if index else (kind,))
        return (*args[:place], new, *args[place + 1 :])

    def _mapped(self, tag: str) -> str:
        """A tag by the forms that are no function."""
        self.met.add(tag)
        if isinstance(self.location, Mapping):
            tags = {str(old): new for old, new in self.location.items()}  # keys may be torch.device, too
            return _location(tags[tag]) if tag in tags else tag
        return _location(self.location)

    def _target(self, storage: Storage) -> str:
        if not _is_function(self.location):
            return self._mapped(storage.location)
        wanted = self.location(storage, storage.location)
        if wanted is None:
            return storage.location
        return "cpu" if wanted is storage else _location(wanted)


def _is_function(given: object) -> TypeGuard[Callable[[Storage, str], object]]:
    """Whether it is the callable form; a ``torch.device`` can be called in some versions (as a decorator)."""
    return callable(given) and type(given).__name__ != "device"


def _tag(given: object) -> str:
    """A location tag, as a file may hold it, from a string or whatever prints as one (``torch.device``).

    Raises:
        RewriteError: it is none, or ``meta``, where tensors have no bytes.
    """
    text = str(given)
    if not _LOCATION.match(text) or text.startswith("meta"):
        raise RewriteError(f"{text!r:.80} is not a device location; expected 'cpu', 'cuda:0', 'mps' or the like")
    return text


def _location(given: object) -> str:
    """A location tag to be written.

    Raises:
        RewriteError: it is none that torch could load.
    """
    text = _tag(given)
    if problem := device_problem(text):
        raise RewriteError(problem)
    return "cpu" if _BARE_CPU.match(text) else text
