"""Files that fsspec knows to read: s3, gs, az, sftp, memory and whatever else it has a file system for.

https://filesystem-spec.readthedocs.io: ``info`` says how large a file is and what differs once it is another,
``cat_file`` gives a range of it, ``find`` lists all below a folder.  Never ``open``, which reads ahead by megabytes.
Who may read, and where the server is, the file systems know (environment, profiles), or ``--storage-option`` says.

For s3 one answer has size and stamp along with the first bytes (GetObject with a range has them as ``ContentRange`` and
``ETag``), and with ``IfMatch`` the server itself refuses to send bytes of another object.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from ckptkit.errors import CkptkitError, CorruptError, FileAccessError, MissingDependencyError, MissingFileError
from ckptkit.extras import require
from ckptkit.remote.retries import Passing, is_passing, masked, masked_text, retried
from ckptkit.remote.store import FarFile, Store

__all__ = ["ObjectStore"]

T = TypeVar("T")

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
             "abfss": "adlfs"}  # fmt: skip
"""The package that reads them, if it is a separate extra."""

_OVER_OTHERS = frozenset((
    "arrow_hdfs", "async_wrapper", "asyncwrapper", "blockcache", "cached", "dir", "filecache", "generic", "libarchive",
    "reference", "simplecache", "tar", "zip",
))  # fmt: skip
"""File systems without their own files, which show those of others in another way."""

_STAMPS = (
    ("ETag", "etag"), ("generation",), ("sha", "content_hash", "checksum", "md5Hash"),
    ("LastModified", "last_modified", "modified", "mtime", "updated", "modify", "created"),
)  # fmt: skip
"""What file systems call what differs once a file is another; the first that there is counts."""

_PASSING_CODES = (errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO))
"""What s3fs makes of SlowDown, ServiceUnavailable and InternalError."""

_PASSING = re.compile(
    r"Timeout|Connect(ion|or)?(Closed|Reset)?Error|ClientPayload|IncompleteRead|Disconnected|HTTPClient|ResponseParser"
    r"|ServiceRe(quest|sponse)Error|SlowDown|RequestTimeout|InternalError|ServiceUnavailable"
)
"""Names of errors, and codes of S3, of what may go better another time."""

_LASTING = re.compile(r"DNS|gaierror|SSL|Certificate")
"""Of what will not: a name that is unknown, a certificate that is not trusted."""

_REFUSED = re.compile(r"Credential|Auth|TokenRe|SSO|ProfileNotFound|AccessDenied|ExpiredToken|InvalidToken|Forbidden")
"""Names of errors that ask for credentials."""

_DENIED = re.compile(r"(?i)\b(forbidden|unauthorized|access denied|anonymous|invalid credentials)\b")
"""The same, in the words of gcsfs and others."""

_SIGN_IN = {
    "s3fs": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN); for a public "
    "bucket give --storage-option anon=true",
    "gcsfs": "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login; for a public bucket "
    "give --storage-option token=anon",
    "adlfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN; for a public "
    "container give --storage-option account_name=NAME and --storage-option anon=true",
}
"""What to set where access is refused."""

_HARMLESS = 4
"""Characters of a text that is not a secret: ``anon``."""

_NO_BUCKET = "no such bucket"

_REACHED = {"s3fs": "the network, AWS_ENDPOINT_URL and --storage-option endpoint_url=URL"}
"""What to look at where a server is not reached."""


class _First(NamedTuple):
    """Facts about a file before more of it is read."""

    size: int
    stamp: str | None
    head: bytes


class _Files:
    """A file system of fsspec's."""

    def __init__(self, system: Any) -> None:
        self.system = system
        # Each of the others may have one connection alone, for one thread at a time.
        self._one: Any = None if getattr(system, "async_impl", False) else threading.Lock()
        cat_file = getattr(type(system), "cat_file", None)
        is_plain = getattr(cat_file, "__module__", None) == "fsspec.spec"  # opens the file, and hands this on
        self._how: dict[str, Any] = {"cache_type": "none"} if is_plain else {}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._one is None:
            yield
            return
        with self._one:
            yield

    def _told(self, path: str) -> tuple[int, str | None]:
        with self._alone():
            info = self.system.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError(path)
        return int(info.get("size") or 0), _stamp_of(info)

    def first(self, path: str, nbytes: int) -> _First:
        """Size, stamp and first bytes: two requests."""
        size, stamp = self._told(path)
        return _First(size, stamp, self.read(path, stamp, 0, min(nbytes, size)) if size else b"")

    def read(self, path: str, stamp: str | None, offset: int, nbytes: int) -> bytes:
        """A range of a file."""
        with self._alone():
            data: bytes = self.system.cat_file(path, start=offset, end=offset + nbytes, **self._how)
        return data

    def stamp(self, path: str) -> str | None:
        """What differs once it is another."""
        self.system.invalidate_cache()
        return self._told(path)[1]

    def find(self, path: str) -> dict[str, dict[str, Any]]:
        """All files below a folder."""
        with self._alone():
            found: dict[str, dict[str, Any]] = self.system.find(path, detail=True)
        return found


class _S3Files(_Files):
    """The same for s3, whose answers have more."""

    async def _got(self, path: str, first: int, last: int, **pinned: str) -> tuple[dict[str, Any], bytes]:
        bucket, key, version = self.system.split_path(path)
        if not key:
            raise IsADirectoryError(path)
        pinned |= {"VersionId": version} if version else {}
        asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={first}-{last}"}
        answer = await self.system._call_s3("get_object", **asked, **pinned)
        body = answer["Body"]
        try:
            if answer["ContentLength"] > last + 1 - first:  # of a server without ranges
                return answer, await body.read(last + 1 - first)
            return answer, await body.read()
        finally:
            body.close()

    def _get(self, path: str, first: int, last: int, **pinned: str) -> tuple[dict[str, Any], bytes]:
        from fsspec.asyn import sync

        answer: tuple[dict[str, Any], bytes] = sync(self.system.loop, self._got, path, first, last, **pinned)
        return answer

    def first(self, path: str, nbytes: int) -> _First:
        """As above, in one request."""
        try:
            answer, head = self._get(path, 0, nbytes - 1)
        except OSError as error:
            if _code(error) not in ("InvalidRange", "416"):
                raise
            return _First(*self._told(path), b"")  # there is no first byte
        whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.get("ContentRange") or "")
        return _First(int(whole[1] if whole else answer["ContentLength"]), answer.get("ETag") or None, head)

    def read(self, path: str, stamp: str | None, offset: int, nbytes: int) -> bytes:
        """As above, of the file that has this stamp, or nothing."""
        last = offset + nbytes - 1
        try:
            answer, data = self._get(path, offset, last, **({"IfMatch": stamp} if stamp else {}))
        except OSError as error:
            if _code(error) in ("PreconditionFailed", "412"):
                raise _changed(path) from None
            raise
        if not (answer.get("ContentRange") or "").startswith(f"bytes {offset}-"):
            raise OSError(errno.EINVAL, "the server does not support ranges")
        if stamp is not None and answer.get("ETag") != stamp:
            raise _changed(path)
        return data


class ObjectStore(Store):
    """What fsspec has a file system for.

    Args:
        scheme: before the ``://``.
        options: for the file system, as its class takes them: ``{"anon": True}``.  The name of a scheme may
            have a mapping for that scheme only.

    Raises:
        MissingDependencyError: fsspec is not installed, or what it needs for this scheme.
        FileAccessError: fsspec knows no such scheme, or it is a view of what others have.
    """

    def __init__(self, scheme: str, options: Mapping[str, Any]) -> None:
        self.scheme = scheme
        self._package = _PACKAGES.get(scheme, "fsspec")
        self._class = _class_of(scheme)
        from fsspec.registry import known_implementations

        # Without a handler what packages log would stand beside our one line; who has set one up still gets it.
        for name in (self._package, "fsspec", "azure", "botocore"):
            if not logging.getLogger(name).handlers:
                logging.getLogger(name).addHandler(logging.NullHandler())
        of_schemes = {name for name in known_implementations if isinstance(options.get(name), Mapping)}
        self._options = {name: value for name, value in options.items() if name not in of_schemes}
        self._options |= options[scheme] if scheme in of_schemes else {}
        self._files: dict[str, _Files] = {}
        self._within = threading.Lock()

    def _at(self, url: str) -> tuple[_Files, str]:
        """The file system that has a URL's file, and the path there."""
        try:
            said = self._class._get_kwargs_from_urls(url)
            with self._within:
                files = self._files.get(repr(said))
                if files is None:
                    files = self._files[repr(said)] = self._made({**said, **self._options})
            return files, self._class._strip_protocol(url)
        except CkptkitError:
            raise
        except Exception as error:
            hint = _advice(self._package, error) or self._named() or _SIGN_IN.get(self._package, "")
            told = f"{self.scheme}:// cannot be opened: {self._said(error)}{hint and '; '}{hint}"
            raise FileAccessError(f"{masked(url)}: {told}", path=masked(url)) from None

    def _made(self, options: dict[str, Any]) -> _Files:
        # Not one that others share, whose listings may be stale.
        if self._package != "s3fs":
            return _Files(self._class(**options, skip_instance_cache=True))
        # It is tried again here, and not in two layers below as well: that would be 125 times.
        settings = dict(options.get("config_kwargs") or {})
        settings.setdefault("retries", {"total_max_attempts": 1})
        system = self._class(**{**options, "config_kwargs": settings}, skip_instance_cache=True)
        system.retries = 1
        return _S3Files(system) if hasattr(system, "_call_s3") else _Files(system)

    def _tried(self, url: str, work: Callable[[], T]) -> T:
        """What work gives, tried again where it fails for the moment; what else it raises in words."""
        shown = masked(url)

        def told() -> T:
            try:
                return work()
            except CkptkitError:
                raise
            except Exception as error:  # of any package's making
                if _passes(error):
                    looked = "" if _code(error) else f"; check {_REACHED.get(self._package, 'the network')}"
                    raise Passing(f"the server does not send it: {self._said(error)}{looked}") from None
                raise self._told(error, shown) from None

        return retried(shown, told)

    def _told(self, error: Exception, shown: str) -> CkptkitError:
        if isinstance(error, IsADirectoryError):
            return MissingFileError(f"{shown}: is a folder, not a file", path=shown)
        if isinstance(error, FileNotFoundError):
            is_bucket = _code(error) == "NoSuchBucket" or "bucket does not exist" in str(error)
            what = _NO_BUCKET if is_bucket else "no such file"
            return MissingFileError(f"{shown}: {what}", path=shown)
        if advice := _advice(self._package, error):
            return FileAccessError(f"{shown}: access is refused: {self._said(error)}; {advice}", path=shown)
        hint = self._named() if isinstance(error, TypeError | ValueError) else ""
        if not hint and _LASTING.search(_names(error)):
            hint = f"check {_REACHED.get(self._package, 'the network')}"
        told = f"cannot be read over {self.scheme}://: {self._said(error)}{hint and '; '}{hint}"
        return FileAccessError(f"{shown}: {told}", path=shown)

    def _said(self, error: Exception) -> str:
        """An error's message, on one line, without the given options."""
        said = masked_text(str(getattr(error, "strerror", None) or error))
        for secret in sorted(_secrets(self._options), key=len, reverse=True):
            said = said.replace(secret, "***") if len(secret) > _HARMLESS else said
        return " ".join(said.split())[:300] or type(error).__name__

    def _named(self) -> str:
        """The options that were given, by name."""
        return f"look at --storage-option {', '.join(sorted(self._options))}" if self._options else ""

    def open(self, url: str, nbytes: int) -> FarFile:
        """As `Store.open`."""
        files, path = self._at(url)
        size, stamp, head = self._tried(url, lambda: files.first(path, nbytes))
        return FarFile(url=url, shown=masked(url), size=size, stamp=stamp, head=head, place=(files, path))

    def read(self, file: FarFile, offset: int, nbytes: int) -> bytes:
        """As `Store.read`."""
        files, path = _place(file)

        def whole() -> bytes:
            data = files.read(path, file.stamp, offset, nbytes)
            if len(data) != nbytes:
                raise _changed(file.shown)
            return data

        try:
            return self._tried(file.url, whole)
        except CorruptError:
            raise _changed(file.shown) from None

    def stamp(self, file: FarFile) -> str | None:
        """As `Store.stamp`."""
        files, path = _place(file)
        return self._tried(file.url, lambda: files.stamp(path))

    def listing(self, url: str) -> Mapping[str, int]:
        """As `Store.listing`: one request, or one for each thousand files."""
        files, path = self._at(url)
        try:
            found = self._tried(url, lambda: files.find(path))
        except MissingFileError as error:
            if str(error).endswith(_NO_BUCKET):
                raise
            return {}
        root = path.rstrip("/") + "/"
        return {
            name[len(root) :]: int(info.get("size") or 0)
            for name, info in found.items()
            if info.get("type") != "directory" and name.startswith(root) and not name.endswith("/")
        }

    def beside(self, url: str, name: str) -> str:
        """As `Store.beside`."""
        return super().beside(url.partition("?")[0] if self._package == "s3fs" else url, name)


def _place(file: FarFile) -> tuple[_Files, str]:
    files, path = file.place
    return files, path


def _class_of(scheme: str) -> Any:
    """The class of fsspec's, or of a package that it knows, for a scheme."""
    if scheme in _OVER_OTHERS:
        raise FileAccessError(
            f"{scheme}:// refers to files at other URLs, and is not supported; name the file itself, and a member of "
            "a zip or tar archive as FILE/MEMBER"
        )
    require(_PACKAGES.get(scheme, "fsspec"))
    import fsspec

    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        name = (missing.name or "").partition(".")[0]
        told = f": run pip install {name}" if name else f" ({error})"
        raise MissingDependencyError(f"{scheme}:// needs a package that is not installed{told}", name=name) from None
    except ValueError:
        raise FileAccessError(f"{scheme}:// cannot be read: fsspec has no file system with that name") from None


def _stamp_of(info: Mapping[str, Any]) -> str | None:
    for names in _STAMPS:
        for name in names:
            if info.get(name):
                return str(info[name])
    return None


def _changed(path: str) -> CorruptError:
    return CorruptError("the file was changed while it was being read", path=path)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it comes from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        told = getattr(seen, "kwargs", None)  # botocore's
        cause = told.get("error") if isinstance(told, Mapping) else None
        seen = cause if isinstance(cause, BaseException) else seen.__cause__


def _code(error: BaseException) -> str:
    """What S3 calls an error, or the number of an answer's status; ``""``: neither is known."""
    for each in _chain(error):
        answer = getattr(each, "response", None)
        if isinstance(answer, Mapping):
            return str(answer.get("Error", {}).get("Code", ""))
        for name in ("status", "status_code", "code"):
            if isinstance(status := getattr(each, name, None), int):
                return str(status)
    return ""


def _names(error: BaseException) -> str:
    """The names of an error's class and its causes', and its code."""
    return " ".join([*(type(each).__name__ for each in _chain(error)), _code(error)])


def _passes(error: Exception) -> bool:
    """Whether the same may go well another time."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError) or _LASTING.search(_names(error)):
        return False
    code = _code(error)
    if code.isdigit() and is_passing(int(code)):
        return True
    if isinstance(error, TimeoutError | ConnectionError) or _PASSING.search(_names(error)):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_CODES


def _advice(package: str, error: BaseException) -> str:
    """What to set where access is refused; ``""``: it is something else."""
    if isinstance(error, PermissionError) or _REFUSED.search(_names(error)) or _DENIED.search(str(error)):
        return _SIGN_IN.get(package, "give its credentials as --storage-option KEY=VALUE")
    return ""


def _secrets(value: Any) -> Iterator[str]:
    """The texts in what was given as options; of URLs the secrets are hidden anyway."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _secrets(each)
    elif isinstance(value, str) and "://" not in value:
        yield value
