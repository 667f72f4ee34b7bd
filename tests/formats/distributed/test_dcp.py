"""dcp: folders of torch.distributed.checkpoint, whole, damaged and hostile; what one process would have saved."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.files import SameBits
from support.sharded import Samples, flat

import ckptkit
from ckptkit import formats
from ckptkit.errors import (
    CorruptError,
    FileAccessError,
    FormatError,
    LimitError,
    MissingDependencyError,
    UnsupportedError,
)
from ckptkit.formats.distributed.dcp_items import ItemReader
from ckptkit.limits import DEFAULT_LIMITS

if not hasattr(dcp, "save"):
    pytest.skip(f"torch {torch.__version__} has no torch.distributed.checkpoint.save (2.2)", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CASES = (
    "fsdp2_2", "fsdp2_4", "fsdp2_flat_optimizer", "tied", "hsdp", "tp_fsdp", "weights_alone", "int_keys", "mixed_2",
    "mixed_4", "no_flatten", "file_per_item", "threads", "zstd", "saved_async", "meshes", "sharded_tensor_dcp",
)  # fmt: skip


@pytest.fixture
def copied(sharded: Samples, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a case, to be damaged."""

    def copy(case: str) -> Path:
        return Path(shutil.copytree(sharded[case].folder, tmp_path / case))

    return copy


def same(found: object, expected: object, same_bits: SameBits, path: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), path
        assert same_bits(found, expected), path
    elif isinstance(expected, dict):
        assert isinstance(found, dict), path
        assert [*found] == [*expected], path
        for key, value in expected.items():
            same(found[key], value, same_bits, f"{path}.{key}")
    elif isinstance(expected, (list, tuple)) and not isinstance(expected, torch.Size):
        assert type(found) is type(expected), path
        assert len(found) == len(expected), path  # type: ignore[arg-type]
        for index, value in enumerate(expected):
            same(found[index], value, same_bits, f"{path}.{index}")  # type: ignore[index]
    else:
        assert found == expected, path


@pytest.mark.parametrize("case", CASES)
def test_the_tree_is_what_one_process_would_have_saved(case: str, sharded: Samples, same_bits: SameBits) -> None:
    found = dict(flat(ckptkit.load(sharded[case].folder)))
    expected = {name: value for name, value in flat(sharded[case].expected) if value != {}}  # torch writes none
    assert found.keys() == expected.keys()
    same({name: found[name] for name in expected}, expected, same_bits)


def test_all_cases_of_this_layout_are_read(sharded: Samples) -> None:
    assert {case for case in sharded if (sharded[case].folder / ".metadata").exists()} == {*CASES}


def test_nested_containers_are_what_they_were(sharded: Samples, same_bits: SameBits) -> None:
    same(ckptkit.load(sharded["mixed_2"].folder)["list"], sharded["mixed_2"].expected["list"], same_bits)


def test_an_open_folder_reads_no_tensor(sharded: Samples) -> None:
    with mock.patch.object(ItemReader, "tensor", side_effect=AssertionError):
        document = ckptkit.formats.read(sharded["fsdp2_4"].folder)[0]
    assert document.origin.format == "dcp"
    assert document.origin.format_version == "1.0.0"
    assert document.origin.kind == "resume"
    assert {section.path: section.kind for section in document.sections} == {
        "model": "state_dict", "optimizer": "optimizer"
    }  # fmt: skip


def test_trust_is_known_once_every_item_is_judged(sharded: Samples) -> None:
    checkpoint, file = formats.read(sharded["fsdp2_2"].folder)
    assert checkpoint.trust == "needs_trust"
    assert not checkpoint.findings
    judged = formats.require_sound(file, checkpoint)
    assert judged.trust == "safe"
    assert {use.name for use in judged.globals} > {"torch._utils._rebuild_tensor_v2", "torch.FloatStorage"}
    items = sum(use.count for use in checkpoint.unvouched)
    assert next(use.count for use in judged.globals if use.name == "torch._utils._rebuild_tensor_v2") == items
    file.close()


def test_what_is_known_of_one_item_is_what_each_would_say(sharded: Samples) -> None:
    def entries() -> list[Any]:
        checkpoint, file = formats.read(sharded["fsdp2_4"].folder)
        assert checkpoint.unread is not None
        uses = checkpoint.unread.judge()
        found = checkpoint.unread._tensors  # type: ignore[attr-defined]
        file.close()
        return [
            *((e.view[1:], e.dtype, e.storage.key, e.storage.nbytes, e.storage.location, e.storage.crc32,
               e.storage.source.offset, e.storage.source.file.path, e.requires_grad)
              for _, e in sorted(found.items())),
            sorted((use.name, use.count, use.verdict) for use in uses),
        ]  # fmt: skip

    with mock.patch("ckptkit.formats.distributed.dcp_items._MOST_MOLDS", 0):
        one_by_one = entries()
    assert entries() == one_by_one


def test_objects_that_are_alike_are_each_what_they_are(tmp_path: Path) -> None:
    """Whatever byte of one is damaged: it is told as if each were read by itself, or not at all where nothing is."""
    tree = {"a": 0.5, "b": 0.5, "c": 0.5, "d": (0.9, None), "e": (0.9, None), "f": [1], "g": [1], "w": torch.ones(2)}
    dcp.save(tree, checkpoint_id=tmp_path, no_dist=True)
    found = ckptkit.load(tmp_path)
    assert {**found, "w": None} == {**tree, "w": None}
    assert found["f"] is not found["g"]
    info = {index.fqn: info for index, info in pickle.loads((tmp_path / ".metadata").read_bytes()).storage_data.items()}
    file, whole = tmp_path / "__0_0.distcp", (tmp_path / "__0_0.distcp").read_bytes()

    def outcome() -> object:
        try:
            checkpoint, source = formats.read(tmp_path)
        except FormatError as error:
            return str(error)
        source.close()
        return [*checkpoint.rest.pairs], checkpoint.trust  # type: ignore[attr-defined]

    last = max((info[name] for name in "abc"), key=lambda each: each.offset)
    for at in range(last.offset, last.offset + last.length, 41):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with mock.patch("ckptkit.formats.distributed.dcp_items._MOST_MOLDS", 0):
            expected = outcome()
        assert repr(outcome()) == repr(expected), at


# What is missing, damaged or foreign.


def test_a_save_that_never_finished(copied: Callable[[str], Path]) -> None:
    folder = copied("fsdp2_2")
    (folder / ".metadata").unlink()
    with pytest.raises(CorruptError, match="the save never finished"):
        ckptkit.load(folder)
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(CorruptError, match="never finished"):
        ckptkit.load(folder)


def test_missing_files_are_listed_at_once(copied: Callable[[str], Path]) -> None:
    folder = copied("file_per_item")
    for name in ("__0_1.distcp", "__1_2.distcp"):
        (folder / name).unlink()
    with pytest.raises(CorruptError, match=r"2 files are missing: .*__0_1\.distcp.*__1_2\.distcp") as caught:
        formats.read(folder)
    assert sorted(caught.value.names) == ["__0_1.distcp", "__1_2.distcp"]


def test_a_file_that_was_cut_short(copied: Callable[[str], Path]) -> None:
    folder = copied("fsdp2_2")
    file = folder / "__1_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CorruptError, match=r"1 file is cut short: __1_0\.distcp"):
        formats.read(folder)


def test_files_of_another_save_are_told(copied: Callable[[str], Path]) -> None:
    folder = copied("fsdp2_2")
    shutil.copy(folder / "__0_0.distcp", folder / "__7_0.distcp")
    found = {finding.code: finding.message for finding in formats.read(folder)[0].findings}
    assert "__7_0.distcp" in found["foreign-part"]


def test_files_that_are_newer_than_what_is_written_last_are_told(copied: Callable[[str], Path]) -> None:
    folder = copied("fsdp2_2")
    time = (folder / ".metadata").stat().st_mtime
    os.utime(folder / "__1_0.distcp", (time + 50, time + 50))
    assert "later-part" not in [finding.code for finding in formats.read(folder)[0].findings]
    os.utime(folder / "__1_0.distcp", (time + 100, time + 100))
    found = {finding.code: finding.message for finding in formats.read(folder)[0].findings}
    assert "1 file was written after .metadata, which a save writes last: __1_0.distcp" in found["later-part"]


def test_files_that_changed_places_are_found(copied: Callable[[str], Path]) -> None:
    folder = copied("fsdp2_4")
    (folder / "__2_0.distcp").rename(folder / "x")
    (folder / "__3_0.distcp").rename(folder / "__2_0.distcp")
    (folder / "x").rename(folder / "__3_0.distcp")
    with pytest.raises(FormatError, match=r"__[23]_0\.distcp"):
        ckptkit.load(folder)


def test_every_damaged_byte_of_an_item_shows(copied: Callable[[str], Path]) -> None:
    """In the values the checksum does; elsewhere the item is no longer like the others, and is read by itself."""
    folder = copied("weights_alone")
    file = folder / "__0_0.distcp"
    whole = file.read_bytes()
    known, seen = ckptkit.load(folder), 0
    for at in range(0, len(whole), 397):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            found = ckptkit.load(folder)
        except FormatError:
            seen += 1
            continue
        assert all(torch.equal(found[name], known[name]) for name in known), at  # padding, dates
    assert seen > 20
    file.write_bytes(whole)


def test_what_the_ranks_say_apart_is_put_together(
    sharded: Samples, copied: Callable[[str], Path], same_bits: SameBits
) -> None:
    folder = copied("no_collectives")
    expected = {name: value for name, value in flat(sharded["no_collectives"].expected) if value != {}}
    found = dict(flat(ckptkit.load(folder)))
    same({name: found[name] for name in expected}, expected, same_bits)
    checkpoint, file = formats.read(folder)
    assert {replica.name for replica in checkpoint.replicas} >= {"model.norm.running_mean", "model.mask"}
    file.close()
    with pytest.raises(CorruptError, match="leave out"):
        formats.read(folder, tag="1")  # its shards alone


def test_each_rank_may_have_saved_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "each"
    for rank in range(2):
        dcp.save({"w": torch.full((3,), float(rank))}, checkpoint_id=tmp_path / str(rank), no_dist=True)
        folder.mkdir(exist_ok=True)
        metadata = (tmp_path / str(rank) / ".metadata").read_bytes().replace(b"__0_0.distcp", b"__%d_0.distcp" % rank)
        (folder / f"__{rank}.metadata").write_bytes(metadata)
        (tmp_path / str(rank) / "__0_0.distcp").rename(folder / f"__{rank}_0.distcp")
    with pytest.raises(FileAccessError, match=r"each of 2 ranks .* --tag: 0, 1") as caught:
        formats.read(folder)
    assert caught.value.names == ("0", "1")
    with pytest.raises(FileAccessError, match="there is no rank '7'"):
        formats.read(folder, tag="7")
    assert ckptkit.load_state_dict(folder, tag="1")["w"].tolist() == [1.0] * 3


def test_a_checkpoint_of_one_rank_needs_no_tag(tmp_path: Path, same_bits: SameBits) -> None:
    tree = {"model": {"w": torch.arange(6.0)}, "step": 3}
    dcp.save(tree, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / ".metadata").rename(tmp_path / "__0.metadata")
    same(ckptkit.load(tmp_path), tree, same_bits)


def test_more_files_than_a_shell_lets_be_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    tree = {f"w{n}": torch.full((1,), float(n)) for n in range(150)}
    writer = dcp.FileSystemWriter(tmp_path / "many", single_file_per_rank=False, sync_files=False)
    dcp.save(tree, storage_writer=writer, no_dist=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 120, hard))
    try:
        ckptkit.convert(tmp_path / "many", tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert load_file(tmp_path / "out.safetensors") == tree


# Items that are something else.


def replaced(folder: Path, name: str, value: object, write: Callable[[Any, Any], None] = torch.save) -> None:
    """Put another item behind all others, where that of the name was."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, info = next(pair for pair in metadata.storage_data.items() if pair[0].fqn == name)
    file = folder / info.relative_path
    start = file.stat().st_size
    with file.open("ab") as stream:
        write(value, stream)
    info.offset, info.length = start, file.stat().st_size - start
    metadata.storage_data[index] = info
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))


class Runs:
    """Runs a command where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo hostile",)


HOSTILE = Runs()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    tree = {"model": {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5)}, "args": {"lr": 0.1}, "list": [1, "x"]}
    folder = tmp_path / "plain"
    dcp.save(tree, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4, 3), r"is float32 \[4, 3\], not float32 \[3, 4\]"),
        (torch.zeros(3, 4, dtype=torch.int32), r"is int32 \[3, 4\], not float32 \[3, 4\]"),
        ([torch.zeros(3, 4)], "not one plain tensor"),
        ("text", "not one plain tensor"),
        (torch.zeros(3, 4).to_sparse(), "not one plain tensor"),
    ],
)
def test_an_item_must_be_the_one_tensor_that_it_is_said_to_be(plain: Path, value: object, message: str) -> None:
    replaced(plain, "model.a", value)
    assert formats.read(plain)[0].trust == "needs_trust"
    with pytest.raises(CorruptError, match=message):
        ckptkit.load(plain)
    with pytest.raises(CorruptError, match=message):
        ckptkit.convert(plain, plain.parent / "out.safetensors", section="model", weights_only=True)
    assert not (plain.parent / "out.safetensors").exists()


def test_a_hostile_item_of_a_tensor_is_told_by_its_name(plain: Path) -> None:
    replaced(plain, "model.a", HOSTILE)
    with pytest.raises(CorruptError, match=r"not one plain tensor: it names .*system") as caught:
        ckptkit.load(plain)
    assert "dangerous" in [use.verdict for use in caught.value.globals]


def test_a_hostile_object_shows_when_the_folder_is_opened(plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    replaced(plain, "args.lr", HOSTILE)
    checkpoint, file = formats.read(plain)
    assert checkpoint.trust == "hostile"
    assert any("args.lr" in place for use in checkpoint.globals if use.verdict == "dangerous" for place in use.where)
    file.close()
    assert capfd.readouterr().out == ""


def test_an_item_that_is_no_file_of_torch(plain: Path) -> None:
    replaced(plain, "args.lr", b"text", lambda value, stream: stream.write(value))
    with pytest.raises(FormatError, match=r"__0_0\.distcp, 'args\.lr' at byte"):
        formats.read(plain)


def test_strides_of_chunks_are_their_own(tmp_path: Path, same_bits: SameBits) -> None:
    tree = {
        "turned": torch.arange(12.0).reshape(3, 4).t(),
        "wide": torch.arange(4.0).expand(3, 4),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "one": torch.tensor(7),
    }
    dcp.save(tree, checkpoint_id=tmp_path, no_dist=True)
    same(ckptkit.load(tmp_path), tree, same_bits)


# Compressed items.


def test_items_of_zstd_need_what_decompresses_them(sharded: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("this Python decompresses zstd itself")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependencyError, match=r"\[zstd\]"):
        ckptkit.load(sharded["zstd"].folder)


def test_zeros_may_have_shrunk_to_next_to_nothing(tmp_path: Path) -> None:
    """What a chunk takes is known: more than that is refused, but for a part of what any file may become."""
    from torch.distributed.checkpoint._extension import ZStandard

    tree = {"model": {"w": torch.zeros(1000, 1500), "v": torch.arange(1_500_000.0)}, "text": "a" * 1_500_000}
    writer = dcp.FileSystemWriter(tmp_path, sync_files=False, _extensions=[ZStandard()])
    dcp.save({key: tree[key] for key in ("model",)}, storage_writer=writer, no_dist=True)
    limits = DEFAULT_LIMITS._replace(unpacked_nbytes=1 << 20, unpacked_ratio=1)
    checkpoint, file = formats.read(tmp_path, limits=limits)
    assert formats.require_sound(file, checkpoint).trust == "safe"
    assert torch.equal(ckptkit.load(tmp_path)["model"]["v"], tree["model"]["v"])  # type: ignore[index]
    file.close()
    other = dcp.FileSystemWriter(tmp_path / "text", sync_files=False, _extensions=[ZStandard()])
    dcp.save({"text": tree["text"]}, storage_writer=other, no_dist=True)
    with pytest.raises(LimitError, match="bytes of zstd-compressed data"):
        formats.read(tmp_path / "text", limits=limits)


def test_other_transforms_are_not_read(copied: Callable[[str], Path]) -> None:
    folder = copied("zstd")
    file = folder / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"stream.zstd/1", b"stream.zstd/2"))
    with pytest.raises(UnsupportedError, match=r"'stream\.zstd/2'; only stream\.zstd/1 is supported"):
        ckptkit.load(folder)


def test_an_item_that_is_not_compressed_as_it_is_said_to_be(plain: Path) -> None:
    metadata = pickle.loads((plain / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd/1"]
    (plain / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptError, match="is not a zstd frame"):
        formats.read(plain)


# The tree.


def planned(folder: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("model", "b"), "puts another value in its place"),
        (("model", 3), "leads through another value"),
        (("model", "b", "c"), "leads through another value"),
        (("new", 10**9), "a list with the index 1000000000"),
        (("new", -1), "a list with the index -1"),
        (("x",) * 101, "keys that lead to a value"),
    ],
)
def test_paths_that_contradict_each_other(plain: Path, path: tuple[object, ...], message: str) -> None:
    def change(metadata: Any) -> None:
        known = metadata.planner_data
        metadata.planner_data = {"model.b": known.pop("model.b"), **known, "model.a": path}

    planned(plain, change)
    with pytest.raises(FormatError, match=message):
        formats.read(plain)


def test_empty_chunks_may_lie_nowhere_or_where_another_begins(plain: Path) -> None:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    def add(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["model.b"].chunks
        chunks += [ChunkStorageMetadata(torch.Size([at]), torch.Size([0])) for at in (0, 5, 5)]

    planned(plain, add)
    assert torch.equal(ckptkit.load(plain)["model"]["b"], torch.ones(5))


def test_holes_in_lists_are_none_as_in_torch(plain: Path) -> None:
    planned(plain, lambda metadata: metadata.planner_data.update({"args.lr": ("more", 2)}))
    assert ckptkit.load(plain)["more"] == [None, None, 0.1]


def test_without_planner_data_names_are_the_keys(plain: Path) -> None:
    planned(plain, lambda metadata: setattr(metadata, "planner_data", None))
    assert [*ckptkit.load(plain)] == ["model.a", "model.b", "args.lr", "list"]
