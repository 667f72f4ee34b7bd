"""Connections to web servers: kept alive, for several threads at once, through proxies; one request and its answer.

HTTP/1.1 (RFC 9112) as the standard library speaks it.  Requests to a server, and the meaning of its answers, are in
`ckptkit.remote.http`.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import os
import re
import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Mapping
from functools import lru_cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, RemoteDisconnected
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from ckptkit.bytesource import require_wanted
from ckptkit.errors import CkptkitError, FileAccessError
from ckptkit.extras import __version__
from ckptkit.remote.retries import Passing

__all__ = ["Answer", "Target", "ask"]

CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 20.0
"""How long to wait for a connection, and for the next bytes on it."""

_LOOK_SECONDS = 0.2
"""How often a waiting reader checks whether to continue."""

_KEPT = 16
"""Connections to one server that are kept while nothing is asked on them."""

_BUFFER_NBYTES = 64 << 10
_DISCARDED_NBYTES = 64 << 10
"""Reading longer unneeded bodies costs more than a new connection."""

_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\n]*)?\r?\n")
_BLANK = (b"\r\n", b"\n")
_LINE_NBYTES, _MOST_TRAILERS = 4096, 100

_SAFE = "/:@!$&'()*+,;=-._~%[]"
_HOST = re.compile(r"[A-Za-z0-9._~-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9._~-]+)?")
_PORTS = {"http": 80, "https": 443}


class Target(NamedTuple):
    """The parts of a URL.

    Attributes:
        scheme, host, port: whom to ask.
        path: what for, with its query.
        authorization: the header's value, where the URL has a user name; ``None``: it has none.
    """

    scheme: str
    host: str
    port: int
    path: str
    authorization: str | None

    @classmethod
    def of(cls, url: str, shown: str) -> Target:
        """As above.

        Args:
            url: http or https.
            shown: what errors call it.

        Raises:
            FileAccessError: it is not such a URL.
        """
        try:
            parts = urlsplit(url.strip())
            host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
        except ValueError:  # of which UnicodeError is one
            host, port = "", None
        else:
            if parts.scheme in _PORTS and _HOST.fullmatch(host):
                path = quote(parts.path or "/", safe=_SAFE)
                path += f"?{quote(parts.query, safe=_SAFE + '?')}" if parts.query else ""
                return cls(
                    parts.scheme, host, port or _PORTS[parts.scheme], path, _basic(parts.username, parts.password)
                )
        raise FileAccessError(f"{shown}: is not a valid http:// or https:// URL", path=shown)

    def may_have_what_is_for(self, other: Target) -> bool:
        """Whether credentials that are meant for another may go here: it is the same server, and no less secret."""
        if self.host.lower() != other.host.lower():
            return False
        there, here = (other.scheme, other.port), (self.scheme, self.port)
        return here == there or (there, here) == (("http", 80), ("https", 443))


def _basic(user: str | None, password: str | None) -> str | None:
    if not user and not password:
        return None
    both = f"{unquote(user or '')}:{unquote(password or '')}"
    return f"Basic {base64.b64encode(both.encode()).decode()}"


# What comes on a connection.


class _Raw(io.RawIOBase):
    """A connection's bytes.  Where it breaks they end and ``broken`` says why: what came until then is not lost."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw, self._sock = raw, sock
        self.broken: OSError | None = None
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        try:
            self._wait()
            count: int | None = self._raw.readinto(buffer)
        except CkptkitError:
            raise
        except OSError as error:
            self.broken, count = error, 0
        self.ended |= count == 0
        return count

    def _wait(self) -> None:
        """Until bytes come, as long as they are needed."""
        seconds = self._sock.gettimeout()
        if not seconds or getattr(self._sock, "pending", int)():
            return
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if _comes(self._sock, min(left, _LOOK_SECONDS)):
                return
            require_wanted()
        raise TimeoutError

    def close(self) -> None:
        super().close()
        self._raw.close()


class Answer(HTTPResponse):
    """A server's answer.

    Attributes:
        is_cut: whether the body ended before it was to.
    """

    def __init__(self, sock: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self._raw = _Raw(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._raw, _BUFFER_NBYTES)
        self.is_cut = False
        self._left = 0  # of a chunk
        self._connection: HTTPConnection | None = None
        self._route: _Route | None = None

    def begin(self) -> None:
        try:
            super().begin()
        except (HTTPException, ConnectionError):
            raise self._raw.broken or RemoteDisconnected("the connection was closed") from None
        if self._raw.ended:  # between two headers
            raise self._raw.broken or RemoteDisconnected("the connection was closed")

    @property
    def why(self) -> str:
        """Of a body that is cut, in words that end with a space: nothing came any more; empty: it ended."""
        return "(timed out) " if isinstance(self._raw.broken, TimeoutError) else ""

    def take(self, nbytes: int) -> bytes:
        """So many bytes of the body; fewer: it ends there, or `is_cut`."""
        if self.isclosed():
            return b""
        if self.chunked:
            return self._of_chunks(nbytes)
        wanted = nbytes if self.length is None else min(nbytes, self.length)
        data = self.fp.read(wanted)
        if self.length is not None:
            self.length -= len(data)
        self.is_cut = self._raw.broken is not None or (self.length is not None and len(data) < wanted)
        return data

    def _of_chunks(self, nbytes: int) -> bytes:
        """As `take`, of a body in chunks (RFC 9112, section 7.1)."""
        parts: list[bytes] = []
        while nbytes and not self.is_cut:
            if not self._left:
                size = _CHUNK.fullmatch(self.fp.readline(_LINE_NBYTES))
                self._left = int(size[1], 16) if size else 0
                if not self._left:
                    self.is_cut = size is None or not self._ends()
                    break
            data = self.fp.read(min(nbytes, self._left))
            parts.append(data)
            self.is_cut = len(data) < min(nbytes, self._left)
            nbytes -= len(data)
            self._left -= len(data)
            if not self._left:
                self.is_cut = self.fp.readline(3) not in _BLANK
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _ends(self) -> bool:
        """Whether what follows the last chunk is as it must be."""
        for _ in range(_MOST_TRAILERS):
            line = self.fp.readline(_LINE_NBYTES)
            if line in _BLANK:
                self.close()
                return True
            if not line:
                break
        return False

    def has_more(self) -> bool:
        """Whether bytes follow those that were taken, which are all that were to come."""
        if self.isclosed():
            return False
        if self.chunked or self.length is None:
            return bool(self.take(1))
        if self.length or self._connection is None or self._connection.sock is None:
            return bool(self.length)
        self._connection.sock.settimeout(0)
        try:
            return bool(self.fp.peek(1))
        finally:
            self._connection.sock.settimeout(ANSWER_SECONDS)

    def keep(self, connection: HTTPConnection, route: _Route) -> None:
        """It came on this connection, which others may have once it was read."""
        self._connection, self._route = connection, route

    def release(self) -> None:
        """Release it: its connection is kept if it was read to its end."""
        is_whole = not self.is_cut and (self.isclosed() or self.length == 0)
        if is_whole and not self.will_close and self._connection is not None and self._route is not None:
            self.close()
            _idle.give(self._route, self._connection)
        else:
            self.close()
            if self._connection is not None:
                self._connection.close()
        self._connection = None

    def discard(self) -> None:
        """As `release`, when the body is not needed."""
        if self.length is None or self.length <= _DISCARDED_NBYTES:
            self.take(_DISCARDED_NBYTES)
        self.release()


class _Plain(HTTPConnection):
    response_class = Answer


class _Secret(HTTPSConnection):
    response_class = Answer


# Connections that wait.


class _Route(NamedTuple):
    scheme: str
    host: str
    port: int
    proxy: str | None


class _Idle:
    """Connections on which nothing is asked, by where they lead."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[_Route, list[HTTPConnection]] = {}

    def take(self, route: _Route) -> HTTPConnection | None:
        """One that is still open; ``None``: there is none."""
        while True:
            with self._lock:
                waiting = self._waiting.get(route)
                if not waiting:
                    return None
                connection = waiting.pop()
            if connection.sock is not None and _is_quiet(connection.sock):
                return connection
            connection.close()

    def give(self, route: _Route, connection: HTTPConnection) -> None:
        """It may be taken again."""
        with self._lock:
            waiting = self._waiting.setdefault(route, [])
            waiting.append(connection)
            surplus = waiting.pop(0) if len(waiting) > _KEPT else None
        if surplus is not None:
            surplus.close()

    def close(self) -> None:
        """Close all.  In a forked process they are closed there, and stay open in the one that has them."""
        self._lock = threading.Lock()
        waiting, self._waiting = self._waiting, {}
        for connections in waiting.values():
            for connection in connections:
                connection.close()


def _is_quiet(sock: socket.socket) -> bool:
    """Whether nothing came without a request, such as the end."""
    return not _comes(sock, 0)


def _comes(sock: socket.socket, seconds: float) -> bool:
    """Whether something comes within a while, including the end."""
    try:
        if sys.platform != "win32" and hasattr(select, "poll"):
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
        return bool(select.select([sock], [], [], seconds)[0])
    except (OSError, ValueError):
        return True


_idle = _Idle()
atexit.register(_idle.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.close)


# Making one.


@lru_cache(maxsize=4)
def _context(certificates: tuple[str | None, str | None]) -> ssl.SSLContext:
    """The system's certificates, or those of ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``, which it is made again for."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _route_of(target: Target, shown: str) -> _Route:
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(f"{target.host}:{target.port}"):
        return _Route(*target[:3], None)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    scheme = proxy.partition("://")[0].lower()
    if scheme not in _PORTS or (scheme, target.scheme) == ("https", "https"):
        raise FileAccessError(
            f"{shown}: the proxy set in the environment is a {scheme}:// one, which cannot be used for "
            f"{target.scheme}://; set {target.scheme.upper()}_PROXY to an http:// proxy, or NO_PROXY={target.host}",
            path=shown,
        )
    return _Route(*target[:3], proxy)


def _connected(route: _Route, shown: str) -> HTTPConnection:
    """A new connection.

    Raises:
        Passing: there was none to be had.
        FileAccessError: there will be none.
    """
    to = Target.of(route.proxy, "the proxy set in the environment") if route.proxy else None
    scheme, host, port = to[:3] if to else route[:3]
    if scheme == "https" or route.scheme == "https":
        context = _context((os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")))
        connection: HTTPConnection = _Secret(host, port, timeout=CONNECT_SECONDS, context=context)
    else:
        connection = _Plain(host, port, timeout=CONNECT_SECONDS)
    if to and route.scheme == "https":
        connection.set_tunnel(
            route.host, route.port, {"Proxy-Authorization": to.authorization} if to.authorization else {}
        )
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_SECONDS)
    except (OSError, HTTPException) as error:
        connection.close()
        raise _failing(error, f"{'the proxy ' if to else ''}{host}", shown) from error
    return connection


def _failing(error: Exception, host: str, shown: str) -> Exception:
    """What to raise for a connection that does not come about, or breaks."""
    if isinstance(error, TimeoutError):
        return Passing(f"{host} does not respond in time")
    if isinstance(error, socket.gaierror):
        why = f"the host {host} cannot be found: check the name, the network, and the proxy (HTTPS_PROXY)"
    elif isinstance(error, ssl.SSLCertVerificationError):
        why = (
            f"the certificate of {host} is not trusted ({error.verify_message}): "
            "set SSL_CERT_FILE to a file with the certificate that signed it"
        )
    elif isinstance(error, ssl.SSLError) and not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        why = f"{host} does not speak TLS ({error.reason or 'no reason given'}): is it an http:// server?"
    elif "Tunnel connection failed" in str(error):
        told = str(error).rpartition("failed: ")[2]
        if told.startswith("5"):
            return Passing(f"{host} answers {told}")
        why = f"{host} answers {told}: set HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT, or NO_PROXY"
    elif isinstance(error, ConnectionRefusedError):
        return Passing(f"{host} refuses the connection")
    elif isinstance(error, (ConnectionError, ssl.SSLError)):
        return Passing(f"the connection to {host} broke")
    elif isinstance(error, OSError):
        return Passing(f"{host} cannot be reached: {error.strerror or type(error).__name__}")
    else:
        return Passing(f"{host} responds with something that is not HTTP")
    return FileAccessError(f"{shown}: {why}", path=shown)


def ask(target: Target, headers: Mapping[str, str], shown: str) -> Answer:
    """The answer to a GET request; its reader releases it (`Answer.release`).

    Raises:
        Passing: there was none.
        FileAccessError: there will be none.
    """
    route = _route_of(target, shown)
    sent = {"User-Agent": f"ckptkit/{__version__}", "Accept-Encoding": "identity", "Accept": "*/*", **headers}
    path = target.path
    if route.proxy and target.scheme == "http":
        host = f"[{target.host}]" if ":" in target.host else target.host
        path = f"http://{host}:{target.port}{target.path}"
        authorization = Target.of(route.proxy, "the proxy set in the environment").authorization
        sent |= {"Proxy-Authorization": authorization} if authorization else {}
    connection = _idle.take(route)
    is_new = connection is None
    while True:
        connection = connection or _connected(route, shown)
        try:
            connection.request("GET", path, headers=sent)
            answer = connection.getresponse()
        except (OSError, HTTPException) as error:
            with contextlib.suppress(OSError):
                connection.close()
            if is_new:
                raise _failing(error, target.host, shown) from error
            connection, is_new = None, True  # one that waited may have ended a moment ago
            continue
        except BaseException:
            connection.close()
            raise
        assert isinstance(answer, Answer)  # noqa: S101 - of `response_class`
        answer.keep(connection, route)
        return answer
