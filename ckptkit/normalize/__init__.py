"""Raw tree -> `Checkpoint`, and the state_dict back to a tree.

`ckptkit.normalize.sections` says what is in the tree and `ckptkit.normalize.selection` which part is the state_dict.
Here that part is replaced by the marker `STATE_DICT`, and anything noteworthy becomes a finding:

- a whole model gives the state_dict that `ckptkit.normalize.modules` walks
- a bound method such as ``model.state_dict`` contains the whole model, and is read as the model
- a list of (name, tensor) pairs is a state_dict, and written back as one
- if several parts could be meant, none is chosen: the sections are listed, and commands that need weights ask for
  ``--section``
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import field, replace
from itertools import islice
from typing import Literal

from ckptkit.bytesource import Source
from ckptkit.checkpoint import (
    STATE_DICT,
    Checkpoint,
    GlobalUse,
    Kind,
    Origin,
    Replica,
    StateDict,
    Storage,
    TensorEntry,
    Unread,
)
from ckptkit.errors import CorruptError
from ckptkit.normalize.modules import bound_method, known_versions, wrapper_prefixes
from ckptkit.normalize.sections import Candidate, SectionSearch, brief, is_plain_value
from ckptkit.normalize.selection import choose, holding_suffix, require_section, sections_listed
from ckptkit.pickling.arrays import names_arrays
from ckptkit.pickling.inert import (
    ABSENT,
    Global,
    InertDict,
    Object,
    TreeMap,
    attributes,
    mapping_items,
    mapping_shell,
    walk,
)
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.pickling.trust import with_places
from ckptkit.report import Finding, convert_command, count_of
from ckptkit.report import listed as enumerated
from ckptkit.startup import dataclass

__all__ = ["RawCheckpoint", "lower_state_dict", "needs_protocol", "normalize", "origin_alone"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class RawCheckpoint:
    """The result of a container's reader: the tree and the container's own facts.

    Attributes:
        root: the inert tree.
        format, format_version, byteorder, pickle_protocol, writer, metadata: as in `Origin` and `Checkpoint`.
        globals: the verdict on every name in the file, and on what else matters likewise.
        findings: from the reader.
        discarded: as in `Checkpoint`.
        has_pickle, is_program: as in `Origin`.
        kind: the kind of content, if the container determines it; ``None``: the tree does.
        is_prefixed: of a shard, whether the keys of its storages have the shard's name before them already.
        replicas, unread: as in `Checkpoint`.
        world_size, mesh: as in `ckptkit.checkpoint.Spread`.
    """

    root: object
    format: str
    format_version: str | None = None
    byteorder: Literal["little", "big"] = "little"
    pickle_protocol: int | None = None
    writer: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    globals: tuple[GlobalUse, ...] = ()
    findings: tuple[Finding, ...] = ()
    discarded: tuple[object, ...] = ()
    has_pickle: bool = True
    is_program: bool = False
    kind: Kind | None = None
    is_prefixed: bool = False
    replicas: tuple[Replica, ...] = ()
    unread: Unread | None = None
    world_size: int | None = None
    mesh: Mapping[str, int] | None = None


def normalize(raw: RawCheckpoint, file: Source, *, section: str | None = None) -> Checkpoint:
    """The common representation of what a container's reader found.

    Args:
        raw: the tree and the container's facts.
        file: that it was read from.
        section: path of the weights to select, as listed by `Checkpoint.sections`.

    Raises:
        SectionError: there is no section of that path that contains weights.
        CorruptError: a module contains itself.
    """
    findings = list(raw.findings)
    root, survey, found = _surveyed(raw, findings, file.path)
    if section is None:
        chosen = choose([candidate for candidate in found if candidate.is_weights])
    else:
        chosen = next((candidate for candidate in found if candidate.is_weights and candidate.path == section), None)
    sections = survey.measured(found, chosen)
    if section is not None:
        require_section(sections, section)
    state_dict, rest, module = StateDict(), root, None
    if chosen is not None:
        state_dict, module = _state_dict(raw, chosen, findings, file.path)
        # One map for both: what the weights and the rest have in common stays so.
        taken_out = TreeMap(_same, [(chosen.node, STATE_DICT)])
        if not state_dict.is_plain:
            state_dict = state_dict.with_values(lambda value: value if is_plain_value(value) else taken_out(value))
        if state_dict.is_module:  # where it leads back to itself, it leads to its place
            state_dict = StateDict(
                state_dict.everything,
                versions=state_dict.versions,
                container=taken_out(copy.copy(chosen.node)),
                is_module=True,
            )
        rest = taken_out(root)
    elif sum(candidate.is_weights for candidate in found) > 1:
        first = next(candidate for candidate in found if candidate.is_weights)
        suffix = holding_suffix(StateDict(dict(first.values())))
        findings.append(
            Finding(
                code="ambiguous-section",
                severity="warning",
                message=f"several sections contain weights ({sections_listed(sections)}); none is taken as the model's",
                fix=convert_command(file.path, "--section", first.path, "--weights-only", suffix=suffix),
            )
        )
    return Checkpoint(
        state_dict=state_dict,
        rest=rest,
        module=module,
        metadata=raw.metadata,
        globals=with_places(tuple(use for use in raw.globals if use.kind == "name"), raw.root),
        unvouched=tuple(use for use in raw.globals if use.kind != "name"),
        findings=tuple(findings),
        discarded=raw.discarded,
        replicas=raw.replicas,
        unread=raw.unread,
        sections=sections,
        origin=Origin(
            path=file.path,
            size=file.size,
            format=raw.format,
            format_version=raw.format_version,
            byteorder=raw.byteorder,
            kind=raw.kind or _kind(root, found),
            state_path=None if chosen is None else chosen.path,
            pickle_protocol=raw.pickle_protocol,
            writer=raw.writer,
            has_pickle=raw.has_pickle,
            is_program=raw.is_program,
        ),
    )


def _surveyed(raw: RawCheckpoint, findings: list[Finding], path: str) -> tuple[object, SectionSearch, list[Candidate]]:
    """The tree, what its nodes are, and its parts: of one without a tensor numpy's arrays may be its weights."""
    survey = SectionSearch(raw.root)
    found = survey.sections()
    if found or not names_arrays(use.name for use in raw.globals):
        return raw.root, survey, found
    from ckptkit.normalize.made_plain import arrays_made_plain

    try:
        root, told = arrays_made_plain(raw.root, path)
    except CorruptError:  # numpy would not make them either
        return raw.root, survey, found
    again = SectionSearch(root)
    sections = again.sections()
    if not any(candidate.is_weights for candidate in sections):
        return raw.root, survey, found
    findings += told
    return root, again, sections


def _kind(root: object, found: list[Candidate]) -> Kind:
    if not found:
        return "other"
    if found[0].node is root:
        kind = found[0].kind
        return "collection" if kind == "optimizer" else kind
    return "resume" if any(candidate.is_weights for candidate in found) else "collection"


# The state_dict of a candidate.


def _state_dict(
    raw: RawCheckpoint, candidate: Candidate, findings: list[Finding], path: str
) -> tuple[StateDict, object]:
    """The state_dict, and the module it was walked from (``None`` for a saved state_dict)."""
    if candidate.kind == "whole_model":
        versions = known_versions(candidate.module) or None
        # A module that is all of the file becomes its state_dict.  One among other things stays what it is, and one
        # whose class is in the file too (cloudpickle, dill): it runs wherever it is loaded.
        has_class = isinstance(candidate.module, Object) and not isinstance(candidate.module.cls, Global)
        becomes = raw.is_program or (candidate.node is raw.root and not has_class)
        container: object = None if becomes else candidate.node
        state_dict = StateDict(
            dict(candidate.values()), versions=versions, container=container, is_module=container is not None
        )
        module = candidate.module
        _note_method(candidate.node, findings, path, holding_suffix(state_dict))
        _note_wrapper(candidate.module, findings, path, holding_suffix(state_dict))
    else:
        container = candidate.node
        versions = _versions(container)
        if candidate.nested:
            from ckptkit.normalize.nested import NestedDicts, nested_versions

            container, versions = NestedDicts(container), nested_versions(container, _versions)
        state_dict, module = StateDict(dict(candidate.values()), versions=versions, container=container), None
    if candidate.nested:
        findings.append(
            Finding(
                code="nested-names",
                severity="info",
                message="the weights are nested dicts; the name of each consists of the keys that lead to it, joined "
                "with dots",
                fix=convert_command(path, "--weights-only", suffix=holding_suffix(state_dict)),
            )
        )
    if state_dict.extra:
        from ckptkit.normalize.not_plain import can_be_dense

        dense = {name: can_be_dense(name, value) for name, value in state_dict.extra.items()}
        helps = any(dense.values()) and all(dense[n] or not is_tensor_like(v) for n, v in state_dict.extra.items())
        names = [f"{name:.100} ({brief(value)})" for name, value in islice(state_dict.extra.items(), 5)]
        are_not = "is not a plain tensor" if len(state_dict.extra) == 1 else "are not plain tensors"
        findings.append(
            Finding(
                code="not-a-plain-tensor",
                severity="warning",
                message=f"{count_of(len(state_dict.extra), 'value')} of the state_dict {are_not}: "
                + enumerated(names, 5, total=len(state_dict.extra)),
                fix=convert_command(path, "--densify", suffix=".pth") if helps else None,
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


def _note_method(node: object, findings: list[Finding], path: str, suffix: str) -> None:
    bound = bound_method(node)
    if bound is not None:
        findings.append(
            Finding(
                code="bound-method",
                severity="warning",
                message=f"the method model.{bound[1][:60]} was saved instead of its result: the file contains the "
                "whole model",
                fix=convert_command(path, "--weights-only", suffix=suffix),
            )
        )


def _note_wrapper(module: object, findings: list[Finding], path: str, suffix: str) -> None:
    wrappers = wrapper_prefixes(module)
    if wrappers:
        names = " inside ".join(name for name, _ in reversed(wrappers))
        prefix = "".join(prefix for _, prefix in wrappers)
        findings.append(
            Finding(
                code="wrapped-model",
                severity="info",
                message=f"the model was saved inside {names}; every name has its prefix `{prefix}`",
                fix=convert_command(path, "--strip-module", "--weights-only", suffix=suffix),
            )
        )


def _same(leaf: object) -> object:
    return leaf


# And back.


def needs_protocol(root: object) -> bool:
    """Whether anything might mean something else in the protocol of torch's own files; torch refuses every other."""
    for node in walk(root):
        if isinstance(node, Global):
            if node.module.partition(".")[0] not in ("torch", "collections") or "." in node.name:
                return True
        elif not isinstance(node, (list, tuple, InertDict, TensorEntry, Storage, Object)):
            return True
    return False


def origin_alone(origin: Origin, state_dict: StateDict) -> Origin:
    """The origin of a state_dict with nothing beside it: removed values need no protocol, and torch refuses most."""
    if (origin.pickle_protocol or 2) <= 2 or needs_protocol(lower_state_dict(state_dict)):
        return origin
    return replace(origin, pickle_protocol=None)


def lower_state_dict(state_dict: StateDict) -> object:
    """The inert node that a state_dict is written as: its own class and attributes, its present content.

    Values walked from a module are written as ``Module.state_dict()`` returns them, detached, or as the module; see
    `StateDict.is_module`.
    """
    container = state_dict.container
    if state_dict.is_module:
        return container
    if container is not None and not isinstance(container, (InertDict, Object, list, tuple)):
        from ckptkit.normalize.nested import NestedDicts

        if isinstance(container, NestedDicts):
            nested = container.filled(state_dict.everything)
            if nested is not None:
                return nested
            container = container.flat(state_dict.versions)
    pairs: list[tuple[object, object]] = [
        (name, _detached(value) if container is None else value) for name, value in state_dict.everything.items()
    ]
    if isinstance(container, InertDict):
        written = InertDict(pairs)
        written.effects = container.effects
        return written
    if isinstance(container, (list, tuple)):
        pair_type = type(container[0])
        return type(container)(pair_type(pair) for pair in pairs)
    shell = mapping_shell(container)
    node = shell if isinstance(shell, Object) else Object("reduce", Global("collections", "OrderedDict"), ())
    node.pairs = pairs
    if state_dict.versions is not None:
        old = None if node.state is ABSENT else attributes(node)
        kept = [pair for pair in old.pairs if pair[0] != "_metadata"] if old is not None else []
        versions = Object("reduce", Global("collections", "OrderedDict"), ())
        versions.pairs = list(state_dict.versions.items())
        node.state = InertDict([*kept, ("_metadata", versions)])
    return node


def _detached(value: object) -> object:
    """A parameter or buffer as the plain tensor that ``Tensor.detach()`` makes of it."""
    if not isinstance(value, TensorEntry) or value.subclass is not None:
        return value
    if not value.is_parameter and not value.requires_grad and is_plain_value(value):
        return value
    return replace(value, is_parameter=False, requires_grad=False, attributes=None, effects=())
