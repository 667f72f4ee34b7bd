"""What people read: the text and markdown of ``ckptkit inspect``, for files of every size."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click import unstyle
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

import ckptkit
from ckptkit.cli import ending, inspect_text
from ckptkit.cli.inspect_text import TIMES
from ckptkit.cli.markdown import inspect as as_markdown
from ckptkit.cli.options import View, encodable
from ckptkit.cli.tables import bar, columns, wrapped
from ckptkit.inspection import json_chunks, survey


def document(path: Path, **options: Any) -> dict[str, Any]:
    with ckptkit.open(path, section=options.pop("section", None)) as file:
        return survey(file.checkpoint, **options)


def text(path: Path, *, width: int | None = None, depth: int | None = None, **options: Any) -> list[str]:
    found = document(path, **options)
    return list(inspect_text.text(found, View(width=width, depth=depth, sort=options.get("sort", "file"))))


def markdown(found: dict[str, Any]) -> list[str]:
    return list(as_markdown(found, View()))


def llama(layers: int = 32) -> dict[str, torch.Tensor]:
    """The names and shapes of a model of 7 billion parameters, over storages of one element."""

    def weight(*shape: int) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float16).expand(shape)

    state = {"model.embed_tokens.weight": weight(32000, 4096)}
    for i in range(layers):
        at = f"model.layers.{i}"
        state |= {f"{at}.self_attn.{n}_proj.weight": weight(4096, 4096) for n in "qkvo"}
        state |= {f"{at}.mlp.{n}_proj.weight": weight(11008, 4096) for n in ("gate", "up")}
        state[f"{at}.mlp.down_proj.weight"] = weight(4096, 11008)
        state |= {f"{at}.{n}.weight": weight(4096) for n in ("input_layernorm", "post_attention_layernorm")}
    return state | {"model.norm.weight": weight(4096), "lm_head.weight": weight(32000, 4096)}


def test_a_model_of_seven_billion_parameters_fits_a_screen(save) -> None:
    lines = text(save(llama()))
    assert len(lines) < 40
    assert any("6,738,415,616 parameters" in line for line in lines)
    assert any(line.split()[:4] == ["layers.0‥31", "32", TIMES, "288"] for line in lines)


@pytest.mark.parametrize(
    "name", ["layers.{i}.w{j}", "x{i}.y{j}.z", "{i}_{j}", "layer{i}.{j}.weight", "a.{j}.b.{i}.c", "n{i}n.m{j}m"]
)
def test_thousands_of_tensors_stay_readable(save, name: str) -> None:
    path = save({name.format(i=i, j=j): torch.zeros((i + j) % 3 + 1) for i in range(100) for j in range(30)})
    assert len(text(path)) < 100


def test_what_is_left_out_is_counted(save) -> None:
    lines = text(save({f"w{i}x": torch.zeros(i + 1) for i in range(500)}))
    assert any(line.startswith("and 461 more") for line in lines)
    assert any("w499x" in line for line in text(save({f"w{i}x": torch.zeros(i + 1) for i in range(500)}), depth=1))


def test_each_kind_says_what_it_is(save) -> None:
    kinds = {
        "a state_dict: ": {"w": torch.ones(1)},
        "a pickled model of class torch.nn.modules.linear.Linear: ": nn.Linear(1, 1),
        "a training checkpoint: ": {"model": {"w": torch.ones(1)}, "epoch": 1},
        "one tensor, float32 [2, 3], ": torch.ones(2, 3),
        "tensors, but not the state_dict": [torch.ones(1)],
        "no tensors: ": {"epoch": 1},
    }
    for sentence, saved in kinds.items():
        assert text(save(saved))[1].startswith(sentence)


def test_a_resume_file(save) -> None:
    model = resnet18(num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    saved = {
        "epoch": 7,
        "best_acc": torch.tensor(71.5),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(arch="resnet18", lr=0.001),
    }
    lines = text(save(saved))
    assert any(line.split()[:4] == ["*", "model", "state", "dict"] for line in lines)
    shown = "\n".join(lines)
    kind = "AdamW" if "decoupled_weight_decay" in optimizer.defaults else "Adam or AdamW"  # as torch tells
    assert f"optimizer  optimizer, looks like {kind}, lr 0.001, after 1 step, 186 tensors" in shown
    assert "epoch  7" in shown
    assert "best_acc  71.5" in shown
    assert "args.arch  resnet18" in shown
    assert "names: argparse.Namespace" in shown


def test_a_whole_model_shows_its_classes_and_settings(save) -> None:
    lines = text(save(resnet18()))
    assert any("Conv2d(3, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False)" in line for line in lines)
    assert any("11,689,512 parameters, 9,620 in buffers, " in line for line in lines)  # known, not inferred
    block = next(line for line in lines if line.endswith("BasicBlock"))
    assert block.split()[:3] == ["0‥1", "2", TIMES]


def test_storage_is_accounted_for(save) -> None:
    base = torch.zeros(10_000)
    shown = "\n".join(text(save({"a": base[:10], "b": base[:10], "c": base[20:]})))
    assert "storage: 1 storage of 40 kB; 1 tensor tied to another name, 2 are views of shared storages, 40 B" in shown
    assert "storage:" not in "\n".join(text(save({"a": base})))


@pytest.mark.parametrize("only", ["*.num_batches_tracked", "module.features.0.*", "nothing"])
def test_what_is_said_of_a_file_does_not_depend_on_what_is_listed(ddp_resume: Path, save, only: str) -> None:
    found = [document(ddp_resume), document(ddp_resume, filters=[only])]
    assert len(found[0]["tensors"]) > len(found[1]["tensors"])
    assert [{**each, "tensors": 0} for each in found] == [{**found[0], "tensors": 0}] * 2
    for each in (*found, json.loads("".join(json_chunks(found[1])))):
        assert list(inspect_text.brief(each, View())) == list(inspect_text.brief(found[0], View()))
        shown = "\n".join(inspect_text.text(each, View()))
        assert shown.startswith("\n".join(text(ddp_resume)).partition("\n\ntensors of")[0])
        assert ("(all)" in shown) == (each is found[0])
        assert ("(matching)" in shown) == (each is not found[0] and only != "nothing")
    nothing = document(save(torch.ones(3), "one.pth"), filters=["w"])
    assert [*inspect_text.text(nothing, View())][1] == "one tensor, float32, without a name"
    assert "saved on cpu" in inspect_text.facts(nothing)


# Width, colour, encodings.


def test_a_narrow_terminal_cuts_and_wraps(save) -> None:
    long = {f"encoder.{'very_' * 12}long_name_{i}.weight": torch.zeros(i + 1, 3) for i in range(4)}
    path = save({"model": long, "epoch": 1, "args": argparse.Namespace(note="x" * 70)})
    for width in (70, 80, 100):
        lines = text(path, width=width)
        commands = [line for line in lines if line.startswith(("    ", f"{path}"))]  # to be pasted whole
        assert [line for line in lines if len(line) > width and line not in commands] == []
        assert any("very_" in line and "…" in line for line in lines)
    assert not any("…" in line for line in text(path))


def test_columns_and_wrapping() -> None:
    rows = [["a" * 30, "1", "b" * 30], ["c", "22", "d"]]
    assert [len(line) for line in columns(rows, ["x", "y", "z"], "lrl")] == [37, 66, 37]
    cut = columns(rows, ["x", "y", "z"], "lrl", 50)
    assert max(map(len, cut)) == 50
    assert cut[1].endswith("b…")
    assert max(map(len, columns(rows, ["x", "y", "z"], "lrl", 40))) == 40
    assert list(wrapped("aa bb cc dd", 5)) == ["aa bb", "    cc", "    dd"]
    assert list(wrapped("  aa bb", 4)) == ["  aa", "      bb"]
    assert list(wrapped("a" * 50, 40)) == ["a" * 36, "    " + "a" * 14]
    assert list(wrapped("", 10)) == [""]


@pytest.mark.parametrize("width", [50, 66, 80, 100, 120])
def test_a_line_of_a_file_tells_files_apart(ddp_resume: Path, width: int) -> None:
    """The name of the file is whole where it has room, and as much of what is before it as has."""
    folder = "runs/2024-05-01-large/lr-0.01-batch-4096-warmup/checkpoints"
    paths = [f"{folder}/{name}.pth" for name in ("epoch_0100", "epoch_0101", "x" * 100)]
    found = document(ddp_resume)
    for path in paths:
        line, *below = inspect_text.brief({**found, "path": path}, View(width=width, paths=len(paths[-1])))
        assert bool(below) == (width < 66) and max(map(len, (line, *below))) <= width
        shown = line.partition("  ")[0]
        before, _, end = shown.partition("…")
        assert len(shown) >= 0.35 * width - 1 and path.endswith(end)
        assert end.endswith("/" + path.rpartition("/")[2]) or before == "x" * len(before) != ""
        assert "needs trust" in (line + "".join(below)) and "foreign-objects" in (below or [line])[-1]
    short = list(inspect_text.brief({**found, "path": "a.pth"}, View(width=width, paths=5)))
    assert short[0].startswith("a.pth  ") and (width < 80 or "float32" in short[0])


def test_colour(run, save) -> None:
    path = save({"module.w": torch.ones(1)}, device="cuda:1")
    assert "\x1b[" not in run("inspect", path).stdout
    coloured = run("inspect", path, "--color", "always").stdout
    assert "\x1b[1m" in coloured
    assert unstyle(coloured) == run("inspect", path, "--color", "never").stdout
    assert "\x1b[" in run("inspect", path, "--color", "always", env={"NO_COLOR": "1"}).stdout


def test_terminals_without_our_symbols(monkeypatch: pytest.MonkeyPatch, run, save) -> None:
    path = save({f"layers.{i}.größe": torch.ones(1) for i in range(3)})
    shown = run("inspect", path, env={"PYTHONIOENCODING": "ascii"}).stdout
    assert "layers.0..2.gr\\xf6\\xdfe  3 x" in shown
    assert encodable("0‥1  2") == "0‥1  2"
    monkeypatch.setattr(ending, "stdout", lambda: io.TextIOWrapper(io.BytesIO(), "cp1252"))
    assert [encodable(bar(share)) for share in (0, 0.01, 0.4, 0.45, 1)] == ["", "-", "##-", "##+", "######"]


# JSON and markdown.


def test_the_json_written_in_pieces_is_the_document(save) -> None:
    tied = torch.ones(3)
    state = {"w": torch.ones(2, 3).t(), 'quo"te\n\u202e重': torch.ones(()), "\ud800": torch.ones(0), "tied": tied,
             "tied2": tied, '"tensors": []': torch.ones(1)}  # fmt: skip
    path = save({"model": state, "epoch": 1, "module": nn.Linear(2, 2)})
    for options in ({}, {"stats": True}, {"filters": ["w"]}, {"sort": "name"}, {"section": "module"}):
        whole = json.loads("".join(json_chunks(document(path, **options))))
        assert whole == ckptkit.inspect(path, **options)
    many = save({f"w{i}": torch.ones(1) for i in range(4500)})
    assert len(list(json_chunks(document(many)))) > 3
    assert json.loads("".join(json_chunks(document(many)))) == ckptkit.inspect(many)


def test_the_command_prints_the_same_json(run, save, tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)})
    (tmp_path / "bad.pth").write_bytes(b"")
    done = run("inspect", "--json", path, tmp_path / "bad.pth", path)
    files = json.loads(done.stdout)["files"]
    assert files[0] == files[2] == ckptkit.inspect(path)
    assert files[1]["error"]["type"] == "UnknownFormatError"
    assert len(done.stderr.splitlines()) == 1


def test_markdown_is_fit_for_a_pull_request(save) -> None:
    path = save({"model": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "epoch": 3, "args": argparse.Namespace(lr=1)})
    lines = "\n".join(markdown(document(path))).splitlines()
    assert lines[0] == f"## `{path}`"
    shown = "\n".join(lines)
    assert "- **weights**: 2 tensors, 6 parameters" in shown
    assert "### Training state\n\n- epoch  3" in shown
    assert "### Findings\n\n- **warning** `whole-model`" in shown
    assert "(1): ReLU()" in shown
    assert shown.count("<details>") == shown.count("</details>") == 2
    tables = [line for line in lines if line.startswith("|")]
    assert any("`Linear(in_features=2, out_features=2, bias=True)`" in line for line in tables)
    for line in tables:
        assert line.endswith("|")


def test_markdown_escapes_what_strangers_wrote(save) -> None:
    path = save({"model": {"a|b`c<script>": torch.ones(1)}, "note": "[click](http://x) <b>", "epoch|": "`x`"})
    shown = "\n".join(markdown(document(path)))
    assert "`a\\|b'c<script>`" in shown
    assert "<b>" not in shown
    assert "[click](" not in shown
    assert markdown(document(save({f"w{i}x": torch.ones(i + 1) for i in range(1200)})))[-2].startswith("\nand 200 more")


def made_by(path: Path) -> list[str]:
    return [line for line in text(path) if line.startswith("made by: ")]


def test_a_receipt_is_one_short_line(save, tmp_path: Path) -> None:
    path = save({"module.w": torch.ones(2)})
    ckptkit.convert(path, tmp_path / "a.safetensors", strip_module=True, dtype="float16", metadata={"license": "MIT"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    expected = f"made by: ckptkit {ckptkit.__version__} from torch-zip, sha256 {digest}…: "
    operations = "CastDtype(dtype='float16', keep=()), StripModule()"
    assert made_by(tmp_path / "a.safetensors") == [expected + operations]
    lines = text(tmp_path / "a.safetensors")
    assert "  license  MIT" in lines
    assert max(map(len, lines)) < 160
    page = "\n".join(markdown(document(tmp_path / "a.safetensors")))
    assert operations in page.replace("\\", "")
    assert "ckptkit_receipts" not in page + "\n".join(lines)
    assert json.loads(document(tmp_path / "a.safetensors")["metadata"]["ckptkit_receipts"])[0]["sha256"][:12] == digest
    ckptkit.convert(tmp_path / "a.safetensors", tmp_path / "b.pth", add_prefix="x" * 300, check=False)
    (line,) = made_by(tmp_path / "b.pth")
    assert line.startswith(f"made by: ckptkit {ckptkit.__version__} from safetensors: AddPrefix(prefix='xxx")
    assert line.endswith("xxx…; 1 earlier (--json shows all under ckptkit_receipts)")
    assert "metadata" in text(tmp_path / "b.pth")
    assert "training state" not in text(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("receipt", "shown"),
    [
        ("not JSON", []),
        ('{"ckptkit": "1"}', []),
        ("[" * 100_000, []),
        ("[1, null]", []),
        ('[{"operations": "many"}]', ["made by: ckptkit ? from ?"]),
        (
            '[{"ckptkit": "9", "format": 3, "sha256": {"a": "b"}, "operations": [1]}]',
            ["made by: ckptkit 9 from ? of 1 file: 1"],
        ),
        ('[{"ckptkit": "\\u001b[31m", "operations": ["\\n"]}]', ["made by: ckptkit \\x1b[31m from ?: \\n"]),
    ],
)
def test_receipts_of_strangers(tmp_path: Path, receipt: str, shown: list[str]) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", {"ckptkit_receipts": receipt})
    assert made_by(tmp_path / "a.safetensors") == shown


def test_a_key_of_that_name_in_a_pickle_is_no_receipt(save) -> None:
    assert made_by(save({"model": {"w": torch.ones(1)}, "ckptkit_receipts": 3})) == []
