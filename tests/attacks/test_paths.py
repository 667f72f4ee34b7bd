"""What is no regular file, or leads to one elsewhere; and the same files through ``load_state_dict``."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckptkit

Run = Callable[..., Any]


def fifo(folder: Path, make: Any) -> str:
    os.mkfifo(folder / "pipe.pth")
    return "pipe.pth"


def unix_socket(folder: Path, make: Any) -> str:
    here = os.getcwd()
    os.chdir(folder)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket.pth")
    finally:
        os.chdir(here)
    return "socket.pth"


def loop(folder: Path, make: Any) -> str:
    (folder / "loop.pth").symlink_to("loop.pth")
    return "loop.pth"


def dangling(folder: Path, make: Any) -> str:
    (folder / "gone.pth").symlink_to("nowhere")
    return "gone.pth"


def link_to_a_device(folder: Path, make: Any) -> str:
    (folder / "zero.pth").symlink_to("/dev/zero")
    return "zero.pth"


def empty_folder(folder: Path, make: Any) -> str:
    (folder / "empty").mkdir()
    return "empty"


SPECIAL: dict[str, Callable[[Path, Any], str]] = {
    "a pipe": fifo,
    "a socket": unix_socket,
    "a link to itself": loop,
    "a link to nothing": dangling,
    "a link to a device": link_to_a_device,
    "a device": lambda folder, make: "/dev/zero",
    "a terminal": lambda folder, make: "/dev/tty",
    "a process's memory": lambda folder, make: "/proc/self/mem",
    "an endless file that says it is empty": lambda folder, make: "/proc/self/maps",
    "an empty folder": empty_folder,
    "nothing": lambda folder, make: "nothing.pth",
    "no name": lambda folder, make: "",
    "a name of 5,000 bytes": lambda folder, make: "n" * 5000,
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_what_is_no_regular_file_is_refused(name: str, command: str, tmp_path: Path, run: Run, make: Any) -> None:
    path = SPECIAL[name](tmp_path, make)
    before = {entry.name for entry in tmp_path.iterdir()}
    done = run(command, path, *(["out.pth"] if command == "convert" else []))
    assert done.returncode == 2
    assert done.stderr.startswith(("ckptkit: error: ", "Usage: "))
    assert "Traceback" not in done.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == before


def test_a_folder_is_searched_and_what_is_hostile_in_it_does_not_hide_the_rest(
    tmp_path: Path, run: Run, make: Any
) -> None:
    (tmp_path / "good.pth").write_bytes(make.zip(make.state_dict()))
    (tmp_path / "evil.pth").write_bytes(make.zip(make.beside(make.payload)))
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "pipe.pth")
    (tmp_path / "pipes" / "up").symlink_to(tmp_path)
    (tmp_path / "broken.pth").write_bytes(make.zip(make.state_dict())[:-30])
    done = run("inspect", "--json", tmp_path)
    found = {Path(file["path"]).name: file for file in json.loads(done.stdout)["files"]}
    assert done.returncode == 2
    assert set(found) == {"good.pth", "evil.pth", "broken.pth"}
    assert json.loads(done.stdout)["passed_over"] == {"named pipe": 1}
    assert found["good.pth"]["trust"] == "safe"
    assert found["evil.pth"]["trust"] == "hostile"
    assert found["broken.pth"]["error"] is not None
    assert not make.canary.exists()


def test_an_index_does_not_follow_links_out_of_its_folder(tmp_path: Path, make: Any) -> None:
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    (tmp_path / "secret.safetensors").write_bytes(make.safetensors({"a": entry}, b"s"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ckptkit.FormatError, match="leaving the index's folder"):
        ckptkit.inspect(folder / "model.safetensors.index.json")


def test_an_index_of_pipes_does_not_wait(tmp_path: Path, make: Any) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(ckptkit.CkptkitError, match="is not a regular file"):
        ckptkit.inspect(index)


PAYLOADS: dict[str, Callable[[Any], bytes]] = {
    "beside the weights": lambda m: m.zip(m.beside(m.payload)),
    "in the weights": lambda m: m.zip(m.state_dict(m.text("evil") + m.payload)),
    "in a sibling": lambda m: m.zip(m.state_dict(), {"archive/evil.pkl": b"\x80\x02" + m.payload + b"."}),
    "legacy": lambda m: m.legacy(m.beside(m.payload)),
    "before an error": lambda m: m.zip(b"\x80\x02" + m.payload + b"\xff"),
    "after STOP": lambda m: m.zip(m.state_dict() + m.payload + b"."),
    "a class to import": lambda m: m.zip(m.beside(b"ccanary_module\nNet\n)R")),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_load_state_dict_runs_nothing(name: str, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary_module.py").write_text(f"open({str(make.canary)!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "file.pth"
    path.write_bytes(PAYLOADS[name](make))
    try:
        state = ckptkit.load_state_dict(path)
    except ckptkit.CkptkitError:
        assert name in ("before an error", "after STOP", "in the weights")
    else:
        assert list(state) == ["weight"]
        assert state["weight"].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert not make.canary.exists()


def test_a_tensor_of_terabytes_is_an_expanded_view_in_torch_too(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(make.zip(b"\x80\x02}" + make.text("w") + make.tensor(shape=(10**12,), stride=(0,)) + b"s."))
    state = ckptkit.load_state_dict(path)
    assert state["w"].shape == (10**12,)
    assert state["w"].untyped_storage().nbytes() == 16
