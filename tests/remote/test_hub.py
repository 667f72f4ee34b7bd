"""Files of the hub: how they are named, who may read them, and that one command sees one commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.hub import UNKNOWN, Hub, hub
from support.range_server import Fault, Reply

import ckptkit
from ckptkit.errors import FileAccessError, MissingFileError
from ckptkit.remote import hub as module
from ckptkit.remote import retries, session
from ckptkit.remote.hub import HubPath, HubStore

HEAD = 64 << 10
DATA = bytes(range(256)) * 1200
SMALL = b'{"small": true}'


@pytest.fixture(scope="module")
def _hub() -> Iterator[Hub]:
    with hub() as made:
        yield made


@pytest.fixture
def there(_hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A hub with one repository, whom nobody has told a token."""
    for name in (
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "all_proxy",
        "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "http_proxy", "HTTP_PROXY", "ALL_PROXY",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HF_ENDPOINT", f"{_hub.server.url}/")
    _hub.server.renew()
    _hub.cdn.renew()
    fresh = Hub(_hub.server, _hub.cdn)
    fresh.server.replies, fresh.cdn.replies = fresh.reply, fresh.signed
    fresh.push("u/r", {"m.bin": DATA, "config.json": SMALL, "a b/ü.bin": DATA[:2000]})
    return fresh


@pytest.mark.parametrize(
    ("url", "kind", "repo", "revision", "path"),
    [
        ("hf://u/r", "models", "u/r", None, ""),
        ("hf://u/r/", "models", "u/r", None, ""),
        ("hf://models/u/r/m.bin", "models", "u/r", None, "m.bin"),
        ("hf://u/r/a/b@c.bin", "models", "u/r", None, "a/b@c.bin"),
        ("hf://u/r@v1.0/a/m.bin", "models", "u/r", "v1.0", "a/m.bin"),
        ("hf://u/r@v1", "models", "u/r", "v1", ""),
        ("hf://u/r@refs/pr/12/a/m.bin", "models", "u/r", "refs/pr/12", "a/m.bin"),
        ("hf://datasets/u/r@refs/convert/parquet/m.bin", "datasets", "u/r", "refs/convert/parquet", "m.bin"),
        ("hf://u/r@feature%2Fx/m.bin", "models", "u/r", "feature/x", "m.bin"),
        ("hf://spaces/u/r/m%20.bin", "spaces", "u/r", None, "m%20.bin"),
        ("hf://gpt2", "models", "gpt2", None, ""),
        ("hf://gpt2@main/a/m.bin", "models", "gpt2", "main", "a/m.bin"),
        ("hf://datasets/squad", "datasets", "squad", None, ""),
    ],
)
def test_what_urls_say(url, kind, repo, revision, path) -> None:
    assert HubPath.of(url) == HubPath(kind, repo, revision, path)


@pytest.mark.parametrize(
    "url", ["hf://", "hf://u/r@", "hf://u/r@/m.bin", "hf://u/../m", "hf://u//m", "hf://u/r?x=1", "hf://@v"]
)
def test_what_urls_do_not_say(url) -> None:
    with pytest.raises(FileAccessError, match=r"is not hf://user/repo\[@revision\]\[/path\]"):
        HubPath.of(url)
    with pytest.raises(FileAccessError, match="buckets on the hub are not supported"):
        HubPath.of("hf://buckets/u/b/m.bin")


def test_a_large_file_is_read_where_it_lies(there) -> None:
    store = HubStore()
    file = store.open("hf://u/r/m.bin", HEAD)
    assert (file.size, file.head, file.shown) == (len(DATA), DATA[:HEAD], "hf://u/r/m.bin")
    assert file.stamp == f'"{hashlib.sha256(DATA).hexdigest()}"'
    for at in (0, 70_000):
        assert store.read(file, at, 5000) == DATA[at : at + 5000]
    assert [each.path for each in there.server.asked] == ["u/r/resolve/main/m.bin"]
    assert there.cdn.ranges == [(0, HEAD), (0, 5000), (70_000, 5000)]
    assert store.stamp(file) == file.stamp  # a commit does not change
    assert len(there.server.asked) + len(there.cdn.asked) == 4


def test_a_small_file_and_names_that_are_quoted(there) -> None:
    store = HubStore()
    file = store.open("hf://u/r/config.json", HEAD)
    assert (file.head, store.read(file, 2, 5)) == (SMALL, SMALL[2:7])
    assert file.stamp == there.server.stamped(SMALL)["ETag"]
    assert store.open("hf://u/r/a b/ü.bin", 10).size == 2000
    assert there.server.asked[-1].path.endswith("/a%20b/%C3%BC.bin")


def test_signed_urls_expire(there, monkeypatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(retries, "sleep", naps.append)
    store = HubStore()
    file = store.open("hf://u/r/m.bin", 10)
    commit = there.repos["u/r"].branches["main"]
    there.push("u/r", {"m.bin": DATA[::-1]})
    there.signature = "second"
    assert store.read(file, 0, 100) == DATA[:100]
    assert [each.path for each in there.server.asked] == ["u/r/resolve/main/m.bin", f"u/r/resolve/{commit}/m.bin"]
    assert [each.status for each in there.cdn.asked] == [206, 403, 206]
    there.cdn.stamps = ("weak",)  # another server there: the hub says that it is the same file
    there.signature = "third"
    assert store.read(file, 0, 100) == DATA[:100]
    there.cdn.replies = lambda path, query, headers: Reply(403)
    with pytest.raises(
        FileAccessError, match=r"hf://u/r/m.bin: the server answers 403 .* a signed URL may have expired"
    ):
        store.read(file, 0, 100)
    assert naps == []


def test_one_command_sees_one_commit(there) -> None:
    first = there.repos["u/r"].branches["main"]
    store, later = HubStore(), HubStore()
    assert store.open("hf://u/r/config.json", 10).size == len(SMALL)
    there.push("u/r", {"config.json": b"new", "other.bin": DATA})
    assert store.open("hf://u/r/m.bin", 10).size == len(DATA)
    assert store.listing("hf://u/r") == {"m.bin": len(DATA), "config.json": len(SMALL), "a b/ü.bin": 2000}
    assert later.open("hf://u/r/config.json", 10).size == 3
    assert later.listing("hf://u/r") == {"config.json": 3, "other.bin": len(DATA)}
    assert later.open(f"hf://u/r@{first}/config.json", 10).size == len(SMALL)


def test_two_files_opened_at_once_are_of_one_commit(there) -> None:
    """The second answer is of a commit after that of the first, which is asked for then."""
    store = HubStore()

    def push(path: str) -> None:
        if path == "u/r/resolve/main/config.json":
            there.server.before = None
            assert store.open("hf://u/r/m.bin", 10).size == len(DATA)
            there.push("u/r", {"config.json": b"new"})

    there.server.before = push
    assert store.open("hf://u/r/config.json", 10).head == SMALL[:10]


def test_revisions_and_other_kinds(there) -> None:
    there.push("datasets/u/d", {"x.bin": SMALL})
    there.push("u/r", {"m.bin": b"of the request"}, "refs/pr/3")
    there.push("u/r", {"m.bin": b"of the branch"}, "feature/x")
    store = HubStore()
    assert store.open("hf://datasets/u/d/x.bin", 99).head == SMALL
    assert store.open("hf://u/r@refs/pr/3/m.bin", 99).head == b"of the request"
    assert store.open("hf://u/r@feature%2Fx/m.bin", 99).head == b"of the branch"
    assert [each.path for each in there.server.asked if "resolve/" in each.path][1:] == [
        "u/r/resolve/refs%2Fpr%2F3/m.bin",
        "u/r/resolve/feature%2Fx/m.bin",
    ]
    assert store.listing("hf://datasets/u/d") == {"x.bin": len(SMALL)}
    assert store.listing("hf://u/r@refs/pr/3") == {"m.bin": 14}
    for name in ("api/datasets/u/d/tree/", "api/models/u/r/tree/"):
        assert any(each.path.startswith(name) and len(each.path) == len(name) + 40 for each in there.server.asked)


def test_repositories_of_one_name(there) -> None:
    there.push("gpt2", {"m.bin": DATA, "onnx/m.bin": DATA})
    for url in ("hf://gpt2@main/m.bin", "hf://gpt2/m.bin", "hf://gpt2/onnx/m.bin"):
        assert HubStore().open(url, 10).size == len(DATA)
    assert HubStore().listing("hf://gpt2").keys() == {"m.bin", "onnx/m.bin"}
    assert HubStore().listing("hf://gpt2/onnx") == {"m.bin": len(DATA)}
    store = HubStore()
    store.open("hf://gpt2/onnx/m.bin", 10)
    there.forget()
    store.open(store.beside("hf://gpt2/onnx/m.bin", "m.bin"), 10)
    assert len(there.server.asked) == 1
    with pytest.raises(FileAccessError, match="hf://gpt2/none: is a repository; name a file in it"):
        HubStore().open("hf://gpt2/none", 10)


# Listings.


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_listings_come_in_pages(there, page) -> None:
    there.page = page
    everything = {"m.bin": len(DATA), "config.json": len(SMALL), "a b/ü.bin": 2000}
    assert HubStore().listing("hf://u/r") == everything
    assert len(there.server.asked) == -(-4 // page)
    assert HubStore().listing("hf://u/r/a b") == {"ü.bin": 2000}
    assert HubStore().listing("hf://u/r/m.bin") == {}
    assert HubStore().listing("hf://u/r/none") == {}


def test_listings_that_are_none(there, monkeypatch) -> None:
    for body in (
        b"<html>",
        b"{}x",
        b'{"error": 1}',
        b'[{"type": "file"}]',
        b"[[]]",
        b'[{"type": "file", "path": "x", "size": "y"}]',
    ):
        there.server.replies = lambda path, query, headers, body=body: Reply(200, body)
        with pytest.raises(FileAccessError, match="hf://u/r: the hub sends something that is not a listing"):
            HubStore().listing("hf://u/r")
    elsewhere = {"Link": '<http://127.0.0.1:1/api/models/u/r/tree/main?cursor=2>; rel="next"'}
    there.server.replies = lambda path, query, headers: Reply(200, b"[]", elsewhere)
    with pytest.raises(
        FileAccessError, match="its listing continues on another server, which ckptkit does not contact"
    ):
        HubStore().listing("hf://u/r")
    monkeypatch.setattr(module, "_PAGES", 3)
    there.server.replies = lambda path, query, headers: Reply(200, b"[]", {"Link": '<?cursor=1>; rel="next"'})
    with pytest.raises(FileAccessError, match="its listing does not end"):
        HubStore().listing("hf://u/r")
    monkeypatch.setattr(module, "_PAGE_NBYTES", 1)
    with pytest.raises(FileAccessError, match="the server sends more than 1 bytes"):
        HubStore().listing("hf://u/r")


def test_a_mirror_that_knows_no_trees(there) -> None:
    """Such as answer what huggingface_hub's snapshot_download asks for, and no more."""
    commit = there.repos["u/r"].branches["main"]
    siblings = [{"rfilename": "m.bin", "size": len(DATA), "lfs": {"size": len(DATA)}}, {"rfilename": "a/x", "size": 2}]

    def reply(path: str, query: str, headers: dict[str, str]) -> Reply | None:
        if "/tree/" in path:
            return Reply(404)
        if "/revision/" not in path:
            return there.reply(path, query, headers)
        assert (path, query) == ("api/models/u/r/revision/main", "blobs=true")
        return Reply(200, json.dumps({"sha": commit, "siblings": siblings}).encode())

    there.server.replies = reply
    store = HubStore()
    assert store.listing("hf://u/r") == {"m.bin": len(DATA), "a/x": 2}
    there.push("u/r", {"m.bin": b"new"})
    assert store.open("hf://u/r/m.bin", 10).size == len(DATA)
    assert HubStore().listing("hf://u/r/a") == {"x": 2}
    there.server.replies = lambda path, query, headers: Reply(404)
    with pytest.raises(MissingFileError, match=r"hf://u/r: http.* does not list such a repository; name a file in it"):
        HubStore().listing("hf://u/r")


# Who asks.


def test_a_token_goes_to_the_hub_alone(there, monkeypatch) -> None:
    there.repos["u/r"].token = "hf_abc"  # noqa: S105 - of this hub
    with pytest.raises(
        FileAccessError, match="there is no repository 'u/r' on the hub, or it is private: set HF_TOKEN"
    ):
        HubStore().open("hf://u/r/m.bin", 10)
    monkeypatch.setenv("HF_TOKEN", " hf_abc\n")
    store = HubStore()
    file = store.open("hf://u/r/m.bin", 10)
    assert store.read(file, 0, 100) == DATA[:100]  # the other server asserts that it is told none
    assert store.listing("hf://u/r")["m.bin"] == len(DATA)
    assert "hf_abc" not in repr(file) + repr(file.place)
    assert len(there.cdn.asked) == 2


def test_where_tokens_are_found(there, monkeypatch, tmp_path) -> None:
    there.repos["u/r"].token = "hf_abc"  # noqa: S105 - of this hub

    def may() -> bool:
        try:
            return HubStore().open("hf://u/r/m.bin", 10).size > 0
        except FileAccessError:
            return False

    def write(path: Path, text: str = "hf_abc\n") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    assert not may()
    monkeypatch.setenv("HF_HOME", str(write(tmp_path / "home" / "token").parent))
    assert may()
    monkeypatch.setenv("HF_TOKEN_PATH", str(write(tmp_path / "path", "hf_other")))
    assert not may()
    monkeypatch.setenv("HF_TOKEN_PATH", "$HERE/path")
    monkeypatch.setenv("HERE", str(write(tmp_path / "path").parent))
    assert may()
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_other")
    assert not may()
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    assert may()
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert not may()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert not may()
    cached = write(tmp_path / ".cache" / "huggingface" / "token")
    assert may()
    cached.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    write(tmp_path / "xdg" / "huggingface" / "token")
    assert may()
    monkeypatch.setenv("HF_TOKEN", "two words")
    with pytest.raises(
        FileAccessError, match="the token in HF_TOKEN has characters that are not allowed in a token"
    ) as caught:
        HubStore().open("hf://u/r/m.bin", 10)
    assert "words" not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "url", "error", "told"),
    [
        (None, "hf://u/gated/x", FileAccessError, "accept its terms at http.*/u/gated and set HF_TOKEN to a token"),
        ("bad", "hf://u/gated/x", FileAccessError, "accept its terms at http.*/u/gated with the account that "),
        (None, "hf://u/none/x", FileAccessError, "no repository 'u/none' on the hub, or it is private: set HF_TOKEN$"),
        ("bad", "hf://u/none/x", MissingFileError, "no repository 'u/none' .*, or the token in HF_TOKEN has no"),
        (None, "hf://datasets/u/r/x", FileAccessError, "there is no repository 'datasets/u/r' on the hub"),
        (UNKNOWN, "hf://u/r/m.bin", FileAccessError, "the hub does not accept the token in HF_TOKEN: create a new"),
        (None, "hf://u/r/none", MissingFileError, "hf://u/r/none: no such file in the repository$"),
        (None, "hf://u/r@v9/m.bin", MissingFileError, "the repository has no revision 'v9'$"),
        (None, "hf://u/r", FileAccessError, "hf://u/r: is a repository; name a file in it$"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(there, monkeypatch, token, url, error, told) -> None:
    gated = there.push("u/gated", {"x": SMALL})
    gated.token, gated.is_gated = "hf_abc", True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=told) as caught:
        HubStore().open(url, 10)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{url}: ")
    assert (caught.value.path, "\n" in str(caught.value)) == (url, False)
    if error is FileAccessError and url != "hf://u/r":
        with pytest.raises(FileAccessError, match=told):
            HubStore().listing(url.rpartition("/")[0])


def test_other_words_of_the_hub_are_passed_on(there, monkeypatch) -> None:
    said = {"X-Error-Message": "Access to this resource is disabled.\x1b[0m https://me:secret@h/"}
    for status, told in (
        (403, r"the hub refuses \(Access to this resource is disabled"),
        (451, "the hub responds with 451: Acc"),
    ):
        there.server.replies = lambda path, query, headers, status=status: Reply(status, b"", said)
        with pytest.raises(FileAccessError, match=told) as caught:
            HubStore().open("hf://u/r/m.bin", 10)
        assert str(caught.value).isprintable()
        assert "secret" not in str(caught.value)


def test_the_hub_is_not_always_asked(there, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(FileAccessError, match="HF_ENDPOINT must begin with https:// or http://"):
        HubStore().open("hf://u/r/m.bin", 10)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(FileAccessError, match="HF_HUB_OFFLINE is set, so ckptkit does not contact the hub"):
            HubStore().listing("hf://u/r")
        monkeypatch.setenv(name, "0")
    assert there.server.asked == []


def test_a_busy_hub_is_asked_again(there, monkeypatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(retries, "sleep", naps.append)
    there.server.faults = [Fault(status=429, headers={"RateLimit": '"api";r=0;t=9'}), Fault(status=503), Fault(cut=5)]
    there.cdn.faults = [Fault(cut=5)]
    assert len(HubStore().listing("hf://u/r")) == 3
    assert HubStore().open("hf://u/r/m.bin", 10).head == DATA[:10]
    assert len(naps) == 3
    assert naps[0] == 9.0


# As everywhere.


def test_a_sharded_model_of_the_hub_is_that_of_a_folder(there, tmp_path) -> None:
    state = {f"w{i}": torch.randn(20, 20) for i in range(4)}
    torch.save(state, tmp_path / "all.pth")
    folder = tmp_path / "model"
    folder.mkdir()
    ckptkit.convert(tmp_path / "all.pth", folder / "model.safetensors", max_shard_size="4kB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 3
    there.push("u/sharded", {**files, "config.json": SMALL})
    near = json.dumps(ckptkit.inspect(folder / "model.safetensors.index.json"))
    url = "hf://u/sharded/model.safetensors.index.json"
    with session():
        assert json.dumps(ckptkit.inspect(url)).replace("hf://u/sharded", str(folder)) == near
    loaded = ckptkit.load_state_dict(url)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    ckptkit.convert(url, tmp_path / "out.safetensors", receipt=False)
    ckptkit.convert(folder / "model.safetensors.index.json", tmp_path / "near.safetensors", receipt=False)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "near.safetensors").read_bytes()


def test_inspect_asks_the_hub_once(there, tmp_path) -> None:
    save_file({f"w{i}": torch.zeros(50, 50) for i in range(20)}, tmp_path / "m.safetensors")
    there.push("u/s", {"m.safetensors": (tmp_path / "m.safetensors").read_bytes()})
    there.forget()
    assert ckptkit.inspect("hf://u/s/m.safetensors")["format"] == "safetensors"
    assert len(there.server.asked) == 1
    assert len(there.cdn.asked) <= 2
