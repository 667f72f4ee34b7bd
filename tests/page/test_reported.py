"""The pages of ``ckptkit diff``, ``check`` and ``verify`` in a browser: verdicts, their reasons, hostile names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from support.browser import Browser
from support.commands import output_of

from ckptkit.cli import html
from ckptkit.cli.check import command as check_command
from ckptkit.cli.diff import command as diff_command
from ckptkit.cli.options import View
from ckptkit.cli.verify import command as verify_command
from ckptkit.errors import MissingDependencyError
from ckptkit.released.results import CheckFinding, CheckReport, FileResult

ENTER, ESCAPE, DOWN, END = "\ue007", "\ue00c", "\ue015", "\ue010"

HOSTILE = ("</script><script>window.pwned=1</script>", "<img src=x onerror='window.pwned=2'>", "%{label}<b>&lt;\u202ex")

Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """``made(command, arguments, code=1)``: the page of a command."""

    def page(command: click.Command, *arguments: object, code: int = 0) -> Path:
        path = tmp_path / f"{command.name}.html"
        output_of(command, *map(str, arguments), "--format", "html", code=code, to=str(path))
        return path

    return page


def written(path: Path, lines: Any) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def counted(browser: Browser, part: str) -> str:
    """What is said of how many rows are shown."""
    return browser.text(f"#{part} .count")


# diff


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints with differences of every kind, some under names that would be markup."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    before: dict[str, Any] = {f"layers.{i}.{part}": torch.randn(6, 6) for i in range(8) for part in ("up", "down")}
    before |= {f"m.{name}": torch.randn(4) for name in HOSTILE}
    before |= {"cast": torch.randn(5), "head.weight": torch.randn(10, 4), "gone": torch.ones(3), "named": torch.rand(7)}
    before |= {"zeros": torch.zeros(3), "holed": torch.ones(4)}
    after = copy.deepcopy(before)
    after["layers.3.up"] *= 1.5
    after["layers.5.down"] *= 1.0005
    for name in HOSTILE:
        after[f"m.{name}"] += 1
    after["cast"], after["head.weight"] = after["cast"].half(), torch.randn(3, 4)
    after["renamed"], after["new"] = after.pop("named"), torch.ones(2)
    after["zeros"] += 1
    after["holed"][1] = float("nan")
    del after["gone"]
    for name, state, epoch in (("a.pth", before, 1), ("b.pth", after, 2)):
        torch.save({"state_dict": state, "epoch": epoch, HOSTILE[0]: HOSTILE[1] * epoch}, folder / name)
    return folder / "a.pth", folder / "b.pth"


def test_a_difference_is_a_verdict_a_map_and_tables(browser: Browser, made: Made, pair: tuple[Path, Path]) -> None:
    browser.open(made(diff_command, *pair, code=1))
    assert browser.text("h1") == "Different" and browser.texts(".verdict.error")
    assert "12 tensors differ" in browser.text(".verdict p")
    figures = dict(zip(browser.texts(".figures dt"), browser.texts(".figures dd"), strict=True))
    assert {each.strip() for each in figures} >= {"changed", "recast", "reshaped", "renamed", "added", "removed"}
    assert len(browser.all("#where-it-changed .chart path.surface")) > 8
    assert "layers" in browser.texts("#where-it-changed .inside .name")
    assert counted(browser, "tensors") == "12 tensors"
    assert set(browser.column("tensors", 2)) == {"changed", "recast", "reshaped", "renamed", "added", "removed"}
    names = browser.column("tensors")
    assert [name for name in names if "pwned" in name] and any("\\u202e" in name for name in names)
    assert "renamed (was named)" in names
    assert browser.texts("#training td.mono")[0] == "epoch"

    browser.typed("#tensors input[type=search]", "layers.*")
    assert sorted(browser.column("tensors")) == ["layers.3.up", "layers.5.down"]
    browser.typed("#tensors input[type=search]", "named")
    assert browser.column("tensors") == ["renamed (was named)"], "a name that it had is found too"
    browser.typed("#tensors input[type=search]", "")
    browser.choose("#tensors select", "=changed")
    browser.click("#tensors th button", 6)
    amounts = browser.column("tensors", 7)
    assert amounts[0] == "NaN or Inf" and amounts[1].endswith(" %") and amounts[-1] == "0.05 %" and "50 %" in amounts
    assert browser.one("#tensors th[aria-sort=descending]").text.startswith("changed by")
    browser.js("document.querySelector('#tensors tbody tr[data-at]').focus()")
    browser.keys(DOWN, END, ENTER)
    assert browser.text("#tensors .detail h3") == "layers.5.down"
    assert {"max |b−a|", "cosine", "elements that are equal"} <= set(browser.texts("#tensors .detail dt"))  # noqa: RUF001
    browser.keys(ESCAPE)
    assert browser.texts("#tensors .detail") == []
    browser.js("document.querySelector('#by-module tbody tr[data-at]').focus()")
    browser.keys(ENTER)
    assert browser.one("#tensors input[type=search]").get_property("value") == browser.column("by-module")[0]
    assert browser.js("return document.activeElement.closest('#tensors tr[data-at]') !== null"), "keys go on there"

    names, bars = browser.texts("#where-it-changed .inside .name"), "#where-it-changed .inside .share i"
    colors = browser.js("return [...document.querySelectorAll(arguments[0])].map((bar) => bar.style.background)", bars)
    of = dict(zip(names, colors, strict=True))
    assert of["holed"] == "var(--error)"
    assert (of["m"], of["zeros"], of["gone"], of["renamed"]) == ("var(--error)", "var(--error)", *["var(--soft)"] * 2)
    browser.click("#where-it-changed .inside button", names.index("layers"))
    assert browser.text("#where-it-changed .crumbs [aria-current]") == "layers"
    assert sorted(browser.texts("#where-it-changed .inside .name")) == ["3", "5"]
    browser.js("document.querySelector('#where-it-changed .inside button').focus()")
    browser.keys(ESCAPE)
    assert browser.text("#where-it-changed .crumbs [aria-current]") == "all that differs"


def test_the_same_is_said_so(browser: Browser, made: Made, pair: tuple[Path, Path]) -> None:
    page = made(diff_command, pair[0], pair[0])
    assert page.stat().st_size < 200_000, "there is nothing to draw"
    browser.open(page, dark=True)
    browser.size(420)
    assert browser.text("h1") == "The same" and browser.texts(".verdict.good")
    assert not browser.all("#tensors") and not browser.all("#where-it-changed")
    assert browser.js("return document.documentElement.scrollWidth") <= 420


def test_a_difference_of_very_many_tensors_is_of_use(browser: Browser, pair: tuple[Path, Path], tmp_path: Path) -> None:
    import ckptkit

    document: Any = ckptkit.diff(*pair).to_dict()
    row = document["changed"][0]
    document["changed"] = [
        {**row, "name": f"layers.{i}.{part}.weight"} for i in range(15_000) for part in ("up", "down")
    ]
    page = written(tmp_path / "many.html", html.diff(document, View()))
    assert page.stat().st_size < 9_000_000
    browser.open(page)
    assert counted(browser, "tensors").startswith("30,0")
    assert 0 < len(browser.all("#tensors tbody tr[data-at]")) < 100
    assert browser.all("#where-it-changed .chart path.surface")
    took = browser.js(
        """const field = document.querySelector("#tensors input[type=search]");
        field.value = "14999.down"; field.dispatchEvent(new Event("input"));
        const from = performance.now(); field.value = "14998.down"; field.dispatchEvent(new Event("input"));
        return performance.now() - from"""
    )
    assert browser.column("tensors") == ["layers.14998.down.weight"]
    assert took < 500, "in milliseconds, on a machine that does other things"


def test_what_is_within_tolerance_is_told_apart(pair: tuple[Path, Path]) -> None:
    import ckptkit

    difference = ckptkit.diff(*pair, atol=10.0)
    assert difference.within_tolerance
    text = "".join(html.diff(difference.to_dict(), View()))
    assert text.isascii() and "<script>window" not in text and '"within tolerance"' in text


def test_without_plotly_nothing_is_compared(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr("ckptkit.api.diff", lambda *_, **__: pytest.fail("it was compared"))
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[report\]'"):
        output_of(diff_command, *map(str, pair), "--format", "html")


# check


def result(number: int, *, path: str | None = None) -> FileResult:
    path = path or f"weights/{number:05}.pth"
    found = []
    if number % 3 == 0:
        found.append(
            CheckFinding(
                code="pickle-not-allowed", severity="error", path=path, rule="no-pickle", expected="no pickle",
                found="torch-zip", message=f"a torch-zip file contains a pickle ({path})", fix="ckptkit convert "
                f"{path} x",
            )
        )  # fmt: skip
    if number % 500 == 1:
        found.append(
            CheckFinding(code="file-unreadable", severity="error", path=path, rule="readable", message="cut short")
        )
    if number % 100 == 5:
        found.append(
            CheckFinding(code="whole-checked", severity="info", path=path, rule="selection", message="the whole is")
        )
    return FileResult(path=path, size=number, rules=("readable", "no-pickle"), findings=tuple(found))


def test_a_check_of_10_000_files_is_of_use(browser: Browser, tmp_path: Path) -> None:
    report = CheckReport.of(tuple(map(result, range(10_000))), started="2024-02-29T12:00:00", passed_over={"text": 3})
    page = written(tmp_path / "many.html", html.check(report.to_dict(), View()))
    assert page.stat().st_size < 6_000_000
    browser.open(page)
    assert browser.text("h1") == "Failed, and some files could not be checked"
    assert "skipped: 3 files (3 texts)" in browser.texts("dl.facts dd")
    assert "3,334 of 10,000 files failed" in browser.text(".verdict p")
    assert 0 < len(browser.all("#files tbody tr[data-at]")) < 100
    assert browser.column("files", 2)[:3] == ["failed"] * 3, "what is wrong comes first"
    heads = browser.texts("#files th")
    assert heads[3:] == ["readable", "no-pickle", "selection"]
    browser.choose("#files select", "=not checked")
    assert counted(browser, "files") == "13 of 10,000 files" and set(browser.column("files", 4)) == {"not checked"}
    browser.choose("#files select", "")
    browser.typed("#files input[type=search]", "*00105.pth")
    assert browser.column("files", 5) == ["failed"] and browser.column("files", 6) == ["note"]
    browser.click("#files tbody tr[data-at]")
    assert "no pickle" in browser.text("#files .detail .findings dl") and "torch-zip" in browser.text("#files .detail")
    assert browser.texts("#files .detail .copyable code")[0] == "ckptkit convert weights/00105.pth x"
    assert len(browser.all("#findings .findings > li")) < 250
    rows = browser.texts("#rules tbody tr[data-at]")
    assert any("no-pickle" in row and "3334" in row.replace(",", "") for row in rows)


def test_a_check_is_drawn_without_charts_and_hostile_paths_are_text(
    browser: Browser, made: Made, tmp_path: Path
) -> None:
    folder = tmp_path / "<img src=x onerror=window.pwned=3>"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, folder / "</script><script>window.pwned=4".replace("/", "\u2215"))
    page = made(check_command, folder, "--no-pickle", code=1)
    assert page.stat().st_size < 200_000, "plotly.js is not in it"
    browser.open(page, dark=True)
    browser.typed("#files input[type=search]", "onerror=window.pwned=3>/<\u2215script>")
    assert browser.text("h1") == "Failed" and len(browser.column("files")) == 1
    good = made(check_command, folder)
    browser.open(good)
    browser.size(420)
    assert browser.text("h1") == "Passed" and browser.texts(".verdict.good") and not browser.all("#findings")
    assert browser.js("return document.documentElement.scrollWidth") <= 420
    browser.open(written(tmp_path / "none.html", html.check(CheckReport.of((), started="").to_dict(), View())))
    assert "Nothing was checked" in browser.text(".verdict p")


# verify


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "net.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))\n"
    )
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).state_dict()
    torch.save(state, folder / "good.pth")
    torch.save({**state, "2.bias": state["2.bias"] + 1}, folder / "other.pth")
    wrong = {**state, HOSTILE[0]: torch.ones(1), "0.bias": torch.ones(9)}
    del wrong["2.bias"]
    torch.save(wrong, folder / "wrong.pth")
    return folder


def test_a_verification_that_passes(browser: Browser, made: Made, model: Path) -> None:
    given = ("--model", f"{model / 'net.py'}:net", "--input-shape", "2,4")
    browser.open(made(verify_command, model / "good.pth", *given, "--against", model / "good.pth"))
    assert browser.text("h1") == "Passed" and browser.texts(".verdict.good")
    assert browser.texts("#checks th[scope=row]")[:4] == ["fit", "load", "weights", "forward"]
    assert "failed" not in browser.texts("#checks td .badge") and browser.texts("#checks td .badge").count("ok") > 4
    assert "Every name and every shape matches." in browser.text("#names")
    assert browser.column("outputs", 2) == ["2 × 3"]  # noqa: RUF001
    assert "bit-equal" in browser.column("compared", 4)


def test_a_verification_that_fails(browser: Browser, made: Made, model: Path) -> None:
    given = ("--model", f"{model / 'net.py'}:net", "--input-shape", "2,4")
    browser.open(made(verify_command, model / "wrong.pth", *given, code=1), dark=True)
    browser.size(420)
    assert browser.text("h1") == "Failed" and "it was not loaded" in browser.text(".verdict p")
    assert "lacks; the checkpoint has tensors that the reference lacks" in browser.text(".verdict p")
    browser.typed("#names input[type=search]", "bias")
    assert dict(zip(browser.column("names"), browser.column("names", 2), strict=True)) == {
        "2.bias": "missing",
        "0.bias": "another shape",
    }
    browser.typed("#names input[type=search]", "window.pwned=1")
    assert browser.column("names", 2) == ["unexpected"]
    assert browser.texts("#findings .findings .code")[:1] == ["missing-keys"]
    assert browser.js("return document.documentElement.scrollWidth") <= 420
    browser.open(made(verify_command, model / "good.pth", *given, "--against", model / "other.pth", code=1))
    assert "differs" in browser.column("compared", 4)
    assert re.search(r"\d", browser.column("compared", 5)[-1])
