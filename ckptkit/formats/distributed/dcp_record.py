"""The ``.metadata`` of torch.distributed.checkpoint as columns: which tensors there are, and where they are.

`ckptkit.formats.distributed.dcp_metadata` makes it, once it agrees with itself; here it is checked against the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import NamedTuple

from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import CorruptError
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import count_of, listed
from ckptkit.startup import dataclass

__all__ = ["LISTED", "CopiedChunk", "Items", "Metadata", "TensorMetadata", "Wanted", "together"]

LISTED = 5
"""Names that a message lists."""


class Items(NamedTuple):
    """Where the stored items are, one row each.

    Attributes:
        paths: the file.
        starts, lengths: first byte and number of bytes in it.
        transforms: applied to the bytes: ``("stream.zstd/1",)``.
    """

    paths: Sequence[str]
    starts: Sequence[int]
    lengths: Sequence[int]
    transforms: Sequence[tuple[str, ...]]


class Wanted(NamedTuple):
    """A chunk of a tensor that an item must be."""

    row: int
    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(slots=True, eq=False)
class TensorMetadata:
    """One tensor.

    Attributes:
        name: the fqn.
        dtype: torch name of the elements' type.
        shape: its size in elements.
        requires_grad: whether it was trained; torch says ``False`` of all that a state_dict holds.
        offsets, sizes: of each chunk, in elements.
        rows: for each chunk, its place among `Items`; -1: an empty chunk that is nowhere.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    offsets: list[tuple[int, ...]]
    sizes: list[tuple[int, ...]]
    rows: list[int]


class CopiedChunk(NamedTuple):
    """A chunk of a tensor that two ranks stored.

    Attributes:
        wanted: the requirements for the first one's item.
        row: the other one's item.
    """

    wanted: Wanted
    row: int


@dataclass(slots=True, eq=False, kw_only=True)
class Metadata:
    """The content of a ``.metadata``.

    Attributes:
        tensors: by name, in order.
        objects: names of pickled objects, each with its row among ``items``.
        order: the names of both, in order.
        items: where each is.
        paths: for names the keys that lead to them; ``None``: the names themselves are the keys.
        version: of the metadata, ``"1.0.0"``; ``None``: not said.
        strings: the checkpoint's string metadata (`STRINGS`).
        protocol: of the pickle.
        globals: the verdicts on all names in it.
        copies: in the combined metadata of several ranks, the chunks that more than one has.
        others: likewise the further rows of what was pickled under one name.
    """

    tensors: dict[str, TensorMetadata]
    objects: dict[str, int]
    order: list[str]
    items: Items
    paths: dict[str, tuple[str | int, ...]] | None
    version: str | None
    strings: dict[str, str]
    protocol: int
    globals: tuple[GlobalUse, ...]
    copies: tuple[CopiedChunk, ...] = ()
    others: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether the chunks of each tensor are as many elements as it has."""
        return all(sum(map(math.prod, tensor.sizes)) == math.prod(tensor.shape) for tensor in self.tensors.values())

    def chunks(self) -> Iterator[Wanted]:
        """The requirements for the items of all tensors."""
        for tensor in self.tensors.values():
            for offsets, sizes, row in zip(tensor.offsets, tensor.sizes, tensor.rows, strict=True):
                if row >= 0:
                    yield Wanted(row, tensor.name, tensor.dtype, offsets, sizes)
        for copied in self.copies:
            yield copied.wanted._replace(row=copied.row)

    def check_files(self, sizes: dict[str, int | None]) -> None:
        """Hold the items against the files of the folder.

        Args:
            sizes: bytes of each file that an item names; ``None``: it is not there.

        Raises:
            CorruptError: some are not there, are shorter than they must be, or two items share bytes.
        """
        missing = [path for path, size in sizes.items() if size is None]
        if missing:
            raise CorruptError(
                f"{count_of(len(missing), 'file', 'is', 'are')} missing: {listed(missing, LISTED)}; "
                f"the checkpoint has {len(sizes):,}",
                names=missing,
            )
        placed: dict[str, list[tuple[int, int]]] = {path: [] for path in sizes}
        for path, start, length in zip(self.items.paths, self.items.starts, self.items.lengths, strict=True):
            placed[path].append((start, start + length))
        short = [path for path, spans in placed.items() if max(end for _, end in spans) > (sizes[path] or 0)]
        if short:
            end = max(end for _, end in placed[short[0]])
            raise CorruptError(
                f"{count_of(len(short), 'file', 'is', 'are')} cut short: {listed(short, LISTED)}; {short[0]} has "
                f"{sizes[short[0]]:,} bytes, but its items end at byte {end:,}",
                names=short,
            )
        for path, spans in placed.items():
            spans.sort()
            before = 0
            for start, end in spans:
                if start < before:
                    raise CorruptError(f"two items of {path} overlap from byte {start:,} on")
                before = end


def together(parts: Sequence[Metadata]) -> Metadata | None:
    """The metadata of several ranks, each of which knows only its own chunks.

    ``None``: it is not complete, or they contradict each other: each rank saved something different.
    """
    first, union, items = parts[0], _Union(), Items([], [], [], [])
    paths: dict[str, tuple[str | int, ...]] = {}
    for part in parts:
        own = part.paths or {}
        alike = all(paths.setdefault(name, path) == path for name, path in own.items())
        if not alike or (part.paths is None) != (first.paths is None) or not union.take(part, len(items.paths)):
            return None
        for column, more in zip(items, part.items, strict=True):
            column.extend(more)  # type: ignore[attr-defined]  # the lists above
    order = [*dict.fromkeys(name for part in parts for name in part.order)]
    whole = Metadata(
        tensors=union.tensors, objects=union.objects, order=order, items=items,
        paths=None if first.paths is None else paths,
        version=first.version, strings=first.strings, protocol=first.protocol,
        globals=merge_uses(*(part.globals for part in parts)),
        copies=tuple(union.copies), others=union.others,
    )  # fmt: skip
    return whole if whole.is_whole and not whole.objects.keys() & whole.tensors.keys() else None


class _Union:
    """The tensors and objects of several ranks."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorMetadata] = {}
        self.objects: dict[str, int] = {}
        self.copies: list[CopiedChunk] = []
        self.others: dict[str, list[int]] = {}
        self._rows: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}

    def take(self, part: Metadata, start: int) -> bool:
        """Take what one rank knows.

        Args:
            part: its metadata.
            start: how many items the ranks before have.

        Returns:
            Whether it says the same of tensors as these.
        """
        for name, row in part.objects.items():
            if self.objects.setdefault(name, start + row) != start + row:
                self.others.setdefault(name, []).append(start + row)
        for name, tensor in part.tensors.items():
            empty = TensorMetadata(name, tensor.dtype, tensor.shape, tensor.requires_grad, [], [], [])
            whole = self.tensors.setdefault(name, empty)
            if (whole.dtype, whole.shape) != (tensor.dtype, tensor.shape):
                return False
            for offsets, sizes, row in zip(tensor.offsets, tensor.sizes, tensor.rows, strict=True):
                self._chunk(whole, offsets, sizes, start + row if row >= 0 else row)
        return True

    def _chunk(self, whole: TensorMetadata, offsets: tuple[int, ...], sizes: tuple[int, ...], row: int) -> None:
        before = self._rows.setdefault((whole.name, offsets, sizes), row)
        if before == row:
            whole.offsets.append(offsets)
            whole.sizes.append(sizes)
            whole.rows.append(row)
        elif before >= 0 and row >= 0:
            self.copies.append(CopiedChunk(Wanted(before, whole.name, whole.dtype, offsets, sizes), row))
