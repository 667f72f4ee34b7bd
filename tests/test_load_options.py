"""`ckptkit.load_state_dict` with options: what `convert` would write, from memory; and what is mapped or copied."""

from __future__ import annotations

import ast
import resource
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.files import flipped, repacked
from support.torch_oracle import same

import ckptkit
from ckptkit.errors import CorruptError, DTypeError, KeyCollisionError, RewriteError, SectionError
from ckptkit.formats import format_named
from ckptkit.options import ConvertOptions, LoadOptions
from ckptkit.options import keywords as keywords_module

Save = Callable[..., Path]


def ddp(count: int = 4) -> OrderedDict[str, Any]:
    torch.manual_seed(count)
    state = OrderedDict((f"module.net.{i}.weight", torch.randn(3, i + 1)) for i in range(count))
    state["module.net.0.bias"] = torch.randn(3).bfloat16()
    state["module.net.0.steps"] = torch.tensor(7)
    state["module.tied"] = state["module.net.1.weight"]
    state["module.view"] = state["module.net.3.weight"].t()[1:]
    return state


ASKED: dict[str, dict[str, Any]] = {
    "strip_module": {"strip_module": True},
    "add_module": {"strip_module": True, "add_module": True},
    "strip_prefix": {"strip_prefix": "module.net"},
    "add_prefix": {"strip_module": True, "add_prefix": "backbone."},
    "rename": {"rename": [r"^module\.=>", ("net", "layers")]},
    "a dict": {"rename": {"module.net.0.weight": "first"}},
    "a function": {"rename": str.upper},
    "one rule": {"rename": "module=>model"},
    "include": {"include": "module.net.0.*"},
    "exclude": {"strip_module": True, "exclude": ["net.1.*", "*.steps"]},
    "dtype": {"dtype": "float16"},
    "another dtype": {"dtype": "bfloat16", "keep_dtype": "*.3.*"},
    "all": {"strip_module": True, "rename": "net=>n", "exclude": "view", "dtype": "float64", "keep_dtype": ["*bias"]},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_convert_writes_is_loaded(save: Save, tmp_path: Path, asked: str, ending: str) -> None:
    path, out = save({"state_dict": ddp(), "epoch": 3}), tmp_path / "out.pth"
    if ending == "safetensors":
        ckptkit.convert(path, tmp_path / "in.safetensors", weights_only=True)
        path = tmp_path / "in.safetensors"
    given = ASKED[asked]
    given = {**given, "strip_prefix": "module.net"} if "strip_prefix" in given else given
    if "strip_prefix" in given:
        given = {**given, "include": "module.net.*"}
    ckptkit.convert(path, out, weights_only=True, **given)
    ours, theirs = ckptkit.load_state_dict(path, **given), torch.load(out, weights_only=True)
    assert same(dict(ours), dict(theirs))
    shared = [[t.untyped_storage().data_ptr() for t in state.values()] for state in (ours, theirs)]
    first, second = ([pointers.index(pointer) for pointer in pointers] for pointers in shared)
    assert first == second
    assert ours._metadata == getattr(theirs, "_metadata", {})  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dense_values_are_made(save: Save, tmp_path: Path) -> None:
    numbers = torch.quantize_per_tensor(torch.randn(40, 50), 0.1, 3, torch.qint8)
    path = save({"s": torch.eye(300).to_sparse(), "q": numbers, "w": torch.ones(2)})
    for given in ({"densify": True}, {"densify": True, "dtype": "float16"}):
        ckptkit.convert(path, tmp_path / "out.pth", force=True, **given)  # type: ignore[arg-type]
        ours, theirs = ckptkit.load_state_dict(path, **given), torch.load(tmp_path / "out.pth", weights_only=True)  # type: ignore[arg-type]
        assert same(dict(ours), dict(theirs)) and ours["q"].layout == ours["s"].layout == torch.strided
    assert torch.equal(ckptkit.load_state_dict(path, densify=True)["s"], torch.eye(300))


def test_all_tensors_of_any_file(save: Save, tmp_path: Path) -> None:
    path = save([torch.ones(2), {"g": {"w": torch.zeros(3)}, 5: torch.arange(4)}])
    ckptkit.convert(path, tmp_path / "all.safetensors", all_tensors=True)
    ours = ckptkit.load_state_dict(path, all_tensors=True)
    assert same(
        {name: ours[name] for name in sorted(ours)}, dict(sorted(load_file(tmp_path / "all.safetensors").items()))
    )
    assert list(ckptkit.load_state_dict(path, all_tensors=True, include="*g.w", dtype="float16")) == ["1.g.w"]
    with pytest.raises(SectionError, match="--all-tensors"):
        ckptkit.load_state_dict(save([torch.ones(2), torch.ones(1)], "list.pth"))
    with pytest.raises(RewriteError, match="--all-tensors takes every section"):
        ckptkit.load_state_dict(path, all_tensors=True, section="1")


def test_nothing_is_written(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(ddp())
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    ours = ckptkit.load_state_dict(path, strip_module=True, dtype="float16")
    assert ours["net.0.weight"].dtype == torch.float16
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_versions_are_renamed_along(save: Save) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    state = ckptkit.load_state_dict(save(model.state_dict()), add_prefix="m.")
    assert state._metadata["m.0"] == {"version": 2}  # type: ignore[attr-defined]


def test_a_whole_model_gives_plain_tensors(save: Save) -> None:
    model = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    state = ckptkit.load_state_dict(save(model), strip_module=True)
    assert list(state) == ["0.weight", "0.bias"]
    assert not any(isinstance(v, torch.nn.Parameter) or v.requires_grad for v in state.values())


def test_a_section(save: Save) -> None:
    path = save({"model": {"module.w": torch.ones(2)}, "ema": {"module.w": torch.zeros(2)}})
    with pytest.raises(SectionError, match=r"several|--section"):
        ckptkit.load_state_dict(path, strip_module=True)
    assert ckptkit.load_state_dict(path, section="ema", strip_module=True)["w"].sum() == 0


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"device": "cpu", "map_location": "cpu"}, RewriteError, "give only one of them"),
        ({"device": "cpu", "map_location": None}, RewriteError, "give only one of them"),
        ({"keep_dtype": "a"}, RewriteError, "keep-dtype makes exceptions"),
        ({"dtype": "float31"}, DTypeError, "float31"),
        ({"include": "nothing*"}, RewriteError, "no name matches|is left"),
        ({"rename": r".*weight=>w"}, KeyCollisionError, "w"),
        ({"strip_modul": True}, TypeError, "Did you mean 'strip_module'"),
        ({"device": "cuda:55"}, RewriteError, r"which has cpu.* \(.*give map_location"),
        ({"device": "gpu"}, RewriteError, "did you mean 'cuda'"),
    ],
)
def test_what_cannot_be_asked_for(save: Save, given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ckptkit.load_state_dict(save(ddp()), **given)


def test_devices_and_places(save: Save) -> None:
    path = save({"w": torch.ones(2)}, device="cuda:3")
    assert ckptkit.load_state_dict(path)["w"].device.type == "cpu"
    assert ckptkit.load_state_dict(path, device=torch.device("meta"))["w"].is_meta
    assert ckptkit.load_state_dict(path, device=None)["w"].device.type == "cpu"
    with pytest.raises(RewriteError, match="saved on 'cuda:3', cannot be put on 'cuda:3'"):
        ckptkit.load_state_dict(path, map_location=None)


def test_options_are_those_of_convert() -> None:
    own = {"map_location", "device", "mapped", "allow_part"}
    assert {
        name for name, option in LoadOptions.declared.items() if ConvertOptions.declared.get(name) is not option
    } == own
    tree = ast.parse(Path(str(keywords_module.__file__)).read_text(encoding="utf-8"))
    classes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    bodies = [classes[name].body for name in ("LoadKeywords", "_RewriteKeywords", "_ReadKeywords")]
    keywords = [n.target.id for body in bodies for n in body if isinstance(n, ast.AnnAssign)]  # type: ignore[union-attr]
    assert sorted(keywords) == sorted(LoadOptions.declared)
    assert all(f"{name}: " in (ckptkit.load_state_dict.__doc__ or "") for name in LoadOptions.declared)
    assert LoadOptions(device="cuda").but(strip_module=True).map_location == "cuda"


def test_damage_is_told_while_it_is_cast(save: Save) -> None:
    path = save({"a": torch.arange(3000.0), "b": torch.ones(2)})
    flipped(path, path.read_bytes().index(torch.arange(3000.0).numpy().tobytes()) + 40)
    for given in ({}, {"dtype": "float16"}, {"include": "a", "add_prefix": "x."}):
        with pytest.raises(CorruptError, match=r"tensor '.*a'.*CRC-32"):
            ckptkit.load_state_dict(path, **given)
    assert ckptkit.load_state_dict(path, ignore_checksums=True, dtype="float16")["a"].dtype == torch.float16
    assert ckptkit.load_state_dict(path, mapped=True)["b"].tolist() == [1, 1]


def test_a_compressed_file_and_another_byte_order_are_cast_too(save: Save) -> None:
    state = {"a": torch.randn(70), "b": torch.randn(3, 2).half()}
    path = repacked(save(state), deflate=True)
    ours = ckptkit.load_state_dict(path, dtype="float64")
    assert same(dict(ours), {name: value.double() for name, value in state.items()})


# In the file's own memory.


def test_safetensors_files_are_mapped_and_others_copied(save: Save, tmp_path: Path, reads: list[int]) -> None:
    state = {f"t{i}": torch.randn(i + 1, 3) for i in range(9)}
    state["half"] = torch.randn(3).half()
    save_file(state, tmp_path / "a.safetensors")
    ours = ckptkit.load_state_dict(tmp_path / "a.safetensors")
    assert reads == [] and same({name: ours[name] for name in state}, state)
    before = (tmp_path / "a.safetensors").read_bytes()
    ours["t3"].zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert same(
        dict(ckptkit.load_state_dict(tmp_path / "a.safetensors", mapped=False)),
        dict(load_file(tmp_path / "a.safetensors")),
    )
    assert len(reads) == len(state)
    reads.clear()
    path = save(state)
    ckptkit.load_state_dict(path)
    assert len(reads) == len(state)
    reads.clear()
    assert same(dict(ckptkit.load_state_dict(path, mapped=True)), state) and reads == []


def test_what_is_not_at_a_multiple_of_its_width_is_copied(tmp_path: Path, reads: list[int]) -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}'
    )
    header += b" " * (-len(header) % 8 + 3)
    data = torch.tensor([1.0, 2.0]).numpy().tobytes() + b"\x01\x02\x03"
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    ours = ckptkit.load_state_dict(tmp_path / "odd.safetensors")
    assert (ours["a"].tolist(), ours["b"].tolist()) == ([1, 2], [1, 2, 3])
    assert reads == [8] and ours["a"].data_ptr() % 4 == 0


def test_shards_are_mapped(tmp_path: Path, reads: list[int]) -> None:
    state = {f"t{i}": torch.randn(300) for i in range(6)}
    save_file(state, tmp_path / "a.safetensors")
    ckptkit.convert(tmp_path / "a.safetensors", tmp_path / "s.safetensors", max_shard_size=4000)
    ours = ckptkit.load_state_dict(tmp_path / "s.safetensors.index.json")
    assert same({name: ours[name] for name in state}, state) and reads == []
    assert format_named("safetensors-sharded").tensors_alone


PEAK = """
import resource, sys, torch
import ckptkit, ckptkit.torch_bridge
from ckptkit.conversion.options import Conversion
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
state = ckptkit.load_state_dict(sys.argv[1], **eval(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
@pytest.mark.parametrize(
    ("ending", "given", "most"),
    [("safetensors", {}, 0.2), ("pth", {}, 1.3), ("pth", {"mapped": True}, 0.2), ("pth", {"dtype": "float16"}, 0.8)],
)
def test_memory(
    save: Save, tmp_path: Path, python: Callable[..., Any], ending: str, given: dict[str, Any], most: float
) -> None:
    state, nbytes = {f"t{i}": torch.ones(4 << 20) for i in range(4)}, 64 << 20
    path = save(state) if ending == "pth" else tmp_path / "a.safetensors"
    if ending == "safetensors":
        save_file(state, path)
    done = python("-c", PEAK, path, repr(given))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < most * nbytes + (8 << 20), resource.getpagesize()
