"""Files behind http: what is asked of servers, what goes wrong with them, and what is never said of a URL."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.range_server import Fault, RangeServer, Reply, range_server

import ckptkit
from ckptkit.cli import ending, main
from ckptkit.errors import CorruptError, FileAccessError, MissingFileError
from ckptkit.places import own_name
from ckptkit.remote import connections, http, retries
from ckptkit.remote.connections import Target
from ckptkit.remote.http import HttpStore
from ckptkit.remote.retries import masked, masked_text
from ckptkit.remote.store import FarFile

HEAD = 64 << 10
DATA = bytes(range(256)) * 1200
PEM = Path(__file__).parent.parent / "support" / "localhost.pem"


@pytest.fixture(scope="module")
def _servers() -> Iterator[tuple[RangeServer, RangeServer]]:
    with range_server() as one, range_server() as other:
        yield one, other


@pytest.fixture
def web(_servers: tuple[RangeServer, RangeServer], monkeypatch: pytest.MonkeyPatch) -> RangeServer:
    """A server with one file."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = _servers[0]
    server.renew()
    server.files["f.bin"] = DATA
    return server


@pytest.fixture
def other(_servers: tuple[RangeServer, RangeServer]) -> RangeServer:
    """Another server, on another port."""
    _servers[1].renew()
    return _servers[1]


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(retries, "sleep", slept.append)
    return slept


def opened(web: RangeServer, path: str = "f.bin") -> FarFile:
    return HttpStore().open(f"{web.url}/{path}", HEAD)


@contextmanager
def broken_server(beginnings: Iterator[bytes], web: RangeServer) -> Iterator[str]:
    """The URL of a file of which each of these is all that comes at first, one a connection, and then all of it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for beginning in beginnings:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(beginning)
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                told = f"HTTP/1.1 302 Found\r\nLocation: {web.url}/f.bin\r\nContent-Length: 0\r\n\r\n"
                connection.sendall(told.encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/x"
        thread.join(10)


def authorization(user: str) -> str:
    return f"Basic {base64.b64encode(user.encode()).decode()}"


def with_user(url: str, user: str = "me:secret") -> str:
    return url.replace("://", f"://{user}@")


# What is asked.


def test_a_file_costs_one_request_and_each_range_one_more_on_one_connection(web) -> None:
    connections._idle.close()
    file = opened(web)
    assert (file.size, file.head, file.shown) == (len(DATA), DATA[:HEAD], f"{web.url}/f.bin")
    assert file.stamp == web.stamped(DATA)["ETag"]
    assert HttpStore().read(file, 100_000, 150_000) == DATA[100_000:250_000]
    assert HttpStore().read(file, 5, 0) == b""
    assert web.ranges == [(0, HEAD), (100_000, 150_000)]
    assert web.connections == 1
    sent = web.asked[1].headers
    assert (sent["Range"], sent["Accept-Encoding"]) == ("bytes=100000-249999", "identity")
    assert sent["User-Agent"] == f"ckptkit/{ckptkit.__version__}"


def test_threads_have_connections_of_their_own_that_are_kept(web) -> None:
    connections._idle.close()
    file, store = opened(web), HttpStore()
    web.before = lambda path: time.sleep(0.005)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            parts = [*pool.map(lambda at: store.read(file, at, 1000), range(0, 12_000, 1000))]
            assert b"".join(parts) == DATA[:12_000]
    assert 1 < web.connections <= 4
    assert len(web.asked) == 37


def test_a_connection_that_the_server_ended_meanwhile_is_made_anew_without_a_pause(web, naps) -> None:
    connections._idle.close()
    store = HttpStore()
    file = opened(web)
    web.before = lambda path: None
    web.faults = [Fault(headers={"Connection": "close"})]  # said and done
    assert store.read(file, 0, 10) == DATA[:10]
    web.faults = [Fault(headers={"Keep-Alive": "timeout=0"}, cut=10)]  # done, and not said
    assert store.read(file, 0, 10) == DATA[:10]
    assert store.read(file, 10, 10) == DATA[10:20]
    assert web.connections == 3
    assert naps == []


def test_a_connection_that_ends_just_when_it_is_asked_is_made_anew_without_a_pause(web, naps, monkeypatch) -> None:
    file = opened(web)
    with range_server() as leaving:
        leaving.files["f.bin"] = DATA
        far = opened(leaving)
        route = next(route for route in connections._idle._waiting if str(route.port) in leaving.url)
        (waiting,) = connections._idle._waiting[route]
        waiting.sock.shutdown(1)
        monkeypatch.setattr(connections, "_is_quiet", lambda sock: True)
        assert HttpStore().read(far, 0, 10) == DATA[:10]
    assert HttpStore().read(file, 0, 10) == DATA[:10]
    assert naps == []


def test_files_without_bytes(web) -> None:
    web.files["empty"] = b""
    for web.gives_ranges in (True, False):
        file = opened(web, "empty")
        assert (file.size, file.head) == (0, b"")
        assert HttpStore().stamp(file) == file.stamp
    web.faults = [Fault(status=416)]  # as S3 says it
    assert opened(web).size == 0


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_commands_tell_of_a_url_what_they_tell_of_the_file(web, tmp_path, ending) -> None:
    state = {f"layer.{i}.weight": torch.randn(10, 10) for i in range(30)}
    path = tmp_path / f"model.{ending}"
    torch.save(state, path) if ending == "pth" else save_file(state, path)
    url = f"{web.url}/a%20b/model.{ending}"
    web.files["a%20b/model." + ending] = path.read_bytes()
    near, far = json.dumps(ckptkit.inspect(path)), json.dumps(ckptkit.inspect(url))
    assert far.replace(url, str(path)) == near
    ckptkit.convert(url, tmp_path / "far.safetensors", receipt=False)
    ckptkit.convert(path, tmp_path / "near.safetensors", receipt=False)
    assert (tmp_path / "far.safetensors").read_bytes() == (tmp_path / "near.safetensors").read_bytes()
    loaded = ckptkit.load_state_dict(url)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert ckptkit.diff(url, path).ok


def test_what_is_local_imports_nothing_of_the_web() -> None:
    fixture = Path(__file__).parent.parent.parent / "fixtures" / "ddp_resume.pth"
    names = {"http.client", "ssl", "socket", "urllib.request", "ckptkit.remote.http", "ckptkit.remote.retries"}
    code = f"import sys, ckptkit; ckptkit.inspect({str(fixture)!r}); print(sorted({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_makes_connections_of_its_own(web) -> None:
    web.files["f.bin"] = bytes(range(200)) * 4_000
    code = f"""if True:
        import os
        from ckptkit.remote.http import HttpStore
        store = HttpStore()
        file = store.open({web.url + "/f.bin"!r}, 10)
        child = os.fork()
        wrong = sum(store.read(file, at, 100_000) != bytes(range(200)) * 500 for at in range(0, 800_000, 100_000))
        if child == 0:
            os._exit(wrong)
        print(wrong, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0 0\n", "")
    assert web.connections == 2


# What fails for the moment.


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 522])
def test_a_busy_server_is_asked_again_after_pauses_that_grow(web, naps, status) -> None:
    web.faults = [Fault(status=status)] * 5
    assert opened(web).size == len(DATA)
    assert len(web.asked) == 6
    assert all(0.25 * 2**i <= nap <= 0.5 * 2**i for i, nap in enumerate(naps))


def test_a_server_that_stays_busy_is_given_up(web, naps) -> None:
    file = opened(web)
    web.faults = [Fault(status=503)] * 10
    with pytest.raises(
        FileAccessError, match=r"/f\.bin: the server answers 503 Service Unavailable \(tried 6 times\)$"
    ):
        HttpStore().read(file, 0, 10)
    assert len(web.asked) == 7
    assert len(naps) == 5


def test_a_server_says_how_long_to_wait(web, naps, monkeypatch) -> None:
    monkeypatch.setattr(retries.time, "time", lambda: 1_000_000.0)
    told = ["7", formatdate(1_000_020, usegmt=True), formatdate(999_000, usegmt=True), "soon"]
    web.faults = [Fault(status=429, headers={"Retry-After": each}) for each in told]
    web.faults.append(Fault(status=429, headers={"RateLimit": '"api";r=0;t=55'}))
    assert opened(web).size == len(DATA)
    assert naps[:2] == [7.0, 20.0]
    assert all(0 < nap <= 8 for nap in naps[2:4])
    assert naps[4] == 55.0
    web.faults = [Fault(status=503, headers={"Retry-After": "3600"})]
    with pytest.raises(
        FileAccessError,
        match=r"503 .*; the server asks clients to wait 3,600 seconds: try again "
        r"later$",
    ):
        opened(web)
    assert len(naps) == 5


def test_waiting_has_an_end(web, naps) -> None:
    web.faults = [Fault(status=503, headers={"Retry-After": "59"})] * 5
    with pytest.raises(FileAccessError, match="tried 4 times"):
        opened(web)
    assert naps == [59.0] * 3


@pytest.mark.parametrize("fault", [{"cut": 30_000}, {"cut": 30_000, "resets": True}, {"cut": 30_000, "stalls": True}])
def test_a_body_that_breaks_off_is_gone_on_with_where_it_was(web, naps, monkeypatch, fault) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.3)
    connections._idle.close()
    file = opened(web)
    web.forget()
    web.faults = [Fault(**fault)]
    assert HttpStore().read(file, 1000, 100_000) == DATA[1000:101_000]
    if fault.get("resets"):  # what was on its way may be lost
        assert len(web.asked) == 2
    else:
        assert web.ranges == [(1000, 30_000), (31_000, 70_000)]
    assert len(naps) == 1


@pytest.mark.parametrize("fault", [{"cut": 0}, {"cut": 0, "resets": True}, {"cut": 100}])
def test_an_answer_that_breaks_off_while_a_file_is_opened_is_gone_on_with(web, naps, fault) -> None:
    web.faults = [Fault(**fault)] * 2
    assert opened(web).head == DATA[:HEAD]
    assert len(naps) == (2 if not fault["cut"] else 1)  # none before the rest is asked for


def test_headers_that_break_off_are_no_answer(web, naps, monkeypatch) -> None:
    """The rest of them would be missing: how long the body is, which range it has."""
    data = iter([b"HTTP/1.1 206 Partial Content\r\nContent-Le", b"HTTP/1.1 200 OK\r\nETag: x\r\n"])
    with broken_server(data, web) as url:
        assert HttpStore().open(url, 10).size == len(DATA)
    assert len(naps) == 2


def test_bytes_that_come_are_an_advance(web, naps, monkeypatch) -> None:
    monkeypatch.setattr(retries, "_WORTH_NBYTES", 1000)
    file = opened(web)
    web.forget()
    web.faults = [Fault(cut=1000)] * 20
    assert HttpStore().read(file, 0, 100_000) == DATA[:100_000]
    assert web.ranges[:3] == [(0, 1000), (1000, 1000), (2000, 1000)]
    assert len(web.asked) == 21
    web.faults = [Fault(cut=5)] * 10
    assert HttpStore().read(file, 0, 40) == DATA[:40]
    web.faults = [Fault(cut=999)] * 20
    with pytest.raises(FileAccessError, match=r"broke after 999 of 95,005 bytes \(tried 6 times\)"):
        HttpStore().read(file, 0, 100_000)


def test_a_line_on_which_every_body_breaks_off_is_slow_and_no_more(web, naps, tmp_path) -> None:
    torch.save({f"w{i}": torch.randn(300, 300) for i in range(8)}, tmp_path / "m.pth")
    web.files["m.pth"] = (tmp_path / "m.pth").read_bytes()
    web.before = lambda path: web.faults.append(Fault(cut=70_000))
    ckptkit.convert(f"{web.url}/m.pth", tmp_path / "out.safetensors")
    assert ckptkit.diff(tmp_path / "m.pth", tmp_path / "out.safetensors").ok
    assert len(web.asked) > 40
    assert web.nbytes < 1.1 * len(web.files["m.pth"]) + 2 * HEAD


def test_nobody_listens(naps) -> None:
    with range_server() as gone:
        url = f"{gone.url}/x"
    with pytest.raises(FileAccessError, match=r"127\.0\.0\.1 refuses the connection \(tried 6 times\)$"):
        HttpStore().open(url, 10)
    assert len(naps) == 5


def test_a_server_that_says_nothing(naps, monkeypatch) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(retries, "RETRIES", 1)
    with range_server() as silent:
        silent.before = lambda path: silent.closing.wait(10)
        with pytest.raises(FileAccessError, match=r"127\.0\.0\.1 does not respond in time \(tried 2 times\)$"):
            opened(silent)


def test_a_slow_server_is_not_one_that_says_nothing(web, naps, monkeypatch) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 0.2)
    connections._idle.close()
    file = opened(web)
    web.rate = 1_000_000
    assert HttpStore().read(file, 0, 300_000) == DATA[:300_000]  # in 0.3 seconds
    assert naps == []


def test_what_will_not_be_otherwise_is_not_tried_again(naps) -> None:
    with pytest.raises(FileAccessError, match=r"the host nowhere\.invalid cannot be found: check the name"):
        HttpStore().open("http://nowhere.invalid/x", 10)
    for url in ("http:///x", "http://h:99999/x", "http://a b/x", "https://", "http://[::1/x", "http://a..b/x"):
        with pytest.raises(FileAccessError, match="is not a valid http:// or https:// URL"):
            HttpStore().open(url, 10)
    assert naps == []


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (
            401,
            FileAccessError,
            "401 Unauthorized: it needs a user name and password; give https://USER:PASSWORD@HOST/PATH, or hf",
        ),
        (403, FileAccessError, "403 Forbidden: access is denied; a signed URL may have expired"),
        (404, MissingFileError, "no such file"),
        (410, MissingFileError, "no such file"),
        (451, FileAccessError, "the server answers 451 Unavailable For Legal Reasons"),
        (418, FileAccessError, "the server answers 418 I'm a Teapot"),
        (204, FileAccessError, "the server answers 204 No Content"),
        (501, FileAccessError, "the server answers 501 Not Implemented"),
    ],
)
def test_refusals_say_what_to_do(web, naps, status, error, told) -> None:
    web.faults = [Fault(status=status)]
    with pytest.raises(error) as caught:
        opened(web)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{web.url}/f.bin: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (naps, len(web.asked)) == ([], 1)


# Answers that are wrong.


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"tells": "bytes 1000-1099/307200", "body": b"x" * 100}, "requested, but the server sends 'bytes 1000"),
        ({"tells": "bytes 0-199/307200", "body": b"x" * 200}, "bytes 0 to 99 were requested"),
        ({"tells": "bytes 99-0/307200"}, "bytes 0 to 99 were requested"),
        ({"tells": "pages 0-99/307200"}, "bytes 0 to 99 were requested"),
        ({"body": b"x" * 90}, "announces 90 bytes for 100"),
        ({"body": b"x" * 110}, "announces 110 bytes for 100"),
        ({"headers": {"Content-Encoding": "gzip"}}, r"sends it compressed \('gzip'\)"),
        ({"headers": {"Content-Type": "multipart/byteranges; boundary=x"}}, "sends several parts"),
        ({"status": 416, "headers": {"Content-Range": "bytes */307200"}}, "refuses to send the bytes from 0 on"),
    ],
)
def test_wrong_answers_are_refused(web, naps, fault, told) -> None:
    file = opened(web)
    web.faults = [Fault(**fault)]
    with pytest.raises(FileAccessError, match=told):
        HttpStore().read(file, 0, 100)
    assert HttpStore().read(file, 0, 100) == DATA[:100]
    assert naps == []


def test_answers_that_a_confused_connection_may_be_behind_are_asked_for_again(web, naps) -> None:
    file = opened(web)
    web.faults = [Fault(headers={"Content-Length": "100", "X": "y"}, body=DATA[:100] + b"surplus")]
    assert HttpStore().read(file, 0, 100) == DATA[:100]
    web.gives_ranges = False
    web.before = lambda path: setattr(web, "gives_ranges", len(web.asked) > 4)
    assert HttpStore().read(file, 0, 100) == DATA[:100]
    assert len(naps) == len(web.asked) - 3


def test_fewer_bytes_than_were_asked_for_are_gone_on_with(web, naps, monkeypatch) -> None:
    file = opened(web)
    web.faults = [Fault(tells=f"bytes 0-49/{len(DATA)}", body=DATA[:50])]
    web.forget()
    assert HttpStore().read(file, 0, 100) == DATA[:100]
    assert web.ranges == [(0, 50), (50, 50)]


def test_a_file_whose_size_is_not_told_is_refused(web) -> None:
    web.faults = [Fault(tells="bytes 0-99/*", body=DATA[:100])]
    with pytest.raises(FileAccessError, match="does not say how large the file is: download it"):
        HttpStore().open(f"{web.url}/f.bin", 100)
    web.faults = [Fault(status=416, headers={"Content-Range": "bytes */5"})]
    with pytest.raises(FileAccessError, match="refuses to send its first bytes"):
        opened(web)


class Spoken:
    """A socket on which something comes, whatever is sent."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, mode: str) -> io.BufferedReader:
        data, self.data = self.data, b""
        return io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]

    def settimeout(self, *_: object) -> None:
        pass

    sendall = close = gettimeout = settimeout


@pytest.fixture
def hear(monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> Callable[[bytes], None]:
    """``hear(data)``: what comes on each connection from then on."""
    heard = [b""]

    def connected(route: Any, shown: str) -> connections._Plain:
        connection = connections._Plain(route.host, route.port)
        connection.sock = Spoken(heard[0])
        return connection

    monkeypatch.setattr(connections, "_connected", connected)
    monkeypatch.setattr(connections, "_is_quiet", lambda sock: False)
    return lambda data: heard.__setitem__(0, data)


def told(status: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *headers, "", "")).encode() + body


RANGE = "Content-Range: bytes 0-9/10"


@pytest.mark.parametrize(
    "chunks",
    [
        b"a\r\n0123456789\r\n0\r\n\r\n",
        b"4\r\n0123\r\n0006;name=value\r\n456789\r\n0\r\nTrailer: x\r\n\r\n",
        b"A \n0123456789\n0\n\n",
    ],
)
def test_bodies_in_chunks(hear, chunks) -> None:
    hear(told("206 Partial Content", RANGE, "Transfer-Encoding: chunked", body=chunks))
    assert HttpStore().open("http://h/x", 10).head == b"0123456789"
    hear(told("200 OK", "Transfer-Encoding: chunked", body=chunks))
    assert HttpStore().open("http://h/x", 4).size == 10


@pytest.mark.parametrize(
    "chunks",
    [
        b"", b"a", b"a\r\n012", b"a\r\n0123456789", b"a\r\n0123456789\r\n", b"a\r\n0123456789\r\n0",
        b"-1\r\n0123456789", b"x\r\n", b"a\r\n0123456789x\r\n0\r\n\r\n", b"ffffffffffffffffffff\r\n0123456789",
        b"1" * 5000,
        b"a\r\n0123456789\r\n0\r\n" + b"x: y\r\n" * 200,
    ],
)  # fmt: skip
def test_chunks_that_are_none(hear, chunks) -> None:
    hear(told("200 OK", "Transfer-Encoding: chunked", body=chunks))
    with pytest.raises(FileAccessError, match=r"broke after \d+ bytes of the file \(tried 6 times\)"):
        HttpStore().open("http://h/x", 10)


def test_bodies_that_end_with_their_connection(hear) -> None:
    hear(told("206 Partial Content", RANGE, body=b"0123456789").replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert HttpStore().open("http://h/x", 10).head == b"0123456789"
    hear(told("200 OK", body=b"0123456789"))
    assert HttpStore().open("http://h/x", 4).size == 10
    hear(told("206 Partial Content", RANGE, body=b"0123456789more"))
    with pytest.raises(FileAccessError, match=r"sends more bytes than it announced \(tried 6 times\)"):
        HttpStore().open("http://h/x", 10)
    hear(told("206 Partial Content", RANGE, body=b""))
    with pytest.raises(FileAccessError, match=r"broke after 0 of 10 bytes \(tried 6 times\)"):
        HttpStore().open("http://h/x", 10)


def test_any_answer_at_all_ends_in_an_error_or_in_bytes(hear) -> None:
    draw = random.Random(1)
    inserted = [
        b"", b"\r\n", b"0", b"-1", b"9" * 30, b"\x00", b"\xff", b":", b";", b"*", b"A" * 70_000,
        b"HTTP/1.1 206 P\r\n\r\n",
        b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Location: http://[::1\r\n",
    ]  # fmt: skip
    statuses = ["206 Partial Content", "206 P", "200 OK", "416 X", "302 F", "100 Continue", "204 X"]
    lengths = [("Content-Length: 10", b"0123456789"), ("Transfer-Encoding: chunked", b"a\r\n0123456789\r\n0\r\n\r\n")]
    opened = 0
    for _ in range(400):
        length, body = draw.choice(lengths)
        data = bytearray(told(draw.choice(statuses), RANGE, "ETag: x", "Location: /y", length, body=body))
        for _ in range(draw.randrange(4)):
            at = draw.randrange(len(data) + 1)
            data[at : at + draw.choice((0, 0, 1, 5, 1000))] = draw.choice(inserted)
        hear(bytes(data))
        try:
            file = HttpStore().open("http://h/x", 10)
            opened += 1
            HttpStore().read(file, 0, min(file.size, 10))
        except ckptkit.CkptkitError as error:
            assert "\n" not in str(error)
    assert opened > 40


# Servers without ranges.


@pytest.mark.parametrize("gives_length", [True, False])
def test_a_server_without_ranges_is_read_once_and_in_order(web, tmp_path, gives_length) -> None:
    web.gives_ranges, web.gives_length = False, gives_length
    state = {"a": torch.arange(100_000.0)}
    torch.save(state, tmp_path / "m.pth")
    web.files["m.pth"] = (tmp_path / "m.pth").read_bytes()
    assert torch.equal(ckptkit.load_state_dict(f"{web.url}/m.pth")["a"], state["a"])
    assert [each.status for each in web.asked] == [200]
    file = opened(web)
    assert (file.size, file.head, HttpStore().read(file, 70_000, 9)) == (len(DATA), DATA[:HEAD], DATA[70_000:70_009])
    assert HttpStore().stamp(file) == file.stamp
    assert len(web.asked) == 2


def test_a_long_file_of_a_server_without_ranges_is_refused_with_its_size(web, monkeypatch) -> None:
    monkeypatch.setattr(http, "_COPIED_NBYTES", 200_000)
    monkeypatch.setattr(http, "_PIECE_NBYTES", 90_000)
    web.gives_ranges = False
    told = "does not send parts of files, and this one is {}: download it"
    with pytest.raises(FileAccessError, match=told.format("307 kB")):
        opened(web)
    web.gives_length = False
    with pytest.raises(FileAccessError, match=told.format("more than 270 kB")):
        opened(web)


@pytest.mark.parametrize("gives_length", [True, False])
def test_what_breaks_off_without_ranges_begins_anew(web, naps, gives_length) -> None:
    web.gives_ranges, web.gives_length = False, gives_length
    web.faults = [Fault(cut=1000)] * 2
    file = opened(web)
    assert HttpStore().read(file, 0, len(DATA)) == DATA
    assert len(naps) == 2


def test_there_is_no_room_for_a_copy(web, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **named: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    web.gives_ranges = False
    with pytest.raises(FileAccessError, match="no space for a copy of it: No space left on device"):
        opened(web)


# A file that changes.


@pytest.mark.parametrize("stamps", [("etag",), ("weak",), ("modified",), ("etag", "modified"), ()])
def test_a_file_that_changes_is_an_error(web, stamps) -> None:
    web.stamps = stamps
    file = opened(web)
    assert HttpStore().read(file, 0, 10) == DATA[:10]
    assert HttpStore().stamp(file) == file.stamp
    web.files["f.bin"] = DATA[::-1] if stamps else DATA + b"more"
    with pytest.raises(CorruptError, match="the file was changed while it was being read"):
        HttpStore().read(file, 0, 10)
    assert HttpStore().stamp(file) != file.stamp
    web.files["f.bin"] = DATA[:100]
    for web.faults in ([], [Fault(status=416)]):
        with pytest.raises(CorruptError, match="the file was changed while it was being read"):
            HttpStore().read(file, 1000, 10)


@pytest.mark.parametrize("at", [2, 4, None])
def test_nothing_is_written_of_a_file_that_changes(web, tmp_path, monkeypatch, at) -> None:
    torch.save({f"w{i}": torch.randn(300, 300) for i in range(8)}, tmp_path / "m.pth")
    web.files["m.pth"] = (tmp_path / "m.pth").read_bytes()
    changed = bytearray(web.files["m.pth"])
    changed[len(changed) // 2] ^= 1
    asked, stamp = [], HttpStore.stamp

    def change(*_: object) -> None:
        asked.append("")
        if len(asked) == at or at is None:
            web.files["m.pth"] = bytes(changed)

    if at is None:  # once all was read
        monkeypatch.setattr(HttpStore, "stamp", lambda store, file: change() or stamp(store, file))
    else:
        web.before = change
    with pytest.raises(CorruptError, match="the file was changed while it was being"):
        ckptkit.convert(f"{web.url}/m.pth", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


# Redirects.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_where_a_file_is_redirected_to_is_asked_from_then_on(web, other, status) -> None:
    web.files["%C3%BC.bin"] = DATA
    other.redirects = {"x": (status, "y?z=1"), "y": (status, f"{web.url}/ü.bin".encode().decode("latin-1"))}
    file = opened(other, "x")
    assert (file.size, file.shown) == (len(DATA), f"{other.url}/x")
    assert HttpStore().read(file, 100, 100) == DATA[100:200]
    assert [each.path for each in other.asked] == ["x", "y"]
    assert len(web.asked) == 2
    assert HttpStore().stamp(file) == file.stamp
    assert [each.path for each in other.asked] == ["x", "y"] * 2  # what it leads to by now


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_where_it_was_redirected_to_expires(web, other, naps, status) -> None:
    valid = {"sig=1"}
    web.replies = lambda path, query, headers: None if query in valid else Reply(status)
    other.redirects = {"x": (302, f"{web.url}/f.bin?sig=1")}
    file = opened(other, "x")
    valid.clear()
    valid.add("sig=2")
    other.redirects = {"x": (302, f"{web.url}/f.bin?sig=2")}
    for _ in range(2):
        assert HttpStore().read(file, 0, 100) == DATA[:100]
    assert [each.status for each in web.asked] == [206, status, 206, 206]
    assert len(other.asked) == 2
    valid.clear()
    with pytest.raises(FileAccessError, match=f"{other.url}/x: ") as caught:
        HttpStore().read(file, 0, 100)
    assert "sig=" not in str(caught.value)
    valid.add("sig=3")
    web.files["g.bin"] = DATA[::-1]
    other.redirects = {"x": (302, f"{web.url}/g.bin?sig=3")}
    with pytest.raises(CorruptError, match="the file was changed while it was being read"):
        HttpStore().read(file, 0, 100)
    assert naps == []


def test_who_redirected_is_asked_where_something_else_is_found_there(web, other, naps) -> None:
    web.files["g.bin"] = DATA
    other.redirects = {"x": (302, f"{web.url}/f.bin")}
    file = opened(other, "x")
    other.redirects = {"x": (302, f"{web.url}/g.bin")}
    for wrong in (b"<html>Log in</html>", DATA[::-1]):
        web.files["f.bin"] = wrong
        assert HttpStore().read(file, 100, 100) == DATA[100:200]
    web.replies = lambda path, query, headers: Reply(200, b"<html>") if path == "g.bin" else None
    web.files["f.bin"] = DATA
    other.redirects = {"x": (302, f"{web.url}/f.bin")}
    assert HttpStore().read(file, 100, 100) == DATA[100:200]
    web.files["f.bin"] = DATA[::-1]
    with pytest.raises(CorruptError, match="the file was changed while it was being read"):
        HttpStore().read(file, 100, 100)
    assert naps == []


def test_redirects_end(web, other) -> None:
    web.redirects = {str(i): (302, str(i + 1)) for i in range(11)}
    web.files["10"] = web.files["11"] = DATA
    assert HttpStore().open(f"{web.url}/1", 10).size == len(DATA)
    with pytest.raises(FileAccessError, match="is redirected more than 10 times"):
        HttpStore().open(f"{web.url}/0", 10)
    for location in ("file:///etc/passwd", "ftp://h/x", "http://:0:/", "http://[::1"):
        web.redirects = {"x": (302, location)}
        with pytest.raises(FileAccessError, match="/x: is not a valid http:// or https:// URL"):
            HttpStore().open(f"{web.url}/x", 10)


def test_credentials_go_to_their_own_server_only(web, other) -> None:
    web.authorization = authorization("m e:s/ecret")
    web.redirects = {"x": (302, "f.bin"), "y": (302, f"{other.url}/f.bin")}
    other.files["f.bin"] = DATA
    url = with_user(web.url, "m%20e:s%2Fecret")
    file = HttpStore().open(f"{url}/x", 10)
    assert HttpStore().read(file, 0, 10) == DATA[:10]
    assert len(web.asked) == 3
    HttpStore().read(HttpStore().open(f"{url}/y", 10), 0, 10)
    assert ["Authorization" in each.headers for each in other.asked] == [False, False]
    with pytest.raises(FileAccessError, match="401 Unauthorized: the user name or password is wrong"):
        HttpStore().open(with_user(web.url, "me:wrong") + "/f.bin", 10)
    other.redirects = {"z": (302, f"{url}/f.bin")}  # nobody else's say who asks
    with pytest.raises(FileAccessError, match="401 Unauthorized: it needs a user name and password"):
        HttpStore().open(f"{other.url}/z", 10)


@pytest.mark.parametrize(
    ("asked", "there", "may"),
    [
        ("https://h/x", "https://H/y", True),
        ("https://h/x", "http://h/x", False),
        ("http://h/x", "https://h/x", True),
        ("https://h/x", "https://h:444/x", False),
        ("http://h:80/x", "http://h/x", True),
        ("http://h:8080/x", "https://h/x", False),
        ("https://h/x", "https://h.example/x", False),
        ("https://h/x", "https://sub.h/x", False),
    ],
)
def test_which_server_is_the_same(asked, there, may) -> None:
    assert Target.of(there, "").may_have_what_is_for(Target.of(asked, "")) is may


def test_urls_are_sent_as_servers_take_them(web) -> None:
    web.files["a%20b/%C3%A4.bin"] = DATA
    for path in ("a b/ä.bin", "a%20b/%C3%A4.bin", "a b/%C3%A4.bin#part"):
        assert opened(web, path).size == len(DATA)
    opened(web, "f.bin?a=b c&d=%2F#x")
    assert web.asked[-1].query == "a=b%20c&d=%2F"
    assert Target.of("http://bücher.example/x", "").host == "xn--bcher-kva.example"
    assert Target.of("http://my_bucket.host:81", "")[:4] == ("http", "my_bucket.host", 81, "/")
    assert Target.of("https://[::1]:8443/x", "")[:3] == ("https", "::1", 8443)


def test_names_beside_a_file_and_below_a_folder(web) -> None:
    store = HttpStore()
    assert store.beside("https://u:p@h/a/b.json?token=1#x", "c d.bin") == "https://u:p@h/a/c%20d.bin?token=1"
    with pytest.raises(
        FileAccessError, match="does not list its files; name a file, or give the folder as s3://"
    ) as caught:
        store.listing(with_user(web.url))
    assert "secret" not in str(caught.value)


# TLS and proxies.


@pytest.fixture(scope="module")
def _secure() -> Iterator[RangeServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    with range_server(context=context) as server:
        yield server


@pytest.fixture
def secure(_secure: RangeServer, web: RangeServer, monkeypatch: pytest.MonkeyPatch) -> RangeServer:
    """A server that speaks TLS, whose certificate is known."""
    _secure.renew()
    _secure.files["f.bin"] = DATA
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    return _secure


def test_https_with_the_certificates_of_the_environment(secure, naps, monkeypatch) -> None:
    connections._idle.close()
    file = opened(secure)
    secure.faults = [Fault(cut=40_000)]
    assert HttpStore().read(file, 0, 200_000) == DATA[:200_000]
    assert HttpStore().read(file, 0, 200_000) == DATA[:200_000]
    assert secure.connections == 2
    assert len(naps) == 1
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    connections._idle.close()
    with pytest.raises(
        FileAccessError, match=r"the certificate of 127\.0\.0\.1 is not trusted \(.*\): set SSL_CERT_FILE"
    ):
        opened(secure)
    assert len(naps) == 1


def test_https_asked_of_a_server_that_speaks_http(web, naps) -> None:
    with pytest.raises(FileAccessError, match=r"127\.0\.0\.1 does not speak TLS .*: is it an http:// server\?"):
        HttpStore().open(web.url.replace("http:", "https:") + "/f.bin", 10)
    assert naps == []


def test_credentials_do_not_leave_tls(secure, web) -> None:
    secure.authorization = authorization("me:secret")
    secure.redirects = {"x": (302, f"{web.url}/f.bin")}
    assert HttpStore().open(with_user(secure.url) + "/x", 10).size == len(DATA)
    assert "Authorization" not in web.asked[-1].headers


def test_through_proxies(web, secure, other, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", with_user(other.url, "pro:xy"))
    monkeypatch.setenv("http_proxy", with_user(other.url, "pro:xy"))
    monkeypatch.setenv("HTTPS_PROXY", with_user(other.url, "pro:xy"))
    other.files["f.bin"] = DATA[::-1]  # what stands for all that it is asked for
    assert opened(web).head == DATA[::-1][:HEAD]
    assert other.asked[-1].headers["Proxy-Authorization"] == authorization("pro:xy")
    assert other.asked[-1].headers["Host"] == web.url.removeprefix("http://")
    assert web.asked == []
    other.forget()
    assert opened(secure).head == DATA[:HEAD]
    (asked,) = other.asked
    assert (asked.method, asked.path) == ("CONNECT", secure.url.removeprefix("https://"))
    assert asked.headers["Proxy-Authorization"] == authorization("pro:xy")
    assert "Proxy-Authorization" not in secure.asked[-1].headers
    connections._idle.close()
    other.authorization = authorization("other:one")
    with pytest.raises(
        FileAccessError, match=r"the proxy 127\.0\.0\.1 answers 407 .*: set HTTPS_PROXY=http://USER"
    ) as told:
        opened(secure)
    assert "pro:" not in str(told.value)
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    assert opened(web).head == DATA[:HEAD]
    assert opened(secure).head == DATA[:HEAD]


def test_proxies_that_cannot_be_used(web, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://pro:xy@h:1080")
    with pytest.raises(
        FileAccessError, match=r"is a socks5:// one, .*; set HTTP_PROXY to .*NO_PROXY=127\.0\.0\.1"
    ) as told:
        opened(web)
    assert "pro:" not in str(told.value)


def test_progress_is_told_with_its_rate(web, tmp_path, capsys) -> None:
    torch.save({"a": torch.ones(1000, 1000)}, tmp_path / "m.pth")
    web.files["m.pth"] = (tmp_path / "m.pth").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--progress", f"{web.url}/m.pth", str(tmp_path / "out.safetensors")])
    assert ended.value.code == 0
    assert re.search(r"\r100%  8 MB of 8 MB  [\d.]+ [kMG]B/s  0:00 left", capsys.readouterr().err)


def test_how_fast_files_come_is_told_on_a_terminal(web, tmp_path, capsys, monkeypatch) -> None:
    torch.save({"a": torch.ones(1000, 1000)}, tmp_path / "m.pth")
    web.files |= {"m.pth": (tmp_path / "m.pth").read_bytes(), "bad.pth": b"nothing" * 300_000}
    monkeypatch.setattr(ending, "_SECONDS", 0.01)
    monkeypatch.setattr(ending, "_PATIENCE_SECONDS", 0.0)
    web.before = lambda path: time.sleep(0.02)

    def said(*words: str) -> str:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: "piped" not in words, raising=False)
        with pytest.raises(SystemExit):
            main([word for word in words if word != "piped"])
        return capsys.readouterr().err

    for words in (["check", "--no-nan", f"{web.url}/m.pth"], ["inspect", f"{web.url}/m.pth", f"{web.url}/bad.pth"]):
        told = said(*words)
        lines = [line for line in told.split("\r") if line.strip() and not line.startswith("ckptkit")]
        assert lines
        assert all(re.fullmatch(r"[\d.]+ [kM]?B read  [\d.]+ [kMG]?B/s +", f"{line} ") for line in lines), told
        assert told.split("\r")[-2].strip() == "" or words[0] == "inspect"
        assert "read  " not in said("piped", *words) + said("-q", *words)
    assert "read  " not in said("check", str(tmp_path / "m.pth"))


# What is never said.


@pytest.mark.parametrize(
    ("url", "shown", "name"),
    [
        ("https://user:pa:ss@h.com:8080/a/b.pth", "https://***@h.com:8080/a/b.pth", "b.pth"),
        ("https://token@h/b.pth?download=true", "https://***@h/b.pth?download=true", "b.pth"),
        ("https://user:p/w@h.com/x.pth", "https://***@h.com/x.pth", "x.pth"),
        ("https://h/pkg@1.0/a%20b.pth#part", "https://h/pkg@1.0/a%20b.pth", "a%20b.pth"),
        ("https://[::1]:80/f", "https://[::1]:80/f", "f"),
        ("https://h/f?X-Amz-Algorithm=a&X-Amz-Signature=z&versionId=3", "https://h/f?***&versionId=3", "f"),
        ("https://h/f?X-Goog-Credential=a&X-Goog-Signature=z", "https://h/f?***", "f"),
        ("https://h/f?GoogleAccessId=a&Expires=1&Signature=z", "https://h/f?***", "f"),
        ("https://h/f?AWSAccessKeyId=a&Expires=1&Signature=z", "https://h/f?***", "f"),
        ("https://h/f?Policy=a&Key-Pair-Id=b&Signature=z&Expires=1", "https://h/f?***", "f"),
        (
            "https://a.blob.core.windows.net/c/f?sv=1&se=2&sr=b&sp=r&sig=z%2B",
            "https://a.blob.core.windows.net/c/f?***",
            "f",
        ),
        ("https://h/f?sp=3&sv=1", "https://h/f?sp=3&sv=1", "f"),
        ("https://h/f?file=a.pth&access_token=z", "https://h/f?file=a.pth&***", "f"),
        ("https://h/f?api%5Fkey=z", "https://h/f?***", "f"),
        ("https://h/f?" + "a1" * 30, "https://h/f?***", "f"),
        ("https://h/f?a=1#token=2", "https://h/f?a=1", "f"),
        ("hf://gpt2@main/x", "hf://gpt2@main/x", "x"),
        ("az://c@account/x", "az://c@account/x", "x"),
        ("s3://key:secret@b/d/k?versionId=3", "s3://***@b/d/k?versionId=3", "k"),
        ("s3://b/a#1%20.pth", "s3://b/a#1%20.pth", "a#1%20.pth"),
        ("zip://a/b.pth::s3://k:s@b/z.zip", "zip://a/b.pth::s3://***@b/z.zip", "z.zip"),
        ("sftp://me:secret@h/f", "sftp://***@h/f", "f"),
        ("dir/a@b?c#d", "dir/a@b?c#d", "a@b?c#d"),
    ],
)
def test_urls_are_shown_without_credentials(url, shown, name) -> None:
    assert masked(url) == shown
    assert masked(masked(url)) == shown
    assert own_name(url) == name
    assert masked_text(f"cannot read '{url}' now") in (f"cannot read '{shown}' now", f"cannot read '{url}' now")


def test_credentials_are_in_no_error_and_no_repr(web, other, naps, tmp_path) -> None:
    web.authorization = authorization("me:secret")
    signed = with_user(web.url) + "/f.bin?X-Amz-Signature=secret&Expires=1"
    file = HttpStore().open(signed, 10)
    said = [repr(file), repr(file.place), file.shown]
    web.redirects = {"r": (302, f"{other.url}/f.bin?sig=secret")}
    faults: list[dict[str, Any]] = [{"status": status} for status in (400, 401, 403, 404, 407, 416, 451, 501)]
    faults += [{"headers": {"Content-Encoding": "br"}}, {"tells": "bytes 3-4/5"}, {"headers": {"ETag": "another"}}]
    for fault in faults:
        web.faults = [Fault(**fault)]
        with pytest.raises(ckptkit.CkptkitError) as caught:
            HttpStore().read(file, 5, 5)
        said += [str(caught.value), repr(caught.value), repr(caught.value.__dict__)]
        said.append("".join(traceback.format_exception(caught.value)))
    web.faults = [Fault(status=503)] * 6
    with pytest.raises(FileAccessError) as caught:
        HttpStore().read(file, 5, 5)
    said.append("".join(traceback.format_exception(caught.value)))
    with pytest.raises(MissingFileError) as missing:
        HttpStore().open(with_user(web.url) + "/r", 5)
    said.append("".join(traceback.format_exception(missing.value)))
    assert [text for text in said if "secret" in text or "sig=" in text or authorization("me:secret") in text] == []
    assert said[2] == f"http://***@{web.url.removeprefix('http://')}/f.bin?***"


def test_commands_show_no_credentials(web, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(3)}, "m.pth")
    web.authorization = authorization("me:hidden")
    web.files |= {"m.pth": Path("m.pth").read_bytes(), "bad.pth": Path("m.pth").read_bytes()[:-300]}
    good, bad, none = (with_user(web.url, "me:hidden") + f"/{name}.pth?sig=hidden" for name in ("m", "bad", "none"))
    policy = Path("policy.json")
    for words in (
        ["inspect", good],
        ["inspect", "--json", good, none],
        ["inspect", "--json", "--stats", bad, good],
        ["convert", good, "out.safetensors"],
        ["convert", "--json", good, "out2.safetensors"],
        ["diff", good, "m.pth"],
        ["diff", "--json", "m.pth", good],
        ["check", good, bad, none, "--no-pickle"],
        ["check", "--json", good, bad, none, "--jobs", "2"],
        ["check", "--json-lines", "--part", "1/1", good, bad, none],
        ["check", good, none, bad],
        ["check", "--no-pickle", "--no-nan", "--json", good, bad],
        *(
            ["check", "--no-pickle", "--format", output, good, bad, none]
            for output in ("junit", "sarif", "github", "markdown")
        ),
        ["check", "--json-lines", good, none],
        ["manifest", good],
        ["manifest", good, "-o", str(policy)],
        ["check", good, "--manifest", str(policy), "--json"],
        ["manifest", none],
        ["--debug", "convert", bad, "x.safetensors"],
        ["--debug", "diff", bad, good],
        ["--debug", "convert", none, "x.safetensors"],
        ["--debug", "inspect", none],
        ["--debug", "verify", none, "--model", "torchvision:resnet18"],
        ["--debug", "check", with_user(web.url, "me:hidden") + "/m.pth/?sig=hidden"],
        ["convert", "m.pth", with_user(web.url, "me:hidden") + "/new.pth?sig=hidden"],
    ):
        with pytest.raises(SystemExit):
            main(words)
        said = capsys.readouterr()
        assert "hidden" not in said.out + said.err, words
        assert "***@127.0.0.1" in said.out + said.err or words[0] in ("convert", "manifest"), words
    assert "hidden" not in policy.read_text()
    assert b"hidden" not in Path("out.safetensors").read_bytes()
