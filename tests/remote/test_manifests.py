"""Manifests of files at URLs: made, held against where they were made, against a copy, and against other places."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Done
from support.far import below, serving

import ckptkit
from ckptkit.errors import CorruptError, FileAccessError, VerifyError

FIXTURES = Path(__file__).parents[2] / "fixtures"
ROOT = "far://bucket/models"
GIVEN = "far://user:hunter2@bucket/models"


Command = Callable[..., Done]


def pth(seed: int) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.full((3,), float(seed))}, buffer)
    return buffer.getvalue()


def codes(done: Done) -> list[str]:
    """The codes of a check's findings, sorted."""
    return sorted(each["code"] for each in json.loads(done.out)["findings"])


def written(path: str = "weights.lock.json") -> dict[str, Any]:
    document: dict[str, Any] = json.loads(Path(path).read_text(encoding="ascii"))
    return document


def test_a_manifest_says_where_it_was_made_and_is_that_of_a_copy(command: Command) -> None:
    shutil.copytree(FIXTURES, "copy")
    with serving(below(FIXTURES, ROOT)) as store:
        assert command("manifest", f"{ROOT}/", "-o", "weights.lock.json").code == 0
        assert store.of("listing") == [ROOT]
        assert command("manifest", "copy", "-o", "near.json").code == 0
        far, near = written(), written("near.json")
        assert far["origin"] == ROOT and far["folders"] == ["."] and "origin" not in near
        assert far["files"] == [{**each, "path": each["path"].removeprefix("copy/")} for each in near["files"]]
        assert len(far["files"]) == 9
        for paths in (
            [ROOT],
            [f"{ROOT}/"],
            [],
            ["copy"],
            [f"{ROOT}/tied.pth"],
            ["copy/tied.pth"],
            [f"{ROOT}/training"],
        ):
            done = command("check", *paths, "--manifest", "weights.lock.json", "--format", "json")
            assert (done.code, codes(done)) == (0, []), (paths, done)
        for paths in ([ROOT], [f"{ROOT}/tied.pth", f"{ROOT}/training/step-2"], ["copy"]):
            done = command("check", *paths, "--manifest", "near.json", "--format", "json")
            assert (done.code, codes(done)) == (0, []), (paths, done)


def test_what_is_other_than_recorded(command: Command) -> None:
    with serving({f"{ROOT}/{name}.pth": pth(number) for number, name in enumerate("abcd")}) as store:
        assert command("manifest", ROOT, "-o", "w.json").code == 0
        store.files[f"{ROOT}/b.pth"] = pth(7)
        del store.files[f"{ROOT}/c.pth"]
        store.files[f"{ROOT}/sub/e.pth"] = pth(8)
        for paths in ([ROOT], []):
            done = command("check", *paths, "--manifest", "w.json", "--format", "json")
            assert (done.code, codes(done)) == (1, ["file-extra", "file-missing", "tensors-differ"])
        for name, code in (("a", []), ("b", ["tensors-differ"]), ("c", ["file-missing"]), ("sub/e", ["file-extra"])):
            done = command("check", f"{ROOT}/{name}.pth", "--manifest", "w.json", "--format", "json")
            assert (done.code, codes(done)) == (int(bool(code)), code), name
        elsewhere = command("check", "far://bucket/others", "--manifest", "w.json")
        assert elsewhere.code == 2 and "no such file" in elsewhere.out


def test_a_manifest_of_this_machine_is_held_against_an_upload(command: Command) -> None:
    Path("models/sub").mkdir(parents=True)
    for number, name in enumerate(("a.pth", "sub/a.pth")):
        Path("models", name).write_bytes(pth(number))
    assert command("manifest", "models", "-o", "weights.lock.json").code == 0
    assert command("manifest", "models", "-o", "models/own.json").code == 0
    for root in ("far://bucket/models", "far://bucket/releases/1"):
        with serving({**below("models", root), "far://bucket/other.pth": pth(5)}):
            for manifest in ("weights.lock.json", "models/own.json"):
                for path in (root, f"{root}/a.pth", f"{root}/sub", f"{root}/sub/a.pth"):
                    done = command("check", path, "--manifest", manifest, "--format", "json")
                    assert (done.code, codes(done)) == (0, []), (manifest, path, done)
                    assert json.loads(done.out)["checked"] == (2 if path == root else 1)


def test_update_renews_what_has_changed(command: Command) -> None:
    with serving({f"{ROOT}/{name}.pth": pth(number) for number, name in enumerate("abc")}) as store:
        assert command("manifest", ROOT, "-o", "w.json").code == 0
        before = {each["path"]: each for each in written("w.json")["files"]}
        store.files[f"{ROOT}/b.pth"] = pth(9)
        del store.files[f"{ROOT}/c.pth"]
        done = command("manifest", "--update", "-o", "w.json")
        assert done.code == 0 and "1 changed, 1 removed, 1 unchanged" in done.out, done
        document = written("w.json")
        assert document["origin"] == ROOT and [each["path"] for each in document["files"]] == ["a.pth", "b.pth"]
        assert document["files"][0] == before["a.pth"] and document["files"][1] != before["b.pth"]
        store.files["far://bucket/others/d.pth"] = pth(1)
        other = command("manifest", "far://bucket/others/d.pth", "--update", "-o", "w.json")
        assert other.code == 2 and "is not below the manifest's folder" in other.err
        assert written("w.json") == document


def test_the_folder_of_several_urls_is_what_they_have_in_common(command: Command, tmp_path: Path) -> None:
    files = {**below(FIXTURES / "training", f"{ROOT}/training"), f"{ROOT}/a/m.pth": pth(1), "far://other/m.pth": pth(2)}
    with serving(files):
        made = ckptkit.manifest([f"{ROOT}/training/step-2", f"{ROOT}/a/m.pth"])
        assert (made.origin, made.folder) == (ROOT, ROOT)
        assert [each.path for each in made.files] == ["a/m.pth", "training/step-2"]
        assert ckptkit.manifest(f"{ROOT}/training/step-2").origin == f"{ROOT}/training"
        with pytest.raises(FileAccessError, match="no folder in common"):
            ckptkit.manifest([f"{ROOT}/a/m.pth", "far://other/m.pth"])
        Path("here.pth").write_bytes(pth(1))
        with pytest.raises(VerifyError, match="give URLs or local paths, not both"):
            ckptkit.manifest([f"{ROOT}/a/m.pth", "here.pth"])
        with pytest.raises(FileAccessError, match="ckptkit cannot write to a URL"):
            ckptkit.manifest(f"{ROOT}/a", f"{ROOT}/w.json")


def test_an_origin_must_be_a_url(command: Command) -> None:
    with serving({f"{ROOT}/a.pth": pth(1)}):
        assert command("manifest", ROOT, "-o", "w.json").code == 0
        document = written("w.json")
    for origin in ("/etc", 7, ["far://a"]):
        Path("w.json").write_text(json.dumps({**document, "origin": origin}), encoding="ascii")
        with pytest.raises(CorruptError, match="origin"):
            ckptkit.check(manifest="w.json")


def test_a_manifest_that_lies_at_a_url(command: Command) -> None:
    Path("models").mkdir()
    Path("models/a.pth").write_bytes(pth(1))
    assert command("manifest", "models", "-o", "models/w.json").code == 0
    with serving(below("models", ROOT)):
        for paths in ([], [ROOT], [f"{ROOT}/a.pth"]):
            done = command("check", *paths, "--manifest", f"{ROOT}/w.json", "--format", "json")
            assert (done.code, codes(done)) == (0, []), (paths, done)


def test_credentials_stand_in_no_manifest_report_or_message(command: Command) -> None:
    signed = "far://other/m.pth?X-Amz-Signature=0a1b2c3d"
    files = {**below(FIXTURES, GIVEN), signed: pth(1), f"{GIVEN}/broken.pth": b"x" * 99}
    outputs = ["w.json", "c.json", "o.safetensors"]
    with serving(files):
        for arguments in (
            ("inspect", signed), ("inspect", GIVEN, "--json"), ("inspect", f"{GIVEN}/nothing/"),
            ("inspect", f"{GIVEN}/broken.pth"), ("inspect", f"{GIVEN}/training", "--tag", "none"),
            ("check", GIVEN, "--no-pickle", "--format", "json"), ("check", signed, "--json-lines"),
            ("convert", f"{GIVEN}/training/step-2/__0_0.distcp", "part.pth"),
            ("convert", signed, "o.safetensors"), ("convert", GIVEN, "out/", "--to", "safetensors", "--json"),
            ("manifest", f"{GIVEN}/tied.pth", f"{GIVEN}/training", "-o", "w.json"),
            ("manifest", signed, "-o", "c.json"),
            ("check", GIVEN, "--manifest", "w.json"), ("diff", signed, f"{GIVEN}/tied.pth"),
        ):  # fmt: skip
            done = command(*arguments)
            for text in (done.out, done.err):
                assert "hunter2" not in text and "0a1b2c3d" not in text, arguments
            assert "***" in done.out + done.err or arguments[0] in ("manifest", "convert", "diff"), done
        assert written("w.json")["origin"] == "far://***@bucket/models"
        assert [each["path"] for each in written("c.json")["files"]] == ["m.pth"]
    for name in outputs:
        assert b"hunter2" not in Path(name).read_bytes() and b"0a1b2c3d" not in Path(name).read_bytes(), name


@pytest.mark.parametrize("lists", [True, False])
def test_what_a_server_does_not_give_is_not_missing(command: Command, lists: bool) -> None:
    files = {f"{ROOT}/a.pth": pth(1), f"{ROOT}/b.pth": pth(2)}
    with serving(files) as store:
        assert command("manifest", *files, "-o", "lock.json").code == 0
    recorded = Path("lock.json").read_text()
    with serving(files, lists=lists) as store:
        for path in files:
            store.failing[path] = "access is denied"
        done = command("check", "--manifest", "lock.json", "--json")
        assert done.code == 2
        assert codes(done) == ["file-unreadable"] * 2
        assert command("manifest", "--update", "-o", "lock.json").code == 2
        assert Path("lock.json").read_text() == recorded
        store.failing.clear()
        del store.files[f"{ROOT}/a.pth"]
        done = command("check", "--manifest", "lock.json", "--json")
        assert (done.code, codes(done)) == (1, ["file-missing"])
