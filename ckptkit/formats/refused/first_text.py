"""What a text is that was taken for a checkpoint: error pages, pointers, configurations, source code."""

from __future__ import annotations

import codecs
import html
import json
import re

from ckptkit.formats.format import Probe

__all__ = ["describe_text"]

_READ_NBYTES = 64 << 10
"""Bytes of a text that are looked at: a page's title and an error's message stand at its beginning."""

_REFUSALS = (
    (re.compile(r"invalid (user|credentials)|unauthorized|401|bad credentials|authentication", re.I),
     "the server wants to know who you are: log in, or give a token, and get it again"),
    (re.compile(r"access.{0,40}restricted|gated|forbidden|403|accessdenied|access denied|not authorized", re.I),
     "you have no access to it: accept its conditions or ask for access, and get it again"),
    (re.compile(r"not found|404|nosuchkey|does not exist|no such", re.I),
     "there is no file at that address: check name and revision"),
    (re.compile(r"rate.?limit|too many requests|429|quota|slow.?down", re.I),
     "the server asks to wait: get it again later"),
    (re.compile(r"expired|signature", re.I), "the address was valid for a time only: get a new one"),
    (re.compile(r"internal server error|bad gateway|service unavailable|gateway time|50[0234]", re.I),
     "the server failed: get it again later"),
)  # fmt: skip

_CODE = re.compile(r"(?:#!|import \w|from [\w.]+ import |def \w+\(|class \w+[(:]|@\w+|\"\"\"|# -\*-)")
_HEADING = re.compile(r"\[[\w .:-]+\]\s*(?:\n|$)")
_MAPPING = re.compile(r"(?:---\s*\n|[\w-]+:(?:\s|$)|- \w)")


def describe_text(probe: Probe) -> str | None:
    """One sentence about a text, with the remedy; ``None``: the file is none."""
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
    """The text, or ``None`` where the bytes are none; the last character may be cut."""
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
    return f"an error message of a storage server in place of the file ({_clean(code[1])}{words}); {advice}"


_DOCUMENTS = (
    ("weight_map", "an index of shards that cannot be read"),
    ("added_tokens", "a tokenizer"),
    ("model_type", "a model's configuration"),
    ("architectures", "a model's configuration"),
    ("_class_name", "a pipeline's configuration"),
    ("peft_type", "an adapter's configuration"),
    ("nbformat", "a notebook"),
)
"""Keys by which the JSON files that lie beside checkpoints are told."""


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
            return f"an error message in place of the file ({_clean(words)!r}): {_advice(words, 'check the address')}"
    what = next((f", it seems {name}" for key, name in _DOCUMENTS if key in keys), "")
    return (
        f"a JSON file{what}, not a checkpoint; give the weights (.safetensors, .bin, .pth) or the index of their shards"
    )


def _plain(text: str, probe: Probe) -> str:
    first = text.split("\n", 1)[0].strip()
    if probe.file.size < 4096 and len(text.splitlines()) <= 3:
        for pattern, advice in _REFUSALS:
            if pattern.search(first) and re.match(r"[\w\d' :.,-]{3,200}$", first):
                return f"an error message in place of the file ({_clean(first)!r}): {advice}"
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
