"""The meaning of a name in a pickle for anyone who executes it.

Four verdicts, from which `ckptkit.checkpoint.Checkpoint.trust` follows:

- ``torch``: what torch's own weights-only loader runs (``torch/_weights_only_unpickler.py``
  ``_get_allowed_globals``): rebuild functions, storages, dtypes, tensor classes
- ``allowed``: plain containers and scalars
- ``dangerous``: names that run code, import, open or reach out (`ckptkit.pickling.dangerous`), and
  calls that do so by their arguments (`ckptkit.pickling.calls`).  One makes a file *hostile*.
- ``unknown``: all else, neither accused nor vouched for.  One makes a file *needs_trust*: classes of
  ``torch.nn`` and of the user, but also code that honest files carry (FX graphs, TorchScript).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ckptkit.checkpoint import GRAVITY, GlobalUse, Storage, Verdict
from ckptkit.dtypes import BY_STORAGE_CLASS, DTYPES
from ckptkit.pickling.dangerous import is_dangerous, is_kept_code
from ckptkit.pickling.inert import SCALARS, Global, children, is_bare_leaf, mapping_items
from ckptkit.startup import pattern

__all__ = ["assess", "global_uses", "merge_uses", "with_places"]

_REBUILD = (
    "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy", "_rebuild_meta_tensor_no_storage",
    "_rebuild_nested_tensor", "_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_qtensor",
    "_rebuild_sparse_csr_tensor", "_rebuild_sparse_tensor", "_rebuild_tensor", "_rebuild_tensor_v2",
    "_rebuild_tensor_v3", "_rebuild_wrapper_subclass", "_rebuild_xla_tensor",
)  # fmt: skip
"""Functions of ``torch/_utils.py``, of this release and of older ones."""

_LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "jagged")
_QSCHEMES = (
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)  # fmt: skip
_STORAGES = (*BY_STORAGE_CLASS, "UntypedStorage")
_CLASSES = (*_STORAGES, *(name.replace("Storage", "Tensor") for name in BY_STORAGE_CLASS))
_NARROW = tuple(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8))

_TORCH_NAMES = frozenset(
    {f"torch.{name}" for name in (*DTYPES, *_NARROW, *_LAYOUTS, *_QSCHEMES, "Size", "device", "Tensor")}
    | {f"{module}.{name}" for module in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse")
       for name in _CLASSES}
    | {f"torch._utils.{name}" for name in _REBUILD}
    | {f"torch.jit._pickle.{name}" for name in (
        "build_boollist", "build_doublelist", "build_intlist", "build_tensor_from_id", "build_tensorlist",
        "restore_type_tag")}
    | {f"torch.storage.{name}" for name in (*_STORAGES, "_UntypedStorage", "TypedStorage", "_TypedStorage")}
    | {"torch._tensor.Tensor", "torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2",
       "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
       "torch.tensor._rebuild_from_type"}
)  # fmt: skip

_ALLOWED = frozenset(
    {"collections.OrderedDict", "collections.Counter", "collections.defaultdict", "_codecs.encode"}
    | {f"{module}.{name}" for module in ("builtins", "__builtin__")
       for name in ("set", "frozenset", "list", "dict", "tuple", "bytes", "bytearray", "complex",
                    "int", "long", "float", "bool", "str", "unicode", "slice", "range", "xrange")}
)  # fmt: skip

_REASONS = (
    (
        pattern(r"torch\.fx\.graph_module\.reduce_(?:package_)?graph_module"),
        "runs Python text from the file",
    ),
    (
        pattern(r"(?:\w+\.)*persistence\._reconstruct_persistent_obj"),
        "runs the source text of a module in the file",
    ),
    (pattern(r"__torch__\..*"), "TorchScript in the archive; torch.jit.load runs it"),
)
"""Names that honest files have and that are code all the same."""

_MAX_PLACES = 4
"""Places that are named for one name."""

_MAX_KEYS = 3
"""Keys that are named for one place."""

_MAX_KEY = 80
"""Characters that are shown for one key."""

_LEAVES = (*SCALARS, Storage)


def assess(name: Global, record: str = "") -> GlobalUse:
    """The verdict on one name.

    Args:
        name: in a pickle.
        record: that the pickle is, or is in.
    """
    qualified = name.qualified
    verdict: Verdict = "unknown"
    reason = name.offence
    if reason:
        verdict = "dangerous"
    elif qualified in _TORCH_NAMES:
        verdict = "torch"
    elif qualified in _ALLOWED:
        verdict = "allowed"
    elif is_kept_code(name.module, name.name):
        reason = "a function or class that is code in the file; loading it means trusting that code"
    elif is_dangerous(name.module, name.name) and not 0 < name.calls <= name.excused:
        verdict = "dangerous"
    else:
        reason = next((reason for known, reason in _REASONS if known.fullmatch(qualified)), "")
    return GlobalUse(
        name=qualified, verdict=verdict, count=max(name.calls, 1), where=(record,) if record else (), reason=reason
    )


def global_uses(names: Iterable[Global], record: str = "") -> tuple[GlobalUse, ...]:
    """The verdicts on all names of a pickle, in order of appearance.

    Args:
        names: as `ckptkit.pickling.reader.PickleResult` lists them.
        record: that the pickle is, or is in: ``"data.pkl"``.
    """
    return tuple(assess(name, record) for name in names)


def merge_uses(*groups: Iterable[GlobalUse]) -> tuple[GlobalUse, ...]:
    """The names of several pickles, records, members or shards, each once.

    With the most severe verdict on it, why it is given, and first where.
    """
    merged: dict[str, GlobalUse] = {}
    for use in (use for group in groups for use in group):
        known = merged.setdefault(use.name, use)
        if known is not use:
            grave, other = (use, known) if GRAVITY[use.verdict] > GRAVITY[known.verdict] else (known, use)
            where = tuple(dict.fromkeys((*grave.where, *other.where)))[:_MAX_PLACES]
            reason = grave.reason or other.reason
            merged[use.name] = replace(grave, count=known.count + use.count, where=where, reason=reason)
    return tuple(merged.values())


def with_places(uses: tuple[GlobalUse, ...], root: object) -> tuple[GlobalUse, ...]:
    """The uses with the keys under which each name is in the tree.

    Names that torch's own loader runs are everywhere, and get none.  Something in an object is named by the keys that
    lead to the object.

    Args:
        uses: of the file; the tree is that of the first record each was found in.
        root: the tree.
    """
    wanted = {use.name for use in uses if use.verdict in ("unknown", "dangerous")}
    if not wanted:
        return uses
    found = _places(root, wanted)
    located = []
    for use in uses:
        places = found.get(use.name)
        if places:
            record = f"{use.where[0]}: " if use.where else ""
            use = replace(use, where=(*(record + place for place in places), *use.where[1:])[:_MAX_PLACES])
        located.append(use)
    return tuple(located)


def _places(root: object, wanted: set[str]) -> dict[str, list[str]]:
    """For each of the names the first places in the tree; each node is processed once."""
    found: dict[str, list[str]] = {name: [] for name in wanted}
    seen: set[int] = set()
    stack: list[tuple[object, tuple[str, ...], bool]] = [(root, (), True)]
    while stack:
        node, keys, open_ended = stack.pop()
        if isinstance(node, _LEAVES):
            continue
        if isinstance(node, Global):
            places = found.get(node.qualified)
            place = ".".join(keys)
            if place and places is not None and len(places) < _MAX_PLACES and place not in places:
                places.append(place)
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        pairs = mapping_items(node) if open_ended and len(keys) < _MAX_KEYS else None
        if pairs is not None:
            for key, value in reversed(pairs):
                if not isinstance(value, _LEAVES) and not is_bare_leaf(value):
                    stack.append((value, (*keys, _key(key)), True))
                if not isinstance(key, _LEAVES):
                    stack.append((key, keys, False))
        else:
            inside = open_ended and isinstance(node, (list, tuple))
            below = [child for child in reversed(children(node)) if not isinstance(child, _LEAVES)]
            stack.extend([(child, keys, inside) for child in below])
    return found


def _key(key: object) -> str:
    """A key in a place; keys come from a stranger: long and nested ones are cut short."""
    if isinstance(key, str):
        return key[:_MAX_KEY]
    return repr(key)[:_MAX_KEY] if isinstance(key, (int, float, type(None))) else "?"
