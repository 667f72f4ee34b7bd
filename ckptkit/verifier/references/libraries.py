"""Models of timm, torchvision and transformers: how they are built without weights, and their inputs.

timm: ``timm/models/_factory.py`` (``create_model``) and ``_pretrained.py`` (``PretrainedCfg``) of timm 1.0.

torchvision: ``torchvision/models/**`` (0.17 to 0.29); the family is the sub-package the builder is in, and decides what
a model takes.

transformers: a model is built from its configuration only.
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
from ckptkit.verifier.foreign import error_text, foreign
from ckptkit.verifier.inputs import Input
from ckptkit.verifier.references.factory import Reference, close, literal, made, typed

__all__ = ["timm_reference", "torchvision_reference", "transformers_reference"]

_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
_DEFAULT_SIZE = (3, 224, 224)


def timm_reference(name: str, args: Mapping[str, object]) -> Reference:
    """The model of this name, with or without the tag of its weights.

    Raises:
        VerifyError: there is none, or it was requested with weights.
        MissingDependencyError: timm is not installed.
    """
    with foreign():
        require("timm")
        timm = importlib.import_module("timm")
    spec = f"timm:{name}"
    if not timm.is_model(name):  # names on a hub do not count, and are never looked up
        raise VerifyError(f"timm has no model {name!r}{close(name.partition('.')[0], timm.list_models())}")
    for weights in _WEIGHTS:
        if literal(args.get(weights)):
            raise VerifyError(f"{spec}: a reference is built without pretrained weights; omit {weights}")
    values = typed(timm.create_model, args, spec)
    size = getattr(timm.get_pretrained_cfg(name), "input_size", None) or _DEFAULT_SIZE
    given = {key: value for key, value in values.items() if key not in _WEIGHTS}
    return Reference(
        spec=spec,
        label=spec,
        args=values,
        make=lambda: made(timm.create_model, {"model_name": name, "pretrained": False, **given}, spec),
        inputs=(Input(shape=(1, *_input_size(size, values))),),
    )


def _input_size(size: tuple[int, int, int], args: Mapping[str, object]) -> tuple[int, ...]:
    """Channels, height and width: the configuration's, where no argument says otherwise."""
    channels, side = args.get("in_chans"), args.get("img_size")
    first = channels if isinstance(channels, int) else size[0]
    if isinstance(side, (tuple, list)) and len(side) == 2:
        return (first, *side)
    return (first, side, side) if isinstance(side, int) else (first, *size[1:])


_CLASSIFICATION_SIDE = 224
_INCEPTION_SIDE = 299
_DETECTION_SIDE = 320
_FRAMES = 16
_SWIN3D_SIDE = 112
"""Two windows a side: a fourth of the 224 its weights were trained on; other video models are built for their crop."""
_FLOW_SIDE = 128
"""RAFT refuses sides under 128, or not divisible by 8."""
_FLOW_UPDATES = 12
"""RAFT gives the flow after each; ``forward`` has this as its default."""
_CLASSES = {"segmentation": 21, "video": 400}
"""Of the builders, without weights; 1000 in all other families."""


def torchvision_reference(name: str, args: Mapping[str, object]) -> Reference:
    """The model of this name.

    A quantizable model is the one in floating point, whose weights any checkpoint holds as plain tensors.

    Raises:
        VerifyError: there is none, or it was requested with weights or quantized.
        MissingDependencyError: torchvision is not installed.
    """
    with foreign():
        require("torchvision")
        models = importlib.import_module("torchvision.models")
    spec = f"torchvision:{name}"
    if name not in models.list_models():
        raise VerifyError(f"torchvision has no model {name!r}{close(name, models.list_models())}")
    builder = models.get_model_builder(name)
    for weights in ("weights", "weights_backbone", "pretrained", "pretrained_backbone"):
        if literal(args.get(weights)):
            raise VerifyError(f"{spec}: a reference is built without pretrained weights; omit {weights}")
    args = typed(builder, args, spec)
    if args.get("quantize"):
        raise VerifyError(
            f"{spec}: quantize=True gives 8-bit weights packed in objects, which ckptkit never builds from a file; "
            "omit it to verify the floating-point checkpoint that they are made from"
        )
    added: dict[str, object] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        added["weights_backbone"] = None
    if _takes_init_weights(name):
        added["init_weights"] = False
    family = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    inputs = _torchvision_inputs(family, name, args, models.get_model_weights(name).DEFAULT)
    return Reference(
        spec=spec,
        label=spec,
        args=args,
        make=lambda: made(builder, {**added, **args}, spec),
        inputs=inputs,
        outputs=_outputs(family, name, args, inputs[0].shape),
    )


def _torchvision_inputs(family: str, name: str, args: Mapping[str, object], weights: Any) -> tuple[Input, ...]:
    """The inputs of a model with this name.

    Args:
        family: the sub-package its builder is in.
        name: its name.
        args: the arguments it was built with.
        weights: its default weights entry, which knows the crop its transforms make; never loaded.
    """
    if family == "detection":
        return (Input(shape=(3, _DETECTION_SIDE, _DETECTION_SIDE), is_list=True),)
    if family == "optical_flow":
        return (Input(shape=(1, 3, _FLOW_SIDE, _FLOW_SIDE)),) * 2
    if family == "video":
        crop = (_SWIN3D_SIDE, _SWIN3D_SIDE) if name.startswith("swin3d") else _video_crop(weights)
        return (Input(shape=(1, 3, _FRAMES, *crop)),)
    side = args.get("image_size")  # vision transformers are built for one size
    if not isinstance(side, int):
        side = _INCEPTION_SIDE if "inception" in name else _CLASSIFICATION_SIDE
    return (Input(shape=(1, 3, side, side)),)


def _outputs(
    family: str, name: str, args: Mapping[str, object], shape: tuple[int, ...]
) -> Mapping[str, tuple[int | None, ...]]:
    """The outputs of a model with this name for its input, in eval mode; detectors find any number of things."""
    height, width = shape[-2:]
    if family == "optical_flow":
        return {str(step): (1, 2, height, width) for step in range(_FLOW_UPDATES)}
    if family == "detection":
        found: dict[str, tuple[int | None, ...]] = {"0.boxes": (None, 4), "0.labels": (None,), "0.scores": (None,)}
        if name.startswith("maskrcnn"):
            found["0.masks"] = (None, 1, height, width)
        if name.startswith("keypointrcnn"):
            points = _size(args.get("num_keypoints", 17))
            found |= {"0.keypoints": (None, points, 3), "0.keypoints_scores": (None, points)}
        return found
    classes = _size(args.get("num_classes") or _CLASSES.get(family, 1000))
    if family == "segmentation":
        maps = (1, classes, height, width)
        return {"out": maps, "aux": maps} if args.get("aux_loss") else {"out": maps}
    return {"": (1, classes)}


def _size(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _video_crop(weights: Any) -> tuple[int, int]:
    crop = weights.transforms().crop_size
    return (crop[0], crop[-1]) if isinstance(crop, (list, tuple)) else (crop, crop)


def _takes_init_weights(name: str) -> bool:
    """Whether the builder takes ``init_weights``: these draw their random weights very slowly, and warn of it."""
    return name.removeprefix("quantized_") in ("googlenet", "inception_v3")


_TOKENS = 16
_SIDE = 224
_SAMPLES = 16_000
"""A second of sound, for models that take the waveform."""


def transformers_reference(name: str, args: Mapping[str, object]) -> Reference:
    """The model of a configuration.

    Args:
        name: a folder with a ``config.json``, or a model type, such as ``"bert"``.
        args: settings of the configuration to change.

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
        spec=spec,
        label=spec,
        args=values,
        make=make,
        inputs=tuple(_transformers_inputs(transformers, config, model_class)),
    )


def _config(transformers: Any, name: str, args: Mapping[str, object], spec: str) -> tuple[Any, Mapping[str, object]]:
    """The configuration, and the settings of it that were given, typed."""
    folder = os.path.expanduser(name)
    types = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    is_folder = os.path.isfile(os.path.join(folder, "config.json"))
    if not is_folder and name not in types:
        raise VerifyError(
            f"{spec}: there is no folder {name!r} with a config.json, and transformers has no model type with that name"
            f"{close(name, list(types))}; names on a hub are not looked up"
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
        raise VerifyError(f"{spec}: the configuration cannot be read: {error_text(error)}") from error


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


def _transformers_inputs(transformers: Any, config: Any, model_class: Any) -> Iterator[Input]:
    """The inputs of the model; empty if the configuration does not say."""
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
        yield Input(shape=pixels, name="pixel_values")  # text and images, compared with each other
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
