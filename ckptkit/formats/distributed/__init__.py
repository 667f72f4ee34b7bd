"""Sharded training checkpoints: folders that several processes wrote, each opened as one checkpoint.

`LAYOUTS` says by which names a folder is known; the module of each layout has its specification and reads it.
`around` finds the folder that is meant by one that was given; `folder` is it as the one file that was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptkit.bytesource import Source, SourceFile
from ckptkit.errors import FileAccessError
from ckptkit.formats.distributed.folder import FolderSource, listing
from ckptkit.formats.format import HEAD_NBYTES
from ckptkit.formats.unpacked import unpacked_source

if TYPE_CHECKING:
    from ckptkit.formats.distributed.around import Found

__all__ = ["LAYOUTS", "RANKED", "SHARDED", "Layout", "folder_source", "is_metadata"]

RANKED = (
    r"(?:(?P<stem>[^/]*?)(?:(?:^|(?<=[._-]))world_size_(?P<of>\d+))?[._-])?"
    r"rank[_-]?(?P<rank>\d+)(?P<end>\.(?:bin|ckpt|pkl|pth|pt|tar))"
)
"""What the files of FSDP's ranks are called: the stem is what those of one checkpoint have in common."""

SHARDED = r"shard-(?P<n>\d{5})-model-(?P<file>\d{5})-of-(?P<of>\d{5})\.safetensors"
"""What the files of the hub's writer are called: of which rank, from 1, and of which file once consolidated."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a folder shows that it is one of a layout.

    Attributes:
        format: name of its format (`ckptkit.formats.containers`).
        claims: whether the files are those of one, by their paths below the folder and, where names do not tell, by
            what is in them.
    """

    format: str
    claims: Callable[[str, tuple[str, ...]], bool]


def _named(pattern: str, least: int = 1) -> Callable[[str, tuple[str, ...]], bool]:
    """Whether so many files have such names."""
    compiled = re.compile(pattern, re.ASCII)
    return lambda folder, names: (
        sum("/" not in name and compiled.fullmatch(name) is not None for name in names) >= least
    )


def _dcp(folder: str, names: tuple[str, ...]) -> bool:
    own = [name for name in names if "/" not in name]
    is_one = any(name.endswith(".distcp") for name in own) or (".metadata" in own and _is_metadata(folder))
    return is_one and not _megatron(folder, names)


def _is_metadata(folder: str) -> bool:
    """Whether the ``.metadata`` of a folder without items is that of torch.distributed.checkpoint."""
    try:
        with open(os.path.join(folder, ".metadata"), "rb") as file:  # noqa: PTH123 - its first bytes
            return is_metadata(file.read(HEAD_NBYTES))
    except OSError:
        return False


def is_metadata(head: bytes) -> bool:
    """Whether the first bytes of a plain pickle are those of a ``.metadata`` of torch.distributed.checkpoint."""
    return re.search(rb"torch\.distributed\.(?:_shard\.)?checkpoint\.", head) is not None


def _megatron(folder: str, names: tuple[str, ...]) -> bool:
    is_dist = ".metadata" in names and ("common.pt" in names or _names_backend(folder, names))
    is_dist = is_dist or ("common.pt" in names and _names_backend(folder, names))
    return is_dist or any(re.fullmatch(_RANKED, name, re.ASCII) for name in names) or _is_llama(names)


def _names_backend(folder: str, names: tuple[str, ...]) -> bool:
    """Whether the ``metadata.json`` of a folder is Megatron's, which says how the tensors were written."""
    if "metadata.json" not in names:
        return False
    try:
        with open(os.path.join(folder, "metadata.json"), "rb") as file:  # noqa: PTH123 - its first bytes
            return b'"sharded_backend"' in file.read(HEAD_NBYTES)
    except OSError:
        return False


def _is_llama(names: tuple[str, ...]) -> bool:
    found = [name for name in names if re.fullmatch(r"consolidated\.\d+\.pth", name, re.ASCII)]
    return len(found) > 1


_RANKED = (
    r"(?:mp|tp)_rank_\d+(?:_(?:pp_rank_)?\d+)?(?:_(?:ep_rank_)?\d+)?/"
    r"(?:model_optim_rng\.pt|model_rng\.pt|[^/]+\.ckpt)"
)
"""The files of Megatron's ranks, each in a folder of its own."""

LAYOUTS: tuple[Layout, ...] = (
    Layout("dcp", _dcp),
    Layout("megatron", _megatron),
    Layout(
        "deepspeed",
        _named(r"(?:\w+_)?(?:zero_pp_rank_\d+_)?mp_rank_\d+_(?:model|optim)_states\.pt|layer_\d+-model.*_states\.pt"),
    ),
    Layout("fsdp", _named(RANKED)),
    Layout("safetensors-dcp", _named(SHARDED)),
)
"""In the order in which a folder is held against them: the first that claims it, reads it."""


def folder_source(path: str, tag: str | None = None, tp_rules: str | os.PathLike[str] | None = None) -> Source | None:
    """What stands for a folder that is one checkpoint, or leads to one; ``None``: there is none, or it is no folder.

    Args:
        path: the folder.
        tag: which of several steps in it is meant.
        tp_rules: the file of rules by which slices of ranks are joined; with one, files that differ in one number of
            their names alone are one checkpoint.

    Raises:
        FileAccessError: it cannot be listed; there are several checkpoints in it, or no such step.
        CorruptError: it points to a step that is not there, or outside of it.
    """
    if not os.path.isdir(path):
        return None
    from ckptkit.formats.distributed.around import found_in

    if tp_rules is not None:
        return _by_rules(path, tag, os.fsdecode(tp_rules))
    found = found_in(path, tag)
    if found is None:
        return None
    if found.layout is None:
        return unpacked_source(found.root) or SourceFile(found.root)
    return _source(path, found, found.layout, tag)


def _source(path: str, found: Found, layout: str, tag: str | None) -> FolderSource:
    return FolderSource(
        path,
        found.root,
        layout,
        found.names,
        found.tag,
        own=found.own,
        members=found.members,
        asked=tag,
        findings=found.findings,
    )


def _by_rules(path: str, tag: str | None, tp_rules: str) -> FolderSource:
    """The folder of ranks whose slices are joined by rules that are given.

    Raises:
        As `folder_source`.
        FileAccessError: it holds none, or the rules cannot be read.
        FormatError: the rules are none.
    """
    from ckptkit.formats.distributed.around import Found, found_in
    from ckptkit.formats.distributed.rank_files import numbered
    from ckptkit.formats.distributed.tensor_parallel import rules_in

    rules, names = rules_in(tp_rules), listing(path)
    is_placed = any(layout.claims(path, names) for layout in LAYOUTS if layout.format in _PLACED)
    is_it = not is_placed and tag is None and bool(numbered(names))
    found = Found(path, "megatron", names, tuple(numbered(names))) if is_it else found_in(path, tag)
    if found is None or (found.layout != "megatron" and (found.layout in _PLACED or not numbered(found.names))):
        raise FileAccessError(f"{path}: --tp-rules joins the files of ranks, and this is no folder of such", path=path)
    source = _source(path, found, "megatron", tag)
    source.tp_rules, source.rules = rules, tp_rules
    return source


_PLACED = ("dcp", "megatron", "safetensors-dcp")
"""Layouts whose readers say themselves what belongs together."""
