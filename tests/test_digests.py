"""Content digests: computed here a second time from torch's tensors, as `ckptkit.digests` specifies them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest
import torch
from generated_tensors import STORABLE
from safetensors.torch import save_file

import ckptkit
from ckptkit import formats
from ckptkit.digests import DigestLine, content_digest, tensor_digest, unwrapped_names, value_kind
from ckptkit.dtypes import DTYPES
from ckptkit.errors import DTypeError
from ckptkit.released.examine import Examined, examine_file

Save = Callable[..., Path]
FIXTURES = Path(__file__).parent.parent / "fixtures"
CHECKPOINTS = [
    "ddp_resume.pth", "legacy.pth", "model.safetensors.index.json", "scripted.pt", "state_dict.safetensors", "tied.pth",
    "whole_model.pth",
]  # fmt: skip


def digested(path: Path) -> Examined:
    return examine_file(str(path), hash_file=False, digest=True, values=False)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # ComplexHalf is experimental
        try:
            state = ckptkit.load_state_dict(path, map_location="cpu")
        except DTypeError as error:
            pytest.skip(f"the file holds more dtypes: {error}")
        return {name: value.clone() for name, value in state.items()}


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def specified(state: Mapping[str, torch.Tensor]) -> str:
    text = "ckptkit-content-1\n"
    for name in sorted(state):
        tensor = state[name]
        line = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), sha256(raw(tensor))]
        text += json.dumps(line, separators=(",", ":")) + "\n"
    return sha256(text.encode("ascii"))


STATE = {
    "fc.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "bn.num_batches_tracked": torch.tensor(7),
    "empty": torch.empty(0, 5, dtype=torch.float16),
    "Größe\n\"'": torch.tensor([True, False]),
    "half": torch.randn(4, 3, dtype=torch.bfloat16),
}


def test_it_is_what_is_specified(save: Save) -> None:
    found = digested(save(STATE))
    assert found.content_digest == specified(STATE)
    assert {fact.name: fact.digest for fact in found.tensors} == {name: sha256(raw(t)) for name, t in STATE.items()}
    assert [fact.name for fact in found.tensors] == sorted(STATE)


def test_a_version_of_it_never_changes(save: Save) -> None:
    state = {"module.b": torch.tensor([1.0, -2.0]), "module.a": torch.tensor(3, dtype=torch.int64)}
    found = digested(save(state))
    assert found.content_digest == "sha256:2eb9bb486679727c200c5e70ff0ef1ffc519045f4f539efc0c57727508987686"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_container_and_no_prefix_changes_it(name: str, tmp_path: Path) -> None:
    expected = digested(FIXTURES / name).content_digest
    state = loaded(FIXTURES / name)
    holdable = all(DTYPES[str(value.dtype).removeprefix("torch.")].safetensors for value in state.values())
    backwards = dict(reversed(state.items()))
    paths = [tmp_path / "zip.pth", tmp_path / "legacy.pth", tmp_path / "resume.pth"]
    torch.save(backwards, paths[0])
    torch.save(backwards, paths[1], _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}}, paths[2])
    for ending in (".pth", ".safetensors", ".pth.index.json", ".safetensors.index.json") if holdable else (".pth",):
        for options in ({"strip_module": True}, {"add_module": True}):
            paths.append(tmp_path / f"{len(paths)}{ending}")
            shards = {"max_shard_size": 200_000} if "index" in ending else {}
            report = ckptkit.convert(FIXTURES / name, paths[-1], weights_only=True, **options, **shards)
            paths[-1] = Path(report.details["destination"])
    if holdable:
        paths.append(tmp_path / "library.safetensors")
        save_file(state, paths[-1])
    found = {path.name: digested(path).content_digest for path in paths}
    assert set(found.values()) == {expected}, found
    assert {digested(path).format for path in paths} >= {"torch-zip", "torch-legacy"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_bit_of_a_tensor_changes_it(name: str, tmp_path: Path) -> None:
    before = digested(FIXTURES / name)
    state = loaded(FIXTURES / name)
    key = next(key for key in reversed(state) if state[key].numel())
    state[key].reshape(-1).view(torch.uint8)[-1] ^= 1
    torch.save(state, tmp_path / "flipped.pth")
    after = digested(tmp_path / "flipped.pth")
    assert after.content_digest != before.content_digest
    changed = [b.name for a, b in zip(before.tensors, after.tensors, strict=True) if a.digest != b.digest]
    assert changed == unwrapped_names([key])


def test_what_changes_it(save: Save) -> None:
    ones = torch.ones(4)
    states = [
        {"w": ones},
        {"v": ones},
        {"w": ones.reshape(2, 2)},
        {"w": ones.view(torch.int32)},
        {"w": ones.to(torch.float64)},
        {"w": ones, "b": torch.empty(0)},
        {"w": -ones},
        {"w": ones, "extra": {"a": 1}},
        {"w": ones, "extra": [1]},
    ]
    digests = [digested(save({"state_dict": state, "epoch": 1})).content_digest for state in states]
    assert len(set(digests)) == len(states)


def test_what_does_not_change_it(save: Save) -> None:
    base = torch.arange(24, dtype=torch.float32)
    expected = specified({"a": base.reshape(4, 6), "b": base.reshape(4, 6)})
    same = [
        {"b": base.reshape(4, 6), "a": base.reshape(4, 6)},  # tied, and in another order
        {"a": base.reshape(4, 6).clone(), "b": torch.nn.Parameter(base.reshape(4, 6).clone())},
        {"a": base.reshape(4, 6).t().contiguous().t(), "b": torch.cat([base, base])[24:].reshape(4, 6)},
    ]
    for state in same:
        assert digested(save(state)).content_digest == expected
        assert digested(save(state, device="cuda:3")).content_digest == expected
        assert (
            digested(save({"model": state, "optimizer": {"state": {}, "param_groups": []}})).content_digest == expected
        )


def test_values_that_have_to_be_computed(save: Save) -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    state = {
        "conj": z.conj(),
        "neg": torch.randn(5, dtype=torch.complex64).conj().imag,
        "expanded": torch.tensor([1.5]).expand(3, 5),
        "strided": torch.arange(20)[::3],
        "transposed": torch.randn(70, 30).t(),
    }
    assert digested(save(state)).content_digest == specified(state)


@pytest.mark.parametrize("dtype", STORABLE)
def test_every_dtype(dtype: str, save: Save) -> None:
    if dtype == "bcomplex32":
        state = {"w": torch.zeros(4, dtype=torch.uint8)}  # torch saves none
    else:
        state = {"w": torch.arange(32, dtype=torch.uint8).view(getattr(torch, dtype))}
    assert digested(save(state)).content_digest == specified(state)


def test_names_that_would_become_one_stay_as_they_are(save: Save) -> None:
    state = {"module.w": torch.zeros(2), "w": torch.ones(2), "module.b": torch.ones(1)}
    assert digested(save(state)).content_digest == specified(state)
    assert unwrapped_names(["module.a", "_orig_mod.module.b"]) == ["a", "b"]
    assert unwrapped_names(["module.a", "a"]) == ["module.a", "a"]
    later = ["_fsdp_wrapped_module.a", "_forward_module.b", "c._checkpoint_wrapped_module.d"]
    assert unwrapped_names(later) == later, "what digests have named so far they go on naming so"


def test_values_that_are_no_plain_tensors_count(save: Save) -> None:
    def saved(scale: float, extra: object) -> Examined:
        sparse = torch.tensor([0, scale]).to_sparse()
        return digested(save({"w": torch.ones(2), "v": torch.ones(2), "q": sparse, "m._extra_state": extra}))

    first = saved(0.5, {"x": 1})
    assert first.others == ("m._extra_state", "q")
    assert first.content_digest == saved(0.5, {"x": 1}).content_digest
    assert first.content_digest != saved(0.5, {"x": 2}).content_digest
    assert first.former_digest == saved(0.5, {"x": 2}).former_digest  # version 1 did not look at what is in it
    assert first.former_digest != saved(0.25, {"x": 1}).former_digest  # but at tensors
    assert first.content_digest != saved(0.25, {"x": 1}).content_digest
    assert first.content_digest != saved(0.5, [1]).content_digest
    without = digested(save({"w": torch.ones(2), "v": torch.ones(2), "m._extra_state": {"x": 1}}))
    assert first.content_digest != without.content_digest


def test_a_file_without_selected_weights_has_all_its_tensors(save: Save) -> None:
    pair = {"generator": {"w": torch.ones(2)}, "discriminator": {"module.w": torch.zeros(2)}}
    found = digested(save(pair))
    assert [fact.name for fact in found.tensors] == ["discriminator.w", "generator.w"]
    assert found.content_digest == specified({"generator.w": torch.ones(2), "discriminator.w": torch.zeros(2)})
    several = digested(save([torch.ones(1), torch.zeros(2)]))
    assert len(several.tensors) == 2


def test_a_file_without_tensors_has_none(save: Save) -> None:
    assert digested(save({"epoch": 3})).content_digest is None
    assert content_digest([]) is None


def test_a_tensor_alone_and_the_lines() -> None:
    checkpoint, file = formats.read(FIXTURES / "state_dict.safetensors")
    with closing(file):
        state = loaded(FIXTURES / "state_dict.safetensors")
        for name, entry in checkpoint.state_dict.items():
            assert tensor_digest(entry) == sha256(raw(state[name]))
    line = DigestLine(name="x", kind="builtins.object", parts=(("int8", (2,), "sha256:0"),))
    text = 'ckptkit-content-1\n["x","builtins.object",[["int8",[2],"sha256:0"]],null]\n'
    assert content_digest([line]) == sha256(text.encode())
    assert [value_kind(value) for value in (1, "a", None, [])] == ["int", "str", "NoneType", "list"]


class Scaled(torch.Tensor):
    """A tensor that is kept with a scale."""


def scaled(scale: float) -> torch.Tensor:
    tensor = torch.ones(2).as_subclass(Scaled)
    tensor.scale = scale
    return tensor


def quantized(scale: float, zero_point: int = 0) -> torch.Tensor:
    return torch._make_per_tensor_quantized_tensor(torch.ones(4, dtype=torch.int8), scale, zero_point)


def per_channel(axis: int, scale: float = 0.2) -> torch.Tensor:
    scales, zeros = torch.tensor([0.1, scale]), torch.zeros(2, dtype=torch.int64)
    return torch._make_per_channel_quantized_tensor(torch.ones(2, 2, dtype=torch.int8), scales, zeros, axis)


VALUES: dict[str, Callable[[int], object]] = {
    "scale": lambda i: quantized((0.1, 0.2)[i]),
    "zero point": lambda i: quantized(0.1, i),
    "axis": lambda i: per_channel(i),
    "scale of a channel": lambda i: per_channel(0, (0.2, 0.3)[i]),
    "sparse size": lambda i: torch.sparse_coo_tensor([[0], [1]], [1.0], (4, 4 + i)),
    "layout": lambda i: torch.eye(2).to_sparse_csr() if i else torch.eye(2).to_sparse_csc(),
    "meta shape": lambda i: torch.ones(2 + i, device="meta"),
    "subclass": lambda i: scaled((0.1, 0.2)[i]),
    "extra state": lambda i: {"step": i},
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.filterwarnings("ignore:.*quantize.* deprecated", "ignore:.*[Ss]parse")
def test_what_a_value_is_made_of_counts(save: Save, name: str) -> None:
    def digests(i: int, *, listed: bool) -> Examined:
        values = {"w": torch.ones(2), "b": torch.ones(3), "v": VALUES[name](i)}
        return digested(save(list(values.values()) if listed else values))

    for listed in (False, True) if name != "extra state" else (False,):
        a, again, b = digests(0, listed=listed), digests(0, listed=listed), digests(1, listed=listed)
        assert a.content_digest == again.content_digest != b.content_digest
        assert a.former_digest == again.former_digest != a.content_digest


def test_plain_weights_have_the_digest_they_had(save: Save) -> None:
    found = digested(save(STATE))
    assert found.content_digest == found.former_digest == specified(STATE)
