"""JSON from a stranger's file, read strictly: the header of safetensors and the index of shards.

Readers of JSON (RFC 8259) disagree where the standard leaves a choice, so this is refused: duplicate keys, invalid
numbers (``NaN``), halves of surrogate pairs.  What costs more memory than a checkpoint needs is refused before it is
parsed: an empty list takes three bytes of text and seventy of memory.

Module versions (torch's ``_metadata`` of a state_dict) in containers without a place for them.

They decide how BatchNorm and others load.  safetensors headers keep them in ``__metadata__`` under
`VERSIONS`, as JSON: ``{"": {"version": 1}, "bn1": {"version": 2}}``; other readers pass over it.

The order of names that a safetensors header has only as aliases:

A tensor with several names is stored once; the other names are in ``__metadata__``, apart from the order of the header.
If they do not all come last in the state_dict, their places in it are kept under `ORDER`: a JSON list of numbers, one
for each alias in the order of the aliases.  Other readers pass over it. The metadata of an index of shards has such a
list too, for the names that it does not list: shard by shard.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NoReturn

from ckptkit.checkpoint import StateDict
from ckptkit.errors import AmbiguousError, CorruptError, FormatError, LimitError
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.pickling.inert import Global, InertDict, Object, mapping_items
from ckptkit.startup import pattern

__all__ = [
    "ORDER",
    "VERSIONS",
    "check_count",
    "check_ignored",
    "in_order",
    "lone_surrogates",
    "parse",
    "places",
    "shown",
    "state_dict_node",
    "versions_from",
    "versions_text",
]

_SURROGATE = pattern("[\ud800-\udfff]")
_ESCAPED_SURROGATE = pattern(rb"\\u[dD][89a-fA-F]")
_KEY = pattern(rb'"[ \t\r\n]*:')
_MINUS_ZERO = pattern(rb"-0(?![.eE0-9])")


def shown(name: object) -> str:
    """A name for messages, without the rest of an endless one."""
    if isinstance(name, str):
        return repr(name[:80] + "…" if len(name) > 80 else name)
    return "an int" if type(name) is int else f"a {type(name).__name__}"


def check_count(raw: bytes, limits: Limits, what: str) -> None:
    """Refuse a text with more values than any checkpoint needs; see `parse`.

    Raises:
        LimitError: there are more.
    """
    if len(raw) <= limits.json_values:
        return
    values = raw.count(b",") + raw.count(b"{") + raw.count(b"[")
    if values > limits.json_values:
        raise LimitError(f"values in {what}", limit=limits.json_values, actual=values)
    most = limits.json_values // 2  # a key costs as much as two other values
    if raw.count(b":") > most and any(itertools.islice(_KEY.finditer(raw), most, None)):
        raise LimitError(f"keys in {what}", limit=most, actual=most + 1)


def parse(raw: bytes, limits: Limits, what: str, hook: Callable[[dict[str, object]], object] | None = None) -> object:
    """The value of a text; objects are dicts, or the results of ``hook``.

    Args:
        raw: the text.
        limits: bounds on what it may ask for.
        what: the text's description, for messages.
        hook: called with each object, innermost first; its result replaces it.

    Raises:
        CorruptError: no JSON; the message says at which byte.
        LimitError: more values than any checkpoint needs.
    """
    check_count(raw, limits, what)
    if len(raw) > limits.json_wide_nbytes and not raw.isascii() and re.search(rb"[\xf0-\xf4]", raw):
        most = limits.json_wide_nbytes
        raise LimitError(f"bytes of {what} with characters beyond U+FFFF", limit=most, actual=len(raw))
    try:
        text = str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{what} is not UTF-8: byte {raw[error.start]:#04x}", offset=error.start) from None
    # Python reads -0 as the whole number 0; elsewhere it is a float.
    parse_int = _integer if _MINUS_ZERO.search(raw) else None
    may_be_half = _ESCAPED_SURROGATE.search(raw) is not None

    def made(pairs: list[tuple[str, object]]) -> object:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise AmbiguousError(f"the name {shown(twice)} appears twice in {what}")
        if may_be_half:
            for part in (*fields, *fields.values()):
                if isinstance(part, str) and _SURROGATE.search(part):
                    raise CorruptError(f"half a surrogate pair in {what} is not Unicode text")
        return fields if hook is None else hook(fields)

    def constant(name: str) -> NoReturn:
        raise CorruptError(f"{what} is not valid JSON: {name} is not a number in JSON")

    try:
        return json.loads(text, object_pairs_hook=made, parse_constant=constant, parse_int=parse_int)
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode("utf-8"))
        raise CorruptError(f"{what} is not valid JSON: {error.msg.removesuffix(' at')}", offset=at) from None
    except RecursionError:
        raise CorruptError(f"{what} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(f"{what} is not valid JSON: a number with too many digits") from None


def _integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def check_ignored(value: object, what: str) -> None:
    """Refuse, in a value that nothing reads, what other parsers refuse anywhere.

    Raises:
        CorruptError: half a surrogate pair, a number no float can hold, or nesting too deep.
    """
    level: list[object] = [value]
    for _ in range(DEFAULT_LIMITS.json_depth):
        below: list[object] = []
        for node in level:
            if isinstance(node, str) and _SURROGATE.search(node):
                raise CorruptError(f"{what}: half a surrogate pair is not Unicode text")
            if isinstance(node, float) and node in (float("inf"), float("-inf")):
                raise CorruptError(f"{what}: a number too large for any reader")
            if isinstance(node, (list, tuple)):
                below.extend(node)
            elif isinstance(node, dict):
                below.extend(node.values())
        if not below:
            return
        level = below
    raise CorruptError(f"{what}: nested more than {DEFAULT_LIMITS.json_depth} levels deep")


VERSIONS = "torch._metadata"
"""Key of the string metadata."""


def versions_from(text: str | None, limits: Limits) -> dict[str, object] | None:
    """The versions as inert nodes by module path; ``None``: there are none, or it is something else."""
    if text is None:
        return None
    try:
        document = parse(text.encode("utf-8", "surrogatepass"), limits, VERSIONS)
    except FormatError:
        return None
    if not isinstance(document, dict) or not all(_is_version(version) for version in document.values()):
        return None
    return {path: InertDict(list(version.items())) for path, version in document.items()}


def versions_text(state_dict: StateDict) -> str | None:
    """The versions as JSON; ``None``: there are none, or JSON cannot represent them."""
    if not state_dict.versions:
        return None
    document: dict[str, dict[str, object]] = {}
    for path, version in state_dict.versions.items():
        pairs = mapping_items(version)
        fields = {key: value for key, value in pairs or [] if isinstance(key, str)}
        if pairs is None or len(fields) != len(pairs) or not _is_version(fields):
            return None
        document[path] = fields
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True)


def _is_version(node: object) -> bool:
    return isinstance(node, dict) and all(isinstance(value, (bool, int, str)) for value in node.values())


def state_dict_node(entries: Mapping[str, object], versions: Mapping[str, object] | None) -> object:
    """The inert node of a state_dict: an OrderedDict with ``_metadata`` if there are versions, otherwise a dict."""
    if not versions:
        return InertDict(list(entries.items()))
    root, recorded = (Object("reduce", Global("collections", "OrderedDict"), ()) for _ in range(2))
    root.pairs, recorded.pairs = list(entries.items()), list(versions.items())
    root.state = InertDict([("_metadata", recorded)])
    return root


ORDER = "ckptkit_tied_order"
"""Key of the string metadata."""


def places(names: Collection[str], aliases: Iterable[str]) -> str | None:
    """The places of the aliases among all names; ``None``: they come last anyway."""
    place = {name: place for place, name in enumerate(names)}
    found = [place[name] for name in aliases]
    return None if found == list(range(len(names) - len(found), len(names))) else json.dumps(found)


def in_order(
    stored: Mapping[str, object], aliases: Mapping[str, object], text: str | None
) -> tuple[dict[str, object], bool]:
    """All names, and whether ``text`` gave the aliases their places; else they come last."""
    count = len(stored) + len(aliases)
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) != len(aliases) or not all(type(place) is int for place in found):
        return {**stored, **aliases}, False
    tied, others = dict(zip(found, aliases.items(), strict=True)), iter(stored.items())
    if not aliases or len(tied) < len(aliases) or not 0 <= min(tied) <= max(tied) < count:
        return {**stored, **aliases}, False
    return dict(tied[place] if place in tied else next(others) for place in range(count)), True


def lone_surrogates(names: Iterable[str]) -> list[str]:
    """Those of the names that no UTF-8 can hold."""
    return [name for name in names if any("\ud800" <= character <= "\udfff" for character in name)]
