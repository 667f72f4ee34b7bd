"""A far file as a source: what was read is kept; what is left until values are read is looked at before that."""

from __future__ import annotations

import io
import random
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from support import zip_samples
from support.far import FarStore, little_by_little, serving

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import Source, SourceFile
from ckptkit.errors import AmbiguousError, CkptkitError, CorruptError, FormatError
from ckptkit.formats.zip_archive import read_directory
from ckptkit.released.examine import examine_file
from ckptkit.remote import RemoteSource, source_at

URL = "far://bucket/"
FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def store() -> Iterator[FarStore]:
    with serving({}) as store:
        yield store


def opened(store: FarStore, data: bytes, name: str = "file") -> RemoteSource:
    store.files[URL + name] = data
    source = source_at(URL + name)
    store.asked.clear()
    return source


# What was read is kept.


def test_reads_of_all_kinds_give_the_bytes(store: FarStore) -> None:
    chance = random.Random(7)
    data = chance.randbytes(300_000)
    with little_by_little():
        for _ in range(5):
            source = opened(store, data)
            for _ in range(300):
                offset = chance.randrange(len(data))
                nbytes = min(chance.choice([1, 7, 100, 5000, 60_000]), len(data) - offset)
                kind = chance.randrange(4)
                if kind == 0:
                    assert source.read(offset, nbytes) == data[offset : offset + nbytes]
                elif kind == 1:
                    assert source.tail(nbytes) == data[-nbytes:]
                elif kind == 2:
                    wanted = [(max(0, offset - step), nbytes) for step in chance.sample(range(90_000), 5)]
                    assert list(source.ranges(wanted)) == [data[at : at + size] for at, size in wanted]
                else:
                    source.settle([(offset, nbytes)])
            assert sum(map(len, source._spans.values())) == source._kept
            starts = [(start, start + len(source._spans[start])) for start in source._starts]
            assert all(end <= begin for (_, end), (begin, _) in pairwise(starts))


def test_nothing_is_asked_for_twice(store: FarStore) -> None:
    source = opened(store, bytes(1 << 20))
    source.read(500_000, 10)
    source.tail(60_000)
    store.asked.clear()
    source.read(500_005, 1000)
    source.read((1 << 20) - 50_000, 50_000)
    source.read(0, 60_000)
    assert store.asked == []
    for offset in range(600_000, 900_000, 1000):  # one after the other: ever more at once
        source.read(offset, 1000)
    assert len(store.asked) <= 5
    source.release()
    assert source.read(500_000, 10) == bytes(10)


def test_what_is_kept_is_bounded(store: FarStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.remote.source._KEPT_NBYTES", 400_000)
    data = random.Random(1).randbytes(4_000_000)
    source = opened(store, data)
    for offset in range(0, 4_000_000, 50_000):
        assert source.read(offset, 50_000) == data[offset : offset + 50_000]
    assert source._kept <= 400_000
    wanted = [(offset, 20_000) for offset in range(0, 4_000_000, 100_000)]
    assert list(source.ranges(wanted)) == [data[at : at + size] for at, size in wanted]
    assert source._kept <= 400_000


def test_siblings_are_opened_side_by_side(store: FarStore) -> None:
    names = [f"part{number}" for number in range(12)]
    index = opened(store, b"index")
    store.files.update({URL + name: name.encode() for name in names[:10]})
    threads: set[str] = set()
    real = store.open
    store.open = lambda url, nbytes: threads.add(threading.current_thread().name) or real(url, nbytes)  # type: ignore[method-assign]
    index.will_open(names)
    assert len(store.asked) == 12
    assert threading.current_thread().name not in threads
    store.asked.clear()
    assert [index.sibling(name).read(0, 5) for name in names[:10]] == [name.encode()[:5] for name in names[:10]]
    assert store.asked == []
    for name in names[10:]:
        with pytest.raises(CkptkitError, match="no such file"):
            index.sibling(name)
    index.close()


# What is left until values are read.


def test_looks_are_taken_in_passing_or_at_the_end_and_once(store: FarStore) -> None:
    data = random.Random(3).randbytes(1_000_000)
    source = opened(store, data)
    seen: list[tuple[int, bytes]] = []

    def leave(offset: int, nbytes: int) -> None:
        assert source.on_read(offset, nbytes, lambda found: seen.append((offset, found)))

    leave(10, 100)
    assert seen == [(10, data[10:110])]
    seen.clear()
    places = [*range(200_000, 900_000, 50_000)]
    for place in random.Random(4).sample(places, len(places)):
        leave(place, 100)
    assert (seen, source.left) == ([], len(places))
    source.read(200_000, 60_000)
    assert sorted(seen) == [(place, data[place : place + 100]) for place in (200_000, 250_000)]
    source.came(280_000, data[280_000:300_050])  # half of one
    source.came(300_050, data[300_050:320_000])  # and the other
    source.settle([(350_100, 0), (400_000, 0)])
    assert {place for place, _ in seen} == {200_000, 250_000, 350_000, 400_000}
    source.settle()
    assert sorted(seen) == [(place, data[place : place + 100]) for place in places]
    source.settle()
    assert len(seen) == len(places)


def test_what_is_wrong_stays_wrong(store: FarStore) -> None:
    source = opened(store, bytes(500_000))

    def refuse(data: bytes) -> None:
        raise CorruptError("this is wrong")

    source.on_read(300_000, 10, refuse)
    for attempt in (source.settle, source.settle, source.changed, lambda: source.read(299_000, 2000)):
        with pytest.raises(CorruptError, match="this is wrong"):
            attempt()


def saved(state: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


STATE = {f"layer.{number}.weight": torch.full((20_000,), float(number)) for number in range(12)}


def values_read(path: str, tmp_path: Path) -> Iterator[Callable[[], object]]:
    """All that reads values, or says that a file is as it must be."""
    out = tmp_path / "out.safetensors"
    yield lambda: ckptkit.convert(path, out, force=True)
    yield lambda: ckptkit.convert(path, out, include=["layer.0.*"], force=True)
    yield lambda: ckptkit.load(path)
    yield lambda: ckptkit.load_state_dict(path)
    yield lambda: ckptkit.diff(path, path)
    yield lambda: examine_file(path, hash_file=True, digest=True, values=False)
    yield lambda: ckptkit.inspect(path, stats=True)
    yield lambda: examine_file(path, hash_file=False, digest=False, values=True)


def test_a_header_that_lies_is_told_before_values_are_given(store: FarStore, tmp_path: Path) -> None:
    honest = saved(STATE)
    name = b"archive/data/7"
    for find, replace in ((name, b"archive/data/8"), (b"FB", b"up")):
        at = honest.index(name) if find is name else honest.index(b"FB", honest.index(name))
        store.files[URL + "model.pth"] = data = honest[:at] + replace + honest[at + len(replace) :]
        (tmp_path / "model.pth").write_bytes(data)
        with pytest.raises(CkptkitError) as local:
            formats.read(tmp_path / "model.pth")
        assert len(ckptkit.inspect(URL + "model.pth")["tensors"]) == 12
        for read in values_read(URL + "model.pth", tmp_path):
            with pytest.raises(type(local.value)) as caught:
                read()
            assert str(caught.value).replace(URL, "") == str(local.value).replace(f"{tmp_path}/", "")
            assert not (tmp_path / "out.safetensors").exists()
        with ckptkit.open(URL + "model.pth") as file:
            assert file.state_dict["layer.1.weight"].torch()[0] == 1
            for _ in range(2):
                with pytest.raises(AmbiguousError):
                    file.state_dict["layer.7.weight"].torch()


def test_a_count_of_an_old_file_that_lies(store: FarStore, tmp_path: Path) -> None:
    state = {name: torch.zeros(120_000) for name in STATE}
    data = saved(state, _use_new_zipfile_serialization=False)
    count = struct.pack("<q", 120_000)
    at = data.rindex(count)
    for value in (struct.pack("<q", 120_001), struct.pack(">q", 120_000)):
        store.files[URL + "model.pth"] = bad = data[:at] + value + data[at + 8 :]
        (tmp_path / "model.pth").write_bytes(bad)
        with pytest.raises(CkptkitError) as local:
            formats.read(tmp_path / "model.pth")
        ckptkit.inspect(URL + "model.pth")
        for read in values_read(URL + "model.pth", tmp_path):
            with pytest.raises(type(local.value)) as caught:
                read()
            assert str(caught.value).replace(URL, "") == str(local.value).replace(f"{tmp_path}/", "")


def test_a_file_that_is_a_zip_archive_by_its_end(store: FarStore, tmp_path: Path) -> None:
    data = safetensors_bytes({"layer.0.weight": torch.zeros(50_000)})
    archive = zip_samples.archive()
    at = len(data) - len(archive)
    path = URL + "model.safetensors"
    store.files[path] = data[:at] + _moved(archive, at)
    ckptkit.inspect(path)
    for read in values_read(path, tmp_path):
        with pytest.raises(AmbiguousError, match="safetensors and a zip archive"):
            read()
    with pytest.raises(AmbiguousError, match="at once"):  # though nothing is asked for
        examine_file(path, hash_file=False, digest=False, values=False)


def _moved(archive: bytes, by: int) -> bytes:
    """The archive as it stands behind other bytes, with places that fit."""
    at = archive.index(zip_samples.END)
    directory = struct.unpack_from("<I", archive, at + 16)[0]
    return zip_samples.patched(archive, zip_samples.END, 16, "<I", directory + by)


SAMPLES = {
    "whole": zip_samples.archive(),
    "second name": zip_samples.with_second_name(),
    "second name in the header": zip_samples.with_local_second_name(),
    "first record hidden": zip_samples.hidden_first_record(),
    "gap": zip_samples.with_gap(b"gap"),
    "gap as large as a descriptor": zip_samples.with_gap(bytes(16)),
    "record between": zip_samples.hidden_record_between(),
    "record behind": zip_samples.hidden_record_behind(),
    "descriptor": zip_samples.with_descriptor(b"PK\x07\x08", "<III", None, 5, 5),
    "bare descriptor": zip_samples.with_descriptor(b"", "<III", None, 5, 5),
    "wide descriptor": zip_samples.with_descriptor(b"PK\x07\x08", "<IQQ", None, 5, 5),
    "descriptor that lies": zip_samples.with_descriptor(b"PK\x07\x08", "<III", None, 5, 6),
    "descriptor not announced": zip_samples.with_descriptor(b"PK\x07\x08", "<III", None, 5, 5, flag=0),
    "other size": zip_samples.patched(zip_samples.archive(), zip_samples.LOCAL, 22, "<I", 9, nth=1),
    "longer extra field": zip_samples.patched(zip_samples.archive(), zip_samples.LOCAL, 28, "<H", 4, nth=1),
    "longer name": zip_samples.patched(zip_samples.archive(), zip_samples.LOCAL, 26, "<H", 9, nth=1),
    "no header": zip_samples.patched(zip_samples.archive(), zip_samples.LOCAL, 0, "<I", 0, nth=1),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_archives_that_readers_disagree_about(name: str, store: FarStore, tmp_path: Path) -> None:
    def told(source: Source) -> object:
        try:
            records = read_directory(source)
            source.settle()
        except FormatError as error:
            return type(error), error.message
        return {key: (record.data.offset, record.data.read()) for key, record in records.items()}

    (tmp_path / "file").write_bytes(SAMPLES[name])
    expected = told(SourceFile(tmp_path / "file"))
    assert told(opened(store, SAMPLES[name])) == expected
    with little_by_little():
        assert told(opened(store, SAMPLES[name])) == expected


DAMAGED = sorted(path.name for path in FIXTURES.iterdir() if path.suffix in (".pth", ".pt", ".safetensors"))


# Of the large one each of the looks takes as long as all of those into a small one.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.thorough if name == "ddp_resume.pth" else []) for name in DAMAGED],
)
def test_bits_flipped_it_is_refused_as_the_local_file_is(name: str, store: FarStore, tmp_path: Path) -> None:
    def told(path: str, *, values: bool) -> str | None:
        try:
            if values:
                return examine_file(path, hash_file=False, digest=False, values=True).damage
            formats.read(path)[1].close()
        except CkptkitError as error:
            return f"{type(error).__name__}: {error}".replace(URL, "").replace(f"{tmp_path}/", "")
        return None

    data = (FIXTURES / name).read_bytes()
    step = max(1, len(data) // 40)
    refused = 0
    with little_by_little():
        for place in [*range(0, 40, 3), *range(40, len(data), step), *range(len(data) - 22, len(data))]:
            bad = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
            (tmp_path / name).write_bytes(bad)
            store.files[URL + name] = bad
            local = told(str(tmp_path / name), values=False)
            far = told(URL + name, values=False)
            if far is None and local is not None:  # the look that refuses it was left for later
                far = told(URL + name, values=True)
            # A local archive of which no header follows another is said to be cut off.
            assert far == local or (far is not None and local is not None and "truncated" in local)
            refused += far is not None
    assert refused
