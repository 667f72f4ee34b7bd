"""What a container cannot hold: all of it is said at once, with the options that leave it out, and those work."""

from __future__ import annotations

import os
import re
import shlex
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptkit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch about its own quantized and sparse tensors

COMPLEX = torch.zeros(2, dtype=torch.complex128)


def odd() -> OrderedDict[str, Any]:
    """A state_dict with one of everything that safetensors does not have."""
    torch.manual_seed(6)
    return OrderedDict({
        "plain.weight": torch.randn(3, 3),
        "plain.half": torch.randn(3).half(),
        "plain.complex64": torch.randn(2, dtype=torch.complex64),
        "wide": torch.randn(2, dtype=torch.complex128),
        "fft.basis[0]": torch.randn(2, dtype=torch.complex128),
        "quantized": torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "layer._extra_state": {"scale": 2.0, "amax": torch.ones(2)},
        "it's \"quoted\"": complex(1, 2),
    })  # fmt: skip


@pytest.fixture
def source(save) -> Path:
    return save({"epoch": 3, "model": odd(), "optimizer": {"state": {}, "param_groups": []}, "note": "text"})


def remedies(line: str) -> list[str]:
    """The options that a message names, as a shell reads them."""
    return [
        part
        for found in re.findall(r"(--exclude (?:'(?:[^']|'\"'\"')*'|[^' ,;:)]+)+)", line)
        for part in shlex.split(found)
    ]


def test_everything_is_listed_at_once(source: Path, refused) -> None:
    line = refused(source, "out.safetensors")
    assert "what is beside the weights (epoch, optimizer, note): --weights-only leaves it out, --leave-out KEY" in line
    for name in odd():
        assert (name in line) != name.startswith("plain."), name
    for kind in (
        "wide (complex128)",
        "csr (sparse CSR [3, 3] float32, 3 values stored)",
        "layer._extra_state (<dict of 2>)",
    ):
        assert kind in line
    assert line.endswith("or write a .pth, which stores everything")


def test_exactly_those_options_work(source: Path, refused, converted, agree) -> None:
    line = refused(source, "out.safetensors")
    options = remedies(line)
    assert len(options) == 2 * 7
    written = converted(source, "out.safetensors", "--weights-only", *options)
    agree(written, {name: tensor for name, tensor in odd().items() if name.startswith("plain.")}, ordered=False)


def test_as_does_a_pth(source: Path, convert) -> None:
    assert convert(source, "out.pth").code == 0
    before, after = (torch.load(path, weights_only=False) for path in (source, "out.pth"))
    assert list(after) == list(before)
    assert list(after["model"]) == list(before["model"])
    quantized = [state["model"]["quantized"] for state in (before, after)]
    assert torch.equal(*(tensor.int_repr() for tensor in quantized))
    assert quantized[0].q_scale() == quantized[1].q_scale()
    for name in ("sparse", "csr"):
        assert torch.equal(before["model"][name].to_dense(), after["model"][name].to_dense())
    assert after["model"]["layer._extra_state"]["scale"] == 2.0
    assert after["model"]['it\'s "quoted"'] == complex(1, 2)


def test_only_dtypes_are_another_error(save, tmp_path: Path) -> None:
    path = save({"a": torch.ones(1), "z": COMPLEX})
    with pytest.raises(ckptkit.DTypeError, match=r"these dtypes \(z \(complex128\)\): --exclude z leaves them out"):
        ckptkit.convert(path, tmp_path / "out.safetensors")
    with pytest.raises(ckptkit.RewriteError, match="beside the weights"):
        ckptkit.convert(save({"model": {"z": COMPLEX}, "epoch": 1}, "b.pth"), tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["b.pth", "model.pth"]


def test_many_of_one_kind_take_one_option(save, refused, converted, agree) -> None:
    state: dict[str, Any] = {f"layers.{i}.{n}": torch.ones(2) for i in range(40) for n in ("weight", "bias")}
    plain = dict(state)
    state |= {f"layers.{i}._extra_state": None for i in range(40)}
    path = save(state)
    line = refused(path, "out.safetensors")
    assert remedies(line) == ["--exclude", "*_extra_state"]
    assert "layers.7._extra_state (None) and 32 more" in line
    agree(converted(path, "out.safetensors", *remedies(line)), plain, ordered=False)
    path = save(plain | {f"layers.{i}.bias": COMPLEX for i in range(0, 40, 2)}, "some.pth")
    line = refused(path, "some.safetensors")
    assert len(remedies(line)) == 2 * 20  # no glob, since it would take the other biases too
    kept = {name: tensor for name, tensor in plain.items() if not re.fullmatch(r"layers\.\d*[02468]\.bias", name)}
    agree(converted(path, "some.safetensors", *remedies(line)), kept, ordered=False)


def test_what_could_be_kept_as_text_is_named(save, refused) -> None:
    weights = {"w.weight": torch.ones(2)}
    line = refused(save({"model": weights, "dims": {"n": 4}, "sr": "40k"}), "out.safetensors")
    assert (
        "(dims, sr): --weights-only leaves it out, --leave-out KEY leaves out one part, --keep-beside keeps it as "
        "text; or" in line
    )
    line = refused(save({"model": weights, "epoch": 3, "stride": torch.ones(3)}, "some.pth"), "out.safetensors")
    assert "leaves out one part, --keep-beside keeps epoch as text; or" in line
    line = refused(save({"model": weights, "stride": torch.ones(3)}, "none.pth"), "out.safetensors")
    assert "--keep-beside" not in line


def test_names_are_given_as_they_will_be(save, refused, converted) -> None:
    path = save({"module.w": torch.ones(1), "module.z": COMPLEX})
    line = refused(path, "out.safetensors", "--strip-module")
    assert remedies(line) == ["--exclude", "z"]
    assert list(converted(path, "out.safetensors", "--strip-module", *remedies(line))) == ["w"]


def test_shards_of_safetensors(source: Path, refused, convert) -> None:
    line = refused(source, "out.safetensors", "--max-shard-size", "100")
    assert "safetensors cannot store what is beside the weights" in line
    options = ["--weights-only", *remedies(line), "--max-shard-size", "100"]
    assert convert(source, "out.safetensors", *options).code == 0
    shards = [name for name in os.listdir() if re.fullmatch(r"out-\d+-of-\d+\.safetensors", name)]
    assert {name for shard in shards for name in load_file(shard)} == {n for n in odd() if n.startswith("plain.")}


def test_shards_of_torch_hold_any_value(source: Path, refused, convert) -> None:
    line = refused(source, "out.bin", "--max-shard-size", "2000")
    assert "a sharded checkpoint cannot store what is beside the weights (epoch, optimizer, note)" in line
    assert remedies(line) == []
    assert convert(source, "out.bin", "--max-shard-size", "2000", "--weights-only").code == 0
    assert convert("out.bin.index.json", "back.pth").code == 0
    assert list(torch.load("back.pth", weights_only=False)) == list(odd())


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"epoch": 3}, "contains no state_dict"),
        (torch.ones(3), "contains no state_dict"),
        ([torch.ones(3), torch.ones(4)], "contains no state_dict"),
        ({}, "contains no state_dict"),
        ({"__metadata__": torch.ones(1)}, "cannot be named '__metadata__'"),
        ({"\ud800": torch.ones(1)}, "not valid Unicode"),
    ],
)
def test_what_is_no_state_dict_of_safetensors(save, refused, saved: Any, words: str) -> None:
    assert words in refused(save(saved), "out.safetensors")


def test_a_cast_of_complex_does_not_help(save, refused) -> None:
    """complex128 is no floating dtype: a cast leaves it, and the error stays."""
    assert "z (complex128)" in refused(save({"z": COMPLEX}), "out.safetensors", "--dtype", "float32")
