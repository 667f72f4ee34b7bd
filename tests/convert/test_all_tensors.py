"""``--all-tensors``: every tensor of any file under the keys that lead to it, bit for bit what torch loads."""

from __future__ import annotations

import argparse
import collections
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.errors import KeyCollisionError, RewriteError, SectionError

Save = Callable[..., Path]
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]

CORPUS = os.environ.get("CKPTKIT_CORPUS")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def paths(node: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of what torch loads with the keys that lead to it, as Python gets there."""
    inside: Any = ()
    if isinstance(node, torch.Tensor):
        yield ".".join(above) or "tensor", node
        inside = node.__dict__.items()
    elif isinstance(node, np.ndarray):
        yield ".".join(above) or "tensor", torch.from_numpy(node.copy())
    elif isinstance(node, (torch.TypedStorage, torch.UntypedStorage)):
        dtype = node.dtype if isinstance(node, torch.TypedStorage) else torch.uint8
        yield ".".join(above) or "tensor", torch.tensor([], dtype=dtype).set_(node)  # type: ignore[call-overload]
    elif isinstance(node, nn.Module):
        members = dict(node.__dict__)
        kept = [members.pop(name).items() for name in ("_parameters", "_buffers", "_modules")]
        inside = [*(pair for pairs in kept for pair in pairs), *members.items()]
    elif isinstance(node, dict):
        inside = node.items()
    elif isinstance(node, (list, tuple)):
        inside = enumerate(node)
    elif isinstance(node, argparse.Namespace):
        inside = vars(node).items()
    for key, value in inside:
        yield from paths(value, (*above, str(key)))


def trained() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(numbers(4, 2)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def module() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.codebook = numbers(4)
    model.register_buffer("cache", numbers(2), persistent=False)
    return model


def gaussians() -> tuple[Any, int]:
    """What 3D Gaussian Splatting saves (``GaussianModel.capture`` and the iteration)."""
    xyz, scaling = (nn.Parameter(numbers(5, n)) for n in (3, 3))
    optimizer = torch.optim.Adam([{"params": [xyz], "name": "xyz"}, {"params": [scaling], "name": "scaling"}])
    (xyz.sum() + scaling.sum()).backward()
    optimizer.step()
    return (3, xyz, nn.Parameter(numbers(5, 1, 3)), scaling, numbers(5), optimizer.state_dict(), 4.5), 30_000


SHARED = torch.arange(6.0)
SHAPES: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: numbers(3, 2),
    "a parameter": lambda: nn.Parameter(numbers(3, 2)),
    "a list": lambda: [numbers(2), numbers(3).half()],
    "a tuple": lambda: (1, (numbers(2), {3: numbers(4)}), "text"),
    "integer keys": lambda: {0: numbers(2), 1: {2: numbers(1)}},
    "other keys": lambda: {2.5: numbers(1), None: numbers(2), (1, "k"): numbers(3), b"z": numbers(4)},
    "several sections": lambda: {"generator": module().state_dict(), "discriminator": {"c.weight": numbers(2, 2)}},
    "one key twice": lambda: {"a": {"a": numbers(1)}, "b": [numbers(2)]},
    "nested dicts": lambda: {"nets": {"g": {"conv": {"weight": numbers(2, 2)}}}, "deep": [[[[[[numbers(1)]]]]]]},
    "training": trained,
    "gaussians": gaussians,
    "a module": module,
    "a module in a dict": lambda: {"model": module(), "ema": None, "epoch": 3},
    "a textual inversion": lambda: {"<token>": numbers(2, 768)},
    "web ui": lambda: {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": nn.ParameterDict({"*": numbers(2, 768)}),
        "name": "x",
        "step": 3,
    },
    "an object": lambda: argparse.Namespace(lr=1, w=numbers(2), inner=argparse.Namespace(w=numbers(1))),
    "storages": lambda: [numbers(4).untyped_storage(), torch.arange(3).storage()],
    "views": lambda: {"x": [SHARED, SHARED[2:4]], "y": (SHARED, SHARED.view(2, 3).t()), "z": SHARED.expand(2, 6)},
    "arrays": lambda: {
        "a": np.arange(6, dtype=">f8").reshape(2, 3),
        "b": np.asfortranarray(np.arange(6, dtype="i4").reshape(2, 3)),
        "c": [np.array([True, False]), numbers(1)],
    },
    "long names": lambda: {"k" * 3000: [numbers(1)], "x": {"y" * 500: {"z" * 700: {"weight": numbers(1)}}}},
    "one dict twice": lambda: (lambda state: {"model": state, "best": state, "list": [state]})({"w": numbers(2, 2)}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch about its own storages
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_bits_are_those_torch_has(shape: str, ending: str, save: Save, same_bits: SameBits) -> None:
    source = save(SHAPES[shape]())
    expected = dict(paths(torch.load(source, weights_only=False)))
    report = ckptkit.convert(source, source.with_name(f"out{ending}"), all_tensors=True)
    assert "all-tensors" in {finding.code for finding in report.findings}
    written = ckptkit.load_state_dict(source.with_name(f"out{ending}"), map_location="cpu")
    assert sorted(written) == sorted(expected)
    assert [name for name in expected if not same_bits(written[name], expected[name])] == []
    if ending == ".pth":
        loaded = torch.load(source.with_name("out.pth"), weights_only=True)
        assert type(loaded) is dict
        assert {type(tensor) for tensor in loaded.values()} == {torch.Tensor}
        assert not any(tensor.requires_grad for tensor in loaded.values())


def test_ties_stay_ties(save: Save) -> None:
    tensor = numbers(4)
    source = save({"a": [tensor, tensor], "b": (tensor[:2],), "c": {"x": tensor}})
    ckptkit.convert(source, out := source.with_name("out.pth"), all_tensors=True)
    loaded = torch.load(out, weights_only=True)
    assert len({each.untyped_storage().data_ptr() for each in loaded.values()}) == 1
    ckptkit.convert(source, out := source.with_name("out.safetensors"), all_tensors=True)
    with ckptkit.open(out) as file:
        entries = file.state_dict
        assert list(entries) == ["c.x", "a.0", "a.1", "b.0"]  # the state_dict first
        assert entries["a.0"].view == entries["a.1"].view == entries["c.x"].view
        assert entries["a.0"].storage is not entries["b.0"].storage


@pytest.mark.parametrize(
    ("tree", "first", "second"),
    [
        ({"a.b": numbers(1), "a": {"b": numbers(2)}}, "['a.b']", "['a']['b']"),
        ({1: numbers(1), "1": numbers(2)}, "[1]", "['1']"),
        ({"a": {"b": {"w": numbers(1, 1)}}, "a.b": {"w": numbers(2, 2)}}, "['a']['b']['w']", "['a.b']['w']"),
    ],
)
def test_two_of_one_name_are_an_error_that_names_both(tree: Any, first: str, second: str, save: Save) -> None:
    source = save(tree)
    with pytest.raises(KeyCollisionError) as raised:
        ckptkit.convert(source, out := source.with_name("out.pth"), all_tensors=True)
    assert {raised.value.first, raised.value.second} == {first, second}
    assert not out.exists()


def test_options_go_by_the_names(save: Save) -> None:
    source = save(trained())
    report = ckptkit.convert(
        source,
        out := source.with_name("out.safetensors"),
        all_tensors=True,
        include=["model.*", "*.exp_avg"],
        exclude="*num_batches_tracked",
        strip_prefix="model",
        rename=r"^optimizer\.state\.=>moments.",
        dtype="float16",
        keep_dtype="moments.*",
    )
    with ckptkit.open(out) as file:
        names = {name: entry.dtype for name, entry in file.state_dict.items()}
    assert names.pop("moments.0.exp_avg") == "float32"
    assert {name: dtype for name, dtype in names.items() if not name.startswith("moments.")} == dict.fromkeys(
        ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"], "float16"
    )
    assert report.details["operations"][0] == "AllTensors()"


def test_in_python(save: Save, same_bits: SameBits) -> None:
    source = save({"w": [numbers(2)], "a": np.arange(3.0), "model": module()})
    with ckptkit.open(source) as file:
        everything = file.rewrite(ckptkit.AllTensors(), ckptkit.StripPrefix("model"))
        loaded = everything.load()
        everything.save(out := source.with_name("out.safetensors"))
    written = ckptkit.load_state_dict(out)
    assert {"w.0", "a", "0.weight", "codebook"} < loaded.keys()
    assert loaded.keys() == written.keys()
    assert all(same_bits(loaded[name], written[name]) for name in loaded)


def test_shards_and_devices(save: Save) -> None:
    source = save({"a": [numbers(64, 64) for _ in range(4)]})
    report = ckptkit.convert(
        source, source.with_name("out.safetensors"), all_tensors=True, max_shard_size="40KB", map_location="cuda:1"
    )
    with ckptkit.open(report.details["destination"]) as file:
        assert list(file.state_dict) == ["a.0", "a.1", "a.2", "a.3"]
        assert len(report.details["plan"]["shards"]) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch about its own quantized tensors
def test_values_that_are_no_plain_tensors_are_named(save: Save) -> None:
    source = save(
        [numbers(2), {"q": torch.quantize_per_tensor(numbers(2), 0.1, 3, torch.qint8)}, torch.eye(2).to_sparse()]
    )
    with pytest.raises(RewriteError, match=r"1\.q \(quantized \[2\] qint8.*2 \(sparse COO.*--exclude 1\.q --exclude 2"):
        ckptkit.convert(source, source.with_name("out.safetensors"), all_tensors=True)
    ckptkit.convert(source, out := source.with_name("out.pth"), all_tensors=True)
    loaded = torch.load(out, weights_only=False)
    assert sorted(loaded) == ["0", "1.q", "2"]
    assert loaded["1.q"].q_zero_point() == 3
    report = ckptkit.convert(source, out := source.with_name("dense.safetensors"), all_tensors=True, densify=True)
    assert report.details["operations"] == ["AllTensors()", "Densify(dtype=None)"]
    with ckptkit.open(out) as file:
        assert {name: entry.dtype for name, entry in file.state_dict.items()} == dict.fromkeys(
            ["1.q", "0", "2"], "float32"
        )
    ckptkit.convert(source, out := source.with_name("out.safetensors"), all_tensors=True, exclude=["1.q", "2"])
    with ckptkit.open(out) as file:
        assert list(file.state_dict) == ["0"]


def test_what_is_not_a_tensor_is_named(save: Save) -> None:
    source = save({"w": [numbers(1)], "epoch": 3, "names": np.array(["a", None], dtype=object), "args": {"lr": 0.1}})
    report = ckptkit.convert(source, out := source.with_name("out.safetensors"), all_tensors=True)
    (found,) = [finding for finding in report.findings if finding.code == "all-tensors"]
    assert found.message.startswith("1 tensor named by the keys")
    assert all(name in found.message for name in ("epoch", "names", "args"))
    with ckptkit.open(out) as file:
        assert list(file.state_dict) == ["w.0"]
    with pytest.raises(RewriteError, match="contains no tensors"):
        ckptkit.convert(save({"epoch": 3}), out, all_tensors=True, force=True)


def test_keys_without_names_go_by_their_place(save: Save) -> None:
    weight, bias = nn.Parameter(numbers(2)), nn.Parameter(numbers(1))
    source = save({"state": {weight: {"exp_avg": numbers(2)}, bias: {"exp_avg": numbers(1)}}, "w": weight})
    ckptkit.convert(source, out := source.with_name("out.pth"), all_tensors=True)
    names = ["state.?0", "state.?0.exp_avg", "state.?1", "state.?1.exp_avg", "w"]
    assert sorted(torch.load(out, weights_only=True)) == names


def test_lists_in_lists_end_in_an_error(save: Save) -> None:
    deep: Any = [numbers(1)]
    for _ in range(400):
        deep = [deep]
    source = save([deep] * 2)
    ckptkit.convert(source, out := source.with_name("out.pth"), all_tensors=True)
    assert list(torch.load(out, weights_only=True)) == [".".join(["0"] * 402)]


@pytest.mark.parametrize("purpose", ["convert", "load"])
def test_files_without_a_state_dict_are_told_of_it(purpose: str, save: Save, convert: Any) -> None:
    source = save([numbers(2), numbers(3)])
    with pytest.raises(SectionError) as raised:
        if purpose == "load":
            ckptkit.load_state_dict(source)
        else:
            ckptkit.convert(source, source.with_name("out.safetensors"))
    command = shlex.split(str(raised.value).partition("; ckptkit ")[2].partition(" takes all")[0])
    assert command[-1] == "--all-tensors"
    assert convert(*command[1:]).code == 0
    assert list(ckptkit.load_state_dict(command[2])) == ["0", "1"]


def test_where_several_compete_it_is_offered_beside_section(save: Save) -> None:
    source = save({"g": {"w": numbers(2, 2)}, "d": {"w": numbers(3, 3)}})
    with pytest.raises(SectionError, match=r"--section, or ckptkit convert .* --all-tensors takes all"):
        ckptkit.convert(source, source.with_name("out.safetensors"))


def test_it_goes_with_no_section(save: Save) -> None:
    source = save(trained())
    with pytest.raises(RewriteError, match="takes every section"):
        ckptkit.convert(source, source.with_name("out.pth"), all_tensors=True, section="model")


def test_named_tuples_and_ordered_dicts(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = collections.namedtuple("pair", "first second")
    monkeypatch.setattr("builtins.pair", pair, raising=False)
    pair.__module__ = "builtins"
    source = save({"p": pair(numbers(1), numbers(2)), "o": collections.OrderedDict(x=numbers(3))})
    ckptkit.convert(source, out := source.with_name("out.pth"), all_tensors=True)
    assert sorted(torch.load(out, weights_only=True)) == ["o.x", "p.0", "p.1"]


@pytest.mark.skipif(CORPUS is None, reason="CKPTKIT_CORPUS does not name the folder of other people's checkpoints")
def test_other_peoples_files(tmp_path: Path, same_bits: SameBits) -> None:
    compared = 0
    for source in sorted(Path(str(CORPUS)).rglob("*")):
        try:
            expected = dict(paths(torch.load(source, map_location="cpu", weights_only=False)))
            ckptkit.convert(source, out := tmp_path / "out.pth", all_tensors=True, force=True)
        except Exception:  # noqa: S112 - torch cannot load it here, or it holds no tensor
            continue
        written = torch.load(out, weights_only=False, map_location="cpu")
        for name in expected.keys() & written.keys():
            assert same_bits(written[name], expected[name]), f"{source.name}: {name}"
            compared += 1
        assert sorted(written) == sorted(expected), source.name
    assert compared > 300
