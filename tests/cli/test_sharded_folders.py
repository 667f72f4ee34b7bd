"""Every command over folders that several processes wrote: whole, damaged, hostile, and told apart from their parts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from support.commands import Done
from support.sharded import Samples

import ckptkit

if not hasattr(dcp, "save"):
    pytest.skip(f"torch {torch.__version__} has no torch.distributed.checkpoint.save (2.2)", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODEL = torch.nn.Linear(3, 4)
TREE = {
    "model": {"weight": torch.arange(12.0).reshape(4, 3), "bias": torch.ones(4)},
    "optimizer": {
        "state": {"weight": {"exp_avg": torch.full((4, 3), 0.5), "step": torch.tensor(7.0)}},
        "param_groups": [{"lr": 0.1, "params": ["weight"]}],
    },
    "epoch": 3,
}
PARTS = [".metadata", "__0_0.distcp"]


Command = Callable[..., Done]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """``saved("step-10")``: a folder of torch.distributed.checkpoint."""

    def write(name: str, tree: dict[str, Any] = TREE) -> Path:
        dcp.save(tree, checkpoint_id=tmp_path / name, no_dist=True)
        return tmp_path / name

    return write


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A file a rank, of plain tensors: each has a copy of all."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    for rank in range(2):
        torch.save(TREE["model"], folder / f"model_world_size_2_rank_{rank}.pt")
    return folder


# Whole.


def test_inspect(command: Command, saved: Callable[..., Path]) -> None:
    saved("runs/step-10")
    done = command("inspect", "runs/step-10")
    assert done.code == 0, done.err
    assert done.out.startswith("runs/step-10: dcp, resume, ")
    assert "2 files of 1 rank, pickle needs trust" in done.out.splitlines()[0]
    assert "after 7 steps" in done.out
    assert "items are separate pickles and were not read; check, convert and load read every one" in done.out
    assert "    ckptkit check runs/step-10" in done.out.splitlines()
    (file,) = json.loads(command("inspect", "runs", "--json").out)["files"]
    assert (file["path"], file["format"], file["kind"], file["trust"]) == (
        "runs/step-10", "dcp", "resume", "needs_trust"
    )  # fmt: skip
    assert file["layout"] == {"world_size": 1, "mesh": None, "files": 2, "tag": None}
    assert file["size"] == sum(os.path.getsize(f"runs/step-10/{name}") for name in PARTS)
    assert {"items-not-read"} <= {finding["code"] for finding in file["findings"]}
    assert json.loads(command("inspect", "runs", "--json").out)["passed_over"] == {}


def test_convert_load_and_diff(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    saved("step-10")
    done = command("convert", "step-10", "model.safetensors", "--weights-only")
    assert done.code == 0, done.err
    assert load_file("model.safetensors").keys() == TREE["model"].keys()
    assert command("convert", "step-10", "resume.pth").code == 0
    whole = torch.load("resume.pth")
    assert whole["epoch"] == 3 and torch.equal(whole["optimizer"]["state"]["weight"]["step"], torch.tensor(7.0))
    assert command("diff", "step-10", "resume.pth").code == 0
    assert command("diff", "model.safetensors", "step-10").code == 0
    saved("step-20", {**TREE, "model": {**TREE["model"], "bias": torch.zeros(4)}})
    done = command("diff", "step-10", "step-20")
    assert (done.code, "1 tensor differs" in done.out or "1 of 2 tensors" in done.out) == (1, True), done.out
    assert ckptkit.load("step-10")["epoch"] == 3
    assert ckptkit.load_state_dict("step-10", strip_prefix=None).keys() == TREE["model"].keys()
    (receipt,) = json.loads(ckptkit.inspect("model.safetensors")["metadata"]["ckptkit_receipts"])
    assert (receipt["format"], [*receipt["sha256"]]) == ("dcp", PARTS)


def test_verify(command: Command, saved: Callable[..., Path]) -> None:
    saved("step-10")
    report = ckptkit.verify("step-10", model=torch.nn.Linear(3, 4), input_shapes=[(2, 3)])
    assert report.ok
    ckptkit.convert("step-10", "model.safetensors", weights_only=True)
    assert ckptkit.verify("model.safetensors", model=torch.nn.Linear(3, 4), input_shapes=[(2, 3)], against="step-10").ok


def test_manifest_and_check(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    saved("runs/step-10")
    done = command("manifest", "runs", "-o", "lock.json")
    assert done.code == 0, done.err
    (record,) = json.loads(Path("lock.json").read_text())["files"]
    assert (record["path"], record["sha256"], [*record["shards"]]) == ("runs/step-10", None, PARTS)
    assert record["size"] == sum(shard["size"] for shard in record["shards"].values())
    ckptkit.convert("runs/step-10", "whole.pth", receipt=False)
    whole = ckptkit.manifest(["whole.pth"]).files[0]
    assert (whole.content_digest, whole.whole_digest) == (record["content_digest"], record.get("whole_digest"))
    for arguments in (("--manifest", "lock.json"), ("runs", "--manifest", "lock.json"), ("runs/step-10",)):
        done = command("check", *arguments)
        assert (done.code, done.out.count("step-10: ok")) == (0, 1), done.out
    assert command("manifest", "--update", "-o", "lock.json").out.endswith("1 file (1 unchanged)\n")
    assert json.loads(command("manifest", "runs/step-10", "--json").out)["files"][0]["path"] == "runs/step-10"
    os.chdir("runs/step-10")
    assert json.loads(command("manifest", ".", "--json").out)["files"][0]["path"] == "step-10"
    done = command("manifest", ".", "-o", "lock.json")
    assert (done.code, "write the manifest in the folder of the files or above it" in done.err) == (2, True)


@pytest.mark.parametrize("case", ["fsdp2_2", "dtensor_files_2"])
def test_digests_are_those_of_one_file(case: str, sharded: Samples, tmp_path: Path) -> None:
    torch.save(sharded[case].expected, tmp_path / "whole.pth")
    (record,) = ckptkit.manifest([sharded[case].folder]).files
    (whole,) = ckptkit.manifest([tmp_path / "whole.pth"]).files
    assert record.content_digest == whole.content_digest is not None
    assert record.tensors == whole.tensors
    assert {*record.shards} == {path.name for path in sharded[case].folder.iterdir()}


def test_what_a_manifest_says_of_changed_files(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("step-10")
    assert command("manifest", "step-10", "-o", "lock.json").code == 0
    shutil.copy(folder / "__0_0.distcp", folder / "__9_0.distcp")
    done = command("check", "--manifest", "lock.json")
    assert done.code == 1 and "1 file not recorded: __9_0.distcp" in done.out and "[file-rewritten]" in done.out
    (folder / "__9_0.distcp").unlink()
    other = saved("other", {**TREE, "model": {**TREE["model"], "bias": torch.zeros(4)}})
    for name in PARTS:
        shutil.copy(other / name, folder / name)
    shutil.rmtree(other)
    done = command("check", "--manifest", "lock.json")
    assert done.code == 1 and "1 with different values (bias)" in done.out
    assert "2 files with different bytes: .metadata, __0_0.distcp" in done.out
    (folder / "__0_0.distcp").unlink()
    done = command("check", "--manifest", "lock.json")
    assert done.code == 2 and "1 file missing: __0_0.distcp" in done.out and "[file-unreadable]" in done.out
    shutil.rmtree(folder)
    done = command("check", "--manifest", "lock.json")
    assert done.code == 1 and "[file-missing]" in done.out


def test_explain(command: Command) -> None:
    for code in ("items-not-read", "copies-not-compared", "copies-differ", "step-chosen"):
        assert command("explain", code).code == 0


# The step that is meant.


def test_a_tag_for_every_command(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    saved("runs/step-10")
    saved("runs/step-20", {**TREE, "epoch": 4})
    for arguments in (
        ("convert", "runs", "o.pth"),
        ("diff", "runs", "runs/step-20"),
        ("verify", "runs", "--model", "x:y"),
        ("inspect", "runs", "--tag", "step-30"),
        ("check", "runs", "--tag", "step-30"),
        ("manifest", "runs", "--tag", "step-30"),
    ):
        done = command(*arguments)
        assert done.code == 2 and "step-10, step-20" in done.err + done.out, (arguments, done)
    tag = ("--tag", "step-20")
    assert len(json.loads(command("inspect", "runs", "--json").out)["files"]) == 2
    (file,) = json.loads(command("inspect", "runs", "--json", *tag).out)["files"]
    assert (file["path"], file["metadata"]["epoch"], file["layout"]["tag"]) == ("runs", 4, "step-20")
    assert "ckptkit check runs --tag step-20" in [finding["fix"] for finding in file["findings"]]
    assert command("convert", "runs", "o.pth", *tag).code == 0 and torch.load("o.pth")["epoch"] == 4
    assert command("convert", "runs", "out/", "--to", "pth", *tag).code == 0 and os.listdir("out") == ["step-20.pth"]
    assert command("diff", "runs", "o.pth", *tag).code == 0
    assert command("diff", "runs", "runs", "--tag-a", "step-10", "--tag-b", "step-20").code == 0
    assert command("diff", "o.pth", "o.pth", *tag).code == 2
    assert command("check", "runs", *tag).out.splitlines()[0].startswith("runs/step-20: ok")
    assert json.loads(command("manifest", "runs", "--json", *tag).out)["files"][0]["path"] == "runs/step-20"
    assert command("inspect", "o.pth", *tag).code == 2
    assert ckptkit.load("runs", tag="10")["epoch"] == 3
    assert ckptkit.load_state_dict("runs", tag="10").keys() == TREE["model"].keys()
    assert ckptkit.inspect("runs", tag="10")["metadata"]["epoch"] == 3
    assert ckptkit.check("runs", tag="10").results[0].path == "runs/step-10"
    assert ckptkit.manifest("runs", tag="10").files[0].path == "runs/step-10"
    assert ckptkit.verify("runs", tag="10", model=MODEL, forward=False).ok


def test_the_last_step(command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    saved("runs/step-10")
    saved("runs/step-20", {**TREE, "epoch": 4})
    Path("runs/latest").write_text("step-20")
    (file,) = json.loads(command("inspect", "runs", "--json").out)["files"]
    assert (file["path"], file["layout"]["tag"]) == ("runs", "step-20")
    assert command("convert", "runs", "out/", "--to", "pth").code == 0 and torch.load("out/runs.pth")["epoch"] == 4
    assert command("check", "runs").out.splitlines()[0].startswith("runs/step-20: ok")
    Path("runs/best").symlink_to("step-20")
    assert command("check", "runs").out.splitlines()[0].startswith("runs/step-20: ok")
    torch.save(Runs(), "runs/else.pth")  # what is beside the last step does not pass unseen
    done = command("check", "runs")
    assert done.code == 1 and "runs/else.pth: FAILED" in done.out and "runs/step-20: ok" in done.out
    assert "skipped: 2 files (1 other training step, 1 text file)" in done.out
    assert command("check", "runs", "--tag", "step-20").code == 0
    Path("runs/else.pth").unlink()
    Path("runs/latest").write_text("step-30")
    for arguments in (("inspect", "runs"), ("check", "runs"), ("convert", "runs", "x.pth"), ("manifest", "runs")):
        done = command(*arguments)
        assert done.code == 2 and "names 'step-30', which does not exist" in done.err + done.out, arguments
    assert not Path("x.pth").exists()


# A part is not the whole.


def test_a_part_leads_to_its_folder(command: Command, saved: Callable[..., Path], ranks: Path) -> None:
    saved("step-10")
    torch.save({"epoch": 1}, "step-10/meta.pt")
    for part, folder in (
        ("step-10/__0_0.distcp", "step-10"),
        ("step-10/meta.pt", "step-10"),
        ("ranks/model_world_size_2_rank_1.pt", "ranks"),
    ):
        for arguments in (("convert", part, "o.pth"), ("diff", part, part), ("manifest", part)):
            done = command(*arguments)
            assert (done.code, "part-of-a-checkpoint" in done.err) == (2, True), done
            assert f"; give {folder}" in done.err
        assert command("check", part).code == 1
    done = command("inspect", "ranks/model_world_size_2_rank_1.pt")
    assert done.code == 0 and "    ckptkit inspect ranks" in done.out.splitlines()
    assert command("inspect", "ranks").code == 0


@pytest.mark.parametrize("name", [*PARTS, "model_world_size_2_rank_1.pt"])
def test_a_file_of_the_source_is_not_written_over(
    name: str, command: Command, saved: Callable[..., Path], ranks: Path
) -> None:
    folder = saved("step-10") if name in PARTS else ranks
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = command("convert", folder, f"{folder}/../{folder.name}/{name}", "--to", "torch-zip", "--force")
    assert (done.code, "is one of the files being read" in done.err) == (2, True), done
    Path("link.pth").symlink_to(folder / name)
    done = command("convert", folder, "link.pth", "--force")
    assert (done.code, "is one of the files being read" in done.err) == (2, True), done
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert command("convert", folder, folder / "whole.pth", "--force").code == 0


def test_what_is_wrong_inside_a_checkpoint_is_told_alone(command: Command, saved: Callable[..., Path]) -> None:
    folder = saved("step-10")
    done = command("inspect", folder, "--tag", "3")
    assert (done.code, "the folder itself is one checkpoint: omit --tag" in done.err) == (2, True), done.err
    (folder / "__0_0.distcp").unlink()
    (folder / "__0_0.distcp").symlink_to("__0_0.distcp")
    done = command("convert", folder, "o.pth")
    assert done.code == 2 and "__0_0.distcp: cannot be opened" in done.err and "below it" not in done.err


def test_what_lies_in_pieces_is_gathered(sharded: Samples, command: Command) -> None:
    done = command("convert", sharded["meshes"].folder, "o.safetensors", "--dry-run", "--json")
    plan = json.loads(done.out)["plan"]
    assert plan["casts"] == {"count": 0, "nbytes": 0}
    assert plan["gathers"]["count"] > 0 < plan["gathers"]["nbytes"]


# Damage.


def test_copies_that_differ(command: Command, ranks: Path, tmp_path: Path) -> None:
    (file,) = json.loads(command("inspect", "ranks", "--json").out)["files"]
    told = {finding["code"]: finding["message"] for finding in file["findings"]}
    assert "2 copies were not compared" in told["copies-not-compared"] and file["trust"] == "safe"
    assert command("check", "ranks").code == 0
    torch.save({**TREE["model"], "bias": torch.zeros(4)}, ranks / "model_world_size_2_rank_1.pt")
    assert command("inspect", "ranks").code == 0
    done = command("check", "ranks")
    assert done.code == 1 and "[copies-differ]" in done.out and "bias (" in done.out
    save_file(TREE["model"], "model.safetensors")
    for arguments in (
        ("convert", "ranks", "o.pth"),
        ("diff", "ranks", "model.safetensors"),
        ("manifest", "ranks", "-o", "lock.json"),
    ):
        done = command(*arguments)
        assert done.code == 2 and "ranks: 1 tensor with different values in two files" in done.err, done
    assert not Path("o.pth").exists() and not Path("lock.json").exists()
    with pytest.raises(ckptkit.CorruptError, match="bias") as caught:
        ckptkit.load_state_dict("ranks")
    assert not caught.value.is_hostile
    assert command("convert", "ranks", "o.pth", "--no-check").code == 0


def test_a_flipped_bit(command: Command, saved: Callable[..., Path]) -> None:
    folder = saved("step-10")
    data = (folder / "__0_0.distcp").read_bytes()
    at = data.index(TREE["model"]["weight"].numpy().tobytes())
    (folder / "__0_0.distcp").write_bytes(data[:at] + b"\1" + data[at + 1 :])
    done = command("check", "step-10")
    assert done.code == 1 and "[damaged]" in done.out and "model.weight" in done.out
    assert command("check", "step-10", "--ignore-checksums").code == 0
    with ckptkit.open("step-10") as file, pytest.raises(ckptkit.CorruptError, match="a tensor: the bytes have CRC-32"):
        file.state_dict["weight"].numpy()
    for arguments in (("convert", "step-10", "o.pth"), ("manifest", "step-10")):
        done = command(*arguments)
        assert done.code == 2 and "the bytes have CRC-32" in done.err and "model.weight" in done.err, done


# Hostile.


class Runs:
    """Runs a command where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo ran > ran.txt",)


def item_replaced(folder: Path, name: str, value: object) -> None:
    """Put another item behind all others, in the place of one."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, info = next(pair for pair in metadata.storage_data.items() if pair[0].fqn == name)
    with (folder / info.relative_path).open("ab") as file:
        info.offset = file.tell()
        torch.save(value, file)
        info.length = file.tell() - info.offset
    metadata.storage_data[index] = info
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))


def hostile_metadata(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.storage_meta = Runs()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))


def nothing_but_hostile(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Runs()))


def hostile_rank(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for rank in range(2):
        torch.save({**TREE["model"], "x": Runs()}, folder / f"model_world_size_2_rank_{rank}.pt")


HOSTILE: dict[str, tuple[Callable[[Path], None], bool]] = {
    "metadata": (hostile_metadata, True),
    "nothing else in the metadata": (nothing_but_hostile, True),
    "object": (lambda folder: item_replaced(folder, "epoch", Runs()), True),
    "tensor": (lambda folder: item_replaced(folder, "model.weight", Runs()), False),
    "rank": (hostile_rank, True),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused(case: str, command: Command, saved: Callable[..., Path], tmp_path: Path) -> None:
    make, is_seen = HOSTILE[case]
    folder = saved("evil")
    make(folder)
    save_file(TREE["model"], "model.safetensors")
    done = command("inspect", "evil", "--json")
    (file,) = json.loads(done.out)["files"]
    assert (done.code, file["trust"]) == ((1, "hostile") if is_seen else (0, "needs_trust"))
    assert ("hostile-name" in {finding["code"] for finding in file["findings"]}) == is_seen
    assert ("[hostile-name]" in (shown := command("inspect", "evil")).out or "hostile:" in shown.err) == is_seen
    assert command("inspect", "evil", "--stats").code == 1
    done = command("check", "evil")
    assert done.code == 1 and "system" in done.out and ("[hostile-name]" in done.out or "[trust-not" in done.out), done
    for arguments in (
        ("convert", "evil", "o.pth"),
        ("convert", "evil", "o.pth", "--no-check"),
        ("convert", "evil", "o.pth", "--ignore-checksums"),
        ("convert", "evil", "o.safetensors", "--weights-only", "--no-check"),
        ("diff", "evil", "model.safetensors"),
        ("diff", "model.safetensors", "evil", "--ignore-checksums"),
        ("verify", "evil", "--model", "torchvision:resnet18"),
        ("verify", "evil", "--model", "torchvision:resnet18", "--ignore-checksums"),
    ):
        done = command(*arguments)
        assert done.code == 1 and "hostile: a loader that executes its pickles would run " in done.err, (
            arguments,
            done,
        )
        assert "system" in done.err
    for load in (ckptkit.load, ckptkit.load_state_dict):
        for options in ({}, {"ignore_checksums": True}, {"mapped": True}):
            with pytest.raises(ckptkit.FormatError, match="hostile") as caught:
                load("evil", **options)
            assert caught.value.is_hostile and pickle.loads(pickle.dumps(caught.value)).is_hostile
    assert sorted(os.listdir(tmp_path)) == ["evil", "model.safetensors"], "nothing was written, and nothing ran"


def test_a_hostile_file_is_what_it_was(command: Command, tmp_path: Path) -> None:
    torch.save({**TREE["model"], "x": Runs()}, "evil.pth")
    assert command("inspect", "evil.pth").code == 1
    assert command("convert", "evil.pth", "o.safetensors", "--exclude", "x").code == 0


@pytest.mark.parametrize(
    "name", ["__7_0.distcp", ".metadata.tmp", "__7.metadata", "config.json", "notes.txt", "README.md"]
)
def test_what_the_checkpoint_does_not_read_is_looked_at(
    name: str, command: Command, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """It counts as the folder's own by its name, and nobody would see what it is."""
    folder = saved("step-10")
    (folder / "run.yaml").write_text("lr: 1")
    (folder / "latest.json").write_text("{}")
    done = command("check", folder)
    assert (done.code, len(done.out.splitlines())) == (0, 2), "real texts are passed over without a word"
    torch.save({**TREE["model"], "x": Runs()}, folder / name)
    done = command("check", folder)
    assert done.code == 1 and "system [trust-not-allowed]" in done.out, done
    if name in ("config.json", "notes.txt", "README.md"):
        assert f"step-10/{name}: FAILED" in done.out
        assert command("inspect", tmp_path).code == 1


def test_items_of_an_earlier_save_are_no_danger(command: Command, saved: Callable[..., Path]) -> None:
    """Fewer ranks saved into the folder again: their files stay, with items end to end."""
    folder, other = saved("step-10"), saved("step-20")
    shutil.copy(other / PARTS[1], folder / "__1_0.distcp")
    assert command("check", folder).code == 0
    whole = (other / PARTS[1]).read_bytes()
    torch.save({"x": Runs()}, "evil.pth")
    (folder / "__1_0.distcp").write_bytes(whole + Path("evil.pth").read_bytes() + whole)
    done = command("check", folder)
    assert done.code == 1 and "system" in done.out, done
