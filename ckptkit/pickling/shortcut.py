"""A tensor's pickle in one step: what nine tenths of a checkpoint's opcodes spell, matched as one pattern.

``torch.save`` writes every tensor but the first with the same forty opcodes (pickle protocol 2), after the name
``torch._utils._rebuild_tensor_v2`` was pushed; a PUT is a BINPUT up to the memo's 256th entry, then a LONG_BINPUT::

    MARK MARK GET storage GET class KEY GET location NUMEL [NONE] TUPLE PUT BINPERSID
    OFFSET SIZE PUT STRIDE PUT NEWFALSE GET OrderedDict EMPTY_TUPLE REDUCE PUT TUPLE PUT REDUCE PUT

`TensorShortcut` recognizes exactly that and makes the same `TensorEntry` that the opcodes one by one
make, at a third of the time and memory: the arguments, which nothing refers to, are not kept.  What
differs in anything is left to the opcodes; so is a pickle that does refer to them, from its beginning
(`ckptkit.pickling.reader`).

In a state_dict the next tensor follows with its name, BINUNICODE LONG_BINPUT GET ``_rebuild_tensor_v2``: as long as
that continues, `TensorShortcut.follow` does not come back to the opcodes.  Most differ from an earlier one in the name,
the key and the memo's indices alone (`_Alike`): they are compared with it, which takes half the time of the pattern.
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

__all__ = ["OPCODES", "REBUILD", "TensorShortcut", "whole_numbers"]

REBUILD = ("torch._utils", "_rebuild_tensor_v2")
"""The name whose call is recognized."""

_GET = rb"h.|j...."
_INT = rb"K.|M..|J....|\x8a\x05.....|\x8a\x06......"
_SIZE = rb"\)|(?:%(i)s)\x85|(?:(?:%(i)s)){2}\x86|(?:(?:%(i)s)){3}\x87|\((?:%(i)s)(?:(?:%(i)s)){3,5}t" % {b"i": _INT}
_SHORT_PUT, _LONG_PUT = rb"q(.)", rb"r(....)"
_LAST_SHORT = 255
"""The last entry of the memo that a BINPUT can write."""

_INDICES = Struct("<7I").unpack
_NAMED_INDICES = Struct("<8I").unpack
_U32 = Struct("<I").unpack_from

_waiting = [100]
"""How many tensors are left to the opcodes, of all files together: making the pattern takes as long as these."""

_MOST_KNOWN = 4096
"""Sizes with strides that are kept; models have some hundreds."""

_HUGE = 1 << 62
"""Elements no tensor has."""

_FIELDS = 1, 6, 7, 11, 14, 17, 21, 22, 23
"""The groups of `_pattern` that differ in tensors that are spelled alike: the PUTs' indices, and `_KEY`."""

_KEY, _PUT_SHAPE, _PUT_STRIDE = 6, 14, 17
"""The groups of the storage's key, and of the PUTs of the sizes."""

_FEW = 4
"""Tensors that follow each other before it is worth noting how they are spelled."""

_Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, stride, and how many elements after its offset the last one touched ends."""


OPCODES = 4
"""Opcodes that a tensor in a state_dict counts for: its name, PUT, GET, and what the shortcut understands."""


@functools.cache
def _pattern(put: bytes) -> Callable[[bytes, int], re.Match[bytes] | None]:
    """A tensor, from its MARK on or from the end of its name.

    Each alternative begins with another opcode: it can be read in one way, the opcodes' own.
    """
    return re.compile(
        rb"(?:%(put)s(%(get)s))?"  # 1, 2: the PUT of a name, and the GET of `REBUILD`
        rb"\(\((%(get)s)(%(get)s)"  # 3, 4: "storage" and the class
        rb"(?:X(.)\0\0\0([0-9]{1,18})%(put)s|(%(get)s))"  # 5 to 7: length of the key, the key, its PUT; 8: its GET
        rb"(%(get)s)(%(int)s)N?t%(put)sQ"  # 9 to 11: location, number of elements, PUT
        rb"(%(int)s)(?:(%(size)s)%(size_put)s|(%(get)s))"  # 12 to 15: offset, size and PUT, or its GET
        rb"(?:(%(size)s)%(size_put)s|(%(get)s))"  # 16 to 18: stride and PUT, or its GET
        rb"([\x88\x89])(%(get)s)\)R%(put)st%(put)sR%(put)s"  # 19 to 23: requires_grad, OrderedDict, PUTs
        % {
            b"get": _GET,
            b"int": _INT,
            b"size": _SIZE,
            b"put": put,
            b"size_put": rb"(?:(?<!\))%b|(?<=\)))" % put,  # an empty tuple is not memoized
        },
        re.DOTALL,
    ).match


class TensorShortcut:
    """Recognizes whole tensors in the pickle of one file.

    Args:
        named: gives a storage by class, key, location and number of elements: `StorageTable.named`.
        after: tensors that are left to the opcodes; ``None``: those that are left of what a process leaves to them.
    """

    def __init__(self, named: Callable[[object, str, str, int], Storage], after: int | None = None) -> None:
        self._named = named
        self._after = _waiting if after is None else [after]
        self._puts = _SHORT_PUT
        self._last, self._size = -1, 0  # the highest index of the memo when it had so many entries
        self._geometries: dict[tuple[bytes, bytes], _Geometry] = {}
        self._spelled: dict[tuple[bytes, bytes], tuple[bytes | int | None, bytes | int | None]] = {}
        """For known sizes the PUTs after they were last spelled: their entries are made when a GET asks for them."""
        self._numbers: dict[bytes, int] = {}
        self._names: dict[tuple[bytes, ...], _Names] = {}

    def __call__(self, data: bytes, at: int, memo: dict[int, object]) -> tuple[int, TensorEntry] | None:
        """The position after the tensor that begins with the MARK at ``at``, and the tensor.

        Of its memo entries those are made that others refer to: the storage's key, sizes that are new, the tensor.
        ``None``: it is not quite like others, and nothing was done.
        """
        found = self._found(data, at, memo)
        if found is None:
            return None
        (
            _, _, get_storage, get_class, key_size, key, put_key, get_key, get_location, numel, put_id,
            offset, shape, put_shape, get_shape, stride, put_stride, get_stride,
            needs_grad, get_dict, put_dict, put_args, put_tensor,
        ) = found.groups()  # fmt: skip
        names = get_storage, get_class, get_location, get_dict
        known = self._names.get(names)
        if known is None or not known.hold(memo):
            known = self._names[names] = _Names(memo, *map(_index, names))
        if not known.are_usual:
            return None
        puts = self._indices((put_key, put_id, put_shape, put_stride, put_dict, put_args, put_tensor), memo)
        if puts is None:
            return None
        text = memo.get(_index(get_key)) if key is None else _key(key, key_size)
        if not isinstance(text, str):
            return None
        spelled = shape or get_shape, stride or get_stride
        known_sizes = self._geometries.get(spelled)
        if known_sizes is not None and get_shape is get_stride is None:
            geometry: _Geometry | None = known_sizes
        else:
            geometry = self._geometry(spelled, memo)
        if geometry is None:
            return None
        entry = self._entry(known, text, self._number(numel), self._number(offset), geometry, needs_grad == b"\x88")
        if entry is None:
            return None
        if key is not None:
            memo[puts[0]] = text
        if known_sizes is None:
            _keep_sizes(memo, put_shape, put_stride, geometry)
        elif put_shape or put_stride:
            self._spelled[spelled] = put_shape, put_stride
        memo[puts[-1]] = entry
        known.made.calls += 1
        return found.end(), entry

    def follow(
        self, data: bytes, at: int, memo: dict[int, object], stack: list[object], callee: Global, most: int
    ) -> tuple[int, int]:
        """The names and tensors that follow a tensor, as far as they resemble others; they are pushed.

        Args:
            data: the pickle.
            at: the position after the tensor.
            memo: gets what the names and tensors write; see `__call__`.
            stack: gets them.
            callee: the maker of the tensors.
            most: how many they may be.

        Returns:
            The position after the last of them, and how many they are.
        """
        count = 0
        if self._puts is not _LONG_PUT:
            return at, count
        if len(memo) > self._size:
            self._see(memo)
        match, last = _pattern(_LONG_PUT), self._last
        # What GETs name stays as it is meanwhile: nothing is written to entries that there are.
        kinds: dict[tuple[bytes, ...], _Names] = {}
        geometries: dict[tuple[bytes, bytes], _Geometry] = {}
        spellings: dict[tuple[object, ...], _Alike] = {}
        before = _Alike()
        while True:
            at, last, more, before = self._follow_alike(data, at, memo, stack, most - count, last, before)
            count += more
            if count >= most or data[at : at + 1] != b"X":
                break
            start = at + 5
            end = start + int.from_bytes(data[at + 1 : start], "little")
            found = match(data, end)
            if found is None:
                break
            (
                put_name, get_callee, get_storage, get_class, key_size, key, put_key, _, get_location, numel, put_id,
                offset, shape, put_shape, get_shape, stride, put_stride, get_stride,
                needs_grad, get_dict, put_dict, put_args, put_tensor,
            ) = found.groups()  # fmt: skip
            names = get_storage, get_class, get_location, get_dict, get_callee
            known = kinds.get(names) or _usual_names(memo, names, callee)
            if known is None or put_key is None or len(key) != key_size[0]:
                break
            kinds[names] = known
            puts = put_name, put_key, put_id, put_shape, put_stride, put_dict, put_args, put_tensor
            indices = _rising(last, puts)
            if indices is None:
                break
            spelled = shape or get_shape, stride or get_stride
            geometry = geometries.get(spelled)
            is_new = geometry is None and spelled not in self._geometries
            if geometry is None:
                geometry = self._geometry(spelled, memo)
                if geometry is None:
                    break
                geometries[spelled] = geometry
            made = known, self._number(numel), self._number(offset), geometry, needs_grad == b"\x88"
            entry = self._entry(known, text := key.decode("ascii"), *made[1:])
            if entry is None:
                break
            try:
                name = str(data[start:end], "utf-8", "surrogatepass")
            except UnicodeDecodeError:
                break
            memo[indices[0]] = name
            memo[indices[1]] = text
            if is_new:
                _keep_sizes(memo, put_shape, put_stride, geometry)
            elif put_shape or put_stride:
                self._spelled[spelled] = put_shape, put_stride
            last, at = indices[-1], found.end()
            memo[last] = entry
            stack += (name, entry)
            known.made.calls += 1
            count += 1
            if count >= _FEW:
                kind = names, numel, offset, spelled, needs_grad, len(key), at - end
                before.after = before = spellings.get(kind) or spellings.setdefault(kind, _Alike(found, spelled, made))
        self._last, self._size = last, len(memo)
        return at, count

    def _follow_alike(
        self, data: bytes, at: int, memo: dict[int, object], stack: list[object], most: int, last: int, before: _Alike
    ) -> tuple[int, int, int, _Alike]:
        """As `follow`, as far as each is spelled like the one that followed the same spelling before.

        Returns:
            The position after the last of them, the memo's highest index, how many they are, and their last spelling.
        """
        count, room = 0, len(data) - 5
        while count < most and at < room and data[at] == 0x58 and (alike := before.after) is not None:
            start = at + 5
            end = start + _U32(data, at + 1)[0]
            if end + alike.nbytes > len(data):
                break
            fields = alike.unpack(data, end)
            if fields[::2] != alike.fixed:
                break
            if alike.has_sizes:
                a, key, b, c, d, e, f, g, h = fields[1::2]
                is_new = last < a < b < c < d < e < f < g < h
            else:
                d = e = 0
                a, key, b, c, f, g, h = fields[1::2]
                is_new = last < a < b < c < f < g < h
            if not is_new or not key.isdigit():
                break
            known, numel, first, geometry, needs_grad = alike.made
            text = key.decode("ascii")
            entry = self._entry(known, text, numel, first, geometry, needs_grad)
            if entry is None:
                break
            try:
                name = str(data[start:end], "utf-8", "surrogatepass")
            except UnicodeDecodeError:
                break
            memo[a] = name
            memo[b] = text
            if d:
                self._spelled[alike.spelled] = d, e
            memo[h] = entry
            stack += (name, entry)
            known.made.calls += 1
            last, at, before = h, end + alike.nbytes, alike
            count += 1
        return at, last, count, before

    def _entry(
        self, known: _Names, key: str, count: int, first: int, geometry: _Geometry, needs_grad: bool
    ) -> TensorEntry | None:
        """The tensor; ``None``: the opcodes will say what is wrong with it."""
        if count < 0 or first < 0:
            return None
        try:
            storage = self._named(known.cls, key, known.location, count)
        except FormatError:
            return None  # the opcodes will say where
        if storage.dtype is None:
            return None
        sizes, strides, reach = geometry
        row = DTYPES[storage.dtype]
        if (first + reach) * row.itemsize > storage.nbytes or row.kind == "quantized":
            return None  # it is not inside its storage, or is not a plain tensor
        return tensor_of(storage, first, sizes, strides, row.name, needs_grad)

    def _found(self, data: bytes, at: int, memo: dict[int, object]) -> re.Match[bytes] | None:
        """The tensor's opcodes; ``None``: they are others, or those that follow are not worth a pattern yet."""
        if self._after[0] > 0:
            self._after[0] -= 1
            return None
        if len(memo) > _LAST_SHORT:  # the pattern of shorter PUTs need not be made
            self._puts = _LONG_PUT
        found = _pattern(self._puts)(data, at)
        if found is None and self._puts is _SHORT_PUT:
            found = _pattern(_LONG_PUT)(data, at)
            self._puts = _SHORT_PUT if found is None else _LONG_PUT
        return found

    def _see(self, memo: dict[int, object]) -> None:
        """Take note of the memo's highest index; entries are never taken out of it."""
        new = itertools.islice(reversed(memo), len(memo) - self._size)
        self._last, self._size = max(self._last, *new), len(memo)

    def _indices(self, puts: tuple[bytes | None, ...], memo: dict[int, object]) -> tuple[int, ...] | None:
        """The memo indices of PUTs; ``None``: an entry takes the place of another."""
        if len(memo) > self._size:
            self._see(memo)
        if None not in puts and self._puts is _LONG_PUT:
            indices = a, b, c, d, e, f, g = _INDICES(b"".join(puts))  # type: ignore[arg-type]
            if self._last < a < b < c < d < e < f < g:
                return indices
        found = tuple(int.from_bytes(put, "little") for put in puts if put)
        if found[0] <= self._last or sorted(found) != [*found]:
            self._spelled.clear()  # an entry may replace one that was left out
        return found if len(set(found)) == len(found) and memo.keys().isdisjoint(found) else None

    def _number(self, opcode: bytes) -> int:
        known = self._numbers.get(opcode)
        if known is not None:
            return known
        if len(self._numbers) >= _MOST_KNOWN:
            self._numbers.clear()
        number = self._numbers[opcode] = whole_numbers(opcode)[0]
        return number

    def _there(self, index: int, memo: dict[int, object]) -> object:
        """The memo, as if the tensor that spelled sizes last had been left to the opcodes."""
        for spelled, puts in self._spelled.items() if index not in memo else ():
            for put, sizes in zip(puts, self._geometries.get(spelled, ()), strict=False):
                if put and (put if isinstance(put, int) else int.from_bytes(put, "little")) == index:
                    memo[index] = sizes
        return memo.get(index)

    def _geometry(self, spelled: tuple[bytes, bytes], memo: dict[int, object]) -> _Geometry | None:
        """The geometry of two sizes, spelled out or in the memo; ``None``: an empty tensor, or an invalid one."""
        shape, stride = ((self._there(_index(get), memo) if get[0] in b"hj" else None) for get in spelled)
        known = self._geometries.get(spelled)
        if known is not None and (shape is None or shape is known[0]) and (stride is None or stride is known[1]):
            return known
        if len(self._geometries) >= _MOST_KNOWN:
            self._geometries.clear()
            self._spelled.clear()
        sizes, strides = (
            _sizes(there) if opcodes[0] in b"hj" else whole_numbers(opcodes)
            for opcodes, there in zip(spelled, (shape, stride), strict=True)
        )
        if sizes is None or strides is None:
            return None
        if len(sizes) != len(strides) or min(sizes, default=1) < 1 or min(strides, default=0) < 0:
            return None
        if math.prod(sizes) >= _HUGE:
            return None
        reach = 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
        self._geometries[spelled] = sizes, strides, reach
        return sizes, strides, reach


class _Alike:
    """How a tensor in a state_dict is spelled from the end of its name on: what others have in common with it.

    Args:
        found: the tensor, as `_pattern` found it; ``None``: none.  Nothing is like none, or a PUT of one size.
        spelled: its sizes.
        made: what `TensorShortcut._entry` makes of it, but for the key.

    Attributes:
        after: the spelling that followed it last.
        fixed: the bytes between the fields that differ: the PUTs' indices, and the key.
        unpack: splits all into those bytes and the fields, in turn.
    """

    __slots__ = ("after", "fixed", "has_sizes", "made", "nbytes", "spelled", "unpack")

    after: _Alike | None

    def __init__(
        self,
        found: re.Match[bytes] | None = None,
        spelled: tuple[bytes, bytes] = (b"", b""),
        made: tuple[_Names, int, int, _Geometry, bool] | None = None,
    ) -> None:
        self.after, self.nbytes = None, _HUGE
        if found is None or made is None or (found[_PUT_SHAPE] is None) is not (found[_PUT_STRIDE] is None):
            return
        data, at, layout, fixed = found.string, found.start(), "<", []
        for field in _FIELDS:
            start, end = found.span(field)
            if start >= 0:
                layout += f"{start - at}s" + (f"{end - start}s" if field == _KEY else "I")
                fixed.append(data[at:start])
                at = end
        self.nbytes, self.unpack, self.fixed = at - found.start(), Struct(layout).unpack_from, tuple(fixed)
        self.spelled, self.made, self.has_sizes = spelled, made, found[_PUT_SHAPE] is not None


class _Names:
    """The entries that the four GETs of a tensor refer to, while the memo has them."""

    __slots__ = ("_found", "_get", "are_usual", "cls", "location", "made")

    def __init__(self, memo: dict[int, object], *indices: int) -> None:
        self._get = operator.itemgetter(*indices)
        self._found = storage, self.cls, location, found = tuple(map(memo.get, indices))
        self.location = location if isinstance(location, str) else ""
        self.made = found if isinstance(found, Global) else Global("", "")
        self.are_usual = (
            storage == "storage" and isinstance(location, str) and is_global(found, "collections", "OrderedDict")
        )

    def hold(self, memo: dict[int, object]) -> bool:
        """Whether the memo still has them all."""
        return self.are_usual and self._get(memo) == self._found


def _key(text: bytes, size: bytes) -> str | None:
    """A storage's key; ``None``: it is longer or shorter than it is declared to be, and names no storage."""
    return text.decode("ascii") if size[0] == len(text) else None


def _rising(last: int, puts: tuple[bytes | None, ...]) -> tuple[int, ...] | None:
    """The memo indices of PUTs, those there are; ``None``: they do not rise after the last one before them."""
    if None not in puts:
        indices: tuple[int, ...] = _NAMED_INDICES(b"".join(puts))  # type: ignore[arg-type]
    else:
        indices = tuple([int.from_bytes(put, "little") for put in puts if put is not None])
    return indices if all(map(operator.lt, (last, *indices), indices)) else None


def _usual_names(memo: dict[int, object], names: tuple[bytes, ...], callee: Global) -> _Names | None:
    """What GETs name, the last of them what makes the tensors; ``None``: it is not what is usual, or there is none."""
    known = _Names(memo, *map(_index, names[:4]))
    return known if known.are_usual and names[4] and memo.get(_index(names[4])) is callee else None


def _keep_sizes(memo: dict[int, object], put_shape: bytes | None, put_stride: bytes | None, of: _Geometry) -> None:
    """Write sizes to the memo: `ckptkit.pickling.writer` writes those that tensors have in common once."""
    memo.update((int.from_bytes(put, "little"), n) for put, n in ((put_shape, of[0]), (put_stride, of[1])) if put)


def _sizes(known: object) -> tuple[int, ...] | None:
    """The memo's entry, if it is a tuple of whole numbers that can be sizes."""
    if isinstance(known, tuple) and all(n.__class__ is int and -_HUGE < n < _HUGE for n in known):
        return known
    return None


def _index(get: bytes) -> int:
    """The memo index of a BINGET or LONG_BINGET."""
    return get[1] if len(get) == 2 else int.from_bytes(get[1:], "little")


def whole_numbers(opcodes: bytes) -> tuple[int, ...]:
    """The numbers that BININT1, BININT2, BININT and LONG1 push; other opcodes are skipped."""
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
