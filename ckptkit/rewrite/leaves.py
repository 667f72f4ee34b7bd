"""Replacing tensors and storages wherever they stand in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ckptkit.checkpoint import Checkpoint, StateDict
from ckptkit.normalize.sections import is_plain
from ckptkit.pickling.inert import Object, TreeMap, mapping_shell, walk

__all__ = ["nodes", "with_leaves"]


def with_leaves(
    checkpoint: Checkpoint,
    leaf: Callable[[object], object],
    *,
    change: Callable[[Object], None] | None = None,
    module: bool = False,
) -> Checkpoint:
    """The checkpoint with every `TensorEntry` and bare `Storage` replaced; what is shared stays shared.

    Args:
        checkpoint: its weights, what hangs on their mapping, and everything beside them are gone through.
        leaf: from a tensor or storage to what takes its place; called once for each.
        change: called with the copy of each object, which it may change.
        module: whether the module that the weights were walked from is gone through too.  It is not written.
    """
    mapped = TreeMap(leaf)
    state_dict = checkpoint.state_dict.with_values(mapped)
    shell, rest = mapped(_hanging(state_dict)), mapped(checkpoint.rest)
    made = mapped(checkpoint.module) if module else checkpoint.module
    if change is not None:
        others = [value for value in state_dict.everything.values() if not is_plain(value)]
        for node in walk([others, shell, rest, made if module else None]):
            if isinstance(node, Object):
                change(node)
    if shell is not None:
        state_dict = StateDict(
            state_dict.everything, versions=state_dict.versions, container=shell, is_module=state_dict.is_module
        )
    return checkpoint.replace(state_dict=state_dict, rest=rest, module=made)


def nodes(checkpoint: Checkpoint) -> Iterator[object]:
    """Every node that a writer may write; a plain tensor of the state_dict once for each of its places."""
    values = checkpoint.state_dict.everything.values()
    yield from filter(is_plain, values)
    yield from walk(
        [
            [value for value in values if not is_plain(value)],
            _hanging(checkpoint.state_dict),
            checkpoint.rest,
        ]
    )


def _hanging(state_dict: StateDict) -> object:
    """What is written around the values: the module they are of, or what hangs on their mapping."""
    return state_dict.container if state_dict.is_module else mapping_shell(state_dict.container)
