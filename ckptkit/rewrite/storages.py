"""Tensors and the storages they share: replaced everywhere, without unused bytes, tied or not.

torch saves whole storages: ``big[:10]`` takes all of ``big`` with it.  The used part of a storage consists of runs of
bytes: spans of tensors (`TensorEntry.span`) that overlap or touch are one, so ties, overlaps and neighboring slices
still share.

map_location: rewrite the device tags of every storage, with no such device at hand.

torch keeps a tag with each storage (``"cpu"``, ``"cuda:1"``) and restores it there at load, which
fails on a machine without that device.  The tag is all that differs; no tensor byte changes.

Some tensors have no storage on their device, and name it in the call that makes them, which
``torch.load`` maps too (``torch/_utils.py`` ``_get_restore_location``): tensors of XLA and the like, saved
as a tensor on the CPU or a numpy array, and subclasses that wrap other tensors.  Tensors on ``meta``
have no bytes; like torch, this leaves them there.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, replace
from typing import Literal, TypeGuard, get_args

from ckptkit.arguments import device_problem
from ckptkit.checkpoint import Checkpoint, StateDict, Storage, TensorEntry, tied_groups
from ckptkit.dtypes import DTYPES
from ckptkit.errors import RewriteError
from ckptkit.normalize.sections import is_plain_value
from ckptkit.pickling.inert import Global, Object, TreeMap, is_global, mapping_shell, walk
from ckptkit.pickling.layouts import device_of
from ckptkit.report import count_of, listed
from ckptkit.startup import dataclass

__all__ = [
    "Compact",
    "LocationMap",
    "MapLocation",
    "Tied",
    "TiedPolicy",
    "dead_bytes",
    "nodes",
    "with_tensors_replaced",
]


def with_tensors_replaced(
    checkpoint: Checkpoint,
    leaf: Callable[[object], object],
    *,
    change: Callable[[Object], None] | None = None,
    module: bool = False,
) -> Checkpoint:
    """The checkpoint with every `TensorEntry` and bare `Storage` replaced; what is shared stays shared.

    Args:
        checkpoint: its weights, what hangs on their mapping, and everything beside them are processed.
        leaf: from a tensor or storage to what takes its place; called once for each.
        change: called with the copy of each object, which it may change.
        module: whether the module that the weights were walked from is processed too.  It is not written.
    """
    mapped = TreeMap(leaf)
    state_dict = checkpoint.state_dict.with_values(mapped)
    shell, rest = mapped(_hanging(state_dict)), mapped(checkpoint.rest)
    made = mapped(checkpoint.module) if module else checkpoint.module
    if change is not None:
        others = [value for value in state_dict.everything.values() if not is_plain_value(value)]
        for node in walk([others, shell, rest, made if module else None]):
            if isinstance(node, Object):
                change(node)
    if shell is not None:
        state_dict = StateDict(
            state_dict.everything, versions=state_dict.versions, container=shell, is_module=state_dict.is_module
        )
    return checkpoint.replace(state_dict=state_dict, rest=rest, module=made)


def nodes(checkpoint: Checkpoint) -> Iterator[object]:
    """Every node that a writer may write; a plain tensor of the state_dict once for each of its places."""
    values = checkpoint.state_dict.everything.values()
    yield from filter(is_plain_value, values)
    yield from walk(
        [
            [value for value in values if not is_plain_value(value)],
            _hanging(checkpoint.state_dict),
            checkpoint.rest,
        ]
    )


def _hanging(state_dict: StateDict) -> object:
    """The values written around the weights: their module, or attributes of their mapping."""
    return state_dict.container if state_dict.is_module else mapping_shell(state_dict.container)


@dataclass(frozen=True, slots=True)
class Compact:
    """Reduce storages to the bytes that tensors use.

    Each run of used bytes in a storage with unused ones becomes a separate storage.  Storages that are values
    themselves stay whole, as do those whose bytes are all used.
    """

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        cuts = {id(storage): _Cut(storage, runs) for storage, runs in _cuttable(checkpoint)}
        if not cuts:
            return checkpoint

        def leaf(node: object) -> object:
            cut = cuts.get(id(node.storage)) if isinstance(node, TensorEntry) else None
            return node if cut is None or not isinstance(node, TensorEntry) else cut.moved(node)

        return with_tensors_replaced(checkpoint, leaf)


def dead_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many storages `Compact` would cut, and the bytes that no tensor views of them."""
    cuttable = _cuttable(checkpoint)
    return len(cuttable), sum(storage.nbytes - _viewed(runs) for storage, runs in cuttable)


_Runs = list[tuple[int, int]]
"""Of each run of viewed bytes the first byte and the byte after the last, in order."""


class _Cut:
    """A storage of which only parts are used.

    Args:
        storage: it.
        runs: the parts.
    """

    __slots__ = ("_empty", "_parts", "_starts", "storage")

    def __init__(self, storage: Storage, runs: _Runs) -> None:
        self.storage = storage
        self._starts = [start for start, _ in runs]
        self._parts = [self._part(start, end) for start, end in runs]
        self._empty: Storage | None = None

    def _part(self, start: int, end: int) -> Storage:
        return replace(
            self.storage,
            key=f"{self.storage.key}[{start}:{end}]",
            nbytes=end - start,
            source=self.storage.source.part(start, end - start),
            crc32=None,
            original=self.storage.original or self.storage,
        )

    def moved(self, entry: TensorEntry) -> TensorEntry:
        """The tensor over the part it views; one without elements over none."""
        if not entry.nbytes:
            self._empty = self._empty or self._part(0, 0)
            return replace(entry, storage=self._empty, storage_offset=0)
        index = bisect_right(self._starts, entry.span()[0]) - 1
        offset = entry.storage_offset - self._starts[index] // entry.itemsize
        return replace(entry, storage=self._parts[index], storage_offset=offset)


class _Use:
    """The used part of a storage."""

    __slots__ = ("spans", "storage", "width")

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.spans: list[tuple[int, int]] = []
        self.width = 1 if storage.dtype is None else DTYPES[storage.dtype].itemsize

    def runs(self) -> _Runs:
        """The parts that are viewed, each from a multiple of the widest element on."""
        width = self.width
        runs: _Runs = []
        for start, end in sorted(self.spans):
            first, last = start // width * width, min(-(-end // width) * width, self.storage.nbytes)
            if runs and first <= runs[-1][1]:
                runs[-1] = runs[-1][0], max(runs[-1][1], last)
            else:
                runs.append((first, last))
        return runs


def _viewed(runs: _Runs) -> int:
    return sum(end - start for start, end in runs)


def _cuttable(checkpoint: Checkpoint) -> list[tuple[Storage, _Runs]]:
    """The storages that have bytes no tensor views, and what is viewed of them."""
    uses: dict[int, _Use] = {}
    taken: set[int] = set()  # the whole storage stays: one tensor uses it, as in most files, or it is a value itself
    for node in nodes(checkpoint):
        if isinstance(node, TensorEntry):
            storage = node.storage
            if node.covers_storage:
                taken.add(id(storage))
                continue
            if id(storage) in taken:
                continue
            use = uses.get(id(storage))
            if use is None:
                use = uses[id(storage)] = _Use(storage)
            if node.nbytes:
                use.spans.append(node.span())
                use.width = max(use.width, node.itemsize)
        elif isinstance(node, Storage):
            taken.add(id(node))
    found = ((use.storage, use.runs()) for key, use in uses.items() if use.storage.nbytes and key not in taken)
    return [(storage, runs) for storage, runs in found if _viewed(runs) < storage.nbytes]


TiedPolicy = Literal["alias", "duplicate", "error"]


@dataclass(frozen=True, slots=True)
class Tied:
    """Choose what to do with tied tensors in the state_dict.

    Args:
        policy: ``"alias"`` keeps them tied, if the container can. ``"duplicate"`` gives every name but the first its
            own storage, which is written again; tensors that share a storage without being tied still share it.
            ``"error"`` refuses them.

    Raises:
        RewriteError: there is no such policy; (when applied) it is ``"error"`` and there are tied tensors.
    """

    policy: TiedPolicy

    def __post_init__(self) -> None:
        if self.policy not in get_args(TiedPolicy):
            raise RewriteError(
                f"no policy {self.policy!r} for tied tensors; choose from {', '.join(get_args(TiedPolicy))}"
            )

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        groups = [] if self.policy == "alias" else tied_groups(checkpoint.state_dict)
        if not groups:
            return checkpoint
        if self.policy == "error":
            tied = (listed(map(repr, names), between=" = ", characters=100) for names in groups)
            raise RewriteError(
                f"{count_of(len(groups), 'tensor', 'has', 'have')} several names: {listed(tied, between='; ')}; write "
                "them as one tensor ('alias') or as copies ('duplicate')",
                names=[name for names in groups for name in names],
            )
        again = {name for names in groups for name in names[1:]}
        state_dict = checkpoint.state_dict
        everything = {name: _copied(value) if name in again else value for name, value in state_dict.everything.items()}
        return checkpoint.replace(state_dict=state_dict.holding(everything, state_dict.versions))


def _copied(value: object) -> object:
    """The tensor over a new storage: another record of the same bytes."""
    return replace(value, storage=replace(value.storage)) if isinstance(value, TensorEntry) else value


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
        location: as ``torch.load``'s ``map_location``: a string (or ``torch.device``) for everything; a dict, where
            tags that are not keys do not change; or a callable ``f(storage, location)``. The callable gets the
            `Storage` and its tag, and returns the new tag, ``None`` to keep it, or the storage itself, which (as in
            torch, where it is given on the CPU) means ``"cpu"``.

    Attributes:
        met: the original tags in the checkpoint it was applied to.

    Raises:
        RewriteError: a tag that was given or returned is not a torch device; (when applied) a callable is given and
            some tensors have no storage to pass to it.  torch refuses them, too.
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
        """The tags in a dict that nothing in the checkpoint had."""
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
                "no storage to receive; give a location or a dict of locations"
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
        """A tag by the forms that are not functions."""
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
        RewriteError: it is not one, or ``meta``, where tensors have no bytes.
    """
    text = str(given)
    if not _LOCATION.match(text) or text.startswith("meta"):
        raise RewriteError(f"{text!r:.80} is not a device location; expected 'cpu', 'cuda:0', 'mps' or similar")
    return text


def _location(given: object) -> str:
    """A location tag to be written.

    Raises:
        RewriteError: torch could not load it.
    """
    text = _tag(given)
    if problem := device_problem(text):
        raise RewriteError(problem)
    return "cpu" if _BARE_CPU.match(text) else text
