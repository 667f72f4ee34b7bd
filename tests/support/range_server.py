"""A web server on loopback that gives ranges, and tells what it was asked for."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["Asked", "RangeServer", "range_server"]


@dataclass(frozen=True)
class Asked:
    """A request, and how many bytes of a file it was answered with."""

    method: str
    path: str
    first: int | None
    nbytes: int
    status: int


@dataclass
class RangeServer:
    """What it serves, and what it was asked.

    Attributes:
        url: of its root, without a slash at the end.
        files: what it serves beside what lies below ``root``: content by path.
        root: a folder that it serves; ``None``: none.
        asked: the requests since `forget`.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    root: Path | None = None
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        """Count from here."""
        self.asked.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of files that it sent."""
        return sum(each.nbytes for each in self.asked)

    def content(self, path: str) -> bytes | None:
        """What lies at a path."""
        if path in self.files:
            return self.files[path]
        if self.root is not None and (self.root / path).is_file():
            return (self.root / path).read_bytes()
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: RangeServer

    def do_GET(self) -> None:
        path = self.path.split("?")[0].lstrip("/")
        data = self.served.content(path)
        if data is None:
            self._answer(404, b"", path, None, {})
            return
        etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            self._answer(200, data, path, None, {"ETag": etag, "Accept-Ranges": "bytes"})
            return
        first = int(found[1]) if found[1] else max(0, len(data) - int(found[2]))
        last = min(int(found[2]), len(data) - 1) if found[1] and found[2] else len(data) - 1
        if first >= len(data):
            self._answer(416, b"", path, first, {"Content-Range": f"bytes */{len(data)}"})
            return
        headers = {"ETag": etag, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._answer(206, data[first : last + 1], path, first, headers)

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, path: str, first: int | None, headers: dict[str, str]) -> None:
        sent = b"" if self.command == "HEAD" else body
        with self.served.lock:
            self.served.asked.append(Asked(self.command, path, first, len(sent), status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def range_server(root: Path | None = None) -> Iterator[RangeServer]:
    """Such a server, on a port of its own, as long as the block lasts."""
    served = RangeServer(root=root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
