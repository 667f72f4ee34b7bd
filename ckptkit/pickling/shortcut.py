"""A tensor's pickle in one step: what nine tenths of a checkpoint's opcodes spell, matched as one pattern.

``torch.save`` writes every tensor but the first few with the same forty opcodes (pickle protocol 2), after
the name ``torch._utils._rebuild_tensor_v2`` was pushed::

    MARK MARK GET storage GET class KEY GET location NUMEL [NONE] TUPLE PUT BINPERSID
    OFFSET SIZE PUT STRIDE PUT NEWFALSE GET OrderedDict EMPTY_TUPLE REDUCE PUT TUPLE PUT REDUCE PUT

`TensorShortcut` recognizes exactly that and makes the same `TensorEntry` that the opcodes one by one
make, at a third of the time and memory: the arguments, which nothing refers to, are not kept.  What
differs in anything is left to the opcodes; so is a pickle that does refer to them, from its beginning
(`ckptkit.pickling.reader`).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable
from struct import Struct

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import FormatError
from ckptkit.pickling.inert import Global, is_global
from ckptkit.tensor import tensor_of

__all__ = ["REBUILD", "TensorShortcut"]

REBUILD = ("torch._utils", "_rebuild_tensor_v2")
"""The name whose call is recognized."""

_GET = rb"h.|j...."
_INT = rb"K.|M..|J....|\x8a\x05.....|\x8a\x06......"
_SIZE = rb"\)|(?:%(i)s)\x85|(?:(?:%(i)s)){2}\x86|(?:(?:%(i)s)){3}\x87|\((?:%(i)s)(?:(?:%(i)s)){3,5}t" % {b"i": _INT}
_MEMOIZED = rb"(?:(?<!\))r(....)|(?<=\)))"  # an empty tuple is not memoized
_INDEX = Struct("<I").unpack
_INDICES = Struct("<7I").unpack

_MOST_KNOWN = 4096
"""Sizes with strides that are kept; models have some hundreds."""

_HUGE = 1 << 62
"""Elements no tensor has."""

_Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, stride, and how many elements after its offset the last one touched ends."""


@functools.cache
def _pattern() -> Callable[[bytes, int], re.Match[bytes] | None]:
    """Each alternative begins with another opcode: it can be read in one way, the opcodes' own."""
    return re.compile(
        rb"\(\((%(get)s)(%(get)s)"  # 1, 2: "storage" and the class
        rb"(?:X(.)\0\0\0([0-9]{1,18})r(....)|(%(get)s))"  # 3 to 5: length of the key, the key, its PUT; 6: its GET
        rb"(%(get)s)(%(int)s)N?tr(....)Q"  # 7 to 9: location, number of elements, PUT
        rb"(%(int)s)(%(size)s)%(put)s(%(size)s)%(put)s"  # 10 to 14: offset, size and PUT, stride and PUT
        rb"([\x88\x89])(%(get)s)\)Rr(....)tr(....)Rr(....)"  # 15 to 19: requires_grad, OrderedDict, PUTs
        % {b"get": _GET, b"int": _INT, b"size": _SIZE, b"put": _MEMOIZED},
        re.DOTALL,
    ).match


class TensorShortcut:
    """Recognizes whole tensors in the pickle of one file.

    Args:
        persistent_load: from a persistent id to the `Storage` it names.
        after: tensors that are left to the opcodes: making the pattern takes as long as a hundred of them.
    """

    def __init__(self, persistent_load: Callable[[object], object], after: int = 100) -> None:
        self._persistent_load = persistent_load
        self._after = after
        self._last, self._size = -1, 0  # the highest index of the memo when it had so many entries
        self._match: Callable[[bytes, int], re.Match[bytes] | None] | None = None
        self._geometries: dict[tuple[bytes, bytes], _Geometry] = {}
        self._numbers: dict[bytes, int] = {}
        self._names: dict[tuple[bytes, ...], _Names] = {}

    def __call__(self, data: bytes, at: int, memo: dict[int, object]) -> tuple[int, TensorEntry] | None:
        """The position after the tensor that begins with the MARK at ``at``, and the tensor.

        Of its memo entries those are made that other tensors refer to: the storage's key and the tensor.
        ``None``: it is not quite like others, and nothing was done.
        """
        if self._after > 0:
            self._after -= 1
            return None
        if self._match is None:
            self._match = _pattern()
        found = self._match(data, at)
        if found is None:
            return None
        (
            get_storage, get_class, key_size, key, put_key, get_key, get_location, numel, put_id,
            offset, shape, put_shape, stride, put_stride, needs_grad, get_dict, put_dict, put_args, put_tensor,
        ) = found.groups()  # fmt: skip
        names = get_storage, get_class, get_location, get_dict
        known = self._names.get(names)
        if known is None or not known.hold(memo):
            known = self._names[names] = _Names(memo, *map(_index, names))
        if not known.are_usual:
            return None
        parts = (put_key, put_id, put_shape, put_stride, put_dict, put_args, put_tensor)
        puts = self._new_entries(parts, memo)
        if puts is None:
            return None  # entries that take the place of others
        if key is None:
            text = memo.get(_index(get_key))
        elif key_size[0] == len(key):
            text = key.decode("ascii")
        else:
            return None
        geometry = self._geometries.get((shape, stride)) or self._geometry(shape, stride)
        if geometry is None:
            return None
        numbers = self._numbers
        count = numbers[numel] if numel in numbers else self._number(numel)
        first = numbers[offset] if offset in numbers else self._number(offset)
        try:
            storage = self._persistent_load(("storage", known.cls, text, known.location, count))
        except FormatError:
            return None  # the opcodes will say where
        if not isinstance(storage, Storage) or storage.dtype is None or first < 0:
            return None
        sizes, strides, reach = geometry
        row = DTYPES[storage.dtype]
        if (first + reach) * row.itemsize > storage.nbytes or row.kind == "quantized":
            return None  # it does not lie inside its storage, or is no plain tensor
        entry = tensor_of(storage, first, sizes, strides, row.name, needs_grad == b"\x88")
        if key is not None:
            memo[puts[0]] = text
        memo[puts[-1]] = entry
        known.made.calls += 1
        return found.end(), entry

    def _new_entries(self, parts: tuple[bytes | None, ...], memo: dict[int, object]) -> tuple[int, ...] | None:
        """The memo indices of a tensor's PUTs, those left out aside; ``None``: an entry is there, or made twice."""
        if len(memo) > self._size:
            self._see(memo)
        if None not in parts:
            puts = a, b, c, d, e, f, g = _INDICES(b"".join(parts))  # type: ignore[arg-type]  # all are there
            if self._last < a < b < c < d < e < f < g:
                return puts
        indices = tuple(_INDEX(put)[0] for put in parts if put)
        return indices if len(set(indices)) == len(indices) and memo.keys().isdisjoint(indices) else None

    def _see(self, memo: dict[int, object]) -> None:
        """Take note of the memo's highest index; entries are never taken out of it."""
        new = itertools.islice(reversed(memo), len(memo) - self._size)
        self._last, self._size = max(self._last, *new), len(memo)

    def _number(self, opcode: bytes) -> int:
        if len(self._numbers) >= _MOST_KNOWN:
            self._numbers.clear()
        number = self._numbers[opcode] = _ints(opcode)[0]
        return number

    def _geometry(self, shape: bytes, stride: bytes) -> _Geometry | None:
        """The geometry two sizes spell; ``None``: an empty tensor, or one that is none."""
        if len(self._geometries) >= _MOST_KNOWN:
            self._geometries.clear()
        sizes, strides = _ints(shape), _ints(stride)
        if len(sizes) != len(strides) or min(sizes, default=1) < 1 or min(strides, default=0) < 0:
            return None
        if math.prod(sizes) >= _HUGE:
            return None
        reach = 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
        self._geometries[shape, stride] = sizes, strides, reach
        return sizes, strides, reach


class _Names:
    """What the four GETs of a tensor name, for as long as the memo has it there."""

    __slots__ = ("_found", "_get", "are_usual", "cls", "location", "made")

    def __init__(self, memo: dict[int, object], *indices: int) -> None:
        self._get = operator.itemgetter(*indices)
        self._found = storage, self.cls, self.location, found = tuple(map(memo.get, indices))
        self.made = found if isinstance(found, Global) else Global("", "")
        self.are_usual = storage == "storage" and is_global(found, "collections", "OrderedDict")

    def hold(self, memo: dict[int, object]) -> bool:
        """Whether the memo still has them all."""
        return self.are_usual and self._get(memo) == self._found


def _index(get: bytes) -> int:
    """The memo index of a BINGET or LONG_BINGET."""
    return get[1] if len(get) == 2 else int.from_bytes(get[1:], "little")


def _ints(opcodes: bytes) -> tuple[int, ...]:
    """The numbers that BININT1, BININT2, BININT and LONG1 push; other opcodes are passed over."""
    numbers = []
    at, end = 0, len(opcodes)
    while at < end:
        width = _WIDTHS.get(opcodes[at])
        if width is None:
            at += 1
            continue
        start = at + 1
        if width == 0:
            start, width = at + 2, opcodes[at + 1]
        at = start + width
        numbers.append(int.from_bytes(opcodes[start:at], "little", signed=width > 2))
    return tuple(numbers)


_WIDTHS = {0x4B: 1, 0x4D: 2, 0x4A: 4, 0x8A: 0}
"""Bytes of the number after each opcode; 0: the next byte says how many."""
