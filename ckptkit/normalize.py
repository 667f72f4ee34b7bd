"""Raw tree -> `Checkpoint`, and the state_dict back to a tree.

What a file holds is decided by shape, never by its name:

- a *whole model* is an object with ``_parameters``, ``_buffers`` and ``_modules``.  Its state_dict is
  walked as ``Module.state_dict()`` walks it (torch/nn/modules/module.py ``_save_to_state_dict``):
  parameters that are not ``None``, buffers less ``_non_persistent_buffers_set``, then children,
  depth first.  The bound method ``model.state_dict`` holds the whole model, and is read as one.
- a *state_dict* is a mapping with string keys of which at least half are tensors, and none of
  whose other values has tensors inside.
- a *resume dict* holds whole models or state_dicts under its keys.  An *optimizer* is a mapping
  with ``state`` and ``param_groups``; it is a section, never the weights.

Which weights of a resume dict are *the* state_dict:

1. the section asked for by name;
2. else the only candidate;
3. else the only candidate under a customary key (`CUSTOMARY_KEYS`), when no other candidate
   holds the same tensor names (an EMA or a "best" copy beside it is a choice to be made).

Otherwise none is: the sections are listed, and whoever needs weights is asked for ``--section``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import (
    STATE_DICT,
    Checkpoint,
    GlobalUse,
    Kind,
    Origin,
    Section,
    StateDict,
    Storage,
    TensorEntry,
)
from ckptkit.errors import CorruptError, LimitError, SectionError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.pickling.inert import (
    Global,
    InertDict,
    InertSet,
    Object,
    TreeMap,
    attributes,
    is_global,
    mapping_items,
    walk,
)
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.report import Finding, convert_command

__all__ = ["CUSTOMARY_KEYS", "RawCheckpoint", "lower_state_dict", "normalize", "walk_module"]

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
)
"""Where training scripts put the weights, most common first."""

_MAX_SECTION_DEPTH = 4
"""Keys from the root to a section.  Lightning and fairseq need two."""


_MAX_MODULE_DEPTH = 1000
"""Modules inside modules: Python's own recursion limit stops ``state_dict()`` there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawCheckpoint:
    """What a container's reader hands over: the tree and the container's own facts.

    Attributes:
        root: the inert tree.
        format, format_version, byteorder, pickle_protocol, metadata: as in `Origin` and `Checkpoint`.
        globals: the verdict on every name in the file.
        findings: what the reader noticed.
    """

    root: object
    format: str
    format_version: str | None = None
    byteorder: Literal["little", "big"] = "little"
    pickle_protocol: int | None = None
    metadata: Mapping[str, str]
    globals: tuple[GlobalUse, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidate:
    path: str
    kind: Literal["state_dict", "whole_model", "optimizer", "collection", "tensor"]
    node: object

    @property
    def is_weights(self) -> bool:
        return self.kind in ("state_dict", "whole_model")

    def names(self) -> set[str]:
        if self.kind == "whole_model":
            return {name for name, _ in walk_module(self.node)}
        return {key for key, _ in mapping_items(self.node) or [] if isinstance(key, str)}


def normalize(raw: RawCheckpoint, file: SourceFile, *, section: str | None = None) -> Checkpoint:
    """The common representation of what a container's reader found.

    Args:
        raw: the tree and the container's facts.
        file: where it was read from.
        section: path of the weights to select, as listed by `Checkpoint.sections`.

    Raises:
        SectionError: there is no section of that path that holds weights.
        CorruptError: a module contains itself.
    """
    root, findings = raw.root, list(raw.findings)
    bound = _bound_method_owner(root)
    if bound is not None:
        root = bound
        findings.append(
            Finding(
                code="bound-method",
                severity="warning",
                message="the method model.state_dict was saved, not its result: the file holds the whole model",
                fix=convert_command(file.path),
            )
        )
    found = list(_sections(root, "", 0))
    chosen = _choose([c for c in found if c.is_weights], section)
    kind = _kind(root, found)
    state_dict, rest, module = StateDict(), root, None
    if chosen is not None:
        state_dict, module = _state_dict(chosen, findings, file.path)
        rest = STATE_DICT if chosen.node is root else TreeMap(_same, [(chosen.node, STATE_DICT)])(root)
    elif sum(c.is_weights for c in found) > 1:
        names = ", ".join(repr(c.path) for c in found if c.is_weights)
        findings.append(
            Finding(
                code="ambiguous-section",
                severity="warning",
                message=f"several sections hold weights ({names}); none is taken for the model's",
                fix=convert_command(file.path, "--section", "NAME"),
            )
        )
    return Checkpoint(
        state_dict=state_dict,
        rest=rest,
        module=module,
        metadata=raw.metadata,
        globals=raw.globals,
        findings=tuple(findings),
        sections=tuple(_section(c, selected=c is chosen) for c in found),
        origin=Origin(
            path=file.path,
            size=file.size,
            format=raw.format,
            format_version=raw.format_version,
            byteorder=raw.byteorder,
            kind=kind,
            state_path=None if chosen is None else chosen.path,
            pickle_protocol=raw.pickle_protocol,
        ),
    )


# What is in the tree.


def _sections(node: object, path: str, depth: int) -> Iterator[_Candidate]:
    """The parts that hold tensors, in file order; parts of a part are not listed."""
    if is_tensor_like(node) or isinstance(node, Storage):
        yield _Candidate(path, "tensor", node)
        return
    if _is_module(node):
        yield _Candidate(path, "whole_model", node)
        return
    pairs = mapping_items(node)
    if pairs is not None and not pairs:
        return
    if pairs is not None and _is_state_dict(pairs):
        yield _Candidate(path, "state_dict", node)
        return
    if not _has_tensor(node):
        return
    if pairs is not None and {"state", "param_groups"} <= {key for key, _ in pairs if isinstance(key, str)}:
        yield _Candidate(path, "optimizer", node)
        return
    parts: list[tuple[object, object]] | None = pairs
    if isinstance(node, (list, tuple)):
        parts = list(enumerate(node))
    if parts is None or depth >= _MAX_SECTION_DEPTH or not _holds_weights(parts, depth):
        yield _Candidate(path, "collection", node)
        return
    for key, value in parts:
        yield from _sections(value, _join(path, key), depth + 1)


def _holds_weights(parts: list[tuple[object, object]], depth: int) -> bool:
    """Whether something below is worth being a section of its own; else the whole is a collection."""
    if depth == 0 and any(isinstance(key, str) for key, _ in parts):
        return True  # the keys of a file's own dict are its sections
    below = (candidate for _, value in parts for candidate in _sections(value, "", depth + 1))
    return any(candidate.kind in ("state_dict", "whole_model", "optimizer") for candidate in below)


def _join(path: str, key: object) -> str:
    step = key if isinstance(key, str) else repr(key) if isinstance(key, (int, float, bytes)) else "?"
    return f"{path}.{step}" if path else step


def _is_module(node: object) -> bool:
    state = attributes(node)
    return state is not None and "_parameters" in state and "_buffers" in state and "_modules" in state


def _bound_method_owner(node: object) -> object | None:
    """The module behind ``getattr(module, "state_dict")``, which is how Python pickles a bound method."""
    if isinstance(node, Object) and node.how == "reduce" and len(node.args) == 2 and _is_module(node.args[0]):
        names_getattr = is_global(node.cls, "builtins", "getattr") or is_global(node.cls, "__builtin__", "getattr")
        if names_getattr and node.args[1] == "state_dict":
            return node.args[0]
    return None


def _is_state_dict(pairs: list[tuple[object, object]]) -> bool:
    tensors = others = 0
    for key, value in pairs:
        if not isinstance(key, str):
            return False
        if is_tensor_like(value):
            tensors += 1
        elif not key.endswith("_extra_state"):
            if _has_tensor(value):
                return False
            others += 1
    return tensors > 0 and tensors >= others


def _has_tensor(node: object) -> bool:
    return any(isinstance(below, (TensorEntry, Storage)) for below in walk(node))


def _kind(root: object, found: list[_Candidate]) -> Kind:
    if not found:
        return "other"
    if found[0].node is root:
        kind = found[0].kind
        return "collection" if kind == "optimizer" else kind
    return "resume" if any(candidate.is_weights for candidate in found) else "collection"


def _section(candidate: _Candidate, *, selected: bool) -> Section:
    tensors = 0
    storages: dict[int, int] = {}
    for node in walk(candidate.node):
        if isinstance(node, TensorEntry):
            tensors += 1
            storages[id(node.storage)] = node.storage.nbytes
        elif isinstance(node, Storage):
            storages[id(node)] = node.nbytes
    return Section(
        path=candidate.path, kind=candidate.kind, tensors=tensors, nbytes=sum(storages.values()), selected=selected
    )


def _choose(weights: list[_Candidate], section: str | None) -> _Candidate | None:
    if section is not None:
        for candidate in weights:
            if candidate.path == section:
                return candidate
        listed = ", ".join(repr(candidate.path) for candidate in weights) or "none"
        raise SectionError(f"no section {section!r} holds weights; sections that do: {listed}")
    if len(weights) < 2:
        return weights[0] if weights else None
    customary = [candidate for candidate in weights if candidate.path in CUSTOMARY_KEYS]
    if len(customary) != 1:
        return None
    names = customary[0].names()
    rivals = (candidate for candidate in weights if candidate is not customary[0])
    return None if any(names & rival.names() for rival in rivals) else customary[0]


# The state_dict of a candidate.


def _state_dict(candidate: _Candidate, findings: list[Finding], path: str) -> tuple[StateDict, object]:
    """The state_dict, and the module it was walked from (``None`` for a saved state_dict)."""
    if candidate.kind == "whole_model":
        everything = dict(walk_module(candidate.node))
        _note_wrapper(candidate.node, findings, path)
        state_dict, module = StateDict(everything), candidate.node
    else:
        pairs = mapping_items(candidate.node) or []
        everything = {key: value for key, value in pairs if isinstance(key, str)}
        versions = _versions(candidate.node)
        state_dict, module = StateDict(everything, versions=versions, container=candidate.node), None
    if state_dict.extra:
        names = ", ".join(f"{name} ({value!r:.60})" for name, value in list(state_dict.extra.items())[:5])
        more = f" and {len(state_dict.extra) - 5} more" if len(state_dict.extra) > 5 else ""
        findings.append(
            Finding(
                code="not-a-plain-tensor",
                severity="warning",
                message=f"{len(state_dict.extra)} values of the state_dict are no plain tensors: {names}{more}",
            )
        )
    return state_dict, module


def _versions(container: object) -> dict[str, object] | None:
    """Torch's ``_metadata`` attribute of a state_dict: module path -> ``{"version": n}``."""
    state = attributes(container)
    pairs = mapping_items(state.get("_metadata")) if state is not None else None
    if pairs is None:
        return None
    return {key: value for key, value in pairs if isinstance(key, str)}


def walk_module(module: object) -> Iterator[tuple[str, object]]:
    """Names and values of a pickled module's state_dict, in the order ``state_dict()`` gives them.

    Raises:
        CorruptError: a module is its own descendant.
        LimitError: more entries than any model has.
    """
    count = 0
    stack: list[tuple[str, object, tuple[int, ...]]] = [("", module, ())]
    while stack:
        prefix, node, above = stack.pop()
        state = attributes(node)
        if state is None:
            continue
        if len(above) >= _MAX_MODULE_DEPTH:
            raise LimitError("modules inside modules", limit=_MAX_MODULE_DEPTH, actual=len(above) + 1)
        if id(node) in above:
            raise CorruptError(f"module {prefix.rstrip('.') or 'root'!r} contains itself")
        transient = _members(state.get("_non_persistent_buffers_set"))
        for name, value in _named(state.get("_parameters")):
            if isinstance(value, TensorEntry) and not value.is_parameter:
                value = replace(value, is_parameter=True)
            if value is not None:
                yield prefix + name, value
        for name, value in _named(state.get("_buffers")):
            if value is not None and name not in transient:
                yield prefix + name, value
        below = [
            (f"{prefix}{name}.", child, (*above, id(node)))
            for name, child in _named(state.get("_modules"))
            if child is not None
        ]
        stack.extend(reversed(below))
        count += 1
        if count > DEFAULT_LIMITS.entries:
            raise LimitError("modules in a model", limit=DEFAULT_LIMITS.entries, actual=count)


def _named(node: object) -> list[tuple[str, object]]:
    return [(key, value) for key, value in mapping_items(node) or [] if isinstance(key, str)]


def _members(node: object) -> set[str]:
    """The strings in a set, however the pickle builds it."""
    if isinstance(node, InertSet):
        return {member for member in node.members if isinstance(member, str)}
    if isinstance(node, Object) and node.args and isinstance(node.args[0], (list, tuple)):
        return {member for member in node.args[0] if isinstance(member, str)}
    return set()


def _note_wrapper(module: object, findings: list[Finding], path: str) -> None:
    name = module.class_name if isinstance(module, Object) else ""
    if name.endswith("DataParallel"):
        findings.append(
            Finding(
                code="wrapped-model",
                severity="info",
                message=f"the model was saved inside {name}; every name carries its prefix `module.`",
                fix=convert_command(path, "--strip-module"),
            )
        )


def _same(leaf: object) -> object:
    return leaf


# And back.


def lower_state_dict(state_dict: StateDict) -> object:
    """The inert node that a state_dict is written as: its own class and attributes, its present content."""
    pairs: list[tuple[object, object]] = list(state_dict.everything.items())
    container = state_dict.container
    if isinstance(container, InertDict):
        return InertDict(pairs)
    if isinstance(container, Object):
        # The initial pairs some picklers pass as an argument are among `pairs` already.
        args = tuple(arg for arg in container.args if not isinstance(arg, (list, InertDict)))
        node = Object(container.how, container.cls, args, container.kwargs)
        node.items = list(container.items)
        node.state = container.state
    else:
        node = Object("reduce", Global("collections", "OrderedDict"), ())
    node.pairs = pairs
    if state_dict.versions is not None:
        old = attributes(node)
        kept = [pair for pair in old.pairs if pair[0] != "_metadata"] if old is not None else []
        versions = Object("reduce", Global("collections", "OrderedDict"), ())
        versions.pairs = list(state_dict.versions.items())
        node.state = InertDict([*kept, ("_metadata", versions)])
    return node
