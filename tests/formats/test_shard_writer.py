"""Sharded output: read back, and by torch, the safetensors library and a loader of whole shards."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Origin, StateDict, Storage, TensorEntry, contiguous_stride
from ckptkit.dtypes import DTYPES
from ckptkit.errors import RewriteError
from ckptkit.formats.format import Format
from ckptkit.formats.shard_writer import SafetensorsUnits, TorchUnits, index_name, plan_shards
from ckptkit.pickling.inert import InertDict
from ckptkit.plan import Plan
from ckptkit.transfer.steps import execute

State = dict[str, torch.Tensor]
Same = Callable[[torch.Tensor, torch.Tensor], bool]
Save = Callable[..., Path]

SAFETENSORS, TORCH_ZIP = formats.format_for("", "safetensors"), formats.format_for("", "torch-zip")
LEGACY = next(each for each in formats.FORMATS if each.name == "torch-legacy")
CONTAINERS = {"model.safetensors": SAFETENSORS, "pytorch_model.bin": TORCH_ZIP}
both = pytest.mark.parametrize("name", list(CONTAINERS))


@contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    checkpoint, file = formats.read(path)
    with closing(file):
        yield checkpoint


def write(plan: Plan, name: str, folder: Path) -> Path:
    """The files of a plan, by hand; the index, or the one file."""
    folder.mkdir(exist_ok=True)
    files = {**plan.shards, (index_name(name) if plan.shards else name): plan}
    for file, part in files.items():
        with open(folder / file, "w+b") as out:
            execute(replace(part, shards={}, index=None), out.fileno())
        assert os.path.getsize(folder / file) == part.nbytes
    return folder / (index_name(name) if plan.shards else name)


def sharded(source: Path, name: str, most: int, folder: Path) -> Path:
    with opened(source) as checkpoint:
        return write(plan_shards(checkpoint, CONTAINERS[name], name, most), name, folder)


def merged(index: Path) -> State:
    """As transformers loads shards: each whole, one after the other; and each name is where the index says."""
    weight_map = json.loads(index.read_text())["weight_map"]
    state: State = {}
    aliases: set[str] = set()
    for shard in sorted(set(weight_map.values())):
        part: State = {}
        if shard.endswith(".safetensors"):
            from safetensors.torch import load_file

            with safetensors.safe_open(index.parent / shard, "pt") as opened_shard:
                notes = opened_shard.metadata()
                assert notes["format"] == "pt"
            part = load_file(index.parent / shard)
            assert set(part) == {key for key, place in weight_map.items() if place == shard}, "and no other name"
            tied = {alias: part[kept] for alias, kept in notes.items() if kept in part}
            part.update(tied)
            aliases.update(tied)
        else:
            part = torch.load(index.parent / shard, weights_only=hasattr(torch.serialization, "add_safe_globals"))
            assert list(part) == [key for key in weight_map if key in part], "in the order of the whole"
        assert set(part) - aliases == {key for key, place in weight_map.items() if place == shard}
        state.update(part)
    assert state.keys() - aliases == weight_map.keys()
    return state


def check(index: Path, state: State, same_bits: Same) -> None:
    """The index's names in order, the values, and nothing to remark."""
    with ckptkit.open(index) as file:
        assert list(file.state_dict) == list(state)
        assert not {"shard-total-size", "shard-extra-keys"} & {finding.code for finding in file.findings}
        assert file.format == ("torch-sharded" if ".bin" in index.name else "safetensors-sharded")
    again, loaded = ckptkit.load_state_dict(index), merged(index)
    for name, value in state.items():
        assert same_bits(again[name], value), name
        assert same_bits(loaded[name], value), name


def model() -> State:
    torch.manual_seed(0)
    return {
        f"layers.{n}.weight": torch.randn(16, 16).to(dtype)
        for n, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.float16] * 3)
    }


# What comes out.


@both
def test_what_is_written_is_the_same_model(name: str, save: Save, tmp_path: Path, same_bits: Same) -> None:
    state = model()
    index = sharded(save(state), name, 8000, tmp_path / "out")
    stem, ending = name.rsplit(".", 1)
    shards = sorted(path.name for path in index.parent.iterdir() if path != index)
    assert shards == [f"{stem}-{n + 1:05d}-of-{len(shards):05d}.{ending}" for n in range(len(shards))]
    assert len(shards) > 2
    assert max(os.path.getsize(index.parent / shard) for shard in shards) <= 8000
    document = json.loads(index.read_text())
    assert document["metadata"] == {"total_size": sum(value.nbytes for value in state.values())}
    assert list(document["weight_map"]) == list(state)
    assert list(document["weight_map"].values()) == sorted(document["weight_map"].values()), "in order"
    check(index, state, same_bits)


@both
def test_one_file_where_that_is_enough(name: str, save: Save) -> None:
    with opened(save(model())) as checkpoint:
        whole = CONTAINERS[name].write(checkpoint)
        for most in (whole.nbytes, 5_000_000):
            assert plan_shards(checkpoint, CONTAINERS[name], name, most) == whole
        assert plan_shards(checkpoint, CONTAINERS[name], name, whole.nbytes - 1).shards
    with opened(save({"a": torch.zeros(1000), "epoch": 3})) as checkpoint:
        assert not plan_shards(checkpoint, TORCH_ZIP, "m.pth", 1 << 20).shards, "with all that is in it"
    with opened(save({"alone": torch.zeros(1000)})) as checkpoint:
        assert not plan_shards(checkpoint, CONTAINERS[name], name, 100).shards, "nothing to share out"


@both
def test_a_tensor_that_is_larger_has_a_file_of_its_own(name: str, save: Save, tmp_path: Path, same_bits: Same) -> None:
    state = {"a": torch.ones(8), "b": torch.ones(8), "big": torch.rand(9000), "c": torch.ones(8), "d": torch.ones(8)}
    index = sharded(save(state), name, 9000, tmp_path / "out")
    holder = json.loads(index.read_text())["weight_map"]
    assert [list(holder.values()).count(shard) for shard in dict.fromkeys(holder.values())] == [2, 1, 2]
    check(index, state, same_bits)


@both
def test_ties_lie_in_one_file(name: str, save: Save, tmp_path: Path, same_bits: Same) -> None:
    state = model()
    state["embed.weight"] = state["layers.3.weight"]
    state["zz.last"] = state["layers.0.weight"]
    state = {"head": state["zz.last"], **state}  # an alias first, one in the middle, and one at the end
    state["last"] = torch.ones(1)
    tied = {"embed.weight": "layers.3.weight", "layers.0.weight": "head", "zz.last": "head"}
    index = sharded(save(state), name, 9000, tmp_path / "out")
    check(index, state, same_bits)
    document = json.loads(index.read_text())
    if name == "model.safetensors":
        assert document["weight_map"].keys() == state.keys() - tied.keys()
        with ckptkit.open(index) as file:
            assert not file.metadata.keys() & {"ckptkit_tied_order", *tied}
    else:
        assert document["weight_map"]["zz.last"] == document["weight_map"]["layers.0.weight"]
    assert document["metadata"]["total_size"] == 4 + sum(value.nbytes for value in model().values()), "ties once"
    with opened(index) as checkpoint:
        views = {key: entry.view for key, entry in checkpoint.state_dict.items()}
        assert len(set(views.values())) == len(model()) + 1
        assert views["zz.last"] == views["layers.0.weight"]
        aliases = plan_shards(checkpoint, CONTAINERS[name], name, 9000).aliases
    assert aliases == (tied if name == "model.safetensors" else {})


@both
def test_views_of_one_storage(name: str, save: Save, tmp_path: Path, same_bits: Same) -> None:
    flat = torch.rand(3000)
    state = {"x": torch.rand(800), "q": flat[:1000], "y": torch.rand(800), "k": flat[1000:2000], "kt": flat[::2]}
    index = sharded(save(state), name, 6000, tmp_path / "out")
    check(index, state, same_bits)
    holder = json.loads(index.read_text())["weight_map"]
    with opened(index) as checkpoint:
        storages = {id(checkpoint.state_dict[key].storage) for key in ("q", "k", "kt")}
    together = len({holder[key] for key in ("q", "k", "kt")}) == 1 and len(storages) == 1
    assert together == (name == "pytorch_model.bin"), "only torch keeps one storage"


@both
def test_empty_tensors_and_names_of_all_kinds(name: str, save: Save, tmp_path: Path, same_bits: Same) -> None:
    odd = [
        "",
        ".",
        "é" * 50,
        "重み.重",
        '"\\\n',
        "\x00\x1f",
        "x" * 3000,
        "a/b",
        "🙂.weight",
        "total_size",
        "weight_map",
    ]
    state = {f"{text}{n}" if n else text: torch.zeros(n, 3) for n in range(3) for text in odd}
    index = sharded(save(state), name, 9000, tmp_path / "out")
    check(index, state, same_bits)
    assert max(path.stat().st_size for path in index.parent.iterdir() if path != index) <= 9000


@both
def test_less_than_a_header_gives_each_tensor_its_file(name: str, save: Save, tmp_path: Path, same_bits: Same) -> None:
    index = sharded(save(model()), name, 1, tmp_path / "out")
    assert len(list(index.parent.iterdir())) == len(model()) + 1
    check(index, model(), same_bits)


# What else a state_dict carries.


@both
def test_versions_of_all_modules(name: str, save: Save, tmp_path: Path) -> None:
    def block() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.ReLU(), torch.nn.BatchNorm1d(30))

    module = torch.nn.Sequential(*(block() for _ in range(6)))
    state: Any = module.state_dict()
    index = sharded(save(state), name, 10_000, tmp_path / "out")
    parts = []
    for shard in sorted(path for path in index.parent.iterdir() if path != index):
        with opened(shard) as checkpoint:
            parts.append(checkpoint.state_dict)
    first, *others = parts
    assert len(others) > 1
    assert list(first.versions or ()) == list(state._metadata), "in their order, those without tensors too"
    assert all(len(part.versions or ()) < 7 for part in others)
    assert all(key.rpartition(".")[0] in (part.versions or ()) for part in parts for key in part)
    assert all("" in (part.versions or ()) for part in parts)
    sharded(index, "pytorch_model.bin", 1 << 30, tmp_path / "again")
    again = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert again._metadata == state._metadata
    module.load_state_dict(again)


def test_what_else_a_mapping_carries_stands_in_the_first_shard(save: Save, tmp_path: Path) -> None:
    state: Any = OrderedDict(model())
    state._metadata = OrderedDict({"": {"version": 1}, "layers.9": {"version": 2, "odd": [1]}, "gone": {"version": 3}})
    state.note = ["x" * 3000, torch.rand(200)]
    index = sharded(save(state), "pytorch_model.bin", 16_000, tmp_path / "out")
    shards = sorted(path for path in index.parent.iterdir() if path != index)
    assert max(shard.stat().st_size for shard in shards) <= 16_000
    first, *others = (torch.load(shard, weights_only=True) for shard in shards)
    assert first._metadata == state._metadata
    assert first.note[0] == state.note[0]
    assert torch.equal(first.note[1], state.note[1])
    assert others
    assert all(type(part) is OrderedDict and vars(part) == {"_metadata": {"": {"version": 1}}} for part in others)


@both
def test_a_whole_model_and_a_list_of_pairs(name: str, save: Save, tmp_path: Path, same_bits: Same) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40), torch.nn.BatchNorm1d(40))
    check(sharded(save(module), name, 8000, tmp_path / "module"), module.state_dict(), same_bits)
    check(sharded(save(list(model().items())), name, 8000, tmp_path / "list"), model(), same_bits)


def test_plain_dicts_of_parameters_stay_so(save: Save, tmp_path: Path) -> None:
    state = {f"w{n}": torch.nn.Parameter(torch.rand(1000), requires_grad=n > 0) for n in range(3)}
    index = sharded(save(state), "pytorch_model.bin", 9000, tmp_path / "out")
    again = merged(index)
    assert [(type(again[key]), again[key].requires_grad) for key in state] == [
        (torch.nn.Parameter, False), (torch.nn.Parameter, True), (torch.nn.Parameter, True)]  # fmt: skip


def test_values_that_are_no_tensors(save: Save, tmp_path: Path) -> None:
    shared, base = [1, 2], torch.rand(900)
    state: dict[str, Any] = {"a": base, "a._extra_state": {"amax": torch.rand(3), "of": shared}, "b": torch.rand(900)}
    state |= {"c": torch.rand(900), "b._extra_state": {"base": base}, "c._extra_state": b"x" * 900, "d": torch.rand(9)}
    state["d._extra_state"] = (shared,)
    index = sharded(save(state), "pytorch_model.bin", 8500, tmp_path / "out")
    again: dict[str, Any] = merged(index)
    assert again["c._extra_state"] == b"x" * 900
    assert torch.equal(again["a._extra_state"]["amax"], state["a._extra_state"]["amax"])
    assert again["b._extra_state"]["base"].data_ptr() == again["a"].data_ptr(), "one storage stays one"
    assert again["d._extra_state"][0] is again["a._extra_state"]["of"], "one object stays one"
    with opened(index) as checkpoint:
        assert list(checkpoint.state_dict.everything) == list(state)
    with (
        opened(tmp_path / "model.pth") as checkpoint,
        pytest.raises(RewriteError, match=r"a\._extra_state .*b\._extra_state "),
    ):
        plan_shards(checkpoint, SAFETENSORS, "model.safetensors", 4500)


@pytest.mark.parametrize("metadata", [{}, {"format": "tf", "note": "é", "total_size": "12", "of": "x.safetensors"}])
@both
def test_metadata_is_the_same_when_shards_are_merged(name: str, metadata: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(model(), tmp_path / "one.safetensors", metadata={"format": "pt", **metadata})
    index = sharded(tmp_path / "one.safetensors", name, 8000, tmp_path / "out")
    said = {"format": "pt", **metadata}
    if name == "model.safetensors":
        with safetensors.safe_open(sorted(index.parent.glob("model-00002-*"))[0], "pt") as shard:
            assert shard.metadata() == said
    assert "format" not in json.loads(index.read_text())["metadata"]
    with ckptkit.open(index) as file:
        assert file.metadata == said
    if name == "model.safetensors":
        sharded(index, name, 1 << 30, tmp_path / "out")
        with safetensors.safe_open(tmp_path / "out" / name, "pt") as whole:
            assert whole.metadata() == said


# What is refused.


@both
def test_what_shards_cannot_hold(name: str, save: Save) -> None:
    container = CONTAINERS[name]
    resume = {"model": {f"w{n}": torch.rand(500) for n in range(9)}, "epoch": 3, "optimizer": {"state": {}}}
    with opened(save(resume)) as checkpoint:
        with pytest.raises(RewriteError, match=r"cannot store .*\(epoch, optimizer\): --weights-only leaves it out"):
            plan_shards(checkpoint, container, name, 6000)
        assert plan_shards(checkpoint.rewrite(ckptkit.WeightsOnly()), container, name, 6000).shards
    for empty in ({}, {"epoch": "x" * 9000}):
        with opened(save(empty)) as checkpoint, pytest.raises(RewriteError, match="there is no state_dict to write"):
            plan_shards(checkpoint, container, name, 100)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_programs_give_their_weights(tmp_path: Path, same_bits: Same) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Linear(50, 50))
    torch.jit.script(module).save(str(tmp_path / "m.pt"))  # type: ignore[no-untyped-call]
    check(sharded(tmp_path / "m.pt", "pytorch_model.bin", 16_000, tmp_path / "out"), module.state_dict(), same_bits)


@pytest.mark.parametrize(
    ("name", "container", "words"),
    [
        ("model.bin", SAFETENSORS, r"for safetensors files it must be one of \.safetensors"),
        ("model.safetensors", TORCH_ZIP, r"for torch-zip files it must be one of \.pth"),
        ("a\\b.bin", TORCH_ZIP, "an index cannot contain such shard names"),
        ("model.bin", LEGACY, "torch-legacy cannot be written"),
    ],
)
def test_names_and_containers_that_readers_would_not_take(name: str, container: Format, words: str, save: Save) -> None:
    with opened(save(model())) as checkpoint, pytest.raises(RewriteError, match=words):
        plan_shards(checkpoint, container, name, 8000)


def test_names_that_no_index_can_hold(save: Save) -> None:
    state = {"a\ud800": torch.rand(900), "b": torch.rand(900)}
    with (
        opened(save(state)) as checkpoint,
        pytest.raises(RewriteError, match="not valid Unicode cannot be stored in an"),
    ):
        plan_shards(checkpoint, TORCH_ZIP, "m.bin", 5000)


# How names are shared out: each once, what is tied together, and no file larger than wanted.

UNITS = {"model.safetensors": SafetensorsUnits, "pytorch_model.bin": TorchUnits}


def made(number: int, shape: tuple[int, ...], location: str = "cpu", dtype: str = "float32") -> TensorEntry:
    """A tensor over a storage of its own, whose bytes nobody reads."""
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    source = ByteRange(None, 0, nbytes)  # type: ignore[arg-type]
    storage = Storage(key=str(number), dtype=dtype, nbytes=nbytes, location=location, source=source)
    return TensorEntry(storage=storage, storage_offset=0, shape=shape, stride=contiguous_stride(shape), dtype=dtype)


ORIGIN = Origin(path="m.pth", size=0, format="torch-zip", kind="state_dict", state_path="")


def checkpoint_of(entries: dict[str, TensorEntry], versions: int = 100, **more: Any) -> Checkpoint:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in list(entries)[:versions])
    recorded = {module: InertDict([("version", 2)]) for module in modules}
    return Checkpoint(state_dict=StateDict(entries, versions=recorded), rest=STATE_DICT, origin=ORIGIN, **more)


NAMES = st.lists(st.sampled_from(["layer", "0", "重み", '"', "\n", "🙂", "w" * 60, "."]), max_size=5).map(".".join)


@st.composite
def checkpoints(draw: st.DrawFn) -> Checkpoint:
    """Many names, some of them tied or views of another's storage."""
    entries: dict[str, TensorEntry] = {}
    texts = NAMES | st.text(st.characters(codec="utf-8"), max_size=9)
    for number, name in enumerate(draw(st.lists(texts, min_size=2, max_size=30, unique=True))):
        kind = draw(st.sampled_from(["own", "own", "own", "tied", "view"])) if entries else "own"
        if kind == "own":
            shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
            location = draw(st.sampled_from(["cpu", "cuda:0", "device" * 20]))
            entries[name] = made(number, shape, location, draw(st.sampled_from(["float32", "int8", "float8_e5m2"])))
        else:
            other = draw(st.sampled_from(list(entries.values())))
            view = kind == "view" and other.numel > 1
            entries[name] = replace(other, shape=(1,), stride=(1,)) if view else replace(other)
        if draw(st.booleans()):
            entries[name] = replace(entries[name], is_parameter=True, requires_grad=True)
    return checkpoint_of(entries, metadata={"note": "of " + draw(st.text(st.just("é"), max_size=90))})


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(checkpoint=checkpoints(), most=st.integers(1, 9000), name=st.sampled_from(list(CONTAINERS)))
def test_every_name_once_and_no_file_too_large(checkpoint: Checkpoint, most: int, name: str) -> None:
    plan = plan_shards(checkpoint, CONTAINERS[name], name, most)
    state_dict = checkpoint.state_dict
    if plan.index is None:
        assert plan.nbytes == CONTAINERS[name].write(checkpoint).nbytes
        return
    assert list(plan.index.weight_map) == [key for key in state_dict if key not in plan.aliases]
    assert name == "model.safetensors" or not plan.aliases
    listed = plan.index.weight_map
    weight_map = {key: listed[plan.aliases.get(key, key)] for key in state_dict}
    assert set(weight_map.values()) == set(plan.shards)
    assert plan.tensors == len(state_dict)
    for shard, part in plan.shards.items():
        names = [key for key, holder in weight_map.items() if holder == shard]
        together = {
            state_dict[key].view if name == "model.safetensors" else id(state_dict[key].storage) for key in names
        }
        assert part.nbytes <= most or len(together) == 1
    for key, entry in state_dict.items():
        for other, another in state_dict.items():
            tied = entry.view == another.view if name == "model.safetensors" else entry.storage is another.storage
            assert not tied or not entry.nbytes or weight_map[key] == weight_map[other]


def large(n: int) -> TensorEntry:
    """All that a pickle can say of a tensor, in numbers of eight bytes; its geometry is nonsense."""
    huge = (1 << 61) + n
    tag = f"privateuseone:{n}"
    source = ByteRange(None, 0, 5 << 30)  # type: ignore[arg-type]
    storage = Storage(key=str(n), dtype="uint8", nbytes=5 << 30, location=tag, source=source)
    entry = TensorEntry(
        storage=storage, storage_offset=huge, shape=tuple(huge + i for i in range(9)), dtype="complex64",
        stride=tuple(huge - i for i in range(9)), is_conj=True, is_neg=True)  # fmt: skip
    return replace(entry, is_parameter=True, requires_grad=True)


SHARED = made(0, (1,), dtype="int8")
MANY: dict[str, Callable[[int], TensorEntry]] = {
    "own storages": lambda n: made(n, (1,)),
    "one storage": lambda n: replace(SHARED, is_parameter=True, requires_grad=True, dtype="float8_e5m2"),
    "attributes": lambda n: replace(
        made(n, (1,)), attributes=InertDict([("a", n), ("b", "x" * 50)]), is_parameter=True
    ),
}


@pytest.mark.parametrize("text", ["", "é" * 300, '"\\\n', "\x00" * 9])
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(CONTAINERS, MANY), ("pytorch_model.bin", "large")])
def test_the_bound_is_one(name: str, kind: str, text: str) -> None:
    checkpoint = checkpoint_of({f"{n}{text}.w": MANY.get(kind, large)(n) for n in range(600)}, versions=600)
    units = UNITS[name](checkpoint)
    nbytes = CONTAINERS[name].write(checkpoint).nbytes
    for fixed in (units.first_nbytes, units.other_nbytes):
        assert nbytes <= fixed + sum(unit.nbytes for unit in units.units), "versions are counted in either way"


@pytest.mark.parametrize("length", [1, 700])
@both
def test_many_small_tensors_stay_below_the_size(name: str, length: int) -> None:
    entries = {f"{n}.{'é' * length}.weight": made(n, (1,) * (n % 9), "cuda:11") for n in range(3000)}
    checkpoint = checkpoint_of(entries)
    whole = CONTAINERS[name].write(checkpoint)
    plan = plan_shards(checkpoint, CONTAINERS[name], name, whole.nbytes // 3)
    assert 4 <= len(plan.shards) <= 9, "the bound is no waste either"
    assert all(part.nbytes <= whole.nbytes // 3 for part in plan.shards.values())


def test_too_many_shards() -> None:
    entries = {f"w{n}": made(n, (8,)) for n in range(10_001)}
    with pytest.raises(
        RewriteError, match=r"10,001 shards, but readers accept at most 10,000; (\S+) bytes per file are"
    ) as e:
        plan_shards(checkpoint_of(entries), CONTAINERS["model.safetensors"], "m.safetensors", 60)
    enough = int(str(e.value).split("; ")[1].split(" ")[0].replace(",", ""))
    plan = plan_shards(checkpoint_of(entries), CONTAINERS["model.safetensors"], "m.safetensors", enough)
    assert len(plan.shards) <= 10_000
