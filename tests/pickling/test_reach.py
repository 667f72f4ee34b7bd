"""Calls that reach further than their name says: attributes, and code that the file holds."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckptkit
from ckptkit.pickling import reach
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
    assert use.reason == "runs Python text that the file holds"


CODE = "\n\n\ndef forward(self, x):\n    return x\n"


def graph_module(imports: object, code: object = CODE) -> dict[str, tuple[str, str]]:
    call = reach_call(imports, code)
    return {use.name: (use.verdict, use.reason) for use in global_uses([call])}


def reach_call(imports: object, code: object) -> reach.Global:
    callee = reach.Global("torch.fx.graph_module", "reduce_graph_module")
    watch = reach.Reach(reach.Global).watcher(callee)
    assert watch is not None
    assert watch((InertDict([("_code", code)]), imports)) is NotImplemented
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
        ("import torch", None, "not there, or is computed"),
        (None, CODE, "not there, or is computed"),
        ("import torch", "#" * (17 << 20), "runs more than 16,777,216 characters"),
    ],
)
def test_code_that_torch_never_generates(imports: object, code: object, words: str) -> None:
    assert words in reach_call(imports, code).offence
    assert graph_module(imports, code)["torch.fx.graph_module.reduce_graph_module"][0] == "dangerous"


def test_the_same_text_called_a_million_times_is_looked_through_once_and_no_more() -> None:
    callee = reach.Global("torch.fx.graph_module", "reduce_graph_module")
    watch = reach.Reach(reach.Global).watcher(callee)
    assert watch is not None
    body = InertDict([("_code", CODE + "    # " + "x" * 1_000_000)])
    for _ in range(100_000):
        watch((body, "import torch"))
    assert callee.offence.startswith("runs more than")
