"""Full disks, read-only folders, sources that change or are damaged: nothing is lost, nothing half-written."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plans import ASKED, INDEX, NEW, OLD, SHARD_SIZES, files_of, held, only, posix_only, same

import ckptkit
from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError, DestinationExistsError
from ckptkit.pickling.inert import walk

pytestmark = posix_only

ROOT = Path(ckptkit.__file__).parents[1]

ENV = {**os.environ, "PYTHONPATH": str(ROOT)}

Save = Callable[..., Path]
Ended = subprocess.CompletedProcess[str]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ckptkit", *map(str, arguments)]


def run(*arguments: object, **more: Any) -> Ended:
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=ENV, timeout=60, **more)


# Disks.


@functools.cache
def mounts() -> bool:
    """Whether a file system can be mounted, in a name space of its own."""
    try:
        tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


def on_a_disk(folder: Path, options: str, then: str, arguments: list[object]) -> Ended:
    """Run a command with a small disk mounted over a folder; what is there is copied to it, and afterwards shown."""
    inside = shlex.quote(str(folder))
    script = f"""
        set -e
        cp -r {inside} {inside}.before
        mount -t tmpfs -o {options} none {inside}
        cp {inside}.before/* {inside}
        {then.format(inside)}
        set +e
        {shlex.join(command(*arguments))}
        status=$?
        cp -r {inside} {inside}.after
        exit $status
        """
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", textwrap.dedent(script)], capture_output=True, text=True, env=ENV, timeout=60
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [[], ["--no-check"], ["--max-shard-size", "400kB"]])
def test_a_full_disk(save: Save, out: Path, options: list[str]) -> None:
    source = save({f"layer{number}": torch.ones(70_000) for number in range(5)})
    out.with_name(ASKED).write_bytes(os.urandom(200_000))
    there = contents(out.parent)
    arguments = ["convert", source, out.with_name(ASKED), "--force", *options]
    if mounts():
        ended = on_a_disk(out.parent, "size=1m", "", arguments)
        after, reason = out.parent.with_name("out.after"), "No space left on device"
    else:
        import resource

        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (250_000, 250_000))
        ended = run(*arguments, preexec_fn=limit)
        after, reason = out.parent, "File too large"
    assert ended.returncode == 2
    assert f"cannot be written: {reason}" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert contents(after) == there


@pytest.mark.parametrize("options", [[], ["--max-shard-size", "10kB"]])
def test_a_folder_that_cannot_be_written_to(save: Save, out: Path, options: list[str]) -> None:
    source = save(NEW)
    out.with_name(ASKED).write_bytes(b"old")
    arguments = ["convert", source, out.with_name(ASKED), "--force", *options]
    if mounts():
        ended = on_a_disk(out.parent, "size=1m", "mount -o remount,ro {}", arguments)
        after, reason = out.parent.with_name("out.after"), "Read-only file system"
    else:
        out.parent.chmod(0o555)
        # What denies others nothing denies root, unless it gives that up.
        given_up = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
        ended = subprocess.run([*given_up, *command(*arguments)], capture_output=True, text=True, env=ENV, timeout=60)
        out.parent.chmod(0o755)
        after, reason = out.parent, "Permission denied"
    assert ended.returncode == 2
    assert f"cannot be written: {reason}" in ended.stderr
    assert contents(after) == {ASKED: b"old"}


# Sources that change.

TALL = {"whole": torch.ones(1500, 1000), "across": torch.ones(1500, 1500).t(), "few": torch.ones(100, 10_000)[:, ::50]}


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tall") / "tall.pth"
    torch.save(TALL, path)
    return path


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("change", ["appended to", "cut"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"max_shard_size": "9MB"}])
def test_a_source_that_changes_meanwhile(
    tall: Path, out: Path, tmp_path: Path, change: str, options: dict[str, Any], check: bool, forks: Callable[..., Any]
) -> None:
    """In a process of its own: to touch what is no longer there may be fatal."""
    source, target = tmp_path / "source.pth", out.with_name(ASKED)
    shutil.copyfile(tall, source)
    target.write_bytes(b"old")
    change_it = (
        f"os.truncate({str(source)!r}, 3_000_000)" if change == "cut" else f"open({str(source)!r}, 'ab').write(b'x')"
    )
    program = f"""
        import os, ckptkit
        try:
            ckptkit.convert({str(source)!r}, {str(target)!r}, force=True, check={check}, **{options!r},
                            progress=lambda done, total: {change_it})
        except ckptkit.CorruptError as error:
            print(error)
    """
    ended = forks(with_torch=False).run("-c", textwrap.dedent(program), cwd=tmp_path, env=ENV)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"{source}: the file ")
    assert "was changed while it was being converted" in ended.stdout or "became shorter while it was" in ended.stdout
    assert only(out) == [ASKED]
    assert target.read_bytes() == b"old"


# Damage.


def weights(first: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(int(first))
    tied, large = torch.randn(50, 40), torch.randn(4000)
    return {
        "plain": torch.randn(300), "across": torch.randn(30, 20).t(), "view": large[100:140], "other": large[3000:],
        "head": tied, "embed": tied, "count": torch.arange(100), "tiny": torch.tensor(3.0),
    }  # fmt: skip


@pytest.fixture
def damaged(save: Save) -> Callable[[str], Path]:
    """``damaged("model.plain")``: a file with one bit flipped, in the last byte of the storage of that tensor."""
    parameter = torch.nn.Parameter(torch.ones(500))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    path = save(
        {"model": weights(1), "ema": weights(2), "optimizer": optimizer.state_dict(), "epoch": 3}, "damaged.pth"
    )

    def flip(place: str) -> Path:
        section, name = place.split(".")
        if section == "optimizer":
            with ckptkit.open(path) as file:
                entry = next(node for node in walk(file.rest) if isinstance(node, TensorEntry) and node.shape == (500,))
        else:
            with ckptkit.open(path, section=section) as file:
                entry = file.state_dict[name]
        data = bytearray(path.read_bytes())
        data[entry.storage.source.offset + entry.storage.nbytes - 1] ^= 0x40
        path.write_bytes(data)
        return path

    return flip


WRITTEN = [f"model.{name}" for name in weights(0)]

CONVERSIONS: dict[str, dict[str, Any]] = {
    "as it is": {"to": "torch-zip"},
    "safetensors": {},
    "cast": {"dtype": "bfloat16"},
    "cast, as it is": {"to": "torch-zip", "dtype": "float64"},
    "shards": {"max_shard_size": "10kB"},
    "copies": {"tied": "duplicate"},
    "renamed": {"rename": ["^=>x."]},
}


@pytest.mark.parametrize("how", CONVERSIONS)
@pytest.mark.parametrize("place", WRITTEN)
def test_a_flipped_bit_is_an_error_that_names_the_tensor(
    damaged: Callable[[str], Path], out: Path, place: str, how: str
) -> None:
    source, target = damaged(place), out.with_name(ASKED)
    target.write_bytes(b"old")
    alone = {"weights_only": True} if CONVERSIONS[how].get("to") is None else {}
    name = place.removeprefix("model.")
    known = {"head": "(head|embed)", "embed": "(head|embed)", "view": "(view|other)", "other": "(view|other)"}
    with pytest.raises(CorruptError, match="the file is damaged") as caught:
        ckptkit.convert(source, target, section="model", force=True, **alone, **CONVERSIONS[how])
    assert re.search(rf"[.']{known.get(name, name)}\b", str(caught.value)), str(caught.value)
    assert str(caught.value).startswith(f"{source}: ")
    assert only(out) == [ASKED]
    assert target.read_bytes() == b"old"
    # To check elsewhere is what the user asked for: then bytes only move.
    ckptkit.convert(source, target, section="model", force=True, check=False, **alone, **CONVERSIONS[how])


def test_a_flipped_bit_on_the_command_line(damaged: Callable[[str], Path], out: Path) -> None:
    source = damaged("model.plain")
    ended = run("convert", source, out.with_name(ASKED), "--section", "model", "--weights-only")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"ckptkit: error: {source}: tensor 'plain': the bytes have CRC-32 ")
    assert ended.stdout == ""
    assert only(out) == []
    ended = run("convert", source, out.with_name(ASKED), "--section", "model", "--weights-only", "--no-check")
    assert ended.returncode == 0
    state = ckptkit.load_state_dict(out.with_name(ASKED))
    assert torch.equal(state["plain"][:-1], weights(1)["plain"][:-1])
    assert state["plain"][-1] != weights(1)["plain"][-1]


@pytest.mark.parametrize("place", ["ema.plain", "optimizer.0"])
def test_damage_beside_the_weights(damaged: Callable[[str], Path], out: Path, place: str) -> None:
    source = damaged(place)
    with pytest.raises(CorruptError, match=r"ema\.plain|optimizer\..*exp_avg") as caught:
        ckptkit.convert(source, out.with_name("out.pth"), section="model")
    assert "the file is damaged" in str(caught.value)
    assert only(out) == []
    # What is not written is not read either.
    ckptkit.convert(source, out.with_name(ASKED), section="model", weights_only=True)
    assert same(ckptkit.load_state_dict(out.with_name(ASKED)), weights(1))


@pytest.mark.parametrize("target", ["out.safetensors", "out.pth"])
def test_damage_in_what_is_left_out(damaged: Callable[[str], Path], out: Path, target: str) -> None:
    source = damaged("model.plain")
    options = {"section": "model", "weights_only": True, "exclude": ["pl*"]}
    ckptkit.convert(source, out.with_name(target), **options)
    left = {name: value for name, value in weights(1).items() if name != "plain"}
    assert same(ckptkit.load_state_dict(out.with_name(target)), left)


# Destinations that are sources, and links.


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_the_source_itself(tmp_path: Path, out: Path, name: str) -> None:
    path = out.with_name(name)
    torch.save(OLD, out.with_name("old.pth"))
    ckptkit.convert(out.with_name("old.pth"), path)
    before = path.read_bytes()
    with pytest.raises(DestinationExistsError):
        ckptkit.convert(path, path, add_module=True)
    assert path.read_bytes() == before
    os.link(path, tmp_path / "second")
    (tmp_path / "link").symlink_to(path)
    ckptkit.convert(path, tmp_path / "link", to=name.rpartition(".")[2], add_module=True, force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "second").read_bytes() == before  # the other name keeps what it had
    assert same(ckptkit.load_state_dict(path), {f"module.{key}": value for key, value in OLD.items()})
    ckptkit.convert(path, path, strip_module=True, force=True)
    assert same(ckptkit.load_state_dict(path), OLD)
    assert only(out) == sorted([name, "old.pth"])


# The same bytes, and whose they are.


SEEDED = """
import json, sys
from ckptkit.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code, words
"""


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    """For every container and way of writing, in processes that each make all of them."""
    torch.save({**weights(1), "nested": torch.ones(2)}, tmp_path / "source.pth")
    options: list[list[str]] = [[], ["--max-shard-size", "10kB"], ["--dtype", "float16", "--no-check"]]
    ways = [(name, at) for name in ("model.safetensors", "model.pth") for at in range(len(options))]
    found: list[dict[str, dict[str, bytes]]] = []
    for seed in ("0", "1", "random"):
        folders = {f"{at} {name}": tmp_path / seed / f"{at} {name}" for name, at in ways}
        for folder in folders.values():
            folder.mkdir(parents=True)
        commands = [
            ["convert", "-q", f"{tmp_path}/source.pth", f"{tmp_path}/{seed}/{at} {name}/{name}", *options[at]]
            for name, at in ways
        ]
        ended = subprocess.run(
            [sys.executable, "-c", SEEDED, json.dumps(commands)],
            capture_output=True, env={**ENV, "PYTHONHASHSEED": seed, "TZ": f"UTC{seed[:1]}"},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        found.append({way: contents(folder) for way, folder in folders.items()})
    assert found[0] == found[1] == found[2]
    assert {way: len(files) > 1 for way, files in found[0].items()} == {
        f"{at} {name}": "--max-shard-size" in options[at] for name, at in ways
    }
    for way, folder in folders.items():
        if "--no-check" not in options[int(way[0])]:
            with ckptkit.open(folder / sorted(found[0][way])[-1]) as file:
                assert "ckptkit_receipts" in file.checkpoint.metadata


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(
    save: Save, out: Path, umask: int, mode: int, forks: Callable[..., Any]
) -> None:
    source = save(OLD)
    code = f"import os, sys; os.umask({umask}); from ckptkit.cli import main; main(sys.argv[1:])"
    for destination, *options in (["one.pth"], [ASKED, "--max-shard-size", str(SHARD_SIZES[3])]):
        words = ["convert", str(source), str(out.with_name(destination)), *options]
        ended = forks(with_torch=False).run("-c", code, *words, cwd=out.parent, env=ENV)
        assert ended.returncode == 0, ended.stderr
    assert only(out) == sorted([*files_of(3), "one.pth"])
    assert {name: oct(out.with_name(name).stat().st_mode & 0o777) for name in only(out)} == dict.fromkeys(
        only(out), oct(mode)
    )
    assert held(out.parent) == "old"
    assert INDEX in only(out)
