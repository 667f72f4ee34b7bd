"""`ckptkit.diff`: every list with a pair of files that fills it, and one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ckptkit
from ckptkit.inspection import describe


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10)).state_dict())


def lists(difference: ckptkit.Difference) -> set[str]:
    """The lists that are not empty."""
    document = difference.to_dict()
    return {key for key, value in document.items() if isinstance(value, list) and value} - {"modules"}


def test_equal(diff) -> None:
    difference = diff(model(), model())
    assert (difference.equal, difference.ok, difference.unchanged, lists(difference)) == (True, True, 9, set())
    assert difference.summary == "all 9 tensors are bit-identical"
    difference.raise_if_failed()


def test_a_changed_module(diff) -> None:
    other = model()
    other["3.weight"] += 0.5
    other["3.bias"][0] = 7
    difference = diff(model(), other)
    assert (difference.equal, difference.unchanged, lists(difference)) == (False, 7, {"changed"})
    assert difference.summary == "only 3 changed; 7 of 9 tensors are bit-identical"
    largest = (model()["3.bias"][0] - 7).abs().item()
    assert [row["name"] for row in difference.changed] == ["3.bias", "3.weight"]
    assert [dict(row) for row in difference.modules] == [
        {"module": "3", "tensors": 2, "differing": 2, "statuses": {"changed": 2}, "max_abs": pytest.approx(largest)}
    ]
    with pytest.raises(ckptkit.FailedReportError, match=r"only 3 changed; 7 of 9"):
        difference.raise_if_failed()


def test_counters_do_not_keep_a_module_together(diff) -> None:
    other = {name: t if name.endswith("tracked") else t + 1 for name, t in model().items()}
    assert [row["module"] for row in diff(model(), other).modules] == [""]
    other["1.num_batches_tracked"] += 1
    assert diff(model(), other).summary.startswith("9 tensors differ (9 changed)")


def test_many_modules_are_rolled_up_further(diff) -> None:
    a = {f"block{i // 10}.{i % 10}.{part}": torch.ones(2) for i in range(50) for part in ("weight", "bias")}
    b = {name: tensor + name.endswith("weight") for name, tensor in a.items()}
    rows = diff(a, b).modules
    assert [row["module"] for row in rows] == [f"block{i}" for i in range(5)]
    assert {(row["tensors"], row["differing"]) for row in rows} == {(20, 10)}


def test_added_and_removed(diff) -> None:
    other = model()
    other["new"] = torch.ones(3)
    del other["0.bias"]
    difference = diff(model(), other)
    assert (difference.added, difference.removed, difference.unchanged) == (("new",), ("0.bias",), 8)
    assert lists(difference) == {"added", "removed"}
    assert (difference.equal, difference.tensors) == (False, 10)
    assert diff(model(), {**model(), "new": torch.ones(3)}).summary.startswith("only new was added")


def test_renamed_by_content(diff) -> None:
    other = {name.replace("3.", "head."): tensor for name, tensor in model().items()}
    difference = diff(model(), other)
    assert [dict(row) for row in difference.renamed] == [
        {"from": f"3.{last}", "to": f"head.{last}", "by": "content", "confidence": "certain"}
        for last in ("weight", "bias")
    ]
    assert (lists(difference), difference.equal) == ({"renamed"}, False)
    assert difference.summary.startswith("2 tensors have another name and the same bits; ")
    assert difference.summary.endswith(" of 9 tensors are bit-identical under the same name")


def test_equal_contents_are_matched_by_the_ends_of_names(diff) -> None:
    a = {"a.weight": torch.ones(3), "a.bias": torch.ones(3), "kept": torch.rand(2)}
    b = {"b.bias": torch.ones(3), "b.weight": torch.ones(3), "kept": a["kept"]}
    rows = diff(a, b).renamed
    assert {(row["from"], row["to"], row["confidence"]) for row in rows} == {
        ("a.weight", "b.weight", "likely"),
        ("a.bias", "b.bias", "likely"),
    }


def test_renamed_by_shape(diff) -> None:
    a = {"old.weight": torch.rand(4, 5), "x.0.w": torch.rand(7), "x.1.w": torch.rand(7), "lone": torch.rand(2)}
    b = {"new.weight": torch.rand(4, 5), "y.0.w": torch.rand(7), "y.1.w": torch.rand(7), "other": torch.rand(2)}
    difference = diff(a, b)
    assert [tuple(row.values()) for row in difference.renamed] == [
        ("old.weight", "new.weight", "shape", "likely"),
        ("x.0.w", "y.0.w", "shape", "guess"),
        ("x.1.w", "y.1.w", "shape", "guess"),
    ]
    assert {(row["was"], row["name"]) for row in difference.changed} == {
        ("old.weight", "new.weight"), ("x.0.w", "y.0.w"), ("x.1.w", "y.1.w"),
    }  # fmt: skip
    assert (difference.removed, difference.added) == (("lone",), ("other",))


def test_reshaped(diff) -> None:
    other = model()
    other["3.bias"] = other["3.bias"][None]
    other["0.bias"] = torch.zeros(4)
    other["1.bias"] = other["1.bias"].reshape(2, 4) + 1
    rows = {row["name"]: row for row in diff(model(), other).reshaped}
    assert rows["3.bias"] == {"name": "3.bias", "from": [10], "to": [1, 10], "same_values": True}
    assert rows["0.bias"]["same_values"] is None
    assert rows["1.bias"]["same_values"] is False


def test_recast(diff) -> None:
    other = {name: t.half() if t.is_floating_point() else t for name, t in model().items()}
    difference = diff(model(), other)
    assert (lists(difference), difference.equal, difference.unchanged) == ({"recast"}, False, 1)
    assert difference.summary.startswith("8 tensors are recast, equal after the cast")
    other["3.bias"] += 1
    difference = diff(model(), other)
    assert [row["name"] for row in difference.recast if not row["equal_after_cast"]] == ["3.bias"]
    assert next(row for row in difference.recast if row["name"] == "3.bias")["max_abs"] == pytest.approx(1, rel=1e-2)


def test_tolerance(diff) -> None:
    other = model()
    other["3.weight"] += 1e-6
    assert not diff(model(), other).equal
    difference = diff(model(), other, atol=1e-5)
    assert (difference.equal, [row["name"] for row in difference.within_tolerance]) == (True, ["3.weight"])
    assert difference.summary == "8 of 9 tensors are bit-identical, the others are within tolerance"
    assert not diff(model(), other, atol=1e-8).equal
    bias = {"w": torch.tensor([100.0, -2.0])}
    assert diff(bias, {"w": bias["w"] * 1.01}, rtol=0.011).equal
    assert not diff(bias, {"w": bias["w"] * 1.01}, rtol=0.009).equal
    assert diff({"n": torch.tensor([10])}, {"n": torch.tensor([11])}, atol=1).equal
    assert not diff({"n": torch.tensor([10])}, {"n": torch.tensor([12])}, atol=1).equal


def test_tolerance_of_what_is_no_number(diff) -> None:
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([nan, inf, 0.0])
    assert diff({"w": a}, {"w": torch.tensor([nan, inf, -0.0])}, atol=0.0).equal
    assert not diff({"w": a}, {"w": torch.tensor([nan, inf, -0.0])}).equal
    assert not diff({"w": a}, {"w": torch.tensor([1.0, inf, 0.0])}, atol=1e9).equal
    assert not diff({"w": a}, {"w": torch.tensor([nan, -inf, 0.0])}, atol=1e9).equal


def test_nan_appeared(diff) -> None:
    other = model()
    other["3.bias"][2] = float("nan")
    assert [finding.code for finding in diff(model(), other).findings] == ["nan-appeared"]
    assert diff(other, model()).findings == ()
    other["3.weight"] += 1000
    assert diff(model(), other).changed[0]["name"] == "3.bias"  # before what changed by more


def test_order(diff) -> None:
    difference = diff(model(), dict(reversed(model().items())))
    assert (difference.equal, difference.ok, difference.same_order) == (True, True, False)


def test_ties(diff) -> None:
    weight = torch.rand(3, 3)
    tied, copies = {"a": weight, "b": weight, "c": weight}, {"a": weight, "b": weight.clone(), "c": weight.clone()}
    difference = diff(tied, copies)
    assert [dict(row) for row in difference.ties] == [{"names": ["a", "b", "c"], "tied_in": "a"}]
    assert (difference.equal, difference.same_beside) == (True, False)
    assert [finding.code for finding in difference.findings] == ["ties-differ"]
    assert diff(copies, tied).ties[0]["tied_in"] == "b"
    assert diff(tied, tied).ties == ()
    assert not diff(tied, copies, strict=True).ok


# Prefixes.


def test_a_prefix_is_told_and_seen_through(diff) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in model().items()}
    difference = diff(model(), wrapped)
    found = [finding for finding in difference.findings if finding.code == "prefix-differs"]
    assert len(found) == 1
    assert found[0].fix is not None
    assert found[0].fix.endswith("b.pth --strip-module")
    assert not difference.equal
    for a, b in ((model(), wrapped), (wrapped, model())):
        assert (diff(a, b, strip_module=True).equal, diff(a, b, strip_module=True).findings) == (True, ())


def test_stripping_two_names_into_one_is_an_error(diff) -> None:
    with pytest.raises(ckptkit.KeyCollisionError):
        diff({"w": torch.ones(1), "module.w": torch.ones(1)}, {"w": torch.ones(1)}, strip_module=True)


def with_ties() -> dict[str, object]:
    """Files in which several names share bytes: equal views, others, a whole model, a parameter with an attribute."""
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    net = nn.ModuleDict({"embedding": embedding, "head": head, "norm": nn.LayerNorm(8)})
    marked = nn.Parameter(torch.ones(7))
    marked.sharded = True  # type: ignore[attr-defined]
    values = torch.arange(100.0)
    return {
        "tied": net.state_dict(),
        "model": net,
        "marked": {**net.state_dict(), "p": marked, "q": marked},
        "views": {"a": values[:60], "b": values[40:], "c": values[:60], "none": values[:0], "nothing": values[:0]},
    }


@pytest.mark.parametrize("name", with_ties())
def test_bytes_of_tied_tensors_count_once_as_in_inspect(diff, tmp_path: Path, name: str) -> None:
    difference = diff(with_ties()[name], model())
    with ckptkit.open(tmp_path / "a.pth") as file:
        told = describe(file.checkpoint)["state_dict"]
        assert told is not None
        assert (difference.a["tensors"], difference.a["nbytes"]) == (told["tensors"], told["nbytes"])
        assert difference.a["nbytes"] < sum(entry.nbytes for entry in file.state_dict.values())
    assert difference.b["nbytes"] == sum(t.nbytes for t in model().values())
