"""Calls that reach further than their name says: attributes, and code that the file holds."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckptkit
from ckptkit.limits import Limits
from ckptkit.pickling import calls
from ckptkit.pickling.inert import InertDict
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.trust import global_uses


def uses(data: bytes) -> dict[str, tuple[str, str]]:
    return {use.name: (use.verdict, use.reason) for use in global_uses(read_pickle(data).globals)}


GETATTR = b"cbuiltins\ngetattr\n"


def attribute(of: bytes, name: str, getattr_: bytes = GETATTR) -> bytes:
    return getattr_ + b"(" + of + b"X" + len(name).to_bytes(4, "little") + name.encode() + b"tR"


@pytest.mark.parametrize("protocol", range(4))
def test_attributes_that_honest_pickles_take(protocol: int) -> None:
    found = uses(pickle.dumps({"method": "text".upper, "classmethod": dict.fromkeys}, protocol))
    assert {verdict for verdict, _ in found.values()} <= {"unknown", "allowed"}
    assert any(name.endswith("dict.fromkeys") for name in found)


@pytest.mark.parametrize("getattr_", [GETATTR, b"c__builtin__\ngetattr\n"])
def test_an_attribute_is_judged_as_the_name_it_is(getattr_: bytes) -> None:
    found = uses(attribute(b"cmine\nNet\n", "forward", getattr_) + b".")
    assert found["mine.Net.forward"] == ("unknown", "")
    found = uses(attribute(b"cmine\nNet\n)R", "forward", getattr_) + b".")
    assert found["mine.Net.forward"] == ("unknown", "")


@pytest.mark.parametrize(
    "data",
    [
        attribute(b"ctorch\nserialization\n", "os"),
        attribute(b"ctorch\nserialization\n", "os.system"),
        attribute(attribute(b"ctorch\nserialization\n", "pickle"), "loads"),
        attribute(attribute(b"ctorch\nnn\n", "modules"), "sys"),
        attribute(b"cmine\nNet\n", "__init__"),
        attribute(b"cmine\nNet\n)R", "__reduce__"),
        attribute(b"N", "__class__"),
        attribute(b"]", "__class__"),
        attribute(attribute(b"X\x00\x00\x00\x00", "__class__"), "__base__"),
        attribute(b"ctorch\nUntypedStorage\n", "from_file"),
        GETATTR + b"(cmine\nNet\ncmine\nname\n)RtR",  # a computed name
        GETATTR + b"(tR",
        GETATTR + b"(cmine\nNet\ntR",
        b"(" + b"cmine\nNet\nX\x08\x00\x00\x00__dict__ibuiltins\ngetattr\n",  # INST
        b"(" + GETATTR + b"cmine\nNet\nX\x08\x00\x00\x00__dict__o",  # OBJ
        b"".join([GETATTR + b"("] * 12) + b"cmine\nNet\n" + b"X\x01\x00\x00\x00atR" * 12,  # a chain without end
    ],
)
def test_attributes_that_reach_too_far(data: bytes) -> None:
    assert "dangerous" in {verdict for verdict, _ in uses(data + b".").values()}


def test_a_deep_chain_of_attributes_costs_no_more_than_its_length() -> None:
    count = 30_000
    data = b"".join([GETATTR + b"("] * count) + b"cmine\nNet\n" + b"X\x01\x00\x00\x00atR" * count + b"."
    assert uses(data)["builtins.getattr"][0] == "dangerous"


# The code of FX graphs.


@torch.fx.wrap
def wrapped(x: torch.Tensor) -> torch.Tensor:
    return x


class Traced(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        self.signal = torch.nn.Parameter(torch.ones(1))

    def forward(  # a parameter may be called as a builtin is
        self,
        input: torch.Tensor,  # noqa: A002
        compiled: bool = True,
        *,
        eps: float = float("inf"),
    ) -> torch.Tensor:
        out = torch.relu(self.layers(input)).to(torch.float16).view(-1, input.size(0)) + self.signal + eps
        return operator.matmul(wrapped(out), out.t()).reshape(input.shape[0], 2)


def test_an_honest_graph_needs_trust_and_says_why(save: Callable[..., Path]) -> None:
    graph = torch.fx.symbolic_trace(Traced())
    try:
        graph.__reduce__()
    except AttributeError:
        pytest.skip("this torch cannot save a graph that calls a wrapped function")
    assert {"import torch", "from math import inf"} <= set(graph.__reduce__()[1][1].split("\n"))
    document = ckptkit.inspect(save(graph, "graph.pth"))
    assert document["trust"] == "needs_trust"
    assert [use["name"] for use in document["globals"] if use["verdict"] == "dangerous"] == []
    with ckptkit.open(save(graph, "graph.pth")) as file:
        (use,) = [use for use in file.checkpoint.globals if use.name.endswith("reduce_graph_module")]
    assert use.reason == "runs Python text from the file"


CODE = "\n\n\ndef forward(self, x):\n    return x\n"


def graph_module(imports: object, code: object = CODE) -> dict[str, tuple[str, str]]:
    call = reach_call(imports, code)
    return {use.name: (use.verdict, use.reason) for use in global_uses([call])}


def reach_call(imports: object, code: object) -> calls.Global:
    callee = calls.Global("torch.fx.graph_module", "reduce_graph_module")
    watch = calls.CallsThatReach(calls.Global).watcher(callee)
    assert watch is not None
    watch((InertDict([("_code", code)]), imports))
    return callee


@pytest.mark.parametrize(
    ("imports", "code"),
    [
        ("import torch", CODE),
        ("NoneType = type(None)\nfrom math import inf\nimport torch.fx._pytree as fx_pytree", CODE),
        ("from mine.layers import fused as mine_layers_fused\nName = 'Tensor'", CODE),
        ("import torch", '\ntorch.fx._symbolic_trace.wrap("mine_fused")\n' + CODE),
        ("import torch", "\n\ndef forward(\n    self,\n    signal, input,\n) -> torch.Tensor:\n    return signal\n"),
        ("import torch", '\ndef forward(self, x):\n    a = getattr(self.layers, "0")(x);  x = None\n    return a\n'),
    ],
)
def test_code_as_torch_generates_it(imports: str, code: str) -> None:
    assert reach_call(imports, code).offence == ""


@pytest.mark.parametrize(
    ("imports", "code", "words"),
    [
        ("import os", CODE, "its text says 'import os'"),
        ("import os.path as p", CODE, "says"),
        ("from os import system as torch", CODE, "says"),
        ("from builtins import exec as e", CODE, "says"),
        ("from torch.serialization import os", CODE, "says"),
        ("import torch; x()", CODE, "more than imports"),
        ("from math import *", CODE, "more than imports"),
        ("import torch\nx = y()", CODE, "more than imports"),
        ("@evil", CODE, "more than imports"),
        ("import torch", "\nevil()\n" + CODE, "more than imports"),
        ("import torch", CODE + "evil()\n", "more than imports"),
        ("import torch", "\nclass A:\n    pass\n" + CODE, "more than imports"),
        ("import torch", "\n    \x0cimport os\n" + CODE, "says"),
        ("import torch", "\n\ndef forward(self, x=__import__('a')):\n    return x\n", "names '__import__'"),
        ("import torch", "\n\ndef forward(self, x):\n    return eval('1')\n", "names 'eval'"),
        ("import torch", "\n\ndef forward(self, x):\n    e = exec\n", "names 'exec'"),
        ("import torch", "\n\ndef forward(self, x):\n    torch.serialization.os.system('id')\n", "names 'os'"),
        ("import torch", "\n\ndef forward(self, x):\n    torch.serialization. \\\n os.system('id')\n", "names 'os'"),
        ("import torch", "\n\ndef forward(self, x):\n    return ().__class__\n", "names '__class__'"),
        ("import torch", "\n\ndef forward(self, x):\n    return getattr(x, '__class__')\n", "names '__class__'"),
        ("import torch", "\n\ndef forward(self, x):\n    return \uff45val('1')\n", "names 'eval'"),
        ("import torch", None, "missing or computed"),
        (None, CODE, "missing or computed"),
        ("import torch", "#" * (17 << 20), "runs more than 16,777,216 characters"),
    ],
)
def test_code_that_torch_never_generates(imports: object, code: object, words: str) -> None:
    assert words in reach_call(imports, code).offence
    assert graph_module(imports, code)["torch.fx.graph_module.reduce_graph_module"][0] == "dangerous"


def test_the_same_text_called_ten_thousand_times_is_looked_through_once_and_no_more() -> None:
    callee = calls.Global("torch.fx.graph_module", "reduce_graph_module")
    watch = calls.CallsThatReach(calls.Global).watcher(callee)
    assert watch is not None
    body = InertDict([("_code", CODE + "    # " + "x" * 1_000_000)])
    for _ in range(10_000):
        watch((body, "import torch"))
    assert callee.offence.startswith("runs more than")


# Functions that are kept as code, as cloudpickle and dill write them.


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(qualified: str) -> bytes:
    module, _, name = qualified.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def call(callee: bytes, *args: bytes) -> bytes:
    return callee + b"(" + b"".join(args) + b"tR"


BUILTIN_TYPE = named("cloudpickle.cloudpickle._builtin_type")
BYTECODE = call(call(BUILTIN_TYPE, text("CodeType")), b"K\x00", b"K\x00", b"C\x02d\x00", b")")
KEPT = call(named("cloudpickle.cloudpickle._make_function"), BYTECODE, b"}", b"N", b"N", b"N")
WAYS = {
    "cloudpickle": KEPT,
    "an older cloudpickle": call(
        named("cloudpickle.cloudpickle._fill_function"),
        call(named("cloudpickle.cloudpickle._make_skel_func"), BYTECODE, b"N", b"}"),
        b"}",
    ),
    "joblib's": KEPT.replace(b"ccloudpickle.", b"cjoblib.externals.cloudpickle."),
    "ray's": KEPT.replace(b"ccloudpickle.", b"cray.cloudpickle."),
    "dill": call(
        named("dill._dill._create_function"), call(named("dill._dill._create_code"), b"K\x00", b"C\x02d\x00"), b"}"
    ),
    "by its type": call(named("types.FunctionType"), call(named("types.CodeType"), b"K\x00"), b"}"),
    "by its type's name": call(call(BUILTIN_TYPE, text("FunctionType")), BYTECODE, b"}"),
    "by __new__": call(attribute(named("types.FunctionType"), "__new__"), named("types.FunctionType"), BYTECODE, b"}"),
    "by copyreg": call(named("copyreg.__newobj__"), named("types.FunctionType"), BYTECODE, b"}"),
    "by NEWOBJ": named("types.LambdaType") + b"(" + BYTECODE + b"}t\x81",
}


def hostile(data: bytes) -> dict[str, str]:
    return {name: reason for name, (verdict, reason) in uses(data + b".").items() if verdict == "dangerous"}


@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_is_kept_needs_trust(way: str) -> None:
    for data in (WAYS[way], b"}" + text("fn") + WAYS[way] + b"s", call(named("mine.Config"), WAYS[way])):
        found = uses(data + b".")
        assert hostile(data) == {}
        assert any("a function or class that is code in the file" in reason for _, reason in found.values())


@pytest.mark.parametrize(
    "held",
    [
        lambda kept: call(named("functools.partial"), kept) + b"(" + kept + b")}Ntb",
        lambda kept: call(named("collections.defaultdict"), kept),
        lambda kept: call(named("builtins.property"), kept, b"N"),
        lambda kept: call(named("mine.collate"), kept),
        lambda kept: named("mine.Net") + b")\x81}" + text("fn") + kept + b"sb",
        lambda kept: call(named("cloudpickle.cloudpickle._function_setstate"), kept, b"}") + b"0N",
        lambda kept: call(
            named("cloudpickle.cloudpickle._make_skeleton_class"), named("builtins.type"), text("A"), b")", b"}"
        ) + b"q\x00" + call(named("cloudpickle.cloudpickle._class_setstate"), b"h\x00", b"}" + text("f") + kept + b"s")
        + b"0)\x81",
        lambda kept: call(call(GETATTR, named("dill._dill"), text("_setattr"), named("builtins.setattr")), kept,
                          text("__doc__"), b"N"),
        lambda kept: call(named("builtins.setattr"), kept, text("__doc__"), b"N"),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_function_that_is_kept_and_held_is_not_called(held: Callable[[bytes], bytes]) -> None:
    assert hostile(held(KEPT)) == {}


CALLED: dict[str, Callable[[bytes], bytes]] = {
    "called": lambda kept: call(kept),
    "called with OBJ": lambda kept: b"(" + kept + b"K\x01o",
    "partial, then called": lambda kept: call(call(named("functools.partial"), kept, b"K\x01")),
    "partial of partial": lambda kept: call(call(named("functools.partial"), call(named("functools.partial"), kept))),
    "partial with its state set": lambda kept: named("functools.partial") + named("mine.f") + b"\x85R("
    + kept + b")}Ntb)R",
    "mapped": lambda kept: call(named("builtins.map"), kept, b"]"),
    "mapped by NEWOBJ": lambda kept: named("builtins.map") + b"(" + kept + b"]t\x81",
    "filtered": lambda kept: call(named("__builtin__.filter"), kept, b"]"),
    "starmap": lambda kept: call(named("itertools.starmap"), kept, b"]"),
    "reduced": lambda kept: call(named("functools.reduce"), kept, b"]"),
    "partial in map": lambda kept: call(named("builtins.map"), call(named("functools.partial"), kept), b"]"),
    "partial of map": lambda kept: call(call(named("functools.partial"), named("builtins.map")), kept, b"]"),
    "in a list": lambda kept: call(named("operator.call"), b"](" + kept + b"e"),
    "in a class": lambda kept: call(named("builtins.type"), text("A"), b")", b"}" + text("__reduce__") + kept + b"s"),
    "rebuilt": lambda kept: call(named("torch._tensor._rebuild_from_type_v2"), kept, named("torch.Tensor"), b")", b"}"),
    "applied": lambda kept: call(named("numpy.apply_along_axis"), kept, b"K\x00", b"]"),
    "made a type of": lambda kept: call(named("dill._dill._create_type"), kept, b"K\x01"),
    "made a metaclass": lambda kept: call(
        named("cloudpickle.cloudpickle._make_skeleton_class"), kept, text("A"), b")", b"}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", CALLED)
@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_is_kept_and_called_is_hostile(way: str, how: str) -> None:
    assert any(reason for reason in hostile(CALLED[how](WAYS[way])).values())


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (call(named("builtins.map"), named("types.FunctionType"), b"]", b"]"), "types.FunctionType"),
        (call(named("cloudpickle.cloudpickle._class_setstate"), named("collections.OrderedDict"), b"}"),
         "cloudpickle.cloudpickle._class_setstate"),
        (call(named("builtins.setattr"), named("collections.OrderedDict"), text("__init__"), KEPT), "builtins.setattr"),
        (call(named("builtins.setattr"), KEPT, text("a"), b"N") + call(named("mine.f"), named("builtins.setattr"))
         + b"\x86",
         "builtins.setattr"),
        (attribute(call(named("cloudpickle.cloudpickle.subimport"), text("os")), "system"), "os.system"),
        (attribute(call(named("dill._dill._import_module"), text("subprocess")), "Popen"), "subprocess.Popen"),
        (call(named("dill._dill._get_attr"), named("torch.serialization"), text("os")), "torch.serialization.os"),
        (call(named("cloudpickle.cloudpickle.subimport"), text("os")) + b"}" + text("path") + KEPT + b"sb",
         "cloudpickle.cloudpickle.subimport"),
        (call(named("cloudpickle.cloudpickle.subimport"), named("mine.name")), "cloudpickle.cloudpickle.subimport"),
    ],
)  # fmt: skip
def test_what_keeps_code_and_is_turned_on_something_else(data: bytes, name: str) -> None:
    assert name in hostile(data)


# What is harmless by what it is given.


@pytest.mark.parametrize("protocol", range(6))
def test_a_union_of_types_is_no_reduction(protocol: int) -> None:
    found = uses(pickle.dumps({"a": int | None, "b": list[int] | str | None}, protocol))
    assert {verdict for verdict, _ in found.values()} <= {"unknown", "allowed"}
    assert any(name.endswith(".reduce") for name in found)


OR = call(named("functools.reduce"), named("operator.or_"), b"]")


@pytest.mark.parametrize(
    "data",
    [
        named("functools.reduce"),
        call(named("functools.reduce"), named("operator.add"), b"]"),
        call(named("functools.reduce"), GETATTR, b"]"),
        call(named("functools.reduce"), named("operator.or_"), b"]", b"N"),
        OR + call(named("functools.reduce"), named("mine.f"), b"]") + b"\x86",
        OR + call(named("builtins.map"), named("functools.reduce"), b"]") + b"\x86",
        OR + call(named("mine.f"), b"]]]" + named("functools.reduce") + b"aaa") + b"\x86",
        call(named("mine.f"), b"}K\x01" + named("_functools.reduce") + b"s") + b"0"
        + call(named("_functools.reduce"), named("_operator.or_"), b"]"),
        OR + call(call(named("functools.partial"), named("functools.reduce"), GETATTR), b"]") + b"\x86",
    ],
)  # fmt: skip
def test_any_other_reduction_is_hostile(data: bytes) -> None:
    assert any(name.endswith(".reduce") for name in hostile(data))


@pytest.mark.parametrize("protocol", [2, 3])
def test_new_with_keywords_is_an_object_of_its_class(protocol: int) -> None:
    """``copyreg.__newobj_ex__`` under protocols without NEWOBJ_EX: ``partial(cls.__new__, cls, …)()``."""
    made = call(call(named("functools.partial"), attribute(named("mine.Net"), "__new__")) +
                b"(" + attribute(named("mine.Net"), "__new__") + b"(" + named("mine.Net") + b"t}Ntb")  # fmt: skip
    assert hostile(made) == {}
    assert uses(made + b".")["mine.Net.__new__"] == ("unknown", "")
    assert "subprocess.Popen.__new__" in hostile(made.replace(named("mine.Net"), named("subprocess.Popen")))


@pytest.mark.parametrize(
    "data",
    [
        call(call(named("functools.partial"), GETATTR), named("torch.serialization"), text("os")),
        call(call(named("functools.partial"), GETATTR, named("torch.serialization"), text("os"))),
        call(named("builtins.map"), GETATTR, b"]", b"]"),
        call(named("itertools.starmap"), GETATTR, b"]"),
        call(named("torch._tensor._rebuild_from_type_v2"), GETATTR, named("torch.Tensor"), b")", b"}"),
        call((named("functools.partial") + b"(") * 12 + GETATTR + b"tR" * 12, named("torch.serialization"), text("os")),
        call(named("numpy.core._ufunc_reconstruct"), text("os"), text("system")),
        call(named("numpy._core._ufunc_reconstruct"), text("os"), named("mine.name")),
    ],
)
def test_attributes_taken_in_a_roundabout_way(data: bytes) -> None:
    assert hostile(data)


def test_a_partial_inside_itself_ends() -> None:
    data = named("functools.partial") + named("mine.f") + b"\x85Rq\x00(h\x00)}Ntb)R"
    assert "functools.partial" in hostile(data)


def test_what_calls_are_given_is_not_looked_through_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "DEFAULT_LIMITS", Limits(arguments=10_000))
    doubled = b"]q\x00" + b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(100))
    assert "mine.f" in hostile(OR + b"0" + doubled + b"0" + call(named("mine.f"), b"hd") + b"\x86"[:0])


# Tensors that pickle.dump wrote.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_that_pickle_wrote_are_tensors(protocol: int) -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    found = uses(pickle.dumps(state, protocol))
    assert found["torch.storage._load_from_bytes"][0] == "unknown"
    assert "dangerous" not in {verdict for verdict, _ in found.values()}
    assert found["torch.FloatStorage"][0] == "torch"


def inside(object_: bytes) -> bytes:
    data = b"".join((pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2), object_,
                     pickle.dumps([], 2)))  # fmt: skip
    return call(named("torch.storage._load_from_bytes"), b"B" + len(data).to_bytes(4, "little") + data)


def test_the_names_in_it_are_those_of_the_whole() -> None:
    system = b"cposix\nsystem\n" + text("id") + b"\x85R"
    assert hostile(inside(b"\x80\x02N.")) == {}
    assert "posix.system" in hostile(inside(b"\x80\x02" + system + b"."))
    assert "posix.system" in hostile(inside(b"\x80\x02" + system + b"0"))
    assert "posix.system" in hostile(inside(b"\x80\x02" + inside(b"\x80\x02" + system + b".") + b"."))
    assert "cloudpickle.cloudpickle._make_function" in hostile(inside(b"\x80\x02" + call(KEPT) + b"."))


@pytest.mark.parametrize(
    "data",
    [
        named("torch.storage._load_from_bytes"),
        call(named("torch.storage._load_from_bytes"), b"C\x02ab"),
        call(named("torch.storage._load_from_bytes"), b"C\x02N."),
        call(named("torch.storage._load_from_bytes"), text("x")),
        call(named("torch.storage._load_from_bytes"), named("mine.data")),
        call(named("torch.storage._load_from_bytes")),
        inside(b"\x80\x02N.") + call(named("builtins.map"), named("torch.storage._load_from_bytes"), b"]") + b"\x86",
    ],
)
def test_what_is_no_such_file_is_hostile(data: bytes) -> None:
    assert "torch.storage._load_from_bytes" in hostile(data)


def test_one_file_that_is_loaded_again_and_again_is_not_read_again_and_again() -> None:
    data = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps("x" * 1_000_000, 2) + pickle.dumps([], 2) * 3
    loads = named("torch.storage._load_from_bytes") + b"q\x00B" + len(data).to_bytes(4, "little") + data + b"q\x01\x85R"
    assert "torch.storage._load_from_bytes" in hostile(b"(" + loads + b"h\x00h\x01\x85R" * 100_000 + b"t")
