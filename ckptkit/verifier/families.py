"""torchvision's model families: what their models take as input, and what they want told when built.

Imported only when a reference names torchvision; imports nothing of it itself.
Sources: ``torchvision/models/**`` (0.17 to 0.29); the family is the sub-package the builder lies in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["default_inputs", "takes_init_weights"]

_CLASSIFICATION_SIDE = 224
_INCEPTION_SIDE = 299
_DETECTION_SIDE = 320
_FRAMES = 16
_FLOW_SIDE = 128
"""RAFT refuses sides under 128, or not divisible by 8."""


def default_inputs(module: str, name: str, args: Mapping[str, object], weights: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of the positional inputs a model of this name takes.

    Args:
        module: the module its builder lies in.
        name: its name.
        args: the arguments it was built with.
        weights: its default weights entry, which knows the crop its transforms make; never loaded.
    """
    family = module.removeprefix("torchvision.models.").partition(".")[0]
    if family == "detection":
        return ((3, _DETECTION_SIDE, _DETECTION_SIDE),)
    if family == "optical_flow":
        return ((1, 3, _FLOW_SIDE, _FLOW_SIDE),) * 2
    if family == "video":
        return ((1, 3, _FRAMES, *_video_crop(weights)),)
    side = args.get("image_size")  # vision transformers are built for one size
    if not isinstance(side, int):
        side = _INCEPTION_SIDE if "inception" in name else _CLASSIFICATION_SIDE
    return ((1, 3, side, side),)


def _video_crop(weights: Any) -> tuple[int, int]:
    crop = weights.transforms().crop_size
    return (crop[0], crop[-1]) if isinstance(crop, (list, tuple)) else (crop, crop)


def takes_init_weights(name: str) -> bool:
    """Whether the builder takes ``init_weights``: these draw their random weights very slowly, and warn of it."""
    return name.removeprefix("quantized_") in ("googlenet", "inception_v3")
