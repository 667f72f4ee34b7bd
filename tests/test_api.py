"""The Python API as the README and the contract show it."""

from __future__ import annotations

import html.parser
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import get_model

import ckptkit


def test_what_import_gives() -> None:
    """Rooms are attributes as if all had been imported; few are before anything is asked for."""
    code = """
import sys, ckptkit
loaded = [name for name in sys.modules if name.startswith("ckptkit")]
assert len(loaded) < 8, loaded
assert ckptkit.errors.CkptkitError is ckptkit.CkptkitError and ckptkit.options.ConvertOptions
assert not hasattr(ckptkit, "nothing") and not hasattr(ckptkit, "__wrapped__")
assert callable(ckptkit.convert) and callable(ckptkit.verify) and callable(ckptkit.diff)
assert sorted(ckptkit.__all__) == [name for name in dir(ckptkit) if name in ckptkit.__all__]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_open_shows_what_is_there(ddp_resume: Path) -> None:
    with ckptkit.open(ddp_resume) as ckpt:
        assert (ckpt.kind, ckpt.format, ckpt.trust) == ("resume", "torch-zip", "needs_trust")
        assert ckpt.path == str(ddp_resume)
        entry = ckpt.state_dict["module.features.0.0.weight"]
        assert (entry.shape, entry.stride) == ((8, 3, 3, 3), (27, 9, 3, 1))
        assert (entry.dtype, entry.nbytes, entry.location, entry.requires_grad) == ("float32", 864, "cuda:0", False)
        assert ckpt.rest["epoch"] == 1
        assert "module-prefix" in {finding.code for finding in ckpt.findings}
        assert "resume" in repr(ckpt)


def test_rewrite_and_save(ddp_resume: Path, tmp_path: Path, same_bits) -> None:
    with ckptkit.open(ddp_resume) as ckpt:
        clean = ckpt.rewrite(ckptkit.WeightsOnly(), ckptkit.StripModule(), ckptkit.MapLocation("cpu"))
        assert next(iter(ckpt.state_dict)) == "module.features.0.0.weight"  # the first one is as it was
        plan = clean.save(tmp_path / "clean.safetensors")
    assert plan.nbytes == (tmp_path / "clean.safetensors").stat().st_size
    expected = torch.load(ddp_resume, map_location="cpu", weights_only=False)["state_dict"]
    written = load_file(tmp_path / "clean.safetensors")
    assert all(same_bits(written[name.removeprefix("module.")], tensor) for name, tensor in expected.items())
    assert len(written) == len(expected)


def test_a_rewriter_of_ones_own(save, tmp_path: Path) -> None:
    path = save({"a.w": torch.ones(2), "b.w": torch.zeros(2)})

    def upper(checkpoint: ckptkit.Checkpoint) -> ckptkit.Checkpoint:
        state_dict = checkpoint.state_dict.renamed(str.upper, checkpoint.state_dict.versions)
        return checkpoint.replace(state_dict=state_dict)

    with ckptkit.open(path) as ckpt:
        ckpt.rewrite(upper).save(tmp_path / "b.pth")
    assert list(torch.load(tmp_path / "b.pth")) == ["A.W", "B.W"]
    with ckptkit.open(path) as ckpt, pytest.raises(ckptkit.RewriteError, match=r"<lambda>\(\) returned NoneType; a r"):
        ckpt.rewrite(lambda _: None)


def test_a_closed_file_says_so(save, tmp_path: Path) -> None:
    with ckptkit.open(save({"w": torch.ones(1)})) as ckpt:
        pass
    assert ckpt.state_dict["w"].shape == (1,)
    with pytest.raises(ckptkit.FileAccessError, match="was closed"):
        ckpt.save(tmp_path / "b.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("location", ["cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, tag: storage])
def test_load_state_dict_takes_what_torch_load_takes(save, same_bits, location: object) -> None:
    model = torch.nn.Linear(3, 2)
    path = save({"model": model, "epoch": 3}, device="cuda:0")
    state = ckptkit.load_state_dict(path, map_location=location)
    expected = model.state_dict()
    assert list(state) == list(expected)
    assert all(same_bits(state[name], expected[name]) for name in expected)
    assert not any(value.requires_grad for value in state.values())
    torch.nn.Linear(3, 2).load_state_dict(state, strict=True)


def test_load_state_dict_from_each_container_agrees(ddp_resume: Path, tmp_path: Path, same_bits) -> None:
    ckptkit.convert(ddp_resume, tmp_path / "a.safetensors", weights_only=True)
    ckptkit.convert(ddp_resume, tmp_path / "b.pth", weights_only=True)
    one, two, three = (
        ckptkit.load_state_dict(path, map_location="cpu")
        for path in (ddp_resume, tmp_path / "a.safetensors", tmp_path / "b.pth")
    )
    assert list(one) == list(two) == list(three)
    assert all(same_bits(one[name], two[name]) and same_bits(one[name], three[name]) for name in one)


def test_ties_survive_the_round_trip_through_safetensors(save, tmp_path: Path) -> None:
    w = torch.rand(3, 2)
    ckptkit.convert(save({"a": w, "b": w, "c": w[:1]}), tmp_path / "b.safetensors")
    state = ckptkit.load_state_dict(tmp_path / "b.safetensors")
    assert state["a"].data_ptr() == state["b"].data_ptr()
    assert state["c"].data_ptr() != state["a"].data_ptr()
    assert torch.equal(state["c"], w[:1])


def test_load_state_dict_of_a_missing_device_names_the_remedy(save) -> None:
    if torch.cuda.is_available():  # then it simply loads
        assert ckptkit.load_state_dict(save({"w": torch.ones(1)}, device="cuda:0"), map_location=None)["w"].is_cuda
        return
    with pytest.raises(ckptkit.CkptkitError, match="map_location"):
        ckptkit.load_state_dict(save({"w": torch.ones(1)}, device="cuda:0"), map_location=None)


def test_convert_reports(ddp_resume: Path, tmp_path: Path) -> None:
    report = ckptkit.convert(ddp_resume, tmp_path / "clean.safetensors", strip_module=True, weights_only=True)
    assert report.ok
    assert {finding.code for finding in report.findings} == {"renamed", "left-out"}
    document = json.loads(report.to_json())
    assert document["schema_version"] == 1
    assert document["plan"]["tensors"] == 314
    report.raise_if_failed()


def test_verify_passes_and_fails(ddp_resume: Path, tmp_path: Path) -> None:
    arguments = {"width_mult": 0.1, "num_classes": 10}
    # Twice: the function must not be shadowed by the package that does the work.
    for _ in range(2):
        report = ckptkit.verify(
            ddp_resume, model="torchvision:mobilenet_v2", model_args=arguments, strip_module=True, device="cpu"
        )
        assert report.ok, report.findings
    failed = ckptkit.verify(ddp_resume, model="torchvision:mobilenet_v2", model_args=arguments, device="cpu")
    assert not failed.ok
    with pytest.raises(ckptkit.FailedReportError, match="strip-module"):
        failed.raise_if_failed()


def test_verify_takes_a_module(save) -> None:
    model = get_model("squeezenet1_1", num_classes=3)
    report = ckptkit.verify(save(model.state_dict()), model=model, input_shapes=[(1, 3, 64, 64)], device="cpu")
    assert report.ok, report.findings


def test_a_file_without_weights(save) -> None:
    path = save({"epoch": 3})
    for attempt in (
        lambda: ckptkit.load_state_dict(path),
        lambda: ckptkit.verify(path, model="torchvision:resnet18"),
        lambda: ckptkit.convert(path, "never.safetensors"),
        lambda: ckptkit.convert(path, "never.pth", strip_module=True),
    ):
        with pytest.raises(ckptkit.SectionError, match="no state_dict"):
            attempt()


def test_errors_are_also_what_python_programs_catch(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ckptkit.open(tmp_path / "no.pth")
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="text file"):
        ckptkit.open(tmp_path / "bad.pth")


def test_without_torch_one_line_with_the_install_command(ddp_resume: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"  # what an import finds then is that it is not there
        "from ckptkit.cli import main\n"
        f"main(['verify', {str(ddp_resume)!r}, '--model', 'torchvision:resnet18'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ckptkit: error: this needs torch, which is not installed")
    assert done.stderr.endswith("run: pip install '.[torch]'\n")
    assert done.stderr.count("\n") == 1


# In a shell and in a notebook.

HOSTILE = "<script>alert(1)</script>\x1b[31m\n\u202e&amp;" + "x" * 5000


class Tags(html.parser.HTMLParser):
    """The tags and the text of what a notebook is given, which must be well formed."""

    INERT = frozenset(("div", "span", "strong", "details", "summary", "ul", "li", "table", "tr", "th", "td"))

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style", "open"}
        assert "url" not in str(attrs) and "color" not in str(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def is_a_line(text: str) -> bool:
    return text.isprintable() and len(text) < 200


def test_what_is_shown_is_short_whatever_the_names_are(tmp_path: Path) -> None:
    weights = {f"{HOSTILE}{i}": torch.ones(2, 3) for i in range(40)}
    save_file(weights, tmp_path / "a.safetensors", {HOSTILE: HOSTILE})
    torch.save({HOSTILE: weights, "model": {**weights, "w": torch.ones(3, 2).T}, "epoch": 1}, tmp_path / "b.pth")
    difference = ckptkit.diff(tmp_path / "a.safetensors", tmp_path / "b.pth", section_b="model")
    report = ckptkit.convert(tmp_path / "b.pth", tmp_path / "c.safetensors", section="model", weights_only=True)
    shown = [difference, report, ckptkit.check(tmp_path), ckptkit.manifest(tmp_path / "a.safetensors")]
    for name in ("a.safetensors", "b.pth"):
        with ckptkit.open(tmp_path / name) as ckpt:
            shown += [ckpt, ckpt.state_dict, *ckpt.state_dict.values()]
            assert len(Tags(ckpt.state_dict._repr_html_()).text) < 12_000
            page = Tags(ckpt._repr_html_())
            assert page.tags <= Tags.INERT
            assert "<script>alert(1)</script>\\x1b[31m\\n\\u202e&amp;" in page.text
            assert len(page.text) < 40_000
    assert [each for each in map(repr, shown) if not is_a_line(each)] == []
    for each in shown[:3]:
        page = Tags(each._repr_html_())
        assert page.tags <= Tags.INERT
        assert len(page.text) < 40_000


def test_what_a_notebook_shows(ddp_resume: Path, save) -> None:
    with ckptkit.open(ddp_resume) as ckpt:
        text = Tags(ckpt._repr_html_()).text
        assert repr(ckpt).endswith("ddp_resume.pth', 978 kB, 314 tensors>")
        entry = ckpt.state_dict["module.features.0.0.weight"]
        assert repr(entry) == "<tensor float32 [8, 3, 3, 3], 864 B on cuda:0>"
        stripped = ckpt.rewrite(ckptkit.StripModule()).state_dict
        shown = "features.0.0.weight float32 [8, 3, 3, 3], features.0.1.weight float32 [8] and 312 more"
        assert repr(stripped) == f"StateDict(314 tensors: {shown})"
        assert (
            "0 weight float32 [8, 3, 3, 3] 1 tensor 216 elements 864 B1 weight float32 [8], bias float32 [8]"
            in Tags(stripped._repr_html_()).text
        )
    assert "torch-zip, resume" in text and "314 tensors, 98,890 parameters" in text and "features" in text
    assert "[module-prefix]" in text and "'state_dict' (selected)" in text
    report = ckptkit.Report(findings=(ckptkit.Finding(code="damaged", severity="error", message="<b>", fix="a & b"),))
    assert Tags(report._repr_html_()).text == "Report: failed: damagedfindingerrordamaged: <b> (fix: a & b)"
    with ckptkit.open(save({"epoch": 3})) as ckpt:
        assert "no-tensors" in Tags(ckpt._repr_html_()).text
    with ckptkit.open(save({"t": torch.ones(3, 2).T})) as ckpt:
        assert repr(ckpt.state_dict["t"]) == "<tensor float32 [2, 3], stride [1, 2], 24 B on cpu>"


def test_many_tensors_are_one_screen(tmp_path: Path) -> None:
    weights = {f"layers.{i}.w": numpy.zeros(1 + i % 7, "float32") for i in range(20_000)}
    safetensors.numpy.save_file(weights, tmp_path / "many.safetensors")
    with ckptkit.open(tmp_path / "many.safetensors") as ckpt:
        assert is_a_line(repr(ckpt)) and is_a_line(repr(ckpt.state_dict))
        page = Tags(ckpt._repr_html_()).text
    assert "20,000 tensors" in page and len(page) < 5000


def test_the_tree_of_a_notebook_folds(tmp_path: Path) -> None:
    shared = torch.zeros(6, 4)
    weights = {f"blocks.{i}.attention.{name}": torch.zeros(4, 4) for i in range(60) for name in ("q", "k")}
    tied = {"embed.weight": shared, "head.weight": shared}
    torch.save({"blocks.0": torch.ones(2), **weights, **tied}, tmp_path / "a.pth")
    with ckptkit.open(tmp_path / "a.pth") as ckpt:
        page = Tags(ckpt.state_dict._repr_html_())
        assert {"details", "summary"} <= page.tags
        assert (
            "blocks  121 tensors 1,922 elements 7.69 kB0 float32 [2]  2 elements 8 B" in page.text
            and "and 37 more" in page.text
        )
        assert "1.attention q float32 [4, 4], k float32 [4, 4] 2 tensors 32 elements 128 B" in page.text
        assert "weight float32 [6, 4] = embed.weight 1 tensor  " in page.text, "what is tied counts once"
        assert "rewritten: StripModule()" in Tags(ckpt.checkpoint.rewrite(ckptkit.StripModule())._repr_html_()).text


def test_the_tree_of_a_notebook_is_bounded_whatever_the_names_are() -> None:
    from ckptkit.display import MOST_LINES, names_tree

    for names in (
        [f"{i}" for i in range(100_000)],
        [f"a.{i}.b.{i % 7}" for i in range(100_000)],
        [".".join(["m"] * 5000), "m", "m.m", "", "."],
        ["." * n for n in range(60)],
    ):
        lines, left_out = names_tree((name, "float32 [1]", 1, 4) for name in names)
        assert 0 < len(lines) <= MOST_LINES and left_out >= 0
        assert sum(line.elements for line in lines if not line.level) + left_out == len(names) or len(names) < 100
