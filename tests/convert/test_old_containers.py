"""Containers of other times become modern files: what their own loaders give is what comes out."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.package import PackageExporter

import ckptkit

FIXTURES = Path(__file__).parents[2] / "fixtures"
OUTPUTS = ["out.pth", "out.safetensors", "out.bin"]
State = dict[str, torch.Tensor]


def tar(folder: Path) -> Path:
    """As torch 0.1 wrote it (``torch/serialization.py`` ``legacy_load``): a state_dict of two views of a storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return str(value) if isinstance(value, int) else None

    def dumps(*values: object) -> bytes:
        return b"".join(pickle.dumps(value, 2) for value in values)

    tree = io.BytesIO()
    Pickler(tree, 2).dump(OrderedDict([("weight", 1), ("bias", 2), ("tied", 1)]))
    storages = dumps(1, (10, "cpu", torch.FloatStorage)) + struct.pack("<q300f", 300, *range(300)) + dumps([])
    tensors = dumps(2, (1, 10, torch.FloatTensor)) + struct.pack("<iiqqqqq", 2, 0, 100, 3, 1, 100, 0)
    tensors += dumps((2, 10, torch.FloatTensor)) + struct.pack("<iiqqq", 1, 0, 4, 1, 150)
    facts = {"protocol_version": 1000, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    members = {"sys_info": dumps(facts), "pickle": tree.getvalue(), "tensors": tensors, "storages": storages}
    path = folder / "old.pth.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def package(folder: Path) -> Path:
    torch.manual_seed(0)
    with warnings.catch_warnings(), PackageExporter(folder / "in.package") as exporter:
        warnings.simplefilter("ignore")
        exporter.extern("**")
        exporter.save_pickle("model", "model.pkl", nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20)))
    return folder / "in.package"


def by_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=False)


def scripted() -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: State = torch.jit.load(FIXTURES / "scripted.pt").state_dict()
    return state


def packaged() -> State:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20)).state_dict()


SOURCES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], State]]] = {
    "torch-legacy": (lambda folder: FIXTURES / "legacy.pth", lambda path: by_torch(path)["net"]),
    "torch-tar": (tar, by_torch),
    "torchscript": (lambda folder: FIXTURES / "scripted.pt", lambda path: scripted()),
    "torch-package": (package, lambda path: packaged()),
    "safetensors-sharded": (
        lambda folder: FIXTURES / "model.safetensors.index.json",
        lambda path: ckptkit.load_state_dict(path),
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("container", list(SOURCES))
def test_it_becomes_a_modern_file(container: str, name: str, tmp_path: Path, convert, converted, agree) -> None:
    make, load = SOURCES[container]
    path = make(tmp_path)
    expected = load(path)
    with ckptkit.open(path) as file:
        assert file.format == container
    if name != "out.bin":
        written = converted(path, name, "--weights-only", "--tied", "duplicate")
        agree(written, expected, ordered=name == "out.pth")
        return
    assert convert(path, name, "--weights-only", "--tied", "duplicate", "--max-shard-size", "900").code == 0
    weight_map = json.loads(Path("out.bin.index.json").read_text())["weight_map"]
    written = {key: tensor for shard in set(weight_map.values()) for key, tensor in torch.load(shard).items()}
    assert len(set(weight_map.values())) > 1
    agree(written, expected, ordered=False)


@pytest.mark.filterwarnings("error")
def test_a_legacy_training_checkpoint_keeps_all(convert, agree) -> None:
    source = by_torch(FIXTURES / "legacy.pth")
    assert convert(FIXTURES / "legacy.pth", "out.pth").code == 0
    written = torch.load("out.pth", weights_only=True)
    assert list(written) == ["net", "optimizer", "epoch"]
    agree(written["net"], source["net"])
    gates = [written["net"][name].untyped_storage().data_ptr() for name in ("input_gate", "output_gate")]
    assert gates[0] == gates[1]
    lstm = nn.LSTM(4, 3)
    torch.optim.Adam(lstm.parameters()).load_state_dict(written["optimizer"])
    for key, moments in source["optimizer"]["state"].items():
        agree(written["optimizer"]["state"][key], moments)
    with ckptkit.open("out.pth") as file:  # now there are checksums
        assert None not in {entry.storage.crc32 for entry in file.state_dict.values()}


def test_ties_and_transposes_of_a_tar(tmp_path: Path, converted) -> None:
    written = converted(tar(tmp_path), "out.pth")
    assert written["weight"].stride() == (1, 100)
    assert written["tied"].data_ptr() == written["weight"].data_ptr()
    assert written["bias"].tolist() == [150.0, 151.0, 152.0, 153.0]
    assert sorted(converted(tmp_path / "old.pth.tar", "out.safetensors")) == ["bias", "weight"]


def test_a_whole_model_becomes_its_state_dict(convert, converted, agree) -> None:
    expected = ckptkit.load_state_dict(FIXTURES / "whole_model.pth")
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        by_torch(FIXTURES / "whole_model.pth")  # its class is not here
    agree(converted(FIXTURES / "whole_model.pth", "out.pth"), expected)
    copied = converted(FIXTURES / "whole_model.pth", "out.safetensors", "--tied", "duplicate")
    agree(copied, expected, ordered=False)


def test_programs_say_what_stays_behind(tmp_path: Path, convert) -> None:
    done = convert(package(tmp_path), "out.pth", "--json")
    assert done.code == 0
    codes = {finding["code"] for finding in json.loads(done.out)["findings"]}
    assert codes <= {"left-out"}
    assert list(torch.load("out.pth")) == list(packaged())


def test_casts_and_names_of_old_containers(tmp_path: Path, converted, agree) -> None:
    expected = {f"x.{name}": tensor.half() for name, tensor in by_torch(tar(tmp_path)).items()}
    agree(converted(tmp_path / "old.pth.tar", "out.pth", "--dtype", "float16", "--add-prefix", "x"), expected)


def test_in_python(tmp_path: Path, agree) -> None:
    ckptkit.convert(FIXTURES / "scripted.pt", tmp_path / "out.pth")
    agree(torch.load(tmp_path / "out.pth"), scripted())


def test_a_program_without_weights_has_nothing_to_write(tmp_path: Path, refused) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.ReLU()).save(str(tmp_path / "relu.pt"))
    assert "can be written, and it contains no named tensors" in refused("relu.pt", "out.pth")
    assert "there is no state_dict to write" in refused("relu.pt", "out.safetensors")
    assert "there is no state_dict to keep" in refused("relu.pt", "out.pth", "--weights-only", "--dry-run")


def test_a_frozen_program_gives_its_constants(tmp_path: Path, converted) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.script(nn.Sequential(linear).eval())).save(str(tmp_path / "frozen.pt"))
    written = converted("frozen.pt", "out.safetensors")
    by_shape = {tuple(tensor.shape): tensor for tensor in written.values()}
    assert torch.equal(by_shape[5, 7], linear.weight)
    assert torch.equal(by_shape[5,], linear.bias)
