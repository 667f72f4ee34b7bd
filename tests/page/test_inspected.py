"""The page of ``ckptkit inspect`` in a browser: it draws, finds, sorts and zooms, whatever names a file has."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from support.browser import Browser
from support.commands import output_of
from torch import nn

from ckptkit.cli.inspect import command as inspect_command
from ckptkit.errors import MissingDependencyError
from ckptkit.page.frame import element, page, plain
from ckptkit.report import printable

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
RESUME = FIXTURES / "ddp_resume.pth"

ENTER, ESCAPE, TAB, SPACE = "\ue007", "\ue00c", "\ue004", " "
DOWN, UP, END, HOME = "\ue015", "\ue013", "\ue010", "\ue011"

HOSTILE = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror='window.pwned=2'>",
    '<a href="javascript:window.pwned=3">x</a>',
    "<b>bold</b><br>&lt;i&gt;",
    "%{label} %{customdata} $\\alpha$",
    "\u202egnp\u2066exe",
    "a\x00b\x1b[31m\u2028",
    "\ud800lone",
    "__proto__",
    "constructor",
    "<!--",
    "",
    "重み",
]

Pages = Callable[..., Path]
TENSORS = "#tensors input[type=search]"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files whose names, keys and values would be markup, script or worse; and one that cannot be read."""
    made = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    values: dict[str, Any] = {f"m.{name}.weight": torch.randn(20, 20) * (n + 1) for n, name in enumerate(HOSTILE)}
    values |= {name: torch.full((3,), float(n)) for n, name in enumerate(HOSTILE)}
    values["m.bad.weight"] = torch.tensor([[float("nan"), 1.0, float("inf")]])
    values["huge"] = torch.tensor([1e308, -1e308], dtype=torch.float64)
    values["x" * 1_000_000] = torch.ones(2, dtype=torch.complex64)
    values["." * 1_000_000] = torch.ones(2)
    beside = {
        "epoch": float("nan"),
        "big": 2**70,
        "step": 12_345_678,
        HOSTILE[1]: HOSTILE[0],
        "args": {"<b>lr": "&lt;"},
    }
    torch.save({"state_dict": values, **beside}, made / "hostile.pth")
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), made / "<img src=x onerror=window.pwned=8>.pth")
    (made / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    (made / "notes.txt").write_text("no checkpoint")
    return made


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15,000 tensors."""
    made = tmp_path_factory.mktemp("many") / "many.safetensors"
    names = [f"layers.{i}.{part}" for i in range(5_000) for part in ("up.weight", "up.bias", "down.weight")]
    header = {n: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    text = json.dumps(header).encode()
    made.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4 * len(names)))
    return made


def test_a_page_is_one_ascii_file_with_a_strict_policy(inspected: Pages) -> None:
    text = inspected(RESUME, "--stats").read_bytes().decode("ascii")
    assert len(text) < 6_000_000
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts]
    assert rules["script-src"] == " ".join(hashes)
    assert len(scripts) == 5
    outside = re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(src|href|on\w+|url|import)\s*[=(]", outside.replace("script-src", "").replace("-src", ""))


def test_without_scripts_it_says_the_essentials(inspected: Pages, files: Path) -> None:
    (document,) = json.loads(output_of(inspect_command, str(RESUME), "--json"))["files"]
    text = html.unescape("".join(re.findall("<noscript>(.*?)</noscript>", inspected(RESUME, "--stats").read_text())))
    assert text.startswith("<p>This page needs JavaScript to show all of its data.")
    assert str(RESUME) in text and "torch-zip, resume, trust: needs trust" in text
    for finding in document["findings"]:
        assert f"<li>{finding['severity']}: {finding['message']}" in text
        assert finding["fix"] is None or f"<pre>{finding['fix']}</pre>" in text
    several = "".join(re.findall("<noscript>(.*?)</noscript>", inspected(files, code=2).read_text()))
    assert "&lt;img src=x onerror" in several and "truncated" in several
    assert set(re.findall("<[^>]*>", several)) <= {
        "<h2>",
        "</h2>",
        "<p>",
        "</p>",
        "<ul>",
        "</ul>",
        "<li>",
        "</li>",
        "<pre>",
        "</pre>",
    }


def test_data_is_no_markup_and_comes_back() -> None:
    value = {"</script><!--": ["&amp;", "\u2028\u2029", "名", "\ud800"], "n": [1, 2.5, None, True, 2**70, float("inf")]}
    made = element("x", plain(value))
    assert not re.search("[<>&\u2028]", made.removeprefix('<script type="application/json" data-name="x">')[:-9])
    data = json.loads(re.sub("</?script.*?>", "", made))
    assert data["n"] == [1, 2.5, None, True, str(2**70), "inf"]
    assert data["</script><!--"] == ["&amp;", "\\u2028\\u2029", "名", "\\ud800"]
    assert len(plain("x" * 10**6)) < 30_000


def test_without_plotly_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "plotly" else find(name))
    with pytest.raises(MissingDependencyError, match=re.escape("pip install '.[report]'")):
        output_of(inspect_command, str(RESUME), "--format", "html")
    assert [*page("t", "inspect.js", [], has_charts=False)]


def test_a_terminal_gets_no_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ckptkit.cli.ending.stdout", lambda: SimpleNamespace(isatty=lambda: True, encoding="utf-8"))
    with pytest.raises(click.UsageError, match="--output FILE"):
        output_of(inspect_command, str(RESUME), "--format", "html")
    monkeypatch.undo()
    output_of(inspect_command, str(RESUME), "--format", "html", "--output", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_bytes().endswith(b"</html>\n")


def test_it_draws_what_is_in_the_file(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"))
    assert browser.text("h1") == RESUME.name
    assert [part.get_attribute("id") for part in browser.all("section.part")] == [
        "findings", "sections", "where-the-bytes-are", "spread-by-layer", "tensors", "training", "names",
    ]  # fmt: skip
    assert browser.texts("nav a") == browser.texts("section.part h2")
    (document,) = json.loads(output_of(inspect_command, str(RESUME), "--json"))["files"]
    assert browser.texts("#findings .code") == [each["code"] for each in document["findings"]]
    fixes = [document["combined_fix"]["command"], *(each["fix"] for each in document["findings"] if each["fix"])]
    assert browser.texts("#findings .copyable code") == fixes
    assert browser.column("sections") == [each["path"] for each in document["sections"]]
    assert browser.text("#tensors .count") == f"{len(document['tensors'])} tensors"
    assert browser.column("names") and "argparse.Namespace" in browser.column("names")
    browser.until("return document.querySelectorAll('#where-the-bytes-are path.surface').length > 30")
    browser.until("return document.querySelectorAll('#spread-by-layer .scatterlayer path.js-line').length === 2")
    told = dict(zip(browser.column("training", 1), browser.column("training", 2), strict=True))
    assert told["epoch"] == str(document["training"]["scalars"]["epoch"])


def test_a_chosen_tensor_shows_its_values(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"), as_it_is=True)
    browser.one("#tensors tbody tr[data-at]").send_keys(ENTER)
    assert browser.text(".detail h3") == "module.features.0.0.weight"
    drawn = browser.until("return (document.querySelector('.detail .chart') || {}).data")[0]
    saved = torch.load(RESUME, "cpu", weights_only=False)["state_dict"]["module.features.0.0.weight"].flatten().double()
    width = drawn["width"][0]
    edges = [drawn["x"][0] - width / 2, *(middle + width / 2 for middle in drawn["x"])]
    bins = torch.histogram(saved, torch.tensor([*edges, edges[-1] + width], dtype=torch.float64)).hist
    assert drawn["y"] == bins[:-1].int().tolist()
    assert sum(drawn["y"]) == saved.numel()
    assert f"{saved.numel()} finite values" in browser.text(".detail figcaption")
    assert len(browser.all(".detail .barlayer path")) == len(drawn["y"])
    browser.keys(ESCAPE)
    assert not browser.all(".detail h3")


def test_keys_in_a_table(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"), as_it_is=True)

    def focused() -> int:
        return int(browser.js("return document.activeElement.dataset.at"))

    browser.one(TENSORS).send_keys(DOWN)
    assert focused() == 0
    browser.keys(DOWN)
    browser.keys(DOWN)
    assert focused() == 2
    browser.keys(END)
    assert focused() == 474
    assert browser.js("return document.activeElement.getBoundingClientRect().height") > 0
    browser.keys(HOME)
    browser.keys(DOWN)
    browser.keys(SPACE)
    assert browser.text(".detail h3") == "module.features.0.1.weight"
    browser.keys(TAB, ESCAPE)  # from its button
    assert browser.texts(".detail") == [] and focused() == 1
    browser.keys(SPACE)
    assert browser.one("#tensors tr[aria-selected=true]").get_attribute("data-at") == "1"
    browser.keys(ESCAPE)
    assert browser.texts(".detail") == []
    browser.keys(UP, UP)
    assert browser.js("return document.activeElement.type") == "search"
    browser.typed(TENSORS, "bias")
    browser.keys(ESCAPE)
    assert browser.text("#tensors .count") == "475 tensors"


def test_the_map_is_gone_into_and_back(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"), as_it_is=True)
    crumbs = "#where-the-bytes-are .crumbs li"
    assert browser.texts(crumbs) == ["all tensors"]
    browser.driver.execute_script("arguments[0].scrollIntoView()", browser.one("#where-the-bytes-are"))
    tile = next(each for each in browser.all("#where-the-bytes-are g.slice") if each.text.startswith("classifier"))
    from selenium.webdriver import ActionChains

    ActionChains(browser.driver).move_to_element(tile.find_element("css selector", "text")).click().perform()
    assert browser.texts(crumbs) == ["all tensors", "state_dict", "module", "classifier", "1"]
    assert browser.texts("#where-the-bytes-are .inside .name") == ["weight", "bias"]
    assert browser.text("#where-the-bytes-are figcaption").startswith("state_dict.module.classifier.1: 51.2 kB")
    browser.click(f"{crumbs} button", 1)
    assert browser.texts(crumbs) == ["all tensors", "state_dict"]
    browser.keys(ENTER)  # the first line has the focus, and then the first of what is in it
    assert browser.js("return document.activeElement === document.querySelector('.inside button')")
    assert browser.texts(crumbs) == ["all tensors", "state_dict", "module"]
    browser.click("#where-the-bytes-are .switch button", 1)
    assert "parameters" in browser.text("#where-the-bytes-are .inside .value")
    browser.one("#where-the-bytes-are .inside button").send_keys(ESCAPE)
    assert browser.texts(crumbs) == ["all tensors", "state_dict"]
    browser.click("#where-the-bytes-are .inside button")
    for _ in range(6):  # down to a tensor, which the table shows
        if not browser.all(".detail h3"):
            browser.click("#where-the-bytes-are .inside button")
    assert browser.text(".detail h3") == "module.features.18.0.weight"


def test_search_sort_and_filter(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"), as_it_is=True)
    (document,) = json.loads(output_of(inspect_command, str(RESUME), "--json"))["files"]
    tensors = document["tensors"]

    def shown() -> str:
        return browser.text("#tensors .count")

    def expected(test: Callable[[dict[str, Any]], bool]) -> str:
        return f"{sum(map(test, tensors))} of {len(tensors)} tensors"

    browser.typed(TENSORS, "RUNNING")
    assert shown() == f"0 of {len(tensors)} tensors"
    browser.typed(TENSORS, "running")
    assert shown() == expected(lambda each: "running" in each["name"])
    browser.typed(TENSORS, "*.bias")
    assert shown() == expected(lambda each: each["name"].endswith(".bias"))
    browser.typed(TENSORS, "*features.1?.*")
    assert shown() == expected(lambda each: re.search(r"features\.1.\.", each["name"]) is not None)
    browser.typed(TENSORS, "")
    browser.choose("#tensors label:nth-of-type(1) select", "=int64")
    assert shown() == expected(lambda each: each["dtype"] == "int64")
    browser.choose("#tensors label:nth-of-type(2) select", "=state_dict")
    assert shown() == expected(lambda each: each["dtype"] == "int64" and each["section"] == "state_dict")
    for select in (1, 2):
        browser.choose(f"#tensors label:nth-of-type({select}) select", "")
    heads = browser.texts("#tensors th button")
    size = heads.index("bytes")
    browser.click("#tensors th button", size)
    head = browser.all("#tensors th")[size]
    assert head.get_attribute("aria-sort") == "descending"
    largest = sorted(tensors, key=lambda each: -each["nbytes"])
    assert browser.column("tensors")[0].endswith(largest[0]["name"][-5:])
    browser.click("#tensors th button", size)
    assert head.get_attribute("aria-sort") == "ascending"
    assert browser.column("tensors", size + 1)[0] == f"{largest[-1]['nbytes']} B"
    browser.click("#tensors th button", 0)
    names = browser.column("tensors")
    numbers = [int(each[1]) for name in names if (each := re.match(r"module\.features\.(\d+)\.", name))]
    assert numbers == sorted(numbers) and max(numbers) < 10  # features.2 before features.10


def test_what_a_screen_reader_is_told(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"), as_it_is=True)
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    for role in ("button", "combobox", "searchbox", "link", "grid", "navigation", "region"):
        names = [name for found, name in told if found == role]
        assert names and all(names), role
    assert ("grid", "Tensors") in told
    assert any(role == "group" and name.startswith("Treemap of bytes") for role, name in told)
    assert browser.one("[role=grid][aria-label=Tensors]").get_attribute("aria-rowcount") == "476"
    assert browser.one("#tensors tr[data-at]").get_attribute("aria-rowindex") == "2"
    browser.typed(TENSORS, "running")
    assert browser.text("[role=status]") == browser.text("#tensors .count")
    browser.typed(TENSORS, "")
    order = browser.js("""
        return [...document.querySelectorAll('a, button, input, select, [tabindex="0"], summary')]
            .filter((each) => each.tabIndex > 0).length""")
    assert order == 0  # the order of tabs is that of the page
    assert browser.one(".copyable button").get_attribute("aria-label").startswith("Copy: ckptkit convert")


def test_both_themes_can_be_read(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"), dark=True, as_it_is=True)
    contrasts = """
        const luminance = (name) => { // of a colour, or of one so far on its way to that of the sheet
            const [one, share] = name.split(" ");
            const seen = Page.mixed(Page.color(one), Page.color("sheet"), Number(share || 0));
            const [r, g, b] = seen.match(/[\\d.]+/g).map((each) => {
                const part = Number(each) / 255;
                return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        return arguments[0].map(([text, on]) => {
            const [low, high] = [luminance(text), luminance(on)].sort((a, b) => a - b);
            return (high + 0.05) / (low + 0.05);
        })"""
    tones = ("error", "warning", "info", "good")
    pairs = [(text, on) for text in ("ink", "soft", "accent", *tones) for on in ("sheet", "ground", "raised")]
    pairs += [(tone, f"{tone}-wash") for tone in tones] + [("accent", "accent-wash"), ("ink", "accent-wash")]
    pairs += [("sheet", f"series-{n}") for n in range(1, 9)]  # the names on tiles, and around them
    pairs += [("ink", f"series-{n} {share}") for n in range(1, 9) for share in (0.72, 0.58)]
    seen = set()
    for _ in ("as the system has it", "switched"):
        seen.add(browser.js("return getComputedStyle(document.body).backgroundColor"))
        found = dict(zip(pairs, browser.js(contrasts, pairs), strict=True))
        assert {pair for pair, contrast in found.items() if contrast < 4.5} == set()
        browser.click(".theme")
    assert len(seen) == 2
    assert browser.js("return Page.isDark()")  # again
    assert browser.js("return document.querySelector('.map .chart').layout.font.color") == "rgb(232, 230, 225)"


def test_no_width_is_too_narrow(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"), as_it_is=True)
    wide = """
        return [...document.querySelectorAll('main *')].filter((each) => !each.closest('.scroll, svg, .chart, .hidden')
            && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML.slice(0, 200))"""
    for width in (1600, 900, 400):
        browser.size(width)
        assert browser.js("return document.documentElement.scrollWidth") <= width
        assert browser.js(wide) == []
    cut = "return [...document.querySelectorAll('th > *')].filter((each) => each.scrollWidth > each.clientWidth)"
    assert browser.js(cut) == []


def test_printed_it_has_the_rows(browser: Browser, inspected: Pages) -> None:
    browser.open(inspected(RESUME, "--stats"), as_it_is=True)
    rows = "return document.querySelectorAll('#tensors tbody tr[data-at]').length"
    assert browser.js(f"dispatchEvent(new Event('beforeprint')); {rows}") == 475
    assert browser.js(f"dispatchEvent(new Event('afterprint')); {rows}") < 60
    browser.emulate(media="print", dark=True)
    assert browser.js("return getComputedStyle(document.querySelector('.bar')).display") == "none"


def test_names_are_data(browser: Browser, inspected: Pages, files: Path) -> None:
    browser.open(inspected(files / "hostile.pth", "--stats"))
    assert "resume" in browser.texts(".badge")
    browser.typed(TENSORS, "*weight")
    shown = browser.column("tensors")
    named = [f"m.{printable(name)}.weight" for name in HOSTILE]
    titles = browser.js("return [...document.querySelectorAll('#tensors td:first-child')].map((each) => each.title)")
    assert [title or text for text, title in zip(shown, filter(str.strip, titles), strict=False)][:3]
    assert len(shown) == len(HOSTILE) + 1
    tiles = " ".join(browser.js("return document.querySelector('.map .chart').data[0].labels"))
    assert "&lt;b&gt;bold&lt;/b&gt;&lt;br&gt;&amp;lt;i&amp;gt;" in tiles
    drawn = "return [...document.querySelectorAll('.map text')].map((each) => each.textContent).join(' ')"
    for name in HOSTILE[3:5]:  # as it is
        browser.until(f"{drawn}.includes({json.dumps(name)})")
    assert not browser.all(".chart a, .map b, main img, main script, main svg a")
    browser.click(".map .inside button")
    (at,) = (at for at, name in enumerate(browser.texts(".map .inside .name")) if name == "constructor")
    browser.click(".map .inside button", at)
    assert browser.text(".map figcaption").startswith("m.constructor: 1.6 kB, 7.")
    assert "native code" not in browser.text(".map figcaption")
    for at, name in enumerate(named):
        browser.click("#tensors tbody tr[data-at]", at)
        assert browser.text(".detail h3") == name
    browser.typed(TENSORS, "xxx")
    browser.click("#tensors tbody tr[data-at]")
    assert 10_000 < len(browser.text(".detail h3")) < 30_000
    assert "Complex values" in browser.text(".detail")
    browser.typed(TENSORS, "huge")
    browser.click("#tensors tbody tr[data-at]")
    browser.until("return document.querySelector('.detail').textContent.includes('too large to draw')")
    told = dict(zip(browser.column("training", 1), browser.column("training", 2), strict=True))
    assert (told["epoch"], told["big"], told["args.<b>lr"]) == ("nan", str(2**70), "&lt;")
    assert HOSTILE[0] in told.values() and told["step"] == "12,345,678"
    assert "1 tensor with NaN or Inf: m.bad.weight" in browser.text("#spread-by-layer figcaption")
    hover = browser.js("""
        const node = document.querySelector('#spread-by-layer .chart');
        Plotly.Fx.hover(node, [{curveNumber: 1, pointNumber: 2}]);
        return [...node.querySelectorAll('.hoverlayer text')].map((each) => each.textContent).join(' ')""")
    assert HOSTILE[2] in hover


def test_several_files_are_a_list(browser: Browser, inspected: Pages, files: Path) -> None:
    browser.open(inspected(files, code=2))
    assert len(browser.column("files")) == 3
    assert browser.text("h1") == "<img src=x onerror=window.pwned=8>.pth"
    assert "1 file (1 text file)" in browser.text("#files .note")
    browser.click("#files tbody tr[data-at]", 1)
    assert browser.text("h1") == "broken.pth"
    assert browser.texts("nav a") == ["Files", "Error"]
    assert "truncated" in browser.text("#error .message")
    browser.typed("#files input", "*hostile*")
    browser.click("#files tbody tr[data-at]")
    assert browser.text("h1") == "hostile.pth"
    assert browser.text("#tensors .count") == f"{2 * len(HOSTILE) + 4} tensors"


def test_very_many_tensors(browser: Browser, inspected: Pages, many: Path) -> None:
    browser.open(inspected(many))
    assert browser.text("#tensors .count") == "15,000 tensors"
    assert len(browser.all("#tensors tbody tr[data-at]")) < 60
    assert 50 <= len(browser.all("#where-the-bytes-are path.surface")) < 700
    took = browser.js("""
        const field = document.querySelector('#tensors input'), times = [];
        for (const text of ['b', 'bi', 'bias', 'layers.77', '*.down.*']) {
            const start = performance.now();
            field.value = text;
            field.dispatchEvent(new Event('input'));
            document.body.getBoundingClientRect();
            times.push(performance.now() - start);
        }
        return times.sort((a, b) => a - b)""")
    assert took[2] < 200  # milliseconds, the median: the machine has other work
    assert browser.text("#tensors .count") == "5,000 of 15,000 tensors"
    browser.one(TENSORS).send_keys(DOWN, END)
    browser.keys(END)
    assert browser.column("tensors")[-1] == "layers.4999.down.weight"
    assert browser.texts("#where-the-bytes-are .inside .name")[:2] == ["0 … 99", "100 … 199"]
    browser.click("#where-the-bytes-are .inside button", 47)
    assert browser.texts("#where-the-bytes-are .inside .name")[-1] == "4799"


def test_files_that_several_processes_read_make_the_same_page(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    names = sorted(os.listdir(files))
    one, two = (output_of(inspect_command, *names, "--format", "html", "--jobs", jobs, code=2) for jobs in ("1", "2"))
    assert one == two
