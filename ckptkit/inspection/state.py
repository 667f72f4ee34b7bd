"""Everything beside and around the weights: the training state, and the modules of a pickled model.

The training state is scalars, optimizers and schedulers.  An optimizer's state_dict is
``{"state": {0: {...}}, "param_groups": [{"lr": ..., "params": [...]}]}`` and does not name its class.  The options in
its groups identify it: ``torch/optim`` sets different defaults in each class (`_OPTIMIZERS`).  A scheduler's state_dict
is its ``__dict__`` (``torch/optim/lr_scheduler.py``), which identifies it in the same way.  Both are inferences and
marked so; a pickled object says what it is.

Only a few tensors, with one element each, are read: step counts, a best metric.

A pickled model's modules are shown as ``print(model)`` shows them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.checkpoint import Section, TensorEntry
from ckptkit.computed import can_be_looked_at
from ckptkit.inspection.settings import class_name, is_printed, is_scalar, module_text, plain_value
from ckptkit.normalize.adapters import SMALL_FORMATS, small_values
from ckptkit.normalize.modules import module_state
from ckptkit.normalize.sections import MAX_SECTION_DEPTH, join, step
from ckptkit.pickling.inert import InertDict, Object, attributes, mapping_items

if TYPE_CHECKING:
    from ckptkit.inspection.document import ModuleDocument, OptimizerDocument, SchedulerDocument, TrainingDocument

__all__ = ["has_optimizer", "list_modules", "printed_model", "training_document", "training_state"]

_MAX_SCALARS = 400
"""Scalars of the training state that are listed; argument namespaces have about a hundred."""

_MAX_TEXT = 200
"""Characters of a string scalar that are shown."""

_MAX_VISITS = 100_000
"""Nodes that are searched for optimizers and schedulers: they are near the root."""

_MAX_FOUND = 64
"""Optimizers, and schedulers, that are listed; and learning rates of one."""

_MAX_TENSOR_SCALARS = 64
"""Tensors of one element whose value is read: a best metric, an optimizer's step count."""

_OPTIMIZERS: tuple[tuple[str, str], ...] = (
    ("Adafactor", "beta2_decay d"),
    ("Muon", "ns_coefficients ns_steps"),
    ("Adadelta", "rho"),
    ("Adagrad", "lr_decay initial_accumulator_value"),
    ("Adagrad", "lr_decay"),
    ("NAdam", "betas momentum_decay"),
    ("ASGD", "lambd alpha t0"),
    ("LBFGS", "max_iter history_size"),
    ("RMSprop", "alpha centered"),
    ("Rprop", "etas step_sizes"),
    ("SGD", "momentum dampening nesterov"),
    ("Adam or AdamW", "betas eps amsgrad"),
    ("RAdam", "betas eps weight_decay decoupled_weight_decay"),
    ("Adamax", "betas exp_inf"),
    ("Adam or a related optimizer", "betas eps"),
)
"""Options of a parameter group that only one class sets, the most distinctive first."""

_SCHEDULERS: tuple[tuple[str, str], ...] = (
    ("OneCycleLR", "total_steps"),
    ("CyclicLR", "max_lrs"),
    ("CosineAnnealingWarmRestarts", "T_0"),
    ("CosineAnnealingLR", "T_max"),
    ("ReduceLROnPlateau", "patience factor"),
    ("MultiStepLR", "milestones gamma"),
    ("StepLR", "step_size gamma"),
    ("LinearLR", "start_factor end_factor"),
    ("PolynomialLR", "total_iters power"),
    ("ConstantLR", "total_iters factor"),
    ("LambdaLR or MultiplicativeLR", "lr_lambdas"),
    ("SequentialLR", "_schedulers _milestones"),
    ("ChainedScheduler", "_schedulers _last_lr"),
    ("ExponentialLR", "gamma last_epoch"),
)
"""Attributes that only one scheduler of ``torch.optim.lr_scheduler`` has, the most telling first."""


def training_document(rest: object, sections: Sequence[Section] = ()) -> TrainingDocument:
    """What training left beside the weights.

    Args:
        rest: all but the state_dict.
        sections: of the file; optimizers among them have their sizes there.
    """
    sized = {section.path: section for section in sections}
    reader = _ScalarReader()
    optimizers: list[OptimizerDocument] = []
    schedulers: list[SchedulerDocument] = []
    for path, name, state in _mappings(rest):
        if _is_optimizer(state):
            if len(optimizers) < _MAX_FOUND:
                optimizers.append(_optimizer(path, state, name, reader, sized.get(path)))
        elif len(schedulers) < _MAX_FOUND and ("last_epoch" in state or "_schedulers" in state):
            schedulers.append(_scheduler(path, state, name))
    scalars = training_state(rest)
    for key, value in mapping_items(rest) or []:
        if isinstance(key, str) and isinstance(value, TensorEntry) and len(scalars) < _MAX_SCALARS:
            number = reader.value(value)
            if number is not None:
                scalars[step(key)] = number
    return {"scalars": scalars, "optimizers": optimizers, "schedulers": schedulers}


def training_state(rest: object) -> dict[str, Any]:
    """Scalars beside the weights: of the file's own dict, and one level below it.

    ``{"epoch": 3, "args.lr": 0.1}``; long strings are cut.
    """
    scalars: dict[str, Any] = {}
    for key, value in mapping_items(rest) or []:
        if not isinstance(key, str):
            continue
        if is_scalar(value):
            scalars[step(key)] = _shown(value)
            continue
        inner = mapping_items(value) or _object_items(value)
        scalars.update((join(step(key), name), _shown(part)) for name, part in inner if _is_named_scalar(name, part))
        if len(scalars) >= _MAX_SCALARS:
            break
    return dict(list(scalars.items())[:_MAX_SCALARS])


def _object_items(node: object) -> list[tuple[object, object]]:
    """The attributes of an object; for an omegaconf DictConfig, whose values are objects themselves, its content."""
    state = attributes(node)
    if state is None:
        return []
    if not isinstance(node, Object) or not node.class_name.startswith("omegaconf."):
        return state.pairs
    content = ((name, attributes(part)) for name, part in mapping_items(state.get("_content")) or [])
    return [(name, inner.get("_val")) for name, inner in content if inner is not None and "_val" in inner]


def _is_named_scalar(name: object, node: object) -> bool:
    return isinstance(name, str) and is_scalar(node)


def _shown(node: object) -> Any:
    if isinstance(node, str) and len(node) > _MAX_TEXT:
        return node[:_MAX_TEXT] + "…"
    if isinstance(node, float) and (node != node or node in (float("inf"), float("-inf"))):
        return str(node)  # JSON has no such numbers
    return node


# Optimizers and schedulers.


def has_optimizer(rest: object) -> bool:
    """Whether the state of an optimizer is beside the weights."""
    return any(_is_optimizer(state) for _, _, state in _mappings(rest))


def _is_optimizer(state: InertDict) -> bool:
    return isinstance(state.get("param_groups"), list)


def _mappings(root: object) -> Iterator[tuple[str, str | None, InertDict]]:
    """Every mapping, and every object's attributes with its class, at most `MAX_SECTION_DEPTH` keys from the root."""
    seen: set[int] = set()
    stack: list[tuple[str, object, int]] = [("", root, 0)]
    visits = 0
    while stack:
        path, node, depth = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        state, class_name = attributes(node), None
        pairs = mapping_items(node)
        if pairs is not None:
            state = node if isinstance(node, InertDict) else InertDict(pairs)
        elif state is not None and isinstance(node, Object):
            class_name = node.class_name
        if state is not None:
            yield path, class_name, state
        if depth >= MAX_SECTION_DEPTH or (state is not None and "param_groups" in state):
            continue
        visits += len(state if state is not None else node if isinstance(node, (list, tuple)) else ())
        if visits > _MAX_VISITS:
            continue
        below = state.pairs if state is not None else list(enumerate(node)) if isinstance(node, (list, tuple)) else []
        stack.extend(
            (join(path, key), child, depth + 1)
            for key, child in reversed(below)
            if isinstance(child, (InertDict, Object, list, tuple))
        )


def _kind(class_name: str | None, known: tuple[tuple[str, str], ...], names: set[str]) -> str | None:
    """Its class: known for a pickled object, otherwise inferred from its keys."""
    if class_name is not None:
        return class_name.rpartition(".")[2]
    return next((kind for kind, keys in known if names.issuperset(keys.split())), None)


def _keys(node: object) -> set[str]:
    return {key for key, _ in mapping_items(node) or [] if isinstance(key, str)}


def _get(node: object, name: str) -> object:
    """The value under a string key of a mapping; ``None``: it has none."""
    return next(
        (value for key, value in reversed(mapping_items(node) or []) if isinstance(key, str) and key == name), None
    )


def _optimizer(
    path: str, state: InertDict, class_name: str | None, reader: _ScalarReader, section: Section | None
) -> OptimizerDocument:
    listed = state.get("param_groups")
    groups = [group for group in listed if mapping_items(group) is not None] if isinstance(listed, list) else []
    moments = next((value for _, value in mapping_items(state.get("state")) or []), None)
    kind = _kind(class_name, _OPTIMIZERS, (_keys(groups[0]) if groups else set()) | _keys(moments))
    if kind == "Adam or AdamW" and groups and _get(groups[0], "decoupled_weight_decay") is not None:
        kind = "AdamW" if _get(groups[0], "decoupled_weight_decay") is True else "Adam"
    return {
        "path": path,
        "kind": kind,
        "inferred": class_name is None,
        "groups": len(groups),
        "lr": [reader.value(_get(group, "lr")) for group in groups[:_MAX_FOUND]],
        "steps": reader.value(_get(moments, "step")),
        "tensors": section.tensors if section else 0,
        "nbytes": section.nbytes if section else 0,
    }


def _scheduler(path: str, state: InertDict, class_name: str | None) -> SchedulerDocument:
    rates = state.get("_last_lr")
    return {
        "path": path,
        "kind": _kind(class_name, _SCHEDULERS, {key for key in state if isinstance(key, str)}),
        "inferred": class_name is None,
        "last_epoch": _number(state.get("last_epoch")),
        "lr": [_number(rate) for rate in rates[:_MAX_FOUND]] if isinstance(rates, list) else [],
    }


def _number(node: object) -> Any:
    return _shown(node) if isinstance(node, (int, float)) and not isinstance(node, bool) else None


class _ScalarReader:
    """Reads the values of tensors of one element, which training scripts keep numbers in; not of many."""

    def __init__(self) -> None:
        self._left = _MAX_TENSOR_SCALARS

    def value(self, node: object) -> Any:
        """The number a node is; ``None``: it is not one, or cannot be read."""
        if not isinstance(node, TensorEntry):
            return _number(node)
        if not can_be_looked_at(node.storage.source):
            return None
        if node.numel != 1 or len(node.shape) > 1 or node.dtype not in SMALL_FORMATS or not self._left:
            return None
        self._left -= 1
        values = small_values(node, 1)
        return None if values is None else _shown(values[0])


_MAX_MODULES = 50_000
"""Modules that are listed; one that is in several places counts in each.  Models have some thousands."""

_MAX_CHARACTERS = 64 << 20
"""Characters of paths and settings in the list: shared modules must not multiply long ones."""

_MAX_SETTINGS = 100
"""Settings of one module that are listed."""

_MAX_KEY = 200
"""Characters of a setting's name."""

_FOLDED_LISTS = frozenset({"ModuleList", "ParametrizationList"})
"""Classes that print children which print alike as one: ``(0-11): 12 x Block(``."""


def list_modules(root: object) -> list[ModuleDocument]:
    """A whole model's modules in the order of ``named_modules()``, parents first.

    A child that is ``None`` has that for its class.
    """
    listed: list[ModuleDocument] = []
    known: dict[int, tuple[str, str, dict[str, Any], int]] = {}
    characters = 0
    stack: list[tuple[str, object]] = [("", root)]
    while stack and len(listed) < _MAX_MODULES and characters < _MAX_CHARACTERS:
        path, node = stack.pop()
        if node is None:
            listed.append({"path": path, "class": "None", "text": "None", "settings": {}, "children": []})
            continue
        state = module_state(node)
        if state is None or not isinstance(node, Object):
            continue
        below = [
            (f"{path}.{name}" if path else name, child)
            for name, child in mapping_items(state.get("_modules")) or []
            if isinstance(name, str) and (child is None or module_state(child) is not None)
        ]
        if id(node) not in known:
            text, settings = module_text(node, state, has_children=bool(below)), _settings(state)
            known[id(node)] = class_name(node), text, settings, len(text) + len(str(settings))
        cls, text, settings, size = known[id(node)]
        characters += size + sum(len(child_path) for child_path, _ in below)
        listed.append(
            {"path": path, "class": cls, "text": text, "settings": settings, "children": [name for name, _ in below]}
        )
        stack.extend(reversed(below))
    return listed if root is not None else []


def _settings(state: InertDict) -> dict[str, Any]:
    """A module's scalar attributes, as JSON has them."""
    settings: dict[str, Any] = {}
    for key, value in state.pairs:
        if isinstance(key, str) and not key.startswith("_") and key != "training" and is_printed(value):
            settings[key[:_MAX_KEY]] = json_value(value)
            if len(settings) == _MAX_SETTINGS:
                break
    return settings


def json_value(node: object) -> object:
    """A scalar, or a tuple of scalars, as JSON has it: there is no NaN and no infinity."""
    value = plain_value(node)
    if isinstance(value, tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def printed_model(modules: Sequence[ModuleDocument]) -> Iterator[str]:
    """The lines ``print(model)`` would give.

    Args:
        modules: of `list_modules`.
    """
    if not modules:
        return
    by_path = {module["path"]: module for module in modules}
    alike = _alike(modules, by_path)
    stack: list[tuple[str, str, ModuleDocument | None]] = [("", "", modules[0])]
    while stack:
        indent, label, module = stack.pop()
        if module is None:
            yield f"{indent})"
            continue
        text = module["text"]
        name, _, extra = text.partition("(")
        extras = extra[:-1].split("\n") if len(extra) > 1 else []
        below = _below(module, by_path, alike)
        if not below and len(extras) < 2:
            yield f"{indent}{label}{text}"
            continue
        yield f"{indent}{label}{name}("
        deeper = indent + "  "
        for line in extras:
            yield deeper + line
        stack.append((indent, "", None))
        stack.extend((deeper, child_label, child) for child_label, child in reversed(below))


def _below(
    module: ModuleDocument, by_path: dict[str, ModuleDocument], alike: dict[str, int]
) -> list[tuple[str, ModuleDocument]]:
    """A module's children with the labels they print under; those of a list, folded."""
    children = [by_path[path] for path in module["children"] if path in by_path]
    skip = len(module["path"]) + 1 if module["path"] else 0
    if module["class"].rpartition(".")[2] not in _FOLDED_LISTS:
        return [(f"({child['path'][skip:]}): ", child) for child in children]
    runs: list[list[int]] = []
    for number, child in enumerate(children):
        if runs and alike[children[runs[-1][0]]["path"]] == alike[child["path"]]:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [
        (f"({first}): " if first == last else f"({first}-{last}): {last - first + 1} x ", children[first])
        for first, last in runs
    ]


def _alike(modules: Sequence[ModuleDocument], by_path: dict[str, ModuleDocument]) -> dict[str, int]:
    """A number for each module: equal numbers print alike, children included."""
    numbers: dict[tuple[object, ...], int] = {}
    result: dict[str, int] = {}
    for module in reversed(modules):  # children come after their parents
        path = module["path"]
        skip = len(path) + 1 if path else 0
        children = tuple((child[skip:], result[child]) for child in module["children"] if child in by_path)
        result[path] = numbers.setdefault((module["text"], children), len(numbers))
    return result
