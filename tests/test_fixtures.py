"""The committed fixtures are what their manifest says, and ckptkit reads them as torch does."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import files
from support.files import tensor_of
from support.generated_tensors import STORABLE

import ckptkit
from ckptkit.checkpoint import Checkpoint, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.pickling.inert import InertDict, attributes, mapping_items, walk

FIXTURES = Path(__file__).parent.parent / "fixtures"
SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fixtures_make", FIXTURES / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(name: str) -> AbstractContextManager[Checkpoint]:
    return files.opened(FIXTURES / name)


def locations(checkpoint: Checkpoint) -> Counter[str]:
    """How many tensors of the whole file carry each tag."""
    everything = [*checkpoint.state_dict.values(), *walk(checkpoint.rest)]
    return Counter(node.location for node in everything if isinstance(node, TensorEntry))


# The manifest.


def test_the_files_are_what_the_manifest_says(make: ModuleType) -> None:
    assert make.check() == []
    assert make.main(["--check"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a picture is drawn of what is printed on a pseudo-terminal")
def test_the_picture_shows_todays_output() -> None:
    done = subprocess.run(
        [sys.executable, FIXTURES / "pictures" / "draw.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pictures_are_small() -> None:
    assert (FIXTURES / "pictures" / "inspect.svg").stat().st_size < 60_000
    assert (FIXTURES / "pictures" / "page.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (FIXTURES / "pictures" / "page.png").stat().st_size < 200_000


def test_every_fixture_says_how_it_is_made(make: ModuleType) -> None:
    manifest = json.loads((FIXTURES / "manifest.json").read_text(encoding="utf-8"))
    assert {name: entry["about"] for name, entry in manifest["files"].items()} == {
        name: about for name, (_, about) in make.MAKERS.items()
    }
    assert manifest["made_with"].keys() == {"python", "torch", "torchvision", "safetensors"}


def test_fixtures_are_small(make: ModuleType) -> None:
    sizes = [(FIXTURES / name).stat().st_size for name in make.MAKERS]
    assert max(sizes) < 1 << 20
    assert sum(sizes) < 2 << 20


def _damage(folder: Path) -> None:
    data = bytearray((folder / "tied.pth").read_bytes())
    data[5000] ^= 1
    (folder / "tied.pth").write_bytes(data)


def _truncate(folder: Path) -> None:
    data = (folder / "tied.pth").read_bytes()
    (folder / "tied.pth").write_bytes(data[:-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_damage, "tied.pth: sha256 is "),
        (_truncate, "tied.pth: size is "),
        (lambda folder: (folder / "tied.pth").unlink(), "tied.pth: in manifest.json, not in the folder"),
        (lambda folder: (folder / "new.pth").touch(), "new.pth: in the folder, not in manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: cannot be read: "),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json: cannot be read: "),
    ],
)
def test_check_sees(make: ModuleType, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "fixtures"
    shutil.copytree(FIXTURES, folder)
    assert make.check(folder) == []
    spoil(folder)
    assert make.check(folder)[0].startswith(message)


# What ckptkit reads in them.


@pytest.mark.parametrize(
    ("name", "container", "kind", "state_path", "tensors", "tags", "trust"),
    [
        (
            *("ddp_resume.pth", "torch-zip", "resume", "state_dict", 314),
            *({"cuda:0": 314 + 158 + 1, "cuda:1": 1, "cpu": 1}, "needs_trust"),
        ),
        ("state_dict.safetensors", "safetensors", "state_dict", "", 13, {"cpu": 13}, "safe"),
        ("whole_model.pth", "torch-zip", "whole_model", "", 13, {"cpu": 13}, "needs_trust"),
        ("tied.pth", "torch-zip", "state_dict", "", 39, {"cpu": 39}, "safe"),
    ],
)
def test_what_is_in_them(
    name: str, container: str, kind: str, state_path: str, tensors: int, tags: dict[str, int], trust: str
) -> None:
    with opened(name) as checkpoint:
        origin = checkpoint.origin
        assert (origin.format, origin.kind, origin.state_path) == (container, kind, state_path)
        assert len(checkpoint.state_dict) == tensors
        assert locations(checkpoint) == tags
        assert checkpoint.trust == trust
        assert checkpoint.findings == ()


def test_ddp_resume_equals_what_torch_loads(same_bits: SameBits) -> None:
    expected = torch.load(FIXTURES / "ddp_resume.pth", map_location="cpu", weights_only=False)
    with opened("ddp_resume.pth") as checkpoint:
        state_dict, rest = checkpoint.state_dict, checkpoint.rest
        assert list(state_dict) == list(expected["state_dict"])
        assert all(name.startswith("module.") for name in state_dict)
        for name, tensor in expected["state_dict"].items():
            assert same_bits(tensor_of(state_dict[name]), tensor), name
            assert state_dict[name].stride == tensor.stride(), name
        versions = {path: dict(node.items()) for path, node in state_dict.versions.items()}
        assert versions == dict(expected["state_dict"]._metadata)

        assert isinstance(rest, InertDict)
        assert list(rest) == list(expected)
        optimizer = dict(mapping_items(rest["optimizer"]) or [])
        state = {index: dict(mapping_items(node) or []) for index, node in mapping_items(optimizer["state"]) or []}
        assert state.keys() == expected["optimizer"]["state"].keys()
        for index, moments in expected["optimizer"]["state"].items():
            assert same_bits(tensor_of(state[index]["momentum_buffer"]), moments["momentum_buffer"]), index
        groups = [dict(group.items()) for group in optimizer["param_groups"]]
        assert groups == expected["optimizer"]["param_groups"]

        assert dict(rest["scheduler"].items()) == expected["scheduler"]
        assert [tensor_of(loss).item() for loss in rest["per_gpu_loss"]] == [t.item() for t in expected["per_gpu_loss"]]
        assert same_bits(tensor_of(rest["rng_state"]), expected["rng_state"])
        assert (rest["epoch"], rest["arch"], rest["best_acc1"]) == (1, "mobilenet_v2", 61.375)
        args = attributes(rest["args"])
        assert args is not None
        assert dict(args.items()) == vars(expected["args"])


def test_ddp_resume_has_been_trained() -> None:
    with opened("ddp_resume.pth") as checkpoint:
        batches = [entry for name, entry in checkpoint.state_dict.items() if name.endswith("num_batches_tracked")]
        assert {tensor_of(entry).item() for entry in batches} == {2}


def test_ddp_resume_is_of_a_device_that_is_not_here() -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("it is")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(FIXTURES / "ddp_resume.pth", weights_only=False)


def test_safetensors_equals_what_the_library_loads(same_bits: SameBits) -> None:
    from safetensors.torch import load_file

    expected: dict[str, Any] = load_file(FIXTURES / "state_dict.safetensors")
    with opened("state_dict.safetensors") as checkpoint:
        assert checkpoint.state_dict.keys() == expected.keys()
        assert checkpoint.metadata == {"license": "MIT"}
        for name, tensor in expected.items():
            assert same_bits(tensor_of(checkpoint.state_dict[name]), tensor), name


def test_whole_model_is_read_without_its_class(make: ModuleType, same_bits: SameBits) -> None:
    with pytest.raises(ModuleNotFoundError, match="shapes_net"):
        torch.load(FIXTURES / "whole_model.pth", weights_only=False)
    with make.shapes_net():
        expected = torch.load(FIXTURES / "whole_model.pth", weights_only=False).state_dict()
    with opened("whole_model.pth") as checkpoint:
        state_dict = checkpoint.state_dict
        assert list(state_dict) == list(expected)
        assert "window" not in state_dict
        assert state_dict["encoder.weight"] is state_dict["decoder.weight"]
        for name, tensor in expected.items():
            assert same_bits(tensor_of(state_dict[name]), tensor), name
        parameters = {name for name, entry in state_dict.items() if entry.is_parameter}
        assert parameters == {name for name in expected if name.endswith(("weight", "bias"))}


@pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental")
def test_tied_equals_what_torch_loads(make: ModuleType, same_bits: SameBits) -> None:
    if lacking := [name for name in make.PLAIN_DTYPES if name not in STORABLE]:
        pytest.skip(f"this torch cannot load the file: it has no {', '.join(lacking)}")
    expected = torch.load(FIXTURES / "tied.pth", weights_only=True)
    with opened("tied.pth") as checkpoint:
        state_dict = checkpoint.state_dict
        assert list(state_dict) == list(expected)
        for name, tensor in expected.items():
            entry = state_dict[name]
            assert same_bits(tensor_of(entry), tensor), name
            assert (entry.stride, entry.storage_offset) == (tensor.stride(), tensor.storage_offset()), name
            assert (entry.is_conj, entry.is_neg) == (tensor.is_conj(), tensor.is_neg()), name
        assert state_dict["encoder.weight"].view == state_dict["decoder.weight"].view
        assert state_dict["first_rows"].storage is state_dict["encoder.weight"].storage
        assert state_dict["first_rows"].view != state_dict["encoder.weight"].view


def test_tied_holds_every_dtype_that_is_plain(make: ModuleType) -> None:
    with opened("tied.pth") as checkpoint:
        found = {entry.dtype for entry in checkpoint.state_dict.values()}
    assert found == set(make.PLAIN_DTYPES)
    plain = {row.name for row in DTYPES.values() if row.kind != "quantized" and not row.bits}
    assert found == plain - {"bcomplex32"}


# The older containers, TorchScript, and shards.


def _shards() -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(FIXTURES.glob("model-0*")) for name, tensor in load_file(path).items()}


def _scripted() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.load(FIXTURES / "scripted.pt").state_dict()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "facts", "expected"),
    [
        (
            "legacy.pth",
            ("torch-legacy", "resume", "net"),
            lambda: torch.load(FIXTURES / "legacy.pth", weights_only=True)["net"],
        ),
        ("scripted.pt", ("torchscript", "whole_model", ""), _scripted),
        ("model.safetensors.index.json", ("safetensors-sharded", "state_dict", ""), _shards),
    ],
)
def test_what_can_only_be_read(
    name: str,
    facts: tuple[str, ...],
    expected: Callable[[], dict[str, torch.Tensor]],
    same_bits: SameBits,
    tmp_path: Path,
) -> None:
    with opened(name) as checkpoint:
        origin = checkpoint.origin
        assert (origin.format, origin.kind, origin.state_path) == facts
        assert checkpoint.trust == "safe"
    there = expected()
    for written in ("out.pth", "out.safetensors"):
        ckptkit.convert(FIXTURES / name, tmp_path / written, weights_only=written.endswith(".safetensors"))
        here = ckptkit.load_state_dict(tmp_path / written)
        assert set(here) == set(there)
        assert all(same_bits(here[key], there[key]) for key in there)
