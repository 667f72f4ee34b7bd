"""Folders written for torch.distributed.checkpoint: what its own ``load`` makes of them, what failures leave."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import killed
from support.generated_tensors import STORABLE, resumes, state_dicts
from support.plans import bits, posix_only
from support.repeated import repeated

import ckptkit
from ckptkit.errors import (
    CorruptError,
    DestinationExistsError,
    DTypeError,
    FileAccessError,
    KeyCollisionError,
    MissingFileError,
    RewriteError,
)

format_utils = pytest.importorskip("torch.distributed.checkpoint.format_utils", reason="torch 2.3 reads them so")
dcp_to_torch_save = format_utils.dcp_to_torch_save

Save = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(ckptkit.__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_warnings_of_torch() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)  # torch: of one process, of complex32
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def loaded(folder: Path) -> dict[str, Any]:
    """All that torch finds in a folder, in its place."""
    state: dict[str, Any] = {}
    reader = dcp.FileSystemReader(folder)
    planner = format_utils._EmptyStateDictLoadPlanner()
    format_utils._load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    return state


def saved(state: dict[str, Any], folder: Path) -> Path:
    """The same as torch itself saves it."""
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def is_same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same, tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(is_same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def _copies(name: str) -> bool:
    """Whether this torch saves and loads a dtype, which it asks for its size, and copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # complex32 is "experimental"
        try:
            torch.zeros(16, dtype=torch.uint8).view(getattr(torch, name)).clone()
            torch._utils._element_size(getattr(torch, name))
        except (NotImplementedError, RuntimeError, TypeError):
            return False
    return True


LOADABLE = [name for name in STORABLE if _copies(name)]

EACH = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))


# What torch makes of it.


@repeated("examples", 10, 25)
def test_torch_loads_any_state_dict(tmp_path_factory: pytest.TempPathFactory, examples: int) -> None:
    @settings(EACH, max_examples=examples)
    @given(state=state_dicts(LOADABLE), ranks=st.integers(1, 5))
    def each(state: Any, ranks: int) -> None:
        folder = tmp_path_factory.mktemp("any")
        torch.save(state, folder / "state.pth")
        ckptkit.convert(folder / "state.pth", folder / "out", to="dcp", ranks=ranks)
        found = loaded(folder / "out")
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert is_same(found[name], tensor.detach()), name

    each()


@EACH
@given(tree=resumes(LOADABLE), ranks=st.integers(1, 3))
def test_a_training_state_comes_back_as_torch_itself_saves_it(
    tmp_path_factory: pytest.TempPathFactory, tree: Any, ranks: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    torch.save(tree, folder / "state.pth")
    try:
        theirs = saved(tree, folder / "theirs")
    except ValueError as error:
        assert "duplicated flatten key" in str(error)
        with pytest.raises(KeyCollisionError):
            ckptkit.convert(folder / "state.pth", folder / "ours", to="dcp", ranks=ranks)
        assert not (folder / "ours").exists()
        return
    ckptkit.convert(folder / "state.pth", folder / "ours", to="dcp", ranks=ranks)
    assert is_same(loaded(folder / "ours"), loaded(theirs))
    ours, real = metadata_of(folder / "ours"), metadata_of(theirs)
    assert ours.planner_data == real.planner_data
    assert list(ours.state_dict_metadata) == list(real.planner_data)
    for name, described in real.state_dict_metadata.items():
        mine = ours.state_dict_metadata[name]
        assert type(mine) is type(described)
        if isinstance(described, dcp.metadata.TensorStorageMetadata):
            assert (mine.size, mine.properties.dtype) == (described.size, described.properties.dtype)
            assert mine.properties.requires_grad == described.properties.requires_grad


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@EACH
@given(shapes=st.lists(SHAPES, min_size=1, max_size=4), ranks=st.integers(1, 9))
def test_rows_are_shared_out_as_torch_chunks_them(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], ranks: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    state = {str(number): torch.rand(shape) for number, shape in enumerate(shapes)}
    ckptkit.save(state, folder / "out", to="dcp", ranks=ranks)
    found = metadata_of(folder / "out")
    assert is_same(loaded(folder / "out"), state)
    for name, tensor in state.items():
        chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in found.state_dict_metadata[name].chunks]
        files = [info.relative_path for index, info in found.storage_data.items() if index.fqn == name]
        if not tensor.numel() or not tensor.shape or len(tensor) < ranks:
            assert chunks == [((0,) * tensor.dim(), tuple(tensor.shape))]
            assert len(files) == 1
            continue
        parts, first = torch.chunk(tensor, ranks), 0
        for part, (offsets, sizes) in zip(parts, chunks, strict=True):
            assert (offsets, sizes) == ((first, *(0,) * (tensor.dim() - 1)), tuple(part.shape))
            first += len(part)
        assert files == [f"__{rank}_0.distcp" for rank in range(len(parts))]
    sizes = [os.path.getsize(path) for path in (folder / "out").glob("*.distcp")]
    assert 0 not in sizes
    assert len(sizes) <= ranks


NESTED = {
    "model": OrderedDict({"a.weight": torch.rand(7, 3), "a.bias": torch.rand(7).bfloat16()}),
    "optimizer": {
        "state": {"a.weight": {"step": torch.tensor(3.0), "exp_avg": torch.rand(7, 3)}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": ["a.weight"]}],
    },
    "epoch": 3,
    "args": {"name": "é", "sizes": [1, 2], "none": None},
    "pair": (torch.ones(2), "x"),
    "history": [[1.5, 2.5], [torch.ones(1)]],
}


@pytest.mark.parametrize("ranks", [None, 1, 2, 4])
def test_a_training_state_is_loaded_into_its_like(save: Save, tmp_path: Path, ranks: int | None) -> None:
    report = ckptkit.convert(save(NESTED), tmp_path / "out", to="dcp", ranks=ranks)
    assert report.to_dict()["checked"] is True
    into = {
        "model": {"a.weight": torch.zeros(7, 3), "a.bias": torch.zeros(7).bfloat16()},
        "optimizer": {
            "state": {"a.weight": {"step": torch.tensor(0.0), "exp_avg": torch.zeros(7, 3)}},
            "param_groups": [{"lr": 0.0, "betas": None, "params": []}],
        },
        "epoch": 0,
        "args": {"name": "", "sizes": [], "none": 1},
        "pair": None,
        "history": [[], [torch.zeros(1)]],
    }
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    assert is_same(into, {**NESTED, "model": dict(NESTED["model"])})  # type: ignore[arg-type]
    dcp_to_torch_save(tmp_path / "out", tmp_path / "back.pth")
    assert is_same(torch.load(tmp_path / "back.pth"), into)


def test_many_names_long_ones_and_large_numbers(save: Save, tmp_path: Path) -> None:
    state = {f"layer.{number}": torch.full((1,), number) for number in range(1001)}
    state |= {"x" * 300: torch.rand(1, 2, 1, 2, 2), "wide": torch.zeros(70_000), "lone \ud800": torch.rand(2)}
    ckptkit.convert(save({"model": state, "n": list(range(1001))}), tmp_path / "out", to="dcp", ranks=2)
    assert is_same(loaded(tmp_path / "out"), {"model": state, "n": list(range(1001))})
    with ckptkit.open(tmp_path / "out") as ckpt:
        assert set(ckpt.state_dict) == set(state)


def test_files_of_gigabytes(tmp_path: Path) -> None:
    header = {
        name: {"dtype": "U8", "shape": [3 << 30], "data_offsets": [at * (3 << 30), (at + 1) * (3 << 30)]}
        for at, name in enumerate("ab")
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "m.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (6 << 30))  # of nothing on the disk
    with ckptkit.open(tmp_path / "m.safetensors") as ckpt:
        plan = ckpt.plan(tmp_path / "out", to="dcp", ranks=1)
        (step,) = plan.steps
        found = pickle.loads(step.data)  # type: ignore[union-attr]
        places = [(info.offset, info.length) for info in found.storage_data.values()]
        assert places[1][0] == places[0][1] > 3 << 30
        assert sum(places[1]) == plan.shards["__0_0.distcp"].nbytes
        assert found.state_dict_metadata["b"].chunks[0].sizes == torch.Size([3 << 30])


def test_a_safetensors_file_keeps_its_flat_names(tmp_path: Path) -> None:
    state = {"a.b.weight": torch.rand(5, 2), "a.b.bias": torch.rand(5).half(), "n": torch.arange(3)}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors", {"format": "pt", "by": "é"})
    ckptkit.convert(tmp_path / "m.safetensors", tmp_path / "out", to="dcp", ranks=2)
    assert metadata_of(tmp_path / "out").planner_data == {name: (name,) for name in state}
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    assert is_same(into, state)
    with ckptkit.open(tmp_path / "out") as ckpt:
        assert (ckpt.format, ckpt.kind, set(ckpt.state_dict)) == ("dcp", "state_dict", set(state))
        assert ckpt.metadata["by"] == "é"
        assert "ckptkit_receipts" in ckpt.metadata
    ckptkit.convert(tmp_path / "out", tmp_path / "back.pth")
    assert is_same(dict(torch.load(tmp_path / "back.pth", weights_only=True)), state)  # no opcode that it lacks
    ckptkit.convert(tmp_path / "out", tmp_path / "back.safetensors")
    assert is_same(safetensors.torch.load_file(tmp_path / "back.safetensors"), state)


@pytest.mark.parametrize("name", STORABLE)
def test_every_dtype(save: Save, tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    raw = torch.arange(48 * dtype.itemsize, dtype=torch.uint8)
    tensor = (raw & 1 if dtype is torch.bool else raw).view(dtype).reshape(6, 8)
    state = {"whole": tensor, "across": tensor.T, "rows": tensor[1:4], "none": tensor[:0], "one": tensor[0, 0]}
    ckptkit.convert(save(state), tmp_path / "out", to="dcp", ranks=3)
    assert is_same(loaded(tmp_path / "out"), state)


def test_dtypes_that_torch_lacks_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(DTypeError, match="torch has no dtype"):
        ckptkit.convert(tmp_path / "m.safetensors", tmp_path / "out", to="dcp")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_values_are_cast_renamed_and_left_out(save: Save, tmp_path: Path) -> None:
    state = {"module.a": torch.rand(4, 3), "module.b": torch.rand(4), "module.n": torch.arange(3)}
    path = save({"state_dict": state, "epoch": 3})
    ckptkit.convert(
        path, tmp_path / "out", to="dcp", ranks=2, weights_only=True, strip_module=True, dtype="bfloat16", exclude="*.b"
    )
    assert is_same(loaded(tmp_path / "out"), {"a": state["module.a"].bfloat16(), "n": state["module.n"]})


LOAD_ON_TWO = """
import sys, warnings, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

def rank_of(rank, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    wanted = torch.load(f"{folder}/state.pth")
    placed = {"rows": Shard(0), "columns": Shard(1), "few": Shard(0), "scalar": Replicate()}
    for ranks in (1, 3):
        into = {name: distribute_tensor(torch.zeros_like(wanted[name]), mesh, [at]) for name, at in placed.items()}
        into["epoch"] = None
        dcp.load(into, checkpoint_id=f"{folder}/out{ranks}")
        for name in placed:
            assert torch.equal(into[name].full_tensor(), wanted[name]), name
        assert into["epoch"] == 3
    dist.destroy_process_group()

mp.start_processes(rank_of, (sys.argv[1],), nprocs=2, start_method="fork")
print("equal")
"""


def test_two_processes_load_it_into_sharded_tensors(python: Run, save: Save, tmp_path: Path) -> None:
    state = {
        "rows": torch.rand(7, 4),
        "columns": torch.rand(5, 6),
        "few": torch.rand(1, 3),
        "scalar": torch.tensor(2.0),
    }
    path = save({**state, "epoch": 3}, "state.pth")
    for ranks in (1, 3):
        ckptkit.convert(path, tmp_path / f"out{ranks}", to="dcp", ranks=ranks)
    done = python("-c", LOAD_ON_TWO, tmp_path)
    assert done.stdout == "equal\n", done.stderr


def test_the_same_checkpoint_gives_the_same_bytes(save: Save, tmp_path: Path) -> None:
    path = save(NESTED)
    contents = []
    for name in ("one", "two"):
        ckptkit.convert(path, tmp_path / name, to="dcp", ranks=3)
        contents.append({each.name: each.read_bytes() for each in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    assert str(tmp_path).encode() not in contents[0][".metadata"]


def test_checksums_are_those_of_the_bytes(save: Save, tmp_path: Path) -> None:
    import io
    import zipfile

    ckptkit.convert(save(NESTED), tmp_path / "out", to="dcp", ranks=2)
    count = 0
    for info in metadata_of(tmp_path / "out").storage_data.values():
        data = (tmp_path / "out" / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None
            count += sum(each.filename.startswith("archive/data/") for each in archive.infolist())
    assert count == 2 * 2 + 1 + 2 + 1 + 1  # two parts of each of two, and so on; a tensor in a tuple


# What is told, and what is refused.


def test_what_torch_does_not_keep_is_told(save: Save, tmp_path: Path) -> None:
    tied = torch.rand(3, 3)
    weights = torch.nn.Linear(2, 2).state_dict()
    tree = {"model": weights, "x": {"a": tied, "b": tied}, "numbers": {0: 1, 1: 2}, "nothing": {}}
    report = ckptkit.convert(save(tree), tmp_path / "out", to="dcp", section="model")
    found = {finding.code: finding.message for finding in report.findings}
    assert "x.a = x.b" in found["untied"]
    lost = (
        "model (its attributes: _metadata)",
        "numbers (keys that are not text, such as 0",
        "nothing (an empty dict)",
    )
    for told in lost:
        assert told in found["flattened"]
    kept = {"model": dict(weights), "x": tree["x"], "numbers": {"0": 1, "1": 2}}
    assert is_same(loaded(tmp_path / "out"), kept)


def test_values_of_other_kinds_are_pickled(save: Save, tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    tree = {"w": torch.rand(2), "sparse": sparse, "set": {1, 2}}
    ckptkit.convert(save(tree), tmp_path / "out", to="dcp")
    into: dict[str, Any] = {"w": torch.zeros(2), "sparse": torch.zeros(3, 3).to_sparse(), "set": set()}
    dcp.load(into, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(into["sparse"].to_dense(), sparse.to_dense())
    assert into["set"] == {1, 2}


def test_holes_that_empty_dicts_leave(save: Save, tmp_path: Path) -> None:
    tree = {"w": torch.rand(2), "list": [{}, {"a": 1}, {}], "only": [[1, 2], [{}]], "none": [{}, {}]}
    ckptkit.convert(save(tree), tmp_path / "out", to="dcp")
    theirs = metadata_of(saved(tree, tmp_path / "theirs"))  # which torch saves, and does not load
    assert metadata_of(tmp_path / "out").planner_data == theirs.planner_data
    kept = {"w": tree["w"], "list": [None, {"a": 1}], "only": [[1, 2]]}
    assert is_same(ckptkit.load(tmp_path / "out"), kept)


def test_what_is_no_dict_is_refused(save: Save, tmp_path: Path) -> None:
    for tree in (torch.rand(2), [torch.rand(2)], {}):
        with pytest.raises(RewriteError):
            ckptkit.convert(save(tree), tmp_path / "out", to="dcp")
    report = ckptkit.convert(save([torch.ones(2)]), tmp_path / "all", to="dcp", all_tensors=True)
    assert report.ok
    assert is_same(loaded(tmp_path / "all"), {"0": torch.ones(2)})


def test_a_dict_that_holds_itself_is_refused(save: Save, tmp_path: Path) -> None:
    tree: dict[str, Any] = {"w": torch.rand(2), "a": {}}
    tree["a"]["again"] = tree["a"]
    with pytest.raises(RewriteError, match=r"a\.again: contains itself"):
        ckptkit.convert(save(tree), tmp_path / "out", to="dcp")
    deep: dict[str, Any] = {}
    deep["w"] = torch.rand(2)
    inner = deep
    for _ in range(150):
        inner["x"] = inner = {}
    inner["x"] = 1
    with pytest.raises(RewriteError, match="levels"):
        ckptkit.convert(save(deep), tmp_path / "out", to="dcp")


def test_a_whole_model_is_written_as_its_state_dict(save: Save, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ckptkit.convert(save(model), tmp_path / "out", to="dcp")
    assert is_same(loaded(tmp_path / "out"), dict(model.state_dict()))
    ckptkit.convert(save({"model": model, "epoch": 1}), tmp_path / "more", to="dcp")
    assert is_same(loaded(tmp_path / "more"), {"model": dict(model.state_dict()), "epoch": 1})


def test_options_that_do_not_go_with_it(run: Run, save: Save, tmp_path: Path) -> None:
    path = save({"w": torch.rand(4)})
    for options, told in [
        (["out.pth", "--ranks", "2"], "--ranks is only for --to dcp"),
        (["out", "--to", "dcp", "--ranks", "0"], "--ranks 0: expected a whole number from 1"),
        (["out", "--to", "dcp", "--max-shard-size", "1GB"], "--ranks N"),
    ]:
        done = run("convert", path, *options)
        assert done.returncode == 2
        assert told in done.stderr
    for ranks in (0, -1, True, 1.5, "2", 10**6):
        with pytest.raises(RewriteError, match="--ranks"):
            ckptkit.convert(path, tmp_path / "out", to="dcp", ranks=ranks)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == ["model.pth"]


def test_tensors_that_are_put_in_order_are_told_once(save: Save, tmp_path: Path) -> None:
    base = torch.rand(6, 4)
    tree = {"model": {"across": base.T, "other": torch.rand(6)[::2]}, "more": [base[:, 1:]]}
    report = ckptkit.convert(save(tree), tmp_path / "out", to="dcp", ranks=2, section="model", dtype="bfloat16")
    told = {finding.code: finding.message for finding in report.findings}["written-out"]
    assert told == "3 tensors were not contiguous and 1 tensor shared a storage; each has its own bytes in the output"
    assert report.to_dict()["gathered"] == ["model.across", "model.other", "more.0"]
    model = {"across": base.T.bfloat16(), "other": tree["model"]["other"].bfloat16()}  # type: ignore[call-overload]
    assert is_same(loaded(tmp_path / "out"), {"model": model, "more": [base[:, 1:].bfloat16()]})


def test_the_plan_is_shown(run: Run, save: Save, tmp_path: Path) -> None:
    path = save({"w": torch.rand(4, 1000), "n": torch.arange(3)})
    asked = ["convert", path, "out/", "--to", "dcp", "--ranks", "2", "--no-receipt", "--json"]
    done = run(*asked, "--dry-run")
    document = json.loads(done.stdout)
    plan = document["plan"]
    assert (document["written"], document["destination"], plan["format"], plan["tensors"]) == (False, "out/", "dcp", 2)
    assert [shard["name"] for shard in plan["shards"]] == ["__0_0.distcp", "__1_0.distcp"]
    assert plan["copies"]["nbytes"] == 4 * 4 * 1000 + 8 * 3
    assert os.listdir(tmp_path) == ["model.pth"]
    done = run(*asked)
    assert json.loads(done.stdout)["plan"] == plan
    total = sum(each.stat().st_size for each in (tmp_path / "out").iterdir())
    assert total == plan["nbytes"]


def test_every_way_to_ask_for_it(save: Save, tmp_path: Path) -> None:
    state = {"w": torch.rand(4, 3)}
    path = save(state)
    assert ckptkit.save(state, f"{tmp_path}/saved/", to="dcp", ranks=4).in_folder == ".metadata"
    with ckptkit.open(path) as ckpt:
        plan = ckpt.plan(tmp_path / "planned", to="dcp", ranks=2)
        assert len(plan.shards) == 2
        renamed = ckpt.rewrite(ckptkit.AddPrefix("x."))
        assert renamed.save(tmp_path / "from_file", to="dcp", ranks=2).shards.keys() == plan.shards.keys()
    assert is_same(loaded(tmp_path / "saved"), state)
    assert is_same(loaded(tmp_path / "from_file"), {"x.w": state["w"]})
    assert not (tmp_path / "planned").exists()


# The folder.


def test_folders_that_are_there(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"w": torch.rand(4)})
    (tmp_path / "empty").mkdir(mode=0o750)
    (tmp_path / "empty").chmod(0o2750)
    ckptkit.convert(path, f"{tmp_path}/empty/", to="dcp")
    assert (tmp_path / "empty").stat().st_mode & 0o7777 == 0o2750
    (tmp_path / "link").symlink_to("linked")
    (tmp_path / "linked").mkdir()
    ckptkit.convert(path, tmp_path / "link", to="dcp")
    assert (tmp_path / "link").is_symlink()
    ckptkit.convert(path, tmp_path / "new" / "below" / "out", to="dcp")
    for folder in ("empty", "linked", "new/below/out"):
        assert sorted(os.listdir(tmp_path / folder)) == [".metadata", "__0_0.distcp"]
    (tmp_path / "file").write_text("kept")
    for name in ("empty", "link", "file"):
        for force in (False, True):
            with pytest.raises(DestinationExistsError, match="--force does not replace folders"):
                ckptkit.convert(path, tmp_path / name, to="dcp", force=force)
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileAccessError, match="it is the working directory; name a new folder inside it"):
        ckptkit.convert(path, ".", to="dcp")
    with ckptkit.open(path) as ckpt, pytest.raises(MissingFileError, match="mkdir -p"):
        ckpt.save(tmp_path / "nowhere" / "out", to="dcp")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_each_checkpoint_of_a_folder_gets_one(save: Save, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    states = {name: {"w": torch.rand(4, 2)} for name in ("a", "b")}
    for name, state in states.items():
        save(state, f"runs/{name}.pth")
    report = ckptkit.convert(tmp_path / "runs", tmp_path / "out", to="dcp", ranks=2)
    assert report.ok
    for name, state in states.items():
        assert is_same(loaded(tmp_path / "out" / name), state)
    with pytest.raises(DestinationExistsError, match="not an empty folder"):
        ckptkit.convert(tmp_path / "runs", tmp_path / "out", to="dcp", force=True)
    with pytest.raises(RewriteError, match="--max-shard-size"):
        ckptkit.convert(tmp_path / "runs", tmp_path / "other", to="dcp", max_shard_size="1GB")
    assert not (tmp_path / "other").exists()


def test_a_damaged_source_leaves_nothing(save: Save, tmp_path: Path) -> None:
    path = save({"w": torch.arange(1000.0), "x": torch.arange(10)})
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(1000.0).numpy().tobytes())
    data[at + 100] ^= 1
    path.write_bytes(data)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "above/new"):
        with pytest.raises(CorruptError, match="CRC"):
            ckptkit.convert(path, tmp_path / name, to="dcp", ranks=2)
    assert sorted(os.listdir(tmp_path)) == ["empty", "model.pth"]
    assert os.listdir(tmp_path / "empty") == []


def test_a_full_disk_leaves_nothing(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = save({"w": torch.rand(4, 3)}), list[int]()

    def full(fd: int, offset: int, nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileAccessError, match="No space left on device"):
        ckptkit.convert(path, tmp_path / "out", to="dcp", ranks=2)
    assert os.listdir(tmp_path) == ["model.pth"]
    monkeypatch.setattr(os, "rename", full)
    seen.append(0)
    del seen[:2]
    with pytest.raises(FileAccessError):
        ckptkit.convert(path, tmp_path / "out", to="dcp", ranks=2)
    assert os.listdir(tmp_path) == ["model.pth"]


def test_an_output_that_differs_gets_no_name(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptkit.transfer import writing

    real = writing.fill_file

    def spoiled(plan: Any, fd: int, *given: Any, **more: Any) -> None:
        real(plan, fd, *given, **more)
        if plan.in_folder is None:
            at = os.pread(fd, 1 << 20, 0).index(torch.arange(1000.0).numpy().tobytes())
            os.pwrite(fd, b"\xff", at + 2000)

    monkeypatch.setattr(writing, "fill_file", spoiled)
    with pytest.raises(CorruptError, match="'w'"):
        ckptkit.convert(save({"w": torch.arange(1000.0)}), tmp_path / "out", to="dcp")
    assert os.listdir(tmp_path) == ["model.pth"]


def test_a_folder_that_appears_meanwhile_is_not_touched(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptkit.transfer import writing

    real = writing.require_unchanged

    def late(plan: Any) -> None:
        real(plan)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("kept")

    monkeypatch.setattr(writing, "require_unchanged", late)
    with pytest.raises(DestinationExistsError):
        ckptkit.convert(save({"w": torch.rand(4)}), tmp_path / "out", to="dcp")
    assert sorted(os.listdir(tmp_path)) == ["model.pth", "out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]


@pytest.fixture(scope="module")
def stopped() -> Iterator[Callable[..., dict[str, int]]]:
    """``stopped(arguments=[...], at=7, signal=9)``: to `support/killed.py`; returns its answer."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, killed.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pipe, answers = process.stdin, process.stdout

        def job(**what: Any) -> dict[str, int]:
            pipe.write(json.dumps({"links": True, **what}) + "\n")
            pipe.flush()
            return json.loads(answers.readline())

        yield job
        pipe.close()


def emptied(folder: Path) -> None:
    if folder.exists():
        for name in os.listdir(folder):
            (folder / name).unlink()
        folder.rmdir()


@posix_only
@repeated("every", 2, 1)
@pytest.mark.parametrize(("number", "there"), [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, False)])
def test_stopped_at_any_moment(
    stopped: Callable[..., dict[str, int]], save: Save, tmp_path: Path, number: signal.Signals, there: bool, every: int
) -> None:
    path = save({"w": torch.rand(100, 300), "n": torch.arange(3), "epoch": 3})
    into = tmp_path / "into"
    out = into / "out"
    into.mkdir()
    arguments = ["convert", "-q", str(path), str(out), "--to", "dcp", "--ranks", "2"]
    other = ["convert", "-q", str(path), str(into / "beside.pth"), "--no-check"]
    for at in range(0, 200, every):
        emptied(out)
        if there:
            out.mkdir()
        answer = stopped(arguments=arguments, at=at, signal=number)
        if (out / ".metadata").exists():
            assert sorted(os.listdir(out)) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
            assert loaded(out)["epoch"] == 3
        else:
            assert out.exists() == there
            assert not there or os.listdir(out) == []
        if answer["calls"] <= at:
            break
        assert answer["status"] == (-number if number == signal.SIGKILL else 128 + number)
        if number == signal.SIGKILL and at % 3 == 0:  # what it left, the next run into the folder removes
            assert stopped(arguments=other, at=-1, signal=0)["status"] == 0
            (into / "beside.pth").unlink()
            assert set(os.listdir(into)) <= {"out"}
        assert number == signal.SIGKILL or set(os.listdir(into)) <= {"out"}
    assert answer["status"] == 0
    assert at > 10
