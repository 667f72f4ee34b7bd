"""Values that are no plain tensors: what they are called, and that `inspect` lists them with what they are made of."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.normalize.not_plain import Value, describe_value
from ckptkit.pickling.inert import Global, InertDict, Object
from ckptkit.pickling.layouts import rebuilt

Save = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, on prototypes and what it will remove


class Packed(torch.Tensor):
    """A tensor of a library's own, which has no bytes but those of what it wraps."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.packed, self.scale = data, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].packed, args[0].scale) if func is torch.ops.aten.detach.default else NotImplemented


class Noted(torch.Tensor):
    """A tensor that has bytes of its own."""


def packed() -> Packed:
    return Packed(torch.ones(4, 2, dtype=torch.int8), torch.ones(4))


def per_channel() -> torch.Tensor:
    return torch.quantize_per_channel(torch.ones(3, 4), torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3), 0, torch.quint8)


def ragged(**layout: Any) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], **layout)


VALUES: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    # what makes it, what it is called, and what it is made of
    "per tensor": (
        lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.25, 3, torch.qint8),
        "quantized [3, 4] qint8, scale 0.25, zero point 3",
        ["storage"],
    ),
    "per channel": (
        per_channel,
        "quantized [3, 4] quint8, 3 scales along dim 0",
        ["storage", "scales", "zero_points"],
    ),
    "as a parameter": (
        lambda: nn.Parameter(per_channel(), requires_grad=False),
        "quantized [3, 4] quint8, 3 scales along dim 0",
        ["storage", "scales", "zero_points"],
    ),
    "coo": (
        lambda: torch.eye(3, 4).to_sparse(),
        "sparse COO [3, 4] float32, 3 values stored",
        ["indices", "values"],
    ),
    "coo of one": (
        lambda: torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([2.0]), (5,)),
        "sparse COO [5] float32, 1 value stored",
        ["indices", "values"],
    ),
    "csr": (
        lambda: torch.eye(3, dtype=torch.float64).to_sparse_csr(),
        "sparse CSR [3, 3] float64, 3 values stored",
        ["crow_indices", "col_indices", "values"],
    ),
    "csr of a batch": (
        lambda: torch.stack([torch.eye(3), torch.eye(3)]).to_sparse_csr(),
        "sparse CSR [2, 3, 3] float32, 6 values stored",
        ["crow_indices", "col_indices", "values"],
    ),
    "csc": (
        lambda: torch.eye(3).to_sparse_csc(),
        "sparse CSC [3, 3] float32, 3 values stored",
        ["ccol_indices", "row_indices", "values"],
    ),
    "bsr": (
        lambda: torch.eye(4).to_sparse_bsr((2, 2)),
        "sparse BSR [4, 4] float32, 2 blocks stored",
        ["crow_indices", "col_indices", "values"],
    ),
    "bsc": (
        lambda: torch.eye(4).to_sparse_bsc((2, 2)),
        "sparse BSC [4, 4] float32, 2 blocks stored",
        ["ccol_indices", "row_indices", "values"],
    ),
    "nested": (ragged, "nested [2, ?, ?] float32", ["buffer", "sizes", "strides", "offsets"]),
    "jagged": (lambda: ragged(layout=torch.jagged), "nested [2, ?, 3] float32, jagged", ["values", "offsets"]),
    "meta": (lambda: torch.empty(5, 6, device="meta"), "meta [5, 6] float32, a shape without values", []),
    "wrapper": (packed, "Packed [4, 2] bfloat16", ["packed", "scale"]),
    "wrapper as a parameter": (lambda: nn.Parameter(packed(), requires_grad=False), "Packed [4, 2] bfloat16", []),
    "numpy": (lambda: numpy.ones((2, 3), "f4"), "numpy array [2, 3] float32", ["data"]),
}


@pytest.fixture
def described(save: Save) -> Callable[[Any], Value]:
    def describe(value: Any) -> Value:
        with ckptkit.open(save({"w": torch.ones(2), "v": value})) as file:
            told = describe_value(file.checkpoint.state_dict.everything["v"])
        assert told is not None
        return told

    return describe


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_is_told_in_words(kind: str, described: Callable[[Any], Value]) -> None:
    make, text, parts = VALUES[kind]
    value = described(make())
    assert value.text == text
    assert [name for name, _ in value.parts] == parts or not parts


@pytest.mark.parametrize("kind", VALUES)
def test_inspect_lists_it_with_dtype_shape_and_bytes(kind: str, save: Save) -> None:
    make, text, parts = VALUES[kind]
    original = make()
    path = save({"w": torch.ones(2), "v": original})
    document = ckptkit.inspect(path)
    rows = {row["name"]: row for row in document["tensors"]}
    row = rows["v"]
    assert row["dtype"] == str(original.dtype).removeprefix("torch.")
    if "nested" not in text:
        assert row["shape"] == list(original.shape)
    if parts and kind != "numpy":
        own = original.numel() if original.is_quantized else 0  # its storage has a byte for each element
        assert row["nbytes"] == own + sum(each["nbytes"] for name, each in rows.items() if name.startswith("v."))
        assert bool(row["storage"]) == original.is_quantized
    assert all(f"v.{part}" in rows for part in parts if part not in ("data", "storage"))
    assert len(rows) == len(document["tensors"])
    if kind != "numpy":
        assert row["value"] == text
        (finding,) = [each for each in document["findings"] if each["code"] == "not-a-plain-tensor"]
        assert finding["message"] == f"1 value of the state_dict is not a plain tensor: v ({text})"
    json.dumps(document)


def test_the_tree_shows_the_value_and_not_what_it_is_made_of(command: Any, save: Save) -> None:
    path = save({"a": {"w": torch.ones(2), "q": per_channel(), "s": torch.eye(3).to_sparse()}, "epoch": 3})
    shown = command("inspect", path).out
    assert "quantized [3, 4] quint8, 3 scales along dim 0" in shown
    assert "zero_points" not in shown and "indices" not in shown
    flat = [line.split("\t") for line in command("inspect", "--flat", path).out.splitlines()]
    assert ["q", "quint8", "[3, 4]", "36", "cpu", "a"] in flat
    assert command("inspect", "--stats", path).code == command("inspect", "--format", "markdown", path).code == 0


def test_each_is_listed_in_every_section_and_once(save: Save) -> None:
    shared = per_channel()
    path = save({"model": {"w": torch.ones(2), "q": shared}, "ema": {"w": torch.ones(2), "q": shared, "z": shared}})
    named = [(row["section"], row["name"]) for row in ckptkit.inspect(path)["tensors"] if "value" in row]
    assert sorted(named) == [("ema", "q"), ("ema", "z"), ("model", "q")]


def test_a_packed_module_is_not_listed_twice(save: Save) -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)), {nn.Linear})
    document = ckptkit.inspect(save(model))
    values = [row["name"] for row in document["tensors"] if "value" in row]
    assert values == ["0._packed_params._packed_params.0"]


def test_a_subclass_with_bytes_stays_a_tensor(save: Save) -> None:
    document = ckptkit.inspect(save({"w": torch.ones(2, 3).as_subclass(Noted)}))
    assert [(row["name"], row["shape"]) for row in document["tensors"]] == [("w", [2, 3])]
    assert "value" not in document["tensors"][0]


@pytest.fixture
def two_ranks() -> Iterator[Any]:
    """A mesh of two processes, of which this is the first; nothing is sent to the other."""
    pytest.importorskip("torch.distributed.device_mesh")
    tensor = pytest.importorskip("torch.distributed.tensor")
    pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=pg.FakeStore())
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        yield lambda placement: tensor.distribute_tensor(
            torch.ones(11, 6), mesh, [getattr(tensor, placement[0])(*placement[1:])]
        )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (("Shard", 0), "DTensor [11, 6] float32, Shard(0) of 2"),
        (("Shard", 1), "DTensor [11, 6] float32, Shard(1) of 2"),
        (("Replicate",), "DTensor [11, 6] float32, Replicate of 2"),
    ],
)
def test_a_distributed_tensor_says_how_and_what_helps(
    placement: tuple[Any, ...], text: str, two_ranks: Any, save: Save, command: Any
) -> None:
    path = save({f"layer.{n}.weight": two_ranks(placement) for n in range(9)} | {"bias": torch.ones(3)})
    document = ckptkit.inspect(path)
    assert [row["value"] for row in document["tensors"] if "value" in row] == [text] * 9
    told = command("convert", path, "out.safetensors").err
    assert "--exclude" not in told and "_rebuild" not in told
    if placement[0] == "Shard":
        assert "part-of-a-checkpoint" in told
        told = command("convert", path, "out.safetensors", "--allow-part").err
        assert "--exclude" not in told
    assert f"layer.0.weight ({text})" in told and "and 1 more" in told
    assert "tensor.full_tensor()" in told


# What a stranger may write.


def call(name: str, *args: object) -> Object:
    return Object("reduce", Global("torch._utils", name), args)


@pytest.mark.parametrize(
    "node",
    [
        call("_rebuild_parameter"), call("_rebuild_njt", InertDict()), call("_rebuild_tensor_v2", 1, 2, 3, 4, 5, 6),
        Object("newobj", Global("torch._utils", "_rebuild_qtensor"), ()),
        Object("reduce", Global("torch._tensor", "_rebuild_from_type_v2"), (1, 2, 3, 4)), None, 3, "text", [], {},
    ],
)  # fmt: skip
def test_what_fits_no_form_is_not_described(node: object) -> None:
    assert describe_value(node) is None


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        (call("_rebuild_qtensor"), "quantized"), (call("_rebuild_qtensor", 1, 2, 3, 4, 5), "quantized"),
        (call("_rebuild_sparse_tensor", 9, (1,)), "sparse"),
        (call("_rebuild_sparse_tensor", "x" * 10**6, ((), (), ())), "sparse"),
        (call("_rebuild_sparse_csr_tensor", Global("torch", "sparse_csr"), (1, 2, 3, 4)), "sparse"),
        (call("_rebuild_nested_tensor", None, None), "nested"), (call("_rebuild_xla_tensor", 1, 2, 3, 4), "device"),
        (call("_rebuild_meta_tensor_no_storage", None, ()), "meta"),
        (call("_rebuild_device_tensor_from_numpy", 1, 2, 3), "device"),
        (call("_rebuild_parameter", call("_rebuild_qtensor", *[10**15] * 7), False, None), "quantized"),
        (Object("reduce", Global("torch._tensor", "_rebuild_from_type_v2"),
                (Global("torch._utils", "_rebuild_qtensor"), Global("a", "Mine"), ((),) * 7, None)), "quantized"),
    ],
)  # fmt: skip
def test_what_does_not_fit_its_form_is_told_with_the_reason(node: object, kind: str) -> None:
    value = describe_value(node)
    assert value is not None and value.kind == kind and (value.dtype, value.shape) == ("?", ())
    assert f"malformed {kind} tensor: " in value.text and len(value.text) < 250


def test_parameters_in_parameters_have_an_end() -> None:
    node = call("_rebuild_meta_tensor_no_storage", Global("torch", "float32"), (1,), (1,), False)
    for _ in range(100_000):
        node = call("_rebuild_parameter", node, False, None)
    assert describe_value(node) is None and rebuilt(node) is None


def test_texts_are_short() -> None:
    huge = tuple([10**15] * 64)
    value = describe_value(call("_rebuild_meta_tensor_no_storage", Global("torch", "f" * 10**6), huge, huge, False))
    assert value is not None and len(value.text) < 250


def test_a_program_writes_sparse_tensors_in_another_form(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.register_buffer("mask", torch.eye(3).to_sparse())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    path = tmp_path / "m.pt"
    torch.jit.script(Masked()).save(str(path))
    assert zipfile.is_zipfile(path)
    with ckptkit.open(path) as file:
        value = describe_value(file.checkpoint.state_dict.everything["mask"])
    assert value is None or value.text == "sparse COO [3, 3] float32, 3 values stored"
    assert value is not None or "mask" in file.checkpoint.state_dict
