"""Selecting parts of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ckptkit.checkpoint import STATE_DICT, Checkpoint
from ckptkit.errors import RewriteError

__all__ = ["WeightsOnly"]


@dataclass(frozen=True, slots=True)
class WeightsOnly:
    """Keep the state_dict alone: no optimizer, scheduler, epoch or arguments.

    Raises (when applied):
        RewriteError: there is no state_dict to keep.
    """

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        if not checkpoint.state_dict.everything:
            raise RewriteError("there is no state_dict to keep")
        return checkpoint.replace(rest=STATE_DICT)
