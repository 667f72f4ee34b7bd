"""Ties and views: ``--tied``, and what becomes of tensors that are not their storage as it lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from support.files import with_data
from support.generated_tensors import STORABLE
from torch import nn

import ckptkit


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.encoder.weight
        self.third = nn.ModuleList([self.decoder])


@pytest.fixture
def tied() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return Tied().state_dict()


def groups(state: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    """The names over each storage that has several."""
    found: dict[int, set[str]] = {}
    for name, tensor in state.items():
        found.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)
    return {frozenset(names) for names in found.values() if len(names) > 1}


def test_alias_is_the_default(save, converted, agree, tied: dict[str, torch.Tensor]) -> None:
    path = save(tied)
    for options in ([], ["--tied", "alias"]):
        written = converted(path, f"{len(options)}.pth", *options)
        agree(written, tied)
        assert groups(written) == groups(tied) != set()
        name = f"{len(options)}.safetensors"
        alone = converted(path, name, *options)
        assert sorted(alone) == ["decoder.bias", "encoder.weight"]
        with safe_open(name, "pt") as file:
            assert file.metadata()["decoder.weight"] == "encoder.weight"
            assert file.metadata()["third.0.weight"] == "encoder.weight"
        again = converted(name, f"back{len(options)}.pth")
        agree(again, tied, ordered=False)
        assert groups(again) == groups(tied)


class Language(nn.Module):
    """An embedding that its heads share, which come later in the state_dict and earlier in the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(40, 8)
        self.encoder = nn.ModuleDict({"embed_tokens": nn.Embedding(40, 8), "norm": nn.LayerNorm(8)})
        self.decoder = nn.ModuleDict({"norm": nn.LayerNorm(8), "embed_tokens": nn.Embedding(40, 8)})
        self.a_head = nn.Linear(8, 40, bias=False)
        self.encoder["embed_tokens"].weight = self.decoder["embed_tokens"].weight = self.shared.weight
        self.a_head.weight = self.shared.weight


def test_the_first_name_is_kept(save, convert, converted, agree) -> None:
    """As other readers expect it: the embedding, not the head; one file or shards, whose index lists no other name."""
    model = Language()
    path = save(model.state_dict())
    others = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "a_head.weight"]
    alone = converted(path, "one.safetensors")
    assert sorted(alone) == sorted(model.state_dict().keys() - set(others))
    assert convert(path, "m.safetensors", "--max-shard-size", "2kB").code == 0
    index = json.loads(Path("m.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == alone.keys()
    for name, shard in index["weight_map"].items():
        assert name in load_file(shard)
    for written in ("one.safetensors", "m.safetensors.index.json"):
        agree(ckptkit.load_state_dict(written), model.state_dict())
        back = converted(written, f"{written}.pth")
        agree(back, model.state_dict())
        assert len({back[name].data_ptr() for name in ("shared.weight", *others)}) == 1
    fresh = Language()
    assert load_model(fresh, "one.safetensors") == (set(), [])
    agree(fresh.state_dict(), model.state_dict())
    assert convert(path, "again.safetensors").code == 0
    assert Path("again.safetensors").read_bytes() == Path("one.safetensors").read_bytes()
    assert convert("m.safetensors.index.json", "m2.safetensors", "--max-shard-size", "2kB", "--no-receipt").code == 0
    assert json.loads(Path("m2.safetensors.index.json").read_text())["metadata"].keys() == index["metadata"].keys()


def test_duplicate(save, converted, agree, tied: dict[str, torch.Tensor]) -> None:
    path = save(tied)
    written = converted(path, "out.pth", "--tied", "duplicate")
    agree(written, tied)
    assert groups(written) == set()
    agree(converted(path, "out.safetensors", "--tied", "duplicate"), tied, ordered=False)
    with safe_open("out.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "torch._metadata", "ckptkit_receipts"}
    agree(converted("out.safetensors", "back.pth"), tied, ordered=False)


def test_duplicate_splits_ties_alone(save, converted, agree) -> None:
    base = torch.arange(12.0)
    state = {"a": base, "b": base, "part": base[2:5], "same part": base[2:5], "apart": torch.ones(3)}
    written = converted(save(state), "out.pth", "--tied", "duplicate")
    agree(written, state)
    assert groups(written) == {frozenset({"a", "part"})}


def test_duplicate_and_cast(save, converted, agree, tied: dict[str, torch.Tensor]) -> None:
    written = converted(save(tied), "out.pth", "--tied", "duplicate", "--dtype", "float16")
    agree(written, {name: tensor.half() for name, tensor in tied.items()})
    assert groups(written) == set()


def test_error(save, convert, converted, refused, agree, tied: dict[str, torch.Tensor]) -> None:
    path = save(tied)
    for name in ("out.pth", "out.safetensors"):
        line = refused(path, name, "--tied", "error")
        assert "'encoder.weight' = 'decoder.weight' = 'third.0.weight'" in line
        assert "'decoder.bias' = 'third.0.bias'" in line
        assert "2 tensors have several names" in line
    single = {"a": torch.ones(3), "b": torch.ones(3)}
    agree(converted(save(single), "out.pth", "--tied", "error"), single)
    assert "'nonsense' is not one of 'alias', 'duplicate', 'error'" in refused(path, "out.pth", "--tied", "nonsense")
    with pytest.raises(ckptkit.RewriteError, match="no policy 'nonsense'"):
        ckptkit.convert(path, "out.pth", tied="nonsense")  # type: ignore[arg-type]


# Views.


def views() -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    base, flat = torch.randn(6, 8), torch.randn(40)
    return {
        "base": base,
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "transposed": base.t(),
        "reshaped": base.view(2, 3, 8),
        "flattened": base.view(-1)[5:9],
        "every other": base[::2, ::3],
        "expanded": base[:1, :1].expand(3, 4),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "overlapping 1": flat[:25],
        "overlapping 2": flat[15:],
        "sliding": torch.arange(10.0).as_strided((4, 3), (2, 1)),
        "diagonal": torch.randn(5, 5).diagonal(),
        "scalar view": flat[3],
        "empty view": flat[4:4],
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "imag": torch.randn(4, dtype=torch.complex64).conj().imag,
        "bool": torch.tensor([[True, False], [False, True]]).t(),
        "bf16": torch.randn(4, 3).bfloat16().t(),
        **({"fp8": torch.randn(4, 3).to(torch.float8_e5m2).t()} if "float8_e5m2" in STORABLE else {}),
    }


def test_every_view(save, converted, agree) -> None:
    state = views()
    path = save(state)
    written = converted(path, "out.safetensors")
    agree(
        written,
        {name: tensor.resolve_conj().resolve_neg().contiguous() for name, tensor in state.items()},
        ordered=False,
    )
    kept = converted(path, "out.pth")
    agree(kept, state)
    assert [tensor.stride() for tensor in kept.values()] == [tensor.stride() for tensor in state.values()]
    assert groups(kept) == groups(state)
    again = converted("out.safetensors", "back.pth")
    agree(again, written, ordered=False)


def test_what_is_told_of_views(save, convert) -> None:
    base = torch.randn(6, 8)
    path = save({"base": base, "t": base.t(), "rows": base[:2]})
    done = convert(path, "out.safetensors", "--json")
    document = json.loads(done.out)
    assert document["gathered"] == ["t"]
    (finding,) = document["findings"]
    assert finding["code"] == "written-out"
    assert finding["message"].startswith("1 tensor was not contiguous and 2 tensors shared a storage; each")


def test_what_is_told_of_other_forms(save, convert) -> None:
    z = torch.randn(3, dtype=torch.complex64)
    path = save({"conj": z.conj().clone().conj(), "t": torch.ones(2, 3).t(), "plain": torch.ones(1)})
    (finding,) = json.loads(convert(path, "out.safetensors", "--json").out)["findings"]
    assert finding["message"].startswith("1 tensor was stored conjugated or negated and 1 tensor was not contiguous; ")
    path = with_data(save({"a": torch.ones(3), "b": torch.ones(2)}), lambda n, d: b"big" if n == "byteorder" else d)
    (finding,) = json.loads(convert(path, "out.safetensors", "--json", "--force").out)["findings"]
    assert finding["message"].startswith("2 tensors were big-endian; ")


def test_a_small_view_of_a_large_storage(save, convert, converted, agree) -> None:
    big = torch.randn(1 << 20)
    other = torch.randn(1 << 18).view(512, 512)
    state = {"first": big[:10], "near": big[5:20], "far": big[-4:], "rows": other[3:5, 7:9], "whole": torch.ones(9)}
    path = save(state)
    done = convert(path, "out.pth", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    (finding,) = document["findings"]
    assert (finding["code"], finding["severity"]) == ("compacted", "info")
    assert finding["message"] == "5.24 MB in 2 storages belong to no tensor and are left out"
    kept = 4 * (20 + 4 + 512 + 2)
    assert document["compacted"] == {"storages": 2, "nbytes": 4 * ((1 << 20) + (1 << 18)) - kept}
    assert Path("out.pth").stat().st_size < 10_000
    written = torch.load("out.pth")
    agree(written, state)
    assert groups(written) == {frozenset({"first", "near"})}
    assert written["near"].data_ptr() - written["first"].data_ptr() == 20
    agree(converted(path, "out.safetensors"), state, ordered=False)
    assert Path("out.safetensors").stat().st_size < 10_000
    again = json.loads(convert("out.pth", "again.pth", "--json").out)
    assert again["findings"] == []


def test_an_optimizer_that_shares_a_storage_keeps_it(save, convert) -> None:
    """What is viewed beside the weights is not cut away from under it."""
    big = torch.randn(1000)
    path = save({"model": {"w": big[:10]}, "ema": {"shadow": big[500:510]}, "note": big._typed_storage()})
    assert convert(path, "out.pth", "--section", "model").code == 0
    written: Any = torch.load("out.pth")
    assert torch.equal(written["ema"]["shadow"], big[500:510])
    assert written["note"]._untyped_storage.nbytes() == 4000


def test_too_many_repetitions_are_refused(save, refused) -> None:
    path = save({"mask": torch.zeros(1).expand(1_000_000, 1_000_000)})
    assert "'mask' of shape (1000000, 1000000)" in refused(path, "out.safetensors")


def test_in_python(save, tmp_path: Path, agree, tied: dict[str, torch.Tensor]) -> None:
    ckptkit.convert(save(tied), tmp_path / "out.safetensors", tied="duplicate")
    agree(load_file(tmp_path / "out.safetensors"), tied, ordered=False)
