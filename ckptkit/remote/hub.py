"""Files of the Hugging Face hub, as ``hf://[datasets/|spaces/]user/repo[@revision][/path]``.

The hub's own client (huggingface_hub) writes URLs so (``utils/_hf_uris.py``), takes the endpoint and the token from the
same variables of the environment (``constants.py``, ``utils/_auth.py``) and reads the same answers
(``file_download.py``, ``utils/_http.py``); nothing of it is needed here.  A file is read by range at
``{endpoint}/{repo}/resolve/{revision}/{path}``, which redirects to the place of large ones.  That first answer names
the commit (``X-Repo-Commit``), from which the repository is read from then on, whatever is pushed, and the file's
SHA-256, or that of its blob in git (``X-Linked-ETag``, ``ETag``).  The content of a folder is at
``{endpoint}/api/models/{repo}/tree/{revision}/{path}``, page after page (``Link``); mirrors may have it only at
``{endpoint}/api/models/{repo}/revision/{revision}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from email.message import Message
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from ckptkit.errors import FileAccessError, MissingFileError
from ckptkit.remote.connections import Target
from ckptkit.remote.http import Described, HttpStore, Place, joined
from ckptkit.remote.retries import masked_text
from ckptkit.remote.store import FarFile
from ckptkit.startup import dataclass

__all__ = ["HubPath", "HubStore"]

_ENDPOINT = "https://huggingface.co"
_MAIN = "main"

_TYPES = ("models", "datasets", "spaces")
_REVISION = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)(?=/|$)")
"""Revisions with a slash that are meant without ``%2F`` for it."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_TOKEN_NBYTES = 10_000

_PAGES, _PAGE_NBYTES = 10_000, 64 << 20
"""Most pages of a listing, and bytes of each: the hub gives 1,000 files a page."""

_YES = ("1", "ON", "YES", "TRUE")

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class HubPath:
    """The parts of an ``hf://`` URL.

    Attributes:
        kind: ``"models"``, ``"datasets"`` or ``"spaces"``.
        repo: ``user/repo``, or a single name, as the first repositories have.
        revision: branch, tag or commit; ``None``: the URL names none.
        path: in the repository, with slashes; "": all of it.
    """

    kind: str
    repo: str
    revision: str | None
    path: str

    @classmethod
    def of(cls, url: str) -> HubPath:
        """As above.

        Raises:
            FileAccessError: it names no repository.
        """
        rest = url.partition("://")[2].strip("/")
        kind = rest.partition("/")[0]
        if kind in ("buckets", "kernels"):
            raise FileAccessError(
                f"{url}: {kind} on the hub are not supported; models, datasets and spaces are", path=url
            )
        kind, rest = (kind, rest.partition("/")[2]) if kind in _TYPES else ("models", rest)
        segments = rest.split("/", 2)
        if "@" in segments[0] or len(segments) == 1:  # one name, and not two
            repo, at, rest = rest.partition("@") if "@" in segments[0] else (rest, "", "")
        elif "@" in segments[1]:
            repo, at, rest = rest.partition("@")
        else:
            repo, at, rest = "/".join(segments[:2]), "", "".join(segments[2:])
        revision = None
        if at:
            special = _REVISION.match(rest)
            revision = special[0] if special else rest.partition("/")[0]
            rest = rest[len(revision) :].lstrip("/")
            revision = unquote(revision)
        if not _REPO.fullmatch(repo) or revision == "" or any(part in ("", ".", "..") for part in repo.split("/")):
            raise FileAccessError(f"{url}: is not hf://user/repo[@revision][/path]", path=url)
        return cls(kind, repo, revision, rest)

    @property
    def prefix(self) -> str:
        """Of the repository's pages."""
        return self.repo if self.kind == "models" else f"{self.kind}/{self.repo}"

    def with_one_name(self) -> HubPath | None:
        """The same words as a path in a repository with a one-part name; ``None``: they can only be meant as given."""
        first, _, second = self.repo.partition("/")
        if not second or self.revision is not None:
            return None
        return replace(self, repo=first, path="/".join(filter(None, (second, self.path))))


# What the environment says.


def _is_set(*names: str) -> bool:
    return any((os.environ.get(name) or "").upper() in _YES for name in names)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")


def _token(url: str) -> str | None:
    """The user's token: from the environment, otherwise from the file of the hub's own client.

    Raises:
        FileAccessError: it cannot be one; named is the file that it was for.
    """
    if _is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    where = "HF_TOKEN"
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not token:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
        where = os.path.expanduser(os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")))
        try:
            with open(where, encoding="utf-8") as file:  # noqa: PTH123 - as paths are opened everywhere here
                token = file.read(_TOKEN_NBYTES)
        except (OSError, ValueError):
            return None
    token = token.strip()
    if token and not _TOKEN.fullmatch(token):
        raise FileAccessError(f"{url}: the token in {where} has characters that are not allowed in a token", path=url)
    return token or None


# What the hub says.


class _NoRepositoryError(Exception):
    """There is no such repository; ``told`` says so to users."""

    def __init__(self, told: FileAccessError) -> None:
        super().__init__()
        self.told = told


@dataclass(slots=True)
class _HubPlace(Place):
    """A place on the hub.

    Attributes:
        path: the file's path.
        code: the hub's word for why it refused (``X-Error-Code``).
    """

    path: HubPath | None = None
    code: str = ""


class HubStore(HttpStore):
    """The hub: one for each command, which sees one commit of each repository."""

    has_listings = True

    def __init__(self) -> None:
        self._commits: dict[tuple[str, str, str | None], str] = {}
        self._one_name: set[str] = set()

    def _place(self, url: str, path: HubPath, before: str, after: str) -> _HubPlace:
        """Where a page of a repository is asked for.

        Args:
            url: as it was given.
            path: the parts of its URL.
            before: the part of the page's URL between the endpoint and the revision.
            after: the part after that.

        Raises:
            FileAccessError: the environment forbids requests, or names a server that cannot be used.
        """
        if _is_set("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            raise FileAccessError(
                f"{url}: HF_HUB_OFFLINE is set, so ckptkit does not contact the hub; unset it", path=url
            )
        if not _endpoint().startswith(("https://", "http://")):
            raise FileAccessError(f"{url}: HF_ENDPOINT must begin with https:// or http://", path=url)
        revision = self._commits.get((path.kind, path.repo, path.revision), path.revision or _MAIN)
        place = self.place_of(f"{_endpoint()}/{before}/{quote(revision, safe='')}{after}")
        token = _token(url)
        return _HubPlace(place.asked, url, f"Bearer {token}" if token else place.authorization, path=path)

    def _pinned(self, path: HubPath, commit: str | None) -> str | None:
        """The commit that all of this revision is read from: this one if it is the first."""
        if commit is None or not _COMMIT.fullmatch(commit):
            return commit
        return self._commits.setdefault((path.kind, path.repo, path.revision), commit)

    def _either_way(self, url: str, work: Callable[[HubPath], _Value]) -> _Value:
        """Call a function with the parts of a URL; if no repository has these two names, with the first name only."""
        path = HubPath.of(url)
        one = path.with_one_name()
        if one is not None and one.repo in self._one_name:
            path, one = one, None
        try:
            return work(path)
        except _NoRepositoryError as error:
            told = error.told
            if one is not None:
                with contextlib.suppress(_NoRepositoryError, FileAccessError):
                    done = work(one)
                    self._one_name.add(one.repo)
                    return done
            raise told from None

    def open(self, url: str, nbytes: int) -> FarFile:
        """As `Store.open`."""
        return self._either_way(url, lambda path: self._opened_at(url, path, nbytes))

    def _opened_at(self, url: str, path: HubPath, nbytes: int) -> FarFile:
        if not path.path:
            raise _NoRepositoryError(FileAccessError(f"{url}: is a repository; name a file in it", path=url))
        page = f"{path.prefix}/resolve", f"/{quote(path.path)}"
        while True:
            place = self._place(url, path, *page)
            far = self.opened(url, place, nbytes)
            if place.commit == self._pinned(path, place.commit):
                break  # else somebody pushed, and another file was read from the commit before
        first, place.asked = place.asked, self._place(url, path, *page).asked
        if place.final is not None and place.final.url == first:
            place.final = place.final._replace(url=place.asked)
        return far

    def stamp(self, file: FarFile) -> str | None:
        """As `Store.stamp`: what a commit holds does not change."""
        place: Place = file.place
        return super().stamp(file) if place.commit is None else file.stamp

    def beside(self, url: str, name: str) -> str:
        """As `Store.beside`."""
        return f"{url.rpartition('/')[0]}/{name}"

    def listing(self, url: str) -> Mapping[str, int]:
        """As `Store.listing`."""
        return self._either_way(url, lambda path: self._listed(url, path))

    def _listed(self, url: str, path: HubPath) -> dict[str, int]:
        below = f"{path.path}/" if path.path else ""
        after = f"/{quote(path.path, safe='')}" if path.path else ""
        place = self._place(url, path, f"api/{path.kind}/{path.repo}/tree", f"{after}?recursive=true")
        try:
            found = [each for page in self._pages(url, path, place) for each in _files(page, url)]
        except MissingFileError:
            if place.code == "EntryNotFound" and path.path:
                return {}
            if place.code:
                raise
            found = self._siblings(url, path)
        return {name[len(below) :]: n for name, n in found if name.startswith(below) and name != below}

    def _pages(self, url: str, path: HubPath, place: Place) -> Iterator[object]:
        """The pages of a listing, as JSON has them."""
        for _ in range(_PAGES):
            page, headers = self._json(url, place)
            self._pinned(path, headers.get("X-Repo-Commit"))
            yield page
            following = re.search(r'<([^<>]+)>\s*;[^,]*\brel="?next"?', headers.get("Link", ""))
            if following is None:
                return
            asked = joined(place.asked, following[1])
            if not Target.of(asked, url).may_have_what_is_for(Target.of(place.asked, url)):
                raise FileAccessError(
                    f"{url}: its listing continues on another server, which ckptkit does not contact", path=url
                )
            place = replace(place, asked=asked, final=None)
        raise FileAccessError(f"{url}: its listing does not end", path=url)

    def _siblings(self, url: str, path: HubPath) -> list[tuple[str, int]]:
        """The files of a repository from mirrors that do not list trees: in their facts about a revision."""
        place = self._place(url, path, f"api/{path.kind}/{path.repo}/revision", "?blobs=true")
        try:
            told, _ = self._json(url, place)
        except MissingFileError:
            why = f"{url}: {_endpoint()} does not list such a repository; name a file in it"
            raise MissingFileError(why, path=url) from None
        self._pinned(path, str(told.get("sha")) if isinstance(told, dict) else None)
        return [*_files(told.get("siblings") if isinstance(told, dict) else None, url)]

    def _json(self, url: str, place: Place) -> tuple[object, Message]:
        data, headers = self.document(place, _PAGE_NBYTES)
        try:
            return json.loads(data), headers
        except (ValueError, RecursionError) as error:
            raise _no_listing(url) from error

    def refusal(self, place: Place, told: Described) -> Exception:
        """As `HttpStore.refusal`."""
        is_hub = Target.of(told.url, place.shown).may_have_what_is_for(Target.of(place.asked, place.shown))
        if not isinstance(place, _HubPlace) or place.path is None or not is_hub:
            return super().refusal(place, told)
        status, headers = told.answer.status, told.answer.headers
        shown, path, said = place.shown, place.path, _printable(headers.get("X-Error-Message", ""))
        code = place.code = headers.get("X-Error-Code", "")
        has_token = place.authorization is not None
        other = "the token in HF_TOKEN has no permission to read it" if has_token else "it is private: set HF_TOKEN"
        if code == "RevisionNotFound":
            return MissingFileError(f"{shown}: the repository has no revision {path.revision or _MAIN!r}", path=shown)
        if code == "EntryNotFound":
            return MissingFileError(f"{shown}: no such file in the repository", path=shown)
        if code == "GatedRepo":
            who = (
                "with the account that HF_TOKEN belongs to"
                if has_token
                else ("and set HF_TOKEN to a token from that account")
            )
            why = f"the repository is gated: accept its terms at {_endpoint()}/{path.prefix} {who}"
        elif status == 401 and said == "Invalid credentials in Authorization header":
            why = f"the hub does not accept the token in HF_TOKEN: create a new one at {_endpoint()}/settings/tokens"
        elif code == "RepoNotFound" or status == 401:
            why = f"there is no repository {path.prefix!r} on the hub, or {other}"
            kind = MissingFileError if status in (404, 410) else FileAccessError
            return _NoRepositoryError(kind(f"{shown}: {why}", path=shown))
        elif status == 403:
            why = f"the hub refuses ({said or 'forbidden'}): set HF_TOKEN to a token that can read the repository"
        elif said and status not in (404, 410):
            why = f"the hub responds with {status}: {said}"
        else:
            return super().refusal(place, told)
        return FileAccessError(f"{shown}: {why}", path=shown)


def _printable(text: str) -> str:
    """A server's message, as one short line."""
    return masked_text("".join(letter if letter.isprintable() else " " for letter in text[:200])).rstrip(". ")


def _no_listing(url: str) -> FileAccessError:
    return FileAccessError(f"{url}: the hub sends something that is not a listing", path=url)


def _files(entries: Any, url: str) -> Iterator[tuple[str, int]]:
    """Path and size in bytes of each file on a page of a listing.

    Raises:
        FileAccessError: it is not one.
    """
    try:
        for entry in entries:
            if entry.get("type", "file") == "file":
                yield str(entry.get("rfilename") or entry["path"]), int((entry.get("lfs") or entry)["size"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_listing(url) from error
