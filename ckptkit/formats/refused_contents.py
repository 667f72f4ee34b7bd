"""A pickle that torch.save did not write: what it asks for, found without executing it.

The kind of a text file in a checkpoint's place: an error page, a pointer, a configuration, source code.

ZIP archives that are not torch checkpoints: what their records' names say they are, and what to do.

- ``.npz``: arrays as ``.npy`` records (``numpy/lib/_npyio_impl.py``)
- ``.keras``: ``config.json``, ``metadata.json`` and ``model.weights.h5`` (``keras/src/saving/saving_lib.py``)
- ``.mar`` (TorchServe): ``MAR-INF/MANIFEST.json`` (``model_archiver/model_packaging_utils.py``)
- ``.docx``, ``.xlsx``, ``.pptx``: ``[Content_Types].xml`` (ECMA-376); ``.jar``, ``.apk``, wheels
- any other: its content is seen only after unpacking; files in it that look like checkpoints are named
"""

from __future__ import annotations

import codecs
import html
import json
import re
from collections.abc import Iterable, Mapping
from typing import get_args

from ckptkit.checkpoint import GlobalUse, Verdict
from ckptkit.errors import FormatError
from ckptkit.formats.contents import ContentSearch
from ckptkit.formats.format import Probe
from ckptkit.formats.magic import SCANNED_NBYTES, guess_pickle, scanned
from ckptkit.formats.zip_archive import Record
from ckptkit.pickling.inert import Global, InertDict, Object
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.trust import global_uses, merge_uses
from ckptkit.report import count_of, listed

__all__ = ["describe_pickle", "describe_text", "describe_zip", "is_pickle", "names_joblib"]

_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""LONG1 0x1950a86a20f9469cfc6c and STOP: the first pickle of a file before torch 1.6."""

_WRITERS = (
    ("sklearn.", "pickle, of a scikit-learn model"),
    ("torch.distributed.checkpoint.", "torch.distributed.checkpoint: the list of what is in the .distcp files beside "
     "it; give the folder"),
    ("pandas.", "pickle, of a pandas table"),
    ("xgboost.", "pickle, of an XGBoost model"),
    ("lightgbm.", "pickle, of a LightGBM model"),
    ("torch.", "pickle.dump, of torch objects but without the bytes of any tensor"),
    ("numpy.", "pickle, of numpy arrays"),
)  # fmt: skip


def is_pickle(probe: Probe) -> bool:
    """Whether the file is a pickle, or several."""
    guess = guess_pickle(probe.head, probe.file.size)
    if guess != "maybe":
        return guess is not None
    contents = ContentSearch(probe.limits)
    contents.look("", probe.file.whole)
    return bool(contents.pickles)


def describe_pickle(probe: Probe) -> tuple[str, tuple[GlobalUse, ...]]:
    """One sentence, and the verdict on every name the pickle asks for, as far as it can be read."""
    if _LEGACY_MAGIC in probe.head[:16]:  # not in that of a storage after a name
        return "a torch checkpoint of the legacy format (before torch 1.6) that is truncated in its first bytes", ()
    data = probe.file.read(0, min(probe.file.size, probe.limits.pickle_nbytes))
    try:
        pickle = read_pickle(data, limits=probe.limits)
    except FormatError as error:
        names = merge_uses(error.globals, scanned(data[:SCANNED_NBYTES], error.globals))
        what = f"a Python pickle that cannot be read to its end ({error.message})"
    else:
        behind = ContentSearch(probe.limits)
        behind.look("", probe.file.whole.part(pickle.end, probe.file.size - pickle.end))
        names = merge_uses(global_uses(pickle.globals), (use for use in behind.uses() if use.kind == "name"))
        what = f"a Python pickle of {_kind(pickle.root)}"
        if pickle.end < probe.file.size:
            what += f", with {count_of(probe.file.size - pickle.end, 'byte')} after it"
    if names_joblib(names):
        return f"a joblib file, not written by torch.save; joblib.load reads it; {_listed(names)}", names
    writer = next((how for prefix, how in _WRITERS if any(use.name.startswith(prefix) for use in names)), None)
    told = f" (written by {writer})" if writer is not None else ""
    return f"{what}, but not written by torch.save{told}; {_listed(names)}", names


def names_joblib(names: Iterable[GlobalUse]) -> bool:
    """Whether a pickle with these names is a joblib pickle, which puts arrays between the opcodes."""
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


def _listed(names: tuple[GlobalUse, ...]) -> str:
    if not names:
        return "it names no class or function"
    order = get_args(Verdict)
    shown = sorted(names, key=lambda use: -order.index(use.verdict))
    told = [f"{use.name:.80}" + (" (dangerous)" if use.verdict == "dangerous" else "") for use in shown]
    return f"names in it, which ckptkit never imports: {listed(told, 5)}"


_READ_NBYTES = 64 << 10
"""Bytes of a text that are read: a page's title and an error's message are at its beginning."""

_REFUSALS = (
    (re.compile(r"invalid (user|credentials)|unauthorized|401|bad credentials|authentication", re.I),
     "the server requires authentication: log in or give a token, and download it again"),
    (re.compile(r"access.{0,40}restricted|gated|forbidden|403|accessdenied|access denied|not authorized", re.I),
     "you have no access to it: accept its conditions or ask for access, and download it again"),
    (re.compile(r"not found|404|nosuchkey|does not exist|no such", re.I),
     "there is no file at that address: check the name and the revision"),
    (re.compile(r"rate.?limit|too many requests|429|quota|slow.?down", re.I),
     "the server asks you to wait: download it again later"),
    (re.compile(r"expired|signature", re.I), "the address has expired: get a new one"),
    (re.compile(r"internal server error|bad gateway|service unavailable|gateway time|50[0234]", re.I),
     "the server failed: download it again later"),
)  # fmt: skip

_CODE = re.compile(r"(?:#!|import \w|from [\w.]+ import |def \w+\(|class \w+[(:]|@\w+|\"\"\"|# -\*-)")
_HEADING = re.compile(r"\[[\w .:-]+\]\s*(?:\n|$)")
_MAPPING = re.compile(r"(?:---\s*\n|[\w-]+:(?:\s|$)|- \w)")


def describe_text(probe: Probe) -> str | None:
    """One sentence about a text file, with the remedy; ``None``: it is not text."""
    raw = probe.file.read(0, min(_READ_NBYTES, probe.file.size))
    text = _decoded(raw)
    if text is None:
        return None
    if text.startswith("version https://git-lfs.github.com/"):
        return _lfs_pointer(text)
    begin = text.lstrip("\ufeff \t\r\n")
    lower = begin[:2000].lower()
    if re.match(r"<!doctype\s+html|<html|<head|<script|<!--", lower):
        return _page(begin)
    if lower.startswith(("<?xml", "<error")):
        return _xml(begin)
    if begin.startswith(("{", "[")) and not _HEADING.match(begin) and (words := _json(begin, probe)) is not None:
        return words
    return _plain(begin, probe)


def _decoded(raw: bytes) -> str | None:
    """The text, or ``None`` if the bytes are not text; the last character may be cut."""
    name = "utf-8"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and len(raw) > 3:
        name = "utf-16"
    try:
        text = codecs.getincrementaldecoder(name)().decode(raw)
    except UnicodeDecodeError:
        return None
    return text if all(c >= " " or c in "\t\n\r\f" for c in text) else None


def _lfs_pointer(text: str) -> str:
    size = re.search(r"^size ([0-9]{1,19})$", text, re.MULTILINE)
    digest = re.search(r"^oid sha256:([0-9a-f]{64})$", text, re.MULTILINE)
    facts = f" of {int(size[1]):,} bytes" if size else ""
    facts += f" (sha256 {digest[1]})" if digest else ""
    return f"a git-lfs pointer, not the file{facts} it stands for; run: git lfs pull"


def _clean(text: str, most: int = 120) -> str:
    words = " ".join(html.unescape(text).split())
    return "".join(c if c.isprintable() else "?" for c in words)[:most]


def _advice(text: str, otherwise: str) -> str:
    return next((advice for pattern, advice in _REFUSALS if pattern.search(text)), otherwise)


def _page(text: str) -> str:
    title = re.search(r"<title[^>]{0,200}>([^<]{1,500})", text, re.IGNORECASE)
    shown = f" (its title: {_clean(title[1])!r})" if title else ""
    advice = _advice(title[1] if title else "", "the download got an error or login page; check the address")
    return f"an HTML page, not a checkpoint{shown}: {advice}"


def _xml(text: str) -> str:
    code = re.search(r"<Code>([^<]{1,200})</Code>", text)
    message = re.search(r"<Message>([^<]{1,500})</Message>", text)
    if code is None:
        return "an XML document, not a checkpoint"
    words = f": {_clean(message[1])!r}" if message else ""
    advice = _advice(code[1], "check the address")
    return f"an error message from a storage server instead of the file ({_clean(code[1])}{words}); {advice}"


_DOCUMENTS = (
    ("weight_map", "an index of shards that cannot be read"),
    ("added_tokens", "a tokenizer"),
    ("model_type", "a model's configuration"),
    ("architectures", "a model's configuration"),
    ("_class_name", "a pipeline's configuration"),
    ("peft_type", "an adapter's configuration"),
    ("nbformat", "a notebook"),
)
"""Keys that identify the JSON files beside checkpoints."""


def _json(text: str, probe: Probe) -> str | None:
    keys = set(re.findall(r'"([^"\\]{1,80})"\s*:', text))
    if not keys and text[:1] == "{" and text[1:].lstrip()[:1] not in ("}", ""):
        return None
    if text.startswith("{") and probe.file.size < 4096:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = {}
        words = next(
            (document[key] for key in ("error", "message", "detail") if isinstance(document.get(key), str)), None
        )
        if words is not None:
            return f"an error message instead of the file ({_clean(words)!r}): {_advice(words, 'check the address')}"
    what = next((f", apparently {name}" for key, name in _DOCUMENTS if key in keys), "")
    return (
        f"a JSON file{what}, not a checkpoint; give the weights (.safetensors, .bin, .pth) or the index of their shards"
    )


def _plain(text: str, probe: Probe) -> str:
    first = text.split("\n", 1)[0].strip()
    if probe.file.size < 4096 and len(text.splitlines()) <= 3:
        for pattern, advice in _REFUSALS:
            if pattern.search(first) and re.match(r"[\w\d' :.,-]{3,200}$", first):
                return f"an error message instead of the file ({_clean(first)!r}): {advice}"
    what = "a text file"
    if _CODE.match(text):
        what = "source code"
    elif _HEADING.match(text):
        what = "a configuration (INI)"
    elif _MAPPING.match(text):
        what = "a configuration (YAML)"
    elif _is_table(text):
        what = "a table (CSV)"
    return f"{what}, not a checkpoint; it begins with {text[:40]!r}"


def _is_table(text: str) -> bool:
    lines = text.splitlines()[:5]
    separator = next((c for c in "\t,;" if lines and lines[0].count(c)), None)
    return separator is not None and len(lines) > 1 and len({line.count(separator) for line in lines[:-1]}) == 1


_CHECKPOINTS = (".pth", ".pt", ".pt2", ".ckpt", ".bin", ".safetensors", ".pkl", ".jit", ".ptl", ".tar", ".pth.tar")
"""Endings that checkpoints have."""


def describe_zip(records: Mapping[str, Record]) -> str:
    """One sentence: what the archive is, and the remedy if there is one.

    Args:
        records: by their full names; no torch container claims them.
    """
    names = [name for name in records if not name.endswith("/")]
    inside = [name for name in names if name.lower().endswith(_CHECKPOINTS)]
    if not names:
        return "a zip archive without any files"
    if all(name.endswith(".npy") for name in names):
        return f"a numpy archive (.npz) of {count_of(len(names), 'array')}: {_some(names)}; numpy.load reads it"
    if "model.weights.h5" in records or ("config.json" in records and "metadata.json" in records):
        return "a Keras model (.keras), not a torch checkpoint; keras.saving.load_model reads it"
    if "MAR-INF/MANIFEST.json" in records:
        held = (
            f"; its weights are {_some(inside)}: unpack that first (unzip)" if inside else "; unpack it first (unzip)"
        )
        return f"a TorchServe model archive (.mar){held}"
    if "[Content_Types].xml" in records:
        return "an office document (.docx, .xlsx or .pptx), not a checkpoint"
    if "META-INF/MANIFEST.MF" in records or "AndroidManifest.xml" in records:
        return "a Java or Android package (.jar, .apk), not a checkpoint"
    if any(name.endswith(".dist-info/METADATA") for name in names):
        held = f", which contains {_some(inside)}: unpack that first (unzip)" if inside else ""
        return f"a Python package (.whl){held}" if inside else "a Python package (.whl), not a checkpoint"
    if "data.pkl" in records:
        return (
            "the records of a torch checkpoint without their folder, as if unpacked and packed again: torch expects "
            "data.pkl inside a folder. Pack the folder itself, stored (zip -0 -r NEW.pth FOLDER)"
        )
    if inside:
        return (
            f"a zip archive, not itself a checkpoint, with {count_of(len(inside), 'checkpoint')} in it: "
            f"{_some(inside)}; unpack it first (unzip)"
        )
    return f"a zip archive without a torch checkpoint; it contains {count_of(len(names), 'file')}: {_some(names)}"


def _some(names: Iterable[str]) -> str:
    """The first names, each cut short."""
    return listed([repr(name if len(name) <= 80 else name[:80] + "…") for name in names], 4)
