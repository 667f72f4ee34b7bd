"""What stands in a file beside the weights, and goes where they go only if the container can hold it."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict
from ckptkit.dtypes import DTYPES
from ckptkit.normalize.sections import brief, step
from ckptkit.pickling.inert import Object, mapping_items
from ckptkit.report import count_of, listed

__all__ = ["EMBEDDINGS", "beside_weights", "discarded_text", "held_instead", "holding_suffix"]

EMBEDDINGS = "string_to_param"
"""The key under which textual inversions have their embedding, beside a name and a step (AUTOMATIC1111's web UI)."""

_OTHER = "other objects"


def beside_weights(checkpoint: Checkpoint) -> list[str]:
    """The keys of training state and whatever else is in the file beside the selected state_dict."""
    if checkpoint.rest is STATE_DICT or checkpoint.origin.is_program:  # what is in one means nothing to torch.load
        return []
    pairs = mapping_items(checkpoint.rest)
    if pairs is None:
        return [_OTHER]
    return [step(key) for key, value in pairs if value is not STATE_DICT]


def discarded_text(values: Sequence[object]) -> str:
    """What a pickle makes and drops (`Checkpoint.discarded`), in a message: ``"a call of logging.info"``."""
    shown = [f"a call of {node.class_name:.100}" if isinstance(node, Object) else brief(node) for node in values[:5]]
    return listed(shown, 4, total=len(values))


def holding_suffix(state_dict: StateDict) -> str:
    """The ending of a file that can hold these weights: ``.safetensors``, or ``.pth`` where that cannot."""
    plain = len(state_dict) == len(state_dict.everything)
    return ".safetensors" if plain and all(DTYPES[e.dtype].safetensors for e in state_dict.values()) else ".pth"


def held_instead(checkpoint: Checkpoint) -> str:
    """What a file holds whose weights have no names."""
    tensors = sum(section.tensors for section in checkpoint.sections)
    if not tensors:
        return "it holds no tensor under a name"
    own = any(finding.code == "own-script-state" for finding in checkpoint.findings)
    why = ": its modules save a state of their own making" if own else ""
    return f"it holds {count_of(tensors, 'tensor')} without names of a model's{why}"
