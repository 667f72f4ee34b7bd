"""What a terminal shows: every command's text at three widths, with and without colours, as ``snapshots/`` has it.

After a change that is meant, look at what ``python tests/cli/test_snapshots.py`` writes there, and commit it.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18
from wcwidth import wcswidth

import ckptkit
from ckptkit.cli import check, convert, diff, explain, inspect_text, verify
from ckptkit.cli.options import Renderer, View
from ckptkit.cli.tables import columns, seen, wrapped
from ckptkit.codes import CODES
from ckptkit.inspection import survey

FIXTURES = Path(__file__).parents[2] / "fixtures"
SNAPSHOTS = Path(__file__).with_name("snapshots")
WIDTHS = (80, 120, 200)
FAMILY = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}"
FLAG = "\N{REGIONAL INDICATOR SYMBOL LETTER D}\N{REGIONAL INDICATOR SYMBOL LETTER E}"
SUN = "\N{BLACK SUN WITH RAYS}\ufe0f"
SHOWN: dict[str, Callable[[], tuple[Renderer, Any, View]]] = {}
"""Of each case the renderer, the document, and the view but for width and colours; made in a folder of their own."""


def case(function: Callable[[], tuple[Renderer, Any, View]]) -> Callable[[], tuple[Renderer, Any, View]]:
    SHOWN[function.__name__.strip("_")] = function
    return function


def inspected(path: Any, **options: Any) -> dict[str, Any]:
    """The document, but for what another version of torch would write."""
    with ckptkit.open(path) as file:
        found = survey(file.checkpoint, **options)
        size = sum(row.nbytes for row in found["tensors"])
    for section in found["sections"]:
        section["share"] = section["nbytes"] / (size or 1)
    return {**found, "path": os.path.basename(found["path"]), "writer": "torch", "size": size}


def saved(state: object, name: str = "model.pth") -> str:
    torch.save(state, name)
    return name


def resnet() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = resnet18()
    return {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in model.state_dict().items()}


def of_fixture(name: str) -> Callable[[], tuple[Renderer, Any, View]]:
    def made() -> tuple[Renderer, Any, View]:
        os.chdir(FIXTURES)
        return inspect_text.text, inspected(name), View()

    return made


for fixture in ("ddp_resume.pth", "legacy.pth", "state_dict.safetensors", "tied.pth", "whole_model.pth", "scripted.pt"):
    SHOWN[f"inspect_{fixture.partition('.')[0]}"] = of_fixture(fixture)


@case
def inspect_resnet() -> tuple[Renderer, Any, View]:
    return inspect_text.text, inspected(saved(resnet())), View()


@case
def inspect_top() -> tuple[Renderer, Any, View]:
    return inspect_text.text, inspected(saved(resnet())), View(largest=8)


@case
def inspect_stats() -> tuple[Renderer, Any, View]:
    state = {f"encoder.layers.{i}.self_attention.weight": torch.arange(6.0) - i for i in range(3)}
    return inspect_text.text, inspected(saved(state), stats=True), View()


@case
def inspect_whole() -> tuple[Renderer, Any, View]:
    model = nn.Sequential(
        OrderedDict(embed=nn.Embedding(100, 8), block=nn.TransformerEncoderLayer(8, 2), head=nn.Linear(8, 3))
    )
    return inspect_text.text, inspected(saved(model)), View()


@case
def inspect_training() -> tuple[Renderer, Any, View]:
    model = nn.Sequential(nn.Linear(300, 64), nn.BatchNorm1d(64), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    model(torch.zeros(2, 300)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(arch="mlp", lr=0.001, data="/mnt/data/" + "imagenet/" * 20)
    state = {
        "epoch": 3,
        "model": nn.DataParallel(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": args,
    }
    return inspect_text.text, inspected(saved(state)), View()


@case
def inspect_wide_characters() -> tuple[Renderer, Any, View]:
    names = [
        "エンコーダ.層.0.重み", "エンコーダ.層.0.偏り", "長い名前" * 20 + ".重み",
        "cafe\u0301." + "e\u0301" * 60 + ".w",
        f"emoji.{FAMILY}.{FLAG}.{SUN}.w", "가중치.각.weight",
    ]  # fmt: skip
    save_file({name: torch.zeros(2 + i, 3, 7, 7) for i, name in enumerate(names)}, "wide.safetensors")
    return inspect_text.text, inspected("wide.safetensors"), View()


@case
def inspect_hostile_names() -> tuple[Renderer, Any, View]:
    names = [
        "a" * 300 + ".weight", "tab\there\x1b[31mred\x1b[0m\r\n.weight", "\u202egnp.weight", "zero\u200bwidth",
        "", "..", " ",
        "\x1b]8;;http://example.org\x07link\x1b]8;;\x07", "x." * 40 + "w",
    ]  # fmt: skip
    return inspect_text.text, inspected(saved({name: torch.zeros(i + 1, 2) for i, name in enumerate(names)})), View()


@case
def inspect_tied() -> tuple[Renderer, Any, View]:
    table = torch.zeros(3200, 64)
    at = "transformer.decoder.embeddings.word_token_embedding_table.weight"
    state = {
        at: table,
        "transformer.lm_head.output_projection.weight": table,
        "deep." * 20 + "w": table,
        "b": torch.zeros(5),
    }
    return inspect_text.text, inspected(saved(state)), View()


@case
def inspect_many_dimensions() -> tuple[Renderer, Any, View]:
    state = {"w": torch.zeros(1, 2, 3, 4, 1, 1, 1, 1), "h": torch.zeros((1,) * 60), "x" * 80: torch.zeros(3).half()}
    return inspect_text.text, inspected(saved(state)), View()


@case
def inspect_lora() -> tuple[Renderer, Any, View]:
    state = {}
    for i in range(4):
        for p in "qv":
            at = f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora"
            state |= {f"{at}_A.weight": torch.zeros(8, 64), f"{at}_B.weight": torch.zeros(64, 8)}
    save_file(state, "adapter_model.safetensors")
    return inspect_text.text, inspected("adapter_model.safetensors"), View()


def _briefly(documents: list[dict[str, Any]], view: View) -> Iterator[str]:
    view = view._replace(paths=max(len(document["path"]) for document in documents))
    for document in documents:
        yield from inspect_text.brief(document, view)


@case
def inspect_brief() -> tuple[Renderer, Any, View]:
    return _briefly, [inspected(path) for path in (saved(resnet(), "r" * 60), *sorted(FIXTURES.glob("*.pth")))], View()


@case
def diff_() -> tuple[Renderer, Any, View]:
    before, after = resnet(), resnet()
    after["conv1.weight"] += 1
    after["layer4.0.downsample.0.weight"] += torch.linspace(0, 1, 512)[:, None, None, None]
    after["fc.weight"] = after["fc.weight"].half()
    after["layer1.0.conv1.weight"] = after["layer1.0.conv1.weight"].reshape(-1)
    after["head." + "very_" * 30 + "long"] = after.pop("fc.bias")
    found = ckptkit.diff(saved(before, "a.pth"), saved(after, "b.pth")).to_dict()
    known: Any = {"writer": "torch", "size": 46_796_608}
    return diff.text, {**found, "a": {**found["a"], **known}, "b": {**found["b"], **known}}, View()


@case
def check_() -> tuple[Renderer, Any, View]:
    saved({"model": {"w": torch.zeros(3)}, "epoch": 1, "args": argparse.Namespace(lr=1)}, "resume.pth")
    save_file({"w": torch.zeros(30)}, "model.safetensors")
    found = ckptkit.check(
        ["resume.pth", "model.safetensors"], no_pickle=True, max_trust="safe", max_size="1B"
    ).to_dict()
    for each in (*found["files"], *found["findings"]):  # sizes are torch's
        for key in {"size", "found", "message"} & each.keys():
            each[key] = re.sub(r"[\d.]+ k?B;", "1 kB;", each[key]) if isinstance(each[key], str) else 0
    return check.text, found, View()


@case
def verify_() -> tuple[Renderer, Any, View]:
    saved({"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(5), "1." + "very_" * 20 + "w": torch.zeros(3)})
    Path("nets.py").write_text("from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(4, 3))\n")
    return verify.text, ckptkit.verify("model.pth", model="nets.py:net", forward=False).to_dict(), View()


@case
def convert_() -> tuple[Renderer, Any, View]:
    saved({f"module.encoder.layers.{i}.self_attention.in_projection.weight": torch.zeros(3) for i in range(12)})
    options: Any = {"strip_module": True, "dtype": "float16", "dry_run": True}
    return convert.text, ckptkit.convert("model.pth", "clean.safetensors", **options).to_dict(), View()


@case
def explain_() -> tuple[Renderer, Any, View]:
    said = {"module-prefix": CODES["module-prefix"]._asdict()}
    return explain.text, {"schema_version": 1, "codes": said, "topics": {}}, View()


def snapshot(name: str) -> str:
    """All that is shown of a case; the escape of colours as a visible symbol."""
    render, document, view = SHOWN[name]()
    parts = []
    for width in WIDTHS:
        for style in (View().style, click.style):
            parts.append(f"=== {width} columns, {'colours' if style is click.style else 'plain'}\n")
            parts += [f"{line}\n" for line in render(document, view._replace(width=width, style=style))]
    return "".join(parts).replace("\x1b", "\N{SYMBOL FOR ESCAPE}")


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_terminal_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = (SNAPSHOTS / f"{name}.txt").read_text(encoding="utf-8")
    assert snapshot(name) == expected


# Any names, any shapes, any width.

PIECES = st.sampled_from([
    "layer", "weight", ".", "0", "1", "_", "very_long_name", "重み", "エ", "가", "é", "e\u0301", "\u0301", FAMILY,
    FLAG, SUN, "\U0001f44d\U0001f3fd", "\ufe0f", "1\ufe0f\u20e3", "क्षि", "\t", "\x1b[31m", "\u202e", "\u200b", " ",
    "[3, 4]", "…", "ﷺ", "\U000e0001", "\ud800",
])  # fmt: skip
NAMES = st.lists(PIECES, max_size=30).map("".join)
SHAPES = st.lists(st.integers(0, 3), max_size=12) | st.lists(st.sampled_from([1, 1, 1, 512]), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64])


def too_wide(lines: list[str], width: int, *, but_for: list[str]) -> list[str]:
    return [line for line in lines if wcswidth(click.unstyle(line)) > width and line.strip() not in but_for]


@settings(max_examples=25, deadline=None)
@given(
    tensors=st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES), min_size=1, max_size=6),
    is_tied=st.booleans(),
    width=st.integers(40, 200),
    largest=st.sampled_from([0, 6]),
)
def test_no_line_exceeds_the_width_and_no_shape_is_cut(
    tensors: dict[str, tuple[list[int], torch.dtype]], is_tied: bool, width: int, largest: int
) -> None:
    state = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    if is_tied:
        state["tied to the first of them"] = next(iter(state.values()))
    data = io.BytesIO()
    torch.save({"model": state, "args": {name: name for name in tensors}}, data)
    data.seek(0)
    document = inspected(data)
    commands = [finding["fix"] for finding in document["findings"]]
    for style in (View().style, click.style):
        lines = list(inspect_text.text(document, View(style=style, width=width, largest=largest)))
        assert too_wide(lines, width, but_for=commands) == []
        shown = re.sub(r"\s", "", click.unstyle("".join(lines)))
        for shape, _ in tensors.values() if largest else ():
            assert str(shape).replace(" ", "") in shown
    assert too_wide(list(_briefly([document], View(width=width))), width, but_for=[]) == []


@settings(max_examples=60, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=8, unique=True), width=st.integers(24, 120))
def test_names_that_are_cut_are_told_apart(names: list[str], width: int) -> None:
    names = ["transformer.encoder.layers." + repr(name)[1:-1] + ".attention.projection.weight" for name in names]
    shown = columns([[name, "[3, 4]"] for name in names], [], "nr", width)
    assert max(map(wcswidth, shown)) <= width
    assert len({*shown}) == len(names)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.tuples(NAMES, st.sampled_from(["", "red", "cyan"])), max_size=8), width=st.integers(40, 120))
def test_wrapped_lines_fit_and_close_their_colours(words: list[tuple[str, str]], width: int) -> None:
    words = [(repr(word)[1:-1], color) for word, color in words]
    text = " ".join(click.style(word, fg=color) if color else word for word, color in words)
    lines = list(wrapped(text, width))
    assert max(map(seen, lines)) <= width
    assert re.sub(r"\s", "", click.unstyle("".join(lines))) == re.sub(r"\s", "", "".join(word for word, _ in words))
    for line in lines:
        assert re.findall(r"\x1b\[[0-9;]*m", line)[-1:] in ([], ["\x1b[0m"])


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for each in SHOWN:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            (SNAPSHOTS / f"{each}.txt").write_text(snapshot(each), encoding="utf-8")
            os.chdir(SNAPSHOTS)
