"""Real checkpoints of other people: all of them open, hold what torch says they hold, and convert.

The files are not part of this project.  Where a folder of checkpoints is at hand, name it:

    CKPTKIT_CORPUS=folder python -m pytest tests/test_corpus.py

torch executes what it loads; here every class that is not torch's, numpy's or the standard library's
is replaced by a stub.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ckptkit
from ckptkit.checkpoint import TensorEntry
from ckptkit.pickling.inert import walk
from ckptkit.torch_bridge import tensors


def is_checkpoint(path: Path) -> bool:
    """Whether it is a file of a kind that ckptkit reads, however damaged; others are named, not read."""
    try:
        with ckptkit.open(path) as file:
            return file.format != "pt2"  # torch.load reads no exported program
    except ckptkit.UnknownFormatError:
        return False
    except ckptkit.CkptkitError:
        pass
    return True


FOLDER = os.environ.get("CKPTKIT_CORPUS", "")
FILES = sorted(path for path in Path(FOLDER).iterdir() if path.is_file() and is_checkpoint(path)) if FOLDER else []

pytestmark = pytest.mark.skipif(not FOLDER, reason="no folder of other people's checkpoints is named (CKPTKIT_CORPUS)")

files = pytest.mark.parametrize("path", FILES or [Path("-")], ids=lambda path: path.name)


class Lenient(type):
    """A class of which any attribute may be asked for: a bound method is pickled as one."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class Stub(metaclass=Lenient):
    """Takes the place of a class that is not here."""

    def __new__(cls, *args: object, **kwargs: object) -> Stub:
        made = super().__new__(cls)
        made.__dict__.update(args=args, kwargs=kwargs, items=[])
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, key: object, value: object) -> None:
        self.__dict__["items"].append((key, value))

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self), name)

    def append(self, value: object) -> None:
        self.__dict__["items"].append(value)

    def extend(self, values: list[object]) -> None:
        self.__dict__["items"].extend(values)


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.optim."):  # what is set where one is loaded may be older than this torch
            return type(name, (Stub,), {"__module__": module})
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name, (Stub,), {"__module__": module})


STUBBED = types.SimpleNamespace(
    Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load(), __name__="stubbed"
)


def reached(root: Any) -> Iterator[torch.Tensor]:
    """Every tensor reached from what torch loaded."""
    seen: dict[int, object] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if id(node) in seen or isinstance(node, (str, bytes, int, float, type)):
            continue
        seen[id(node)] = node
        if isinstance(node, torch.Tensor):
            if not node.is_quantized:  # tests/kinds has those, made here
                yield node
            stack.append(node.grad if node.is_leaf else None)
        elif isinstance(node, dict):
            stack.extend([*node.keys(), *node.values()])
        elif isinstance(node, (list, tuple, set, frozenset)):
            stack.extend(node)
        if hasattr(node, "__dict__"):
            stack.append(vars(node))


def content(tensor: torch.Tensor) -> tuple[object, ...]:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()


def expected(path: Path, container: str) -> Iterator[torch.Tensor]:
    if container == "safetensors":
        return iter(load_file(path).values())
    if container == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return iter(torch.jit.load(path, map_location="cpu").state_dict().values())
    return reached(loaded(path))


def loaded(path: Path) -> Any:
    """What torch loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sources that changed, of classes that are old
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=STUBBED)


@files
def test_opens_and_is_not_accused(path: Path) -> None:
    document = ckptkit.inspect(path)
    json.dumps(document, allow_nan=False)
    assert document["error"] is None
    assert document["trust"] in ("safe", "needs_trust")
    assert document["sections"] or document["kind"] == "other"


@files
def test_holds_what_torch_loads(path: Path) -> None:
    with ckptkit.open(path) as file:
        if file.checkpoint.origin.state_path == "constants":
            return  # of a frozen program; torch names none of them
        if file.format == "torchscript":
            entries = list(file.state_dict.values())
        else:
            nodes = walk([list(file.state_dict.everything.values()), file.rest, file.checkpoint.module])
            entries = [node for node in nodes if isinstance(node, TensorEntry)]
        # Identity is sharing: a tensor that stands in two places is one entry, and one tensor in torch.
        found = tensors({str(number): entry for number, entry in enumerate(entries)}, map_location="cpu")
        here = Counter(content(tensor) for tensor in found.values())
    there = Counter(content(tensor) for tensor in expected(path, file.format))
    # torch before 0.2 stored gradients along; torch today passes them over.
    assert set(there) <= set(here) if file.format == "torch-tar" else set(there) == set(here)


def weights(path: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The sections that hold weights, with what they hold."""
    with ckptkit.open(path) as file:
        # A frozen program has a model without tensors.
        sections = [section.path for section in file.sections if section.is_weights and section.tensors]
    for section in sections:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of quantized tensors
            state_dict = ckptkit.load_state_dict(path, section=section, map_location="cpu")
        if all(isinstance(value, torch.Tensor) and not value.is_quantized for value in state_dict.values()):
            yield section, state_dict


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if content(found[name]) != content(wanted[name])] == []


@files
def test_converts_to_pth(path: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.pth"
    with ckptkit.open(path) as file:
        is_program = file.format == "torchscript"
        if is_program and not file.state_dict.everything:  # frozen: constants without names
            with pytest.raises(ckptkit.RewriteError, match="none with names"):
                file.save(result)
            return
        state_dict = file.checkpoint.state_dict
        whole = state_dict.container if state_dict.is_module else None
        roots = [list(state_dict.everything.values()), None if is_program else file.rest, whole]
        entries = [node for node in walk(roots) if isinstance(node, TensorEntry)]
        held = tensors({str(number): entry for number, entry in enumerate(entries)}, map_location="cpu")
        wanted = Counter(content(tensor) for tensor in held.values())
        trusted, old = file.trust == "safe", file.format == "torch-tar"
    ckptkit.convert(path, result, map_location="cpu")
    found = Counter(content(tensor) for tensor in reached(loaded(result)))
    # A model's state_dict has no gradients; tied names are tensors of their own.
    assert set(found) <= set(wanted) if old else set(found) == set(wanted)
    if trusted:
        torch.load(result, weights_only=True)  # and no map_location
    # Once more, and nothing changes.
    again = tmp_path / "again.pth"
    ckptkit.convert(result, again, receipt=False)
    ckptkit.convert(again, result, receipt=False, force=True)
    assert result.read_bytes() == again.read_bytes()


@files
def test_converts_to_safetensors_and_shards(path: Path, tmp_path: Path) -> None:
    for number, (section, wanted) in enumerate(weights(path)):
        options: dict[str, Any] = {"section": section, "weights_only": True}
        single = tmp_path / f"{number}.safetensors"
        ckptkit.convert(path, single, **options)
        assert_same(ckptkit.load_state_dict(single), wanted)
        library = load_file(single)
        assert_same(library, {name: wanted[name] for name in library})
        for ending in (".safetensors", ".pth"):
            report = ckptkit.convert(path, tmp_path / f"{number}-in-parts{ending}", max_shard_size="1MB", **options)
            index = Path(report.details["destination"])
            sizes = [shard["nbytes"] for shard in report.details["plan"]["shards"]]
            largest = max(tensor.untyped_storage().nbytes() for tensor in wanted.values())
            assert all(nbytes <= max(10**6, largest + 10**4) for nbytes in sizes)
            back = ckptkit.load_state_dict(index, map_location="cpu")
            assert_same(back, wanted)
            assert list(back) == list(wanted) or not sizes
            ckptkit.convert(index, tmp_path / f"{number}-merged.pth", force=True)
            assert_same(ckptkit.load_state_dict(tmp_path / f"{number}-merged.pth", map_location="cpu"), wanted)


@files
def test_casts_as_torch_does(path: Path, tmp_path: Path) -> None:
    for number, (section, wanted) in enumerate(weights(path)):
        cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in wanted.items()}
        for ending in (".safetensors", ".pth"):
            result = tmp_path / f"{number}{ending}"
            ckptkit.convert(path, result, section=section, weights_only=True, dtype="bfloat16", map_location="cpu")
            assert_same(ckptkit.load_state_dict(result), cast)


@files
def test_values_that_are_not_plain_become_dense(path: Path, tmp_path: Path) -> None:
    dense = ckptkit.Densify()
    with ckptkit.open(path) as file:
        if file.format == "torchscript" or not file.state_dict.extra:
            return
        try:
            dense(file.checkpoint)
        except ckptkit.RewriteError:
            return  # of other people's classes
    if not dense.made:
        return
    ckptkit.convert(path, tmp_path / "dense.pth", densify=True, weights_only=True)
    found = ckptkit.load_state_dict(tmp_path / "dense.pth", map_location="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = ckptkit.load_state_dict(path, map_location="cpu")
        for name in dense.made:
            packed = name.removesuffix("weight") + "_packed_params._packed_params"
            value = wanted[name] if name in wanted else wanted[packed][0]
            assert content(found[name]) == content(value.dequantize() if value.is_quantized else value.to_dense())
