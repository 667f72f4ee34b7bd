"""Real checkpoints of other people: all of them open, and hold what torch says they hold.

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

FOLDER = os.environ.get("CKPTKIT_CORPUS", "")
FILES = sorted(path for path in Path(FOLDER).iterdir() if path.is_file()) if FOLDER else []

pytestmark = pytest.mark.skipif(not FOLDER, reason="no folder of other people's checkpoints is named (CKPTKIT_CORPUS)")

files = pytest.mark.parametrize("path", FILES or [Path("-")], ids=lambda path: path.name)


class Stub:
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

    def forward(self) -> None:
        """Models that give another class's method to an object name it."""

    def append(self, value: object) -> None:
        self.__dict__["items"].append(value)

    def extend(self, values: list[object]) -> None:
        self.__dict__["items"].extend(values)


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    def find_class(self, module: str, name: str) -> Any:
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sources that changed, of classes that are old
        if container == "torchscript":
            return iter(torch.jit.load(path, map_location="cpu").state_dict().values())
        return reached(torch.load(path, map_location="cpu", weights_only=False, pickle_module=STUBBED))


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
