"""Files behind HTTP, on loopback: copied, converted and looked at, beside curl and beside torch over fsspec.

The server is a process of its own, and lets the kernel send (``sendfile``), so that it takes little of the cores that
are measured.  curl is the pace of the line: it writes what comes to a file, and looks at none of it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from measure import CKPTKIT, Command, Groups, gib

LOAD = """
import sys, fsspec, torch
with fsspec.open(sys.argv[1], "rb", block_size=5 << 20) as file:
    torch.load(file, weights_only=True, map_location="cpu")
"""


def serve(folder: Path) -> None:
    """Serve the files of a folder with ranges, until the process ends; prints the port."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=_answer, args=(connection, folder), daemon=True).start()


def _answer(connection: socket.socket, folder: Path) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, contextlib.suppress(OSError):
        head = b""
        while True:
            while b"\r\n\r\n" not in head:
                more = connection.recv(1 << 16)
                if not more:
                    return
                head += more
            asked, _, head = head.partition(b"\r\n\r\n")
            lines = asked.decode("latin-1").split("\r\n")
            method, target, _ = lines[0].split()
            with (folder / target.lstrip("/")).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found = next(
                    (m for m in (re.match(r"(?i)range: bytes=(\d+)-(\d*)", line) for line in lines) if m), None
                )
                first, last, status = 0, size - 1, "200 OK"
                if found is not None:
                    first, status = int(found[1]), "206 Partial Content"
                    last = min(int(found[2] or last), last)
                answer = f'HTTP/1.1 {status}\r\nContent-Length: {last + 1 - first}\r\nETag: "{size}"\r\n'
                answer += "Accept-Ranges: bytes\r\n"
                answer += "" if found is None else f"Content-Range: bytes {first}-{last}/{size}\r\n"
                connection.sendall(f"{answer}\r\n".encode())
                while method != "HEAD" and first <= last:
                    first += os.sendfile(connection.fileno(), file.fileno(), first, last + 1 - first)


def groups(state: Path, folder: Path) -> Groups:
    """The tables; the server runs until the program ends.

    Args:
        state: a checkpoint of torch's, which is served.
        folder: to write to.
    """
    server = subprocess.Popen([sys.executable, __file__, str(state.parent)], stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    assert server.stdout is not None
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}/{state.name}"
    copy, out = folder / "copy.pth", folder / "far.safetensors"
    convert = [*CKPTKIT, "convert", url, str(out)]
    commands = [
        Command("curl -o", ["curl", "-s", "-o", str(copy), url], state, copy),
        Command("ckptkit convert --no-check", [*convert, "--no-check"], state, out),
        Command("ckptkit convert", convert, state, out),
        Command("ckptkit check --no-nan", [*CKPTKIT, "check", "--no-nan", url], state),
        Command("ckptkit inspect", [*CKPTKIT, "inspect", url]),
    ]
    if shutil.which("curl") is None:
        raise SystemExit("curl is what the others are compared with, and is not installed")
    if find_spec("fsspec") and find_spec("aiohttp"):
        commands.append(Command("torch.load of fsspec's file", [sys.executable, "-c", LOAD, url], state))
    return {f"A .pth of {gib(state)} behind HTTP": ("curl -o", commands)}


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
