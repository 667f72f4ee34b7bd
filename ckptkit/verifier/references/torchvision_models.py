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
from ckptkit.verifier.foreign import foreign
from ckptkit.verifier.inputs import Input
from ckptkit.verifier.references.arguments import literal, typed
from ckptkit.verifier.references.factory import Reference, close, made

__all__ = ["reference"]

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


def reference(name: str, args: Mapping[str, object]) -> Reference:
    """The model of this name.

    A quantizable model is the one in floating point, whose weights any checkpoint holds as plain tensors.

    Raises:
        VerifyError: there is none, or it is asked for with weights or quantized.
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
            raise VerifyError(f"{spec}: a reference is built without pretrained weights; leave {weights} out")
    args = typed(builder, args, spec)
    if args.get("quantize"):
        raise VerifyError(
            f"{spec}: quantize=True gives 8-bit weights packed in objects, which are never made from a file; leave it "
            "out to verify the checkpoint in floating point that it is made from"
        )
    added: dict[str, object] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        added["weights_backbone"] = None
    if _takes_init_weights(name):
        added["init_weights"] = False
    family = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    inputs = _inputs(family, name, args, models.get_model_weights(name).DEFAULT)
    return Reference(
        spec=spec,
        label=spec,
        args=args,
        make=lambda: made(builder, {**added, **args}, spec),
        inputs=inputs,
        outputs=_outputs(family, name, args, inputs[0].shape),
    )


def _inputs(family: str, name: str, args: Mapping[str, object], weights: Any) -> tuple[Input, ...]:
    """What a model of this name takes.

    Args:
        family: the sub-package its builder lies in.
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
    """What a model of this name gives for its input, in eval mode; detectors find any number of things."""
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
