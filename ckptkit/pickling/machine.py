"""The pickle machine: its stack, marks, memo and frames, and the opcodes that checkpoints rarely use.

`ckptkit.pickling.reader` runs it; the opcodes that make up 99 % of a checkpoint are written out
there, in its loop.  Each method here is one opcode, or what several share, and is named after it
(``Lib/pickletools.py``).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from struct import Struct
from typing import NoReturn, Protocol, TypeVar

from ckptkit.errors import AmbiguousError, CorruptError, LimitError, UnsupportedError
from ckptkit.limits import Limits
from ckptkit.pickling.calls import CallsThatReach
from ckptkit.pickling.dangerous import is_dangerous
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object
from ckptkit.pickling.popped import Popped
from ckptkit.report import listed
from ckptkit.startup import pattern

__all__ = ["BATCH", "LOADER", "NO_FRAME", "RARE_OPCODES", "Constructor", "Hold", "Machine", "Shortcut"]

Constructor = Callable[[tuple[object, ...]], object]
"""Understands one call: from its arguments to a leaf, or ``NotImplemented`` to keep an `Object`."""


class Shortcut(Protocol):
    """Understands the call that a MARK at a position begins, and those that follow: see `ckptkit.pickling.shortcut`."""

    def __call__(self, data: bytes, at: int, memo: dict[int, object], /) -> tuple[int, object] | None:
        """The position after the call, and what it makes."""

    def follow(
        self, data: bytes, at: int, memo: dict[int, object], stack: list[object], callee: Global, most: int, /
    ) -> tuple[int, int]:
        """The position after those that follow it under names, and how many they are."""


class Hold(Protocol):
    """Leaves bytes in place: a placeholder is pushed, and the machine's position and data are after them."""

    def data(self, machine: Machine, nbytes: int, /) -> bool:
        """Whether that was done with the argument of such an opcode, at the machine's position."""

    def built(self, machine: Machine, target: Object, /) -> None:
        """After BUILD of what is on top of the stack, which joblib's arrays follow."""


_Node = TypeVar("_Node")
_I32 = Struct("<i").unpack_from
_U32 = Struct("<I").unpack_from
_U64 = Struct("<Q").unpack_from

_DECIMAL = pattern(rb"(?:0|-?[1-9][0-9]{0,3999})L?\Z")
"""What ``repr`` writes; a leading zero makes one of CPython's two unpicklers read octal."""

_FLOAT = pattern(rb"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z|[-+]?(?:inf|nan)\Z")
_ESCAPED = pattern(rb"[^\\]*(?:\\(?:[\\'\"nrt]|x[0-9a-f]{2})[^\\]*)*\Z")
"""What Python 2's ``repr`` of a ``str`` holds between its quotes."""

_ESCAPE = r"\\(?:[\\'nrt]|x[0-9a-f]{2}|u[0-9a-f]{4})"
_ID_ITEM = (
    r"<class '[A-Za-z_][\w.]*\.[A-Za-z_]\w*'>|None|0|[1-9][0-9]{0,18}|"
    rf"""'(?:[^'\\]|{_ESCAPE})*'|"(?:[^"\\]|{_ESCAPE})*\""""
)
_ID_ITEMS = pattern(_ID_ITEM, re.ASCII)
_TEXT_ID = pattern(rf"\((?:{_ID_ITEM})(?:, (?:{_ID_ITEM}))+\)", re.ASCII)
"""A tuple of names, numbers and strings as ``str`` gives it, which is what protocol 0 makes of a persistent id."""

BATCH = 1000
"""Items in one APPENDS or SETITEMS, as CPython's pickler batches them."""

LOADER = ("torch.storage", "_load_from_bytes")
"""The function that a plain pickle calls with the bytes of each storage (``torch/storage.py`` ``__reduce__``)."""

NO_FRAME = 1 << 62
"""Where a frame that is not there ends: no position reaches it."""


def _long(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


class Machine:
    """The state of one run over one pickle."""

    def __init__(
        self,
        data: bytes,
        start: int,
        persistent_load: Callable[[object], object],
        constructors: Mapping[tuple[str, str], Constructor],
        limits: Limits,
        nested: Callable[[bytes], tuple[Iterable[Global], bool]] | None = None,
    ) -> None:
        self.data = data
        self.pos = start
        self.op_at = start
        self.persistent_load = persistent_load
        self.constructors = constructors
        self.understood: dict[Global, Constructor] = {}
        self.watchers: dict[Global, Callable[[tuple[object, ...]], None]] = {}
        self.limits = limits
        self.started_at = start
        self.protocol = 0
        self.frame_end = NO_FRAME
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.reach = CallsThatReach(self.name, nested)
        self.popped = Popped()
        self.was_set: tuple[object, int, int] = None, 0, 0  # what got pairs last, how many it had, by which opcode
        self.in_batches: dict[int, int] = {}  # how many pairs those had that get more than one SETITEMS is given
        self.nodes_left = limits.nodes
        self.opcodes_left = limits.opcodes
        self.cut = False  # whether the bytes end inside an opcode's argument
        self.shortcut: Shortcut | None = None
        self.hold: Hold | None = None
        self.skipped = False  # whether the shortcut left memo entries out
        self.text_ids = False  # whether a persistent id was a tuple's text

    # What the opcodes share.

    def finish(self) -> object:
        if self.marks or len(self.stack) != 1:
            raise CorruptError(self._left_over())
        if self.frame_end not in (self.pos, NO_FRAME):
            raise AmbiguousError("STOP is not the end of its frame")
        self.watchers.clear()
        del self.reach  # which holds the machine in turn: without it, the result is freed as soon as it is unused
        return self.stack.pop()

    def _left_over(self) -> str:
        """The effects of a pickle that ends with more or less than one value."""
        count = len(self.stack) + sum(map(len, self.marks))
        said = f"STOP without exactly one value on the stack ({count}{' and a MARK' if self.marks else ''})"
        names = self.globals.values()
        called = sorted(names, key=lambda name: (not is_dangerous(name.module, name.name), not name.calls))
        if not called:
            return said
        shown = listed((name.qualified for name in called), characters=80)
        what = "it" if len(called) == 1 else "them"
        does = f"has imported {'and called ' if any(name.calls for name in called) else ''}{what}"
        return f"{said}; it names {shown}: CPython takes the last value, and {does} by then"

    def take(self, nbytes: int) -> bytes:
        """The next bytes, which must be there: a declared length never allocates on its own."""
        if nbytes < 0 or self.pos + nbytes > len(self.data):
            self.cut = nbytes >= 0
            raise CorruptError(
                f"{nbytes:,} bytes are declared, but only {len(self.data) - self.pos:,} are left: damaged or truncated"
            )
        self.pos += nbytes
        return self.data[self.pos - nbytes : self.pos]

    def line(self, limit: int) -> bytes:
        """A text argument, up to and without its newline."""
        end = self.data.find(b"\n", self.pos, self.pos + limit + 1)
        if end < 0:
            self.cut = len(self.data) - self.pos <= limit
            raise CorruptError(f"a text argument does not end within {limit:,} bytes")
        text = self.data[self.pos : end]
        self.pos = end + 1
        return text

    def text(self, start: int, nbytes: int) -> str:
        end = start + nbytes
        if end > len(self.data):
            self.cut = True
            raise CorruptError(
                f"a string of {nbytes:,} bytes is declared, but only {len(self.data) - start:,} are left: damaged or "
                "truncated"
            )
        try:
            return str(self.data[start:end], "utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise CorruptError(f"a string is not UTF-8: {error.reason}") from None

    def text8(self, nbytes: int) -> str:
        text = self.text(self.pos, nbytes)
        self.pos += nbytes
        return text

    def pop_mark(self) -> list[object]:
        """The values pushed since the last MARK."""
        items = self.stack
        if not self.marks:
            raise CorruptError("an opcode needs a MARK and there is none")
        self.stack = self.marks.pop()
        return items

    def call(self, how: str, cls: object, args: object, kwargs: object = None) -> object:
        """The node for a call that is not made, or the leaf a constructor understood."""
        if not isinstance(args, tuple):
            raise UnsupportedError(f"a call whose arguments are {type(args).__name__}, not a tuple")
        if isinstance(cls, Global):
            cls.calls += 1
            if cls in self.watchers:
                self.watchers[cls](args)
            constructor = self.understood.get(cls)
            if constructor is not None and how in ("reduce", "obj"):
                built = constructor(args)
                if built is not NotImplemented:
                    return built
        elif how in ("reduce", "obj"):
            self.reach.computed(cls, args)
        if self.reach.is_watchful:
            self.reach.handed(cls, args)
        return self.made(Object(how, cls, args, kwargs))  # type: ignore[arg-type]

    def made(self, node: _Node, count: int = 1) -> _Node:
        """A node that was made, counted; or what counts as several."""
        self.nodes_left -= count
        if self.nodes_left < 0:
            raise LimitError("lists, dicts, pairs and objects", limit=self.limits.nodes, actual=self.limits.nodes + 1)
        return node

    def name(self, module: str, name: str) -> Global:
        """The node for a name; one node for one name."""
        longest = max(len(module), len(name))
        if longest > self.limits.name_nbytes:
            raise LimitError("length of a name", limit=self.limits.name_nbytes, actual=longest)
        known = self.globals.get((module, name))
        if known is None:
            if len(self.globals) >= self.limits.names:
                raise LimitError("names in a pickle", limit=self.limits.names, actual=len(self.globals) + 1)
            known = self.globals[module, name] = Global(module, name)
            constructor, watcher = self.constructors.get((module, name)), self.reach.watcher(known)
            if constructor is not None:
                self.understood[known] = constructor
            if watcher is not None:
                self.watchers[known] = watcher
        return known

    def unknown(self, op: int) -> NoReturn:
        refused = _REFUSED.get(op)
        if refused is not None:
            error = AmbiguousError if refused.startswith("EXT") else UnsupportedError
            raise error(f"opcode {refused}, which no checkpoint's pickler produces")
        raise CorruptError(f"unknown opcode 0x{op:02x}: damaged, or not a pickle")

    # The rarer opcodes.

    def proto(self) -> None:
        version = self.take(1)[0]
        if version > 5:
            raise UnsupportedError(f"pickle protocol {version}; 0 to 5 are supported")
        if self.op_at != self.started_at:
            raise AmbiguousError("a PROTO that is not the first opcode")
        self.protocol = version

    def frame(self) -> None:
        nbytes = _U64(self.take(8))[0]
        if self.frame_end != NO_FRAME:
            raise AmbiguousError("a frame inside a frame")
        if nbytes > len(self.data) - self.pos:
            self.cut = True
            raise CorruptError(
                f"a frame of {nbytes:,} bytes, but only {len(self.data) - self.pos:,} are left: truncated"
            )
        self.frame_end = self.pos + nbytes

    def pop(self) -> None:
        if not self.stack:
            self.pop_mark()
            return
        value = self.stack.pop()
        top = self.stack[-1] if self.stack else None
        before = self.was_set[1] if self.was_set[0] is value and self.was_set[2] == self.op_at - 1 else None
        self.popped.take(value, top, self.data, self.op_at, self.memo, before)

    def append(self) -> None:
        item = self.stack.pop()
        self.extend([item])

    def extend(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Object) and target.state is ABSENT and not target.pairs:
            target.items.extend(items)
        else:
            raise UnsupportedError(f"items appended to {_shown(target)}")

    def setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_pairs([key, value])

    def set_pairs(self, flat: list[object]) -> None:
        if len(flat) % 2:
            raise CorruptError("the last key of a dict has no value")
        pairs = zip(flat[::2], flat[1::2], strict=True)
        target = self.made(self.stack[-1], len(flat) // 2)
        if isinstance(target, InertDict) or (isinstance(target, Object) and target.state is ABSENT):
            before = self.in_batches.pop(id(target), len(target.pairs))
            if len(flat) == 2 * BATCH:
                self.in_batches[id(target)] = before
            self.was_set = target, before, self.op_at
            target.pairs.extend(pairs)
        else:
            raise UnsupportedError(f"keys set on {_shown(target)}")

    def additems(self) -> None:
        members = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, InertSet) or target.frozen:
            raise UnsupportedError(f"members added to {_shown(target)}")
        target.members.extend(members)

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Object):
            raise UnsupportedError(f"state applied to {_shown(target)}")
        if target.state is not ABSENT:
            raise AmbiguousError(f"state applied twice to {_shown(target)}")
        target.state = state
        if self.reach.is_watchful:
            self.reach.changed(target)
        if self.hold is not None:
            self.hold.built(self, target)

    def global_text(self) -> None:
        limit = self.limits.name_nbytes
        module, name = self.line(limit), self.line(limit)
        try:
            self.stack.append(self.name(str(module, "utf-8"), str(name, "utf-8")))
        except UnicodeDecodeError:
            raise CorruptError("a name that is not UTF-8") from None

    def stack_global(self) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise AmbiguousError("a name computed at run time")
        self.stack.append(self.name(module, name))

    def newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call("newobj", self.stack[-1], args)

    def newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        if not isinstance(kwargs, InertDict):
            raise UnsupportedError("keyword arguments that are not a dict")
        self.stack[-1] = self.call("newobj_ex", self.stack[-1], args, kwargs)

    def inst(self) -> None:
        self.global_text()
        cls = self.stack.pop()
        args = tuple(self.pop_mark())
        self.stack.append(self.call("obj", cls, args))

    def obj(self) -> None:
        items = self.pop_mark()
        self.stack.append(self.call("obj", items[0], tuple(items[1:])))

    def pop_to_mark(self) -> None:
        for value in self.pop_mark():
            self.popped.take(value, None, self.data, self.op_at, self.memo)

    def push(self, make: Callable[[list[object]], object]) -> None:
        """The result for the items since the last MARK."""
        items = self.pop_mark()
        self.stack.append(self.made(make(items)))

    def dict_(self) -> None:
        flat = self.pop_mark()
        self.stack.append(self.made(InertDict()))
        self.set_pairs(flat)

    def int_text(self) -> None:
        text = self.line(4001)
        if text in (b"00", b"01"):  # protocol 0 and 1 write booleans so
            self.stack.append(text == b"01")
        else:
            self.stack.append(self.decimal(text, long=False))

    def decimal(self, text: bytes, *, long: bool) -> int:
        if not _DECIMAL.match(text) or (text.endswith(b"L") and not long):
            raise AmbiguousError(f"a number that no pickler writes: {text[:40]!r}")
        return self.bounded(int(text.rstrip(b"L")))

    def bounded(self, value: int) -> int:
        nbytes = value.bit_length() // 8 + 1
        if nbytes > self.limits.int_nbytes:
            raise LimitError("bytes of an integer", limit=self.limits.int_nbytes, actual=nbytes)
        return value

    def float_text(self) -> None:
        text = self.line(4001)
        if not _FLOAT.match(text):
            raise AmbiguousError(f"a number that no pickler writes: {text[:40]!r}")
        self.stack.append(float(text))

    def long_binary(self, nbytes: int) -> None:
        if nbytes > self.limits.int_nbytes:
            raise LimitError("bytes of an integer", limit=self.limits.int_nbytes, actual=nbytes)
        self.stack.append(_long(self.take(nbytes)))

    def string_text(self) -> None:
        """STRING: a quoted, backslash-escaped byte string of protocol 0."""
        text = self.line(len(self.data))
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"'\"":
            raise CorruptError("a STRING without matching quotes")
        if not _ESCAPED.match(text, 1, len(text) - 1):
            raise AmbiguousError("a STRING with escapes that no pickler writes")
        self.stack.append(_python2_str(codecs.escape_decode(text[1:-1])[0]))

    def bytes_(self, nbytes: int, make: Callable[[bytes], object] = bytes) -> None:
        """BINBYTES and similar; arguments of torch's or numpy's functions may be left in place."""
        if self.hold is None or not self.hold.data(self, nbytes):
            self.stack.append(make(self.take(nbytes)))

    def unicode_text(self) -> None:
        try:
            self.stack.append(str(self.line(len(self.data)), "raw-unicode-escape"))
        except UnicodeDecodeError as error:
            raise CorruptError(f"a UNICODE string that cannot be decoded: {error.reason}") from None

    def memo_text(self) -> int:
        index = self.decimal(self.line(20), long=False)
        if index < 0:
            raise CorruptError(f"memo entry {index:,}")
        return index

    def put_text(self) -> None:
        self.memo[self.memo_text()] = self.stack[-1]

    def get_text(self) -> None:
        self.stack.append(self.memo[self.memo_text()])

    def persistent_text(self) -> None:
        """PERSID: ``str`` of the persistent id, while others have the id itself."""
        try:
            text = str(self.line(len(self.data)), "ascii")  # torch's may hold the source of a class
        except UnicodeDecodeError:
            raise CorruptError("a persistent id that is not ASCII") from None
        self.stack.append(self.persistent_load(self._id_of(text)))

    def _id_of(self, text: str) -> object:
        """The tuple that a persistent id's text was made from; the text itself if it does not match exactly."""
        if not _TEXT_ID.fullmatch(text):
            return text
        items: list[object] = []
        for item in _ID_ITEMS.findall(text):
            if item.startswith("<"):
                items.append(self.name(*item[len("<class '") : -len("'>")].rsplit(".", 1)))
            elif item[0] in "'\"":
                items.append(item[1:-1].encode("ascii").decode("unicode-escape"))
                if repr(items[-1]) != item:
                    return text
            else:
                items.append(None if item == "None" else int(item))
        self.text_ids = True
        return self.made(tuple(items))


def _shown(node: object) -> str:
    """A node in a message: never its content, which may be endless."""
    return repr(node) if isinstance(node, (Global, Object)) else f"a {type(node).__name__}"


def _python2_str(raw: bytes) -> str | bytes:
    """A Python 2 ``str``: text if it is UTF-8, as ``torch.load`` reads it, bytes otherwise."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        return raw


RARE_OPCODES: dict[int, Callable[[Machine], None]] = {
    0x80: Machine.proto, 0x95: Machine.frame, 0x61: Machine.append, 0x65: lambda r: r.extend(r.pop_mark()),
    0x73: Machine.setitem, 0x75: lambda r: r.set_pairs(r.pop_mark()), 0x90: Machine.additems, 0x62: Machine.build,
    0x63: Machine.global_text, 0x93: Machine.stack_global, 0x81: Machine.newobj, 0x92: Machine.newobj_ex,
    0x69: Machine.inst, 0x6F: Machine.obj, 0x64: Machine.dict_, 0x30: Machine.pop, 0x31: Machine.pop_to_mark,
    0x6C: lambda r: r.push(lambda items: items), 0x8F: lambda r: r.stack.append(r.made(InertSet())),
    0x91: lambda r: r.push(lambda members: InertSet(members, frozen=True)),
    0x49: Machine.int_text, 0x4C: lambda r: r.stack.append(r.decimal(r.line(4001), long=True)),
    0x46: Machine.float_text,
    0x8A: lambda r: r.long_binary(r.take(1)[0]), 0x8B: lambda r: r.long_binary(_I32(r.take(4))[0]),
    0x53: Machine.string_text,
    0x54: lambda r: r.stack.append(_python2_str(r.take(_I32(r.take(4))[0]))),
    0x55: lambda r: r.stack.append(_python2_str(r.take(r.take(1)[0]))),
    0x42: lambda r: r.bytes_(_U32(r.take(4))[0]), 0x43: lambda r: r.bytes_(r.take(1)[0]),
    0x8E: lambda r: r.bytes_(_U64(r.take(8))[0]), 0x96: lambda r: r.bytes_(_U64(r.take(8))[0], bytearray),
    0x56: Machine.unicode_text, 0x8D: lambda r: r.stack.append(r.text8(_U64(r.take(8))[0])),
    0x70: Machine.put_text, 0x67: Machine.get_text, 0x50: Machine.persistent_text,
}  # fmt: skip

_REFUSED = {
    0x32: "DUP", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip
