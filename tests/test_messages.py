"""What is said, as a whole: numbers with their nouns, plain English, a line where a line is asked for.

The messages of a room are tested with it; here are the rules that all keep, held against the package's own source.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit

Save = Callable[..., Path]

PACKAGE = Path(ckptkit.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTS = [
    PACKAGE.parent / "README.md",
    PACKAGE.parent / ".github" / "CONTRIBUTING.md",
    *sorted(PACKAGE.rglob("*.md")),
]

# Plain English.


def _texts(path: Path, said: bool = True) -> Iterator[tuple[int, ast.AST]]:
    """The strings of a file that may be said, each with its line: all but docstrings; or docstrings alone."""
    for node, is_docstring in _strings(path):
        if is_docstring is not said:
            yield node.lineno, node  # type: ignore[attr-defined]


@cache
def _strings(path: Path) -> list[tuple[ast.AST, bool]]:
    """All of a file, and whether each is a docstring."""
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [each for each in nodes if isinstance(each, ast.JoinedStr) or isinstance(getattr(each, "value", None), str)]
    return [(node, id(node) in docstrings) for node in texts if isinstance(node, (ast.JoinedStr, ast.Constant))]


_EVERYWHERE = (
    r"\bmend(?:s|ed|ing)?\b",
    r"\bnames that hold\b",
    r"\bgoes before\b",
    r"\bchooses? no\b",
    r"(?<![Tt]here )\b(?:is|are) no (?!longer|more|such|\w+er\b)\w+",
    r"\b(?:may|nothing) lies?\b",
    r"\b(?:lies?|stands?) (?:in|at|below|beside|here|there|under|behind|where|outside|inside|twice|already)\b",
    r"\bmost an? \w+(?: \w+)? (?:may|can|has)\b",
    r"\bstands? for (?:itself|themselves)\b",
    r"\bof (?:its|their) own making\b",
    r"\banew\b",
    r"\bgravest\b",
    r"\bheld against\b",
    r"\bput together\b",
    r"\bpassed over\b",
    r"\bgone through\b",
    r"\bwhat is typed\b",
    r"\b[Cc]olour|\w(?:itial|ormal|erial|ogn)is(?:e|es|ed|ing)\b|\b[Cc]ancelled\b",
)
"""What nobody says who speaks English from birth, in messages, help and docstrings."""

_IN_MESSAGES = (
    r"\bsaid to (?:be|lie|end)\b",
    r", no (?:\w+ )?checkpoint\b",
    r"\bexists? already\b",
    r"\binsists?\b",
    r"\blooked into\b",
    r"\bcarr(?:y|ies) (?:an?|the|their|`)",
    r"\bno whole byte\b",
    r"\bto go by\b",
    r"\bwhoever\b",
    r"\bof (?:numpy|joblib)'s\b",
    r"\bare read as it\b",
)

FOREIGN = re.compile("|".join((*_EVERYWHERE, *_IN_MESSAGES)))
FOREIGN_IN_DOCSTRINGS = re.compile("|".join(_EVERYWHERE))


def _words(node: ast.AST) -> str:
    """The text of a string; of an f-string with an ``X`` for each value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


@pytest.mark.parametrize("said", [True, False], ids=["messages", "docstrings"])
def test_messages_are_a_native_speakers(said: bool) -> None:
    foreign = FOREIGN if said else FOREIGN_IN_DOCSTRINGS
    found_at = [
        f"{path.relative_to(PACKAGE)}:{line}: {found[0]}"
        for path in SOURCES
        for line, node in _texts(path, said)
        if (found := foreign.search(" ".join(_words(node).split())))
    ]
    assert found_at == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_documents_are_a_native_speakers(path: Path) -> None:
    assert FOREIGN_IN_DOCSTRINGS.findall(" ".join(path.read_text(encoding="utf-8").split())) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.js")), ids=lambda path: path.stem)
def test_pages_are_a_native_speakers(path: Path) -> None:
    """Strings with a space in them, outside comments: others are names."""
    code = re.sub(r"(?m)^ *//.*|/\*(?s:.*?)\*/", "", path.read_text(encoding="utf-8"))
    strings = re.findall(r'"[^"\n]* [^"\n]*"|`[^`\n]* [^`\n]*`', code)
    assert strings and [text for text in strings if FOREIGN.search(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "5 is no size",
        "they are no tensors",
        "the command that mends it",
        "this goes before",
        "the ending chooses no container",
        "files that are named stand for themselves",
        "no other checkpoint may lie there",
        "the most a file may have",
        "the most a file name may have",
        "command-line options: what is typed goes before",
        "the weights lie in it",
        "the name stands twice",
        "a state of its own making",
        "write it anew",
        "x.pth: exists already",
        "a PNG image, no checkpoint",
        "names carry a prefix",
        "is said to be 6",
        "coloured, not initialised",
    ],
)
def test_what_would_be_found(text: str) -> None:
    assert FOREIGN.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "there is no such file",
        "there are no tensors",
        "a file that is no larger than its index",
        "it is no longer tied",
        "each parallel rank carries its bytes",
        "before it goes, the file stands alone",
        "a reliable normalization",
        "recommended",
    ],
)
def test_what_would_not_be_found(text: str) -> None:
    assert not FOREIGN.search(text)


# Numbers and their nouns.

COUNTED = re.compile(
    r" (?:(?:of|other|more|different) "
    r")?(?:classes|entries|(?:tensor|file|name|value|key|storage|record|path|checkpoint|parameter|buffer|shard|finding|module|section|weight|input|output|step|object)s)\b"
)

SEVERAL = {
    "shared",
    "len(files)",
    "len(shards)",
    "DEFAULT_LIMITS.arguments",
    "self._limits.members",
    "fitting",
    "pace.files",
    "pace.looked",
    "theirs",
    "ours",
}
"""Numbers that are never one where they stand before such a noun, or are told of two sides at once."""


def test_no_number_is_put_before_a_plural_by_hand() -> None:
    """``f"{count} tensors"`` says "1 tensors"; `count_of` and `share_of` do not."""
    said = [
        f"{path.relative_to(PACKAGE)}:{line}: {ast.unparse(number.value)}{noun[0]}"
        for path in SOURCES
        for line, node in _texts(path)
        if isinstance(node, ast.JoinedStr)
        for number, text in zip(node.values, node.values[1:], strict=False)
        if isinstance(number, ast.FormattedValue) and isinstance(text, ast.Constant)
        if (noun := COUNTED.match(str(text.value)))
        and not ast.unparse(number.value).startswith(("count_of", "share_of"))
        if ast.unparse(number.value) not in SEVERAL and not ast.unparse(number.value).endswith((".name", "'name']"))
    ]
    assert said == []


@pytest.fixture
def one_of_each(save: Save) -> dict[str, Path]:
    """Files with one of whatever is counted."""
    base = torch.ones(300)
    return {
        "one tensor": save({"w": torch.ones(2)}, "one.pth"),
        "one of two not contiguous": save({"a": torch.ones(2, 3).T, "b": torch.ones(2)}, "order.pth"),
        "one wrapped": save({"module.a": torch.ones(2), "b": torch.ones(2)}, "wrapped.pth"),
        "one sparse": save({"a": torch.eye(2).to_sparse(), "b": torch.ones(2)}, "sparse.pth"),
        "one view": save({"a": base[:2], "b": torch.ones(2)}, "view.pth"),
        "one wrapped name of two": save({"module.a": torch.ones(1), "b.module.c": torch.ones(1)}, "wrapped.pth"),
        "one parameter group": save(
            {"model": {"w": torch.ones(2)}, "o": {"state": {}, "param_groups": [{"lr": 1}]}}, "o.pth"
        ),
    }


ONES = re.compile(
    r"(?<!of )\b1 (?:tensors|names|keys|values|storages|parameters|files|bytes|steps|elements|sections|groups|others)\b"
    r"|\b1 of \d+ \w+ (?:are|were|carry|begin|hold|have)\b|\b0 tensors were not contiguous"
)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_one_is_not_said_as_several(one_of_each: dict[str, Path], run: Any, tmp_path: Path) -> None:
    shown = []
    for number, path in enumerate(one_of_each.values()):
        shown += [run("inspect", path), run("convert", path, f"{number}.pth"), run("check", path)]
        shown += [run("convert", path, f"{number}-stripped.pth", "--strip-module")]
        shown += [run("convert", path, f"{number}.safetensors", "--dtype", "float16"), run("manifest", path)]
        shown += [run("diff", path, one_of_each["one tensor"]), run("diff", path, path)]
    said = [
        line for done in shown for line in (done.stdout + done.stderr).splitlines() if not line.lstrip().startswith('"')
    ]
    assert len(said) > 50
    found = [line for line in said if ONES.search(line)]
    assert found == []


# Several files, and folders.


def test_a_folder_around_an_unpacked_archive_is_told(save: Save, run: Any, tmp_path: Path) -> None:
    shutil.unpack_archive(save({"w": torch.ones(2)}), tmp_path / "unpacked", "zip")
    paths = ("unpacked", "unpacked/model", "unpacked/model/data.pkl")
    for given in paths:
        assert "torch-zip, state dict" in run("inspect", given).stdout
    for name in ("version", "byteorder"):  # without what tells the archive's format
        (tmp_path / "unpacked" / "model" / name).unlink()
    shutil.rmtree(tmp_path / "unpacked" / "model" / ".data")
    for given in paths:
        done = run("inspect", given)
        assert done.returncode == 2
        assert "a torch archive that was unpacked; pack it again, stored: cd " in done.stderr
        assert "zip -0 -r model.pth model" in done.stderr and "pickle.load" not in done.stderr


def test_each_of_several_arguments_has_its_own_error(save: Save, run: Any) -> None:
    good, missing = save({"w": torch.ones(2)}), ["no.pth", "such.pth"]
    for command in ("inspect", "check"):
        done = run(command, missing[0], good, missing[1])
        told = done.stdout + done.stderr
        assert done.returncode == 2 and "Usage" not in told
        assert all(f"{name}: " in told for name in missing) and "no such file" in told
        assert "model.pth: " in told


# A notebook prints what the last line of a cell gives.


def test_what_a_notebook_prints_is_a_line(save: Save, tmp_path: Path) -> None:
    path = save({f"layer.{n}.weight": torch.ones(2) for n in range(300)} | {"odd": 3})
    with ckptkit.open(path) as file:
        given = [
            file,
            file.state_dict,
            file.checkpoint,
            file.save(tmp_path / "copy.pth"),
            file.rewrite(ckptkit.StripModule()),
        ]
    given += [
        ckptkit.convert(path, tmp_path / "b.pth"),
        ckptkit.diff(path, tmp_path / "copy.pth"),
        ckptkit.manifest([path]),
        ckptkit.check([path, tmp_path / "none.pth"]),
    ]
    for value in given:
        assert len(repr(value)) < 200 and "\n" not in repr(value), type(value)
    assert repr(given[-1]) == "<CheckReport: 1 of 2 files could not be checked, 1 passed>"
    assert repr(given[-2]).startswith("<Manifest of 1 file in ")
    assert repr(given[-3]) == "<Difference: all 301 tensors are bit-identical>"
    assert repr(given[-4]).startswith("<Report: ok, ")


def test_a_failed_report_is_a_line_that_names_what_failed(save: Save) -> None:
    report = ckptkit.Report(
        findings=tuple(ckptkit.Finding(code=f"c{n}", severity="error", message="m") for n in range(9))
    )
    assert repr(report) == "<Report: failed: c0, c1, c2 and 6 more>"


# What a file is.


def graph(**more: Any) -> dict[str, Any]:
    return {"x": torch.ones(9, 3), "edge_index": torch.zeros(2, 5, dtype=torch.int64), **more}


def slices(data: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([0, 4, 9]) for name in data}


SAMPLES = {"signal": torch.ones(9, 3), "heart_rate": torch.ones(9)}


@pytest.mark.parametrize(
    "saved",
    [
        (graph(), slices(graph())),
        (graph(y=torch.ones(2)), slices(graph()), torch.nn.Linear),
        (SAMPLES, slices(SAMPLES)),
        [graph() for _ in range(3)],
    ],
)
def test_a_data_set_is_a_collection(saved: Any, save: Save) -> None:
    document = ckptkit.inspect(save(saved))
    assert (document["kind"], document["state_dict"]) == ("collection", None)
    assert not {finding["code"] for finding in document["findings"]} & {"training-state", "ambiguous-section"}


@pytest.mark.parametrize(
    "saved",
    [
        (SAMPLES, {"param_groups": [], "state": {}}),
        (SAMPLES, {"best": torch.tensor(3)}),
        (SAMPLES, {"elsewhere": torch.tensor([0, 3])}),
        {"model": graph()},
    ],
)
def test_weights_are_none(saved: Any, save: Save) -> None:
    assert ckptkit.inspect(save(saved))["state_dict"] is not None


def test_sets_of_weights_are_not_a_training_checkpoint(save: Save, run: Any) -> None:
    weights = {"fc.weight": torch.ones(2, 3)}
    shown = run("inspect", save([weights, {"fc.weight": torch.zeros(2, 3)}])).stdout
    assert "2 sets of weights, none of which is taken as the model's" in shown and "training" not in shown
    shown = run("inspect", save({"model": weights, "generator": {"up.weight": torch.ones(5)}, "name": "a"})).stdout
    assert "the weights are under 'model', others under 'generator'" in shown
    assert "are not weights" not in shown
