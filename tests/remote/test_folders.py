"""Folders, repositories and prefixes at URLs: what is found in them, what they are, and how little is asked for it."""

from __future__ import annotations

import io
import json
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from support.commands import Done
from support.far import Asked, FarStore, below, serving
from support.files import SameBits
from support.hub import hub
from support.sharded import Samples

import ckptkit
from ckptkit import places, remote
from ckptkit.errors import CkptkitError, CorruptError, FileAccessError, MissingFileError
from ckptkit.remote.store import FarFile

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FIXTURES = Path(__file__).parents[2] / "fixtures"
WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
ROOT = "far://bucket/models"


def pth(value: object = WEIGHTS) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


SAFE = safetensors_bytes(WEIGHTS, {"format": "pt"})


class Runs:
    """Whatever unpickles it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("true",)


EVIL = pickle.dumps(Runs())


def told(work: Callable[[str], object], path: str, root: str) -> str:
    """What comes of a path, or is said of it, with ``ROOT`` for where it lies."""
    try:
        found = work(path)
    except CkptkitError as error:
        found = [type(error).__name__, str(error)]
    return from_root(json.dumps(found), root)


def from_root(text: str, root: str) -> str:
    """A text with ``ROOT`` for where files lie; what would be written is written beside them, or here."""
    text = re.sub(r"(ckptkit convert \S+) \S*/([^/\s]+) ", r"\1 \2 ", text.replace(root, ROOT))
    return re.sub(r"(ckptkit convert \S+ )\S*/([^/\s]+)(?=\W)", r"\1\2", text)


# A sharded checkpoint.


def test_sharded_checkpoints_are_what_they_are_on_the_disk(sharded: Samples, same_bits: SameBits) -> None:
    loaded: set[str] = set()
    for case, sample in sharded.items():
        with serving(below(sample.folder, ROOT)) as store:
            far = told(ckptkit.inspect, ROOT, ROOT)
            assert store.of("listing") == [ROOT], case
            opened = store.of("open")
            assert len(opened) == len(set(opened)), f"{case}: a file was opened twice"
            local = told(ckptkit.inspect, str(sample.folder), str(sample.folder))
            assert far == local, case
            kind = re.sub(r"[_0-9]+\Z", "", case)
            if kind in loaded:
                continue
            try:
                expected = ckptkit.load_state_dict(sample.folder)
            except CkptkitError:
                continue
            store.asked.clear()
            state = ckptkit.load_state_dict(ROOT)
            assert list(state) == list(expected), case
            assert all(same_bits(state[name], expected[name]) for name in expected), case
            sizes, came = [len(data) for data in store.files.values()], [each.nbytes for each in store.asked]
            heads = sum(each.nbytes for each in store.asked if each.what == "open")
            assert sum(came) - heads <= sum(sizes), f"{case}: bytes came twice"
            loaded.add(kind)
    assert len(loaded) > 9


def test_a_folder_of_dcp_takes_its_metadata_and_one_listing(tmp_path: Path) -> None:
    tree = {"model": {f"layer{number}.weight": torch.randn(64, 64) for number in range(40)}}
    dcp.save(tree, checkpoint_id=tmp_path / "step-2", no_dist=True)
    for heads in (True, False):
        with serving(below(tmp_path / "step-2", f"{ROOT}/step-2"), heads=heads) as store:
            document = ckptkit.inspect(f"{ROOT}/step-2/")
            assert (document["format"], len(document["tensors"])) == ("dcp", 40)
            assert [(each.what, each.url) for each in store.asked][:2] == [
                ("listing", f"{ROOT}/step-2"),
                ("open", f"{ROOT}/step-2/.metadata"),
            ]
            assert {each.what for each in store.asked[2:]} <= (set() if heads else {"read"})
            assert store.nbytes <= len(store.files[f"{ROOT}/step-2/.metadata"]) + 1


def test_values_are_read_once_the_command_that_listed_them_is_over() -> None:
    with serving(below(FIXTURES / "training" / "step-2", ROOT)) as store:
        with ckptkit.open(ROOT) as file:
            before = len(store.of("listing"))
            far = {name: entry.torch() for name, entry in file.state_dict.items()}
        with ckptkit.open(FIXTURES / "training" / "step-2") as file:
            assert all(torch.equal(far[name], entry.torch()) for name, entry in file.state_dict.items())
        assert len(store.of("listing")) == before == 1


def test_a_file_that_is_another_than_was_listed_is_no_part_of_it() -> None:
    class Stale(FarStore):
        """Lists files as they were."""

        def listing(self, url: str) -> dict[str, int]:
            return {name: nbytes + name.endswith(".distcp") for name, nbytes in super().listing(url).items()}

    with serving(below(FIXTURES / "training" / "step-2", ROOT)) as store:
        store.__class__ = Stale
        with pytest.raises(CorruptError, match=r"bytes but was listed with .*: it changed"):
            ckptkit.load_state_dict(ROOT)


def test_where_nothing_is_listed_the_metadata_leads_to_its_files(sharded: Samples) -> None:
    read = 0
    for case, sample in sharded.items():
        if not (sample.folder / ".metadata").is_file():
            continue
        with serving(below(sample.folder, ROOT), lists=False) as store:
            far = told(ckptkit.inspect, f"{ROOT}/.metadata", f"{ROOT}/.metadata")
            local = told(ckptkit.inspect, str(sample.folder), str(sample.folder))
            read += '"format": "dcp"' in local and far == local
            assert not store.of("listing"), case
            with pytest.raises(FileAccessError):
                ckptkit.inspect(ROOT)
    assert read > 8


def test_an_index_finds_its_shards_where_nothing_is_listed() -> None:
    names = ["model.safetensors.index.json", *(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))]
    files = {f"{ROOT}/{name}": (FIXTURES / name).read_bytes() for name in names}
    with serving(files, lists=False):
        far = told(ckptkit.inspect, f"{ROOT}/{names[0]}", ROOT)
        assert far == told(ckptkit.inspect, str(FIXTURES / names[0]), str(FIXTURES))


# What points to a step; parts.


def test_steps_tags_and_pointers(command: Callable[..., Done]) -> None:
    step = below(FIXTURES / "training" / "step-2", f"{ROOT}/global_step2")
    files = {**step, **below(FIXTURES / "training" / "step-4", f"{ROOT}/global_step4")}
    with serving(files) as store:
        several = command("diff", ROOT, ROOT)
        assert several.code == 2 and "global_step2, global_step4" in several.err and "--tag" in several.err
        assert (
            json.loads(command("inspect", "--json", ROOT, "--tag", "global_step2").out)["files"][0]["format"] == "dcp"
        )
        missing = command("inspect", ROOT, "--tag", "global_step7")
        assert missing.code == 2 and "no step 'global_step7'" in missing.err
        changed = command("diff", "--tag-a", "global_step2", "--tag-b", "global_step4", ROOT, ROOT)
        assert changed.code == 1, changed.err
        store.files[f"{ROOT}/latest"] = b"global_step4\n"
        document = json.loads(command("inspect", "--json", ROOT).out)["files"]
        assert [(each["path"], each["layout"]["tag"]) for each in document] == [(ROOT, "global_step4")]
        store.files[f"{ROOT}/latest"] = b"../elsewhere"
        assert "leads out of the folder" in command("inspect", ROOT).err


def test_a_part_is_known_by_what_lies_beside_it(command: Callable[..., Done]) -> None:
    training = below(FIXTURES / "training" / "step-2", f"{ROOT}/step-2")
    files = {**training, **below(FIXTURES, f"{ROOT}/sharded")}
    shard = f"{ROOT}/sharded/model-00001-of-00002.safetensors"
    with serving(files) as store:
        refused = command("convert", shard, "part.safetensors")
        assert refused.code == 2 and f"give {ROOT}/sharded/model.safetensors.index.json" in refused.err
        assert not store.of("listing"), "its index has the usual name"
        assert f"give {ROOT}/step-2" in command("convert", f"{ROOT}/step-2/__0_0.distcp", "part.safetensors").err
        assert command("check", shard).code == 0, "it stands for all, as on the disk"
        store.has_listings = False
        refused = command("convert", shard, "part.safetensors")
        assert refused.code == 2 and f"give {ROOT}/sharded/model.safetensors.index.json" in refused.err
        del store.files[f"{ROOT}/sharded/model.safetensors.index.json"]
        assert "shard 1 of 2" in command("convert", shard, "part.safetensors").err
        assert "rank 0" in command("convert", f"{ROOT}/step-2/__0_0.distcp", "part.safetensors").err
    assert not Path("part.safetensors").exists()


# A folder of any files.


def timeless(text: str) -> str:
    """The text without how long the command took."""
    return re.sub(r"\bin (under )?\d+\.\d s\b", "in N s", text)


def test_a_repository_is_walked_through_like_a_folder(command: Callable[..., Done]) -> None:
    for arguments in (["inspect", "--json"], ["inspect"], ["check", "--format", "json", "--no-pickle"], ["check"]):
        with serving(below(FIXTURES, ROOT)) as store:
            far = command(*arguments, ROOT)
            asked, files = list(store.asked), store.files
        local = command(*arguments, FIXTURES)
        assert far.code == local.code
        assert far.out == from_root(local.out, str(FIXTURES)), arguments
        assert timeless(far.err) == timeless(from_root(local.err, str(FIXTURES))), arguments
        if arguments[0] == "inspect":
            looked_at = [each.url for each in asked if each.what == "open"]
            assert [each.what for each in asked].count("listing") == 1
            assert sorted(looked_at) == sorted(set(looked_at)), "each file is opened once"
            assert set(looked_at) <= set(files)


@pytest.mark.parametrize("heads", [True, False])
def test_files_are_opened_side_by_side(*, heads: bool) -> None:
    together = threading.Barrier(16, timeout=20)

    class Waiting(FarStore):
        """Answers once sixteen ask."""

        def open(self, url: str, nbytes: int) -> FarFile:
            together.wait()
            return super().open(url, nbytes)

    class WaitingToRead(FarStore):
        """Answers once sixteen read; that there is a file it says at once."""

        def read(self, file: FarFile, offset: int, nbytes: int) -> bytes:
            together.wait()
            return super().read(file, offset, nbytes)

    files = {f"{ROOT}/{number % 4}/{number}/config.json": b"{}" for number in range(158)}
    files.update({f"{ROOT}/0/{name}-00001-of-00001.safetensors": SAFE for name in ("adapter", "model")})
    with serving(files, heads=heads) as store:
        store.__class__ = Waiting if heads else WaitingToRead
        with remote.session():
            from ckptkit.formats.folder import Surveyor

            surveyor = Surveyor()
            assert surveyor.folder(ROOT) is None
            survey = surveyor.result()
        assert [each.path for each in survey.checkpoints] == [url for url in files if url.endswith(".safetensors")]
        assert survey.passed_over == {"JSON file": 158}
        assert len(store.of("open")) == 160 and len(store.of("read")) == (0 if heads else 160)


def test_files_of_ranks_are_read_side_by_side() -> None:
    together = threading.Barrier(8, timeout=20)

    class Waiting(FarStore):
        """Answers once eight ask."""

        def open(self, url: str, nbytes: int) -> FarFile:
            together.wait()
            return super().open(url, nbytes)

    with serving({f"{ROOT}/model_world_size_16_rank_{rank}.pt": pth() for rank in range(16)}) as store:
        store.__class__ = Waiting
        document = ckptkit.inspect(ROOT)
        assert (document["format"], document["layout"]["world_size"]) == ("fsdp", 16)
        assert [each.what for each in store.asked] == ["listing"] + 16 * ["open"]


def test_an_admission_test_of_a_repository(command: Callable[..., Done]) -> None:
    clean = {
        f"{ROOT}/README.md": b"# A model\n",
        f"{ROOT}/config.json": b"{}",
        f"{ROOT}/model.safetensors": SAFE,
        f"{ROOT}/onnx/vocab.txt": b"a\nb\n",
        f"{ROOT}/empty": b"",
    }
    admission = ("check", "--no-pickle", "--max-trust", "safe", ROOT)
    with serving(clean) as store:
        assert command(*admission).code == 0
        assert store.of("listing") == [ROOT] and len(store.of("open")) <= len(clean) + 1
    for name in (
        "evil.pkl", "no_ending", "deep/er/still/than/any/checkpoint/is/tokenizer.bin", ".hidden/evil.pth",
        "a//evil.pkl", "../evil.pkl", "./evil", "a/../../evil", "with space?and#marks.bin", "a\\evil.pkl", "ä/ö.bin",
    ):  # fmt: skip
        for evil in (EVIL, pth({"w": Runs()})):
            with serving({**clean, f"{ROOT}/{name}": evil}):
                done = command(*admission)
                assert done.code == (2 if evil is EVIL and name.endswith(".pth") else 1), (name, done)
                assert f"{ROOT}/{name}" in done.out, name
                assert command("inspect", f"{ROOT}/{name}").code, name


def test_what_cannot_be_read_is_told_and_the_others_go_on(command: Callable[..., Done]) -> None:
    with serving({f"{ROOT}/{name}.pth": pth() for name in "abc"}) as store:
        store.failing[f"{ROOT}/b.pth"] = "the server answers 403"
        done = command("inspect", "--json", ROOT)
        assert done.code == 2 and "b.pth: the server answers 403" in done.err
        assert [each["error"] is None for each in json.loads(done.out)["files"]] == [True, True, False]
        assert command("check", ROOT).code == 2


def test_a_file_and_a_folder_of_one_name_are_both_found(command: Callable[..., Done]) -> None:
    with serving({f"{ROOT}/a": pth(), f"{ROOT}/a/b": pth(), f"{ROOT}/a/": b"", f"{ROOT}/.git/config": b"x"}):
        document = json.loads(command("inspect", "--json", ROOT).out)
        assert [each["path"] for each in document["files"]] == [f"{ROOT}/a", f"{ROOT}/a/b"]
        assert document["passed_over"] == {".git folder": 1}


def test_what_is_not_there(command: Callable[..., Done]) -> None:
    with serving({f"{ROOT}/notes/a.txt": b"text", f"{ROOT}x/m.pth": pth()}) as store:
        for path, what in (
            (f"{ROOT}/nothing", "no such file"),
            (f"{ROOT}/nothing/", "there are no files below this URL"),
            (f"{ROOT}/nothing.pth", "no such file"),
            (ROOT, "a folder without checkpoint files; skipped: 1 file (1 text file)"),
        ):
            for name in ("inspect", "check"):
                done = command(name, path)
                assert done.code == 2 and what in done.out + done.err, (name, path, done)
        store.has_listings = False
        assert "does not list its files" in command("inspect", f"{ROOT}/").err

        def refused(url: str) -> dict[str, int]:
            raise FileAccessError(f"{url}: the server answers 403 to a listing", path=url)

        store.has_listings, store.listing = True, refused  # type: ignore[method-assign]
        assert "answers 403 to a listing" in command("inspect", f"{ROOT}/nothing").err
        assert command("inspect", f"{ROOT}x/m.pth").code == 0, "it can be read, if not listed"


def test_a_repository_of_the_hub(command: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name.removeprefix(f"{ROOT}/"): data for name, data in below(FIXTURES, ROOT).items()}
    with hub() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.server.url)
        stand_in.push("user/repo", files)
        for path in ("hf://user/repo", "hf://user/repo@main/"):
            stand_in.server.forget()
            far = command("inspect", "--json", path)
            assert sum("/tree/" in each.path for each in stand_in.server.asked) == 1, "one listing"
            local = command("inspect", "--json", FIXTURES)
            root = path.rstrip("/")
            assert (far.code, far.err) == (local.code, local.err)
            assert from_root(far.out, root) == from_root(local.out, str(FIXTURES))
        admission = ("check", "--no-pickle", "--max-trust", "safe", "hf://user/repo")
        assert command(*admission).code == 1
        stand_in.push("user/repo", {"model.safetensors": SAFE, "config.json": b"{}", "README.md": b"# A model"})
        assert command(*admission).code == 0
        gone = command("inspect", "hf://user/gone")
        assert gone.code == 2 and "no repository 'user/gone'" in gone.err


# Conversions.


def test_folder_to_folder(command: Callable[..., Done], same_bits: SameBits) -> None:
    options = ("--to", "safetensors", "--weights-only")
    with serving(below(FIXTURES, ROOT)) as store:
        far = command("convert", ROOT, "far/", *options)
        assert len(store.of("listing")) == 1
    local = command("convert", FIXTURES, "near/", *options)
    assert far.code == local.code == 2 and "tied.pth" in far.err, "one of them needs an answer"
    names = sorted(path.relative_to("near").as_posix() for path in Path("near").rglob("*.safetensors"))
    assert names == sorted(path.relative_to("far").as_posix() for path in Path("far").rglob("*.safetensors"))
    assert len(names) == 8 and "training/step-2.safetensors" in names
    for name in names:
        far_file, near_file = load_file(Path("far", name)), load_file(Path("near", name))
        assert list(far_file) == list(near_file) and all(map(same_bits, far_file.values(), near_file.values())), name


@pytest.mark.parametrize(
    ("path", "name"),
    [("step-2", "step-2"), ("step-2/", "step-2"), ("best.pth", "best"), ("v1.5/", "v1.5")],
)
def test_an_output_is_named_after_the_last_segment(command: Callable[..., Done], path: str, name: str) -> None:
    files = {**below(FIXTURES / "training" / "step-2", f"{ROOT}/step-2"), f"{ROOT}/best.pth": pth()}
    files.update(below(FIXTURES / "training" / "step-2", f"{ROOT}/v1.5"))
    with serving(files):
        done = command("convert", f"{ROOT}/{path}", "out/", "--to", "safetensors", "--weights-only")
    assert done.code == 0, done.err
    assert [each.name for each in Path("out").iterdir()] == [f"{name}.safetensors"]


def test_nothing_is_written_to_a_url(command: Callable[..., Done], tmp_path: Path) -> None:
    with serving({f"{ROOT}/m.pth": pth()}) as store:
        for arguments in (
            ("convert", f"{ROOT}/m.pth", f"{ROOT}/m.safetensors"),
            ("convert", f"{ROOT}/m.pth", "s3://bucket/m.safetensors"),
            ("convert", ROOT, f"{ROOT}/out/", "--to", "safetensors"),
            ("convert", f"{ROOT}/m.pth", f"{ROOT}/out", "--to", "dcp"),
        ):
            done = command(*arguments)
            assert done.code == 2 and "ckptkit cannot write to a URL" in done.err, done
        assert not store.asked
        with pytest.raises(FileAccessError, match="ckptkit cannot write to a URL"):
            ckptkit.save(WEIGHTS, f"{ROOT}/m.safetensors")
    assert not list(tmp_path.iterdir())


# Paths.


def test_urls_have_slashes_on_every_system() -> None:
    assert places.below("s3://b/x/", "a/b.pth") == "s3://b/x/a/b.pth"
    assert places.split("s3://b/x/m.pth") == ("s3://b/x", "m.pth")
    assert places.split("s3://b") == ("s3://b", "")
    assert places.split("https://h/a/m.pth?sig=x/y") == ("https://h/a", "m.pth")
    assert places.own_name("hf://user/repo/") == "repo" and places.own_name("https://h/m.pth?a=b/c") == "m.pth"
    assert (
        places.relative("s3://b/x/a/m.pth", "s3://b/x") == "a/m.pth" and places.relative("s3://b/x/", "s3://b/x") == "."
    )
    assert places.relative("s3://b/xy/m.pth", "s3://b/x") == "s3://b/xy/m.pth"
    assert not places.is_url("C:/models") and not places.is_url("models//m.pth") and places.is_url("memory://m")


def test_a_question_of_one_command_is_asked_once() -> None:
    with serving({f"{ROOT}/a/m.pth": pth(), f"{ROOT}/a/b/n": b"x"}) as store, remote.session():
        assert places.isdir(f"{ROOT}/a") and places.isdir(f"{ROOT}/a/b") and places.isfile(f"{ROOT}/a/m.pth")
        assert not places.exists(f"{ROOT}/a/c") and places.listdir(f"{ROOT}/a") == ["b", "m.pth"]
        assert places.size(f"{ROOT}/a/b/n") == 1 and places.head(f"{ROOT}/a/b/n", 9) == b"x"
        assert store.asked == [Asked("listing", f"{ROOT}/a"), Asked("open", f"{ROOT}/a/b/n", 0, 1)]
        assert places.opened(f"{ROOT}/a/b/n").read(0, 1) == b"x", "it was opened already"
        with pytest.raises(MissingFileError):
            places.size(f"{ROOT}/a/c")
        assert len(store.asked) == 2
