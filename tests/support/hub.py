"""A stand-in of the Hugging Face hub on loopback, as far as files are read and listed; ``HF_ENDPOINT`` leads to it.

Its answers are those that huggingface_hub reads (``file_download.py``, ``utils/_http.py``, ``hf_api.py``): small files
come from a page of the commit's, large ones from another server at signed URLs that expire.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote, unquote

from support.range_server import RangeServer, Reply, range_server

__all__ = ["UNKNOWN", "Hub", "Repo", "hub"]

UNKNOWN = "unknown"
"""A token that the hub does not know."""

Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository.

    Attributes:
        commits: what lies in it, oldest first.
        branches: which of them a revision is (`Hub.push` moves ``main``).
        token: who may read it; ``None``: all.
        is_gated: whether it says so to others.
    """

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    is_gated: bool = False


@dataclass
class Hub:
    """The hub.

    Attributes:
        server: where it is asked; ``cdn``: where large files lie.
        repos: by their path there: ``user/repo``, ``datasets/user/repo``.
        large: bytes of a file that does not lie in git.
        page: files on a page of a listing.
        signature: that the URLs of large files have now; others have expired.
    """

    server: RangeServer
    cdn: RangeServer
    repos: dict[str, Repo] = field(default_factory=dict)
    large: int = 1000
    page: int = 1000
    signature: str = "first"

    def push(self, name: str, files: Files, revision: str = "main") -> Repo:
        """A commit to a repository, which is made if there is none."""
        repo = self.repos.setdefault(name, Repo())
        commit = hashlib.sha1(f"{name}{len(repo.commits)}".encode(), usedforsecurity=False).hexdigest()
        repo.commits[commit] = files
        repo.branches[revision] = commit
        return repo

    def forget(self) -> None:
        """Count from here."""
        self.server.forget()
        self.cdn.forget()

    def reply(self, path: str, query: str, headers: dict[str, str]) -> Reply | None:
        """What the hub answers; ``None``: it is a file that lies there."""
        api = re.fullmatch(r"api/(models|datasets|spaces)/(.+)/tree/([^/]+)(?:/(.+))?", path)
        if api is not None:
            name = api[2] if api[1] == "models" else f"{api[1]}/{api[2]}"
            return self._listed(name, unquote(api[3]), unquote(api[4] or ""), query, headers, path)
        page = re.fullmatch(r"(.+)/resolve/([^/]+)/(.+)", path)
        if page is not None:
            return self._resolved(page[1], unquote(page[2]), unquote(page[3]), headers)
        return None

    def _commit(self, name: str, revision: str, headers: dict[str, str]) -> str | Reply:
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.repos.get(name)
        if token == UNKNOWN:
            return _refused(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.token not in (None, token) and not repo.is_gated):
            told = ("RepoNotFound", "Repository not found")
            return _refused(404, *told) if token else _refused(401, *told)
        if repo.token not in (None, token):
            return _refused(403 if token else 401, "GatedRepo", "Access to model is restricted.")
        commit = repo.branches.get(revision, revision)
        return commit if commit in repo.commits else _refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _resolved(self, name: str, revision: str, path: str, headers: dict[str, str]) -> Reply:
        commit = self._commit(name, revision, headers)
        if isinstance(commit, Reply):
            return commit
        data = self.repos[name].commits[commit].get(path)
        if data is None:
            return _refused(404, "EntryNotFound", "Entry not found", commit)
        told = {"X-Repo-Commit": commit}
        if len(data) < self.large:
            cached = f"api/resolve-cache/{name}/{commit}/{quote(path)}"
            self.server.files[cached], self.server.headers[cached] = data, told
            return Reply(307, b"Temporary Redirect", {**told, "Location": f"/{cached}?etag=x"})
        sha256 = hashlib.sha256(data).hexdigest()
        self.cdn.files[sha256] = data
        location = f"{self.cdn.url}/{sha256}?Expires=17&Policy=e30&Signature={self.signature}&Key-Pair-Id=K"
        linked = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(data)), "ETag": '"of this page"'}
        return Reply(302, b"Found. Redirecting", {**told, **linked, "Location": location})

    def _listed(self, name: str, revision: str, folder: str, query: str, headers: dict[str, str], path: str) -> Reply:
        commit = self._commit(name, revision, headers)
        if isinstance(commit, Reply):
            return commit
        below = f"{folder}/" if folder else ""
        files = {path: data for path, data in self.repos[name].commits[commit].items() if path.startswith(below)}
        if not files and folder:
            return _refused(404, "EntryNotFound", "Not found", commit)
        folders = {path.rpartition("/")[0] for path in files} - {"", folder}
        entries = [{"type": "directory", "oid": "0", "size": 0, "path": each} for each in sorted(folders)]
        for each, data in files.items():
            entries.append({"type": "file", "oid": "b10b", "size": len(data), "path": each})
            if len(data) >= self.large:
                entries[-1]["lfs"] = {"oid": "5a", "size": len(data), "pointerSize": 134}
        asked = parse_qs(query)
        assert asked["recursive"][0].lower() == "true"
        start = int(asked.get("cursor", ["0"])[0])
        link = {}
        if start + self.page < len(entries):
            link = {"Link": f'<{self.server.url}/{path}?recursive=true&cursor={start + self.page}>; rel="next"'}
        return Reply(200, json.dumps(entries[start : start + self.page]).encode(), link)

    def signed(self, path: str, query: str, headers: dict[str, str]) -> Reply | None:
        """What the other server answers to URLs that have expired, and to tokens, which are not for it."""
        assert "Authorization" not in headers
        return None if parse_qs(query).get("Signature") == [self.signature] else Reply(403, b"<Error>expired</Error>")


def _refused(status: int, code: str, message: str, commit: str = "") -> Reply:
    return Reply(status, b"", {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit})


@contextmanager
def hub() -> Iterator[Hub]:
    """The hub as long as the block lasts; whoever asks it sets ``HF_ENDPOINT`` to ``hub.server.url``."""
    with range_server() as server, range_server() as cdn:
        made = Hub(server, cdn)
        server.replies, cdn.replies = made.reply, made.signed
        yield made
