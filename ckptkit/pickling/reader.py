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

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct

from ckptkit.errors import CorruptError, FormatError, LimitError
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.inert import Global, InertDict, PersistentId
from ckptkit.pickling.machine import NO_FRAME, RARE_OPCODES, Constructor, Machine

__all__ = ["Constructor", "PickleResult", "read_pickle"]

_U16 = Struct("<H").unpack_from
_I32 = Struct("<i").unpack_from
_U32 = Struct("<I").unpack_from
_F64 = Struct(">d").unpack_from


@dataclass(frozen=True, slots=True, kw_only=True)
class PickleResult:
    """What one pickle says.

    Attributes:
        root: the inert tree.
        end: position after STOP, in bytes.
        protocol: as declared by PROTO, 0 where there is none.
        globals: every name in it, in order of appearance.
    """

    root: object
    end: int
    protocol: int
    globals: tuple[Global, ...]


def read_pickle(
    data: bytes,
    *,
    start: int = 0,
    persistent_load: Callable[[object], object] = PersistentId,
    constructors: Mapping[tuple[str, str], Constructor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> PickleResult:
    """Read one pickle that begins at ``start``.

    Args:
        data: the bytes; what follows the pickle is left alone.
        start: position of its first byte.
        persistent_load: from a persistent id to the node that stands for it.
        constructors: calls that are understood, by ``(module, name)`` of the callee.
        limits: bounds for this pickle.

    Raises:
        CorruptError: the bytes end early or are no pickle.
        UnsupportedError: an opcode that no pickler produces.
        LimitError: a limit was passed.
    """
    if len(data) - start > limits.pickle_nbytes:
        raise LimitError("bytes of a pickle", limit=limits.pickle_nbytes, actual=len(data) - start)
    machine = Machine(data, start, persistent_load, constructors or {}, limits)
    try:
        root = _run(machine)
    except FormatError as error:
        error.offset = machine.op_at if error.offset is None else error.offset
        raise
    except (IndexError, KeyError, struct.error) as error:
        # An index error on the last byte is its missing argument; before it, an empty stack.
        early = isinstance(error, struct.error) or machine.op_at >= len(data) - 1
        message = "the pickle ends early" if early else "an opcode finds too little on the stack"
        if isinstance(error, KeyError):
            message = f"memo entry {error} is read before it is written"
        raise CorruptError(f"{message}: damaged, truncated, or no pickle", offset=machine.op_at) from None
    return PickleResult(root=root, end=machine.pos, protocol=machine.protocol, globals=tuple(machine.globals.values()))


def _run(machine: Machine) -> object:
    """The value on the stack at STOP.  The opcodes that make up 99 % of a checkpoint are carried out here."""
    data, memo, marks = machine.data, machine.memo, machine.marks
    stack, pos, frame_end = machine.stack, machine.pos, machine.frame_end
    at, rare = pos, RARE_OPCODES
    try:
        for _ in range(machine.limits.opcodes):
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
                marks.append(stack)
                stack = machine.stack = []
            elif op == 0x74:  # TUPLE
                items = tuple(stack)
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
                stack[-1] = (stack[-1],)
            elif op == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif op == 0x87:  # TUPLE3
                last = stack.pop()
                middle = stack.pop()
                stack[-1] = (stack[-1], middle, last)
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
                stack.append(InertDict())
            elif op == 0x5D:  # EMPTY_LIST
                stack.append([])
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
                pos, stack, frame_end = machine.pos, machine.stack, machine.frame_end
            if pos >= frame_end:
                if pos > frame_end:
                    raise CorruptError("an opcode straddles the end of its frame")
                frame_end = machine.frame_end = NO_FRAME
        raise LimitError("pickle opcodes", limit=machine.limits.opcodes, actual=machine.limits.opcodes + 1)
    except BaseException:
        machine.op_at = at
        raise
