"""`--storage-option` and ``storage_options``: what they mean, where they hold, and that nobody shows them; file://."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Done
from support.object_server import ObjectServer

import ckptkit
from ckptkit import remote
from ckptkit.options import ConvertOptions, DiffOptions, LoadOptions, VerifyOptions
from ckptkit.options.storage import local, typed_options
from ckptkit.remote.objects import ObjectStore
from ckptkit.transfer.workers import Background

SaveAs = Callable[..., Path]

HIDDEN = "not-to-be-shown-either"


@pytest.fixture
def private(s3: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options without which nothing is read: the environment leads nowhere."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    return (
        "--storage-option", "key=AKIAEXAMPLE",
        "--storage-option", f"secret={HIDDEN}",
        "--storage-option", f"client_kwargs.endpoint_url={s3.url}",
    )  # fmt: skip


# What they mean.


def test_values_are_json_where_they_are_no_text() -> None:
    given = ["anon=true", "retries=3", "key=AKIA=b", "x.y.z=null", 'x.y.a={"b": [1]}', 'q="quoted"', "empty=", "t=01"]
    assert typed_options(given) == {
        "anon": True,
        "retries": 3,
        "key": "AKIA=b",
        "x": {"y": {"z": None, "a": {"b": [1]}}},
        "q": '"quoted"',
        "empty": "",
        "t": "01",
    }


@pytest.mark.parametrize("text", ["anon", "=x", "a..b=x", ".a=x", "a=1 a=2", "a=1 a.b=2", "a.b=1 a=2"])
def test_what_is_no_option(text: str, command: Callable[..., Done]) -> None:
    given = text.split()
    with pytest.raises(ckptkit.RewriteError, match="--storage-option"):
        typed_options(given)
    done = command("inspect", "none.pth", *(word for each in given for word in ("--storage-option", each)))
    assert done.code == 2
    assert "Error: --storage-option" in done.err


def test_a_secret_that_was_mistyped_is_not_shown() -> None:
    with pytest.raises(ckptkit.RewriteError) as caught:
        typed_options(["key.=" + HIDDEN])
    assert HIDDEN not in str(caught.value)


@pytest.mark.parametrize("given", ["anon=true", [("anon", True)], {1: True}])
def test_python_takes_a_mapping(given: Any, save: SaveAs) -> None:
    for function in (ckptkit.open, ckptkit.inspect, ckptkit.load, ckptkit.load_state_dict, ckptkit.check):
        with pytest.raises(ckptkit.RewriteError, match="storage_options: expected a mapping of names to values"):
            function(save({"a": torch.ones(1)}), storage_options=given)


def test_options_of_a_scheme_are_for_that_one_alone(s3: ObjectServer, save: SaveAs) -> None:
    url = s3.put("m.pth", save({"a": torch.ones(3)}))
    options = {"s3": {"key": "AKIAEXAMPLE", "secret": HIDDEN}, "gs": {"token": "anon"}, "memory": {"no": 1}}
    assert ckptkit.inspect(url, storage_options=options)["kind"] == "state_dict"
    assert ObjectStore("memory", options)._options == {"no": 1}


# Where they hold.


def test_every_command_takes_them(
    s3: ObjectServer, private: tuple[str, ...], command: Callable[..., Done], save: SaveAs, tmp_path: Path
) -> None:
    path = save(torch.nn.Linear(2, 3).state_dict())
    s3.empty()
    url = s3.put("net.pth", path)
    (tmp_path / "net.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(2, 3)\n")
    for words in (
        ("inspect", url),
        ("inspect", "--stats", "--json", url),
        ("convert", url, "out.safetensors"),
        ("diff", url, path),
        ("verify", url, "--model", "net.py:build", "--input-shape", "1,2"),
        ("manifest", url),
        ("check", url, "--no-nan"),
        ("check", "s3://models/", "--json"),
        ("inspect", "s3://models/", "--jobs", "1"),
    ):
        done = command(*words, *private)
        assert done.code == 0, (words, done)
        assert HIDDEN not in done.out + done.err
    assert HIDDEN.encode() not in (tmp_path / "out.safetensors").read_bytes()
    refused = command("inspect", url, "--json")
    assert refused.code == 2
    assert "Traceback" not in refused.err


def test_a_configuration_names_urls(
    s3: ObjectServer, command: Callable[..., Done], save: SaveAs, tmp_path: Path
) -> None:
    s3.put("configured/net.pth", save({"a": torch.ones(3)}))
    (tmp_path / "ckptkit.toml").write_text('paths = ["s3://models/configured/"]\nno_pickle = true\n')
    s3.forget()
    done = command("check")
    assert done.code == 1
    assert "s3://models/configured/net.pth: FAILED" in done.out
    assert len([each for each in s3.asked if "list-type" in each.query]) == 1


def test_every_function_takes_them(s3: ObjectServer, private: tuple[str, ...], save: SaveAs, tmp_path: Path) -> None:
    path = save(torch.nn.Linear(2, 3).state_dict())
    url = s3.put("net.pth", path)
    weight = torch.load(path, weights_only=True)["weight"]
    options = typed_options(private[1::2])
    kept = pickle.dumps(options)
    assert ckptkit.inspect(url, storage_options=options)["kind"] == "state_dict"
    assert torch.equal(ckptkit.load(url, storage_options=options)["weight"], weight)
    assert torch.equal(ckptkit.load_state_dict(url, storage_options=options)["weight"], weight)
    assert ckptkit.convert(url, tmp_path / "out.pth", storage_options=options).ok
    assert ckptkit.diff(url, path, storage_options=options).equal
    model = torch.nn.Linear(2, 3)
    assert ckptkit.verify(url, model=model, input_shapes=[(1, 2)], against=url, storage_options=options).ok
    assert ckptkit.check([url], storage_options=options).ok
    assert ckptkit.manifest([url], storage_options=options).files
    with ckptkit.open(url, storage_options=options) as file:
        assert (file.state_dict["weight"].numpy() == weight.numpy()).all()  # it has what it needs
        file.rewrite(ckptkit.AddPrefix("a.")).save(tmp_path / "prefixed.pth")
    assert pickle.dumps(options) == kept, "they are the caller's"


def test_they_hold_in_threads_and_end_with_the_command(save: SaveAs) -> None:
    seen: list[dict[str, Any]] = []
    with remote.session({"a": 1}):
        thread = Background(lambda: seen.append(remote.current_session().options), threading.Event())  # type: ignore[union-attr]
        thread.wait()
        with remote.session() as inner:
            assert inner.options == {"a": 1}
        with remote.session({"b": 2}) as other:
            assert other.options == {"b": 2}
    assert seen == [{"a": 1}]
    assert remote.current_session() is None


def test_a_process_of_many_tasks_keeps_its_connections() -> None:
    with remote.session({"a": 1, "secret": HIDDEN}):
        work = remote.carried(partial(_store, "memory://x"))
    first, again = pickle.loads(pickle.dumps(work))(0), work(1)
    assert first is again
    assert first._options == {"a": 1, "secret": HIDDEN}
    assert HIDDEN not in repr(work)
    assert remote.current_session() is None


def _store(url: str, task: int) -> Any:
    return remote.store_of(url)


def test_another_process_begins_a_session_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with remote.session({"a": 1}) as ours:
        assert remote.current_session() is ours
        monkeypatch.setattr("os.getpid", lambda: -1)
        assert remote.current_session() is None
        with remote.session() as theirs:
            assert theirs is not ours


# Nobody shows them.


def test_no_repr_and_no_fix_has_them() -> None:
    for options in (ConvertOptions, LoadOptions, DiffOptions, VerifyOptions):
        made = options(storage_options={"secret": HIDDEN})
        assert HIDDEN not in repr(made)
        assert "storage_options" in repr(made)
        assert made.typed("storage_options") == []


@pytest.mark.parametrize("url", ["s3://models/none.pth", "memory://none", "ftp://user:{}@127.0.0.1:9/m.pth"])
def test_no_error_has_them(
    s3: ObjectServer, command: Callable[..., Done], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", HIDDEN)
    s3.fails = lambda asked: (403, "AccessDenied")
    for words in (("inspect",), ("inspect", "--json"), ("--debug", "inspect"), ("check",), ("check", "--json")):
        done = command(*words, url.format(HIDDEN), "--storage-option", f"client_kwargs.x={HIDDEN}")
        assert done.code == 2, done
        assert HIDDEN not in done.out + done.err
        assert done.out + done.err


def test_an_option_that_the_file_system_does_not_know_is_named(s3: ObjectServer) -> None:
    with pytest.raises(ckptkit.FileAccessError) as caught:
        ckptkit.open("s3://models/m.pth", storage_options={"nonsense": HIDDEN})
    assert "look at --storage-option nonsense" in str(caught.value)
    assert HIDDEN not in str(caught.value)


def test_what_a_package_says_is_told_without_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def failing(self: Any, *given: Any, **options: Any) -> Any:
        raise ValueError(f"cannot sign in with {HIDDEN}\nat https://user:{HIDDEN}@host/?sig={HIDDEN}")

    for name in ("info", "__init__"):
        monkeypatch.setattr(MemoryFileSystem, name, failing)
        with pytest.raises(
            ckptkit.FileAccessError, match=r"memory://m\.pth: .*cannot sign in with \*\*\* at"
        ) as caught:
            ckptkit.open("memory://m.pth", storage_options={"deep": {"secret": HIDDEN}})
        assert HIDDEN not in str(caught.value)
        assert str(caught.value).endswith("look at --storage-option deep")


# Files of this machine.


def test_file_urls_are_paths(save: SaveAs, command: Callable[..., Done], tmp_path: Path) -> None:
    path = save({"a": torch.ones(3)}, "with space.pth")
    url = f"file://{str(path).replace(' ', '%20')}"
    assert local(url) == local(f"local://{path}") == local(f"file://localhost{path}") == str(path)
    assert local(["x", url]) == ["x", str(path)]
    assert ckptkit.inspect(url)["path"] == str(path)
    assert ckptkit.convert(source=url, destination=f"file://{tmp_path}/out.safetensors").ok
    assert (tmp_path / "out.safetensors").is_file()
    assert ckptkit.check([url]).ok
    assert json.loads(command("inspect", url, "--json").out)["files"][0]["path"] == str(path)
    assert json.loads(command("inspect", f"file://{tmp_path}", "--json").out)["files"]


def test_a_local_file_needs_neither_servers_nor_fsspec(save: SaveAs) -> None:
    code = (
        "import sys, ckptkit\n"
        f"ckptkit.inspect({str(save({'a': torch.ones(3)}))!r}, storage_options={{}})\n"
        "print([name for name in sys.modules if name.startswith(('ckptkit.remote.', 'fsspec', 'http.', 'ssl'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
