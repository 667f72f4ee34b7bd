"""Makes the index of known architectures: ``python tests/support/index_maker.py [LIBRARY] [--check]``.

Every model of the library is built without memory for its weights, as it is and with other values of the
arguments people give: the dimensions that follow from an argument, and how, come out of comparing.  With
``--check`` nothing is written; the exit code says whether the shipped index is what the library gives.

A ``quantized_`` model is built as it is before it is quantized: afterwards its weights are packed, and
no tensors by themselves.  Its names and shapes are then those of the plain model.
"""

from __future__ import annotations

import argparse
import binascii
import importlib
import inspect
import json
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import ckptkit.architectures
from ckptkit.architectures.index import LIBRARIES, SKETCH, Shapes, names_digest, shapes_digest, sketch, weights_of

__all__ = ["meta_model", "model_names", "rows"]

Built = Callable[[Mapping[str, object]], Shapes]

_CLASSES, _CHANNELS, _SIDE, _KEYPOINTS = 1009, 2, 448, 11
"""Steps of the arguments.  The first is a prime no other dimension's step is a multiple of."""

_PROBES: Mapping[str, tuple[tuple[tuple[str, int], ...], ...]] = {
    "torchvision": ((("num_classes", _CLASSES),), (("num_keypoints", _KEYPOINTS),), (("image_size", _SIDE),)),
    "timm": (
        (("num_classes", _CLASSES), ("in_chans", _CHANNELS)),
        (("num_classes", _CLASSES),),
        (("in_chans", _CHANNELS),),
        (("img_size", _SIDE),),
    ),
}
"""Arguments and their steps; those in one tuple are tried together, which is half the work."""

_VARIANTS: Mapping[str, tuple[Mapping[str, object], ...]] = {
    "torchvision": ({"aux_loss": True}, {"aux_logits": False}),
    "timm": ({"num_classes": 1000},),  # some have no head unless they are given classes
}
"""Arguments that add or remove modules, in some models."""


class _EmptyOnMeta(TorchFunctionMode):
    """Weights on the meta device, and all else real: some models compute while they are built."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def model_names(library: str) -> list[str]:
    """The models of a library, sorted; those that are the same as others come last."""
    module = importlib.import_module({"torchvision": "torchvision.models"}.get(library, library))
    return sorted(module.list_models(), key=lambda name: (name.startswith("quantized_"), name))


def _undrawn(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """Values that are drawn at random, where there are none: slow, and for nothing."""
    return tensor


def meta_model(library: str, name: str, args: Mapping[str, object]) -> nn.Module:
    """A model whose weights are on the meta device.

    Raises:
        Exception: whatever the library raises for arguments the model does not take.
    """
    if library == "torchvision":
        builder = importlib.import_module("torchvision.models").get_model_builder(name)
        added: dict[str, object] = {"weights": None}
        if "weights_backbone" in inspect.signature(builder).parameters:
            added["weights_backbone"] = None
        if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
            added["init_weights"] = False  # drawn very slowly, and with a warning
    else:
        create = importlib.import_module("timm").create_model
        added = {"model_name": name}
        builder = create
    drawn = dict.fromkeys(("normal_", "uniform_", "erfinv_"), _undrawn)
    with warnings.catch_warnings(), mock.patch.multiple(torch.Tensor, **drawn):
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = builder(**added, **args)
        except (NotImplementedError, RuntimeError):
            with _EmptyOnMeta():
                model = builder(**added, **args)
    result: nn.Module = model
    return result


def rows(library: str, names: Sequence[str] | None = None) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The lines of the index, with their sketches."""
    for name in model_names(library) if names is None else names:

        def built(args: Mapping[str, object], name: str = name) -> Shapes:
            state = meta_model(library, name, args).state_dict()
            return weights_of((key, tuple(t.shape)) for key, t in state.items() if isinstance(t, torch.Tensor))

        seen = set()
        for base in ({}, *_VARIANTS[library]):
            shapes = _tried(built, base)
            if shapes is None:
                if not base:
                    print(f"{library}:{name} cannot be built", file=sys.stderr)
                continue
            if tuple(shapes) in seen:
                continue
            seen.add(tuple(shapes))
            yield _line(name, base, shapes, _free(built, base, shapes, _PROBES[library])), sketch(shapes)


def _line(name: str, base: Mapping[str, object], shapes: Shapes, free: dict[str, Any]) -> dict[str, Any]:
    masked = {(place[0], place[1]) for facts in free.values() for place in facts.get("linear") or facts["square"]}
    head = {place[0] for place in free.get("num_classes", {}).get("linear", ())}
    trunk = [key for place, key in enumerate(shapes) if place not in head]
    trunk_shapes = list(shapes.values())
    for tensor, axis in masked:
        trunk_shapes[tensor] = (*trunk_shapes[tensor][:axis], -1, *trunk_shapes[tensor][axis + 1 :])
    return {
        "name": name,
        "args": base,
        "tensors": len(shapes),
        "names": names_digest(shapes),
        "shapes": shapes_digest([*shapes.values()], masked),
        "free": free,
        "head": sorted({key.rpartition(".")[0] for place, key in enumerate(shapes) if place in head}),
        "trunk": names_digest(trunk) if head else "",
        "trunk_shapes": shapes_digest([s for place, s in enumerate(trunk_shapes) if place not in head]) if head else "",
    }


def _tried(built: Built, args: Mapping[str, object]) -> Shapes | None:
    """The shapes; ``None`` where the model does not take the arguments, whatever it says to that."""
    try:
        return built(args)
    except Exception:  # the libraries' own: TypeError, ValueError, AssertionError, RuntimeError
        return None


def _free(
    built: Built, base: Mapping[str, object], shapes: Shapes, probes: Sequence[Sequence[tuple[str, int]]]
) -> dict[str, Any]:
    """The arguments that decide dimensions, with where and how."""
    found: dict[str, Any] = {}
    for steps in probes:
        if any(name in found for name, _ in steps):
            continue
        first = _tried(built, {**base, **dict(steps)})
        second = _tried(built, {**base, **{name: 2 * step for name, step in steps}}) if first else None
        if first is None or second is None or not tuple(shapes) == tuple(first) == tuple(second):
            continue
        dims: dict[str, list[tuple[int, ...]]] = {}
        for tensor, sizes in enumerate(zip(shapes.values(), first.values(), second.values(), strict=True)):
            if len({len(shape) for shape in sizes}) > 1:
                break
            changed = [(axis, *at) for axis, at in enumerate(zip(*sizes, strict=True)) if len(set(at)) > 1]
            for axis, size, one, two in changed:
                solved = _solved(steps, size, one, two)
                if solved is None:
                    dims.clear()
                    break
                name, *numbers = solved
                dims.setdefault(name, []).append((tensor, axis, *numbers))
            else:
                continue
            break
        else:
            for name, _ in steps:
                places = dims.get(name, [])
                if places and len({default for *_, default in places}) == 1:
                    form = "square" if name in ("image_size", "img_size") else "linear"
                    found[name] = {"default": places[0][-1], form: [list(place[:-1]) for place in places]}
    return found


def _solved(steps: Sequence[tuple[str, int]], size: int, one: int, two: int) -> tuple[str, int, int, int] | None:
    """The argument a dimension follows from, the two numbers of how, and the argument's default."""
    for name, step in steps:
        if name in ("image_size", "img_size"):
            patches, odd = divmod(two - one, 3)  # (2 s / a) ** 2 - (s / a) ** 2
            side = isqrt(max(patches, 0))
            if odd or not side or side * side != patches or step % side:
                continue
            a, b = step // side, one - patches
            root = isqrt(max(size - b, 0))
            if b >= 0 and root * root == size - b:
                return name, a, b, root * a
            continue
        a, inexact = divmod(two - one, step)
        if not inexact and a > 0:
            b = one - a * step
            default, inexact = divmod(size - b, a)
            if not inexact and default > 0:
                return name, a, b, default
    return None


def _written(library: str) -> tuple[str, str]:
    """The two files' text."""
    lines, sketches = [], []
    for line, hashes in rows(library):
        lines.append(json.dumps(line) + "\n")
        packed = struct.pack(f"<{SKETCH}I", *hashes, *[0] * (SKETCH - len(hashes)))
        sketches.append(binascii.b2a_base64(packed).decode())
    module = importlib.import_module(library)
    return json.dumps({"made_from": f"{library} {module.__version__}"}) + "\n" + "".join(lines), "".join(sketches)


def main() -> int:
    """Write the index, or check it."""
    parser = argparse.ArgumentParser(description="Make the index of known architectures.")
    parser.add_argument("library", nargs="?", choices=LIBRARIES, default="torchvision")
    parser.add_argument("--check", action="store_true", help="compare with the shipped index; write nothing")
    options = parser.parse_args()
    folder = Path(ckptkit.architectures.__file__).parent
    fine = True
    for text, ending in zip(_written(options.library), ("jsonl", "sketches"), strict=True):
        path = folder / f"{options.library}.{ending}"
        if not options.check:
            path.write_text(text, encoding="utf-8")
            continue
        old, new = (path.read_text(encoding="utf-8").splitlines(), text.splitlines())
        start = ending == "jsonl"  # the version is not compared
        differing = sorted({*old[start:]} ^ {*new[start:]})
        fine = fine and not differing
        print(f"{path.name}: {len(differing)} lines differ", *(line[:100] for line in differing[:20]), sep="\n  ")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
