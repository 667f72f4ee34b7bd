"""Bytes -> inert tree: an interpreter of pickle protocols 0 to 5 that resolves nothing.

The language is specified by CPython's ``Lib/pickletools.py`` and PEPs 307, 3154 and 574.  This
interpreter keeps its stack, marks and memo, and differs in one thing: where Python would import a
name, call it, or set a state, it makes a node that says so.

Fails closed.  Opcodes and shapes no pickler produces are refused, because other readers disagree
about them: DUP, the EXT registry, out-of-band buffers, frames that overlap or are straddled, a
second PROTO, names computed at run time, text numbers and escapes that need interpretation, an
object given state twice.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import islice
from struct import Struct
from typing import NamedTuple

from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.inert import Global, InertDict, PersistentId, check_references
from ckptkit.pickling.machine import LOADER, NO_FRAME, RARE_OPCODES, Constructor, Hold, Machine, Shortcut
from ckptkit.pickling.shortcut import OPCODES, REBUILD
from ckptkit.pickling.trust import global_uses
from ckptkit.report import count_of

__all__ = [
    "LEGACY_MAGIC", "LEGACY_PICKLES", "Constructor", "PickleResult", "holds_legacy", "read_pickle", "storage_pickles",
]  # fmt: skip

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PICKLES = 5
"""The beginning of a file of torch before 1.6, and how many pickles it has before its storages' bytes."""

_MAGIC = LEGACY_MAGIC.to_bytes(10, "little")
_MAGICS = (_MAGIC, _MAGIC.decode("latin-1").encode())
_NEAR_NBYTES = 32
"""How near to the opcode of the bytes, or of the text, it begins."""

_NESTED_NBYTES = 1024
"""Bytes that such a file counts for at least where a pickle holds it: many small ones take some seconds, too."""

_U16 = Struct("<H").unpack_from
_I32 = Struct("<i").unpack_from
_U32 = Struct("<I").unpack_from
_F64 = Struct(">d").unpack_from


class PickleResult(NamedTuple):
    """The content of one pickle.

    Attributes:
        root: the inert tree.
        end: position after STOP, in bytes.
        protocol: as declared by PROTO, 0 if there is none.
        globals: every name in it, in order of appearance.
        text_ids: whether persistent ids are text, as protocol 0 has them.
        discarded: values it makes and discards, and that belong to nothing in the tree (`ckptkit.pickling.popped`).
    """

    root: object
    end: int
    protocol: int
    globals: tuple[Global, ...]
    text_ids: bool = False
    discarded: tuple[object, ...] = ()


def read_pickle(
    data: bytes,
    *,
    start: int = 0,
    persistent_load: Callable[[object], object] = PersistentId,
    constructors: Mapping[tuple[str, str], Constructor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    shortcut: Shortcut | None = None,
    whole: bool = False,
    more: Callable[[int], bytes] | None = None,
    hold: Hold | None = None,
    memo: dict[int, object] | None = None,
) -> PickleResult:
    """Read one pickle that begins at ``start``.

    Args:
        data: the bytes; those after the pickle are ignored unless ``whole`` forbids any.
        start: position of its first byte.
        persistent_load: from a persistent id to its node.
        constructors: calls that are understood, by ``(module, name)`` of the callee.
        limits: bounds for this pickle.
        shortcut: understands a tensor's opcodes at once.  Where the pickle refers to what that leaves out, it is
            read again without.
        whole: whether the pickle must be all there is.
        more: if ``data`` is only the beginning: from its length to a longer piece of the same bytes, or to the same
            length if there is no more.
        hold: leaves the bytes of tensors and arrays in place; ``None``: they are in the tree.
        memo: an empty one to use; it may make entries that ``hold`` left out when they are asked for.

    Raises:
        CorruptError: the bytes end early or are not a pickle.
        AmbiguousError: readers disagree about them; bytes after STOP where ``whole`` is set.
        UnsupportedError: an opcode that no pickler produces.
        LimitError: a limit was passed.
        Of each, ``globals`` contains the names that were read before it.
    """
    if len(data) - start > limits.pickle_nbytes:
        raise LimitError("bytes of a pickle", limit=limits.pickle_nbytes, actual=len(data) - start)
    machine = Machine(
        data, start, persistent_load, constructors or {}, limits, partial(_nested, limits, [limits.pickle_nbytes])
    )
    machine.shortcut, machine.hold, machine.memo = shortcut, hold, {} if memo is None else memo
    try:
        root = _run_on(machine, more)
        discarded = machine.popped.settle(root, machine.data, machine.memo)
        if whole and machine.pos != len(data):
            raise AmbiguousError(
                f"{count_of(len(data) - machine.pos, 'byte', 'follows', 'follow')} the pickle's STOP",
                offset=machine.pos,
            )
        if machine.pos - start > limits.tree_nodes:  # each takes an opcode, and so a byte
            check_references([root, *discarded])
    except FormatError as error:
        error.offset = machine.op_at if error.offset is None else error.offset
        raise _stopped(error, machine) from error.__cause__
    except (IndexError, KeyError, struct.error) as error:
        if isinstance(error, KeyError) and machine.skipped:
            return read_pickle(
                data, start=start, persistent_load=persistent_load, constructors=constructors, limits=limits,
                whole=whole, more=more,
            )  # fmt: skip
        # An index error on the last byte is its missing argument; before it, an empty stack.
        early = isinstance(error, struct.error) or machine.op_at >= len(machine.data) - 1
        message = "the pickle ends early" if early else "an opcode needs more values than the stack has"
        if isinstance(error, KeyError):
            message = f"memo entry {error} is read before it is written"
        corrupt = CorruptError(f"{message}: damaged, truncated, or not a pickle", offset=machine.op_at)
        raise _stopped(corrupt, machine) from None
    result = PickleResult(
        root=root,
        end=machine.pos,
        protocol=machine.protocol,
        globals=tuple(machine.globals.values()),
        text_ids=machine.text_ids,
        discarded=discarded,
    )
    vars(machine).clear()  # it refers to itself: its memo of 300,000 entries would stay until the collector comes
    return result


def _stopped(error: FormatError, machine: Machine) -> FormatError:
    """The error with what the pickle names before it."""
    names = machine.globals.values()
    loader = machine.globals.get(LOADER)
    if loader is not None and holds_legacy(machine.data[machine.op_at : machine.op_at + _NEAR_NBYTES]):
        loader.calls, loader.excused = loader.calls + 1, loader.excused + 1  # for a storage that is cut off or damaged
    error.called = any(name.calls for name in names)
    return error.at(seen=global_uses(names))


def holds_legacy(data: bytes) -> bool:
    """Whether a file of torch before 1.6 begins in the bytes of a pickle, as bytes or as text."""
    return any(magic in data for magic in _MAGICS)


@cache
def _one_storage() -> re.Pattern[bytes]:
    """The five pickles of a file with one storage in it, as ``torch.save`` writes them for ``pickle.dump``."""
    name = rb"X(.)\0{3}([0-9]+)"
    first = rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.\x80\x02M\xe9\x03\."
    info = rb"\x80\x02}q\0\(X\x10\0{3}protocol_versionq\x01M\xe9\x03X\x0d\0{3}little_endianq\x02\x88"
    sizes = rb"X\x0a\0{3}type_sizesq\x03}q\x04\(X\x05\0{3}shortq\x05K\x02X\x03\0{3}intq\x06K\x04X\x04\0{3}longq\x07K"
    cls = rb"\x04uu\.\x80\x02\(X\x07\0{3}storageq\0ctorch\n([A-Z]\w+Storage)\nq\x01"
    rest = rb"q\x02X(.)\0{3}([\w:]+)q\x03(?:K(.)|M(..)|J(...[\0-\x7f]))Ntq\x04Q\."
    keys = rb"\x80\x02\]q\0" + name + rb"q\x01a\."
    return re.compile(first + info + sizes + cls + name + rest + keys, re.DOTALL)


def storage_pickles(data: bytes) -> tuple[str, str, int, int] | None:
    """The facts in the pickles of a file of torch before 1.6 with one storage and exactly torch's form.

    Returns: The class's name in ``torch``, the location, how many elements, and the position after the pickles;
        ``None``: it is another file, or must be read pickle by pickle.
    """
    found = _one_storage().match(data)
    if found is None:
        return None
    cls, nbytes, key, location_nbytes, location, *numel, again_nbytes, again = found.groups()
    if (*nbytes, *again_nbytes, *location_nbytes) != (len(key), len(again), len(location)) or key != again:
        return None
    count = int.from_bytes(next(number for number in numel if number is not None), "little")
    return cls.decode(), location.decode(), count, found.end()


def _nested(limits: Limits, left: list[int], data: bytes) -> tuple[list[Global], bool]:
    """The names in a file of torch before 1.6, and whether it is one: five pickles, then its storages' bytes.

    Args:
        limits: bounds on it; those on nested ones are tighter, so that it ends.
        left: the bytes that may still be read so, for all in one pickle together.
        data: the file.
    """
    names: list[Global] = []
    limits = limits._replace(pickle_nbytes=limits.pickle_nbytes // 4)
    if left[0] <= 0 or not limits.pickle_nbytes:
        return names, False
    if (known := storage_pickles(data)) is not None:
        left[0] -= known[3]
        return [Global("torch", known[0])], True
    at = 0
    for number in range(LEGACY_PICKLES):
        machine = Machine(data, at, PersistentId, {}, limits, partial(_nested, limits, left))
        try:
            root = _run_on(machine, None)
            is_one = number > 0 or (isinstance(root, int) and root == LEGACY_MAGIC)
        except (FormatError, LookupError, struct.error):
            is_one = False
        at = machine.pos
        names.extend(machine.globals.values())
        if not is_one:
            left[0] -= len(data)
            return names, False
    left[0] -= max(at, _NESTED_NBYTES)  # what follows is a storage's, and was not read
    return names, at <= limits.pickle_nbytes


_BYTE_ARGUMENT = b"hqK\x8c"
"""Opcodes whose argument is a byte that `_run` itself reads: BINGET, BINPUT, BININT1, SHORT_BINUNICODE."""


def _run_on(machine: Machine, more: Callable[[int], bytes] | None) -> object:
    """The value on the stack at STOP, from as many of the bytes as that takes.

    An opcode that the bytes cut off has changed nothing yet: it is carried out again with more of them.
    """
    while True:
        try:
            return _run(machine)
        except (CorruptError, IndexError, struct.error) as error:
            nbytes = len(machine.data)
            cut = machine.cut or isinstance(error, struct.error) or machine.op_at == nbytes
            cut = cut or (machine.op_at == nbytes - 1 and machine.data[-1] in _BYTE_ARGUMENT)
            longer = more(nbytes) if more is not None and cut else b""
            if len(longer) <= nbytes:
                raise
            machine.data, machine.pos, machine.cut = longer, machine.op_at, False


def _run(machine: Machine) -> object:
    """The value on the stack at STOP.  The opcodes that make up 99 % of a checkpoint are carried out here."""
    data, memo, marks = machine.data, machine.memo, machine.marks
    stack, pos, frame_end = machine.stack, machine.pos, machine.frame_end
    at, rare, left, shortcut = pos, RARE_OPCODES, machine.opcodes_left, machine.shortcut
    most_marks = machine.limits.marks
    try:
        countdown = iter(range(machine.opcodes_left, 0, -1))
        for left in countdown:
            at = pos
            op = data[pos]
            pos += 1
            # In order of frequency in a state_dict's pickle.
            if op == 0x72:  # LONG_BINPUT
                memo[_U32(data, pos)[0]] = stack[-1]
                pos += 4
            elif op == 0x68:  # BINGET
                stack.append(memo[data[pos]])
                pos += 1
            elif op == 0x4B:  # BININT1
                stack.append(data[pos])
                pos += 1
            elif op == 0x28:  # MARK
                callee: object = stack[-1] if shortcut is not None and stack and frame_end == NO_FRAME else None
                if isinstance(callee, Global) and (callee.module, callee.name) == REBUILD and shortcut is not None:
                    found = shortcut(data, at, memo)
                    if found is not None:
                        callee.calls += 1
                        pos, stack[-1] = found
                        machine.skipped = True
                        pos, count = shortcut.follow(data, pos, memo, stack, callee, left // OPCODES)
                        if count:
                            callee.calls += count
                            next(islice(countdown, count * OPCODES, count * OPCODES), None)
                        continue
                marks.append(stack)
                if len(marks) > most_marks:
                    raise LimitError("marks in a row", limit=most_marks, actual=len(marks))
                stack = machine.stack = []
            elif op == 0x74:  # TUPLE
                items = machine.made(tuple(stack))
                stack = machine.stack = marks.pop()
                stack.append(items)
            elif op == 0x58:  # BINUNICODE
                nbytes = _U32(data, pos)[0]
                stack.append(machine.text(pos + 4, nbytes))
                pos += 4 + nbytes
            elif op == 0x71:  # BINPUT
                memo[data[pos]] = stack[-1]
                pos += 1
            elif op == 0x52:  # REDUCE
                args = stack.pop()
                stack[-1] = machine.call("reduce", stack[-1], args)
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x51:  # BINPERSID
                stack[-1] = machine.persistent_load(stack[-1])
            elif op == 0x89:  # NEWFALSE
                stack.append(False)
            elif op == 0x85:  # TUPLE1
                stack[-1] = machine.made((stack[-1],))
            elif op == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = machine.made((stack[-1], last))
            elif op == 0x87:  # TUPLE3
                last = stack.pop()
                middle = stack.pop()
                stack[-1] = machine.made((stack[-1], middle, last))
            elif op == 0x4D:  # BININT2
                stack.append(_U16(data, pos)[0])
                pos += 2
            elif op == 0x4A:  # BININT
                stack.append(_I32(data, pos)[0])
                pos += 4
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[_U32(data, pos)[0]])
                pos += 4
            elif op == 0x94:  # MEMOIZE
                if machine.skipped:
                    raise KeyError("MEMOIZE counts entries that were left out")
                memo[len(memo)] = stack[-1]
            elif op == 0x8C:  # SHORT_BINUNICODE
                nbytes = data[pos]
                stack.append(machine.text(pos + 1, nbytes))
                pos += 1 + nbytes
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x88:  # NEWTRUE
                stack.append(True)
            elif op == 0x7D:  # EMPTY_DICT
                stack.append(machine.made(InertDict()))
            elif op == 0x5D:  # EMPTY_LIST
                stack.append(machine.made([]))
            elif op == 0x47:  # BINFLOAT
                stack.append(_F64(data, pos)[0])
                pos += 8
            elif op == 0x2E:  # STOP
                machine.pos = pos
                return machine.finish()
            else:
                handler = rare.get(op)
                if handler is None:
                    machine.unknown(op)
                machine.op_at, machine.pos = at, pos
                handler(machine)
                pos, stack, frame_end, data = machine.pos, machine.stack, machine.frame_end, machine.data
            if pos >= frame_end:
                if pos > frame_end:
                    raise AmbiguousError("an opcode straddles the end of its frame")
                frame_end = machine.frame_end = NO_FRAME
        raise LimitError("pickle opcodes", limit=machine.limits.opcodes, actual=machine.limits.opcodes + 1)
    except BaseException:
        machine.op_at, machine.opcodes_left = at, left
        raise
