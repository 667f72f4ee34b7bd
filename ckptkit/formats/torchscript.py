"""TorchScript: programs that ``torch.jit.save`` and ``_save_for_lite_interpreter`` write.

Layout: a torch archive (`ckptkit.formats.torch_archive`; ``torch/csrc/jit/serialization`` ``export_module.cpp``,
``import.cpp``, ``pickler.cpp``, ``python_print.cpp``):

- ``data.pkl``: the module, pickle protocol 2: objects of classes ``__torch__.…`` whose state is a
  dict of attributes (of C++ classes: whatever their ``__getstate__`` gives)
- ``data/KEY``: its storages, often before ``data.pkl``
- ``constants.pkl``, ``constants/KEY``: a tuple of what the code calls ``CONSTANTS.c0``, ``c1``, …; the
  weights of a frozen module are here
- ``code/__torch__/….py``: each class's source, deflated, with ``__parameters__``, ``__buffers__`` and
  ``name : Final[type] = value``; ``.debug_pkl`` beside it maps lines to the original program
- ``bytecode.pkl``, ``mobile_debug_handles.pkl``: of mobile files (``.ptl``)
- ``traced_inputs.pkl``: example inputs, whose storages are left empty
- ``extra/…``: files of the user's

Of the pickle's own functions ``torch.jit._pickle.build_intlist`` and its kin give their list, and
``restore_type_tag`` its value (``torch/jit/_pickle.py``).  `ckptkit.pickling.dialects` describes its names for storages
and sparse tensors.

The reader turns each script module into the inert node of an ``nn.Module``: its state gets
``_parameters``, ``_buffers`` and ``_modules`` by what the class's source says.  The source is never run, and only that
of classes in use is read; without it a tensor that requires a gradient is a parameter and any other a buffer.  As in
torch itself, buffers that were not persistent are saved. Classes keep their own name (``torch.nn.modules.conv.Conv1d``
for ``__torch__.torch.nn.modules.conv.___torch_mangle_0.Conv1d``, which stays under ``_script_class``); but quantized
ones, whose state_dict is another in Python, keep ``__torch__``.

Everything outside the state_dict is beside it: *attributes* are the modules' other values with tensors in them, packed
weights among them, and *constants* are those of the code, by their number.

TorchScript of torch 1.0 to 1.3 (``model.json``) is recognized and refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from ckptkit.checkpoint import GlobalUse, Storage, TensorEntry
from ckptkit.errors import CorruptError, LimitError, UnsupportedError
from ckptkit.formats.format import Probe
from ckptkit.formats.torch_archive import PICKLE_FUNCTIONS, TorchArchive
from ckptkit.formats.torchscript_code import ScriptClass, ScriptClasses
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize import RawCheckpoint
from ckptkit.normalize.sections import above_tensors, join
from ckptkit.pickling.dialects import ScriptStorageTable
from ckptkit.pickling.inert import ABSENT, Global, InertDict, Object, PersistentId, mapping_items, walk
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.report import Finding, count_of, human_size, listed

__all__ = ["as_modules", "read", "vouched"]

_NAME = "torchscript"
_SIDE_PICKLES = ("bytecode.pkl", "mobile_debug_handles.pkl", "traced_inputs.pkl")
_EXTRA = "extra/"
_FOLDERS = ("code/", _EXTRA, "traced_inputs/", "bytecode/")

_MAX_ATTRIBUTE_DEPTH = 32
"""Nested lists and dicts that are searched for an attribute's parts; deeper ones stay whole."""

_MANGLED = re.compile(r"\.___torch_mangle_[0-9]+")
_QUANTIZED = re.compile(r"__torch__\.torch\.(?:ao\.)?nn\.(?:intrinsic\.|sparse\.)?quantized\.")


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    archive = TorchArchive(probe.records, probe.limits)
    if "model.json" in archive.records:
        raise UnsupportedError(
            "a TorchScript archive of torch 1.0 to 1.3 (model.json), which neither ckptkit nor torch 1.11 and later "
            "reads; torch 1.4 to 1.9 does. With one of those, torch.jit.save(torch.jit.load(FILE), NEW) rewrites it, "
            "but it loads the program: only for a file you trust"
        )
    version, byteorder = archive.version(), archive.byteorder()
    tables = [
        ScriptStorageTable(archive.locator(folder), byteorder=byteorder, limits=probe.limits)
        for folder in ("data/", "constants/")
    ]
    data = archive.pickle("data.pkl", tables[0])
    constants = archive.pickle("constants.pkl", tables[1])
    for name in _SIDE_PICKLES:
        if name in archive.records:
            archive.pickle(name, tables[0], persistent_load=_marking(archive))
    archive.mark(name for name in archive.records if name.startswith(_FOLDERS))
    classes = ScriptClasses(archive)
    attributes = as_modules(data.root, classes)
    held = _held_constants(constants.root)
    parts: list[tuple[object, object]] = [("model", data.root)]
    if attributes:
        parts.append(("attributes", InertDict(list(attributes.items()))))
    if held:
        parts.append(("constants", InertDict(held)))
    return RawCheckpoint(
        root=InertDict(parts) if len(parts) > 1 else data.root,
        kind="whole_model" if classes.is_module(data.root) else None,
        format=_NAME,
        format_version=version,
        byteorder=byteorder,
        pickle_protocol=data.protocol,
        writer=archive.writer(),
        globals=vouched(archive.uses()),
        discarded=archive.discarded,
        findings=(*archive.findings(), *_findings(data.root, classes, attributes, held), *_extra_files(archive)),
    )


def _extra_files(archive: TorchArchive) -> Iterator[Finding]:
    """Files that the program's author put beside it; no conversion can keep them."""
    files = [(name, archive.records[name].nbytes) for name in archive.records if name.startswith(_EXTRA)]
    if files:
        shown = listed([f"{name.removeprefix(_EXTRA)[:80]!r} ({human_size(nbytes)})" for name, nbytes in files], 8)
        yield Finding(
            code="extra-files",
            severity="info",
            message=f"{count_of(len(files), 'file')} added by the author beside the program (_extra_files): {shown}; "
            "converting writes only the weights",
        )


def _marking(archive: TorchArchive) -> Callable[[object], object]:
    """In a pickle without weights, storages are only declared as used."""

    def load(pid: object) -> object:
        if isinstance(pid, tuple) and len(pid) > 2 and isinstance(pid[2], str):
            archive.mark((f"constants/{pid[2]}", f"data/{pid[2]}"))
        return PersistentId(pid)

    return load


def vouched(uses: tuple[GlobalUse, ...]) -> tuple[GlobalUse, ...]:
    """The verdicts, with the names that TorchScript's own unpickler makes nothing but data of as torch's."""
    own = {f"torch.jit._pickle.{name}" for name in PICKLE_FUNCTIONS}
    return tuple(
        replace(use, verdict="torch")
        if use.verdict == "unknown" and (use.name in own or use.name.startswith("__torch__."))
        else use
        for use in uses
    )


def _held_constants(root: object) -> list[tuple[object, object]]:
    """The constants with tensors in them, by their number in the code."""
    values = root if isinstance(root, (tuple, list)) else ()
    holding = above_tensors(root)
    return [(str(number), value) for number, value in enumerate(values) if id(value) in holding]


# Script modules as inert nodes of modules.


def as_modules(root: object, classes: ScriptClasses) -> dict[object, object]:
    """Give every script module at or below a node the state of an ``nn.Module``.

    Args:
        root: the node; what is below it is changed in place.
        classes: of the archive.

    Returns:
        The modules' other attributes with tensors in them, by their path; they are taken out.

    Raises:
        LimitError: modules deeper inside one another, or longer paths, than any program has.
        CorruptError: a module is its own descendant, or one is nameless.
    """
    found: dict[object, object] = {}
    seen: set[int] = set()
    holding = above_tensors(root)
    characters = 0
    stack: list[tuple[str, object, int]] = [("", root, 0)]
    while stack:
        path, node, depth = stack.pop()
        if id(node) in seen or not classes.is_module(node) or not isinstance(node, Object):
            continue
        seen.add(id(node))
        if depth > DEFAULT_LIMITS.module_depth:
            raise LimitError("modules inside modules", limit=DEFAULT_LIMITS.module_depth, actual=depth)
        below = []
        for name, value in _as_module(node, classes, holding):
            at = f"{path}.{name}" if path else name
            characters += len(at)
            if characters > classes.limit:
                raise LimitError("characters of names in a program", limit=classes.limit, actual=characters)
            if classes.is_module(value):
                below.append((at, value, depth + 1))
            else:
                _flatten(at, value, found, seen, holding)
        stack.extend(reversed(below))
    return found


def _flatten(path: str, value: object, found: dict[object, object], seen: set[int], holding: set[int]) -> None:
    """Enter what an attribute holds under its path, each part of lists and dicts for itself.

    Args:
        path: of the attribute.
        value: it.
        found: where what has tensors in it is entered.
        seen: the lists and dicts that were processed, by ``id``; each is entered once.
        holding: the nodes with tensors in them, by ``id``.
    """
    stack = [(path, value, 0)]
    while stack:
        at, node, depth = stack.pop()
        parts: list[tuple[object, object]] | None = None
        if depth < _MAX_ATTRIBUTE_DEPTH:
            parts = list(enumerate(node)) if isinstance(node, (list, tuple)) else mapping_items(node)
        if id(node) not in holding:
            continue
        if parts is None:
            if at in found:
                raise CorruptError(f"two attributes have the path {at[:200]!r}")
            found[at] = node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.extend((join(at, key), part, depth + 1) for key, part in reversed(parts))


def _as_module(node: Object, classes: ScriptClasses, holding: set[int]) -> list[tuple[str, object]]:
    """Rearrange one module; gives its children, and its attributes with tensors in them."""
    cls, state = node.cls, node.state
    if not isinstance(cls, Global) or not isinstance(state, InertDict):
        return []
    source = classes.of(cls)
    classes.missing += source is None
    parameters, buffers, modules = InertDict(), InertDict(), InertDict()
    settings: list[tuple[object, object]] = [("_script_class", cls.qualified)]
    beside: list[tuple[str, object]] = []
    for name, value in state.pairs:
        if not isinstance(name, str):
            raise CorruptError(f"a module of class {cls.qualified[:80]} has an attribute whose name is not a string")
        if classes.is_module(value):
            modules.pairs.append((name, value))
            beside.append((name, value))
        elif _is_saved(name, value, source, parameter=True):
            parameters.pairs.append((name, value))
        elif _is_saved(name, value, source, parameter=False):
            buffers.pairs.append((name, value))
        elif id(value) in holding:
            beside.append((name, value))
        else:
            settings.append((name, value))
    known = {name for name, _ in state.pairs}
    settings += [pair for pair in (source.constants if source is not None else []) if pair[0] not in known]
    node.state = InertDict([("_parameters", parameters), ("_buffers", buffers), ("_modules", modules), *settings])
    if not _QUANTIZED.match(cls.module + "."):
        module = _MANGLED.sub("", cls.module).removeprefix("__torch__").lstrip(".")
        node.cls = Global(module or "__torch__", cls.name)
    return beside


def _is_saved(name: str, value: object, source: ScriptClass | None, *, parameter: bool) -> bool:
    """Whether an attribute is a parameter, or a buffer."""
    if source is not None:
        return name in (source.parameters if parameter else source.buffers)
    if isinstance(value, TensorEntry):
        return value.requires_grad == parameter
    return not parameter and is_tensor_like(value)


def _findings(
    root: object, classes: ScriptClasses, attributes: dict[object, object], held: list[tuple[object, object]]
) -> Iterator[Finding]:
    own = [node for node in walk(root) if isinstance(node, Object) and _keeps_own_state(node, classes)]
    name = root.state.get("_script_class") if isinstance(root, Object) and isinstance(root.state, InertDict) else None
    name = name or (root.class_name if root in own and isinstance(root, Object) else None)
    if isinstance(name, str):
        yield Finding(
            code="torchscript-program",
            severity="info",
            message=f"a TorchScript program of class {name[:200]}: torch.jit.load opens it, torch.load does not",
        )
    if own:
        inside = {id(value) for node in own for value in walk(node.state) if isinstance(value, TensorEntry)}
        yield Finding(
            code="own-script-state",
            severity="warning",
            message=f"{count_of(len(own), 'module', 'saves', 'save')} custom state (__getstate__), with "
            f"{count_of(len(inside), 'tensor')} without names; only the program knows what they are",
        )
    packed = [
        *(str(name) for name, value in attributes.items() if _is_packed(value)),
        *(f"constants.{number}" for number, value in held if _is_packed(value)),
    ]
    if packed:
        shown = listed([path[:100] for path in packed], 4)
        yield Finding(
            code="not-a-plain-tensor",
            severity="warning",
            message=f"{count_of(len(packed), 'quantized or packed value')} in the program: {shown}; their parts are "
            "listed",
        )
    if classes.missing:
        yield Finding(
            code="torchscript-without-code",
            severity="info",
            message=f"{count_of(classes.missing, 'module', 'has', 'have')} no source in the file: tensors that require "
            "a gradient are treated as parameters, the others as buffers",
        )
    if held and not attributes and not any(_has_saved(node) for node in walk(root)):
        yield Finding(
            code="frozen-program",
            severity="warning",
            message="the modules contain no tensors: the program was frozen, and its weights are "
            f"{count_of(len(held), 'constant')} without names",
        )


def _keeps_own_state(node: Object, classes: ScriptClasses) -> bool:
    """Whether a module's state is what its ``__getstate__`` gave, and not a dict of its attributes."""
    if node.state is ABSENT or isinstance(node.state, InertDict) or not isinstance(node.cls, Global):
        return False
    return node.cls.module.startswith("__torch__") and classes.of(node.cls) is not None


def _is_packed(value: object) -> bool:
    return not isinstance(value, TensorEntry)


def _has_saved(node: object) -> bool:
    return isinstance(node, (TensorEntry, Storage))
