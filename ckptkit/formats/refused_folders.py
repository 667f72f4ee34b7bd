"""What a folder is that was given in place of a file, by the names in it, and which path to give.

Sources: ``torch/distributed/checkpoint/filesystem.py``, ``deepspeed/runtime/engine.py``,
``megatron/training/checkpointing.py``, ``transformers/trainer.py``; Lightning and accelerate use the first two.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from ckptkit.bytesource import SourceFile
from ckptkit.errors import CkptkitError
from ckptkit.formats.containers import SUFFIXES
from ckptkit.formats.format import Probe
from ckptkit.formats.refused_contents import describe_pickle, unpacked
from ckptkit.formats.shard_parts import known_as, names_in
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.report import count_of

__all__ = ["describe_folder", "parts_in"]

_TAGS = ("latest", "latest_universal", "latest_checkpointed_iteration.txt")
"""Files that say in which folder beside them the last checkpoint is: DeepSpeed's two, Megatron's."""

_MOST_TAG = 100
"""Characters of a folder's name in such a file."""

_MOST_FOLDERS = 8
"""Names in a folder that are looked at as folders themselves."""

_WEIGHTS = r"(?:model|pytorch_model|adapter_model|diffusion_pytorch_model|consolidated)\.(?:safetensors|bin|pth|pt)"
"""What trainers call the weights in their folders."""

_UNMERGED = "they belong together, and ckptkit does not merge them yet"


def describe_folder(path: str) -> str:
    """What a folder is that was given in place of a file, and what to give instead."""
    names = names_in(path)
    if packing := unpacked(path):
        return f"is {packing}"
    for name in names[:_MOST_FOLDERS]:  # unzip makes a folder around it
        if packing := unpacked(os.path.join(path, name)):
            return f"holds {name}, {packing}"
    said = _whole(path, names) or _distributed(path, names) or _pointing(path, names)
    if said is not None:
        return said
    if "saved_model.pb" in names:
        return "is a TensorFlow SavedModel, no torch checkpoint"
    if "_CHECKPOINT_METADATA" in names or "manifest.ocdbt" in names:
        return "is an orbax checkpoint (JAX), no torch checkpoint"
    files = [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    which = f"; give one of the {len(files):,} files in it, such as" if len(files) > 1 else "; give the file in it:"
    return f"is a folder, not a file{which} {os.path.join(path, files[0])}" if files else "is a folder, not a file"


def parts_in(path: str) -> str | None:
    """What a folder is whose files are parts of one checkpoint, and what to give instead; ``None``: each is its own."""
    names = names_in(path)
    known = [found for name in names if (found := known_as(name)) is not None]
    if len(known) == 1 and not known[0][1]:  # in one part that is the whole
        return None
    return _distributed(path, names)


def _whole(path: str, names: Sequence[str]) -> str | None:
    """As a folder in which the whole lies in one file, or under one index."""
    kind = "is a checkpoint folder of a trainer" if "trainer_state.json" in names else "is a folder, not a file"
    if indexes := [name for name in names if name.endswith(".index.json")]:
        return f"{kind}; give the index of its shards: {os.path.join(path, indexes[0])}"
    if found := [name for name in names if re.fullmatch(_WEIGHTS, name)]:
        return f"{kind}; give the weights in it: {os.path.join(path, found[0])}"
    return None


def _distributed(path: str, names: Sequence[str]) -> str | None:
    """As what several processes wrote."""
    if items := [name for name in names if name.endswith(".distcp")]:
        files = count_of(len(items), ".distcp file")
        return f"is a folder of torch.distributed.checkpoint ({files}): {_index(path, names)}"
    known = {name: found for name in names if (found := known_as(name)) is not None}
    if not known:
        return None
    models = [name for name in known if name.endswith("model_states.pt")]
    if len(models) == 1 and models[0].startswith("mp_rank_"):  # of ZeRO stage 1 and 2 they are whole
        return f"is a DeepSpeed checkpoint; give the weights in it: {os.path.join(path, models[0])}"
    name = (models or [*known])[0]
    layout, alone = known[name]
    if len(known) == 1 and not alone:
        return f"is {layout}, in one part that is the whole; give {_file_in(os.path.join(path, name))}"
    return f"is {layout} ({count_of(len(known), 'part')}: {name}, ...); {_UNMERGED}"


def _pointing(path: str, names: Sequence[str]) -> str | None:
    """As a folder that says which folder in it is the last checkpoint."""
    for tag in _TAGS:
        last = _last(path, tag) if tag in names else None
        if last is not None:
            return f"is a training folder; its last checkpoint, {last}, {describe_folder(last)}"
    return None


def _file_in(path: str) -> str:
    """The one file of a rank, in the rank's folder where it has one."""
    files = [name for name in names_in(path) if name.endswith((".pt", ".ckpt")) and name != "distrib_optim.pt"]
    return os.path.join(path, files[0]) if files else path


def _last(path: str, tag: str) -> str | None:
    """The folder that such a file names, where it is there: a tag, or the number of an iteration."""
    try:
        with open(os.path.join(path, tag), encoding="utf-8") as file:  # noqa: PTH123 - a few characters
            name = file.read(_MOST_TAG).strip()
    except (OSError, UnicodeDecodeError):
        return None
    if tag.startswith("latest_check"):
        name = f"iter_{int(name):07d}" if name.isascii() and name.isdigit() else name
    folder = os.path.join(path, name)
    return folder if name and os.path.basename(name) == name and name != ".." and os.path.isdir(folder) else None


def _index(path: str, names: Sequence[str]) -> str:
    """What is to be known of ``.metadata``, a pickle that whoever merges the folder executes."""
    if ".metadata" not in names:
        return "its .metadata is missing, so the save never finished; or each rank wrote its own (__0.metadata)"
    told = f"with .metadata {_UNMERGED}"
    try:
        file = SourceFile(os.path.join(path, ".metadata"))
    except CkptkitError:
        return told
    try:
        uses = describe_pickle(Probe(file, DEFAULT_LIMITS))[1]
    except CkptkitError as error:
        return f"{told}; .metadata cannot be read ({error})"
    finally:
        file.close()
    bad = [use.name for use in uses if use.verdict == "dangerous"]
    if bad:
        return f"{told}; .metadata is HOSTILE: a loader that executes it would run {', '.join(bad[:3])}"
    return f"{told}; .metadata is a pickle that names nothing dangerous"
