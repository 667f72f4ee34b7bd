"""Temporary failures are tried again; messages about a URL contain no credentials.

A server that is busy, a connection that breaks: such are worth another try, after a pause that doubles (RFC 9110,
section 15.5.9, 15.6; RFC 6585, section 4).  A name that is unknown, a password that is wrong, a file that is not there
will be so again.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from ckptkit.bytesource import given_up, require_wanted
from ckptkit.errors import FileAccessError

if TYPE_CHECKING:
    from email.message import Message

__all__ = ["Passing", "is_passing", "masked", "masked_text", "retried", "sleep", "told_to_wait"]

RETRIES = 5
"""Tries after the first, while nothing comes."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
"""Seconds before the second try and before the last."""

_LONGEST_TOLD = 60.0
"""Seconds that a server may ask us to wait (``Retry-After``)."""

_LONGEST_IN_ALL = 180.0
"""Seconds that one request may spend waiting."""

_WORTH_NBYTES = 64 << 10
"""So many bytes of a body that then breaks off are an advance, and so is an eighth of those that were asked for: tries
are counted from there again."""

_HIDDEN = "***"

_Value = TypeVar("_Value")


class Passing(Exception):  # noqa: N818 - it is one that may pass
    """It failed, and may not fail the next time.

    Args:
        why: what to say if it does, without the file's name.
        after: seconds to wait, where the server says so.
        came: bytes that came before it failed and need not come again.
        wanted: those that were asked for.
    """

    def __init__(self, why: str, *, after: float | None = None, came: int = 0, wanted: int = 0) -> None:
        super().__init__(why)
        self.why = why
        self.after = after
        self.is_advance = came >= (min(wanted // 8, _WORTH_NBYTES) or 1)


def is_passing(status: int) -> bool:
    """Whether an HTTP status says that the same request may be answered later."""
    return status in (408, 425, 429) or (status >= 500 and status not in (501, 505))


def sleep(seconds: float) -> None:
    """Wait; the only place that does."""
    halt = given_up.get()
    if halt is None:
        time.sleep(seconds)
    else:
        halt.wait(seconds)


def retried(shown: str, work: Callable[[], _Value]) -> _Value:
    """What ``work`` returns, which is called again after a pause while it raises `Passing`.

    Args:
        shown: the file's name in the error.
        work: continues where it was.

    Raises:
        FileAccessError: it raised that too often, or the server asks us to wait longer than is sensible.
    """
    tries = 0
    waited = 0.0
    while True:
        require_wanted()
        try:
            return work()
        except Passing as error:
            if error.is_advance:
                tries = 0
            tries += 1
            pause = min(_FIRST_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE) * (0.5 + os.urandom(1)[0] / 510)
            if error.after is not None:
                if error.after > _LONGEST_TOLD:
                    raise FileAccessError(
                        f"{shown}: {error.why}; the server asks clients to wait {error.after:,.0f} seconds: try "
                        "again later",
                        path=shown,
                    ) from error.__cause__
                pause = max(pause, error.after)
            if tries > RETRIES or waited + pause > _LONGEST_IN_ALL:
                raise FileAccessError(f"{shown}: {error.why} (tried {tries} times)", path=shown) from error.__cause__
        sleep(pause)
        waited += pause


def told_to_wait(headers: Mapping[str, str] | Message) -> float | None:
    """Seconds that a server asks to wait: ``Retry-After``, a number or a date; the hub's ``RateLimit``."""
    told = headers.get("Retry-After", "").strip()
    limit = re.search(r"\br=0\s*;\s*t=(\d{1,6})", headers.get("RateLimit", ""))
    if re.fullmatch(r"\d{1,6}", told):
        return float(told)
    if told:
        from email.utils import parsedate_to_datetime

        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return max(parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    return float(limit[1]) if limit else None


# What a URL is called.

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/?#]*)([^?]*)(?:\?(.*))?", re.DOTALL)

_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>`]+")

_AT_IS_NO_USER = frozenset({"abfs", "abfss", "adl", "az", "github", "hf", "wasb", "wasbs"})
"""Schemes that write something else before an ``@``: a container, a repository."""

_SECRET = re.compile(
    r"sig(nature)?|.*(token|key|secret|passw|passphrase|auth|credential|signature|hmac|jwt|session).*|pw|pwd|code"
    r"|x-(amz|goog|ms|oss|cos|obs|xet)-.*|q-.*|policy|expir(es|y|ation)|googleaccessid|.*accessid",
    re.IGNORECASE,
)
"""Names of what a signed URL has, and of what else opens doors: S3, Google, Azure, CloudFront, Alibaba, Tencent."""

_WITH_SIGNATURE = re.compile(r"s[a-z]{1,2}(o?id)?|response-.*", re.IGNORECASE)
"""What Azure signs along, in short names that mean other things elsewhere, and what S3 does."""


def masked(url: str) -> str:
    """A URL, or several that fsspec chains with ``::``, without user names, passwords and what signs it.

    The rest of its query stays, because it may distinguish two files; for a path: itself.
    """
    if "://" not in url:
        return url
    return "::".join(_masked(part) for part in url.split("::"))


def _masked(url: str) -> str:
    found = _URL.fullmatch(url)
    if found is None:
        return url
    scheme, authority, path, query = found.groups()
    if scheme.lower() in ("http", "https"):
        path = path.partition("#")[0]
    if scheme.lower() not in _AT_IS_NO_USER:
        if "@" not in authority and not re.fullmatch(r"[^:]*|\[.*\](:\d*)?|[^:]*:\d*", authority) and "@" in path:
            authority, path = _split_at(path)  # a password with a slash in it
        if "@" in authority:
            authority = f"{_HIDDEN}@{authority.rpartition('@')[2]}"
    told = f"?{_masked_query(query)}" if query is not None else ""
    return f"{scheme}://{authority}{path}{told}"


def _split_at(path: str) -> tuple[str, str]:
    host, slash, rest = path.rpartition("@")[2].partition("/")
    return f"@{host}", slash + rest


def _masked_query(query: str) -> str:
    parts = query.partition("#")[0].split("&")
    names = [unquote(part.partition("=")[0]) for part in parts]
    signed = any(_SECRET.fullmatch(name) for name in names)
    kept: list[str] = []
    for name, part in zip(names, parts, strict=True):
        secret = _SECRET.fullmatch(name) or ("=" not in part and len(part) > 40)  # a token alone
        if secret or (signed and _WITH_SIGNATURE.fullmatch(name)):
            if _HIDDEN not in kept:
                kept.append(_HIDDEN)
        else:
            kept.append(part)
    return "&".join(kept)


def masked_text(text: str) -> str:
    """A message from elsewhere, with every URL in it as `masked` returns it."""
    return _IN_TEXT.sub(lambda found: masked(found[0]), text) if "://" in text else text
