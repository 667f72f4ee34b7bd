"""Pickled ``nn.Module`` objects, walked without their classes, and which of their tensors are parameters.

A whole model's state_dict is what ``Module.state_dict()`` would give (torch/nn/modules/module.py
``_save_to_state_dict``): parameters that are not ``None``, buffers less
``_non_persistent_buffers_set``, then children, depth first.  Anything else that a class adds in Python
(``get_extra_state``) cannot be known from the file, with one exception: torch's own quantized modules, which pack their
weights, by rules in `_packed_values`.

A pickle's content for a module (`module_state`) is its ``__dict__``, in one of these places:

- the state that BUILD applies, or a member of it where ``__getstate__`` gave a tuple
- an argument of the function that rebuilds it: ``torch.fx`` (``reduce_graph_module(dict, code)`` and similar) and
  classes with their own ``__reduce__``; StyleGAN's (``torch_utils/persistence.py``
  ``_reconstruct_persistent_obj(meta)``) have it in ``meta["state"]``
- nowhere: ``torch.compile`` saves ``OptimizedModule(module, context)``, and quantized convolutions a tuple of their
  settings and tensors (torch/ao/nn/quantized/modules/conv.py ``__getstate__``); objects of TorchScript
  (``__torch__.Net``) in a file without their code, as libtorch's ``pickle_save`` writes them, have attributes alone, of
  which a tensor that requires a gradient is a parameter and another a buffer. Their ``__dict__`` is combined here.

Wrappers of a model leave prefixes in names.
`MODULE` and ``_forward_module`` are treated as a wrapper's only at the beginning of a name: after it, ``module`` may be
a model's own attribute (``mlp_module.module.weight``), and only the model can tell (`inner_module_rules`).  The others
belong to no model: they are a wrapper's wherever they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Literal

from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, LimitError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.inert import Global, InertDict, InertSet, Object, mapping_items, named_items, states, tensors_in
from ckptkit.report import share_of
from ckptkit.shell import command_line
from ckptkit.startup import pattern

__all__ = [
    "BUFFER_NAMES",
    "MODULE",
    "MODULE_MARKS",
    "Role",
    "bound_method",
    "inner_module_rules",
    "inner_module_told",
    "known_versions",
    "may_be_wrapped",
    "module_state",
    "persistent",
    "role_of",
    "tensor_role",
    "unwrapped",
    "unwrapped_in_digests",
    "unwrapped_path",
    "walk_module",
    "wrapper_of",
    "wrapper_prefixes",
]

Role = Literal["parameter", "buffer", "unknown"]
"""The role of a tensor; ``"unknown"``: it is not part of a model."""

BUFFER_NAMES = frozenset(
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
        known: whether the file states it (whole models do; a state_dict saves both alike, and then customary names and
            whole-number dtypes identify buffers).
    """
    return role_of(entry.dtype, entry.is_parameter, name.rpartition(".")[2] in BUFFER_NAMES, known=known)


def role_of(dtype: str, is_parameter: bool, is_buffer_name: bool, *, known: bool) -> tuple[Role, bool]:
    """As `tensor_role`, of what it depends on; the last is whether the name's last segment is in `BUFFER_NAMES`."""
    if is_parameter:
        return "parameter", False
    if known:
        return "buffer", False
    return ("buffer" if is_buffer_name or DTYPES[dtype].kind in ("int", "bool") else "parameter"), True


MODULE_MARKS = ("_parameters", "_buffers", "_modules")
"""What every module's ``__dict__`` has, since torch 0.1."""

_QUANTIZED = (
    "torch.ao.nn.quantized.",
    "torch.ao.nn.intrinsic.quantized.",
    "torch.ao.nn.sparse.quantized.",
    "torch.nn.quantized.",
    "torch.nn.intrinsic.quantized.",
)
"""Where torch has kept its quantized modules: since 1.13, and before."""

_CONV_STATE = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed",
    "output_padding", "groups", "padding_mode", "weight", "bias", "scale", "zero_point", "training",
)  # fmt: skip
"""The content of a quantized convolution's state tuple, in order."""

_CONV_SAVED = ("weight", "bias", "scale", "zero_point")
"""The part of it that ``state_dict()`` saves, in order; a missing bias as ``None``."""


def module_state(node: object) -> InertDict | None:
    """The ``__dict__`` of a pickled ``nn.Module``; ``None``: it is not one."""
    if not isinstance(node, Object):
        return None
    state = node.state
    if isinstance(state, InertDict):
        return state if _is_module_dict(state) else _script_state(state) if _is_script_module(node) else None
    for part in (*states(node), *(node.args if node.how == "reduce" else ())):
        if isinstance(part, InertDict) and _is_module_dict(part):
            return part
    if not isinstance(node.cls, Global):
        return None
    if (kept := persistent(node)) is not None:
        inside = kept.get("state")
        return inside if isinstance(inside, InertDict) and _is_module_dict(inside) else None
    if node.cls.name == "OptimizedModule" and node.cls.module.startswith("torch._dynamo.") and node.args:
        return _as_module_dict([("_orig_mod", node.args[0])]) if module_state(node.args[0]) is not None else None
    if isinstance(state, tuple) and len(state) == len(_CONV_STATE) and _is_quantized(node, "Conv"):
        return _as_module_dict([], list(zip(_CONV_STATE, state, strict=True)))
    return None


def persistent(node: Object) -> InertDict | None:
    """The arguments of StyleGAN's loader for an object: class name, source text and state; ``None``: it is another."""
    is_one = isinstance(node.cls, Global) and node.cls.name == "_reconstruct_persistent_obj" and len(node.args) == 1
    return node.args[0] if is_one and isinstance(node.args[0], InertDict) else None


def _is_module_dict(state: InertDict) -> bool:
    return all(mark in state for mark in MODULE_MARKS)


def _is_script_module(node: object) -> bool:
    if not isinstance(node, Object) or not isinstance(node.cls, Global) or not isinstance(node.state, InertDict):
        return False
    return node.cls.module.partition(".")[0] == "__torch__" and "training" in node.state


def _script_state(state: InertDict) -> InertDict:
    parameters, buffers, modules = (list[tuple[object, object]]() for _ in MODULE_MARKS)
    settings: list[tuple[object, object]] = []
    for pair in state.pairs:
        value = pair[1]
        if isinstance(value, TensorEntry):
            (parameters if value.requires_grad else buffers).append(pair)
        else:
            (modules if _is_script_module(value) else settings).append(pair)
    own = zip(MODULE_MARKS, map(InertDict, (parameters, buffers, modules)), strict=True)
    return InertDict([*own, *settings])


def _as_module_dict(
    children: list[tuple[object, object]], settings: list[tuple[object, object]] | None = None
) -> InertDict:
    own = [("_parameters", InertDict()), ("_buffers", InertDict()), ("_modules", InertDict(children))]
    return InertDict([*own, *(settings or [])])


def _is_quantized(node: object, name: str = "") -> bool:
    """Whether an object is one of torch's quantized modules, with a class name that begins with ``name``."""
    cls = node.cls if isinstance(node, Object) else None
    return isinstance(cls, Global) and cls.module.startswith(_QUANTIZED) and cls.name.startswith(name)


def bound_method(node: object) -> tuple[object, str] | None:
    """The module and the name of a method of it: ``getattr(module, "state_dict")``, as Python pickles one."""
    if not isinstance(node, Object) or node.how != "reduce" or len(node.args) != 2:
        return None
    owner, name = node.args
    if node.class_name not in ("builtins.getattr", "__builtin__.getattr") or not isinstance(name, str):
        return None
    return (owner, name) if module_state(owner) is not None else None


def walk_module(module: object) -> Iterator[tuple[str, object]]:
    """Names and values of a pickled module's state_dict, in the order ``state_dict()`` gives them.

    A child that contains tensors but is pickled as no module is, is given whole, under its own name.

    Raises:
        CorruptError: a module is its own descendant.
        LimitError: more entries, or longer names, than any model has.
    """
    for prefix, node, state in _modules(module):
        if state is None:
            if any(tensors_in(node)):
                yield prefix[:-1], node
            continue
        for name, value in _saved_values(node, state):
            yield prefix + name, value


def known_versions(module: object) -> dict[str, object]:
    """The entries of torch ``_metadata`` that matter and that the file lets us know, by module path.

    ``state_dict()`` writes each class's ``_version``, which is in the code, not in the file.  For torch's own classes
    whose loading depends on it, the object's content shows which version it was.
    """
    versions: dict[str, object] = {}
    for prefix, node, state in _modules(module):
        version = None if state is None else _known_version(node, state)
        if version is not None:
            versions[prefix[:-1]] = InertDict([("version", version)])
    return versions


def _known_version(node: object, state: InertDict) -> int | None:
    cls = node.cls if isinstance(node, Object) else None
    if not isinstance(cls, Global) or not cls.module.startswith("torch."):
        return None
    if _is_quantized(node):
        own = state.get("version")  # the dynamic ones remember it
        packs = "_packed_params" in state or cls.name.startswith("Linear")
        return own if isinstance(own, int) else 3 if packs and "sparse" not in cls.module else None
    buffers = [key for key, _ in mapping_items(state.get("_buffers")) or []]
    return 2 if "Norm" in cls.name and "num_batches_tracked" in buffers else None


def wrapper_prefixes(module: object) -> list[tuple[str, str]]:
    """The wrappers a model was saved in, outermost first: class name, and the prefix each puts before every name."""
    found: list[tuple[str, str]] = []
    node = module
    while isinstance(node, Object) and len(found) < DEFAULT_LIMITS.module_depth:
        state = module_state(node)
        below = named_items(state.get("_modules")) if state is not None else []
        name = node.class_name.rpartition(".")[2]
        prefix = wrapper_of(f"{below[0][0]}.x") if len(below) == 1 else ""
        if not prefix or (prefix == "module." and "DataParallel" not in name):
            break
        found.append((node.class_name, prefix))
        node = below[0][1]
    return found


_MET_AGAIN = 1000
"""Modules that are in a second place, after which a model's size is found out first: each level may double it."""


def _modules(
    root: object, known: dict[int, tuple[int, int, int, int]] | None = None
) -> Iterator[tuple[str, object, InertDict | None]]:
    """Every module, depth first: its prefix, node and ``__dict__`` (``None``: it is pickled as no module is).

    Args:
        root: the model.
        known: given: modules are gone into once, and by id, what each adds with all below: to the count, to the
            characters for each of its prefix, to the characters beside, to the depth.  Errors are the same.
    """
    count = characters = weight = 0
    above: dict[int, tuple[int, int, int]] = {}
    met: set[int] = set()
    again = 0
    stack: list[tuple[str, object, list[tuple[str, object]] | None]] = [("", root, None)]
    while stack:
        prefix, node, left = stack.pop()
        if left is not None:
            before = above.pop(id(node))
            if known is not None:
                heavier, depth = weight - before[1], max((known[id(child)][3] for _, child in left), default=0)
                longer = characters - before[2] - heavier * len(prefix)
                known[id(node)] = (count - before[0], heavier, longer, depth + 1)
            continue
        state = module_state(node)
        if state is None:
            if known is not None:
                known[id(node)] = (0, 0, 0, 0)
            yield prefix, node, None
            continue
        if known is not None and id(node) in known:
            more, heavier, longer, depth = known[id(node)]
            longer += heavier * len(prefix)
            if (
                count + more <= DEFAULT_LIMITS.entries
                and characters + longer <= DEFAULT_LIMITS.pickle_nbytes
                and len(above) + depth <= DEFAULT_LIMITS.module_depth
            ):
                count, weight, characters = count + more, weight + heavier, characters + longer
                continue
        if len(above) >= DEFAULT_LIMITS.module_depth:
            raise LimitError("modules inside modules", limit=DEFAULT_LIMITS.module_depth, actual=len(above) + 1)
        if id(node) in above:
            raise CorruptError(f"module {prefix.rstrip('.') or 'root'!r} contains itself")
        again += id(node) in met
        if again == _MET_AGAIN and known is None:
            for _ in _modules(root, {}):
                pass
        met.add(id(node))
        above[id(node)] = (count, weight, characters)
        below = [(f"{prefix}{name}.", child) for name, child in named_items(state.get("_modules")) if child is not None]
        values = sum(len(mapping_items(state.get(mark)) or ()) for mark in ("_parameters", "_buffers"))
        count += 1 + values
        weight += values + len(below)
        characters += len(prefix) * values + sum(len(path) for path, _ in below)
        _check_size(count, characters)
        yield prefix, node, state
        stack.append((prefix, node, below))
        stack.extend((path, child, None) for path, child in reversed(below))


def _check_size(count: int, characters: int) -> None:
    if count > DEFAULT_LIMITS.entries:
        raise LimitError("modules and tensors in a model", limit=DEFAULT_LIMITS.entries, actual=count)
    if characters > DEFAULT_LIMITS.pickle_nbytes:
        raise LimitError("characters of names in a model", limit=DEFAULT_LIMITS.pickle_nbytes, actual=characters)


def _saved_values(node: object, state: InertDict) -> list[tuple[str, object]]:
    """A module's own parameters and buffers, less those that are ``None`` or not persistent."""
    values: list[tuple[str, object]] = []
    for name, value in named_items(state.get("_parameters")):
        if isinstance(value, TensorEntry) and not value.is_parameter:
            values.append((name, replace(value, is_parameter=True)))
        elif value is not None:
            values.append((name, value))
    transient = _members(state.get("_non_persistent_buffers_set"))
    values += [(n, v) for n, v in named_items(state.get("_buffers")) if v is not None and n not in transient]
    values += _packed_values(node, state)
    return values


def _packed_values(node: object, state: InertDict) -> list[tuple[str, object]]:
    """The values that a quantized module's ``_save_to_state_dict`` adds; scale and zero point as numbers.

    Packed weights are objects of C++ classes, whose state is a tuple of the unpacked tensors and the class's name. A
    class that is not known here, but contains such an object, gives it whole.
    """
    if _is_quantized(node, "Conv") and "kernel_size" in state and "weight" in state:
        return [(name, state.get(name)) for name in _CONV_SAVED]
    values: list[tuple[str, object]] = []
    if _is_quantized(node, "QFunctional") or (_is_quantized(node) and "_packed_params" in _names(state["_modules"])):
        values += [(name, state[name]) for name in ("scale", "zero_point") if name in state]
    for name, value in state.pairs:
        if isinstance(name, str) and isinstance(value, Object) and value.class_name == "torch.ScriptObject":
            unpacked = value.state[0] if isinstance(value.state, tuple) and len(value.state) == 2 else None
            if name == "_packed_params" and isinstance(unpacked, tuple) and "dtype" in state:
                values += [("dtype", state["dtype"]), (name, unpacked)]
            elif name == "_packed_weight" and "dtype" in state:
                values += [("dtype", state["dtype"]), (name, _embedding_weight(value))]
            else:
                values.append((name, value))
    return values


def _embedding_weight(packed: Object) -> object:
    """The quantized tensor that an embedding's packed weight was made from."""
    state = packed.state[0] if isinstance(packed.state, tuple) and packed.state else None
    tensors = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    return tensors[0] if isinstance(tensors, list) and tensors else packed


def _names(node: object) -> set[str]:
    return {name for name, _ in named_items(node)}


def _members(node: object) -> set[str]:
    """The strings in a set, however the pickle builds it."""
    if isinstance(node, InertSet):
        return {member for member in node.members if isinstance(member, str)}
    if isinstance(node, Object) and node.args and isinstance(node.args[0], (list, tuple)):
        return {member for member in node.args[0] if isinstance(member, str)}
    return set()


MODULE = "module"
"""The attribute DataParallel, DistributedDataParallel and others keep the wrapped model under."""

_COMPILED = "_orig_mod"
"""The attribute ``torch.compile`` keeps the original module under; it wraps submodules too."""

_ANYWHERE = frozenset({_COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""And those of FSDP and of activation checkpointing (torch/distributed/fsdp, ``checkpoint_wrapper``)."""

_LEADING = frozenset({MODULE, "_forward_module"})
"""Lightning keeps a wrapped LightningModule under the second."""

_WRAPPERS = _ANYWHERE | _LEADING

_INNER_MODULE = pattern(rf"\.{MODULE}(?=\.)")

_FEW = 3
"""Modules with an inner `MODULE` that get a rule each."""


def unwrapped(name: str) -> str:
    """The name without wrappers.

    Segments of wrappers go in any order and nesting: leading ones, and those of torch's own wrappers anywhere
    (``model._orig_mod.layer``).  The last segment is never taken away.
    """
    return _without(name, _ANYWHERE, _LEADING) if _may_be_wrapped(name) else name


def _may_be_wrapped(name: str) -> bool:
    """Whether a closer look is worth its time: most names of most models are bare."""
    return name.startswith(("module.", "_forward_module.")) or "_orig_mod." in name or "_wrapped_module." in name


def may_be_wrapped(names: str) -> bool:
    """Whether any of many names needs that look; each is after a line break."""
    return any(mark in names for mark in ("\nmodule.", "\n_forward_module.", "_orig_mod.", "_wrapped_module."))


def unwrapped_in_digests(name: str) -> str:
    """The name as content digests and manifests have it: as `unwrapped` knew it first, so that old ones hold."""
    if not name.startswith(("module.", "_orig_mod.")) and "._orig_mod." not in name:
        return name
    return _without(name, {_COMPILED}, {MODULE})


def _without(name: str, anywhere: Collection[str], leading: Collection[str]) -> str:
    *parents, last = name.split(".")
    parents = [part for part in parents if part not in anywhere]
    kept = 0
    while kept < len(parents) and parents[kept] in leading:
        kept += 1
    return ".".join([*parents[kept:], last])


def unwrapped_path(path: str) -> str:
    """A module's path without wrappers; ``""``: it is a wrapper of the root."""
    # It does not end in a tensor's name; a stand-in keeps the last segment apart.
    return unwrapped(path + ".x" if path else "x")[:-2]


def wrapper_of(name: str) -> str:
    """What wrappers put into a name: the prefix, else one that is further in; ``""``: nothing."""
    if not _may_be_wrapped(name):
        return ""
    parents = name.split(".")[:-1]
    leading = list(takewhile(_WRAPPERS.__contains__, parents))
    return "".join(f"{part}." for part in leading or [part for part in parents if part in _ANYWHERE][:1])


def inner_module_rules(names: Sequence[str]) -> list[str]:
    r"""The rules ``REGEX=>REPLACEMENT`` that remove `MODULE` after the beginning of names; empty if there are none.

    Args:
        names: without wrappers: ``features.module.0.weight`` gives ``^features\.module\.=>features.``.
    """
    carrying = [name for name in names if _INNER_MODULE.search(name)]
    parents = dict.fromkeys(name.partition(f".{MODULE}.")[0] for name in carrying)
    is_simple = all(re.fullmatch(r"[\w.]+", parent) for parent in parents)
    if len(parents) > _FEW or not is_simple or any(len(_INNER_MODULE.findall(name)) > 1 for name in carrying):
        return [f"{_INNER_MODULE.pattern}=>"]
    return [rf"^{re.escape(parent)}\.{MODULE}\.=>{parent}." for parent in parents]


def inner_module_told(names: Sequence[str]) -> tuple[str, list[str]] | None:
    """The finding about names with `MODULE` after their beginning, and options to remove it; ``None``: no such names.

    No options are given where two names would become one.
    """
    carrying = [name for name in names if _INNER_MODULE.search(name)]
    if not carrying:
        return None
    told = (
        f"{share_of(len(carrying), len(names), 'name', 'has', 'have')} `{MODULE}.` after the beginning, such as "
        f"{carrying[0]!r:.200}: DataParallel around a part of the model, or an attribute with that name"
    )
    if len({_INNER_MODULE.sub("", name) for name in names}) < len(names):
        return f"{told}; without it two names would be the same", []
    options = [option for rule in inner_module_rules(names) for option in ("--rename", rule)]
    return f"{told}; {command_line(options)} removes it", options
