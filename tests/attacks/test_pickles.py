"""Pickles that would run something, and pickles on which readers disagree, inside an honest archive."""

from __future__ import annotations

import pickle
import struct
from typing import Any

import pytest

HOSTILE, REFUSED, READ, ANSWERED = "hostile", "refused", "read", "answered"

FRAME = b"\x95" + struct.pack("<Q", 4)

SAMPLES: Any = {
    # Calls, by every opcode that makes one.
    "reduce": (HOSTILE, lambda m: m.zip(m.beside(m.payload))),
    "reduce at the root": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + b".")),
    "inst": (HOSTILE, lambda m: m.zip(m.beside(b"(" + m.text(f"touch {m.canary}") + b"ios\nsystem\n"))),
    "obj": (HOSTILE, lambda m: m.zip(m.beside(b"(cos\nsystem\n" + m.text(f"touch {m.canary}") + b"o"))),
    "newobj": (HOSTILE, lambda m: m.zip(m.beside(b"csubprocess\nPopen\n" + m.text(f"touch {m.canary}") + b"\x85\x81"))),
    "newobj_ex": (HOSTILE, lambda m: m.zip(m.beside(b"csubprocess\nPopen\n)}" + m.text("args") + m.text("id") + b"s\x92"))),
    "stack_global": (HOSTILE, lambda m: m.zip(m.beside(m.text("os") + m.text("system") + b"\x93" + m.text("id") + b"\x85R"))),
    "stack_global with computed names": (
        HOSTILE, lambda m: m.zip(m.beside(m.call("builtins", "str", "os") + m.text("system") + b"\x93" + m.text("id") + b"\x85R"))
    ),
    "a name that is only mentioned": (HOSTILE, lambda m: m.zip(m.beside(b"cos\nsystem\n"))),
    "a module that would be imported": (READ, lambda m: m.zip(m.beside(b"ccanary_module\nNet\n)R"))),
    "a module that would be imported, dotted": (READ, lambda m: m.zip(m.beside(m.text("canary_module") + m.text("Net.a") + b"\x93"))),
    "extension code": (HOSTILE, lambda m: m.zip(m.beside(b"\x82\x01)R"))),
    "extension code of two bytes": (HOSTILE, lambda m: m.zip(m.beside(b"\x83\x01\x00)R"))),
    "extension code of four bytes": (HOSTILE, lambda m: m.zip(m.beside(b"\x84\x01\x00\x00\x00)R"))),
    "eval": (HOSTILE, lambda m: m.zip(m.beside(m.call("builtins", "eval", f"open({str(m.canary)!r}, 'w')")))),
    "exec of Python 2": (HOSTILE, lambda m: m.zip(m.beside(m.call("__builtin__", "exec", f"open({str(m.canary)!r}, 'w')")))),
    "torch.load inside": (HOSTILE, lambda m: m.zip(m.beside(m.call("torch.storage", "_load_from_bytes", "x")))),
    # Names reached in other ways.
    "dotted name": (HOSTILE, lambda m: m.zip(m.beside(m.text("torch.serialization") + m.text("os.system") + b"\x93" + m.text("id") + b"\x85R"))),
    "getattr chain": (
        HOSTILE,
        lambda m: m.zip(m.beside(b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(ctorch\nserialization\n" + m.text("os") + b"tR" + m.text("system") + b"tR" + m.text("id") + b"\x85R")),
    ),
    "getattr of an internal": (HOSTILE, lambda m: m.zip(m.beside(b"cbuiltins\ngetattr\n(" + m.tensor() + m.text("__class__") + b"tR"))),
    "partial": (HOSTILE, lambda m: m.zip(m.beside(b"cfunctools\npartial\n(cos\nsystem\n" + m.text("id") + b"tR)R"))),
    "map": (HOSTILE, lambda m: m.zip(m.beside(b"cbuiltins\nmap\n(cos\nsystem\n]" + m.text("id") + b"atR"))),
    "attrgetter": (HOSTILE, lambda m: m.zip(m.beside(m.call("operator", "attrgetter", "system") + b"cmine\nNet\n\x85R"))),
    "a graph's code": (
        HOSTILE,
        lambda m: m.zip(m.beside(b"ctorch.fx.graph_module\nreduce_graph_module\n(}" + m.text("_code") + m.text("\ndef forward(self):\n    pass\n") + b"s" + m.text("import os\nos.system('id')") + b"tR")),
    ),
    "a rebuild function that calls another": (
        HOSTILE, lambda m: m.zip(m.beside(b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n(" + m.text("id") + b"tNtR"))
    ),
    "a factory of a dict": (HOSTILE, lambda m: m.zip(m.beside(b"ccollections\ndefaultdict\ncos\ngetcwd\n\x85R"))),
    "pip.main": (HOSTILE, lambda m: m.zip(m.beside(m.call("pip", "main", "install")))),
    "setstate installed by BUILD, then called": (
        HOSTILE, lambda m: m.zip(m.beside(b"cmine\nNet\n)\x81}" + m.text("__setstate__") + b"cos\nsystem\nsb" + m.text("id") + b"b"))
    ),
    "state of a function": (HOSTILE, lambda m: m.zip(m.beside(b"cos\nsystem\n}" + m.text("__globals__") + b"Nsb"))),
    "attributes set on sys.modules": (HOSTILE, lambda m: m.zip(m.beside(b"csys\nmodules\n" + m.text("os") + b"Ns"))),
    # Where payloads hide.
    "in a persistent id": (HOSTILE, lambda m: m.zip(m.beside(m.payload + b"Q"))),
    "in a storage's persistent id": (HOSTILE, lambda m: m.zip(m.beside(b"(" + m.text("storage") + m.payload + m.text("0") + m.text("cpu") + b"K\x04tQ"))),
    "in a dict's key": (HOSTILE, lambda m: m.zip(m.beside(b"}" + m.payload + b"Ns"))),
    "in a set": (HOSTILE, lambda m: m.zip(m.beside(b"\x8f(" + m.payload + b"\x90"))),
    "in arguments nobody reads": (HOSTILE, lambda m: m.zip(m.beside(b"ccollections\nOrderedDict\n" + m.payload + b"\x85R"))),
    "in a tensor's hooks": (HOSTILE, lambda m: m.zip(m.state_dict().replace(b"ccollections\nOrderedDict\n)R", m.payload))),
    "in a tensor's attributes": (
        HOSTILE,
        lambda m: m.zip(m.state_dict(m.text("b") + b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n("
                                     + m.tensor().partition(b"v2\n(")[2][:-2] + b"t}" + m.text("a") + m.payload + b"stR")),
    ),
    "popped before it can be seen": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + b"0" + m.state_dict()[2:])),
    "in the memo alone": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + b"q\xff0" + m.state_dict()[2:])),
    "popped with its mark": (HOSTILE, lambda m: m.zip(b"\x80\x02(" + m.payload + b"1" + m.state_dict()[2:])),
    "before an error": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + b"\xff")),
    "before the end of the bytes": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload)),
    "before a memo entry that is not there": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + b"h\xff.")),
    "before a storage that is not there": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + b"0" + m.state_dict()[2:], storages={})),
    "before a tensor that lies": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + b"0" + m.tensor(shape=(400,)) + b".")),
    "before a limit": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + b"\x8b\xff\xff\xff\x7f")),
    "after STOP": (HOSTILE, lambda m: m.zip(m.state_dict() + b"\x80\x02" + m.payload + b".")),
    "several pickles in a row": (HOSTILE, lambda m: m.zip(pickle.dumps(1, 2) + m.state_dict())),
    "in a sibling record": (HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/evil.pkl": b"\x80\x02" + m.payload + b"."})),
    "in a sibling record without an ending": (HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/more": b"\x80\x02" + m.payload + b"."})),
    "in a sibling record, damaged": (HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/evil.pkl": b"\x80\x02" + m.payload + b"\xff"})),
    "in a sibling record, second in a row": (
        HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/evil.pkl": pickle.dumps(1, 2) + b"\x80\x02" + m.payload + b"."})
    ),
    "in a sibling record, protocol 0": (HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/notes.txt": m.payload + b"."})),
    "in a sibling record, by INST": (
        HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/x": b"(" + m.text(f"touch {m.canary}") + b"ios\nsystem\n."})
    ),
    "in a sibling record, behind an opcode that is refused": (
        HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/x": b"\x80\x02N20" + m.payload + b"."})
    ),
    "in an archive in a record": (HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/extra/x.npz": m.zip(b"\x80\x02" + m.payload + b".")})),
    "in the record of the serialization id": (
        HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/.data/serialization_id": b"\x80\x02" + m.payload + b"."})
    ),
    "behind an opcode that is refused": (HOSTILE, lambda m: m.zip(b"\x80\x02N20" + m.payload + b".")),
    "left on the stack": (HOSTILE, lambda m: m.zip(b"\x80\x02" + m.payload + m.state_dict()[2:])),
    "kept as code, and called": (
        HOSTILE,
        lambda m: m.zip(m.beside(b"ctypes\nFunctionType\n(ctypes\nCodeType\n" + m.text("x") + b"\x85R}tR)R")),
    ),
    "kept as code": (READ, lambda m: m.zip(m.beside(b"ctypes\nFunctionType\n(ctypes\nCodeType\n" + m.text("x") + b"\x85R}tR"))),
    "reduced by or": (READ, lambda m: m.zip(m.beside(b"cfunctools\nreduce\n(coperator\nor_\n(cbuiltins\nint\nNttR"))),
    "in the record of the version": (REFUSED, lambda m: m.zip(m.state_dict(), {"archive/version": b"\x80\x02" + m.payload + b"."})),
    # Structure on which readers disagree.
    "a frame that is straddled": (HOSTILE, lambda m: m.zip(b"\x80\x04" + FRAME + b"NJ\x00\x00\x00\x000.")),
    "frames that overlap": (HOSTILE, lambda m: m.zip(b"\x80\x04" + FRAME + b"N" + FRAME + b"NNN.")),
    "a frame past the end": (REFUSED, lambda m: m.zip(b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.")),
    "STOP inside a frame": (HOSTILE, lambda m: m.zip(b"\x80\x04" + FRAME + b"N.NN")),
    "a second PROTO": (HOSTILE, lambda m: m.zip(b"\x80\x02N\x80\x040.")),
    "a protocol of the future": (REFUSED, lambda m: m.zip(b"\x80\x06N.")),
    "digits that are none in ASCII": (HOSTILE, lambda m: m.zip(m.beside(b"I\xd9\xa1\xd9\xa2\n"))),
    "underscores in numbers": (HOSTILE, lambda m: m.zip(m.beside(b"I1_000\n"))),
    "octal, or is it": (HOSTILE, lambda m: m.zip(m.beside(b"I010\n"))),
    "hexadecimal": (HOSTILE, lambda m: m.zip(m.beside(b"I0x10\n"))),
    "spaces in numbers": (HOSTILE, lambda m: m.zip(m.beside(b"L 1L\n"))),
    "escapes in STRING": (HOSTILE, lambda m: m.zip(m.beside(b"S'\\157s'\n"))),
    "STRING without its quote": (REFUSED, lambda m: m.zip(m.beside(b"S'os\n"))),
    "DUP": (REFUSED, lambda m: m.zip(m.beside(b"N2\x86"))),
    "POP_MARK without a mark": (REFUSED, lambda m: m.zip(b"\x80\x02N1.")),
    "PUT of nothing": (REFUSED, lambda m: m.zip(b"\x80\x02q\x00N.")),
    "PUT across a mark": (REFUSED, lambda m: m.zip(b"\x80\x02N(q\x00h\x00\x86.")),
    "out-of-band buffers": (REFUSED, lambda m: m.zip(m.beside(b"\x97"))),
    "text opcodes in a binary pickle": (READ, lambda m: m.zip(m.beside(b"(I1\nL2L\nF1.5\nS'a'\nVb\nt"))),
    "nothing": (REFUSED, lambda m: m.zip(b"")),
    "STOP alone": (REFUSED, lambda m: m.zip(b".")),
    # The same in the other containers of pickles.
    "legacy: the object": (HOSTILE, lambda m: m.legacy(m.beside(m.payload))),
    "legacy: before an error": (HOSTILE, lambda m: m.legacy(b"\x80\x02" + m.payload + b"\xff")),
    "legacy: the magic number": (HOSTILE, lambda m: b"\x80\x02" + m.payload + b"0" + m.legacy(m.state_dict())[2:]),
    "legacy: the keys": (HOSTILE, lambda m: m.legacy(m.state_dict(), keys=b"\x80\x02" + m.payload + b".")),
    "legacy: after the storages": (HOSTILE, lambda m: m.legacy(m.state_dict()) + b"\x80\x02" + m.payload + b"."),
    "legacy: the archive's turn": (HOSTILE, lambda m: m.legacy(m.state_dict()) + m.zip(m.state_dict())),
    "a bare pickle": (HOSTILE, lambda m: m.beside(m.payload)),
    "a bare pickle, damaged": (HOSTILE, lambda m: b"\x80\x02" + m.payload + b"\xff"),
    "torchscript: constants": (
        HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/constants.pkl": b"\x80\x02" + m.payload + b"\x85."})
    ),
    "torchscript: data": (HOSTILE, lambda m: m.zip(m.beside(m.payload), {"archive/constants.pkl": b"\x80\x02)."})),
    "torchscript: bytecode": (
        HOSTILE, lambda m: m.zip(m.state_dict(), {"archive/constants.pkl": b"\x80\x02).", "archive/bytecode.pkl": b"\x80\x02" + m.payload + b"."})
    ),
    "package: a resource": (
        HOSTILE,
        lambda m: m.archive({"p/.data/extern_modules": b"", "p/.data/version": b"6\n", "p/model/model.pkl": b"\x80\x02" + m.payload + b".",
                             "p/byteorder": b"little"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_pickle(name: str, court: Any) -> None:
    court.judge(name)


@pytest.mark.thorough
def test_every_command_refuses(court: Any) -> None:
    court.judge_refused()


def test_the_canary_lives(make: Any) -> None:
    """The payload would leave its mark, were it executed."""
    assert not make.canary.exists()
    pickle.loads(b"\x80\x02" + make.payload + b".")
    assert make.canary.exists()


def test_where_a_payload_lies_is_told(court: Any) -> None:
    (use,) = [use for use in court.document("reduce")["globals"] if use["verdict"] == "dangerous"]
    assert (use["name"], use["count"], use["where"]) == ("os.system", 1, ["data.pkl: extra"])
    (use,) = [use for use in court.document("in a sibling record")["globals"] if use["verdict"] == "dangerous"]
    assert use["where"] == ["evil.pkl"]
    (use,) = [use for use in court.document("before an error")["globals"] if use["verdict"] == "dangerous"]
    assert use["where"] == ["data.pkl"]
