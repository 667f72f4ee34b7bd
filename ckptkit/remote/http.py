"""Files behind http and https, read with range requests (RFC 9110, section 14)."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from http.client import HTTPResponse
from typing import cast

from ckptkit.errors import CorruptError, FileAccessError, MissingFileError
from ckptkit.remote.store import FarFile, Store

__all__ = ["HttpStore"]

_NOT_FOUND = (404, 410)
_UNSATISFIABLE = 416


class HttpStore(Store):
    """A web server that gives ranges."""

    def _ask(self, url: str, first: int, last: int) -> HTTPResponse:
        request = urllib.request.Request(url, headers={"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"})  # noqa: S310
        try:
            return cast("HTTPResponse", urllib.request.urlopen(request, timeout=30))  # noqa: S310
        except urllib.error.HTTPError as error:
            if error.code in _NOT_FOUND:
                raise MissingFileError(f"{url}: no such file", path=url) from None
            raise FileAccessError(f"{url}: the server answers {error.code}", path=url) from error
        except OSError as error:
            raise FileAccessError(f"{url}: cannot be read: {error}", path=url) from error

    def open(self, url: str, nbytes: int) -> FarFile:
        """As `Store.open`."""
        with self._ask(url, 0, nbytes - 1) as answer:
            found = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if found is None:
                raise FileAccessError(f"{url}: the server gives no ranges", path=url)
            stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            return FarFile(url=url, shown=url, size=int(found[1]), stamp=stamp, head=answer.read())

    def read(self, file: FarFile, offset: int, nbytes: int) -> bytes:
        """As `Store.read`."""
        with self._ask(file.url, offset, offset + nbytes - 1) as answer:
            stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if stamp != file.stamp:
                raise CorruptError("the file was changed while it was being read", path=file.shown)
            return answer.read()

    def stamp(self, file: FarFile) -> str | None:
        """As `Store.stamp`."""
        return self.open(file.url, 1).stamp
