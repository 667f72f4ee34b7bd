"""The tree into which the trees of several ranks are combined: the first rank's, with values that only others have.

Only some ranks' files have two things: DTensors of a mesh of those ranks, such as experts or the layers of a pipeline's
stage, with the versions of their modules; and the optimizer state of flat parameters of which the others have nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from ckptkit.formats.distributed.placements import distributed
from ckptkit.pickling.inert import InertDict, Object, attributes, mapping_items, named_items, walk

__all__ = ["frame_of"]

_DEEPEST = 3
"""Nested dicts that are searched for tensors that only some ranks have."""


def frame_of(roots: Sequence[object], *, is_sharded: bool) -> tuple[object, set[str]]:
    """The first tree, with values that only others have in the state of an optimizer, and the keys of optimizers there.

    ``""``: the tree itself is one.  Only those count that have runs of flat parameters.
    """
    roots = [_with_all_parts(roots), *roots[1:]]
    if not is_sharded:
        return roots[0], set()
    if _is_optimizer(roots[0]):
        return _with_all_states(roots), {""}
    pairs = mapping_items(roots[0]) if isinstance(roots[0], InertDict) else None
    keys = {key for key, value in pairs or () if isinstance(key, str) and _is_optimizer(value)}
    if pairs is None or not keys:
        return roots[0], set()
    others = [dict(named_items(root)) for root in roots]
    wholes = {key: _with_all_states([other.get(key) for other in others]) for key in keys}
    return InertDict([(key, wholes.get(key, value) if isinstance(key, str) else value) for key, value in pairs]), keys


def _with_all_parts(nodes: Sequence[object], deep: int = _DEEPEST) -> object:
    """The first rank's tree, with DTensors that only other ranks have, in the dicts where they have them."""
    first = nodes[0]
    pairs = mapping_items(first)
    if (
        not pairs
        or not deep
        or not isinstance(first, (InertDict, Object))
        or (isinstance(first, Object) and first.args)
    ):
        return first
    known = {key: [value] for key, value in pairs if isinstance(key, str)}
    for node in nodes[1:]:
        for key, value in mapping_items(node) or ():
            if isinstance(key, str) and (key in known or distributed(value) is not None):
                known.setdefault(key, []).append(value)
    merged = {key: _with_all_parts(values, deep - 1) for key, values in known.items()}
    if len(merged) == len(pairs) and all(merged.get(key, value) is value for key, value in pairs):  # type: ignore[call-overload]
        return first
    whole = InertDict() if isinstance(first, InertDict) else copy(first)
    ours = [(key, merged.pop(key, value) if isinstance(key, str) else value) for key, value in pairs]
    whole.pairs = [*ours, *merged.items()]
    if isinstance(whole, Object):
        _add_versions(whole, nodes[1:])
    return whole


def _add_versions(whole: Object, nodes: Sequence[object]) -> None:
    """Put the module versions of other ranks beside those of a state_dict."""
    state = whole.state
    versions = state.get("_metadata") if isinstance(state, InertDict) else None
    if not isinstance(state, InertDict) or not isinstance(versions, Object) or mapping_items(versions) is None:
        return
    own = copy(versions)
    names = {key for key, _ in versions.pairs if isinstance(key, str)}
    own.pairs = [*versions.pairs]
    for node in nodes:
        theirs = attributes(node)
        for key, value in mapping_items(theirs.get("_metadata")) or () if theirs is not None else ():
            if isinstance(key, str) and key not in names:
                names.add(key)
                own.pairs.append((key, value))
    whole.state = InertDict([(key, own if key == "_metadata" else value) for key, value in state.pairs])


def _is_optimizer(node: object) -> bool:
    """Whether it is what an optimizer's own state_dict() gives, which has no distributed tensors."""
    is_one = isinstance(node, InertDict) and isinstance(node.get("state"), InertDict) and "param_groups" in node
    return is_one and not any(distributed(each) for each in walk(node))


def _with_all_states(optimizers: Sequence[object]) -> InertDict:
    """The first rank's, with the state of parameters that only another rank has."""
    first = optimizers[0]
    pairs: dict[object, object] = {}
    for each in optimizers:
        for key, value in mapping_items(each.get("state")) or () if isinstance(each, InertDict) else ():
            if isinstance(key, (int, str)):
                pairs.setdefault(key, value)
    state = InertDict(list(pairs.items()))
    return InertDict([(key, state if key == "state" else value) for key, value in mapping_items(first) or ()])
