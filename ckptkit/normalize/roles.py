"""Parameter or buffer: what the tensors of a model are to it."""

from __future__ import annotations

from typing import Literal

from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES

__all__ = ["Role", "tensor_role"]

Role = Literal["parameter", "buffer", "unknown"]
"""What a tensor is; ``"unknown"``: it is none of a model's."""

_BUFFER_NAMES = frozenset(
    {
        "running_mean", "running_var", "num_batches_tracked", "position_ids", "token_type_ids", "inv_freq",
        "relative_position_index", "relative_coords_table", "relative_position_bucket", "attn_mask", "causal_mask",
        "masked_bias", "anchor_grid", "anchors", "strides", "freqs_cis", "rope_cache", "cos_cached", "sin_cached",
        "pixel_mean", "pixel_std", "min_val", "max_val", "_float_tensor", "tril",
    }
)  # fmt: skip
"""Last segments of names that are buffers in the modules everybody uses: normalization, positions and masks
of transformers, anchors of detectors, quantization observers."""


def tensor_role(name: str, entry: TensorEntry, *, known: bool) -> tuple[Role, bool]:
    """Parameter or buffer, and whether that is inferred.

    Args:
        name: in the state_dict.
        entry: the tensor.
        known: whether the file says it (whole models do; a state_dict saves both alike, and then
            customary names and whole-number dtypes tell buffers).
    """
    if entry.is_parameter:
        return "parameter", False
    if known:
        return "buffer", False
    is_buffer = name.rpartition(".")[2] in _BUFFER_NAMES or DTYPES[entry.dtype].kind in ("int", "bool")
    return ("buffer" if is_buffer else "parameter"), True
