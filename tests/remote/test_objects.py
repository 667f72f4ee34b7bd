"""Files in object stores: s3 by moto and s3fs, memory; what is asked of them; what goes wrong there."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.object_server import Asked, ObjectServer

import ckptkit
from ckptkit.remote import retries, store_of
from ckptkit.remote.objects import ObjectStore

SaveAs = Callable[..., Path]

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"


@pytest.fixture(scope="module")
def many() -> dict[str, torch.Tensor]:
    """300 tensors, more than comes along with anything."""
    torch.manual_seed(1)
    return {f"encoder.layer.{i}.attention.weight": torch.randn(32, 64) for i in range(300)}


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No pause takes time; how long each would have been."""
    found: list[float] = []
    monkeypatch.setattr(retries, "sleep", found.append)
    return found


def of_file(s3: ObjectServer) -> list[Asked]:
    return [each for each in s3.asked if each.method in ("GET", "HEAD")]


# What is read, and how much.


def test_inspect_takes_few_requests(s3: ObjectServer, many: dict[str, torch.Tensor], save: SaveAs) -> None:
    url = s3.put("a/model.pth", save(many))
    found = ckptkit.inspect(url)
    assert (found["path"], len(found["tensors"]), found["kind"]) == (url, 300, "state_dict")
    assert len(of_file(s3)) <= 3
    assert s3.nbytes <= 256 << 10


def test_inspect_of_safetensors_takes_two(s3: ObjectServer, many: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(many, tmp_path / "m.safetensors")
    url = s3.put("model.safetensors", tmp_path / "m.safetensors")
    assert len(ckptkit.inspect(url)["tensors"]) == 300
    assert len(of_file(s3)) <= 2
    assert s3.nbytes <= 256 << 10


def test_every_command_reads_from_s3(
    s3: ObjectServer, many: dict[str, torch.Tensor], save: SaveAs, tmp_path: Path, same_bits: Callable[..., bool]
) -> None:
    path = save(many)
    url = s3.put("model.pth", path)
    report = ckptkit.convert(url, tmp_path / "out.safetensors")
    assert report.ok
    loaded = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert all(same_bits(loaded[name], value) for name, value in many.items())
    assert ckptkit.diff(url, path).equal
    assert not ckptkit.diff(url, s3.put("other.pth", save({**many, "x": torch.ones(1)}, "x.pth"))).equal
    assert ckptkit.check(url, no_nan=True).ok
    state = ckptkit.load_state_dict(url)
    assert all(same_bits(state[name], value) for name, value in many.items())
    assert (tmp_path / "out.safetensors").is_file()


def test_a_sharded_checkpoint_is_read_by_its_index(s3: ObjectServer, tmp_path: Path) -> None:
    state = {f"w{i}": torch.full((64, 64), float(i)) for i in range(8)}
    ckptkit.save(state, tmp_path / "model.safetensors", max_shard_size="40KB")
    index = next(tmp_path.glob("*.index.json"))
    s3.put_folder(tmp_path, "sharded")
    loaded = ckptkit.load_state_dict(f"s3://models/sharded/{index.name}")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_training_folder_is_one_checkpoint(s3: ObjectServer, tmp_path: Path) -> None:
    local = FIXTURES / "training" / "step-4"
    url = s3.put_folder(local, "run/step-4")
    s3.forget()
    found = ckptkit.inspect(url)
    assert found["format"] == ckptkit.inspect(local)["format"] == "dcp"
    assert found["tensors"] == ckptkit.inspect(local)["tensors"]
    assert ckptkit.diff(url, local).equal
    assert ckptkit.convert(url, tmp_path / "out.safetensors", weights_only=True).ok
    assert ckptkit.diff(tmp_path / "out.safetensors", local, section_b="model").equal


def test_a_training_folder_is_inspected_by_its_metadata_and_one_listing(s3: ObjectServer) -> None:
    url = s3.put_folder(FIXTURES / "training" / "step-4", "run/step-4")
    s3.forget()
    ckptkit.inspect(url)
    assert len([each for each in s3.asked if "list-type" in each.query]) == 1
    assert len([each for each in s3.asked if each.path.endswith(".metadata")]) == 1
    assert len(s3.asked) <= 3, "step counts are values"


def test_a_prefix_is_searched_by_content(s3: ObjectServer, save: SaveAs, tmp_path: Path) -> None:
    for name in ("a.pth", "deep/b.bin"):
        s3.put(f"zoo/{name}", save({"w": torch.ones(4)}))
    s3.put("zoo/README.md", b"# Words")
    done = ckptkit.check("s3://models/zoo/", no_pickle=False)
    assert done.ok
    assert [result.path for result in done.results] == ["s3://models/zoo/a.pth", "s3://models/zoo/deep/b.bin"]
    assert not ckptkit.check("s3://models/zoo", no_pickle=True).ok
    assert ckptkit.check("s3://models/zoo", jobs=2).ok
    report = ckptkit.convert("s3://models/zoo", tmp_path / "out", to="safetensors")
    assert report.ok
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.safetensors")) == ["a.safetensors", "b.safetensors"]


def test_entries_are_read_from_several_threads_after_the_session(s3: ObjectServer, save: SaveAs) -> None:
    state = {f"w{i}": torch.full((100, 100), float(i)) for i in range(20)}
    url = s3.put("threads.pth", save(state))
    with ckptkit.open(url, storage_options={"default_block_size": 1 << 20}) as file, ThreadPoolExecutor(4) as threads:
        values = threads.map(lambda name: (name, file.state_dict[name].numpy()), list(state))
        assert all((array == state[name].numpy()).all() for name, array in values)
        opened = list(threads.map(lambda _: ckptkit.inspect(url)["kind"], range(8)))
    assert opened == ["state_dict"] * 8


def test_memory_is_a_store_like_any_other(save: SaveAs, tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/bucket/deep/model.pth", save({"a": torch.arange(6.0)}).read_bytes())
    system.pipe("/bucket/deep/er/notes.txt", b"text")
    url = "memory://bucket/deep/model.pth"
    assert ckptkit.load_state_dict(url)["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert store_of(url).listing("memory://bucket") == {"deep/model.pth": system.size("/bucket/deep/model.pth"),
                                                         "deep/er/notes.txt": 4}  # fmt: skip
    assert store_of(url).listing("memory://nowhere") == {}
    assert ckptkit.convert(url, tmp_path / "out.safetensors").ok
    system.rm("/bucket", recursive=True)
    with pytest.raises(ckptkit.MissingFileError, match=r"memory://bucket/deep/model\.pth: no such file"):
        ckptkit.open(url)


def test_what_lies_below_a_prefix(s3: ObjectServer) -> None:
    for key in ("list/a/x.bin", "list/a/b/y.bin", "list/z", "listed", "list/marker/"):
        s3.put(key, b"" if key.endswith("/") else key.encode())
    s3.forget()
    store = store_of("s3://models/")
    assert store.listing("s3://models/list") == {"a/x.bin": 12, "a/b/y.bin": 14, "z": 6}
    assert len(s3.asked) == 1
    assert store.listing("s3://models/list/") == store.listing("s3://models/list")
    assert store.listing("s3://models/list/a") == {"x.bin": 12, "b/y.bin": 14}
    assert store.listing("s3://models/nothing") == {}
    with pytest.raises(ckptkit.MissingFileError, match="s3://nowhere/list: no such bucket"):
        store.listing("s3://nowhere/list")


def test_an_object_without_bytes_is_an_empty_file(s3: ObjectServer) -> None:
    with pytest.raises(ckptkit.UnknownFormatError, match="the file is empty"):
        ckptkit.open(s3.put("empty", b""))


def test_nothing_is_opened_as_a_file(s3: ObjectServer, save: SaveAs, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    url = s3.put("model.pth", save({"a": torch.ones(3)}))
    fsspec.filesystem("memory").pipe("/model.pth", save({"a": torch.ones(3)}).read_bytes())

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("open() reads ahead by megabytes")

    monkeypatch.setattr(fsspec.AbstractFileSystem, "open", refuse)
    monkeypatch.setattr(MemoryFileSystem, "open", refuse)
    assert ckptkit.diff(url, "memory://model.pth").equal


# What goes wrong.


def test_an_object_that_changes_meanwhile_is_an_error(
    s3: ObjectServer, many: dict[str, torch.Tensor], save: SaveAs, tmp_path: Path
) -> None:
    url = s3.put("changing.pth", save(many))
    s3.forget()
    with ckptkit.open(url) as file:
        s3.put("changing.pth", save({**many, "a": torch.ones(1)}, "b.pth"))
        with pytest.raises(ckptkit.CorruptError, match=r"s3://models/changing.pth: .*changed while it was being read"):
            file.rewrite().save(tmp_path / "out.pth")
    assert list(tmp_path.glob("out*")) == []


def test_a_change_in_the_middle_of_a_conversion_writes_nothing(
    s3: ObjectServer, many: dict[str, torch.Tensor], save: SaveAs, tmp_path: Path
) -> None:
    url = s3.put("changing.pth", save(many))
    other = save({name: value + 1 for name, value in many.items()}, "b.pth").read_bytes()
    s3.forget()
    reads = 0

    def change(asked: Asked) -> None:
        nonlocal reads
        reads += asked.method == "GET"
        if reads == 3:
            reads += 1
            s3.put("changing.pth", other)

    s3.fails = change
    with pytest.raises(ckptkit.CorruptError, match="changed while it was"):
        ckptkit.convert(url, tmp_path / "out.safetensors")
    assert reads > 3
    assert list(tmp_path.glob("*out*")) == []


def test_memory_that_changes_is_told(save: SaveAs, tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/m.pth", save({"a": torch.ones(70_000)}).read_bytes())
    with ckptkit.open("memory://m.pth") as file:
        system.pipe("/m.pth", save({"a": torch.zeros(70_000)}).read_bytes())
        with pytest.raises(ckptkit.CorruptError):
            file.rewrite().save(tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (500, "InternalError"), (503, "ServiceUnavailable"), (408, "RequestTimeout")],
)
def test_what_may_pass_is_tried_again(
    s3: ObjectServer, save: SaveAs, pauses: list[float], status: int, code: str
) -> None:
    url = s3.put("busy.pth", save({"a": torch.ones(3)}))
    s3.forget()
    left = [1, 1]
    s3.fails = lambda asked: (status, code) if left and left.pop() else None
    assert ckptkit.load_state_dict(url)["a"].tolist() == [1, 1, 1]
    assert len(pauses) == 2


def test_a_server_that_stays_busy_is_told_in_one_line(s3: ObjectServer, save: SaveAs, pauses: list[float]) -> None:
    url = s3.put("busy.pth", save({"a": torch.ones(3)}))
    s3.forget()
    s3.fails = lambda asked: (503, "SlowDown")
    with pytest.raises(ckptkit.FileAccessError) as caught:
        ckptkit.open(url)
    assert str(caught.value).startswith(f"{url}: the server does not send it: SlowDown!")
    assert len(s3.asked) == len(pauses) + 1 == retries.RETRIES + 1


@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_who_may_not_read_is_told_what_to_set(s3: ObjectServer, save: SaveAs, pauses: list[float], code: str) -> None:
    url = s3.put("private.pth", save({"a": torch.ones(3)}))
    s3.forget()
    s3.fails = lambda asked: (403, code)
    with pytest.raises(ckptkit.FileAccessError) as caught:
        ckptkit.open(url, storage_options={"secret": "very-secret", "key": "AKIA"})
    said = str(caught.value)
    assert said.startswith(f"{url}: access is refused: {code}!")
    assert "AWS_PROFILE" in said
    assert "anon=true" in said
    assert "\n" not in said
    assert "very-secret" not in said
    assert not pauses
    assert len(s3.asked) == 1


def test_what_packages_say_and_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def refused(self: Any, path: str, **options: Any) -> Any:
        logging.getLogger("azure.identity").warning("four lines of how to sign in")
        raise OSError("Forbidden: b/models/o/m.pth\n Anonymous caller may not")

    monkeypatch.setattr(MemoryFileSystem, "info", refused)
    with pytest.raises(ckptkit.FileAccessError) as caught:
        ckptkit.open("memory://m.pth")
    assert str(caught.value) == (
        "memory://m.pth: access is refused: Forbidden: b/models/o/m.pth Anonymous caller may not; "
        "give its credentials as --storage-option KEY=VALUE"
    )
    assert capsys.readouterr().err == ""


def test_without_credentials(s3: ObjectServer, save: SaveAs, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.put("public.pth", save({"a": torch.ones(3)}), acl="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ckptkit.FileAccessError, match="set AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
        ckptkit.open(url, storage_options={"anon": False})
    assert ckptkit.inspect(url, storage_options={"anon": True})["kind"] == "state_dict"


def test_what_is_not_there(s3: ObjectServer, pauses: list[float]) -> None:
    for url, said in {
        "s3://models/none.pth": "no such file",
        "s3://nowhere/none.pth": "no such bucket",
        "s3://models": "is a folder, not a file",
    }.items():
        with pytest.raises(ckptkit.MissingFileError) as caught:
            store_of(url).open(url, 100)
        assert str(caught.value) == f"{url}: {said}"
    assert not pauses


@pytest.mark.parametrize(("host", "tries"), [("127.0.0.1", retries.RETRIES), ("there-is-none.invalid", 0)])
def test_a_server_that_is_not_there(
    s3: ObjectServer, monkeypatch: pytest.MonkeyPatch, pauses: list[float], host: str, tries: int
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:9")
    with pytest.raises(ckptkit.FileAccessError) as caught:
        ckptkit.open("s3://models/m.pth")
    assert f"{host}:9" in str(caught.value)
    assert "check the network, AWS_ENDPOINT_URL and --storage-option endpoint_url=URL" in str(caught.value)
    assert len(pauses) == tries


def test_a_server_without_ranges_is_refused(s3: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore("s3", {})
    url = s3.put("plain", bytes(range(200)))
    far = store.open(url, 50)
    assert (far.size, far.head) == (200, bytes(range(50)))
    monkeypatch.setattr(s3, "called", _without_ranges(s3.called))
    whole = store.open(url, 50)
    assert whole.size == 200
    assert bytes(range(200)).startswith(whole.head)
    with pytest.raises(ckptkit.FileAccessError, match="does not support ranges"):
        store.read(whole, 100, 50)


def _without_ranges(called: Callable[..., Any]) -> Callable[..., Any]:
    return lambda app, environ, start: called(app, {k: v for k, v in environ.items() if k != "HTTP_RANGE"}, start)


# What is no URL that can be read, and what is not installed.


@pytest.mark.parametrize(
    "url", ["zip://model.pth::s3://models/a.zip", "simplecache::s3://models/a", "tar://a", "dir::s3://a/b"]
)
def test_views_of_other_urls_are_refused(url: str) -> None:
    with pytest.raises(
        ckptkit.FileAccessError, match="name the file itself, and a member of a zip or tar archive as FILE/"
    ):
        ckptkit.open(url)


def test_a_scheme_that_nobody_knows() -> None:
    with pytest.raises(
        ckptkit.FileAccessError, match="sss:// cannot be read: fsspec has no file system with that name"
    ):
        ckptkit.open("sss://models/a.pth")


@pytest.mark.parametrize(
    ("url", "package", "command"),
    [
        ("s3://a/b", "s3fs", "pip install '.[s3]'"),
        ("gs://a/b", "gcsfs", "pip install '.[gs]'"),
        ("abfss://a@b/c", "adlfs", "pip install '.[az]'"),
        ("memory://a", "fsspec", "pip install '.[remote]'"),
        ("sftp://user:pass-word@host/a", "paramiko", "pip install paramiko"),
    ],
)
def test_what_is_not_installed_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, command: str
) -> None:
    real = builtins.__import__

    def lacking(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    import importlib

    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: lacking(name, fromlist=["x"]))
    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ckptkit.MissingDependencyError) as caught:
        ckptkit.open(url)
    assert str(caught.value).endswith(f"run: {command}") or str(caught.value).endswith(f"run {command}")
    assert "pass-word" not in str(caught.value)
    assert "\n" not in str(caught.value)
