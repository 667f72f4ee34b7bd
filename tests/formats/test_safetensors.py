"""safetensors, with the safetensors library as the oracle in both directions."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from support.conformance import Conformance
from support.files import SameBits, Save, published, tensor_of
from support.generated_tensors import STORABLE

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Origin, StateDict, Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import DTypeError, RewriteError
from ckptkit.formats import safetensors_writer
from ckptkit.plan import Copy, Gather, Plan


def read(path: Path) -> Checkpoint:
    return formats.read(path)[0]


def write(checkpoint: Checkpoint, target: Path) -> Plan:
    return published(safetensors_writer.write(checkpoint), target)


def file_bytes(header: object, data: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # type: ignore[no-any-return]


def info(dtype: object = "U8", shape: object = (4,), begin: object = 0, end: object = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HELD = [name for name in STORABLE if DTYPES[name].safetensors is not None]


def of_dtype(name: str, *shape: int) -> torch.Tensor:
    count = DTYPES[name].itemsize
    for size in shape:
        count *= size
    raw = torch.arange(count, dtype=torch.int64).remainder(2 if name == "bool" else 97).to(torch.uint8)
    return raw.view(getattr(torch, name)).reshape(shape)


class TestSafetensors(Conformance):
    reads = "safetensors"
    keeps_order = False  # the library sorts by width

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"


# Reading what the library writes.


@pytest.mark.parametrize("name", HELD)
def test_every_dtype_is_read_as_the_library_writes_it(name: str, tmp_path: Path, same_bits: SameBits) -> None:
    state = {"a": of_dtype(name, 3, 5), "empty": of_dtype(name, 0, 2), "scalar": of_dtype(name)}
    if name == "float4_e2m1fn_x2":  # of which a dimension counts pairs
        del state["scalar"]
    path = tmp_path / "m.safetensors"
    save_file(state, path, metadata={"format": "pt", "note": "é"})
    checkpoint = read(path)
    assert checkpoint.metadata == {"format": "pt", "note": "é"}
    assert (checkpoint.origin.format, checkpoint.origin.kind, checkpoint.trust) == ("safetensors", "state_dict", "safe")
    assert set(checkpoint.state_dict) == set(state)
    for key, value in state.items():
        entry = checkpoint.state_dict[key]
        assert (entry.shape, entry.stride) == (tuple(value.shape), value.stride())
        assert entry.location == "cpu"
        assert same_bits(tensor_of(entry), value)


def test_the_table_knows_every_dtype_of_the_library(tmp_path: Path) -> None:
    """The library lists its dtypes where it refuses one."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes({"a": info(dtype="X99")}, bytes(4)))
    with pytest.raises(safetensors.SafetensorError) as caught:
        load_file(path)
    words = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    names = {word.strip(" `") for word in words.split(",")}
    assert len(names) > 10
    known = {row.safetensors for row in DTYPES.values() if row.safetensors}
    assert names <= known


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no float4_e2m1fn_x2 (2.8)")
@pytest.mark.parametrize("shape", [(4, 8), (3,), (2, 0), (1, 1, 5)])
def test_packed_elements_go_both_ways(shape: tuple[int, ...], tmp_path: Path) -> None:
    packed = torch.randint(0, 256, shape, dtype=torch.uint8)
    state = {"w": packed.view(torch.float4_e2m1fn_x2), "b": torch.ones(3, dtype=torch.float64)}
    save_file(state, tmp_path / "a.safetensors")
    ckptkit.convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    ckptkit.convert(tmp_path / "b.pth", tmp_path / "c.safetensors")
    torch.save(state, tmp_path / "torch.pth")
    ckptkit.convert(tmp_path / "torch.pth", tmp_path / "d.safetensors")
    for loaded in (
        torch.load(tmp_path / "b.pth"),
        load_file(tmp_path / "c.safetensors"),
        load_file(tmp_path / "d.safetensors"),
        ckptkit.load_state_dict(tmp_path / "c.safetensors"),
    ):
        assert (loaded["w"].dtype, loaded["w"].shape) == (torch.float4_e2m1fn_x2, shape)
        assert torch.equal(loaded["w"].view(torch.uint8), packed)
    assert header_of(tmp_path / "d.safetensors")["w"]["shape"] == [*shape[:-1], 2 * shape[-1]]


def test_data_that_is_not_aligned(tmp_path: Path, same_bits: SameBits) -> None:
    state = {"b": torch.arange(3, dtype=torch.uint8), "f": torch.randn(5), "d": torch.randn(2).double()}
    header, data = {}, b""
    for name, value in state.items():
        raw = value.numpy().tobytes()
        header[name] = info({1: "U8", 4: "F32", 8: "F64"}[value.element_size()], list(value.shape), len(data),
                            len(data) + len(raw))  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    text += b" " * ((5 - len(text)) % 8)
    assert len(text) % 8 == 5
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes(text, data))
    assert load_file(path).keys() == state.keys(), "the library accepts it"
    checkpoint = read(path)
    assert all(same_bits(tensor_of(checkpoint.state_dict[name]), value) for name, value in state.items())
    (finding,) = checkpoint.findings
    assert finding.code == "unaligned-data"
    assert finding.message.startswith("1 of 3 tensors, such as 'd', begins at an offset that is not a multiple")


def test_names_are_in_the_order_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes({"z": info(), "a": info(begin=8, end=12), "m": info(begin=4, end=8)}, bytes(12)))
    assert list(read(path).state_dict) == ["z", "a", "m"]
    assert set(load_file(path)) == {"z", "a", "m"}


@pytest.mark.parametrize("metadata", [{}, None, {"": ""}, {"format": "tf", "k" * 1000: "\n\u2028"}])
def test_metadata_the_library_accepts(metadata: object, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_bytes({"__metadata__": metadata, "a": info()}, b"abcd"))
    with safetensors.safe_open(path, "pt") as other:
        assert (other.metadata() or {}) == read(path).metadata == (metadata or {})


@pytest.mark.parametrize(
    "names", [["a.b.c"], ["ünï", "模型", "\U0001f600"], ["", " "], ["a/b", "q\"uo'te", "new\nline"]]
)
def test_any_name(names: list[str], tmp_path: Path, same_bits: SameBits) -> None:
    state = {name: torch.randn(3) for name in names}
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    assert set(read(path).state_dict) == set(names)
    write(read(path), tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(same_bits(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("file", [file_bytes({}), file_bytes({"__metadata__": {"a": "b"}}), file_bytes(b"{}     ")])
def test_files_without_tensors(file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(file)
    assert load_file(path) == {}
    assert read(path).origin.kind == "other"


# Writing.


def checkpoint_of(state: dict[str, torch.Tensor], save: Save) -> Checkpoint:
    return read(save(state))


@pytest.mark.parametrize("name", HELD)
def test_every_dtype_is_written_as_the_library_reads_it(
    name: str, save: Save, tmp_path: Path, same_bits: SameBits
) -> None:
    whole = of_dtype(name, 3, 5)
    state = {"whole": whole, "t": of_dtype(name, 4, 2).t(), "empty": of_dtype(name, 0, 2), "scalar": of_dtype(name)}
    target = tmp_path / "out.safetensors"
    if name == "float4_e2m1fn_x2":
        with pytest.raises(DTypeError, match=r"these dtypes .scalar"):
            write(checkpoint_of(state, save), target)
        del state["scalar"]
    write(checkpoint_of(state, save), target)
    again = load_file(target)
    assert all(same_bits(again[key], value) for key, value in state.items())


def test_data_is_aligned_and_names_keep_their_order(save: Save, tmp_path: Path) -> None:
    state = {"z8": torch.zeros(3, dtype=torch.uint8), "f": torch.zeros(3), "b": torch.zeros(1, dtype=torch.bool),
             "d": torch.zeros(3, dtype=torch.float64), "h": torch.zeros(3).half(), "a": torch.zeros(3)}  # fmt: skip
    for extra in range(8):
        target = tmp_path / "out.safetensors"
        checkpoint = checkpoint_of(state, save).replace(metadata={"pad": "x" * extra})
        plan = write(checkpoint, target)
        assert plan.nbytes == target.stat().st_size
        assert list(header_of(target)) == ["__metadata__", *state]
        for name, entry in read(target).state_dict.items():
            assert entry.storage.source.offset % entry.itemsize == 0, name
        assert list(read(target).state_dict) == list(state)


def test_bytes_are_copied_where_they_lie_and_gathered_where_they_do_not(save: Save, same_bits: SameBits) -> None:
    base = torch.randn(6, 4)
    state = {"plain": torch.randn(3), "rows": base[2:4], "columns": base[:, 1:3], "t": base.t(), "every": base[::2],
             "expanded": torch.randn(3, 1).expand(3, 4), "conj": torch.randn(3, dtype=torch.complex64).conj(),
             "neg": torch.randn(3, dtype=torch.complex64).conj().imag, "empty": base[6:]}  # fmt: skip
    path = save(state)
    target = path.with_name("out.safetensors")
    plan = write(read(path), target)
    assert sum(isinstance(step, Copy) for step in plan.steps) == 2
    assert sum(isinstance(step, Gather) for step in plan.steps) == 6
    again = load_file(target)
    assert all(same_bits(again[name], value) for name, value in state.items())
    assert len(plan.aliases) == 0


def test_the_same_checkpoint_gives_the_same_bytes(save: Save, tmp_path: Path) -> None:
    checkpoint = checkpoint_of({"a": torch.randn(3), "b": torch.randn(2)}, save)
    for name in ("one", "two"):
        write(checkpoint, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zebra = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 3)
        self.embed = torch.nn.Linear(3, 3)
        self.other = torch.nn.Linear(3, 3)
        self.head.weight = self.zebra.weight
        self.embed.weight = self.zebra.weight
        self.other.bias = self.embed.bias


def test_ties_are_recorded_as_save_model_records_them(save: Save, tmp_path: Path, same_bits: SameBits) -> None:
    """But under the first name of the state_dict, where the library keeps the first in the alphabet."""
    network = Tied()
    save_model(network, str(tmp_path / "library.safetensors"), {"format": "pt"})
    checkpoint = read(save(network.state_dict()))
    plan = write(checkpoint, tmp_path / "ours.safetensors")
    library, mine = header_of(tmp_path / "library.safetensors"), header_of(tmp_path / "ours.safetensors")
    kept = {"embed.weight": "zebra.weight", "embed.bias": "embed.bias"}
    assert {kept.get(name, name) for name in library} == mine.keys()
    versions = mine["__metadata__"].pop("torch._metadata")  # which the library does not keep
    mine["__metadata__"].pop("ckptkit_tied_order")  # nor that
    assert json.loads(versions) == dict(network.state_dict()._metadata)
    assert plan.aliases == {"head.weight": "zebra.weight", "embed.weight": "zebra.weight", "other.bias": "embed.bias"}
    assert mine["__metadata__"] == {"format": "pt", **plan.aliases}
    theirs = {"zebra.weight": "embed.weight", "head.weight": "embed.weight", "other.bias": "embed.bias"}
    assert library["__metadata__"] == {"format": "pt", **theirs}
    for name in ("library", "ours"):
        found = read(tmp_path / f"{name}.safetensors")
        assert set(found.state_dict) == set(network.state_dict())
        assert found.state_dict["zebra.weight"] is found.state_dict["head.weight"] is found.state_dict["embed.weight"]
        assert found.metadata == {"format": "pt"}
        fresh = Tied()
        assert load_model(fresh, str(tmp_path / f"{name}.safetensors")) == (set(), [])
        assert all(same_bits(value, network.state_dict()[key]) for key, value in fresh.state_dict().items())
    write(read(tmp_path / "ours.safetensors"), tmp_path / "again.safetensors")
    assert header_of(tmp_path / "again.safetensors") == header_of(tmp_path / "ours.safetensors")


def test_only_equal_views_are_ties(save: Save, tmp_path: Path, same_bits: SameBits) -> None:
    base = torch.randn(4, 4)
    state = {"a": base, "b": base, "part": base[:2], "flat": base.reshape(-1), "t": base.t(),
             "empty": base[:0], "empty too": base[:0]}  # fmt: skip
    plan = write(checkpoint_of(state, save), tmp_path / "out.safetensors")
    assert plan.aliases == {"b": "a"}
    again = read(tmp_path / "out.safetensors").state_dict
    assert all(same_bits(tensor_of(again[name]), value) for name, value in state.items())


def test_metadata_that_names_no_tensor_is_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    metadata = {"format": "pt", "tied": "pt", "gone": "nowhere", "pt": "x"}
    path.write_bytes(file_bytes({"__metadata__": metadata, "pt": info()}, b"abcd"))
    checkpoint = read(path)
    assert checkpoint.metadata == {"format": "pt", "gone": "nowhere", "pt": "x"}
    assert list(checkpoint.state_dict) == ["pt", "tied"]


def test_metadata_is_kept_and_may_say_another_format(save: Save, tmp_path: Path) -> None:
    checkpoint = checkpoint_of({"a": torch.ones(1)}, save).replace(metadata={"format": "np", "source": "ü"})
    write(checkpoint, tmp_path / "m.safetensors")
    assert header_of(tmp_path / "m.safetensors")["__metadata__"] == {"format": "np", "source": "ü"}


@pytest.mark.parametrize(("name", "metadata"), [("format", {}), ("note", {"note": "n"})])
def test_a_tied_name_that_stands_in_the_metadata_is_the_one_kept(
    name: str, metadata: dict[str, str], save: Save, tmp_path: Path
) -> None:
    shared = torch.ones(2)
    checkpoint = checkpoint_of({"a": shared, name: shared}, save).replace(metadata=metadata)
    assert write(checkpoint, tmp_path / "m.safetensors").aliases == {"a": name}
    again = read(tmp_path / "m.safetensors")
    assert again.state_dict["a"] is again.state_dict[name]
    assert again.metadata == {"format": "pt", **metadata}


def test_a_tie_that_metadata_has_no_room_for_is_refused(save: Save) -> None:
    shared = torch.ones(2)
    checkpoint = checkpoint_of({"note": shared, "format": shared}, save).replace(metadata={"note": "n"})
    with pytest.raises(RewriteError, match="under their names, but format is already there"):
        safetensors_writer.write(checkpoint)


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"epoch": 3}, RewriteError, "no state_dict to write"),
        (
            {"a": torch.zeros(1, dtype=torch.complex128)},
            DTypeError,
            r"these dtypes \(a \(complex128\)\): --exclude a leaves",
        ),
        (
            {f"t{n}": torch.zeros(1, dtype=torch.complex128) for n in range(9)},
            DTypeError,
            r"t7 \(complex128\) and 1 more",
        ),
        (
            {"a": torch.ones(1), "b": torch.ones(1), "x_extra_state": {"k": 1}},
            RewriteError,
            "--exclude x_extra_state leaves",
        ),
        ({"__metadata__": torch.ones(1)}, RewriteError, "cannot be named '__metadata__'"),
        ({"\ud800": torch.ones(1)}, RewriteError, "not valid Unicode"),
    ],
)
def test_what_safetensors_cannot_hold(state: Any, error: type[Exception], words: str, save: Save) -> None:
    checkpoint = checkpoint_of(state, save)
    with pytest.raises(error, match=words):
        safetensors_writer.write(checkpoint)


def test_a_tensor_of_endless_repetitions_is_not_written_out(save: Save, tmp_path: Path) -> None:
    path = save({"w": torch.ones(3), "mask": torch.zeros(1).expand(1_000_000, 1_000_000)})
    checkpoint = read(path)
    with pytest.raises(
        RewriteError, match=r"'mask' of shape .1000000, 1000000. and stride .0, 0. would take 4,000,000,000,"
    ):
        safetensors_writer.write(checkpoint)
    mask = torch.zeros(1).expand(500, 500)
    write(read(save({"mask": mask})), tmp_path / "small.safetensors")
    assert torch.equal(load_file(tmp_path / "small.safetensors")["mask"], mask)


def test_beyond_4_gib_without_writing_them(tmp_path: Path) -> None:
    hole = tmp_path / "source"
    with open(hole, "wb") as out:
        out.truncate(5 << 30)
    source = SourceFile(hole)
    entries = {}
    for name, nbytes in (("big", 5 << 30), ("small", 8)):
        storage = Storage(key=name, dtype="uint8", nbytes=nbytes, location="cpu", source=ByteRange(source, 0, nbytes))
        entries[name] = TensorEntry(storage=storage, storage_offset=0, shape=(nbytes,), stride=(1,), dtype="uint8")
    checkpoint = Checkpoint(state_dict=StateDict(entries), rest=STATE_DICT,
                            origin=Origin(path="none", size=0, format="torch-zip", kind="state_dict"))  # fmt: skip
    plan = safetensors_writer.write(checkpoint)
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as out:
        out.write(plan.steps[0].data)
        out.truncate(plan.nbytes)
    with safetensors.safe_open(path, "pt") as other:
        assert other.get_slice("big").get_shape() == [5 << 30]
        assert torch.equal(other.get_tensor("small"), torch.zeros(8, dtype=torch.uint8))
    assert read(path).state_dict["small"].storage.source.offset == plan.nbytes - 8
