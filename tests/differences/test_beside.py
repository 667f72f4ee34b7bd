"""`ckptkit.diff`: what stands beside the weights, and which weights are meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import ckptkit


def lists(difference: ckptkit.Difference) -> set[str]:
    """The lists that are not empty."""
    document = difference.to_dict()
    return {key for key, value in document.items() if isinstance(value, list) and value} - {"modules"}


def resume(**changes: Any) -> dict[str, Any]:
    net = nn.Linear(3, 2)
    net.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    optimizer = torch.optim.SGD(net.parameters(), lr=changes.pop("lr", 0.1), momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    net.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, **changes}


def test_training_state(diff) -> None:
    assert lists(diff(resume(), resume())) == {"sections"}
    difference = diff(resume(), resume(epoch=4, lr=0.2))
    assert {row["key"]: (row["a"], row["b"]) for row in difference.training} == {
        "epoch": (3, 4),
        "optimizer.lr": ([0.1], [0.2]),
    }
    assert (difference.equal, difference.ok, difference.same_beside) == (True, True, False)
    assert "what is stored beside them differs" in diff(resume(), resume(epoch=4), strict=True).summary


def test_sections(diff) -> None:
    other = resume()
    other["optimizer"]["state"][0]["momentum_buffer"] += 1
    difference = diff(resume(), other)
    assert [dict(row) for row in difference.sections] == [
        {"path": "optimizer", "kind": "optimizer", "a": 2, "b": 2, "differing": 1, "equal": False}
    ]
    assert (difference.equal, difference.unchanged) == (False, 2)
    assert difference.summary == "all 2 tensors are bit-identical; beside them optimizer differs"
    assert diff(resume(), other, section="model").equal  # nothing beside it is compared


def test_a_section_in_one_file_alone(diff) -> None:
    difference = diff(resume(), {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert (difference.sections[0]["b"], difference.sections[0]["equal"]) == (None, None)
    assert (difference.equal, difference.ok, difference.same_beside) == (True, True, False)


def test_metadata(tmp_path: Path) -> None:
    for name, metadata in (("a", {"k": "1", "same": "x"}), ("b", {"k": "2", "same": "x", "more": "y"})):
        safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors", metadata=metadata)
    difference = ckptkit.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", strict=True)
    assert {tuple(row.values()) for row in difference.metadata} == {("k", "1", "2"), ("more", None, "y")}
    assert (difference.equal, difference.ok) == (True, False)


def test_module_versions(diff) -> None:
    a, b = (nn.BatchNorm1d(2).state_dict() for _ in range(2))
    assert diff(a, b).metadata == ()
    b._metadata[""]["version"] = 1
    assert [tuple(row.values()) for row in diff(a, b).metadata] == [("_metadata[''].version", 2, 1)]


def test_sections_by_name(diff, tmp_path: Path) -> None:
    two = {"generator": {"w": torch.ones(2, 2)}, "discriminator": {"w": torch.zeros(2, 2)}}
    assert diff(two, two).unchanged == 2  # where nothing is chosen everything is compared
    plain = {"w": torch.zeros(2, 2)}
    with pytest.raises(ckptkit.SectionError, match=r"'generator', 'discriminator'.*--section-a"):
        diff(two, plain)
    assert diff(two, plain, section_a="discriminator").equal
    assert not diff(two, plain, section_a="generator").equal
    with pytest.raises(ckptkit.SectionError):
        diff(two, two, section="nowhere")
