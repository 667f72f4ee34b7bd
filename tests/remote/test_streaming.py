"""Values of far files: each byte is fetched once, ahead of who reads, in bounded memory; and what is made of them is
what is made of the local file."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as safetensors_bytes
from support.far import FarStore, below, serving
from support.range_server import range_server

import ckptkit
from ckptkit import compare
from ckptkit.bytesource import SourceFile
from ckptkit.computed import Held
from ckptkit.differences import pairs as pairs_of
from ckptkit.errors import CkptkitError, CorruptError, FileAccessError
from ckptkit.remote import ahead, source
from ckptkit.remote.ahead import ReadAhead
from ckptkit.remote.store import FarFile
from ckptkit.transfer import far, passing, workers
from ckptkit.transfer.passing import InOrder, Passed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PTH, SAFE = "far://bucket/model.pth", "far://bucket/model.safetensors"
BLOCK = 64 << 10
SPARE = 2 * BLOCK + (100 << 10)
"""Bytes of a file's beginning and end, which are read when it is opened and may be read again for its hash."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that goes by size, for files of 2 MB; and several threads read them."""
    monkeypatch.setattr(ahead, "_LEAST_BLOCK", BLOCK)
    monkeypatch.setattr(ahead, "_LARGE_BLOCK", BLOCK)
    monkeypatch.setattr(ahead, "GAP_NBYTES", 4 << 10)
    monkeypatch.setattr(ahead, "MOST_NBYTES", 8 * BLOCK)
    monkeypatch.setattr(ahead, "_AHEAD_NBYTES", 5 * BLOCK)
    monkeypatch.setattr(ahead, "_KEPT_NBYTES", 3 * BLOCK)
    monkeypatch.setattr(source, "_HEAD_NBYTES", 16 << 10)
    monkeypatch.setattr(source, "_HEADER_NBYTES", 16 << 10)
    monkeypatch.setattr(source, "_KEPT_NBYTES", 256 << 10)
    monkeypatch.setattr(source, "_LONG_TAIL_NBYTES", 32 << 10)
    monkeypatch.setattr(source, "_ALONG_NBYTES", 4 << 10)
    monkeypatch.setattr(passing, "_PIECE_NBYTES", BLOCK // 2)
    monkeypatch.setattr(passing, "CONVERTED_NBYTES", 16 << 10)
    monkeypatch.setattr(far, "_TOGETHER_NBYTES", BLOCK // 2)
    monkeypatch.setattr(workers, "MANY_NBYTES", 1)
    monkeypatch.setattr(pairs_of, "MEASURED", 8 << 10)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """2 MB in tensors of 80 kB, and small ones."""
    made = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(100, 200, generator=made) for i in range(25)}
    return tensors | {f"layers.{i}.bias": torch.randn(7, generator=made) for i in range(25)}


@pytest.fixture(scope="module")
def files(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return {PTH: buffer.getvalue(), SAFE: safetensors_bytes(state)}


@pytest.fixture
def store(files: dict[str, bytes]) -> Iterator[FarStore]:
    with serving(files) as served:
        yield served
    assert not [thread for thread in threading.enumerate() if thread.name == "ckptkit-ahead" and _stays(thread)]


def _stays(thread: threading.Thread) -> bool:
    thread.join(5)
    return thread.is_alive()


def _nothing_held() -> bool:
    """Once what was under way when readers were closed has come."""
    under_way = [thread for thread in threading.enumerate() if thread.name == "ckptkit-ahead"]
    return not any(map(_stays, under_way)) and ahead._Room.nbytes == 0


def local(files: dict[str, bytes], url: str, folder: Path) -> Path:
    path = folder / url.rpartition("/")[2]
    path.write_bytes(files[url])
    return path


def at_most_once(store: FarStore, url: str) -> None:
    """Each byte of a file was fetched once, but for its beginning and its end."""
    fetched = sorted((each.offset, each.offset + each.nbytes) for each in store.asked if each.url == url)
    size = len(store.files[url])
    assert sum(end - start for start, end in fetched) <= size + SPARE
    middle = [(start, end) for start, end in fetched if start > 20_000 and end < size - 40_000]
    assert [(a, b) for a, b in pairwise(middle) if a[1] > b[0]] == [], fetched


def tensors_of(path: Path) -> dict[str, Any]:
    return dict(ckptkit.load_state_dict(path))


# Converting.


@pytest.mark.parametrize("url", [PTH, SAFE])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"check": False},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "keep_dtype": ["*.1*.weight"]},
        {"rename": [r"layers\.(\d)\.=>early.\1."]},
        {"max_shard_size": "300kB"},
        {"to": "torch-zip"},
    ],
    ids=lambda options: " ".join(options) or "none",
)
def test_convert_fetches_each_byte_once(
    store: FarStore, files: dict[str, bytes], url: str, options: dict[str, Any], tmp_path: Path
) -> None:
    near = tmp_path / "near"
    near.mkdir()
    report = ckptkit.convert(url, tmp_path / "out.safetensors", **options)
    at_most_once(store, url)
    assert (
        ckptkit.convert(local(files, url, near), near / "out.safetensors", **options).details["plan"]
        == (report.details["plan"])
    )
    made = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    assert made == {path.name: path.read_bytes() for path in near.glob("out*")}  # their receipts, too


def test_the_receipt_has_the_hash_of_what_passed_by(store: FarStore, files: dict[str, bytes], tmp_path: Path) -> None:
    ckptkit.convert(PTH, tmp_path / "out.safetensors")
    with ckptkit.open(tmp_path / "out.safetensors") as made:
        receipt = json.loads(next(value for value in made.metadata.values() if "ckptkit" in value))[-1]
    assert receipt["sha256"] == hashlib.sha256(files[PTH]).hexdigest()


def test_a_part_is_not_fetched_whole_for_a_hash(store: FarStore, tmp_path: Path) -> None:
    ckptkit.convert(SAFE, tmp_path / "out.safetensors", include=["layers.3.*", "layers.1?.weight"])
    assert store.nbytes < 11 * 80_000 + SPARE
    assert len(ckptkit.load_state_dict(tmp_path / "out.safetensors")) == 12
    with ckptkit.open(tmp_path / "out.safetensors") as made:
        assert "sha256" not in next(value for value in made.metadata.values() if "ckptkit" in value)


def test_names_in_another_order_than_they_lie(files: dict[str, bytes], tmp_path: Path) -> None:
    with ckptkit.open(local(files, SAFE, tmp_path)) as known:
        names = [*known.state_dict]
    random.Random(0).shuffle(names)
    state = tensors_of(tmp_path / "model.safetensors")
    buffer = io.BytesIO()
    torch.save({name: state[name].clone() for name in sorted(names)}, buffer)
    with serving({PTH: buffer.getvalue()}) as store:
        ckptkit.convert(PTH, tmp_path / "out.safetensors", to="safetensors")
        at_most_once(store, PTH)
    made = tensors_of(tmp_path / "out.safetensors")
    assert all(torch.equal(made[name], state[name]) for name in names)


def test_views_transposed_and_tied(tmp_path: Path) -> None:
    whole = torch.randn(600, 300)
    tied = torch.randn(100, 200)
    state = {"rows": whole[100:200], "t": whole.t(), "a": tied, "b": tied, "again": whole[300:]}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with serving({PTH: buffer.getvalue()}) as store:
        ckptkit.convert(PTH, tmp_path / "out.safetensors", tied="duplicate")
        assert store.nbytes < 3 * len(buffer.getvalue())  # what is gathered is read by itself
        ckptkit.convert(PTH, tmp_path / "out.pth")
    for path in (tmp_path / "out.safetensors", tmp_path / "out.pth"):
        made = tensors_of(path)
        assert all(torch.equal(made[name], value) for name, value in state.items())


def test_a_sharded_source(store: FarStore, files: dict[str, bytes], tmp_path: Path) -> None:
    ckptkit.convert(local(files, SAFE, tmp_path), tmp_path / "s.safetensors", max_shard_size="500kB")
    shards = {f"far://bucket/{path.name}": path.read_bytes() for path in tmp_path.glob("s-*")}
    assert len(shards) > 3
    index = tmp_path / "s.safetensors.index.json"
    with serving({**shards, f"far://bucket/{index.name}": index.read_bytes()}) as served:
        ckptkit.convert(f"far://bucket/{index.name}", tmp_path / "out.safetensors")
        for url in shards:
            at_most_once(served, url)
        first, _ = tensors_of(tmp_path / "out.safetensors"), served.asked.clear()
        loaded = ckptkit.load_state_dict(f"far://bucket/{index.name}")
        for url in shards:
            at_most_once(served, url)
    assert all(torch.equal(first[name], value) for name, value in loaded.items())


def test_a_folder_of_several_files(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    dcp.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    files = below(tmp_path / "run", "far://bucket/run")
    with serving(files) as store:
        for work in (
            lambda: ckptkit.convert("far://bucket/run", tmp_path / "out.safetensors", force=True),
            lambda: ckptkit.load_state_dict("far://bucket/run"),
            lambda: ckptkit.diff("far://bucket/run", tmp_path / "out.safetensors"),
            lambda: ckptkit.manifest(["far://bucket/run"]),
            lambda: ckptkit.check(["far://bucket/run"], no_nan=True),
            lambda: ckptkit.inspect("far://bucket/run", stats=True),
        ):
            store.asked.clear()
            work()
            assert store.nbytes < 1.2 * sum(map(len, files.values()))  # and the ends of each item
        (record,) = ckptkit.manifest(["far://bucket/run"]).files
    (near,) = ckptkit.manifest([tmp_path / "run"]).files
    assert (record.content_digest, record.whole_digest, record.shards) == (
        near.content_digest,
        near.whole_digest,
        near.shards,
    )
    made = tensors_of(tmp_path / "out.safetensors")
    assert all(torch.equal(made[name], value) for name, value in state.items())


# What is proved of it.


def damaged(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"max_shard_size": "300kB"}])
def test_recorded_checksums_are_held_against_what_passes_by(
    files: dict[str, bytes], options: dict[str, Any], tmp_path: Path
) -> None:
    data = damaged(files[PTH])
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    with pytest.raises(CorruptError) as near:
        ckptkit.convert(path, tmp_path / "near.safetensors", **options)
    with serving({PTH: data}) as store:
        with pytest.raises(CorruptError) as raised:
            ckptkit.convert(PTH, tmp_path / "out.safetensors", **options)
        at_most_once(store, PTH)
        assert raised.value.message == near.value.message
        with pytest.raises(CorruptError, match="CRC-32"):
            ckptkit.load_state_dict(PTH)
    assert [found.name for found in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"to": "torch-zip"}, {"max_shard_size": "300kB"}])
def test_what_is_written_wrongly_is_found(
    store: FarStore, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = far.write_at, [0]

    def write(fd: int, data: Any, target: int) -> None:
        count[0] += 1
        real(fd, damaged(bytes(data)) if count[0] == 7 else data, target)

    monkeypatch.setattr(far, "write_at", write)
    with pytest.raises(CorruptError, match="the output differs at byte"):
        ckptkit.convert(PTH, tmp_path / "out.safetensors", **options)
    assert [*tmp_path.iterdir()] == []


def test_what_is_put_in_the_wrong_place_is_found(
    store: FarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = far._Mover._copy

    def copy(self: Any, fd: int, source: Any, target: int) -> None:
        if not hasattr(self, "swapped"):
            self.swapped = True
            target += 64
        real(self, fd, source, target)

    monkeypatch.setattr(far._Mover, "_copy", copy)
    with pytest.raises(CorruptError, match="the output differs"):
        ckptkit.convert(SAFE, tmp_path / "out.safetensors")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"to": "torch-zip"}, {"max_shard_size": "300kB"}])
@pytest.mark.parametrize("fault", ["another byte", "fewer bytes"])
def test_what_is_read_back_as_something_else_is_found(
    store: FarStore, options: dict[str, Any], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that forgets: what was written is right."""
    real, turns = passing.fill_from, itertools.count(1)

    def fill(fd: int, buffer: bytearray, offset: int) -> int:
        turn, filled = next(turns), real(fd, buffer, offset)
        if turn == 7:
            buffer[len(buffer) // 2] ^= 1
            return filled if fault == "another byte" else filled // 2
        return filled

    monkeypatch.setattr(passing, "fill_from", fill)
    with pytest.raises(CorruptError, match="the output differs at byte"):
        ckptkit.convert(PTH, tmp_path / "out.safetensors", **options)
    at_most_once(store, PTH)
    assert [*tmp_path.iterdir()] == []


def test_what_is_written_over_afterwards_is_found(
    store: FarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, targets = far._Mover._copy, []

    def copy(self: Any, fd: int, source: Any, target: int) -> None:
        real(self, fd, source, target)
        targets.append(target)
        if len(targets) == 40:
            self._write(fd, bytes(10), targets[0] + 100)

    monkeypatch.setattr(far._Mover, "_copy", copy)
    with pytest.raises(CorruptError, match="the output differs at byte"):
        ckptkit.convert(SAFE, tmp_path / "out.safetensors")
    assert [*tmp_path.iterdir()] == []


WHOLE, COMPLEX = torch.randn(600, 300), torch.randn(30, 30, dtype=torch.complex64)


@pytest.mark.parametrize(
    "tensors",
    [
        {"rows": WHOLE[100:200], "t": WHOLE.t(), "a": WHOLE, "b": WHOLE, "again": WHOLE[300:]},
        {"a": torch.randn(500, 500), "b": torch.randn(7), "scalar": torch.tensor(3.0), "none": torch.empty(0)},
        {"conj": COMPLEX.conj(), "imag": COMPLEX.clone().imag},
        {"sparse": torch.eye(30).to_sparse()},
    ],
    ids=["views", "plain", "complex", "sparse"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"to": "safetensors", "tied": "duplicate", "densify": True},
        {"to": "safetensors", "dtype": "float16", "densify": True},
        {"to": "torch-zip"},
        {"to": "torch-zip", "dtype": "float16"},
        {"to": "dcp"},
        {"to": "dcp", "dtype": "bfloat16"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_all_of_it_is_compared_when_it_is_written(
    tensors: dict[str, torch.Tensor], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However tensors lie, none has to be fetched again to be compared."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    for name in ("first_difference", "same_values"):
        monkeypatch.setattr(compare, name, None)
    with serving({PTH: buffer.getvalue()}):
        ckptkit.convert(PTH, tmp_path / "out", **options)


def test_a_conversion_that_is_not_the_same_twice(
    store: FarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptkit.casting import Caster

    real, count = Caster.into, [0]

    def into(self: Caster, values: Any, out: Any) -> None:
        real(self, values, out)
        count[0] += 1
        out[0] ^= count[0] & 1

    monkeypatch.setattr(Caster, "into", into)
    with pytest.raises(CorruptError, match="converting it twice"):
        ckptkit.convert(SAFE, tmp_path / "out.safetensors", dtype="bfloat16")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("check", [True, False])
def test_a_file_that_changes_under_way(
    store: FarStore, check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = FarStore.read, [0]

    def changing(self: FarStore, file: FarFile, offset: int, nbytes: int) -> bytes:
        count[0] += 1
        if count[0] == 12:
            self.files[SAFE] = self.files[SAFE][:-1] + b"\0"
        return read(self, file, offset, nbytes)

    monkeypatch.setattr(FarStore, "read", changing)
    with pytest.raises(CorruptError, match="changed while it was being"):
        ckptkit.convert(SAFE, tmp_path / "out.safetensors", check=check)
    assert [*tmp_path.iterdir()] == []
    assert count[0] < 40


def test_a_file_that_changes_at_the_very_end(store: FarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FarStore, "stamp", lambda self, file: "another")
    with pytest.raises(CorruptError, match="changed while it was being converted"):
        ckptkit.convert(SAFE, tmp_path / "out.safetensors")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("check", [True, False])
def test_a_block_that_cannot_be_fetched(
    store: FarStore, check: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FarStore.read

    def failing(self: FarStore, file: FarFile, offset: int, nbytes: int) -> bytes:
        if offset <= 1_000_000 < offset + nbytes:
            raise FileAccessError("the line is dead", path=file.shown)
        return read(self, file, offset, nbytes)

    monkeypatch.setattr(FarStore, "read", failing)
    with pytest.raises(FileAccessError, match="the line is dead"):
        ckptkit.convert(PTH, tmp_path / "out.safetensors", check=check)
    assert [*tmp_path.iterdir()] == []


# Everything else that reads values.


@pytest.mark.parametrize("url", [PTH, SAFE])
def test_loading(store: FarStore, state: dict[str, torch.Tensor], url: str) -> None:
    loaded = ckptkit.load_state_dict(url)
    at_most_once(store, url)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    store.asked.clear()
    everything = ckptkit.load(url)
    at_most_once(store, url)
    assert all(torch.equal(everything[name], value) for name, value in state.items())
    store.asked.clear()
    ckptkit.load_state_dict(url, map_location="meta")
    assert store.nbytes < 100_000


def test_loading_a_section_leaves_the_rest_where_it_is(state: dict[str, torch.Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save({"model": state, "optimizer": {"state": torch.randn(100)}}, buffer)
    with serving({PTH: buffer.getvalue()}) as store:
        assert ckptkit.load(PTH, section="optimizer")["state"].shape == (100,)
        assert store.nbytes < 500_000


def test_diff_reads_both_files_side_by_side(
    store: FarStore, state: dict[str, torch.Tensor], files: dict[str, bytes], tmp_path: Path
) -> None:
    assert ckptkit.diff(PTH, SAFE).equal
    for url in (PTH, SAFE):
        at_most_once(store, url)
    store.asked.clear()
    path = local(files, PTH, tmp_path)
    assert ckptkit.diff(path, SAFE).equal
    assert ckptkit.diff(SAFE, path).equal
    assert store.nbytes <= 2 * (len(files[SAFE]) + SPARE)


def test_what_differs_is_measured_as_it_comes(
    store: FarStore, state: dict[str, torch.Tensor], files: dict[str, bytes], tmp_path: Path
) -> None:
    other = {name: value + 0.25 if ".1" in name else value for name, value in state.items()}
    other["layers.0.weight"] = state["layers.0.weight"].half()
    last = state["layers.5.weight"].clone()
    last[-1, -1] = 3.0
    other["layers.5.weight"] = last
    store.files["far://bucket/other.safetensors"] = safetensors_bytes(other)
    (tmp_path / "other.safetensors").write_bytes(store.files["far://bucket/other.safetensors"])
    found = ckptkit.diff(PTH, "far://bucket/other.safetensors").to_json()
    for url in (PTH, "far://bucket/other.safetensors"):
        fetched = sum(each.nbytes for each in store.asked if each.url == url)
        assert fetched <= len(store.files[url]) + SPARE + 80_000  # what was equal of layers.5.weight, again
    near = ckptkit.diff(local(files, PTH, tmp_path), tmp_path / "other.safetensors").to_json()
    strip = str(tmp_path)
    assert json.loads(found.replace("far://bucket", strip)) == json.loads(near)


def test_manifest_and_check_take_one_pass(
    store: FarStore, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "lock.json"
    monkeypatch.chdir(tmp_path)
    local(files, PTH, tmp_path)
    manifest.write_text(json.dumps(ckptkit.manifest([tmp_path / "model.pth"]).to_dict()))
    (tmp_path / "model.pth").unlink()
    for asked in ({"no_nan": True}, {"manifest": manifest}):
        store.asked.clear()
        assert ckptkit.check([PTH], **asked).ok
        at_most_once(store, PTH)
    store.asked.clear()
    store.files[PTH] = damaged(files[PTH])  # of the same size, so that its hash alone tells
    found = [finding.code for finding in ckptkit.check([PTH], manifest=manifest).findings]
    assert found == ["tensors-differ", "damaged"]
    at_most_once(store, PTH)
    store.asked.clear()
    with ckptkit.open(PTH) as opened:
        ckptkit.inspect(PTH, stats=True)
        assert opened.format == "torch-zip"
    assert sum(each.nbytes for each in store.asked) <= len(files[PTH]) + 2 * SPARE


@pytest.mark.parametrize("command", [ckptkit.check, ckptkit.manifest])
def test_small_and_large_tensors_side_by_side(command: Callable[[list[str]], object]) -> None:
    tensors = {f"layers.{i}.{name}": torch.randn(n) for i in range(40) for name, n in (("weight", 25_000), ("bias", 9))}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with serving({PTH: buffer.getvalue()}) as served:
        command([PTH])
        at_most_once(served, PTH)
        assert len(served.asked) <= len(buffer.getvalue()) // BLOCK + 10


def test_one_tensor_is_a_few_requests(store: FarStore, state: dict[str, torch.Tensor]) -> None:
    with ckptkit.open(SAFE) as opened:
        store.asked.clear()
        assert torch.equal(opened.state_dict["layers.4.weight"].torch(), state["layers.4.weight"])
    assert len(store.of("read")) == 1


def test_a_compressed_file_is_fetched_once(state: dict[str, torch.Tensor], files: dict[str, bytes]) -> None:
    import gzip

    with serving({f"{PTH}.gz": gzip.compress(files[PTH], 1)}) as store:
        loaded = ckptkit.load_state_dict(f"{PTH}.gz")
        at_most_once(store, f"{PTH}.gz")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_several_threads_read_one_file(store: FarStore, state: dict[str, torch.Tensor]) -> None:
    found: list[bool] = []

    def work() -> None:
        loaded = ckptkit.load_state_dict(PTH)
        found.append(all(torch.equal(loaded[name], value) for name, value in state.items()))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


# Reading ahead, by itself.

DATA = random.Random(1).randbytes(40 * BLOCK + 1234)


class Line:
    """What reads ahead fetches from here; it tells what was fetched, and how much was held at most."""

    def __init__(self, pause: float = 0.0) -> None:
        self.asked: list[tuple[int, int]] = []
        self.pause = pause
        self.most = 0

    def read(self, offset: int, nbytes: int) -> bytes:
        self.asked.append((offset, nbytes))
        self.most = max(self.most, ahead._Room.nbytes)
        if self.pause:
            time.sleep(self.pause)
        return DATA[offset : offset + nbytes]

    def ahead(self, areas: Sequence[tuple[int, int]], seen: Callable[[int, memoryview], object] | None = None) -> Any:
        return ReadAhead(self.read, areas, seen)


def read(reader: ReadAhead, offset: int, nbytes: int) -> bytes:
    """What is brought of these bytes."""
    parts = []
    while nbytes and (found := reader.find(offset, nbytes)):
        parts.append(bytes(found.data))
        offset, nbytes = offset + len(parts[-1]), nbytes - len(parts[-1])
    return b"".join(parts)


def test_blocks_are_of_their_size_and_each_byte_is_in_one() -> None:
    line = Line()
    seen: list[tuple[int, int]] = []
    reader = line.ahead([(0, len(DATA))], lambda start, data: seen.append((start, len(data))))
    assert b"".join(read(reader, at, 10_000) for at in range(0, len(DATA), 10_000)) == DATA
    reader.close()
    assert sorted(seen) == sorted(line.asked)
    assert all(BLOCK <= nbytes < 2 * BLOCK for _, nbytes in line.asked)
    assert sum(nbytes for _, nbytes in line.asked) == len(DATA)
    assert line.most <= 9 * BLOCK
    assert _nothing_held()


def test_gaps_and_overlaps() -> None:
    line = Line()
    areas = [(5000, 100), (5100, 200), (9000, 70_000), (50_000, 100_000), (300_000, 10), (299_000, 20), (5000, 100)]
    reader = line.ahead(areas)
    for offset, nbytes in areas:
        assert read(reader, offset, nbytes) == DATA[offset : offset + nbytes]
    assert read(reader, 200_000, 10) == b""
    reader.close()
    assert len(line.asked) == 3
    assert sum(nbytes for _, nbytes in line.asked) == 145_000 + 1010


@pytest.mark.parametrize("seed", range(5))
def test_any_order_gives_the_right_bytes(seed: int) -> None:
    made = random.Random(seed)
    areas = [(made.randrange(len(DATA)), made.randrange(1, 3 * BLOCK)) for _ in range(40)]
    areas = [(offset, min(nbytes, len(DATA) - offset)) for offset, nbytes in areas]
    line = Line()
    reader = line.ahead(areas)
    wanted = areas if seed % 2 else made.sample(areas, len(areas))
    for offset, nbytes in wanted:
        got = read(reader, offset, nbytes)  # what was let go of is missing, and read by range
        assert got == DATA[offset : offset + len(got)]
    reader.close()
    fetched = sorted((offset, offset + nbytes) for offset, nbytes in line.asked)
    assert all(end <= start for (_, end), (start, _) in pairwise(fetched))
    assert _nothing_held()


def test_a_reader_who_stops_early_leaves_no_thread() -> None:
    line = Line(pause=0.05)
    reader = line.ahead([(0, len(DATA))])
    assert read(reader, 0, 10) == DATA[:10]
    assert [thread for thread in threading.enumerate() if thread.name == "ckptkit-ahead"]
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ckptkit-ahead" and _stays(thread)]
    assert len(line.asked) <= 6
    assert reader.find(0, 10) is None
    assert _nothing_held()


def test_who_waits_is_told_that_it_is_closed() -> None:
    line = Line(pause=0.3)
    reader = line.ahead([(0, len(DATA))])
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(reader.find(5, 1))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    reader.close()
    for thread in threads:
        thread.join(5)
    assert found == [None, None]


def test_what_idle_readers_hold_is_given_to_others() -> None:
    line = Line()
    readers = [line.ahead([(0, len(DATA))]) for _ in range(6)]
    for reader in readers:
        assert read(reader, 0, len(DATA)) == DATA
    assert line.most <= 13 * BLOCK
    for reader in readers:
        reader.close()
    assert _nothing_held()


def test_a_problem_is_told_to_each_who_wants_the_block() -> None:
    def dead(offset: int, nbytes: int) -> bytes:
        if offset >= 4 * BLOCK:
            raise FileAccessError("the line is dead")
        return DATA[offset : offset + nbytes]

    reader = ReadAhead(dead, [(0, 8 * BLOCK)])
    assert read(reader, 0, 4 * BLOCK) == DATA[: 4 * BLOCK]
    for _ in range(2):
        with pytest.raises(FileAccessError, match="the line is dead"):
            reader.find(6 * BLOCK, 1)
    reader.close()


@pytest.mark.parametrize("shift", [1, 7, 20])
def test_a_hash_of_runs_that_come_out_of_order(shift: int) -> None:
    cuts = [*range(0, len(DATA), BLOCK), len(DATA)]
    runs = [(a, memoryview(DATA)[a:b]) for a, b in pairwise(cuts)]
    digest = InOrder(len(DATA))
    for at in range(0, len(runs), shift):
        for start, run in reversed(runs[at : at + shift]):
            digest(start, run)
    whole = Held(DATA, "data")
    assert digest.hexdigest(whole) == hashlib.sha256(DATA).hexdigest()
    some = InOrder(len(DATA))
    some(*runs[1])
    assert some.hexdigest(whole) == hashlib.sha256(DATA).hexdigest()


def test_what_did_not_pass_by_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    file = SourceFile(tmp_path / "data")
    written = SourceFile(tmp_path / "data")
    fd, known = os.open(tmp_path / "data", os.O_RDWR), Passed()
    known.note(file.whole.part(0, 100), fd, 50)
    known.note(file.whole.part(100, 100), fd, 150)
    known.read_back(fd, DATA[50:150], 50)
    known.read_back(fd, DATA[150:200] + bytes([DATA[200] ^ 1]) + DATA[201:250], 150)
    known.note(file.whole.part(200, 100), fd, 250)  # but nothing was
    known.settle()
    for offset, nbytes, at, same in [
        (0, 100, 50, 100), (100, 100, 150, 50), (200, 100, 250, None),
        (0, 100, 51, None), (0, 99, 50, None), (1, 100, 50, None),
    ]:  # fmt: skip
        assert known.same(file.whole.part(offset, nbytes), written.whole.part(at, nbytes)) == same
    assert known.same(file.whole.part(0, 100), Held(DATA, "data").whole.part(50, 100)) is None
    os.close(fd)
    file.close()
    written.close()


def test_what_is_written_over_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(DATA)
    with open(tmp_path / "data", "r+b") as output:
        written = SourceFile(tmp_path / "data")
        for over in range(90, 210, 10):
            known = Passed()
            known.note(written.whole.part(0, 100), output.fileno(), 100)
            known.read_back(output.fileno(), DATA[100:200], 100)
            known.will_write(output.fileno(), over, 4)
            known.settle()
            same = known.same(written.whole.part(0, 100), written.whole.part(100, 100))
            assert same == (None if 100 <= over < 200 else 100)
        written.close()


def test_errors_of_far_files_are_ours(store: FarStore, tmp_path: Path) -> None:
    store.failing[SAFE] = "gone"
    with pytest.raises(CkptkitError, match="gone"):
        ckptkit.convert(SAFE, tmp_path / "out.pth")


@pytest.mark.parametrize(
    "command",
    [
        lambda url, out: ckptkit.convert(url, out),
        lambda url, out: ckptkit.check([url]),
        lambda url, out: ckptkit.manifest([url]),
        lambda url, out: ckptkit.diff(url, url),
        lambda url, out: ckptkit.load_state_dict(url),
    ],
    ids=["convert", "check", "manifest", "diff", "load_state_dict"],
)
def test_an_interrupt_is_heard_while_a_server_says_nothing(
    command: Callable[[str, Path], object], files: dict[str, bytes], tmp_path: Path
) -> None:
    with range_server() as server:
        server.files["model.pth"] = files[PTH]
        ckptkit.inspect(f"{server.url}/model.pth")
        looked = 2 * len(server.asked) + 1
        server.before = lambda path: len(server.asked) <= looked or (stalled.set(), server.closing.wait(30))
        stalled = threading.Event()
        main = threading.main_thread().ident
        assert main is not None

        def interrupt() -> None:
            if stalled.wait(10):
                time.sleep(0.1)  # until others wait as well
                signal.pthread_kill(main, signal.SIGINT)

        other = threading.Thread(target=interrupt)
        other.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            command(f"{server.url}/model.pth", tmp_path / "out.safetensors")
        assert time.monotonic() - began < 5
        other.join()
    assert list(tmp_path.iterdir()) == []
