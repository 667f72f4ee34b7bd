"""Files at http and https, read with range requests (RFC 9110, section 14).

Learning what a file is takes one request: a range from its first byte, whose answer has the size (``Content-Range``), a
value that identifies the file's state (``ETag``, otherwise ``Last-Modified``; section 8.8) and the first bytes.  Each
later answer must be of that state and that size, and hold the very range that was asked for.  Where the answer was
redirected to is asked from then on, and the first URL again once that place refuses: signed URLs expire.  A server that
answers a range with the whole file has no ranges: its answer is read once, in order, and kept as a temporary file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from email.message import Message
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from ckptkit.bytesource import SourceFile, pace
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError
from ckptkit.remote.connections import Answer, Target, ask
from ckptkit.remote.retries import Passing, is_passing, masked, retried, told_to_wait
from ckptkit.remote.store import FarFile, Store
from ckptkit.report import human_size
from ckptkit.startup import dataclass

__all__ = ["Described", "HttpStore", "Place", "joined"]

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10
_GONE = (404, 410)
_RANGE, _UNSATISFIABLE = 206, 416

_COPIED_NBYTES = 2 << 30
"""The longest file that is read as a whole since its server gives no ranges."""

_PIECE_NBYTES = 1 << 20


class _Final(NamedTuple):
    """Where a file's bytes are served, and what identifies their state there."""

    url: str
    stamp: str | None


@dataclass(slots=True)
class Place:
    """Where a file is asked for.

    Attributes:
        asked: the URL, without credentials.
        shown: what messages call the file.
        authorization: sent to the server of ``asked`` only.
        final: where its bytes were found; ``None``: not asked yet, or not there any more.
        copy: the file itself, where its server gives no ranges.
        commit: the hub's, which it is of.
    """

    asked: str = field(repr=False)
    shown: str
    authorization: str | None = field(default=None, repr=False)
    final: _Final | None = field(default=None, repr=False)
    copy: SourceFile | None = None
    commit: str | None = None


class Described(NamedTuple):
    """An answer, with its facts about the file.

    Attributes:
        answer: whose body was not read yet.
        url: who gave it, after all redirects.
        size: of the file, in bytes; ``None``: unknown.
        stamp: identifies this state of the file at ``url``.
        linked: the same as said by who redirected to there: the hub's ``X-Linked-ETag``, a hash of the file.
        commit: the hub's, which the file is of.
        via: the known place of the bytes, if they were requested there directly.
    """

    answer: Answer
    url: str
    size: int | None
    stamp: str | None
    linked: str | None
    commit: str | None
    via: _Final | None = None


class HttpStore(Store):
    """A web server."""

    has_listings = False

    def place_of(self, url: str) -> Place:
        """Where the file of a URL is asked for.

        Raises:
            FileAccessError: it is not a URL.
        """
        shown = masked(url)
        authorization = Target.of(url, shown).authorization
        parts = urlsplit(url.strip())
        netloc = parts.netloc.rpartition("@")[2]
        return Place(urlunsplit((parts.scheme, netloc, parts.path, parts.query, "")), shown, authorization)

    def open(self, url: str, nbytes: int) -> FarFile:
        """As `Store.open`, in one request."""
        place = self.place_of(url)
        return self.opened(url, place, nbytes)

    def opened(self, url: str, place: Place, nbytes: int) -> FarFile:
        """The facts about the file at a place, whose URL is ``url``; the rest as in `open`."""
        file = retried(place.shown, lambda: self._opened(url, place, nbytes))
        came, wanted = len(file.head), min(nbytes, file.size)
        return file if came == wanted else replace(file, head=file.head + self.read(file, came, wanted - came))

    def _opened(self, url: str, place: Place, nbytes: int) -> FarFile:
        with self._asked(place, 0, nbytes - 1) as told:
            stamp = told.linked or told.stamp
            place.final = _Final(told.url, told.stamp)
            place.commit = told.commit
            known = FarFile(url=url, shown=place.shown, size=0, stamp=stamp, place=place)
            if told.answer.status == _UNSATISFIABLE:
                if told.size:  # S3 does not say how large an empty object is
                    raise FileAccessError(
                        f"{place.shown}: the server refuses to send its first bytes", path=place.shown
                    )
                return known
            if told.answer.status != _RANGE:
                place.copy = _copied(told.answer, place.shown)
                size = place.copy.size
                return replace(known, size=size, head=place.copy.read(0, min(nbytes, size)))
            size = _total(told, place.shown)
            head, why = _body(told.answer, 0, min(nbytes, size), place.shown)
            if why is not None and not head:
                raise Passing(why)
            return replace(known, size=size, head=head)

    def read(self, file: FarFile, offset: int, nbytes: int) -> bytes:
        """As `Store.read`; an interrupted read continues where it was."""
        place: Place = file.place
        if place.copy is not None:
            return place.copy.read(offset, nbytes)
        parts: list[bytes] = []
        came = 0

        def rest() -> None:
            nonlocal came
            while came < nbytes:
                wanted = nbytes - came
                data, why = self._part(file, place, offset + came, wanted)
                parts.append(data)
                came += len(data)
                if why is not None:
                    raise Passing(why, came=len(data), wanted=wanted)

        retried(place.shown, rest)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, file: FarFile, place: Place, offset: int, nbytes: int) -> tuple[bytes, str | None]:
        """The first of these bytes, and why there are not all; no bytes and no reason: ask for them again."""
        with self._asked(place, offset, offset + nbytes - 1) as told:
            status, via = told.answer.status, told.via
            is_other = told.size != file.size and (status == _UNSATISFIABLE or told.size is not None)
            is_other |= told.stamp != via.stamp if via else (told.linked or told.stamp) != file.stamp
            if via and (is_other or status != _RANGE):  # who redirected to there may know better
                place.final = None
                return b"", None
            if status not in (_RANGE, _UNSATISFIABLE):
                raise Passing("the server sends the whole file although a range was requested")
            if is_other and (status == _RANGE or told.size != file.size):
                raise CorruptError("the file was changed while it was being read", path=place.shown)
            if status == _UNSATISFIABLE:
                raise FileAccessError(
                    f"{place.shown}: the server refuses to send the bytes from {offset:,} on", path=place.shown
                )
            if via is None:
                place.final = _Final(told.url, told.stamp)
            return _body(told.answer, offset, nbytes, place.shown)

    def stamp(self, file: FarFile) -> str | None:
        """As `Store.stamp`, of what its URL leads to by now."""
        place: Place = file.place
        if place.copy is not None:
            return file.stamp  # all of it was read at once

        def now() -> str | None:
            with self._asked(replace(place, final=None), 0, 0) as told:
                stamp = told.linked or told.stamp
                is_same_size = told.size is None or told.size == file.size
                return stamp if is_same_size else f"{stamp or ''} of {told.size} bytes"

        return retried(place.shown, now)

    def listing(self, url: str) -> Mapping[str, int]:
        """There is none.

        Raises:
            FileAccessError: always.
        """
        shown = masked(url)
        raise FileAccessError(
            f"{shown}: a web server does not list its files; name a file, or give the folder as s3://, gs://, az:// "
            "or hf://",
            path=shown,
        )

    def beside(self, url: str, name: str) -> str:
        """As `Store.beside`; with the same query, which may be what opens the folder."""
        parts = urlsplit(url)
        path = f"{parts.path.rpartition('/')[0]}/{quote(name)}"
        return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))

    def document(self, place: Place, most: int) -> tuple[bytes, Message]:
        """All that is at a place, and the headers of the answer.

        Args:
            place: where.
            most: bytes that it may have.

        Raises:
            FileAccessError: it could not be read, or has more.
        """

        def whole() -> tuple[bytes, Message]:
            told = self._reached(place, None)
            try:
                data = told.answer.take(most + 1)
                if told.answer.is_cut:
                    raise Passing(f"the connection broke {told.answer.why}after {len(data):,} bytes")
                if len(data) > most:
                    raise FileAccessError(f"{place.shown}: the server sends more than {most:,} bytes", path=place.shown)
                return data, told.answer.headers
            finally:
                told.answer.release()

        return retried(place.shown, whole)

    # One answer.

    @contextlib.contextmanager
    def _asked(self, place: Place, first: int, last: int) -> Iterator[Described]:
        """The answer to a request for these bytes, which is one of 200, 206 and 416.

        Raises:
            Passing: it may be another the next time.
            FileAccessError: it is none of these.
        """
        told = self._reached(place, f"bytes={first}-{last}")
        try:
            answer = told.answer
            encoding = answer.headers.get("Content-Encoding", "").strip() or answer.headers.get("Transfer-Encoding", "")
            if encoding.lower() not in ("", "identity", "chunked"):
                raise FileAccessError(
                    f"{place.shown}: the server sends it compressed ({encoding!r:.20}), so parts of it cannot be read: "
                    "download it and give the local file",
                    path=place.shown,
                )
            if answer.headers.get_content_maintype() == "multipart" and answer.status == _RANGE:
                raise FileAccessError(f"{place.shown}: the server sends several parts", path=place.shown)
            yield told
        finally:
            told.answer.release()

    def _reached(self, place: Place, wanted: str | None) -> Described:
        """The answer to a request for a range, or for all, after redirects."""
        known = place.final
        if known is not None and known.url != place.asked:
            told = self._hop(place, known.url, wanted)
            if told.answer.status in (200, _RANGE, _UNSATISFIABLE):
                return told._replace(via=known)
            told.answer.discard()
            if is_passing(told.answer.status):
                raise self._passing(told.answer)
            place.final = None  # it expired
        url, linked, commit = place.asked, None, None
        for _ in range(_MOST_REDIRECTS + 1):
            told = self._hop(place, url, wanted)
            linked, commit = linked or told.linked, commit or told.commit
            if told.answer.status not in _REDIRECTS:
                break
            told.answer.discard()
            url = joined(url, told.answer.headers.get("Location", ""))
        else:
            raise FileAccessError(f"{place.shown}: is redirected more than {_MOST_REDIRECTS} times", path=place.shown)
        status = told.answer.status
        if status in (200, _RANGE, _UNSATISFIABLE):
            return told._replace(linked=linked, commit=commit)
        told.answer.discard()
        if is_passing(status):
            raise self._passing(told.answer)
        raise self.refusal(place, told)

    def _hop(self, place: Place, url: str, wanted: str | None) -> Described:
        """One request and its answer."""
        target, asked = Target.of(url, place.shown), Target.of(place.asked, place.shown)
        headers = {"Range": wanted} if wanted else {}
        if place.authorization is not None and target.may_have_what_is_for(asked):
            headers["Authorization"] = place.authorization
        answer = ask(target, headers, place.shown)
        found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.headers.get("Content-Range", "").strip())
        stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        size = int(found[1]) if found and len(found[1]) < 19 else None
        linked, commit = answer.headers.get("X-Linked-ETag"), answer.headers.get("X-Repo-Commit")
        return Described(answer, url, size, stamp, linked, commit)

    def _passing(self, answer: Answer) -> Passing:
        return Passing(f"the server answers {_named(answer.status)}", after=told_to_wait(answer.headers))

    def refusal(self, place: Place, told: Described) -> Exception:
        """What to raise for an answer that will be the same the next time."""
        shown, status = place.shown, told.answer.status
        if status in _GONE:
            return MissingFileError(f"{shown}: no such file", path=shown)
        why = f"{shown}: the server answers {_named(status)}"
        if status == 401:
            wrong = "the user name or password is wrong" if place.authorization else "it needs a user name and password"
            why += f": {wrong}; give https://USER:PASSWORD@HOST/PATH, or hf://user/repo/file and HF_TOKEN for the hub"
        elif status == 403:
            why += ": access is denied; a signed URL may have expired, or it needs https://USER:PASSWORD@HOST/PATH"
        elif status == 407:
            why += ": set HTTP_PROXY=http://USER:PASSWORD@HOST:PORT, or NO_PROXY"
        return FileAccessError(why, path=shown)


def joined(url: str, header: str) -> str:
    """Where a header leads that a URL was answered with; "": to no URL.  Beyond ASCII it is read as UTF-8."""
    with contextlib.suppress(UnicodeError):
        header = header.encode("latin-1").decode()
    try:
        return urljoin(url, header)
    except ValueError:
        return ""


def _named(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _total(told: Described, shown: str) -> int:
    if told.size is None:
        if "Content-Range" not in told.answer.headers:
            raise Passing("the server sends a range without saying which")
        raise FileAccessError(f"{shown}: the server does not say how large the file is: download it", path=shown)
    return told.size


def _body(answer: Answer, offset: int, nbytes: int, shown: str) -> tuple[bytes, str | None]:
    """The bytes of an answer to a range, and why it is not all of it, if it broke off.

    Raises:
        FileAccessError: it is another range.
    """
    told = answer.headers.get("Content-Range", "").strip()
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", told)
    first, last = (int(found[1]), int(found[2])) if found else (-1, -1)
    if first != offset or not offset <= last < offset + nbytes:
        raise FileAccessError(
            f"{shown}: bytes {offset:,} to {offset + nbytes - 1:,} were requested, but the server sends {told[:60]!r}",
            path=shown,
        )
    count = last - first + 1
    if answer.length not in (None, count):
        raise FileAccessError(f"{shown}: the server announces {answer.length:,} bytes for {count:,}", path=shown)
    data = answer.take(count)
    if len(data) < count:
        return data, f"the connection broke {answer.why}after {len(data):,} of {count:,} bytes"
    if answer.has_more():
        raise Passing("the server sends more bytes than it announced")
    return data, None if count == nbytes else f"the server sends {count:,} bytes where {nbytes:,} were requested"


def _copied(answer: Answer, shown: str) -> SourceFile:
    """The whole file, read in order into a temporary one without a name.

    Raises:
        Passing: it broke off.
        FileAccessError: it is too large.
    """
    import tempfile

    told = None if answer.chunked else answer.length
    nbytes = 0
    try:
        with tempfile.TemporaryFile(buffering=0) as made:
            while told is None or nbytes < told:
                if max(told or 0, nbytes) > _COPIED_NBYTES:
                    size = human_size(told) if told is not None else f"more than {human_size(nbytes)}"
                    raise FileAccessError(
                        f"{shown}: the server does not send parts of files, and this one is {size}: "
                        "download it (curl -O) and give the local file",
                        path=shown,
                    )
                data = answer.take(_PIECE_NBYTES)
                if answer.is_cut:
                    raise Passing(f"the connection broke {answer.why}after {nbytes + len(data):,} bytes of the file")
                if not data:
                    break
                made.write(data)
                nbytes += len(data)
                pace.arrive(len(data))
            if answer.has_more():
                raise Passing("the server sends more bytes than it announced")
            return SourceFile.of_descriptor(os.dup(made.fileno()), shown)
    except FileAccessError:
        raise
    except OSError as error:
        raise FileAccessError(f"{shown}: no space for a copy of it: {error.strerror}", path=shown) from error
