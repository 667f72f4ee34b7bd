"""Lists of paths in files, and the shares of a job array."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptkit.errors import FileAccessError, FormatError, MissingFileError, VerifyError
from ckptkit.fleet.shares import Share, paths_from


def test_shares_are_all_paths_each_once() -> None:
    paths = [f"weights/{number}.pth" for number in range(500)] + ["", "a", "名前.pth", "\udcff.bin", "s3://b/k.pth"]
    for count in (1, 2, 7, 600):
        shares = [Share.of(f"{index}/{count}") for index in range(1, count + 1)]
        assert all(sum(share.holds(path) for share in shares) == 1 for path in paths)
    sizes = [sum(share.holds(path) for path in paths) for share in (Share(index, 4) for index in range(1, 5))]
    assert min(sizes) > 90, "none is much smaller than the others"


def test_a_share_is_the_same_everywhere() -> None:
    """On every machine, in every version: what one run left to another must be taken there."""
    assert [index for path in "abcdef" for index in range(1, 4) if Share(index, 3).holds(path)] == [3, 3, 1, 3, 3, 1]
    assert str(Share.of("2/8")) == "2/8"


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/", "a/b", "-1/2", "1/2/3", "1.5/2", " 1/2", "٣/٤", 3, None])
def test_what_is_not_a_share(text: object) -> None:
    with pytest.raises(VerifyError, match="expected I/N"):
        Share.of(text)


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        (b"", []),
        (b"\n\n  \n", []),
        (b"a.pth\nb c.pth\n", ["a.pth", "b c.pth"]),
        (b"a.pth\n\nb.pth", ["a.pth", "b.pth"]),
        (b"a.pth\r\nb.pth\r\n", ["a.pth", "b.pth"]),
        (b"\xef\xbb\xbfa.pth\n", ["a.pth"]),
        (b"a\nb.pth\0c.pth\0", ["a\nb.pth", "c.pth"]),
        (b"a.pth\0\0b.pth", ["a.pth", "b.pth"]),
        (b"\xff.pth\n\xe9\x87\x8d.pth\n", [os.fsdecode(b"\xff.pth"), "重.pth"]),
        (b" lead.pth\n", [" lead.pth"]),
        (b"-", ["-"]),
    ],
)
def test_a_list_of_paths(data: bytes, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list").write_bytes(data)
    assert [*paths_from(str(tmp_path / "list"))] == paths
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert [*paths_from("-")] == paths


def test_a_list_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    for separator in ("\n", "\0"):
        names = [f"folder/{number}-{'x' * (number % 97)}.pth" for number in range(5000)]
        (tmp_path / "list").write_text(separator.join(names), newline="")
        assert [*paths_from(str(tmp_path / "list"))] == names


def test_a_list_is_read_while_it_is_asked_for() -> None:
    class Endless(io.RawIOBase):
        read_so_far = 0

        def read(self, size: int = -1) -> bytes:
            self.read_so_far += size
            return b"a.pth\n" * (size // 6)

    from ckptkit.fleet import shares

    stream = Endless()
    found: Iterator[str] = shares._paths(stream, "list")  # type: ignore[arg-type]
    assert [next(found) for _ in range(3)] == ["a.pth"] * 3
    assert stream.read_so_far < 10_000


def test_what_cannot_be_a_list(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nope: no such file"):
        [*paths_from("nope")]
    with pytest.raises(FileAccessError, match="cannot be read"):
        [*paths_from(str(tmp_path))]
    (tmp_path / "utf16").write_text("a.pth\n", encoding="utf-16")
    with pytest.raises(FormatError, match="is UTF-16 text"):
        [*paths_from(str(tmp_path / "utf16"))]
    (tmp_path / "long").write_bytes(b"x" * (1 << 18))
    with pytest.raises(FormatError, match="has a line of more than 65,536 bytes"):
        [*paths_from(str(tmp_path / "long"))]
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04\0\0/\0")  # a checkpoint, and "/" would be all there is
    with pytest.raises(FormatError, match="is not text; expected a list of paths"):
        [*paths_from(str(tmp_path / "model.pth"))]
