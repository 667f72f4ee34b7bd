"""The decoder of ``.metadata``: against what torch's classes give, record by record and in runs; what it refuses."""

from __future__ import annotations

import pickle
import pickletools
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.repeated import repeated
from support.sharded import Samples
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError, UnsupportedError
from ckptkit.formats.distributed import dcp_metadata, dcp_runs
from ckptkit.formats.distributed.dcp_metadata import parse_metadata
from ckptkit.limits import DEFAULT_LIMITS

if not hasattr(dcp, "save"):
    pytest.skip(f"torch {torch.__version__} has no torch.distributed.checkpoint.save (2.2)", allow_module_level=True)

RUNS = dcp_runs.Runs


def one_by_one(data: bytes) -> Any:
    """What the machine makes of it, node by node."""
    with mock.patch.object(RUNS, "built", lambda *_: None):
        return parse_metadata(data, DEFAULT_LIMITS)


def in_runs(data: bytes) -> tuple[Any, dcp_runs.Runs]:
    """The same with the runs that it was read by."""
    made: list[dcp_runs.Runs] = []

    def make(most: int) -> dcp_runs.Runs:
        made.append(RUNS(most))
        return made[0]

    with mock.patch.object(dcp_metadata, "Runs", make):
        return parse_metadata(data, DEFAULT_LIMITS), made[0]


def told(metadata: Any) -> dict[str, Any]:
    """All that is said, in plain values."""
    items = metadata.items

    def place(row: int) -> tuple[Any, ...]:
        return items.paths[row], items.starts[row], items.lengths[row], tuple(items.transforms[row])

    return {
        "tensors": {
            name: (t.dtype, t.shape, t.requires_grad, t.offsets, t.sizes, [*map(place, t.rows)])
            for name, t in metadata.tensors.items()
        },
        "objects": {name: place(row) for name, row in metadata.objects.items()},
        "order": metadata.order,
        "paths": metadata.paths,
        "globals": sorted((use.name, use.verdict, use.count) for use in metadata.globals if use.name != "torch.Size"),
    }


def as_torch_has_it(metadata: Metadata) -> dict[str, Any]:
    def place(name: str, offsets: Any) -> tuple[Any, ...]:
        info = metadata.storage_data[MetadataIndex(name, offsets)]
        return info.relative_path, info.offset, info.length, tuple(info.transform_descriptors or ())

    tensors = {
        name: (
            str(value.properties.dtype).removeprefix("torch."), tuple(value.size), value.properties.requires_grad,
            [tuple(chunk.offsets) for chunk in value.chunks], [tuple(chunk.sizes) for chunk in value.chunks],
            [place(name, chunk.offsets) for chunk in value.chunks],
        )
        for name, value in metadata.state_dict_metadata.items() if isinstance(value, TensorStorageMetadata)
    }  # fmt: skip
    order = [*metadata.state_dict_metadata]
    return {
        "tensors": tensors,
        "objects": {name: place(name, None) for name in order if name not in tensors},
        "order": order,
        "paths": metadata.planner_data or None,
    }


def drawn(seed: int, *, tensors: int = 12, most: int = 40) -> Metadata:
    """A ``.metadata`` of any shapes, along dimension 0: chunks of few and many, of no dimensions and of five."""
    draw = random.Random(seed)
    described: dict[str, Any] = {}
    stored, planned, writes = {}, {}, []
    for number in range(tensors):
        name = f"{'x' * draw.choice([1, 9, 300])}.é.{number}"
        planned[name] = ("model", number, name)
        if draw.random() < 0.2:
            described[name] = BytesStorageMetadata()
            stored[MetadataIndex(name)] = _StorageInfo("__0_0.distcp", draw.randrange(10**6), 5)
            continue
        dims = draw.randrange(6)
        inner = [draw.choice([0, 1, 3, 300, 2**33 if dims == 2 else 2]) for _ in range(dims - 1)]
        rows, chunks = draw.choice([1, 300, 70000]), []
        count = draw.choice([0, 1, 2, most]) if dims else 1
        for part in range(count):
            offsets = torch.Size([part * rows, *[0] * (dims - 1)][:dims])
            chunk = ChunkStorageMetadata(offsets, torch.Size([rows, *inner][:dims]))
            own = draw.random() < 0.5
            index = MetadataIndex("".join(name) if own else name, torch.Size([*offsets]) if own else offsets, part)
            through = draw.choice([None, None, ["stream.zstd/1"], ["a", "b"]])
            stored[index] = _StorageInfo(
                f"__{part % 5}_0.distcp", draw.choice([0, 300, 70000, 2**31, 2**40]), draw.choice([9, 2**33]), through
            )  # fmt: skip
            data = TensorWriteData(chunk, TensorProperties(dtype=torch.float32), chunk.sizes)
            writes.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            chunks.append(chunk)
        properties = TensorProperties(dtype=draw.choice([torch.float32, torch.int64]), requires_grad=number == 1)
        size = torch.Size([rows * count, *inner][:dims])
        described[name] = TensorStorageMetadata(properties, size, chunks)
    made = Metadata(described, draw.choice([None, planned]), stored)
    made.all_local_plans = [SavePlan(writes), SavePlan(writes[:2])]  # type: ignore[attr-defined]  # Megatron's
    return made


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("seed", range(4))
def test_what_torch_pickled_is_read(seed: int, protocol: int) -> None:
    made = drawn(seed)
    if seed % 2:
        made = pickle.loads(pickle.dumps(made))  # what came from other ranks shares nothing
    data = pickle.dumps(made, protocol)
    found, runs = in_runs(data)
    expected = as_torch_has_it(pickle.loads(data))
    assert {key: value for key, value in told(found).items() if key != "globals"} == expected
    assert told(one_by_one(data)) == told(found)
    assert (len(runs.memo.bases) > 50) == (protocol >= 4)
    assert found.protocol == (protocol if protocol >= 2 else 0)  # which has no opcode for it


def test_many_chunks_leave_few_nodes() -> None:
    """More than a batch of the pickler's, over several of its frames; in one tensor and in many."""
    for tensors, chunks in ((1, 2001), (300, 8)):
        described: dict[str, Any] = {}
        stored = {}
        for number in range(tensors):
            size = torch.Size([chunks * 4, 7])
            parts = [ChunkStorageMetadata(torch.Size([4 * n, 0]), torch.Size([4, 7])) for n in range(chunks)]
            described[f"t{number}"] = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, parts)
            for n, part in enumerate(parts):
                stored[MetadataIndex(f"t{number}", part.offsets, n)] = _StorageInfo(f"__{n}_0.distcp", number * 99, 99)
        data = pickle.dumps(Metadata(described, None, stored))
        assert len(data) > 200_000
        found, runs = in_runs(data)
        expected = as_torch_has_it(Metadata(described, None, stored))
        assert {key: value for key, value in told(found).items() if key != "globals"} == expected
        assert runs.memo.made < 0.15 * runs.memo.count + 300  # torch 2.15 has more of each tensor
        assert told(one_by_one(data))["globals"] == told(found)["globals"]


def test_what_the_ranks_wrote_is_read(sharded: Samples) -> None:
    read = 0
    for case in sharded.values():
        for file in case.folder.glob("*.metadata"):
            data = file.read_bytes()
            found = parse_metadata(data, DEFAULT_LIMITS)
            expected = as_torch_has_it(pickle.loads(data))
            assert {key: value for key, value in told(found).items() if key != "globals"} == expected
            assert {use.verdict for use in found.globals} == {"torch"}
            read += 1
    assert read > 16


def small(**changes: Any) -> Metadata:
    """Two tensors, one in two chunks, and an object."""
    chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3])),
        ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 3])),
    ]
    described: dict[str, Any] = {
        "w": TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4, 3]), chunks),
        "s": TensorStorageMetadata(
            TensorProperties(dtype=torch.float32),
            torch.Size([]),
            [ChunkStorageMetadata(torch.Size([]), torch.Size([]))],
        ),
        "o": BytesStorageMetadata(),
    }
    stored = {
        MetadataIndex("w", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 10),
        MetadataIndex("w", torch.Size([2, 0]), 1): _StorageInfo("__1_0.distcp", 0, 10),
        MetadataIndex("s", torch.Size([])): _StorageInfo("__0_0.distcp", 10, 10),
        MetadataIndex("o"): _StorageInfo("__0_0.distcp", 20, 10),
    }
    made = Metadata(described, {"w": ("w",), "s": ("s",), "o": ("o",)}, stored)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"torch.distributed.checkpoint.metadata", b"torch.distributed._shard.checkpoint.metadata"),
        (b"torch.distributed.checkpoint.filesystem", b"torch.distributed._shard.checkpoint.filesystem"),
        (b"checkpoint.metadata\n_MEM_FORMAT_ENCODING", b"_shard.sharded_tensor.metadata\nMEM_FORMAT_ENCODING"),
        (b"checkpoint.metadata\nTensorProperties", b"_shard.sharded_tensor.metadata\nTensorProperties"),
    ],
)
def test_packages_of_old_torch(old: bytes, new: bytes) -> None:
    data = pickle.dumps(small(), 3)
    assert old in data
    renamed = data.replace(old, new)
    assert told(parse_metadata(renamed, DEFAULT_LIMITS))["tensors"] == as_torch_has_it(small())["tensors"]
    assert {use.verdict for use in parse_metadata(renamed, DEFAULT_LIMITS).globals} == {"torch"}


def test_attributes_may_be_missing_and_others_are_passed_over() -> None:
    made = small(mcore_data={"any": [1, {"thing": None}]}, storage_meta=None)
    del made.planner_data
    found = parse_metadata(pickle.dumps(made), DEFAULT_LIMITS)
    assert found.paths is None
    assert found.version is None or isinstance(found.version, str)
    assert found.order == ["w", "s", "o"]


# What contradicts itself.


def stored(change: Callable[[dict[Any, Any]], object]) -> Metadata:
    made = small()
    change(made.storage_data)
    return made


def tensor(name: str, change: Callable[[Any], object]) -> Metadata:
    made = small()
    change(made.state_dict_metadata[name])
    return made


def item(name: str, path: object = "__0_0.distcp", start: object = 0, length: object = 10) -> Metadata:
    return stored(lambda items: items.update({MetadataIndex(name): _StorageInfo(path, start, length)}))  # type: ignore[arg-type]


FIRST = MetadataIndex("w", torch.Size([0, 0]))


class Hostile:
    """Runs a command where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("echo hostile",)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        ({"a": 1}, CorruptError, "a dict where a Metadata belongs"),
        (small(state_dict_metadata=None), CorruptError, "its state_dict_metadata is None, not a dict"),
        (small(state_dict_metadata={3: BytesStorageMetadata()}), CorruptError, "is an int, not text"),
        (small(state_dict_metadata={"w": 5}), CorruptError, "an int where a TensorStorageMetadata belongs"),
        (small(storage_data=None), CorruptError, "its storage_data is None, not a dict"),
        (small(storage_data={"w": 5}), CorruptError, "a str where a MetadataIndex belongs"),
        (small(planner_data=[1]), CorruptError, "its planner_data is a list, not a dict"),
        (small(planner_data={"w": ("w",)}), CorruptError, "does not mention 's', 'o'"),
        (small(planner_data={"w": ()}), CorruptError, "does not map names to strings and numbers"),
        (small(planner_data={"w": (2.5,)}), CorruptError, "does not map names to strings and numbers"),
        (stored(lambda items: items.pop(FIRST)), CorruptError, r"1 chunk lies: tensor 'w' at \[0, 0\]"),
        (stored(lambda items: items.pop(MetadataIndex("o"))), CorruptError, "object 'o'"),
        (item("other"), CorruptError, "stored that are not described: 'other'"),
        (
            stored(lambda items: items.update({MetadataIndex("w", torch.Size([1, 0])): _StorageInfo("__0", 0, 1)})),
            CorruptError,
            "stored that are not described: 'w'",
        ),
        (item("o", path="../__0_0.distcp"), CorruptError, "is not the name of a file in the folder"),
        (item("o", path="/etc/passwd"), CorruptError, "is not the name of a file in the folder"),
        (item("o", path=".."), CorruptError, "is not the name of a file in the folder"),
        (item("o", path="a\0b"), CorruptError, "is not the name of a file in the folder"),
        (item("o", path="a\\b"), CorruptError, "is not the name of a file in the folder"),
        (item("o", path=""), CorruptError, "is not the name of a file in the folder"),
        (item("o", path=3), CorruptError, "without a name, a file, an offset or a length"),
        (item("o", start="0"), CorruptError, "without a name, a file, an offset or a length"),
        (item("o", start=-1), CorruptError, "an item of 10 bytes from byte -1 on|negative offset or length"),
        (item("o", length=-1), CorruptError, "an item of -1 bytes|negative offset or length"),
        (item("o", length=1 << 70), CorruptError, "an item of 1,180,591,620,717,411,303,424 bytes"),
        (item("o", length=1 << 80000), LimitError, "bytes of an integer"),
        (tensor("w", lambda t: setattr(t, "size", torch.Size([1 << 62]))), CorruptError, "no tensor has the size"),
        (tensor("w", lambda t: setattr(t, "size", (-4, 3))), CorruptError, "no tensor has the size"),
        (tensor("w", lambda t: setattr(t, "size", (1,) * 65)), CorruptError, "65 dimensions; torch allows 64"),
        (tensor("w", lambda t: setattr(t, "size", "4")), CorruptError, "a size or an offset is a str"),
        (tensor("w", lambda t: setattr(t, "chunks", 5)), CorruptError, "chunks of a tensor are an int"),
        (tensor("w", lambda t: setattr(t, "chunks", [5])), CorruptError, "an int where a ChunkStorageMetadata belongs"),
        (tensor("w", lambda t: setattr(t, "properties", 5)), CorruptError, "where a tensor's TensorProperties belong"),
        (tensor("w", lambda t: t.chunks.append(t.chunks)), CorruptError, "where a ChunkStorageMetadata belongs"),
        (
            tensor("w", lambda t: setattr(t.properties, "dtype", torch.Tensor)),
            CorruptError,
            "which torch does not have",
        ),
        (
            tensor("w", lambda t: setattr(t.properties, "layout", torch.sparse_coo)),
            UnsupportedError,
            "tensor 'w': its layout is 'torch.sparse_coo'; only strided is supported",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(made: object, error: type[FormatError], message: str) -> None:
    data = pickle.dumps(made)
    for read in (parse_metadata, lambda data, _: one_by_one(data)):
        with pytest.raises(error, match=message):
            read(data, DEFAULT_LIMITS)


def test_dangerous_names_anywhere_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    found = parse_metadata(pickle.dumps(small(storage_meta=Hostile())), DEFAULT_LIMITS)
    assert [use.verdict for use in found.globals if use.name.endswith("system")] == ["dangerous"]
    with pytest.raises(CorruptError) as caught:
        parse_metadata(pickle.dumps(small(storage_data=Hostile())), DEFAULT_LIMITS)
    assert "dangerous" in [use.verdict for use in caught.value.globals]
    assert capfd.readouterr().out == ""


def test_one_list_of_chunks_is_of_one_tensor() -> None:
    made = small()
    made.state_dict_metadata["again"] = made.state_dict_metadata["w"]
    with pytest.raises(CorruptError, match="not a separate list"):
        parse_metadata(pickle.dumps(made), DEFAULT_LIMITS)


def test_too_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_metadata, "_MOST_CHUNKS", 50)
    with pytest.raises(LimitError, match="chunks of a checkpoint"):
        parse_metadata(pickle.dumps(drawn(1)), DEFAULT_LIMITS)


def test_a_path_of_too_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_metadata, "_MOST_KEYS", 5)
    with pytest.raises(LimitError, match="keys in planner_data"):
        parse_metadata(pickle.dumps(small(planner_data={"w": (*"abc",), "s": (*"abc",)})), DEFAULT_LIMITS)


def test_names_that_are_described_or_stored_twice() -> None:
    data = pickle.dumps(small(), 2)
    twice = data.replace(b"X\x01\0\0\0s", b"X\x01\0\0\0w", 1)
    with pytest.raises(FormatError, match=r"'w' is described twice"):
        parse_metadata(twice, DEFAULT_LIMITS)
    made = small()
    del made.storage_data[FIRST]
    wrong = {FIRST: _StorageInfo("__0_0.distcp", 0, 10), **made.storage_data}
    data = pickle.dumps(small(storage_data=wrong))
    assert parse_metadata(data, DEFAULT_LIMITS).order == ["w", "s", "o"]
    same = data.replace(b"K\x02K\x00\x86\x94\x85\x94R\x94ub", b"K\x00K\x00\x86\x94\x85\x94R\x94ub")
    assert same != data
    with pytest.raises((AmbiguousError, CorruptError), match=r"two items are for the same chunk|not described"):
        parse_metadata(same, DEFAULT_LIMITS)


# Runs, and pickles that do with what was left out what no pickler does.


def unframed(made: Metadata) -> tuple[bytes, list[int]]:
    """The pickle without its frame, and where its opcodes are."""
    data = pickle.dumps(made, 4)
    assert data[2:3] == b"\x95"
    data = data[:2] + data[11:]
    return data, [at for _, _, at in pickletools.genops(data)]  # type: ignore[misc]


def outcome(read: Callable[[bytes], Any], data: bytes) -> object:
    try:
        return told(read(data))
    except FormatError:
        return FormatError


@pytest.mark.parametrize(
    "more", [b"0", b"00", b"\x94", b"\x940h\x05", b"h\x28", b"N", b"(", b"t", b"\x85", b"\x86", b"a", b"e", b"u", b"b"]
)
@repeated("times", 20, 60)
def test_opcodes_that_no_pickler_puts_there_change_nothing(more: bytes, times: int) -> None:
    """Between any two opcodes: in runs it is what it is one by one, or refused."""
    data, places = unframed(drawn(3, tensors=3, most=5))
    draw, read = random.Random(more), 0
    for at in draw.sample(places, times):
        changed = data[:at] + more + data[at:]
        found = outcome(lambda data: parse_metadata(data, DEFAULT_LIMITS), changed)
        expected = outcome(one_by_one, changed)
        read += found is not FormatError
        assert found in (expected, FormatError), at
    assert read < times


def test_a_chunk_that_is_taken_off_again_is_none() -> None:
    chunks = [ChunkStorageMetadata(torch.Size([n]), torch.Size([1])) for n in range(5)]
    shape = torch.Size([4])
    made = Metadata(
        {"w": TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, chunks)},
        None,
        {MetadataIndex("w", torch.Size([n]), n): _StorageInfo("__0_0.distcp", n, 1) for n in range(4)},
    )
    data, _ = unframed(made)
    end = data.index(b"eub")
    popped = data[:end] + b"0" + data[end:]
    assert len(pickle.loads(popped).state_dict_metadata["w"].chunks) == 4
    assert len(parse_metadata(popped, DEFAULT_LIMITS).tensors["w"].offsets) == 4
    with pytest.raises(CorruptError, match=r"tensor 'w' at \[4\]"):
        parse_metadata(data, DEFAULT_LIMITS)


@pytest.mark.parametrize("seed", range(2))
def test_cut_short_anywhere(seed: int) -> None:
    data = pickle.dumps(drawn(seed, tensors=4, most=6))
    for end in range(0, len(data), 37):
        with pytest.raises(FormatError):
            parse_metadata(data[:end], DEFAULT_LIMITS)
