"""Damage is seen by whoever reads the bytes: recorded checksums are held by every command that does, and by loading."""

from __future__ import annotations

import json
import os
import random
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptkit
from ckptkit import CorruptError
from ckptkit.transfer.checksums import _LAGS, _ONE, Checksums, _shift, combined, crc32

SaveAs = Callable[..., Path]
Run = Callable[..., Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


def record_at(path: Path, name: str) -> tuple[int, int]:
    """First byte and size of a record of an archive, found with Python's own reader."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(f"/{name}"))
    header = path.read_bytes()[info.header_offset :][:30]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + 30 + lengths, info.compress_size


def flipped(path: Path, key: int | str, at: int = 0) -> Path:
    """The file with one bit of a storage flipped, in the byte at this position of it."""
    start, nbytes = record_at(path, f"data/{key}")
    with path.open("r+b") as file:
        file.seek(start + at % nbytes)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    return path


def repacked(path: Path, *, deflated: bool) -> Path:
    """The archive written anew by Python's own writer."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


def plain(save: SaveAs) -> tuple[Path, str]:
    return flipped(save({f"l{i}.w": torch.full((64,), 0.5) for i in range(5)}), 3, -1), "l3.w"


def viewed(save: SaveAs) -> tuple[Path, str]:
    whole = torch.arange(100.0)
    return flipped(save({"head": whole[:10], "tail": whole[50:60]}), 0, -1), "head"


def transposed(save: SaveAs) -> tuple[Path, str]:
    return flipped(save({"w": torch.randn(30, 20).t()}), 0), "w"


def tied(save: SaveAs) -> tuple[Path, str]:
    weight = torch.randn(9, 9)
    return flipped(save({"a": torch.ones(2), "wte": weight, "lm_head": weight}), 1), "wte"


def quantized(save: SaveAs) -> tuple[Path, str]:
    value = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
    return flipped(save({"bias": torch.ones(8), "q": value}), 1), "q"


def deflated(save: SaveAs) -> tuple[Path, str]:
    path = repacked(save({"a": torch.ones(8), "w": torch.randn(500)}, "deflated.pth"), deflated=True)
    start, nbytes = record_at(path, "data/1")
    data = bytearray(path.read_bytes())
    data[start + nbytes // 2] ^= 0x40
    path.write_bytes(data)
    return path, "w"


def of_several_pieces(save: SaveAs) -> tuple[Path, str]:
    return flipped(save({"a": torch.ones(3), "large": torch.zeros(4_500_001)}), 1, -1), "large"


KINDS = [plain, viewed, transposed, tied, quantized, deflated, of_several_pieces]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def damaged(request: pytest.FixtureRequest, save: SaveAs) -> tuple[Path, str]:
    """A file with one bit flipped that ``torch.load`` does not notice, and the tensor it is in."""
    path, name = request.param(save)
    assert isinstance(path, Path) and isinstance(name, str)
    return path, name


def test_the_library_loads_them_without_a_word(save: SaveAs) -> None:
    path, name = plain(save)
    assert not torch.equal(torch.load(path)[name], torch.full((64,), 0.5))


def test_check(damaged: tuple[Path, str], command: Any) -> None:
    path, name = damaged
    report = ckptkit.check(path)
    (finding,) = report.findings
    assert (finding.code, finding.severity, finding.rule, report.exit_code) == ("damaged", "error", "readable", 1)
    assert f"tensor {name!r}: " in finding.message and "--ignore-checksums" in finding.message
    good = path.with_name("good.safetensors")
    save_file({"w": torch.ones(2)}, good)
    document = json.loads(command("check", path, good, "--json").out)
    assert {file["path"]: file["ok"] for file in document["files"]} == {str(path): False, str(good): True}
    if path.name != "deflated.pth":  # which cannot be inflated at all
        assert ckptkit.check(path, ignore_checksums=True).exit_code == 0


def test_manifest_and_what_it_recorded(damaged: tuple[Path, str], command: Any) -> None:
    path, name = damaged
    with pytest.raises(CorruptError, match=f"tensor {name!r}: .*--ignore-checksums") as caught:
        ckptkit.manifest([path])
    assert caught.value.path == str(path)
    if path.name == "deflated.pth":
        return
    lock = path.with_name("lock.json")
    assert command("manifest", path, "-o", lock, "--ignore-checksums").code == 0
    report = ckptkit.check(path, manifest=lock)
    assert report.exit_code == 0, "the hash that the manifest has is proof enough"
    flipped(path, 0, 1)
    assert {finding.code for finding in ckptkit.check(path, manifest=lock).findings} == {"damaged", "tensors-differ"}


@pytest.mark.parametrize("number", [0, 1])
def test_diff(damaged: tuple[Path, str], number: int, tmp_path: Path, command: Any) -> None:
    path, name = damaged
    other = tmp_path / "other.pth"
    inflates = path.name != "deflated.pth"
    torch.save(torch.load(path) if inflates else {"a": torch.ones(8), "w": torch.zeros(500)}, other)
    pair = (path, other) if number == 0 else (other, path)
    with pytest.raises(CorruptError, match=f"tensor {name!r}: ") as caught:
        ckptkit.diff(*pair)
    assert caught.value.path == str(path)
    assert command("diff", *pair).code == 2
    if inflates:
        assert ckptkit.diff(*pair, ignore_checksums=True).equal


def test_a_file_that_differs_is_summed_to_its_end(save: SaveAs) -> None:
    a = save({"w": torch.zeros(500_000), "x": torch.ones(3)}, "a.pth")
    b = flipped(save({"w": torch.ones(500_000), "x": torch.ones(3)}, "b.pth"), 0, -1)
    with pytest.raises(CorruptError, match="tensor 'w'"):
        ckptkit.diff(a, b)
    renamed = flipped(save({"v": torch.zeros(500_000), "x": torch.ones(3)}, "c.pth"), 0)
    with pytest.raises(CorruptError, match="tensor 'v'"):
        ckptkit.diff(a, renamed)


def test_statistics(damaged: tuple[Path, str], command: Any) -> None:
    path, name = damaged
    document = ckptkit.inspect(path, stats=True)
    if name == "q":  # its bytes are no tensor's that is listed
        return
    (finding,) = [finding for finding in document["findings"] if finding["code"] == "damaged"]
    assert finding["severity"] == "error" and f"tensor {name!r}: " in finding["message"]
    done = command("inspect", "--stats", "--json", path)
    assert done.code == 1 and json.loads(done.out)["files"][0]["tensors"]
    assert command("inspect", path).code == 0, "nothing was read"
    if path.name != "deflated.pth":
        assert command("inspect", "--stats", "--ignore-checksums", path).code == 0


def test_loading(damaged: tuple[Path, str]) -> None:
    path, name = damaged
    if name == "q":  # no plain tensor, and not loaded
        return
    for location in (None, "cpu", {"cpu": "cpu"}, lambda storage, _: storage):
        with pytest.raises(CorruptError, match=f"tensor {name!r}: .*--ignore-checksums") as caught:
            ckptkit.load_state_dict(path, map_location=location)
        assert caught.value.path == str(path)
    ckptkit.load_state_dict(path, map_location="meta")
    if path.name != "deflated.pth":
        state = ckptkit.load_state_dict(path, ignore_checksums=True)
        assert all(torch.equal(value, state[key]) for key, value in torch.load(path).items())


def test_verify(save: SaveAs, tmp_path: Path, run: Run) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef net(): return nn.Linear(20, 30)\n")
    path = save(nn.Linear(20, 30).state_dict())
    good = save(nn.Linear(20, 30).state_dict(), "good.pth")
    flipped(path, 0)
    for command in (
        ["verify", path, "--model", "net.py:net", "--no-forward"],
        ["verify", good, "--model", "net.py:net", "--input-shape", "1,20", "--against", path],
    ):
        done = run(*command)
        assert done.returncode == 2 and "tensor 'weight': " in done.stderr and "Traceback" not in done.stderr
    assert run("verify", path, "--model", "net.py:net", "--no-forward", "--ignore-checksums").returncode == 0
    inputs = flipped(save({"0": torch.randn(1, 20)}, "inputs.pth"), 0)
    done = run("verify", good, "--model", "net.py:net", "--input", inputs)
    assert done.returncode == 2 and "inputs.pth" in done.stderr
    fits = run("check", path, "--fits", "net.py:net", "--json")
    assert [finding["code"] for finding in json.loads(fits.stdout)["findings"]] == ["damaged"]


def test_convert_writes_fresh_checksums_where_it_is_told_to_ignore_them(save: SaveAs, tmp_path: Path) -> None:
    path, name = plain(save)
    with pytest.raises(CorruptError, match=f"{name}: .*--ignore-checksums"):
        ckptkit.convert(path, tmp_path / "out.pth")
    for ending in ("pth", "safetensors"):
        out = tmp_path / f"out.{ending}"
        ckptkit.convert(path, out, ignore_checksums=True)
        assert ckptkit.check(out).exit_code == 0
        assert ckptkit.diff(path, out, ignore_checksums=True).equal
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert archive.testzip() is None


def test_a_file_that_was_edited_in_place(save: SaveAs) -> None:
    path = save({"w": torch.zeros(1000)})
    with ckptkit.open(path) as file:
        source = file.state_dict["w"].storage.source
    start = record_at(path, "data/0")[0]
    assert (source.offset, source.nbytes) == (start, 4000)
    mapped = torch.load(
        str(path), mmap=True
    )  # a private mapping: torch's own shared one needs set_default_mmap_options
    assert torch.equal(mapped["w"], torch.zeros(1000))
    with path.open("r+b") as opened:
        opened.seek(start)
        opened.write(torch.ones(1000).numpy().tobytes())
    assert ckptkit.check(path).exit_code == 1
    assert ckptkit.check(path, ignore_checksums=True).exit_code == 0
    config = path.with_name("ckptkit.toml")
    config.write_text('[[overrides]]\nfiles = ["model.pth"]\nignore-checksums = true\n')
    assert ckptkit.check(path, config=config).exit_code == 0


def test_what_stands_beside_the_weights(save: SaveAs) -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    path = save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "resume.pth")
    flipped(path, 4)
    (finding,) = ckptkit.check(path).findings
    assert finding.code == "damaged" and "of 'optimizer'" in finding.message
    with pytest.raises(CorruptError, match="of 'optimizer'"):
        ckptkit.diff(path, path)
    ckptkit.load_state_dict(path, section="model")


def test_every_shard(save: SaveAs, tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(100) for i in range(6)}
    (tmp_path / "s").mkdir()
    ckptkit.convert(save(state), tmp_path / "s" / "m.pth", max_shard_size=900)
    index = next((tmp_path / "s").glob("*.index.json"))
    assert ckptkit.check(index).exit_code == 0
    shard = sorted((tmp_path / "s").glob("*.pth"))[-1]
    flipped(shard, 0)
    (finding,) = ckptkit.check(index).findings
    assert finding.code == "damaged"
    with pytest.raises(CorruptError) as caught:
        ckptkit.load_state_dict(index)
    assert caught.value.path == str(shard)
    with pytest.raises(CorruptError):
        ckptkit.diff(index, index)


def test_big_endian_and_unrecorded(save: SaveAs, tmp_path: Path) -> None:
    path = flipped(save({"w": torch.ones(10, dtype=torch.int32)}), 0)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.open(name).read() for name in archive.namelist() if not name.endswith("data/0")}
    values = (1).to_bytes(4, "big") * 10
    with zipfile.ZipFile(tmp_path / "big.pth", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
        archive.writestr(f"{next(iter(records)).split('/')[0]}/data/0", values)
    assert torch.equal(ckptkit.load_state_dict(tmp_path / "big.pth")["w"], torch.ones(10, dtype=torch.int32))
    flipped(tmp_path / "big.pth", 0)
    with pytest.raises(CorruptError, match="tensor 'w'"):
        ckptkit.load_state_dict(tmp_path / "big.pth")
    if not hasattr(torch.serialization, "set_crc32_options"):
        return  # this torch records every checksum
    torch.serialization.set_crc32_options(False)
    try:
        bare = flipped(save({"w": torch.ones(10)}, "bare.pth"), 0)
    finally:
        torch.serialization.set_crc32_options(True)
    assert ckptkit.check(bare).exit_code == 0
    ckptkit.load_state_dict(bare)


def test_a_file_without_checksums_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "a.safetensors")
    monkeypatch.delattr("ckptkit.released.examine.read_through")
    assert ckptkit.check(tmp_path / "a.safetensors").exit_code == 0


def test_sums_of_pieces_are_put_together() -> None:
    draw = random.Random(0)
    for count, more in ((0, 0), (5, 0), (0, 7), (1000, 33), (3, 1 << 20), (17, (1 << 22) + 5)):
        a, b = draw.randbytes(count), draw.randbytes(more)
        assert combined(zlib.crc32(a), zlib.crc32(b), more) == zlib.crc32(a + b)


def test_bytes_that_pass_by_are_not_read_again(save: SaveAs, monkeypatch: pytest.MonkeyPatch) -> None:
    with ckptkit.open(save({"w": torch.randn(1000)})) as file:
        (storage,) = (entry.storage for entry in file.state_dict.values())
        checksums = Checksums()
        checksums.want([storage])
        run = storage.source
        data = run.read()
        for start, end in ((0, 400), (400, 3999), (3999, 4000)):
            checksums.passing(run.part(start, end - start)).update(data[start:end])  # type: ignore[arg-type]
        monkeypatch.setattr("ckptkit.bytesource.SourceFile.read_into", None)
        assert checksums.damages() == []
        checksums.note(run.part(0, 400), 7)  # type: ignore[arg-type]
        (damage,) = checksums.damages()
        assert damage.storage is storage


@pytest.mark.parametrize("nbytes", [0, 5, 91_639, (512 << 10) - 1, 512 << 10, (1 << 20) + 13, 3 << 20])
@pytest.mark.parametrize("crc", [0, 1, 0xFFFFFFFF, 0x12345678])
def test_sums_are_those_of_zlib(nbytes: int, crc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    for given in (data, bytearray(data), memoryview(data)):
        assert crc32(given, crc) == zlib.crc32(data, crc)
    monkeypatch.setattr(zlib, "crc32", lambda data, crc: len(data))
    assert crc32(data, crc) == (nbytes if nbytes < 512 << 10 else 91_639)  # the rest was folded
    monkeypatch.delitem(sys.modules, "numpy")
    assert crc32(data, crc) == nbytes


def test_the_lags_are_those_of_the_polynomial() -> None:
    near, far = _LAGS
    assert _shift(far) == _shift(far - near) ^ _ONE
