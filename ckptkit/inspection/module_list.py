"""A pickled model's modules as the inspect document lists them, and the text ``print(model)`` gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptkit.inspection.settings import class_name, is_printed, module_text, plain_value
from ckptkit.normalize.modules import module_state
from ckptkit.pickling.inert import InertDict, Object, mapping_items

__all__ = ["list_modules", "printed_model"]

_MAX_MODULES = 50_000
"""Modules that are listed; one that stands in several places counts in each.  Models have some thousands."""

_MAX_CHARACTERS = 64 << 20
"""Characters of paths and settings in the list: shared modules must not multiply long ones."""

_MAX_SETTINGS = 100
"""Settings of one module that are listed."""

_MAX_KEY = 200
"""Characters of a setting's name."""

_FOLDED_LISTS = frozenset({"ModuleList", "ParametrizationList"})
"""Classes that print children which print alike as one: ``(0-11): 12 x Block(``."""


def list_modules(root: object) -> list[dict[str, Any]]:
    """A whole model's modules in the order of ``named_modules()``, parents first.

    Each is ``{"path", "class", "text", "settings", "children"}``: ``text`` is the class with its settings as
    ``print`` shows it, ``settings`` are its scalar attributes, ``children`` are paths.  A child that is
    ``None`` has that for its class.
    """
    listed: list[dict[str, Any]] = []
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


def printed_model(modules: list[dict[str, Any]]) -> Iterator[str]:
    """The lines ``print(model)`` would give.

    Args:
        modules: of `list_modules`.
    """
    if not modules:
        return
    by_path = {module["path"]: module for module in modules}
    alike = _alike(modules, by_path)
    stack: list[tuple[str, str, dict[str, Any] | None]] = [("", "", modules[0])]
    while stack:
        indent, label, module = stack.pop()
        if module is None:
            yield f"{indent})"
            continue
        text: str = module["text"]
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
    module: dict[str, Any], by_path: dict[str, dict[str, Any]], alike: dict[str, int]
) -> list[tuple[str, dict[str, Any]]]:
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


def _alike(modules: list[dict[str, Any]], by_path: dict[str, dict[str, Any]]) -> dict[str, int]:
    """A number for each module: equal numbers print alike, children included."""
    numbers: dict[tuple[object, ...], int] = {}
    result: dict[str, int] = {}
    for module in reversed(modules):  # children come after their parents
        path = module["path"]
        skip = len(path) + 1 if path else 0
        children = tuple((child[skip:], result[child]) for child in module["children"] if child in by_path)
        result[path] = numbers.setdefault((module["text"], children), len(numbers))
    return result
