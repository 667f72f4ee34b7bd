"""Where a configuration is found, what it says for which file, and that nothing in it is passed over."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ckptkit.errors import FileAccessError, FormatError, LimitError, MissingFileError
from ckptkit.released.config import Config, find_config, read_config

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """``write(text, name)`` writes a file and returns its path; the folder is the working directory."""
    monkeypatch.chdir(tmp_path)

    def to(text: str | bytes, name: str = "ckptkit.toml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return to


def test_all_keys(write: Write) -> None:
    config = read_config(
        write(
            """
            paths = ["weights", "more/a.pth"]
            manifest = "weights/weights.lock.json"
            no-pickle = true
            max-trust = "safe"
            require-format = "safetensors"
            max-size = "2GB"
            allow-dtype = ["float32", "int64"]
            no-nan = true
            no-optimizer = true
            no-prefix = true
            location = ["cpu"]
            fits = "torchvision:resnet18"
            forward = true
            model-args = { num_classes = 10 }
            input-shapes = [[1, 3, 64, 64]]
            """
        )
    )
    assert (config.paths, config.manifest) == (("weights", "more/a.pth"), "weights/weights.lock.json")
    policy = config.policy_for("weights/a.pth")
    assert policy.no_pickle and policy.no_nan and policy.no_optimizer and policy.no_prefix and policy.forward
    assert (policy.max_trust, policy.max_size, policy.fits) == ("safe", 2_000_000_000, "torchvision:resnet18")
    assert (policy.allow_dtype, policy.location) == (("float32", "int64"), ("cpu",))
    assert (policy.require_format, policy.input_shapes) == (("safetensors",), ((1, 3, 64, 64),))
    assert policy.model_args == {"num_classes": 10}
    assert config.needs_model


def test_underscores_do_too(write: Write) -> None:
    assert read_config(write("no_pickle = true")).policy_for("a").no_pickle


def test_pyproject(write: Write) -> None:
    path = write("[project]\nname = 'x'\n[tool.ckptkit]\nmax-size = 5\n[tool.ruff]\nx = 1", "pyproject.toml")
    assert read_config(path).policy_for("a.pth").max_size == 5


def test_all_of_it_in_a_table_check(write: Write) -> None:
    text = "[check]\nmax-size = 5\n[[check.overrides]]\nfiles = ['b']\nmax-size = 6"
    config = read_config(write(text))
    assert [config.policy_for(name).max_size for name in "ab"] == [5, 6]
    config = read_config(write(text.replace("check", "tool.ckptkit.check"), "pyproject.toml"))
    assert [config.policy_for(name).max_size for name in "ab"] == [5, 6]


def test_overrides_by_glob(write: Write) -> None:
    config = read_config(
        write("no-pickle = true\n[overrides.'*.bin']\nno-pickle = false\n[overrides.'old/*']\nmax-size = 7")
    )
    assert [config.policy_for(name).no_pickle for name in ("a.pth", "sub/a.bin")] == [True, False]
    assert [config.policy_for(name).max_size for name in ("old/a.bin", "a.bin")] == [7, None]


def test_overrides(write: Write, tmp_path: Path) -> None:
    config = read_config(
        write(
            """
            no-pickle = true
            max-size = "1kB"
            [[overrides]]
            files = ["*.bin", "old/*"]
            no-pickle = false
            [[overrides]]
            files = "old/sub/*.pth"
            no-pickle = true
            max-size = "9kB"
            """,
            "project/ckptkit.toml",
        )
    )

    def policy(path: str) -> tuple[bool, object]:
        found = config.policy_for(path)
        return found.no_pickle, found.max_size

    assert policy("project/a.pth") == (True, 1000)
    assert policy("project/any/where/a.bin") == (False, 1000), "a glob without a slash is for names"
    assert policy("project/old/a.pth") == (False, 1000)
    assert policy("project/old/sub/a.pth") == (True, 9000), "the last that matches decides"
    assert policy(str(tmp_path / "project" / "old" / "a.pth")) == (False, 1000)
    assert policy("old/a.pth") == (True, 1000), "globs are relative to the configuration's folder"
    assert replace(config, typed={"no_pickle": True}).policy_for("project/x.bin").no_pickle, "typed goes before"
    assert not config.needs_model


def test_a_model_that_only_an_override_needs_is_known_of(write: Write) -> None:
    config = read_config(write("[[overrides]]\nfiles = ['a']\nfits = 'torchvision:resnet18'"))
    assert config.needs_model
    assert config.policy_for("a").needs_model and not config.policy_for("b").needs_model


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no-pickel = true", r"the file has an unknown key 'no-pickel'; did you mean no-pickle\?"),
        ("[chekc]\nno-pickle = true", r"the file has an unknown key 'chekc'; "),
        ("[check]\nno-pickel = true", r"\[check\] has an unknown key 'no-pickel'; did you mean no-pickle\?"),
        (
            "no-nan = true\n[check]\nno-pickle = true",
            "the file has 'no-nan' beside a table check; put all of it",
        ),
        ("no-pickle = 1", r"the file: policy no-pickle: 1 "),
        ("no-pickle = true\nno_pickle = true", "twice"),
        ("max-size = 'big'", "'big' is not a valid size"),
        ("paths = 3", r"the file: paths = 3; expected a list of strings"),
        ("manifest = []", r"the file: manifest = \[\]; expected the path"),
        ("overrides = 1", r"overrides = 1; expected tables \[\[overrides\]\]"),
        ("[[overrides]]\nno-pickle = true", r"\[overrides\[0\]\] names no files"),
        ("[overrides.'*.bin']\nno-pickel = true", r"\[overrides\.'\*\.bin'\] has an unknown key 'no-pickel'"),
        ("[overrides.'*.bin']\nfiles = ['a']", "has files, but its name is already the glob"),
        ("[overrides]\nno-pickle = true", r"overrides = \{'no-pickle': True\}; expected tables"),
        ("[[overrides]]\nfiles = ['a']\nfile = 'b'", r"overrides\[0\]\] has an unknown key 'file'; .* files\?"),
        ("[[overrides]]\nfiles = ['a']\nforward = 'b'", r"overrides\[0\]\]: policy forward"),
        ("[[overrides]]\nfiles = [1]", "files = "),
        ("[[overrides]]\nfiles = ['a']\nmanifest = 'b'", "unknown key 'manifest'"),
        ("check = 3", "check is int; expected a table"),
        ("[check", "is not valid TOML"),
        (b"fits = '\xff'", "is not valid TOML"),
        ("fits = " + "[" * 50_000, "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_told_with_the_file(write: Write, text: str | bytes, told: str) -> None:
    path = write(text)
    with pytest.raises(FormatError, match=told) as caught:
        read_config(path)
    assert str(caught.value).startswith("ckptkit.toml: ")


def test_a_wrong_key_of_pyproject_is_told_in_full(write: Write) -> None:
    with pytest.raises(FormatError, match=r"\[tool\.ckptkit\] has an unknown key 'chk'"):
        read_config(write("[tool.ckptkit.chk]", "pyproject.toml"))
    with pytest.raises(FormatError, match=r"\[tool\.ckptkit\.check\] has an unknown key 'x'"):
        read_config(write("[tool.ckptkit.check]\nx = 1", "pyproject.toml"))


def test_what_cannot_be_read(write: Write, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        read_config("nope.toml")
    with pytest.raises(FileAccessError):
        read_config(str(tmp_path))
    with pytest.raises(LimitError, match=r"ckptkit.toml: bytes of a configuration"):
        read_config(write("#" * ((4 << 20) + 1)))


def test_the_nearest_upward_is_found(write: Write, tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    write("[tool.ckptkit]", "pyproject.toml")
    write("[project]\nname = 'x'", "a/pyproject.toml")
    assert find_config(str(deep)) == os.path.join("..", "..", "pyproject.toml"), "one without our table is passed by"
    write("[tool.ckptkit]", "a/pyproject.toml")
    assert find_config(str(deep)) == os.path.join("..", "pyproject.toml")
    write("", "a/ckptkit.toml")
    assert find_config(str(deep)) == os.path.join("..", "ckptkit.toml"), "of two in one folder our own is taken"
    assert find_config(str(tmp_path)) == "pyproject.toml"


def test_a_damaged_project_on_the_way_is_told(write: Write, tmp_path: Path) -> None:
    write("[tool", "pyproject.toml")
    with pytest.raises(FormatError, match="is not valid TOML"):
        find_config(str(tmp_path))


def test_without_one_there_are_no_settings() -> None:
    assert Config().policy_for("x") == Config(path="y").policy_for("x")
