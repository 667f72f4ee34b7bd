"""``ckptkit inspect``: the contract's outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

CONTRACT = {
    "path", "size", "format", "writer", "kind", "state_dict", "sections", "storage", "every_tensor", "tensors",
    "metadata", "training", "trust", "has_pickle", "globals", "modules", "part", "architecture", "adapter",
    "quantization", "layout", "findings", "combined_fix", "error",
}  # fmt: skip
TENSOR = {"section", "name", "dtype", "shape", "stride", "nbytes", "location", "storage", "role", "tied_to"}


def inspect_json(run, *arguments: object) -> list[dict]:
    done = run("inspect", "--json", *arguments)
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    return document["files"]


def test_the_multi_gpu_checkpoint(run, ddp_resume: Path) -> None:
    (file,) = inspect_json(run, ddp_resume)
    assert file.keys() == CONTRACT
    saved = torch.load(ddp_resume, map_location="cpu", weights_only=False)
    assert (file["format"], file["kind"], file["trust"]) == ("torch-zip", "resume", "needs_trust")
    assert file["size"] == ddp_resume.stat().st_size
    weights = [t for t in file["tensors"] if t["section"] == "state_dict"]
    assert [t["name"] for t in weights] == list(saved["state_dict"])
    for t in weights:
        assert t.keys() >= TENSOR
        expected = saved["state_dict"][t["name"]]
        assert (t["shape"], t["stride"]) == (list(expected.shape), list(expected.stride()))
        assert t["dtype"] == str(expected.dtype).removeprefix("torch.")
        assert t["nbytes"] == expected.nbytes
        assert t["location"] == "cuda:0"
    assert file["state_dict"]["path"] == "state_dict"
    assert file["state_dict"]["tensors"] == len(saved["state_dict"])
    assert [s["path"] for s in file["sections"] if s["selected"]] == ["state_dict"]
    names = {use["name"]: use for use in file["globals"]}
    assert (names["argparse.Namespace"]["verdict"], names["argparse.Namespace"]["count"]) == ("unknown", 1)
    assert names["argparse.Namespace"]["where"] == ["data.pkl: args"]
    assert file["metadata"]["epoch"] == saved["epoch"]
    assert file["metadata"]["args.lr"] == saved["args"].lr
    fixes = {f["code"]: f["fix"] for f in file["findings"]}
    assert "--strip-module" in fixes["module-prefix"]
    assert "--map-location cpu" in fixes["device-location"]


def test_the_commands_that_fix_do_fix(run, save, tmp_path: Path) -> None:
    path = save({"state_dict": {"module.w": torch.ones(3)}, "epoch": 1}, device="cuda:1")
    (file,) = inspect_json(run, path)
    for finding in file["findings"]:
        if finding["code"] in ("module-prefix", "device-location"):
            import shlex

            program, *arguments = shlex.split(finding["fix"])
            assert program == "ckptkit"
            done = run(*arguments)
            assert done.returncode == 0, done.stderr
            (fixed,) = inspect_json(run, arguments[2])
            assert finding["code"] not in {f["code"] for f in fixed["findings"]}


def test_parameters_and_buffers_are_counted_apart(run, save) -> None:
    model = resnet18()
    for obj in (model.state_dict(), model):
        (file,) = inspect_json(run, save(obj))
        assert file["state_dict"]["parameters"] == 11_689_512
        assert file["state_dict"]["buffers"] == 9_620
    assert {m["class"] for m in file["modules"]} >= {"torchvision.models.resnet.ResNet", "torch.nn.modules.conv.Conv2d"}
    conv = next(m for m in file["modules"] if m["path"] == "conv1")
    assert conv["settings"]["in_channels"] == 3
    assert conv["settings"]["kernel_size"] == [7, 7]


def test_text_says_what_it_is(run, ddp_resume: Path) -> None:
    done = run("inspect", ddp_resume)
    assert done.returncode == 0
    assert done.stderr == ""
    head = done.stdout.splitlines()[0]
    assert "torch-zip, resume" in head
    assert "saved on cpu, cuda:0, cuda:1" in head
    assert "98,890 parameters" in done.stdout
    assert "314 of 314 names have a wrapper's prefix" in done.stdout
    assert "epoch  1" in done.stdout


def test_flat_is_one_line_a_tensor(run, ddp_resume: Path) -> None:
    lines = run("inspect", "--flat", ddp_resume).stdout.splitlines()
    (file,) = inspect_json(run, ddp_resume)
    assert len(lines) == len(file["tensors"])
    assert lines[0].split("\t") == [
        "module.features.0.0.weight", "float32", "[8, 3, 3, 3]", "864", "cuda:0", "state_dict",
    ]  # fmt: skip


def test_markdown_is_tables(run, ddp_resume: Path) -> None:
    done = run("inspect", "--format", "markdown", "--filter", "*classifier*", ddp_resume)
    assert done.stdout.startswith("## `")
    assert "| `module.classifier.1.weight` | float32 | [10, 1280]" in done.stdout


def test_filter_sort_and_depth(run, save) -> None:
    names = ["b.layer10.w", "b.layer2.w", "a.w"]
    path = save({name: torch.zeros(3 - i) for i, name in enumerate(names)})
    assert [t["name"] for t in inspect_json(run, path)[0]["tensors"]] == names
    by_name = inspect_json(run, path, "--sort", "name")[0]["tensors"]
    assert [t["name"] for t in by_name] == ["a.w", "b.layer2.w", "b.layer10.w"]
    by_size = inspect_json(run, path, "--sort", "size", "--filter", "b.*")[0]["tensors"]
    assert [t["name"] for t in by_size] == ["b.layer10.w", "b.layer2.w"]
    assert "layer10" not in run("inspect", "--depth", "1", path).stdout
    assert "layer10" in run("inspect", "--depth", "2", path).stdout


@pytest.mark.parametrize("options", [[], ["--flat"], ["--json"], ["--format", "markdown"], ["--stats"]])
def test_a_filter_that_matches_nothing_is_told(run, save, options: list[str]) -> None:
    path = save({"a.w": torch.ones(1)})
    done = run("inspect", path, "--filter", "zzz", *options)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [f"ckptkit: {path}: no tensor matches --filter"]
    assert run("inspect", path, "--filter", "a.*", *options).stderr == ""
    assert run("inspect", path, "--filter", "zzz", "-q", *options).stderr == ""


def test_stats_read_the_data(run, save) -> None:
    path = save({"w": torch.tensor([1.0, -2.0, 0.0, float("nan"), float("inf")])})
    (file,) = inspect_json(run, path, "--stats")
    stats = file["tensors"][0]["stats"]
    assert (stats["min"], stats["max"], stats["zeros"], stats["nan"], stats["inf"]) == (-2.0, 1.0, 1, 1, 1)
    assert "-2" in run("inspect", "--stats", path).stdout


def test_section(run, save) -> None:
    path = save({"net_g": {"w": torch.ones(1)}, "net_d": {"v": torch.ones(2)}})
    (file,) = inspect_json(run, path)
    assert file["state_dict"] is None
    assert "ambiguous-section" in {f["code"] for f in file["findings"]}
    (file,) = inspect_json(run, path, "--section", "net_d")
    assert file["state_dict"]["path"] == "net_d"
    wrong = run("inspect", path, "--section", "nope")
    assert wrong.returncode == 2
    assert "'net_g' (1 tensor, 4 B), 'net_d' (1 tensor, 8 B)" in wrong.stderr


def test_several_paths_one_unreadable(run, save, tmp_path: Path) -> None:
    good = save({"w": torch.ones(1)})
    done = run("inspect", "--json", good, tmp_path / "no.pth", good)
    files = json.loads(done.stdout)["files"]
    assert done.returncode == 2
    assert [f["error"] and f["error"]["type"] for f in files] == [None, "MissingFileError", None]
    assert [f["path"] for f in files] == [str(good), str(tmp_path / "no.pth"), str(good)]


def test_a_folder_stands_for_its_checkpoints(run, save, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for name in ("runs/b.pth", "runs/a/c.pt"):
        save({"w": torch.ones(1)}, name)
    (tmp_path / "runs" / "notes.txt").write_text("not looked at")
    files = inspect_json(run, tmp_path / "runs")
    assert [Path(f["path"]).name for f in files] == ["b.pth", "c.pt"]
    assert json.loads(run("inspect", "--json", tmp_path / "runs").stdout)["passed_over"] == {"text file": 1}
    (tmp_path / "bare").mkdir()
    none = run("inspect", tmp_path / "bare")
    assert none.returncode == 2
    assert "a folder without checkpoint files" in none.stderr


def test_what_a_folder_holds_beside_checkpoints_is_counted(run, save, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    save({"w": torch.ones(1)}, "runs/best.pth.tar")
    (tmp_path / "runs" / "notes.txt").write_text("words")
    (tmp_path / "runs" / "w.pth").write_bytes(b"")
    told = "skipped: 1 file (1 text file)"
    done = run("inspect", tmp_path / "runs")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (2, told)
    assert "runs/w.pth: the file is empty" in done.stderr
    assert run("inspect", "--format", "markdown", tmp_path / "runs").stdout.splitlines()[-1] == told
    flat = run("inspect", "--flat", tmp_path / "runs")
    assert told in flat.stderr and told not in flat.stdout
    assert told not in run("inspect", "-q", tmp_path / "runs").stdout


@pytest.mark.parametrize(("fail_on", "code"), [("error", 0), ("warning", 1), ("never", 0)])
def test_fail_on(run, ddp_resume: Path, fail_on: str, code: int) -> None:
    assert run("inspect", ddp_resume, "--fail-on", fail_on).returncode == code


def test_a_hostile_file_fails_and_runs_nothing(run, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {canary}",)

    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Evil()}, tmp_path / "evil.pth")
    done = run("inspect", "--json", tmp_path / "evil.pth")
    (file,) = json.loads(done.stdout)["files"]
    assert done.returncode == 1
    assert file["trust"] == "hostile"
    assert [f["code"] for f in file["findings"] if f["severity"] == "error"] == ["hostile-name"]
    assert run("inspect", "--fail-on", "never", tmp_path / "evil.pth").returncode == 0
    assert run("convert", tmp_path / "evil.pth", "out.safetensors", "--weights-only").returncode == 0
    assert not canary.exists()


def test_names_that_would_act_on_a_terminal_are_escaped(run, save) -> None:
    path = save({"evil\x1b[31m\nname\u202e": torch.ones(1)})
    for options in ([], ["--flat"], ["--format", "markdown"]):
        out = run("inspect", path, *options).stdout
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "evil\\x1b[31m\\nname" in out
    assert inspect_json(run, path)[0]["tensors"][0]["name"] == "evil\x1b[31m\nname\u202e"


def test_brief_is_one_line_a_file(run, save, ddp_resume: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("a.pth", "longer-name.pth"):
        torch.save({"w": torch.ones(3000, 2), "n": torch.ones(1).long()}, tmp_path / "runs" / name)
    (tmp_path / "runs" / "notes.txt").write_text("x")
    (tmp_path / "runs" / "broken.pth").write_bytes(ddp_resume.read_bytes()[:-400])
    done = run("inspect", "--brief", "runs", ddp_resume)
    assert done.returncode == 2
    first, second, third = done.stdout.splitlines()
    assert re.split(r"\s{2,}", first)[:-1] == [
        "runs/a.pth", "torch-zip", "state dict", "2 tensors", "6,000 parameters", "float32 +1",
        first.split("+1")[1].split("  safe")[0].strip(), "safe",
    ]  # fmt: skip
    assert first.index("torch-zip") == second.index("torch-zip") == third.index("torch-zip")
    assert third.endswith("needs trust  warning: foreign-objects")
    assert "runs/broken.pth" in done.stderr
    assert any(line.endswith("1 file (1 text file)") for line in done.stderr.splitlines())
    assert run("inspect", "--brief", "--jobs", "2", "runs", ddp_resume).stdout == done.stdout
    assert json.loads(run("inspect", "--brief", "--json", ddp_resume).stdout)["files"]
    assert run("inspect", "--brief", "--flat", ddp_resume).returncode == 2


def test_top_lists_the_largest_tensors_in_place_of_the_tree(run, save) -> None:
    tied = torch.ones(50)
    path = save(
        {"small": torch.ones(2), "a": tied, "tied": tied, "half": torch.ones(60).half(), "b": torch.ones(2, 10)}
    )
    lines = run("inspect", "--top", "3", path).stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("largest tensors"))
    assert [re.split(r"\s{2,}", line) for line in lines[at + 1 : at + 4]] == [
        ["a", "50", "200 B", "49.0%", "float32 [50]"],
        ["half", "60", "120 B", "29.4%", "float16 [60]"],
        ["b", "20", "80 B", "19.6%", "float32 [2, 10]"],
    ]
    assert lines[at + 4] == ""
    assert not any(line.startswith("tensors of") for line in lines)
    stats = run("inspect", "--top", "1", "--stats", path).stdout
    assert "tensor (float32)" in stats and "half" not in stats
    assert len(json.loads(run("inspect", "--top", "1", "--json", path).stdout)["files"][0]["tensors"]) == 5
