"""What a look into a far file costs: how many requests, and how many bytes."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from support.far import FarStore, serving
from support.range_server import range_server
from torch import nn

import ckptkit
from ckptkit.errors import CkptkitError

URL = "far://bucket/"
KIB = 1 << 10

every_server = pytest.mark.parametrize("heads", [True, False], ids=["with heads", "without heads"])
"""Where no first bytes come with a file's size that takes a request more."""


def weights(count: int, numel: int = 1000) -> dict[str, torch.Tensor]:
    return {f"model.layers.{number}.self_attn.q_proj.weight": torch.rand(numel) for number in range(count)}


def saved(state: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def look(name: str, data: bytes, tmp_path: Path, *, heads: bool) -> FarStore:
    """What was asked for, once the far file was inspected as the local one is."""
    (tmp_path / name).write_bytes(data)
    with serving({URL + name: data}, heads=heads) as store:
        far = json.dumps(ckptkit.inspect(URL + name))
    assert far.replace(URL, "") == json.dumps(ckptkit.inspect(tmp_path / name)).replace(f"{tmp_path}/", "")
    return store


@pytest.mark.parametrize(("count", "numel", "trips", "most"), [(300, 40_000, 2, 256), (5000, 1000, 3, 1536)])
def test_torch_zip(count: int, numel: int, trips: int, most: int, tmp_path: Path) -> None:
    data = saved(weights(count, numel))
    for heads in (True, False):
        store = look("model.pth", data, tmp_path, heads=heads)
        assert len(store.asked) == trips + (not heads), heads
        assert store.nbytes <= most * KIB, heads


def test_torch_zip_as_ckptkit_writes_and_zip_packs_it(tmp_path: Path) -> None:
    torch.save(weights(300, 10_000), tmp_path / "source.pth")
    ckptkit.convert(tmp_path / "source.pth", tmp_path / "ours.pth")
    packed = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "source.pth") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    for data, heads in product(((tmp_path / "ours.pth").read_bytes(), packed.getvalue()), (True, False)):
        store = look("model.pth", data, tmp_path, heads=heads)
        assert len(store.asked) == 2 + (not heads), heads
        assert store.nbytes <= 256 * KIB, heads


@every_server
@pytest.mark.parametrize(("count", "trips"), [(300, 1), (4000, 2)])
def test_safetensors(count: int, trips: int, heads: bool, tmp_path: Path) -> None:
    data = safetensors_bytes(weights(count))
    store = look("model.safetensors", data, tmp_path, heads=heads)
    assert len(store.asked) == (trips if heads else trips + 1)
    assert heads is False or store.nbytes <= 96 * KIB or store.nbytes == 8 + int.from_bytes(data[:8], "little")


@every_server
def test_shards_are_looked_at_side_by_side(heads: bool, tmp_path: Path) -> None:
    count, state = 163, weights(3 * 163)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    weight_map = {key: names[at // 3] for at, key in enumerate(state)}
    files = {
        name: safetensors_bytes({key: value for key, value in state.items() if weight_map[key] == name})
        for name in names
    }
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    urls = {URL + name: data for name, data in {**files, "model.safetensors.index.json": index}.items()}
    for name, data in {**files, "model.safetensors.index.json": index}.items():
        (tmp_path / name).write_bytes(data)
    with serving(urls, heads=heads) as store:
        far = ckptkit.inspect(URL + "model.safetensors.index.json")
        assert len(store.asked) <= (count + 1) * (1 if heads else 2)
        assert far["tensors"] == ckptkit.inspect(tmp_path / "model.safetensors.index.json")["tensors"]
        del store.files[URL + names[7]], store.files[URL + names[9]]
        with pytest.raises(CkptkitError, match=rf"2 shards missing: {names[7]}, {names[9]}; put them"):
            ckptkit.inspect(URL + "model.safetensors.index.json")


def test_shards_of_torch(tmp_path: Path) -> None:
    state = weights(40, 30_000)
    names = [f"pytorch_model-{number:05}-of-00020.bin" for number in range(1, 21)]
    weight_map = {key: names[at // 2] for at, key in enumerate(state)}
    files = {URL + name: saved({key: state[key].clone() for key in state if weight_map[key] == name}) for name in names}
    index = URL + "pytorch_model.bin.index.json"
    with serving({**files, index: json.dumps({"weight_map": weight_map}).encode()}) as store:
        assert len(ckptkit.inspect(index)["tensors"]) == 40
        assert len(store.asked) <= 1 + 2 * 20


def test_torchscript_and_exported_programs(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(60, 60) for _ in range(60)))
    with pytest.warns((FutureWarning, DeprecationWarning)):
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(model), buffer)
    for heads in (True, False):
        store = look("model.pt", buffer.getvalue(), tmp_path, heads=heads)
        assert len(store.asked) <= 4 + (not heads), heads
        assert store.nbytes <= 256 * KIB, heads
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.ones(1, 60),)), buffer)
    for heads in (True, False):
        store = look("model.pt2", buffer.getvalue(), tmp_path, heads=heads)
        assert len(store.asked) <= 6 + (not heads), heads


@every_server
def test_what_is_read_from_its_beginning(heads: bool, tmp_path: Path) -> None:
    state = weights(100, 10_000)
    legacy = look("legacy.pth", saved(state, _use_new_zipfile_serialization=False), tmp_path, heads=heads)
    assert len(legacy.asked) == 2 + (not heads)
    assert legacy.nbytes <= (1 << 20) + 96 * KIB
    plain = pickle.dumps({name: value.numpy() for name, value in state.items()}, protocol=4)
    assert len(look("arrays.pkl", plain, tmp_path, heads=heads).asked) <= 3 + (not heads)
    packed = gzip.compress(saved(state), 1)
    store = look("model.pth.gz", packed, tmp_path, heads=heads)
    assert store.nbytes == len(packed)
    assert len(store.asked) <= 9 + (not heads)


def test_a_member_of_a_far_archive(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes/readme.txt", "x" * 300_000)
        archive.writestr("models/a.pth", saved(weights(50, 20_000)))
        archive.writestr("models/b.safetensors", safetensors_bytes(weights(50)))
    with serving({URL + "v1.0/all.zip": buffer.getvalue()}) as store:
        for separator in "!/":
            for name, most in (("models/a.pth", 8), ("models/b.safetensors", 6)):
                store.asked.clear()
                path = f"{URL}v1.0/all.zip{separator}{name}"
                document = ckptkit.inspect(path)
                assert (document["path"], len(document["tensors"])) == (path, 50)
                assert len(store.asked) <= most
        with ckptkit.open(URL + "v1.0/all.zip!models/a.pth") as file:
            assert len(file.load()) == 50
        with pytest.raises(
            CkptkitError,
            match=r"all\.zip: it has no member 'models/c\.pth'; it contains "
            r"'models/a\.pth'",
        ):
            ckptkit.inspect(URL + "v1.0/all.zip!models/c.pth")
        with pytest.raises(CkptkitError, match=rf"give one of them: {URL}v1.0/all.zip!models/a.pth, "):
            ckptkit.inspect(URL + "v1.0/all.zip")
        store.asked.clear()
        with pytest.raises(CkptkitError, match=r"^far://bucket/v1\.0/none/model\.pth: no such file"):
            ckptkit.inspect(URL + "v1.0/none/model.pth")
        assert len(store.asked) <= 3


def test_over_http(tmp_path: Path) -> None:
    torch.save(weights(300, 10_000), tmp_path / "model.pth")
    with range_server(tmp_path) as server:
        assert len(ckptkit.inspect(f"{server.url}/model.pth")["tensors"]) == 300
        assert len(server.asked) <= 3
        assert server.nbytes <= 256 * KIB


def test_one_value_takes_its_own_header_and_no_other(tmp_path: Path) -> None:
    state = weights(300, 40_000)
    with serving({URL + "model.pth": saved(state)}) as store, ckptkit.open(URL + "model.pth") as file:
        store.asked.clear()
        for name in list(state)[150:153]:
            assert torch.equal(file.state_dict[name].torch(), state[name])
        assert len(store.asked) <= 9
        assert store.nbytes <= 3 * (160_000 + 64 * KIB)


def _overlapping() -> dict[str, torch.Tensor]:
    base = torch.arange(300_000, dtype=torch.float32)
    return {"a": base[200_000:], "b": base[:250_000].view(50, 5000).t(), "c": base[10:150_000], "d": base}


def _apart() -> dict[str, torch.Tensor]:
    """Small tensors around where the first bytes of a file end, and again behind a larger one."""
    return {**weights(200, 100), "middle": torch.rand(50_000), **{f"behind.{i}": torch.rand(100) for i in range(200)}}


@pytest.mark.parametrize("options", [{}, {"no_nan": True}], ids=["checksums", "values"])
@pytest.mark.parametrize(
    "data",
    [
        saved(_overlapping(), _use_new_zipfile_serialization=False),
        saved(_overlapping()),
        saved(_apart()),
        saved(_apart(), _use_new_zipfile_serialization=False),
        saved(nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(6)))),
    ],
    ids=["overlapping legacy", "overlapping", "apart", "apart legacy", "model"],
)
def test_what_is_read_through_is_read_once(data: bytes, options: dict[str, bool]) -> None:
    with serving({URL + "model.pth": data}) as store:
        assert ckptkit.check([URL + "model.pth"], max_trust="needs_trust", **options).ok
        assert store.nbytes <= len(data) + 100
        store.asked.clear()
        ckptkit.manifest([URL + "model.pth"])
        assert store.nbytes <= len(data) + 100
