"""A pickle that torch.save did not write: what it asks for, found without executing it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable

from ckptkit.checkpoint import GlobalUse
from ckptkit.errors import FormatError
from ckptkit.formats.contents import Contents
from ckptkit.formats.format import Probe
from ckptkit.formats.magic import SCANNED_NBYTES, guess_pickle, scanned
from ckptkit.pickling.inert import Global, InertDict, Object
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.trust import global_uses, merge_uses
from ckptkit.report import count_of, listed

__all__ = ["describe_pickle", "is_pickle", "names_joblib", "unpacked"]

_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""LONG1 0x1950a86a20f9469cfc6c and STOP: the first pickle of a file before torch 1.6."""

_WRITERS = (
    ("sklearn.", "pickle, of a scikit-learn model"),
    ("torch.distributed.checkpoint.", "torch.distributed.checkpoint: the list of what lies in the .distcp files beside "
     "it, which ckptkit does not merge yet"),
    ("pandas.", "pickle, of a pandas table"),
    ("xgboost.", "pickle, of an XGBoost model"),
    ("lightgbm.", "pickle, of a LightGBM model"),
    ("torch.", "pickle.dump, of objects of torch but no tensor that it holds the bytes of"),
    ("numpy.", "pickle, of numpy arrays"),
)  # fmt: skip


def is_pickle(probe: Probe) -> bool:
    """Whether the file is a pickle, or several."""
    guess = guess_pickle(probe.head, probe.file.size)
    if guess != "maybe":
        return guess is not None
    contents = Contents(probe.limits)
    contents.look("", probe.file.whole)
    return bool(contents.pickles)


def describe_pickle(probe: Probe) -> tuple[str, tuple[GlobalUse, ...]]:
    """One sentence, and the verdict on every name the pickle asks for, as far as it can be read."""
    if _LEGACY_MAGIC in probe.head[:16]:  # not in that of a storage behind a name
        return "a torch checkpoint of the legacy format (before torch 1.6) that is cut off in its first bytes", ()
    data = probe.file.read(0, min(probe.file.size, probe.limits.pickle_nbytes))
    try:
        pickle = read_pickle(data, limits=probe.limits)
    except FormatError as error:
        names = merge_uses(error.globals, scanned(data[:SCANNED_NBYTES], error.globals))
        what = f"a Python pickle that cannot be read to its end ({error.message})"
    else:
        behind = Contents(probe.limits)
        behind.look("", probe.file.whole.part(pickle.end, probe.file.size - pickle.end))
        names = merge_uses(global_uses(pickle.globals), (use for use in behind.uses() if use.kind == "name"))
        what = f"a Python pickle of {_kind(pickle.root)}"
        if pickle.end < probe.file.size:
            what += f", with {count_of(probe.file.size - pickle.end, 'byte')} behind it"
    if names_joblib(names):
        return f"a joblib file, not one torch.save wrote; joblib.load reads it; {_listed(names)}", names
    writer = next((how for prefix, how in _WRITERS if any(use.name.startswith(prefix) for use in names)), None)
    told = f"written by {writer}" if writer is not None else "not written by torch.save"
    return f"{what}, but not one torch.save wrote ({told}); {_listed(names)}", names


def names_joblib(names: Iterable[GlobalUse]) -> bool:
    """Whether a pickle with these names is one of joblib's, which puts arrays between the opcodes."""
    return any(use.name.startswith(("joblib.numpy_pickle", "sklearn.externals.joblib.numpy_pickle")) for use in names)


def _kind(root: object) -> str:
    if isinstance(root, Object):
        return f"{root.class_name:.80}"
    if isinstance(root, Global):
        return f"the name {root.qualified:.80}"
    if isinstance(root, InertDict):
        keys = [f"{key!r:.40}" for key in root if isinstance(key, (str, int))][:3]
        return (
            f"a dict of {len(root)} ({', '.join(keys)}{', ...' if len(root) > len(keys) else ''})" if keys else "a dict"
        )
    return f"a {type(root).__name__}"


def unpacked(folder: str) -> str | None:
    """What a folder is that holds the records of one of torch's archives; ``None``: it does not."""

    def holds(*names: str) -> bool:
        return any(os.path.lexists(os.path.join(folder, name)) for name in names)

    if not holds("version", "byteorder", "data") or not holds("data.pkl", ".data", "archive_format"):
        return None
    above, name = os.path.split(os.path.abspath(folder))
    # Not python -m zipfile: unzip gives torch's records the date they have, which is before 1980, and that refuses it.
    command = f"cd {shlex.quote(above)} && zip -0 -r {shlex.quote(f'{name}.pth')} {shlex.quote(name)}"
    return f"an archive of torch that was unpacked; pack it again, stored: {command}"


def _listed(names: tuple[GlobalUse, ...]) -> str:
    if not names:
        return "it names no class or function"
    order = {"dangerous": 0, "unknown": 1, "allowed": 2, "torch": 3}
    shown = sorted(names, key=lambda use: order[use.verdict])
    told = [f"{use.name:.80}" + (" (dangerous)" if use.verdict == "dangerous" else "") for use in shown]
    return f"names in it, never imported here: {listed(told, 5)}"
