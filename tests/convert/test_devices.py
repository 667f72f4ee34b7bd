"""``--map-location``: torch without those devices loads what torch with them would have moved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptkit

TAGS = ("cuda:0", "cuda:1", "cpu", "mps", "cuda:7")


@pytest.fixture
def many(save) -> Path:
    """A resume file with storages on many devices: weights, moments, and a tensor in a list."""
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict(), "extra": [torch.ones(3)]}
    tags: dict[int, str] = {}

    def tag(storage: Any) -> str:
        return tags.setdefault(storage.data_ptr(), TAGS[len(tags) % len(TAGS)])

    return save(saved, device=tag)


def tensors(node: Any) -> Iterator[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for part in node.values() if isinstance(node, dict) else node:
            yield from tensors(part)


def tags(path: Path) -> list[str]:
    """The tag of each storage, as torch meets them."""
    met: list[str] = []
    torch.load(path, map_location=lambda storage, tag: met.append(tag) or storage)
    return met


def mapped(path: Path, location: Any) -> list[str]:
    """The tags, moved as torch's own ``map_location`` moves them."""
    if isinstance(location, dict):
        return [location.get(tag, tag) for tag in tags(path)]
    return ["cpu" if location == "cpu:0" else str(location)] * len(tags(path))


@pytest.mark.parametrize(
    ("options", "location"),
    [
        (["cpu"], "cpu"),
        (["cuda"], "cuda"),
        (["cuda:3"], "cuda:3"),
        (["cpu:0"], "cpu:0"),
        (["cuda:0=cpu"], {"cuda:0": "cpu"}),
        (["cuda:1=cuda:0", "cuda:0=cpu", "mps=cpu"], {"cuda:1": "cuda:0", "cuda:0": "cpu", "mps": "cpu"}),
        (["cpu=cuda:0"], {"cpu": "cuda:0"}),
        (["xpu:1=cpu"], {"xpu:1": "cpu"}),
    ],
)
def test_the_whole_file_moves(many: Path, convert, same_bits, options: list[str], location: Any) -> None:
    before = list(tensors(torch.load(many, map_location="cpu")))
    given = [part for option in options for part in ("--map-location", option)]
    assert convert(many, "out.pth", *given).code == 0
    assert tags(Path("out.pth")) == mapped(many, location)
    after = list(tensors(torch.load("out.pth", map_location="cpu")))
    assert len(before) == len(after) == 9
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))


def test_on_the_cpu_it_loads_without_map_location(many: Path, convert) -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        torch.load(many)
    assert convert(many, "out.pth", "--map-location", "cpu").code == 0
    assert {tensor.device.type for tensor in tensors(torch.load("out.pth"))} == {"cpu"}


def test_safetensors_have_no_device(many: Path, converted, agree) -> None:
    expected = torch.load(many, map_location="cpu")["state_dict"]
    agree(converted(many, "out.safetensors", "--weights-only", "--map-location", "cuda:5"), expected, ordered=False)
    back = converted("out.safetensors", "back.pth")
    agree(back, expected, ordered=False)


def test_the_same_device_changes_nothing(save, convert) -> None:
    path = save({"w": torch.ones(1)})
    assert convert(path, "a.pth", "--no-receipt").code == 0
    assert convert(path, "b.pth", "--no-receipt", "--map-location", "cpu").code == 0
    assert Path("a.pth").read_bytes() == Path("b.pth").read_bytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["cpu", "cuda:0"], "takes either one location for everything or OLD=NEW pairs"),
        (["cpu", "cuda:0=cpu"], "takes either one"),
        (["a=cpu", "a=cuda"], "maps the same location twice"),
        (["no where"], "'no where' is not a device location"),
        ([""], "'' is not a device location"),
        (["meta"], "'meta' is not a device location"),
        (["cuda:0="], "'' is not a device location"),
        (["=cpu"], "'' is not a device location"),
        (["a=b=c"], "'b=c' is not a device location"),
        (["cuda:-1"], "'cuda:-1' is not a device location"),
    ],
)
def test_refused(save, refused, given: list[str], words: str) -> None:
    options = [part for location in given for part in ("--map-location", location)]
    assert words in refused(save({"a": torch.ones(1)}), "out.pth", *options)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("cpu", "cpu"),
        (torch.device("cuda", 2), "cuda:2"),
        ({"cuda:4": "mps"}, "mps"),
        ({torch.device("cuda:4"): torch.device("cpu")}, "cpu"),
        (lambda storage, tag: storage, "cpu"),
        (lambda storage, tag: None, "cuda:4"),
        (lambda storage, tag: f"cuda:{int(tag[-1]) + 1}", "cuda:5"),
        (lambda storage, tag: torch.device("xpu", storage.nbytes), "xpu:8"),
    ],
)
def test_in_python(save, tmp_path: Path, location: Any, expected: str) -> None:
    path = save({"w": torch.ones(2)}, device="cuda:4")
    report = ckptkit.convert(path, tmp_path / "out.pth", map_location=location)
    assert tags(tmp_path / "out.pth") == [expected]
    assert "0x" not in json.dumps(report.details["operations"])
