"""A web server on loopback that gives ranges, tells what it was asked for, and fails as it is told to."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["Asked", "Fault", "RangeServer", "Reply", "range_server"]


@dataclass(frozen=True)
class Asked:
    """A request, and how many bytes of a file it was answered with."""

    method: str
    path: str
    first: int | None
    nbytes: int
    status: int
    headers: dict[str, str] = field(default_factory=dict, compare=False)
    query: str = ""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request, the first for the path (``None``: any).

    Attributes:
        status, headers: it is answered with these, and no body.
        cut: the connection ends after so many bytes of the body; ``resets``: it breaks there.
        stalls: nothing more comes there, until the server is closed.
        tells: the ``Content-Range`` that is told, whatever the body is; "": none.
        body: what is sent in the place of the range.
    """

    path: str | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    resets: bool = False
    stalls: bool = False
    tells: str | None = None
    body: bytes | None = None


@dataclass(frozen=True)
class Reply:
    """An answer that is no file's."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class RangeServer:
    """What it serves, how, and what it was asked.

    Attributes:
        url: of its root, without a slash at the end.
        files: what it serves beside what lies below ``root``: content by path.
        root: a folder that it serves; ``None``: none.
        asked: the requests since `forget`.
        connections: that were made since then.
        faults: each goes wrong with one request, in this order.
        before: called with the path of each request before it is looked at.
        replies: called with the path, the query and the headers of each; what it returns is sent.
        redirects: where paths are redirected to: status and URL.
        authorization: what a request must have in its header of that name, or be answered with 401.
        gives_ranges, gives_length: whether it does.
        headers: that it sends with files, by path.
        stamps: its headers that tell one state of a file from another: of ``etag``, ``weak``, ``modified``.
        rate: bytes a second, at most.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    root: Path | None = None
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    connections: int = 0
    faults: list[Fault] = field(default_factory=list)
    before: Callable[[str], object] | None = None
    replies: Callable[[str, str, dict[str, str]], Reply | None] | None = None
    redirects: dict[str, tuple[int, str]] = field(default_factory=dict)
    authorization: str | None = None
    gives_ranges: bool = True
    gives_length: bool = True
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    stamps: tuple[str, ...] = ("etag",)
    rate: float | None = None
    closing: threading.Event = field(default_factory=threading.Event)

    def forget(self) -> None:
        """Count from here."""
        self.asked.clear()
        self.connections = 0

    def renew(self) -> None:
        """Be as at the beginning, for another test."""
        for name, value in vars(RangeServer()).items():
            if name not in ("url", "root", "lock", "closing"):
                setattr(self, name, value)

    @property
    def nbytes(self) -> int:
        """Bytes of files that it sent."""
        return sum(each.nbytes for each in self.asked)

    @property
    def ranges(self) -> list[tuple[int | None, int]]:
        """Where each answer begins in the file, and how long it is."""
        return [(each.first, each.nbytes) for each in self.asked]

    def content(self, path: str) -> bytes | None:
        """What lies at a path."""
        if path in self.files:
            return self.files[path]
        if self.root is not None and (self.root / path).is_file():
            return (self.root / path).read_bytes()
        return None

    def fault(self, path: str) -> Fault:
        """What goes wrong with a request, now."""
        with self.lock:
            for at, each in enumerate(self.faults):
                if each.path in (None, path):
                    return self.faults.pop(at)
        return Fault()

    def stamped(self, data: bytes) -> dict[str, str]:
        """The headers of a file that has this content."""
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        told = {
            "etag": ("ETag", f'"{digest}"'),
            "weak": ("ETag", f'W/"{digest}"'),
            "modified": ("Last-Modified", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(int(digest[:7], 16)))),
        }
        return dict(told[name] for name in self.stamps)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for its headers to be acknowledged: 40 ms
    served: RangeServer

    def setup(self) -> None:
        super().setup()
        with self.served.lock:
            self.served.connections += 1

    def do_GET(self) -> None:
        served = self.served
        target = re.sub(r"^http://[^/]*", "", self.path)  # as a proxy is asked
        path, _, query = target.partition("?")
        path = path.lstrip("/")
        if served.before is not None:
            served.before(path)
        fault = served.fault(path)
        reply = self._reply(path, query, fault)
        if reply is not None:
            self._answer(reply.status, reply.body, path, None, reply.headers, fault)
            return
        data = served.content(path)
        if data is None:
            self._answer(404, b"", path, None, {}, fault)
            return
        stamps = {**served.stamped(data), **served.headers.get(path, {})}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if found is None or not served.gives_ranges:
            self._answer(200, data, path, None, {**stamps, "Accept-Ranges": "bytes"}, fault)
            return
        first = int(found[1]) if found[1] else max(0, len(data) - int(found[2]))
        last = min(int(found[2]), len(data) - 1) if found[1] and found[2] else len(data) - 1
        if first >= len(data):
            self._answer(416, b"", path, first, {"Content-Range": f"bytes */{len(data)}"}, fault)
            return
        headers = {**stamps, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._answer(206, data[first : last + 1], path, first, headers, fault)

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:  # as a proxy is asked for TLS
        served = self.served
        with served.lock:
            served.asked.append(Asked("CONNECT", self.path, None, 0, 200, dict(self.headers)))
        if served.authorization is not None and self.headers.get("Proxy-Authorization") != served.authorization:
            self.send_error(407)
            return
        self.close_connection = True
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_carry, args=(there, self.connection), daemon=True)
            back.start()
            _carry(self.connection, there)
            back.join()

    def _reply(self, path: str, query: str, fault: Fault) -> Reply | None:
        served = self.served
        if fault.status is not None:
            return Reply(fault.status, b"", {})
        if served.authorization is not None and self.headers.get("Authorization") != served.authorization:
            return Reply(401, b"who is there?", {"WWW-Authenticate": "Basic"})
        if path in served.redirects:
            status, url = served.redirects[path]
            return Reply(status, b"it is elsewhere", {"Location": url})
        return (
            served.replies(path, query, {name.title(): each for name, each in self.headers.items()})
            if served.replies is not None
            else None
        )

    def _answer(
        self, status: int, body: bytes, path: str, first: int | None, headers: dict[str, str], fault: Fault
    ) -> None:
        body = body if fault.body is None else fault.body
        sent = b"" if self.command == "HEAD" else body if fault.cut is None else body[: fault.cut]
        query = self.path.partition("?")[2]
        asked = Asked(self.command, path, first, len(sent), status, dict(self.headers), query)
        with self.served.lock:
            self.served.asked.append(asked)
        headers = {**headers, **fault.headers}
        if fault.tells is not None:
            headers["Content-Range"] = fault.tells
        self.send_response(status)
        is_chunked = not self.served.gives_length and status == 200
        headers.setdefault(*(("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", str(len(body)))))
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        pieces = [sent[at : at + 50_000] for at in range(0, len(sent), 50_000)]
        for piece in pieces:
            if self.served.rate:
                time.sleep(len(piece) / self.served.rate)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked and fault.cut is None:
            self.wfile.write(b"0\r\n\r\n")
        if fault.stalls:
            self.wfile.flush()
            self.served.closing.wait(30)
        if fault.cut is not None or fault.stalls or fault.resets:
            self.close_connection = True
            if fault.resets:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # whoever asked has gone
            self.close_connection = True

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()


def _carry(source: socket.socket, destination: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            destination.sendall(data)
        destination.shutdown(socket.SHUT_WR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def range_server(root: Path | None = None, *, context: ssl.SSLContext | None = None) -> Iterator[RangeServer]:
    """Such a server, on a port of its own, as long as the block lasts; with a context it speaks TLS."""
    served = RangeServer(root=root)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    served.url = f"{'https' if context else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
