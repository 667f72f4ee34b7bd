"""transformers' models: built from a configuration alone, and what they take.

A folder's ``config.json`` names the class under ``architectures``; without that it is the bare model of its type.
Nothing is downloaded, and code that comes with a configuration (``auto_map``) is never run.

Sources: ``transformers/models/auto/configuration_auto.py``, ``transformers/modeling_utils.py`` and
``transformers/conversion_mapping.py`` (5.x); the names of sizes are those the configurations share.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ckptkit.errors import VerifyError
from ckptkit.extras import require
from ckptkit.verifier.foreign import foreign, told
from ckptkit.verifier.inputs import Input
from ckptkit.verifier.references.arguments import typed
from ckptkit.verifier.references.factory import Reference, close, made

__all__ = ["reference"]

_TOKENS = 16
_SIDE = 224
_SAMPLES = 16_000
"""A second of sound, for models that take the waveform."""


def reference(name: str, args: Mapping[str, object]) -> Reference:
    """The model of a configuration.

    Args:
        name: a folder with a ``config.json``, or a model type, such as ``"bert"``.
        args: settings of the configuration that are to be others.

    Raises:
        VerifyError: there is neither, or the configuration cannot be read.
        MissingDependencyError: transformers is not installed.
    """
    with foreign():
        require("transformers")
        transformers = importlib.import_module("transformers")
    spec = f"transformers:{name}"
    config, values = _config(transformers, name, args, spec)
    model_class = _class(transformers, config)
    # Both set the dtype that the configuration names; the class alone would not.
    build = transformers.AutoModel.from_config if model_class is None else model_class._from_config

    def make() -> nn.Module:
        return _renaming(made(lambda: build(config), {}, spec))

    return Reference(
        spec=spec, label=spec, args=values, make=make, inputs=tuple(_inputs(transformers, config, model_class))
    )


def _config(transformers: Any, name: str, args: Mapping[str, object], spec: str) -> tuple[Any, Mapping[str, object]]:
    """The configuration, and the settings of it that were given, typed."""
    folder = os.path.expanduser(name)
    types = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    is_folder = os.path.isfile(os.path.join(folder, "config.json"))
    if not is_folder and name not in types:
        raise VerifyError(
            f"{spec}: there is no folder {name!r} with a config.json, and transformers has no model type of that name"
            f"{close(name, list(types))}; names of a hub are not looked up"
        )

    def read(**settings: object) -> Any:
        auto = transformers.AutoConfig
        if is_folder:
            return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
        return auto.for_model(name, **settings)

    try:
        config = read()
        values = typed(type(config), args, spec)
        unknown = next((key for key in values if not hasattr(config, key)), None)
        if unknown is not None:
            raise VerifyError(f"{spec}: its configuration has no {unknown!r}{close(unknown, list(config.to_dict()))}")
        return (read(**values) if values else config), values
    except VerifyError:
        raise
    except Exception as error:
        raise VerifyError(f"{spec}: the configuration cannot be read: {told(error)}") from error


def _class(transformers: Any, config: Any) -> Any:
    """The class that ``architectures`` names, if it is a model of transformers'."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def _renaming(model: nn.Module) -> nn.Module:
    """The model, which also loads the names that released checkpoints have where transformers has others by now.

    Only names: what ``from_pretrained`` merges or splits (the experts of a mixture) is not made here.
    """
    try:
        mapping = importlib.import_module("transformers.conversion_mapping")
        core = importlib.import_module("transformers.core_model_loading")
    except ImportError:  # older ones rename nothing, or do so by themselves
        return model
    renamings = [each for each in mapping.get_model_conversion_mapping(model) if isinstance(each, core.WeightRenaming)]
    known = frozenset(model.state_dict())

    def rename(module: nn.Module, state: dict[str, Any], *rest: object) -> None:
        for name in [name for name in state if name not in known]:
            new, _ = core.rename_source_key(name, renamings, [])
            if new in known and new not in state:
                state[new] = state.pop(name)

    if renamings:
        # Of torch's own use, and public only since 2.5.
        model._register_load_state_dict_pre_hook(rename, with_module=True)  # type: ignore[no-untyped-call]
    return model


def _inputs(transformers: Any, config: Any, model_class: Any) -> Iterator[Input]:
    """What the model takes; nothing where the configuration does not say."""
    if model_class is None:
        model_class = transformers.MODEL_MAPPING.get(type(config), None)
        if isinstance(model_class, tuple):
            model_class = model_class[0]
    main = getattr(model_class, "main_input_name", None)
    parameters = inspect.signature(model_class.forward).parameters if model_class is not None else {}
    ids = _ids(config)
    shapes = {"input_ids": (1, ids[0]), "pixel_values": _pixels(config), **_sound(config)}
    shape = shapes.get(str(main))
    if shape is None or (main == "input_ids" and not ids[1]):
        return
    yield Input(shape=shape, name=main, below=ids[1] if main == "input_ids" else None)
    pixels = shapes["pixel_values"]
    if main != "pixel_values" and "return_loss" in parameters and "pixel_values" in parameters and pixels:
        yield Input(shape=pixels, name="pixel_values")  # text and images, held against each other
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters and ids[1]:
        yield Input(shape=(1, ids[0]), name="decoder_input_ids", below=ids[1])


def _ids(config: Any) -> tuple[int, int | None]:
    """How many token ids fit, and the number all are below."""
    text = config.get_text_config()
    positions = next(filter(None, (_int(text, key) for key in ("max_position_embeddings", "n_positions"))), _TOKENS)
    return min(_TOKENS, positions), _int(text, "vocab_size")


def _pixels(config: Any) -> tuple[int, ...] | None:
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", None)
    if side is None and _int(vision, "num_channels"):
        side = _SIDE  # convolutions alone take any
    height, width = side if isinstance(side, (list, tuple)) and len(side) == 2 else (side, side)
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    frames = _int(vision, "num_frames")
    return (1, *((frames,) if frames else ()), _int(vision, "num_channels") or 3, height, width)


def _sound(config: Any) -> dict[str, tuple[int, ...]]:
    """Spectrograms, of the length a model is built for, or a waveform."""
    bins, positions, length = (_int(config, key) for key in ("num_mel_bins", "max_source_positions", "max_length"))
    shapes: dict[str, tuple[int, ...]] = {}
    if bins and positions:
        shapes["input_features"] = (1, bins, 2 * positions)
    if bins and length and not positions:
        shapes["input_values"] = (1, length, bins)
    elif getattr(config, "conv_stride", None) and not bins:
        shapes["input_values"] = (1, _SAMPLES)
    return shapes


def _int(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None
