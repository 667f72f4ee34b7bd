"""What stands in a file beside the weights, and goes where they go only if the container can hold it."""

from __future__ import annotations

from ckptkit.checkpoint import STATE_DICT, Checkpoint
from ckptkit.normalize.sections import step
from ckptkit.pickling.inert import mapping_items

__all__ = ["beside_weights"]

_OTHER = "other objects"


def beside_weights(checkpoint: Checkpoint) -> list[str]:
    """The keys of training state and whatever else is in the file beside the selected state_dict."""
    if checkpoint.rest is STATE_DICT or checkpoint.origin.is_program:  # what is in one means nothing to torch.load
        return []
    pairs = mapping_items(checkpoint.rest)
    if pairs is None:
        return [_OTHER]
    return [step(key) for key, value in pairs if value is not STATE_DICT]
