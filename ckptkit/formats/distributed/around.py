"""Which checkpoint a folder means: itself, the step that it points to, the only one in it, or the chosen one.

Trainers put folders around their checkpoints, and files that say which of them is the last:

- DeepSpeed (``deepspeed/runtime/engine.py``): ``latest`` and ``latest_universal``, the name of a folder beside them
- Megatron (``megatron/training/checkpointing.py``): ``latest_checkpointed_iteration.txt``, the number of
  ``iter_0000010`` or the word ``release``
- transformers' Trainer: ``checkpoint-10``, in it DeepSpeed's ``global_step10`` and ``latest``, accelerate's
  ``pytorch_model_fsdp_0``, or the weights in a file or under an index
- accelerate (``accelerate/utils/fsdp_utils.py``): ``pytorch_model_fsdp_0`` and ``optimizer_0``, two folders of
  torch.distributed.checkpoint that are one resume dict; with DeepSpeed a folder ``pytorch_model``, and ``latest``
- Lightning (``lightning/fabric/strategies/fsdp.py``): a folder of torch.distributed.checkpoint with all else in
  ``meta.pt``
- torchtitan: ``step-10``; the hub's writer: ``sharded`` beside what was consolidated from it

If no such file chooses among several, none is chosen: they are listed, and ``--tag`` names one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from ckptkit import places
from ckptkit.errors import CkptkitError, CorruptError, FileAccessError, MissingFileError
from ckptkit.formats.containers import FORMATS, SHARED_SUFFIXES, SUFFIXES
from ckptkit.formats.distributed.folder import listing
from ckptkit.formats.distributed.layouts import LAYOUTS, RANKED, SHARDED
from ckptkit.formats.format import Probe
from ckptkit.formats.shards import CUSTOMARY, TEXTS, indexes_in, is_index_name, is_shard_name, unnamed_shards
from ckptkit.formats.unpacked import is_unpacked, packing_of
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.nearness import did_you_mean
from ckptkit.report import Finding, count_of, listed
from ckptkit.shell import quoted

__all__ = ["POINTERS", "Found", "describe_folder", "found_in", "pointed", "sharded_at", "sharded_in"]

POINTERS = ("latest", "latest_checkpointed_iteration.txt", "latest_universal")
"""Files that name the last step: DeepSpeed's, Megatron's, and DeepSpeed's of universal checkpoints."""

_MOST_POINTER = 1024
"""Bytes of such a file; a name has at most 255."""

_DEEPEST = 8
"""Folders that are processed from one that points to the next."""

_MOST_FOLDERS = 1000
"""Folders in one that are searched."""

_MOST_FILES = 1000
"""Files in a folder that are examined."""

_MOST_LOOKED_AT = 8
"""Names in a folder without a checkpoint that are searched as folders themselves."""

_LISTED = 8
"""Checkpoints that a message lists."""

WEIGHTS = (
    r"(?:model|pytorch_model|adapter_model|diffusion_pytorch_model|consolidated|pytorch_model_fsdp(?:_\d+)?)"
    r"\.(?:safetensors|bin|pth|pt)"
)
"""What trainers call the weights in their folders."""

_BESIDE = r"(?:data|optimizer|scheduler|sampler|training_args|trainer_state|(?:rng_state|random_states).*)\.\w+"
"""What trainers call the files beside their checkpoints' folders."""

_JOINED = r"(?:pytorch_model_fsdp|optimizer)_\d+"
"""accelerate's folders, each one of torch.distributed.checkpoint."""

_MARKS = (".distcp", "/.metadata")
"""The extensions that identify these files."""

_OWN = {
    "dcp": r"[^/]*\.distcp|\.metadata(?:\.tmp)?|__\d+\.metadata|meta\.pt|common\.pt",
    "megatron": r"[^/]*\.distcp|\.metadata(?:\.tmp)?|__\d+\.metadata|common\.pt|(?:mp|tp)_rank_[^/]*/[^/]*"
    r"|consolidated\.\d+\.\w+|modelopt_state/[^/]*",
    "deepspeed": r"[^/]*_states\.pt|zero/.*",
    "fsdp": RANKED,
    "safetensors-dcp": SHARDED,
}
"""Which files in a folder of each layout are its own; so are texts beside them."""

_NAMED = re.compile(
    r".*\.distcp|\.metadata|__\d+\.metadata|.*_states\.pt|.*rank[_-]?\d+.*|shard-\d{5}-.*|consolidated\.\d+\..*"
    r"|metadata\.json|.*-\d{5,6}-of-\d{5,6}\.\w.*|pytorch_model_fsdp_\d+",
    re.ASCII,
)
"""Names, of files and folders, at least one of which is in every folder that may be a sharded checkpoint."""


class Found(NamedTuple):
    """The checkpoint that a folder means.

    Attributes:
        root: the folder of the files; for one file, its path.
        layout: name of its format; ``None``: it is one file, or an index.
        names: the files below the folder, by their paths from there, with slashes.
        own: those that belong to the checkpoint.
        members: what it is combined from beside the folder's own files: folders (with a slash at the end), files.
        tag: the name of the step; ``None``: the folder was not chosen from several.
        findings: about the choice.
    """

    root: str
    layout: str | None = None
    names: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    tag: str | None = None
    findings: tuple[Finding, ...] = ()


# The folder itself.


def sharded_at(folder: str, inside: Sequence[str] | None = None) -> Found | None:
    """The sharded checkpoint that a folder is by its own files; ``None``: it is not one.

    Args:
        folder: its path.
        inside: the names in it, if known.

    Raises:
        FileAccessError: it cannot be listed.
        LimitError: it contains more files than any checkpoint.
    """
    if inside is None:
        try:
            inside = places.listdir(folder)
        except OSError as error:
            raise places.unreadable_folder(folder, error) from error
    if not any(map(_NAMED.fullmatch, inside)):
        return None
    names = listing(folder)
    for layout in LAYOUTS:
        if layout.claims(folder, names):
            own = _own(layout.format, names)
            is_lightning = layout.format == "dcp" and "meta.pt" in names
            return Found(folder, layout.format, names, own, ("meta.pt",) if is_lightning else ())
    return _accelerate(folder, names) or _shards(folder, names)


def _own(layout: str, names: Sequence[str]) -> tuple[str, ...]:
    pattern = re.compile(_OWN.get(layout, ".*"), re.ASCII)
    return tuple(
        name for name in names if pattern.fullmatch(name) is not None or ("/" not in name and name.endswith(TEXTS))
    )


def _accelerate(folder: str, names: tuple[str, ...]) -> Found | None:
    """The model's and the optimizer's folders, which are one checkpoint."""
    inside: dict[str, list[str]] = {}
    for name in names:
        above, slash, _ = name.partition("/")
        if slash and re.fullmatch(_JOINED, above, re.ASCII):
            inside.setdefault(f"{above}/", []).append(name)
    members = [member for member, files in inside.items() if any(name.endswith(_MARKS) for name in files)]
    if not any(member.startswith("pytorch") for member in members):
        return None
    members.sort(key=lambda member: (member.startswith("optimizer"), _natural(member)))
    own = tuple(name for member in members for name in inside[member])
    return Found(folder, "dcp", own, own, tuple(members))


def _shards(folder: str, names: tuple[str, ...]) -> Found | None:
    """Shards that no index names, where by what they are called they are all of one checkpoint."""
    stems = _stems(names)
    if len(stems) != 1 or any(is_index_name(name) for name in names if "/" not in name):
        return None
    ((_, shards),) = stems.items()
    if unnamed_shards(shards):
        return None
    is_safe = shards[0].endswith(".safetensors")
    return Found(folder, "safetensors-sharded" if is_safe else "torch-sharded", tuple(shards), tuple(shards))


def _stems(names: Sequence[str]) -> dict[str, list[str]]:
    """The shards of each checkpoint, by how it would be called as one file and how many they are declared to be."""
    stems: dict[str, list[str]] = {}
    for match in filter(None, map(CUSTOMARY.fullmatch, names)):
        is_plain = "/" not in match[0] and match[4][:1] == "." and os.path.splitext(match[0])[1] in SUFFIXES
        if is_plain and 1 < int(match[3]) <= DEFAULT_LIMITS.shards:
            stems.setdefault(f"{match[1]}{match[4]} of {match[3]}", []).append(match[0])
    return stems


# What a folder points to.


def pointed(folder: str) -> tuple[str, str] | None:
    """The file in a folder that names its last step, and that step's name; ``None``: there is none.

    Raises:
        CorruptError: it names no folder that is there, or one that is outside.
    """
    for pointer in POINTERS:
        path = places.below(folder, pointer)
        if places.isdir(path):  # a link to the step
            return pointer, pointer
        if not places.isfile(path):
            continue
        try:
            text = places.head(path, _MOST_POINTER).decode().strip()
        except FileAccessError:
            raise
        except OSError as error:
            raise FileAccessError(f"{path}: cannot be read: {error.strerror}", path=path) from error
        except UnicodeDecodeError:
            text = ""
        name = _numbered(folder, int(text)) if pointer.endswith(".txt") and _is_number(text) else text
        problem = ""
        if not text or "\n" in text or len(text) > 255:
            problem = "does not contain the name of a folder"
        elif not is_shard_name(name):
            problem = f"names {text!r:.80}, which leads out of the folder"
        elif not places.isdir(places.below(folder, name)):
            problem = f"names {name!r:.80}, which does not exist"
        if problem:
            there = [each for each, _ in _steps(folder)]
            told = f"; available: {listed(there, _LISTED)} (--tag NAME selects one)" if there else ""
            raise CorruptError(problem + told, path=path, names=there)
        return pointer, name
    return None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _numbered(folder: str, number: int) -> str:
    """The folder of a step: with Megatron's name if it exists, otherwise the one whose name ends like that (verl's)."""
    name = f"iter_{number:07d}"
    if places.isdir(places.below(folder, name)):
        return name
    alike = [each for each in _folders(folder) if re.fullmatch(rf".*[^0-9]0*{number}", each)]
    return alike[0] if len(alike) == 1 else name


def _steps(folder: str) -> Iterator[tuple[str, Found | None]]:
    """The folders in one that mean a checkpoint, with what it is; ``None``: for several, or for a damaged one."""
    for name in _folders(folder):
        try:
            found = _standing(places.below(folder, name), is_inner=True)
        except (CorruptError, FileAccessError):
            yield name, None
        else:
            if found is not None:
                yield name, found


def _folders(folder: str) -> list[str]:
    """The folders in one, in the order of their numbers; links too, but those to a folder that is there itself."""
    own: dict[Hashable, str] = {}
    try:
        with places.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and places.leads_to(entry.is_dir) and len(own) < _MOST_FOLDERS:
                    key = places.identity(entry.path)
                    if key not in own or not entry.is_symlink():
                        own[key] = entry.name
    except OSError as error:
        raise places.unreadable_folder(folder, error) from error
    return sorted(own.values(), key=_natural)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"([0-9]{1,18})", name)]


# The checkpoint that a folder means.


def sharded_in(path: str, tag: str | None = None, depth: int = 0) -> Found | None:
    """The sharded checkpoint that a folder is, or points to; ``None``: it is a folder of any checkpoints.

    Args:
        path: the folder.
        tag: which of several steps is meant; one that is not a sharded checkpoint has no layout.
        depth: how many folders lead to it.

    Raises:
        CorruptError: it points to a folder that is not there, or outside.
        FileAccessError: there is no such step.
    """
    if tag is not None:
        return found_in(path, tag)
    own = sharded_at(path)
    if own is not None:
        return own
    try:
        last = pointed(path)
    except CorruptError as error:
        if error.names:
            raise
        return None  # no step is there: it may mean anything
    if last is None:
        return None
    _require_end(path, depth)
    step = places.below(path, last[1])
    found = sharded_in(step, depth=depth + 1)
    if found is None:  # as verl's, whose step holds one with other files beside
        with contextlib.suppress(CorruptError, FileAccessError):
            found = _standing(step)
    return None if found is None or found.layout is None else _chosen(path, last, found)


def found_in(path: str, tag: str | None = None) -> Found | None:
    """The one checkpoint that a folder means, of any layout; ``None`` if it has none.

    Args:
        path: the folder.
        tag: which of several steps is meant.

    Raises:
        CorruptError: it points to a folder that is not there or outside, or shards are missing.
        FileAccessError: there are several, which the message lists, or there is no such step.
    """
    return _standing(path) if tag is None else _tagged(path, tag)


def _tagged(path: str, tag: str) -> Found:
    own = sharded_at(path)
    per_rank = own is not None and (own.layout == "fsdp" or (own.layout == "dcp" and ".metadata" not in own.names))
    if own is not None and (per_rank or places.own_name(path) == tag):
        return own._replace(tag=tag)
    if not is_shard_name(tag):
        raise FileAccessError(f"{path}: the tag {tag!r:.80} is not the name of a folder in it", path=path)
    chosen = places.below(path, tag)
    if not places.exists(chosen) and _is_number(tag):  # by the number alone
        chosen = places.below(path, _numbered(path, int(tag)))
    if places.isfile(chosen):
        return Found(chosen, tag=tag)
    if not places.isdir(chosen):
        there = [name for name, _ in _choices(path)] if own is None else []
        told = "; the folder itself is one checkpoint: omit --tag" if own is not None else ""
        meant = did_you_mean(tag, there, shown=repr)
        told = f"; available: {listed(there, _LISTED)}{meant}" if there else told
        raise MissingFileError(f"{path}: no step {tag!r:.80} is in this folder{told}", path=path, names=there)
    found = _standing(chosen, way=f"{places.relative(chosen, path)}/")
    if found is None:
        raise FileAccessError(f"{chosen}: {describe_folder(chosen)}", path=chosen)
    return found._replace(tag=places.split(chosen)[1] if found.tag is None else found.tag)


def _standing(path: str, depth: int = 0, *, way: str = "", is_inner: bool = False) -> Found | None:
    """As `found_in`.

    Args:
        path: the folder.
        depth: how many folders lead to it.
        way: their names from the given one on, each with a slash.
        is_inner: whether it is examined as a folder inside a given one; then those in it are not.
    """
    own = sharded_at(path)
    if own is not None:
        return own
    if is_unpacked(path):
        return Found(path)
    last = pointed(path)
    if last is not None:
        _require_end(path, depth)
        step = places.below(path, last[1])
        found = _standing(step, depth + 1, way=f"{way}{last[1]}/", is_inner=is_inner)
        if found is None:
            told = f"names {last[1]!r:.80}, which {describe_folder(step)}"
            raise CorruptError(told, path=places.below(path, last[0]))
        return _chosen(path, last, found)
    if packing_of(path) is not None:
        return None
    choices = list(_choices(path, is_inner=is_inner))
    if not choices:
        return None
    (name, found), *others = choices
    if not others and found is not None:
        return found
    if not others:
        return _standing(places.below(path, name), depth + 1, way=f"{way}{name}/")
    there = [name for name, _ in choices]
    raise FileAccessError(
        f"{path}: {count_of(len(there), 'checkpoint')} are in this folder: {listed(there, _LISTED)}; "
        f"give one of them, or choose with --tag: --tag {quoted(way + there[-1])}",
        path=path,
        names=there,
    )


def _require_end(path: str, depth: int) -> None:
    if depth >= _DEEPEST:
        raise CorruptError("folders that point to one another in a loop", path=path)


def _chosen(path: str, last: tuple[str, str], found: Found) -> Found:
    """The last step, with a finding that names the others."""
    pointer, name = last
    name = os.path.basename(os.path.realpath(os.path.join(path, name))) if name == pointer else name
    others = [each for each in _folders(path) if each not in (name, pointer) and _may_be_a_step(path, each)]
    told = f"; others: {listed(others, _LISTED)} (--tag NAME selects one)" if others else ""
    message = f"the checkpoint is {name!r:.80}, as {pointer} says{told}"
    finding = Finding(code="step-chosen", severity="info", message=message)
    return found._replace(tag=name if found.tag is None else found.tag, findings=(finding, *found.findings))


def _may_be_a_step(folder: str, name: str) -> bool:
    try:
        return sharded_at(places.below(folder, name)) is not None
    except FileAccessError:
        return True


def _choices(path: str, *, is_inner: bool = False) -> Iterator[tuple[str, Found | None]]:
    """The checkpoints in a folder that is not one itself, by their names: files, indexes, folders.

    Raises:
        CorruptError: of the shards that are all there is, some are missing.
    """
    from ckptkit.formats.sharded import shard_names

    indexes = indexes_in(path)
    named = {shard for index in indexes for shard in shard_names(places.below(path, index))}
    try:
        with places.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if places.leads_to(entry.is_file))
    except OSError as error:
        raise places.unreadable_folder(path, error) from error
    weights = [name for name in names if re.fullmatch(WEIGHTS, name, re.ASCII) and name not in named]
    files = [*indexes, *weights]
    stems = {} if indexes else _stems(names)
    if not files and len(stems) == 1:
        ((_, shards),) = stems.items()
        missing = unnamed_shards(shards)
        told = count_of(len(missing), "shard") + f" missing: {listed(missing)}; get "
        told += "it into the folder" if len(missing) == 1 else "them into the folder"
        raise CorruptError(told, path=path, names=missing)
    steps = [] if is_inner else [step for step in _steps(path) if not _has_index(step, named)]
    if not files:
        names = _not_beside(names) if steps or is_inner else names
        files = [name for name in names[:_MOST_FILES] if _is_checkpoint(places.below(path, name))]
    left_out = indexes if _holds_originals(steps) else ()
    yield from ((name, Found(places.below(path, name))) for name in files if name not in left_out)
    yield from steps


def _has_index(step: tuple[str, Found | None], named: set[str]) -> bool:
    """Whether an index beside a folder names all the shards that make it a checkpoint."""
    own = () if step[1] is None else step[1].own
    return own != () and named.issuperset(f"{step[0]}/{name}" for name in own)


def _holds_originals(steps: Sequence[tuple[str, Found | None]]) -> bool:
    """Whether there is what ranks wrote: what torch consolidates from it has lost tensors of no dimension."""
    return any(name == "sharded" and found and found.layout == "safetensors-dcp" for name, found in steps)


def _not_beside(names: Sequence[str]) -> list[str]:
    return [name for name in names if re.fullmatch(_BESIDE, name, re.ASCII) is None]


def _is_checkpoint(path: str) -> bool:
    """Whether a file is a checkpoint by its content, or is called one by an ending that no other files have."""
    if os.path.splitext(path)[1].lower() in SUFFIXES - SHARED_SUFFIXES:
        return True
    try:
        file = places.opened(path)
    except FileAccessError:
        return False
    try:
        probe = Probe(file, DEFAULT_LIMITS)
        return any(container.claims(probe) for container in FORMATS)
    except CkptkitError:  # damaged, and called so
        return os.path.splitext(path)[1].lower() in SUFFIXES
    finally:
        file.close()


def describe_folder(path: str) -> str:
    """The message about a given folder without a checkpoint."""
    names = sorted(places.listdir(path))
    if packing := packing_of(path):
        return f"is {packing}"
    for name in names[:_MOST_LOOKED_AT]:  # unzip makes a folder around it
        if packing := packing_of(places.below(path, name)):
            return f"holds {name}, {packing}"
    try:
        pointed(path)
    except CkptkitError as error:
        return f"contains no checkpoint: {error}"
    if "saved_model.pb" in names:
        return "is a TensorFlow SavedModel, not a torch checkpoint"
    if "_CHECKPOINT_METADATA" in names or "manifest.ocdbt" in names:
        return "is an orbax checkpoint (JAX), not a torch checkpoint"
    return "is a folder, not a file"
