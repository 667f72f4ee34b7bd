"""The outline of a node of an inert tree, without going below its content.

The terms in which `ckptkit.normalize.sections` judges a tree: what leads from a node to others, what can be read as
named values, and what belongs to an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.normalize.modules import bound_method, module_state
from ckptkit.pickling.inert import (
    ABSENT,
    ITSELF,
    SCALARS,
    Global,
    InertDict,
    Object,
    attributes,
    is_global,
    mapping_items,
    states,
)
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.startup import pattern

__all__ = [
    "CUSTOMARY_KEYS",
    "MOMENTS",
    "PARAMETERS",
    "are_data",
    "are_moments",
    "is_graph",
    "is_optimizer",
    "is_packed",
    "is_sliced",
    "is_substantial",
    "named_values",
    "parts",
    "tensor_at_a_glance",
    "weights_at_sight",
]

CUSTOMARY_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "model.state_dict",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "model_dict",
    "model_weights",
    "model_params",
    "net_state_dict",
    "network_weights",
    "network_state_dict",
    "module_state_dict",
)
"""Where training scripts put the weights, most common first."""

PARAMETERS = frozenset({"weight", "bias", "kernel", "scale", "embedding", "w", "b", "gamma", "beta"})
"""Names of parameters in torch's modules, flax's and haiku's."""

_TELLING = frozenset({
    "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_diff", "exp_inf", "momentum_buffer",
    "square_avg", "grad_avg", "sqr_avg", "acc_delta", "step",
})  # fmt: skip
MOMENTS = _TELLING | {"max_exp_avg_sq", "neg_grad_or_diff", "sum", "step_size", "prev", "eta", "mu", "ax"}
"""Keys of one parameter's optimizer state (torch.optim, fastai, Adafactor, Adan); some of them identify it."""

_DATA_WORDS = frozenset({
    "adj", "attention", "attr", "batch", "data", "edge", "feature", "features", "id", "ids", "image", "images", "index",
    "input", "inputs", "label", "labels", "mask", "masks", "node", "nodes", "num", "output", "outputs", "pixel", "pos",
    "ptr", "sample", "samples", "target", "targets", "test", "text", "token", "tokens", "train", "type", "val", "valid",
    "validation", "values", "x", "y", "z",
})  # fmt: skip
_WORD = pattern(r"[a-z]+")


_MORE_THAN_ANY = 1 << 60
"""Tensors that no file has: surely weights, whatever they are compared with."""


_GLANCE = 32
"""Nodes looked at in one glance, and members of one node."""


def tensor_at_a_glance(node: object) -> bool | None:
    """Whether there is a tensor at or below a node; ``None``: it takes a longer look to know."""
    near, complete = [node], True
    for below in near:  # which grows on the way
        if isinstance(below, (TensorEntry, Storage)):
            return True
        inside: list[object] = []
        if isinstance(below, (list, tuple)):
            inside = list(below[:_GLANCE])
            complete = complete and len(below) <= _GLANCE
        elif isinstance(below, (InertDict, Object)):
            inside = [part for pair in below.pairs[:_GLANCE] for part in pair]
            complete = complete and len(below.pairs) <= _GLANCE
            if isinstance(below, Object):
                inside += [below.args, below.items, below.kwargs, below.state, below.cls]
            inside += below.effects
        elif isinstance(below, Global):
            inside += below.effects
        elif not isinstance(below, SCALARS) and below not in (ABSENT, ITSELF):
            complete = False
        if len(near) < _GLANCE:
            near += [part for part in inside if not isinstance(part, SCALARS)]
        else:
            complete = complete and not inside
    return False if complete else None


def weights_at_sight(node: object) -> int:
    """Tensors in something like a state_dict; more than any if it is a module or an optimizer."""
    if is_tensor_like(node):
        return 0
    if module_state(node) is not None or bound_method(node) is not None or is_optimizer(node):
        return _MORE_THAN_ANY
    pairs = named_values(node) or []
    tensors = sum(is_tensor_like(value) for _, value in pairs)
    named = all(isinstance(key, str) for key, _ in pairs)
    return tensors if named and 2 * tensors >= len(pairs) and not are_moments(pairs) else 0


def is_optimizer(node: object) -> bool:
    """Whether it is an optimizer, or an optimizer's state_dict."""
    pairs = mapping_items(node)
    if pairs is None:
        state = attributes(node)
        pairs = state.pairs if state is not None else []
    keys = {key for key, _ in pairs if isinstance(key, str)}
    return "state" in keys and ("param_groups" in keys or "hypers" in keys)


def are_moments(pairs: list[tuple[object, object]]) -> bool:
    """Whether the tensors are what an optimizer keeps for one parameter."""
    if len(pairs) > 2 * len(MOMENTS):
        return False
    keys = {key for key, value in pairs if is_tensor_like(value)}
    return keys <= MOMENTS and not keys.isdisjoint(_TELLING)


def are_data(names: Iterable[object]) -> bool:
    """Whether tensors are called as those of data sets are (``x``, ``edge_index``, ``train_labels``).

    No module would have all of its parameters called so.
    """
    words: list[str] = []
    for name in names:
        words = _WORD.findall(name.lower()) if isinstance(name, str) else []
        if not words or not _DATA_WORDS.issuperset(words):
            return False
    return bool(words)


def is_graph(pairs: list[tuple[object, object]]) -> bool:
    """Whether the names are those of a graph, as data sets of PyG hold them."""
    keys = [key for key, _ in pairs]
    marked = "edge_index" in keys or "adj_t" in keys
    return marked and not any(isinstance(key, str) and "." in key for key in keys)


def is_sliced(node: object) -> bool:
    """Whether it is a data set as PyTorch Geometric saves it: ``(data, slices[, class])``.

    The second says for each of the first's values where each sample begins (``InMemoryDataset.save`` in
    ``torch_geometric/data/in_memory_dataset.py``).
    """
    if not isinstance(node, tuple) or len(node) not in (2, 3):
        return False
    slices, data = mapping_items(node[1]), mapping_items(node[0])
    if not slices or module_state(node[0]) is not None or not isinstance(node[0], (InertDict, Object)):
        return False
    bounds = [value for _, value in slices if isinstance(value, TensorEntry)]
    if len(bounds) < len(slices) or any(len(bound.shape) != 1 or bound.dtype != "int64" for bound in bounds):
        return False
    return data is None or {key for key, _ in slices if isinstance(key, str)} <= {
        key for key, value in data if isinstance(key, str) and is_tensor_like(value)
    }


def is_substantial(value: object) -> bool:
    """Whether a model would have it as a parameter: no plain tensor, or one of numbers that are not whole."""
    if not isinstance(value, TensorEntry):
        return not isinstance(value, SCALARS)
    return bool(value.shape) and DTYPES[value.dtype].kind not in ("int", "bool")


def is_packed(name: str, node: object) -> bool:
    """Whether torch's quantized modules store it instead of tensors.

    A tuple of weight and bias (``torch/ao/nn/quantized/modules/linear.py`` ``LinearPackedParams``), or an object of one
    of torch's C++ classes (``dynamic/modules/rnn.py`` there, ``PackedParameter``).
    """
    if isinstance(node, tuple):
        return name.endswith("._packed_params") and any(map(is_tensor_like, node))
    return "." in name and isinstance(node, Object) and is_global(node.cls, "torch", "ScriptObject")


def named_values(node: object) -> list[tuple[object, object]] | None:
    """The pairs of a possible state_dict: a mapping of any class, or a list of (name, value) pairs.

    ``None``: it is neither, or has two pairs of one name.
    """
    pairs = mapping_items(node)
    if pairs is not None:
        return pairs
    if isinstance(node, Object):
        return node.pairs or None
    if not isinstance(node, (list, tuple)) or not node:
        return None
    pair_type, names = type(node[0]), set()
    if pair_type not in (list, tuple):
        return None
    pairs = []
    for item in node:
        if type(item) is not pair_type or len(item) != 2 or not isinstance(item[0], str) or item[0] in names:
            return None
        names.add(item[0])
        pairs.append((item[0], item[1]))
    return pairs


def parts(node: object) -> list[tuple[object, object]]:
    """The content of a node, each with its key: the keys of a mapping, the indices of a sequence.

    Of an object these are its attributes; beside them its items, and what it was made from, by position.
    """
    pairs = mapping_items(node)
    if pairs is not None:
        return pairs
    if isinstance(node, (list, tuple)):
        # A list of ten million numbers is passed over, not copied.
        return [(index, part) for index, part in enumerate(node) if not isinstance(part, SCALARS)]
    if not isinstance(node, Object) or is_tensor_like(node):
        return []
    filled: list[tuple[object, object]] = []
    for index, part in enumerate(states(node)):
        filled += part.pairs if isinstance(part, InertDict) else [(index, part)]
    return [*enumerate(node.args), *enumerate(node.items), *node.pairs, *filled]
