"""timm's models: how they are built, and what they take.

Source: ``timm/models/_factory.py`` (``create_model``) and ``_pretrained.py`` (``PretrainedCfg``) of timm 1.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from ckptkit.errors import VerifyError
from ckptkit.extras import require
from ckptkit.verifier.foreign import foreign
from ckptkit.verifier.inputs import Input
from ckptkit.verifier.references.arguments import literal, typed
from ckptkit.verifier.references.factory import Reference, close, made

__all__ = ["reference"]

_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
_DEFAULT_SIZE = (3, 224, 224)


def reference(name: str, args: Mapping[str, object]) -> Reference:
    """The model of this name, with or without the tag of its weights.

    Raises:
        VerifyError: there is none, or it is asked for with weights.
        MissingDependencyError: timm is not installed.
    """
    with foreign():
        require("timm")
        timm = importlib.import_module("timm")
    spec = f"timm:{name}"
    if not timm.is_model(name):  # names of a hub are none, and are never looked up
        raise VerifyError(f"timm has no model {name!r}{close(name.partition('.')[0], timm.list_models())}")
    for weights in _WEIGHTS:
        if literal(args.get(weights)):
            raise VerifyError(f"{spec}: a reference is built without pretrained weights; leave {weights} out")
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
