"""The way through, and the judges: torch writes and loads, ckptkit converts in between."""

from __future__ import annotations

import collections
import enum
import functools
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.transfer import writing
from support.generated_objects import Slotted

Rewriter = Callable[[Checkpoint], Checkpoint]


def save(
    obj: object, path: Path, tags: dict[int, str] | None = None, protocol: int = 2, *, legacy: bool = False
) -> Path:
    """Write with torch; storages are tagged by the address of their data."""
    by_address = tags or {}
    with mock.patch("torch.serialization.location_tag", lambda storage: by_address.get(storage.data_ptr(), "cpu")):
        torch.save(obj, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path


def through(source: Path, destination: Path, *rewriters: Rewriter) -> Path:
    """Read, rewrite and write with ckptkit's parts: no more than that is done."""
    checkpoint, file = formats.read(source)
    with closing(file):
        write = formats.format_for(destination).write
        assert write is not None
        plan = write(checkpoint.rewrite(*rewriters))
        writing.write_atomically(destination, plan, force=True, check=None)
    assert destination.stat().st_size == plan.nbytes
    return destination


def convert(source: Path, destination: Path, **options: Any) -> Path:
    """As ``ckptkit convert`` does; gives what was written: of shards, their index.

    Whatever torch could load of the source without executing it, it must load of the output.
    """
    report = ckptkit.convert(source, destination, force=True, **options)
    written = Path(report.details["destination"])
    if written.suffix == ".pth" and _loads_weights_only(source):
        assert _loads_weights_only(written)
    return written


def _loads_weights_only(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of newer pickle protocols, of sparse tensors
            torch.load(path, map_location=lambda storage, tag: storage, weights_only=True)
    except Exception:  # whatever torch makes of a file that is none of its own
        return False
    return True


@dataclass
class Loaded:
    """What torch loads.

    Attributes:
        tree: it.
        tags: of its storages that hold bytes, in the order they are met.  Of an empty one torch makes another each
            time it is named: from a zip file it asks for a place for each, from a legacy file for the first alone.
        of: the tag of each storage by its address, ``_cdata``.
        kept: the storages, so that no address is taken again.
    """

    tree: Any
    tags: list[str] = field(default_factory=list)
    of: dict[int, str] = field(default_factory=dict)
    kept: list[torch.UntypedStorage] = field(default_factory=list)

    def tag(self, tensor: torch.Tensor) -> str | None:
        """The device tag of the tensor's storage; ``None`` where torch did not ask for its place: see ``tags``."""
        storage = tensor.untyped_storage()
        return self.of.get(storage._cdata) if not storage.nbytes() else self.of[storage._cdata]


def check_tags(old: Loaded, new: Loaded, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Every storage keeps its device tag."""
    known = [pair for pair in pairs if old.tag(pair[0]) is not None]
    assert [new.tag(after) for _, after in known] == [old.tag(before) for before, _ in known]


def load(path: Path) -> Loaded:
    """What torch loads, put on the CPU whatever the tags say."""
    loaded = Loaded(None)

    def cpu(storage: Any, tag: str) -> Any:
        untyped = storage if isinstance(storage, torch.UntypedStorage) else storage._untyped_storage
        if untyped.nbytes():
            loaded.tags.append(tag)
        loaded.of[untyped._cdata] = tag
        loaded.kept.append(untyped)
        return storage

    loaded.tree = torch.load(path, map_location=cpu, weights_only=False)
    return loaded


def bits(tensor: torch.Tensor) -> list[int]:
    """The bytes of the values in C order, but of those that torch cannot negate: of what is to be negated."""
    if tensor.is_neg() and tensor.element_size() == 1:
        return [-1, *bits(torch._neg_view(tensor))]
    plain = tensor.detach().resolve_conj().resolve_neg().flatten().clone(memory_format=torch.contiguous_format)
    return plain.view(torch.uint8).tolist() if plain.numel() else []


def _one_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The values with every NaN replaced by the same bits."""
    tensor = torch._neg_view(tensor) if tensor.is_neg() else tensor
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    missing = plain.double().isnan().flatten()
    plain.view(-1).view(torch.uint8).view(-1, plain.element_size())[missing] = 255
    return plain


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and the byte after the last that it views of its storage."""
    width, start = tensor.element_size(), tensor.storage_offset()
    if not tensor.numel():
        return start * width, start * width
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * width, (start + last + 1) * width


class Same:
    """Holds two objects against each other: types, order, bits, and what is shared with what.

    Args:
        compacted: whether in the second what no tensor views may be gone, and storages be cut between tensors.
        cast: a dtype in which any NaN is as good as another: its bits after a cast depend on the processor.

    Attributes:
        tensors: the pairs of tensors that were met, each once.
    """

    def __init__(self, *, compacted: bool = False, cast: torch.dtype | None = None) -> None:
        self._compacted = compacted
        self._cast = cast
        self.tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pairs: dict[tuple[str, int], int] = {}
        self._back: dict[tuple[str, int], int] = {}

    def __call__(self, a: Any, b: Any, at: str = "root") -> None:
        assert type(a) is type(b), at
        if isinstance(a, float):
            assert struct.pack("d", a) == struct.pack("d", b), at
        elif isinstance(a, complex):
            assert struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag), at
        elif isinstance(a, torch.Tensor):
            if not self._seen("object", id(a), id(b), at):
                self._tensor(a, b, at)
        elif isinstance(a, torch.UntypedStorage):
            if a.nbytes() + b.nbytes() and not self._seen("storage", a._cdata, b._cdata, at):
                assert a.tolist() == b.tolist(), at
        elif isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tolist()) == (b.dtype, b.shape, b.tolist()), at
        elif isinstance(a, functools.partial):
            assert (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords), at
        elif isinstance(a, tuple):  # shared or not, it is the same value; cycles pass through something else
            self._items(a, b, at)
        elif isinstance(a, (enum.Enum, type)) or not (hasattr(a, "__dict__") or isinstance(a, COMPOUND)):
            assert a == b, at
        elif not self._seen("object", id(a), id(b), at):
            self._members(a, b, at)

    def _seen(self, kind: str, a: int, b: int, at: str) -> bool:
        """Whether the two were paired before; sharing must be the same on both sides."""
        if (kind, a) in self._pairs or (kind, b) in self._back:
            assert self._pairs.get((kind, a)) == b, f"{at}: shared with something else"
            assert self._back.get((kind, b)) == a, f"{at}: shared with something else"
            return True
        self._pairs[kind, a], self._back[kind, b] = b, a
        return False

    def _items(self, a: Any, b: Any, at: str) -> None:
        assert len(a) == len(b), at
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            self(left, right, f"{at}[{index}]")

    def _members(self, a: Any, b: Any, at: str) -> None:
        if isinstance(a, dict):
            self._items(list(a), list(b), f"{at}.keys()")
            self._items(list(a.values()), list(b.values()), f"{at}.values()")
        elif isinstance(a, (list, collections.deque)):
            self._items(a, b, at)
        elif isinstance(a, (set, frozenset)):
            self._items(sorted(a, key=repr), sorted(b, key=repr), at)
        if isinstance(a, collections.defaultdict):
            assert a.default_factory is b.default_factory, at
        if isinstance(a, collections.deque):
            assert a.maxlen == b.maxlen, at
        for name in getattr(type(a), "__slots__", ()):
            self(getattr(a, name), getattr(b, name), f"{at}.{name}")
        if hasattr(a, "__dict__"):
            self(vars(a), vars(b), f"vars({at})")

    def _tensor(self, a: torch.Tensor, b: torch.Tensor, at: str) -> None:
        assert (a.dtype, a.shape, a.requires_grad, a.is_conj(), a.is_neg()) == (
            *(b.dtype, b.shape, b.requires_grad, b.is_conj(), b.is_neg()),
        ), at
        self.tensors.append((a, b))
        self(vars(a), vars(b), f"vars({at})")
        if a.layout is not torch.strided:
            self._items((a._indices(), a._values()), (b._indices(), b._values()), at)
            return
        assert a.stride() == b.stride(), at
        if self._compacted:
            assert bits(a) == bits(b) or (a.dtype == self._cast and bits(_one_nan(a)) == bits(_one_nan(b))), at
            return
        assert a.storage_offset() == b.storage_offset(), at
        self(a.untyped_storage(), b.untyped_storage(), f"{at}.untyped_storage()")


COMPOUND = (dict, list, collections.deque, set, frozenset, Slotted)


def check_compacted(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """What overlapped still does, at the same distance; what did not does not; and nothing is left over."""
    full = [(a, b) for a, b in pairs if a.numel()]
    for number, (a, b) in enumerate(full):
        for other, another in full[:number]:
            shift = _overlap(a, other)
            assert _overlap(b, another) == shift
    viewed: dict[int, list[torch.Tensor]] = collections.defaultdict(list)
    for _, b in pairs:
        viewed[b.untyped_storage()._cdata].append(b)
    for views in viewed.values():
        nbytes, width = views[0].untyped_storage().nbytes(), max(view.element_size() for view in views)
        covered = {byte // width for view in views for byte in range(*span(view))}
        assert covered == set(range(-(-nbytes // width)))


def _overlap(one: torch.Tensor, other: torch.Tensor) -> int | None:
    """By how many bytes one begins behind the other where they share bytes; else ``None``."""
    (start, end), (first, last) = span(one), span(other)
    shares = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return start - first if shares and start < last and first < end else None


def snapshot(root: object) -> dict[int, tuple[object, ...]]:
    """Every object below a `Checkpoint` by its identity, with what it holds; kept alive by what it returns."""
    seen: dict[int, tuple[object, ...]] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) in seen or isinstance(node, (str, bytes, int, float, type(None), type)):
            continue
        parts = list(_parts(node))
        seen[id(node)] = (node, type(node), *((part if isinstance(part, (str, int)) else id(part)) for part in parts))
        stack.extend(parts)
    return seen


def _parts(node: object) -> Iterator[object]:
    if isinstance(node, dict):
        yield from node
        yield from node.values()
    elif isinstance(node, (list, tuple, set, frozenset)):
        yield from node
    elif not isinstance(node, SourceFile):
        names = [name for kind in type(node).__mro__ for name in getattr(kind, "__slots__", ())]
        unchanging = [name for name in names if name not in ("_lock", "_index", "_plain", "__weakref__")]
        yield from (getattr(node, name) for name in unchanging if hasattr(node, name))


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values are one, in everything that torch decides about them."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(theirs, dict):
        if getattr(ours, "default_factory", None) is not getattr(theirs, "default_factory", None):
            return False
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(theirs, io.BytesIO):
        return ours.getvalue() == theirs.getvalue()
    if isinstance(theirs, np.ndarray):
        flags = [(a.flags.f_contiguous, a.flags.c_contiguous, a.flags.writeable) for a in (ours, theirs)]
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs) and flags[0] == flags[1]
    if not isinstance(theirs, torch.Tensor):
        return bool(ours == theirs)
    if torch.nn.parameter.is_lazy(theirs):
        return True
    facts = [(t.dtype, t.layout, t.device, t.requires_grad, t.is_nested, t.is_quantized) for t in (ours, theirs)]
    if facts[0] != facts[1]:
        return False
    if theirs.is_nested:
        return all(map(torch.equal, ours.unbind(), theirs.unbind()))
    if ours.shape != theirs.shape:
        return False
    if theirs.is_sparse:
        return ours.is_coalesced() == theirs.is_coalesced() and torch.equal(ours.to_dense(), theirs.to_dense())
    if theirs.layout != torch.strided:
        return torch.equal(ours.to_dense(), theirs.to_dense())
    if (ours.stride(), ours.storage_offset()) != (theirs.stride(), theirs.storage_offset()):
        return False
    if theirs.is_quantized:
        return ours.qscheme() == theirs.qscheme() and torch.equal(ours.dequantize(), theirs.dequantize())
    return theirs.is_meta or torch.equal(ours, theirs)
