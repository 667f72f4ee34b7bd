"""An S3 of our own on loopback, by moto, that tells what it was asked for and can fail, refuse and cut short."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

__all__ = ["Asked", "ObjectServer", "object_server"]

BUCKET = "models"


@dataclass
class Asked:
    """A request, and how many bytes of body it was answered with."""

    method: str
    path: str
    query: str
    status: str = ""
    nbytes: int = 0


@dataclass
class ObjectServer:
    """What it was asked, and what it does wrong.

    Attributes:
        url: where it listens.
        asked: the requests since `forget`.
        fails: called with each request; what it gives is answered in place of what is there: status and code of S3.
    """

    url: str
    asked: list[Asked] = field(default_factory=list)
    fails: Callable[[Asked], tuple[int, str] | None] = lambda asked: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, key: str, content: bytes | Path, *, acl: str = "") -> str:
        """Store an object; its URL."""
        data = content if isinstance(content, bytes) else content.read_bytes()
        self._send("PUT", f"{BUCKET}/{key}", data, acl)
        return f"s3://{BUCKET}/{key}"

    def put_folder(self, folder: Path, key: str) -> str:
        """Store all files of a folder; the URL of the prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{key}/{path.relative_to(folder).as_posix()}", path)
        return f"s3://{BUCKET}/{key}"

    def empty(self) -> None:
        """Remove what other tests stored."""
        self._send("POST", "moto-api/reset")
        self._send("PUT", BUCKET)

    def _send(self, method: str, path: str, data: bytes = b"", acl: str = "") -> None:
        signed = "Credential=AKIAEXAMPLE/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        headers = {"Content-Type": "application/octet-stream", "Authorization": f"AWS4-HMAC-SHA256 {signed}"}
        headers |= {"x-amz-acl": acl} if acl else {}
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=20)
        connection.request(method, f"/{path}", data, headers)
        answer = connection.getresponse()
        connection.close()
        assert answer.status == 200, (method, path, answer.status)

    def forget(self) -> None:
        """Count from here, and do nothing wrong."""
        self.asked.clear()
        self.fails = lambda asked: None

    @property
    def nbytes(self) -> int:
        """Bytes of bodies that it sent."""
        return sum(each.nbytes for each in self.asked)

    def called(self, app: Any, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        """A request, as WSGI has it."""
        asked = Asked(environ["REQUEST_METHOD"], environ["PATH_INFO"].lstrip("/"), environ["QUERY_STRING"])
        with self.lock:
            self.asked.append(asked)
        wrong = self.fails(asked)
        if wrong is not None:
            status, code = wrong
            asked.status = str(status)
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}!</Message></Error>".encode()
            start(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [b"" if asked.method == "HEAD" else body]

        def started(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            asked.status = status.split()[0]
            return start(status, headers, *more)

        parts = [*app(environ, started)]
        asked.nbytes = sum(map(len, parts)) if asked.method == "GET" else 0
        return parts


@contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Such a server, on a port of its own, with one bucket, as long as the block lasts."""
    from moto.moto_server.threaded_moto_server import MotoRequestHandler
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        def log(self, *args: object) -> None:
            pass

    app = DomainDispatcherApplication(create_backend_app)
    served = ObjectServer("")
    server = make_server(
        "127.0.0.1",
        0,
        lambda environ, start: served.called(app, environ, start),
        threaded=True,
        request_handler=Handler,
    )
    server.daemon_threads = True  # type: ignore[attr-defined]
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        served.empty()
        served.forget()
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
