"""Tied tensors: what is written of two names for one tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ckptkit.checkpoint import Checkpoint, TensorEntry, tied_groups
from ckptkit.errors import RewriteError
from ckptkit.report import count_of, listed

__all__ = ["Tied", "TiedPolicy"]

TiedPolicy = Literal["alias", "duplicate", "error"]

_MAX_LISTED = 5
"""Groups named in a message, and names of each."""


@dataclass(frozen=True, slots=True)
class Tied:
    """Say what becomes of tied tensors of the state_dict.

    Args:
        policy: ``"alias"`` keeps them tied, where the container can.  ``"duplicate"`` gives every name
            but the first a storage of its own, which is written again; tensors that share a storage
            without being tied go on sharing it.  ``"error"`` refuses them.

    Raises:
        RewriteError: there is no such policy; (when applied) it is ``"error"`` and there are tied tensors.
    """

    policy: TiedPolicy

    def __post_init__(self) -> None:
        if self.policy not in get_args(TiedPolicy):
            raise RewriteError(
                f"no policy {self.policy!r} for tied tensors; there is {', '.join(get_args(TiedPolicy))}"
            )

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        groups = [] if self.policy == "alias" else tied_groups(checkpoint.state_dict)
        if not groups:
            return checkpoint
        if self.policy == "error":
            names = listed(list(map(_listed, groups)), _MAX_LISTED, between="; ")
            raise RewriteError(
                f"{count_of(len(groups), 'tensor', 'has', 'have')} several names: {names}; write them as one ('alias') "
                "or as copies ('duplicate')"
            )
        again = {name for names in groups for name in names[1:]}
        state_dict = checkpoint.state_dict
        everything = {name: _copied(value) if name in again else value for name, value in state_dict.everything.items()}
        return checkpoint.replace(state_dict=state_dict.holding(everything, state_dict.versions))


def _listed(names: list[str]) -> str:
    return listed([f"{name!r:.100}" for name in names], _MAX_LISTED, between=" = ")


def _copied(value: object) -> object:
    """The tensor over a storage of its own: a new record of the same bytes."""
    return replace(value, storage=replace(value.storage)) if isinstance(value, TensorEntry) else value
