"""``--dtype``: every bit is what ``tensor.to(dtype)`` gives, ties and views stay, and losses are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.generated_tensors import STORABLE
from torch import nn

import ckptkit

DTYPES = [
    name for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2") if name in STORABLE
]


def cast(state: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """By hand."""
    to = getattr(torch, dtype)
    return {name: tensor.to(to) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 4))
    net[1].num_batches_tracked.fill_(1 << 40)
    state = dict(net.state_dict())
    hard = [0.0, -0.0, 1e-8, -1e-45, 65504.0, 65519.9, 1e-4, 1.0009765625, 3.0, float("inf"), -float("inf")]
    state["hard"] = torch.tensor(hard)
    state["h"] = torch.randn(7).half()
    state["d"] = torch.randn(3, dtype=torch.float64)
    state["mask"] = torch.tensor([True, False])
    state["z"] = torch.randn(2, dtype=torch.complex64)
    state["empty"] = torch.zeros(0, 3)
    state["scalar"] = torch.tensor(0.1)
    return state


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch_casts(save, converted, agree, state: dict[str, torch.Tensor], dtype: str) -> None:
    if dtype == "float8_e4m3fn":  # what is past its range older versions of torch make NaN
        state["hard"].clamp_(-448, 448)
    path = save(state)
    expected = cast(state, dtype)
    agree(converted(path, "out.pth", "--dtype", dtype), expected)
    agree(converted(path, "out.safetensors", "--dtype", dtype), expected, ordered=False)
    agree(converted("out.safetensors", "back.pth", "--dtype", f"torch.{dtype}"), expected, ordered=False)


def test_counters_stay(save, converted, state: dict[str, torch.Tensor]) -> None:
    written = converted(save(state), "out.safetensors", "--dtype", "float16")
    assert written["1.num_batches_tracked"].dtype == torch.int64
    assert int(written["1.num_batches_tracked"]) == 1 << 40


@pytest.mark.parametrize(
    ("globs", "kept"),
    [
        (["1.*"], lambda name: name.startswith("1.")),
        (["*.bias", "d"], lambda name: name.endswith(".bias") or name == "d"),
        (["net.1.*"], lambda name: name.startswith("1.")),  # as it will be called
        (["*"], lambda name: True),
    ],
)
def test_keep_dtype(save, converted, agree, state: dict[str, torch.Tensor], globs: list[str], kept: Any) -> None:
    path = save(state)
    by_hand = {f"net.{n}": state[n] if kept(n) else tensor for n, tensor in cast(state, "bfloat16").items()}
    options = [
        "--dtype",
        "bfloat16",
        "--add-prefix",
        "net",
        *(part for glob in globs for part in ("--keep-dtype", glob)),
    ]
    agree(converted(path, "out.pth", *options), by_hand)
    agree(converted(path, "out.safetensors", *options), by_hand, ordered=False)


def test_ties_and_views_survive(save, converted, agree) -> None:
    base = torch.randn(6, 4)
    state = {"a": base, "tied": base, "rows": base[2:4], "flat": base.view(-1), "t": base.t(), "part": base[:, 1:3],
             "wide": base[:1].expand(5, 4)}  # fmt: skip
    path = save(state)
    written = converted(path, "out.pth", "--dtype", "float16")
    agree(written, cast(state, "float16"))
    pointers = {name: tensor.untyped_storage().data_ptr() for name, tensor in written.items()}
    assert len(set(pointers.values())) == 1
    layouts = {name: (tensor.shape, tensor.stride(), tensor.storage_offset()) for name, tensor in written.items()}
    assert layouts == {name: (tensor.shape, tensor.stride(), tensor.storage_offset()) for name, tensor in state.items()}
    expected = cast(state, "float16")
    del expected["tied"]
    agree(converted(path, "out.safetensors", "--dtype", "float16"), expected, ordered=False)


def test_one_storage_has_one_dtype(save, converted) -> None:
    """What is kept by one of its names is kept under all."""
    base = torch.randn(4)
    written = converted(
        save({"a": base, "b": base, "c": base + 1}), "out.pth", "--dtype", "float16", "--keep-dtype", "b"
    )
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        "a": torch.float32,
        "b": torch.float32,
        "c": torch.float16,
    }
    assert written["a"].data_ptr() == written["b"].data_ptr()


def test_an_optimizer_keeps_its_dtype_and_loads(save, convert, tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    path = save({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    assert convert(path, "out.pth", "--dtype", "bfloat16").code == 0
    written = torch.load("out.pth")
    assert {tensor.dtype for tensor in written["model"].values()} == {torch.bfloat16}
    assert {state["exp_avg"].dtype for state in written["optimizer"]["state"].values()} == {torch.float32}
    again = nn.Linear(3, 2).bfloat16()
    again.load_state_dict(written["model"])
    torch.optim.Adam(again.parameters()).load_state_dict(written["optimizer"])


def findings(done: Any) -> dict[str, dict[str, Any]]:
    return {finding["code"]: finding for finding in json.loads(done.out)["findings"]}


def test_overflow_is_counted(save, convert) -> None:
    values = torch.tensor([1e6, -1e6, 1.0, float("inf"), float("nan"), 65520.0])
    path = save({"big [1]": values, "small": torch.ones(3)})
    for name in ("out.pth", "out.safetensors"):
        found = findings(convert(path, name, "--dtype", "float16", "--json"))
        assert found["cast-overflow"]["severity"] == "warning"
        assert found["cast-overflow"]["message"].startswith(
            "3 of 9 values are too large for the new dtype: big [1] (3)"
        )
        assert "cast-rounded" not in found
    fix = found["cast-overflow"]["fix"]
    assert fix == "--keep-dtype 'big [[]1]'"
    again = convert(path, "kept.pth", "--dtype", "float16", "--json", "--keep-dtype", "big [[]1]")
    assert "cast-overflow" not in findings(again)
    assert torch.load("kept.pth")["big [1]"].dtype == torch.float32
    done = convert(path, "text.pth", "--dtype", "float16")
    assert "warning: 3 of 9 values are too large" in done.err


def test_rounding_is_counted(save, convert) -> None:
    path = save({"w": torch.tensor([0.1, 0.5, 1e-9, 1.0]), "t": torch.tensor([[0.2, 0.25], [1.0, 0.3]]).t()})
    for name in ("out.pth", "out.safetensors"):
        found = findings(convert(path, name, "--dtype", "float16", "--json"))
        assert found["cast-rounded"]["message"] == "4 of 8 values were rounded to the new dtype, 1 of them to zero"
        assert found["cast-rounded"]["severity"] == "info"
    assert findings(convert(path, "wide.pth", "--dtype", "float64", "--json")) == {}
    done = convert(path, "unchecked.pth", "--dtype", "float16", "--no-check", "--json")
    assert "cast-rounded" in findings(done)


def test_the_plan_lists_casts(save, convert) -> None:
    path = save({"w": torch.ones(3), "n": torch.ones(1, dtype=torch.int32), "h": torch.ones(2).half()})
    document = json.loads(convert(path, "out.pth", "--dtype", "float16", "--json").out)
    assert document["casts"] == [{"name": "w", "from": "float32", "to": "float16"}]
    assert document["plan"]["casts"] == {"count": 1, "nbytes": 6}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int8"], "values cannot be cast to 'int8'; possible: float64, float32, float16, bfloat16, "),
        (["--dtype", "half"], "cannot be cast to 'half'"),
        (["--dtype", ""], "cannot be cast to ''"),
        (["--keep-dtype", "w"], "--keep-dtype makes exceptions to --dtype, which is not given"),
        (["--dtype", "float16", "--keep-dtype", "x.*"], "--keep-dtype 'x.*' matches no name"),
    ],
)
def test_refused(save, refused, options: list[str], words: str) -> None:
    assert words in refused(save({"w": torch.ones(1)}), "out.pth", *options)


def test_in_python(save, agree, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = save(state)
    report = ckptkit.convert(path, tmp_path / "out.pth", dtype="bfloat16", keep_dtype=["hard"])
    agree(torch.load(tmp_path / "out.pth"), {**cast(state, "bfloat16"), "hard": state["hard"]})
    assert report.details["operations"] == ["CastDtype(dtype='bfloat16', keep=('hard',))"]


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(*shape).to(dtype)


FP8, HALF, ONES = torch.float8_e4m3fn, torch.float16, torch.ones(4)
SCALED: dict[str, tuple[dict[str, torch.Tensor], list[str]]] = {
    "DeepSeek": ({"l.weight": of(FP8, 4, 4), "l.weight_scale_inv": ONES}, ["l.weight", "l.weight_scale_inv"]),
    "compressed-tensors": ({"l.weight": of(FP8, 4, 4), "l.weight_scale": ONES, "l.input_scale": torch.ones(1)},
        ["l.weight", "l.weight_scale", "l.input_scale"]),
    "packed": ({"l.weight_packed": of(torch.int32, 4), "l.weight_scale": ONES}, ["l.weight_scale"]),
    "NVFP4": ({"l.weight": of(torch.uint8, 4), "l.weight_scale": of(FP8, 4), "l.weight_scale_2": ONES},
        ["l.weight_scale", "l.weight_scale_2"]),
    "ComfyUI": ({"l.weight": of(FP8, 4), "l.scale_weight": ONES}, ["l.weight", "l.scale_weight"]),
    "experts": ({"e.w1": of(FP8, 2, 4), "e.w1_scale": ONES}, ["e.w1", "e.w1_scale"]),
    "bitsandbytes, 4 bits": ({"l.weight": of(torch.uint8, 8, 1), "l.weight.absmax": ONES, "l.weight.quant_map": ONES,
        "l.weight.quant_state.bitsandbytes__nf4": of(torch.uint8, 9)}, ["l.weight.absmax", "l.weight.quant_map"]),
    "bitsandbytes, nested": ({"l.weight": of(torch.uint8, 8), "l.weight.absmax": of(torch.uint8, 2),
        "l.weight.nested_absmax": ONES}, ["l.weight.nested_absmax"]),
    "bitsandbytes, 8 bits": ({"l.weight": of(torch.int8, 4, 4), "l.SCB": ONES}, ["l.SCB"]),
    "GPTQ": ({"l.qweight": of(torch.int32, 4), "l.qzeros": of(torch.int32, 1), "l.scales": ONES}, ["l.scales"]),
    "HQQ": ({"l.W_q": of(torch.uint8, 4), "l.scale": ONES, "l.zero": ONES}, ["l.scale", "l.zero"]),
    "quanto": ({"l.weight._data": of(torch.int8, 4), "l.weight._scale": ONES}, ["l.weight._scale"]),
    "without a module": ({"weight": of(FP8, 4), "weight_scale_inv": ONES}, ["weight", "weight_scale_inv"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_weights_and_their_scales_are_not_cast_apart(save, refused, convert, name: str, tmp_path: Path) -> None:
    state, named = SCALED[name]
    state = {"norm.weight": torch.ones(3), **state}
    error = refused(save(state), "out.pth", "--dtype", "bfloat16")
    assert f"{len(named)} tensor" in error and "--cast-scaled" in error
    assert all(f"{each} (with " in error and f"--keep-dtype {each}" in error for each in named)
    options = [part for each in named for part in ("--keep-dtype", each)]
    assert convert(save(state), "kept.pth", "--dtype", "bfloat16", *options).code == 0
    report = ckptkit.convert(tmp_path / "model.pth", tmp_path / "cast.pth", dtype="bfloat16", cast_scaled=True)
    assert f"{len(named)} tensor" in next(f.message for f in report.findings if f.code == "cast-scaled")
    written = torch.load(tmp_path / "cast.pth", weights_only=True)
    assert {written[each].dtype for each in [*named, "norm.weight"]} == {torch.bfloat16}


def test_scales_that_are_left_out_were_scales(save, refused) -> None:
    state = {"l.weight": of(FP8, 4, 4), "l.weight_scale_inv": ONES, "n.weight": ONES}
    assert "l.weight (with l.weight_scale_inv)" in refused(
        save(state), "out.pth", "--dtype", "float16", "--exclude", "*_inv"
    )


@pytest.mark.parametrize("state", [
    {"l.weight": of(FP8, 4, 4), "l.bias": ONES, "logit_scale": torch.ones(()), "text_projection": of(FP8, 2)},
    {"l.weight": torch.ones(4, 4), "l.scale": ONES, "l.num_batches_tracked": torch.tensor(1)},
    {"a.mask": of(torch.uint8, 4, 4), "a.scale": ONES},
    {"a.relative_position_index": torch.zeros(4, 4, dtype=torch.int64), "a.logit_scale": ONES},
    {"l.weight": of(FP8, 4), "l.weight_scale": of(FP8, 4)},
])  # fmt: skip
def test_what_is_but_called_a_scale_is_cast(save, converted, state: dict[str, torch.Tensor]) -> None:
    again = converted(save(state), "out.pth", "--dtype", "bfloat16")
    assert {again[name].dtype for name, value in state.items() if value.is_floating_point()} == {torch.bfloat16}


def test_scales_that_have_the_dtype_stay(save, converted) -> None:
    state = {"l.qweight": of(torch.int32, 4), "l.scales": ONES.half(), "n.weight": ONES}
    assert converted(save(state), "out.pth", "--dtype", "float16")["l.scales"].dtype is HALF
