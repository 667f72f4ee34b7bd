"""A sharded destination is one whole checkpoint at every moment: the old one or the new one."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.plans import (
    ASKED,
    INDEX,
    NEW,
    SHARD_SIZES,
    files_of,
    held,
    only,
    posix_only,
    same,
    shard_names,
    unavailable,
)  # fmt: skip

import ckptkit
from ckptkit.errors import DestinationExistsError, FileAccessError

Convert = Callable[..., Path]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # no power fails here


@pytest.fixture
def convert(sources: dict[str, Path], out: Path) -> Convert:
    """``convert("new", 3)``: into so many shards, in the folder of ``out``; returns it."""

    def into(which: str, count: int, name: str = ASKED, **more: Any) -> Path:
        ckptkit.convert(sources[which], out.parent / name, max_shard_size=SHARD_SIZES[count], **more)
        return out.parent

    return into


# What there is before.


def same_count(convert: Convert, folder: Path) -> None:
    convert("old", 3)


def other_count(convert: Convert, folder: Path) -> None:
    convert("old", 2)


def one_file(convert: Convert, folder: Path) -> None:
    convert("old", 1)


def strangers(convert: Convert, folder: Path) -> None:
    for name in shard_names(3)[1:]:
        (folder / name).write_bytes(b"no index names this")


def nothing(convert: Convert, folder: Path) -> None:
    pass


BEFORE = [same_count, other_count, one_file, strangers, nothing]


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", unavailable(errno.EPERM))  # as on FAT


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("before", BEFORE)
def test_what_is_there_afterwards(
    convert: Convert, out: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[..., None], check: bool, links: bool
) -> None:
    if not links:
        no_links(monkeypatch)
    before(convert, out.parent)
    folder = convert("new", 3, force=before is not nothing, check=check)
    assert only(out) == files_of(3)
    assert held(folder) == "new"
    assert all(os.lstat(folder / name).st_nlink == 1 for name in only(out))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert sorted(set(weight_map.values())) == shard_names(3)


def test_only_our_own_stale_shards_are_removed(convert: Convert, out: Path) -> None:
    folder = convert("old", 2)
    index = json.loads((folder / INDEX).read_text())
    odd = [
        "mine.safetensors",
        "model-1-of-2.safetensors",
        "other-00001-of-00002.safetensors",
        ".model.x.tmp.safetensors",
    ]
    customary = ["model-00009-of-00009.safetensors"]
    for name in [*odd, *customary]:
        (folder / name).write_bytes(b"mine")
    index["weight_map"].update({name: name for name in odd})  # named by the index, but not as we name shards
    (folder / INDEX).write_text(json.dumps(index))
    convert("new", 3, force=True)
    assert only(out) == sorted([*files_of(3), *odd, *customary])
    assert held(folder) == "new"


def test_the_one_file_is_removed_where_it_was_asked_for(convert: Convert, out: Path) -> None:
    folder = convert("old", 1)
    old = (folder / ASKED).read_bytes()
    with pytest.raises(DestinationExistsError, match=r"model\.safetensors: already exists; --force"):
        convert("new", 3)
    convert("new", 3, INDEX)  # that is another name
    assert only(out) == sorted([*files_of(3), ASKED])
    convert("new", 2, INDEX, force=True)
    assert (folder / ASKED).read_bytes() == old
    convert("new", 3, ASKED, force=True)
    assert only(out) == files_of(3)


@pytest.mark.parametrize("taken", [*files_of(3), ASKED])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_any_file_of_those_names_refuses(convert: Convert, out: Path, taken: str, kind: str) -> None:
    path = out.with_name(taken)
    if kind == "file":
        path.write_bytes(b"theirs")
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
    error, message = (
        (FileAccessError, "is a folder; name a file")
        if kind == "folder" and taken != ASKED
        else (DestinationExistsError, "already exists; --force overwrites it")
    )
    with pytest.raises(error, match=f"{taken}: {message}"):
        convert("new", 3)
    assert only(out) == [taken]
    assert kind != "file" or path.read_bytes() == b"theirs"


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("taken", files_of(3))
def test_a_name_that_appears_meanwhile(
    convert: Convert, out: Path, monkeypatch: pytest.MonkeyPatch, taken: str, links: bool
) -> None:
    if not links:
        no_links(monkeypatch)
    with pytest.raises(DestinationExistsError, match=f"{taken}: already exists"):
        convert("new", 3, progress=lambda *_: out.with_name(taken).write_bytes(b"theirs"))
    assert out.with_name(taken).read_bytes() == b"theirs"
    assert only(out) == [taken]


# Failures at every step.


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Failing:
    """Calls of some functions of `os` from the main thread, of which the n-th fails, before or after it is done."""

    NAMES = ("replace", "link", "unlink", "fsync", "ftruncate", "pwrite", "open", "posix_fallocate")

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int, failure: Callable[[], BaseException], *, after: bool
    ) -> None:
        self.count = 0
        self.failed: str | None = None
        for name in self.NAMES:
            if hasattr(os, name) and not (after and name == "open"):  # no descriptor is lost by a call that fails
                monkeypatch.setattr(os, name, self._wrapped(name, at, failure, after=after))

    def _wrapped(self, name: str, at: int, failure: Callable[[], BaseException], *, after: bool) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*given: Any, **more: Any) -> Any:
            reads = name == "open" and not given[1] & os.O_CREAT
            if threading.current_thread() is not threading.main_thread() or reads:
                return real(*given, **more)
            self.count += 1
            if self.count - 1 != at:
                return real(*given, **more)
            self.failed = name
            if after:
                real(*given, **more)
            raise failure()

        return call


def broken() -> OSError:
    return OSError(errno.EIO, "Input/output error")


WAYS: dict[str, tuple[Callable[[], BaseException], bool]] = {
    "fails": (broken, False),
    "fails once done": (broken, True),  # as a file system over a network may
    "fails without links": (broken, False),
    "is interrupted": (KeyboardInterrupt, False),
}


def pairs(*thorough: tuple[str, Callable[..., None]]) -> list[Any]:
    """Every way with everything that was before."""
    return [
        pytest.param(way, before, marks=pytest.mark.thorough if (way, before) in thorough else [])
        for before in BEFORE
        for way in WAYS
    ]


@pytest.mark.parametrize(
    ("way", "before"),
    pairs(
        ("fails", same_count),
        ("fails", one_file),
        ("fails once done", other_count),
        ("fails once done", strangers),
        ("fails once done", nothing),
        ("fails without links", one_file),
        ("fails without links", strangers),
        ("fails without links", nothing),
        ("is interrupted", same_count),
        ("is interrupted", other_count),
        ("is interrupted", strangers),
    ),
)
def test_a_failure_at_every_step(
    convert: Convert, out: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[..., None], way: str
) -> None:
    failure, after = WAYS[way]
    links = "without links" not in way
    folder, force = out.parent, before is not nothing
    seen: set[str] = set()
    before(convert, folder)
    was, there = held(folder), contents(folder)
    for at in range(1000):
        for name in only(out):
            (folder / name).unlink()
        for name, content in there.items():
            (folder / name).write_bytes(content)
        with monkeypatch.context() as patch:
            failing = Failing(patch, at, failure, after=after)
            if not links:
                no_links(patch)
            try:
                convert("new", 3, force=force)
            except (FileAccessError, KeyboardInterrupt):
                assert failing.failed
        if failing.failed is None:
            break
        seen.add(failing.failed)
        if contents(folder) == there:
            continue
        now = held(folder)
        assert now in (was, "new")
        if now == was:
            assert contents(folder).items() >= there.items()
        index = json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).exists() else {}
        extra = set(only(out)) - there.keys() - {*files_of(3)} - set(index.values())
        assert len(extra) <= (failing.failed == "unlink"), (at, failing.failed, extra)
        # The next run makes good what is left, but for old shards that the new index does not name.
        stale = there.keys() if now == "new" else set()
        convert("new", 3, force=True, check=False)
        assert set(only(out)) - extra - stale <= {*files_of(3)} <= set(only(out))
        assert held(folder) == "new"
    assert failing.failed is None
    assert seen >= {"unlink", "pwrite", "ftruncate", "open"} - ({"open"} if after else set())
    assert seen >= ({"replace"} if before in (one_file, other_count) or not links else {"link"})


@posix_only
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", BEFORE)
def test_a_signal_during_the_renames_is_heard_after_them(
    convert: Convert,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[..., None],
    number: signal.Signals,
    links: bool,
) -> None:
    class Heard(BaseException):
        pass

    def hear(*_: object) -> None:
        raise Heard

    before(convert, out.parent)
    earlier = signal.signal(number, hear)
    helper = threading.Thread(target=(ended := threading.Event()).wait)  # signals may come to any thread
    helper.start()
    try:
        with monkeypatch.context() as patch:
            if not links:
                no_links(patch)
            for name in ("replace", "link"):
                real = getattr(os, name)
                patch.setattr(os, name, lambda *given, real=real: (os.kill(os.getpid(), number), real(*given)))
            with pytest.raises(Heard):
                convert("new", 3, force=before is not nothing)
        assert signal.getsignal(number) is hear
    finally:
        signal.signal(number, earlier)
        ended.set()
        helper.join()
    assert held(out.parent) == "new"
    assert set(only(out)) - set(files_of(3)) == (set(files_of(2)) - {INDEX} if before is other_count else
                                                 {ASKED} if before is one_file else set())  # fmt: skip


def test_from_another_thread(convert: Convert, out: Path) -> None:
    convert("old", 3)
    thread = threading.Thread(target=convert, args=("new", 3), kwargs={"force": True})
    thread.start()
    thread.join()
    assert held(out.parent) == "new"
    assert only(out) == files_of(3)


def test_a_failing_comparison_leaves_all_as_it_was(
    convert: Convert, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert("old", 3)
    there = contents(out.parent)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data).replace(b"layer4", b"layer5"), at))
    with pytest.raises(ckptkit.CkptkitError):
        convert("new", 3, force=True)
    assert contents(out.parent) == there


# Sources and destinations that are one.


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_is_resharded_where_it_is(
    convert: Convert, out: Path, monkeypatch: pytest.MonkeyPatch, count: int, links: bool
) -> None:
    if not links:
        no_links(monkeypatch)
    folder = convert("new", 3)
    name = ASKED if count == 1 else INDEX
    ckptkit.convert(folder / INDEX, folder / name, max_shard_size=SHARD_SIZES[count], force=True, add_module=True)
    state = ckptkit.load_state_dict(folder / name)
    assert same(state, {f"module.{name}": value for name, value in NEW.items()})
    # Merged into one file, the shards stay: it was not they that were to be overwritten.
    assert only(out) == (sorted([ASKED, *files_of(3)]) if count == 1 else files_of(count))


def test_one_file_is_split_where_it_is(convert: Convert, out: Path) -> None:
    folder = convert("new", 1)
    ckptkit.convert(folder / ASKED, folder / ASKED, max_shard_size=SHARD_SIZES[3], force=True)
    assert only(out) == files_of(3)
    assert held(folder) == "new"


@posix_only
def test_links_to_an_index_and_shards_are_replaced(convert: Convert, out: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    folder = convert("old", 3)
    for name in only(out):
        (folder / name).rename(tmp_path / "cache" / name)
        (folder / name).symlink_to(tmp_path / "cache" / name)
    assert held(folder) == "old"
    with pytest.raises(DestinationExistsError):
        convert("new", 3)
    convert("new", 3, force=True)
    assert only(out) == files_of(3)
    assert held(folder) == "new"
    assert not any((folder / name).is_symlink() for name in only(out))
    assert held(tmp_path / "cache") == "old"


@posix_only
def test_a_link_to_the_folder_is_followed(convert: Convert, out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out.parent)
    convert("new", 3, str(tmp_path / "link" / ASKED))
    assert only(out) == files_of(3)
    assert held(out.parent) == "new"
