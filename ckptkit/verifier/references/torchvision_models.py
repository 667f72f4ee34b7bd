"""torchvision's models: how they are built, and what each family takes as input.

Sources: ``torchvision/models/**`` (0.17 to 0.29); the family is the sub-package the builder lies in.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ckptkit.errors import VerifyError
from ckptkit.extras import require
from ckptkit.verifier.inputs import Input
from ckptkit.verifier.references.factory import Reference, close, made

__all__ = ["reference"]

_CLASSIFICATION_SIDE = 224
_INCEPTION_SIDE = 299
_DETECTION_SIDE = 320
_FRAMES = 16
_FLOW_SIDE = 128
"""RAFT refuses sides under 128, or not divisible by 8."""


def reference(name: str, args: dict[str, object]) -> Reference:
    """The model of this name.

    Raises:
        VerifyError: there is none, or it is asked for with weights.
        MissingDependencyError: torchvision is not installed.
    """
    require("torchvision")
    models = importlib.import_module("torchvision.models")
    spec = f"torchvision:{name}"
    if name not in models.list_models():
        raise VerifyError(f"torchvision has no model {name!r}{close(name, models.list_models())}")
    for weights in ("weights", "weights_backbone", "pretrained", "pretrained_backbone"):
        if args.get(weights):
            raise VerifyError(f"{spec}: a reference is built without pretrained weights; leave {weights} out")
    builder = models.get_model_builder(name)
    added: dict[str, object] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        added["weights_backbone"] = None
    if _takes_init_weights(name):
        added["init_weights"] = False
    return Reference(
        spec=spec,
        label=spec,
        args=args,
        make=lambda: made(builder, {**added, **args}, spec),
        inputs=_inputs(builder.__module__, name, args, models.get_model_weights(name).DEFAULT),
    )


def _inputs(module: str, name: str, args: Mapping[str, object], weights: Any) -> tuple[Input, ...]:
    """What a model of this name takes.

    Args:
        module: the module its builder lies in.
        name: its name.
        args: the arguments it was built with.
        weights: its default weights entry, which knows the crop its transforms make; never loaded.
    """
    family = module.removeprefix("torchvision.models.").partition(".")[0]
    if family == "detection":
        return (Input(shape=(3, _DETECTION_SIDE, _DETECTION_SIDE), is_list=True),)
    if family == "optical_flow":
        return (Input(shape=(1, 3, _FLOW_SIDE, _FLOW_SIDE)),) * 2
    if family == "video":
        return (Input(shape=(1, 3, _FRAMES, *_video_crop(weights))),)
    side = args.get("image_size")  # vision transformers are built for one size
    if not isinstance(side, int):
        side = _INCEPTION_SIDE if "inception" in name else _CLASSIFICATION_SIDE
    return (Input(shape=(1, 3, side, side)),)


def _video_crop(weights: Any) -> tuple[int, int]:
    crop = weights.transforms().crop_size
    return (crop[0], crop[-1]) if isinstance(crop, (list, tuple)) else (crop, crop)


def _takes_init_weights(name: str) -> bool:
    """Whether the builder takes ``init_weights``: these draw their random weights very slowly, and warn of it."""
    return name.removeprefix("quantized_") in ("googlenet", "inception_v3")
