"""The module's weights in DeepSpeed's folders: in the model file, or in a file for each layer of a pipeline.

A layer's file (``PipelineModule.save_state_dict`` in ``deepspeed/runtime/pipe/module.py``) has the layer's own names.
In the model they begin with its number; those of a layer that several places share, with ``tied_modules.`` and its key,
which no file says: it is known by its names and shapes.  A place where a function is applied to such a layer, as an
output layer is to an embedding's weight, has no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ckptkit.checkpoint import TensorEntry
from ckptkit.errors import CorruptError, UnsupportedError
from ckptkit.formats.distributed.deepspeed_parts import File, Parts
from ckptkit.formats.distributed.zero import named
from ckptkit.report import count_of

__all__ = ["layers_of", "modules_of", "shape_in_module", "tensor_parallel"]

_LAYER = re.compile(r"layer_(\d{1,7})(?:-model_(\d{1,7}))?-model_states\.pt", re.ASCII)

_TIED = "tied_modules."
"""What names of a pipeline begin with that belong to a layer which several places share."""


def tensor_parallel(which: str) -> UnsupportedError:
    """What is raised where the tensors themselves are split."""
    return UnsupportedError(
        f"its tensors are split over tensor-parallel ranks ({which}), and the files do not say how: ckptkit does not "
        "put them together"
    )


def layers_of(parts: Parts, names: Sequence[str]) -> dict[int, File]:
    """The files of a pipeline's layers, by their numbers."""
    found: dict[int, File] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is not None:
            if int(match[2] or 0):
                raise tensor_parallel(name)
            found[int(match[1])] = parts.read(name)
    return dict(sorted(found.items()))


def modules_of(
    first: File, layers: Mapping[int, File], masters: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, dict[str, object]]]:
    """The module's state_dict with the file that it is from; of a pipeline those of its layers, by names in the model.

    A layer that several places share has its values under ``tied_modules``: by names and shapes, since no file says it.
    """
    if not layers:
        yield first.name, named(first.own.get("module"))
        return
    tied: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, master in masters.items():
        if name.startswith(_TIED) and name.count(".") > 1:
            key, _, own = name.removeprefix(_TIED).partition(".")
            tied.setdefault(key, {})[own] = master.shape
    for number, file in layers.items():
        prefix = f"{number}."
        shapes = {name: value.shape for name, value in file.own.items() if isinstance(value, TensorEntry)}
        if shapes and not any(prefix + name in masters for name in shapes):
            keys = [key for key, own in tied.items() if own.items() <= shapes.items()]
            if len(keys) == 1:
                prefix = f"{_TIED}{keys[0]}."
        yield file.name, {prefix + name: value for name, value in file.own.items()}


def shape_in_module(name: str, numel: int, model: File, layers: Mapping[int, File]) -> tuple[int, ...]:
    """The shape of a weight of so many elements.

    Raises:
        CorruptError: the module has no such weight.
    """
    number, _, own = name.partition(".")
    if name.startswith(_TIED):
        own = name.removeprefix(_TIED).partition(".")[2]
        found = [file.own.get(own) for file in layers.values()]
    elif number.isdecimal() and int(number) in layers:
        found = [layers[int(number)].own.get(own)]
    else:
        found = [named(model.own.get("module")).get(name)]
    shape = next((each.shape for each in found if isinstance(each, TensorEntry) and each.numel == numel), None)
    if shape is None:
        raise CorruptError(f"the module has no weight {name} of {count_of(numel, 'element')}", where=model.name)
    return shape
