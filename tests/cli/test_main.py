"""What all commands share: help, exit codes, errors, options."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from ckptkit.cli import COMMANDS as ALL

COMMANDS = ("convert", "explain", "inspect", "verify")


def test_help_of_the_whole_lists_the_commands(run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_ends_in_examples(run, command: str, flag: str) -> None:
    done = run(command, flag, env={})  # click keeps what the flags of a command are from its first call in a process
    assert done.returncode == 0
    _, examples = done.stdout.split("Examples:\n")
    assert all(line.strip().startswith(f"ckptkit {command}") for line in examples.splitlines() if line.strip())


@pytest.mark.parametrize("width", [50, 60, 70, 80, 90])
def test_help_breaks_no_option_at_a_hyphen(run, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for command in ALL:
        lines = run(command, "--help").stdout.partition("\n  Examples:")[0].splitlines()
        assert [line for line in lines if re.search(r"(^|[^\w-])-[\w-]*-$", line)] == []
        assert max(map(len, lines)) <= width or command in ("check", "report")  # the choices of their --format


def test_version(run) -> None:
    import ckptkit

    assert run("--version").stdout == f"ckptkit {ckptkit.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Commands:"),
        (["--debug"], "Missing command"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["/some/file.pth"], "No such command '/some/file.pth'"),
        (["--nope"], "No such option"),
        *(([command, "--nope"], "No such option") for command in sorted(ALL)),
        (["inspect"], "Usage: ckptkit inspect"),
        (["convert", "a.pth"], "Missing argument"),
        (["diff", "a", "b", "c"], "unexpected extra argument"),
        (["inspect", "a.pth", "--depth", "deep"], "Invalid value for '--depth'"),
        (["inspect", "a.pth", "--sort", "colour"], "Invalid value for '--sort'"),
    ],
)
def test_bad_usage_is_2_and_no_crash(run, arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert "internal error" not in done.stderr


def refusals(folder: Path) -> dict[str, Path]:
    """Files no command can read, by what the message must say."""
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("hello, this is no checkpoint\n")
    (folder / "folder.pth").mkdir()
    torch.save({"a": torch.zeros(300)}, folder / "whole.pth")
    (folder / "cut.pth").write_bytes((folder / "whole.pth").read_bytes()[:900])
    (folder / "noise.bin").write_bytes(bytes(range(200, 256)) * 4)
    (folder / "lfs.pth").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 102502400\n"
    )
    os.mkfifo(folder / "pipe.pth")
    return {
        "no such file": folder / "missing.pth",
        "the file is empty": folder / "empty.pth",
        "a text file": folder / "text.pth",
        "a folder": folder / "folder.pth",
        "truncated: the file has": folder / "cut.pth",
        "not a known checkpoint container": folder / "noise.bin",
        "git-lfs pointer, not the file of 102,502,400 bytes": folder / "lfs.pth",
        "is not a regular file": folder / "pipe.pth",
    }


@pytest.mark.parametrize("command", ["inspect", "convert", "verify"])
def test_refusals_are_one_line_and_2_and_leave_nothing(run, tmp_path: Path, command: str) -> None:
    extra = {"inspect": [], "convert": ["out.safetensors"], "verify": ["--model", "torchvision:resnet18"]}[command]
    for expected, path in refusals(tmp_path).items():
        before = sorted(os.listdir(tmp_path))
        done = run(command, path, *extra)
        assert done.returncode == 2, (command, path)
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("ckptkit: error: ")
        assert str(path) in lines[0]
        assert expected in lines[0]
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback_before_or_after_the_command(run, place: str) -> None:
    arguments = (
        ["--debug", "convert", "no.pth", "o.pth"] if place == "before" else ["convert", "--debug", "no.pth", "o.pth"]
    )
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "MissingFileError" in done.stderr


def test_underscores_in_options(run, ddp_resume: Path, tmp_path: Path) -> None:
    done = run("convert", ddp_resume, "out.safetensors", "--strip_module", "--weights_only")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "env", "colored"),
    [
        ([], {}, False),  # not a terminal
        (["--color", "always"], {}, True),
        (["--color", "always"], {"NO_COLOR": "1"}, True),  # asked for outright
        (["--color", "never"], {}, False),
    ],
)
def test_color(run, ddp_resume: Path, options: list[str], env: dict[str, str], colored: bool) -> None:
    assert ("\x1b[" in run("inspect", ddp_resume, *options, env=env).stdout) is colored


def test_explain_every_code(run) -> None:
    from ckptkit.codes import CODES

    listed = run("explain")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.split("codes of findings\n")[1].splitlines()] == sorted(CODES)
    document = json.loads(run("explain", "--json").stdout)
    assert document["codes"].keys() == CODES.keys()
    one = run("explain", "module-prefix")
    assert "--strip-module" in one.stdout
    wrong = run("explain", "module-prefx")
    assert wrong.returncode == 2
    assert "did you mean module-prefix" in wrong.stderr


def test_no_code_is_explained_twice() -> None:
    from ckptkit import codes
    from ckptkit.codes import TOPICS

    assert len(codes.CODES) == sum(len(part) for part in codes._PARTS)
    assert not set(TOPICS) & set(codes.CODES)


def test_explain_every_topic(run) -> None:
    from ckptkit.codes import TOPICS

    document = json.loads(run("explain", "--json").stdout)
    assert tuple(document["topics"]) == TOPICS
    listed = run("explain").stdout
    for name, text in document["topics"].items():
        first, *lines = text.splitlines()
        assert first.startswith(f"# {name}: ")
        assert f"\n{name} " in f"\n{listed}"
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
        assert all(len(line) <= 80 for line in prose if not line.startswith("|")), name
        assert len([line for line in lines if not line.startswith("|")]) < 60, name
        assert "<!--" not in text
    one = run("explain", "trust")
    assert "safe: plain data" in one.stdout
    assert "**" not in one.stdout
    assert "\n    ckptkit inspect fixtures" in one.stdout
    assert run("explain", "trust", "--format", "markdown").stdout == document["topics"]["trust"]
    assert json.loads(run("explain", "trust", "--json").stdout)["topics"] == {"trust": document["topics"]["trust"]}
    assert "did you mean guarantees" in run("explain", "guarantee").stderr


@pytest.mark.parametrize("width", [60, 80, 120])
def test_explain_fits_a_terminal_and_cuts_nothing(width: int) -> None:
    from ckptkit.cli.explain import text
    from ckptkit.cli.options import View
    from ckptkit.codes import CODES, TOPICS, topic

    said = {name: {"title": c.title, "meaning": c.meaning, "remedy": c.remedy} for name, c in CODES.items()}
    both = {"schema_version": 1, "codes": said, "topics": {name: topic(name) for name in TOPICS}}
    one = {"schema_version": 1, "codes": {"module-prefix": said["module-prefix"]}, "topics": {}}
    for document in (both, one):
        whole = list(text(document, View()))
        lines = [part for line in text(document, View(width=width)) for part in line.splitlines()]
        assert max(map(len, lines)) <= width
        assert "".join("".join(lines).split()) == "".join("".join(whole).split())


def test_the_topic_of_containers_has_each(run) -> None:
    from ckptkit.formats import FORMATS, format_named

    lines = run("explain", "formats").stdout.splitlines()
    for container in FORMATS:
        (row,) = [line for line in lines if line.split(" ")[0] == container.name]
        written = container.writer or (container.shards and format_named(container.shards).writer)
        assert row.endswith(" yes") is (written is not None)
        assert f" {container.title}" in row
        assert len(row) <= 80


def test_every_code_in_the_source_is_explained() -> None:
    import re

    import ckptkit
    from ckptkit.codes import CODES

    package = Path(ckptkit.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in package.rglob("*.py") if path.parent.name != "codes"]
    emitted = {code for text in texts for code in re.findall(r"code=\"([a-z0-9-]+)\"", text)}
    assert emitted <= set(CODES)
    # Those of a table stand in it as they are.
    assert set(CODES) <= {literal for text in texts for literal in re.findall(r"\"([a-z0-9-]+)\"", text)}
