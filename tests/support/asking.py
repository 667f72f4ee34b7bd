"""Asks a process of `forked.py` for a fork of it: what a shell calls in the place of python.

    python -S -E asking.py SOCKET [ARGUMENT ...]

The fork has this process's streams, folder and environment; its exit status is passed on.  Little is imported here.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def ask(path: str, arguments: list[str], cwd: str, env: dict[str, str], streams: list[int]) -> int:
    """Run ``python ARGUMENTS`` with these for stdin, stdout and stderr; its exit status, as `subprocess` gives it."""
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect(path)
        socket.send_fds(asked, [b"."], streams)
        asked.sendall(json.dumps([arguments, cwd, env]).encode())
        asked.shutdown(socket.SHUT_WR)
        return int(asked.recv(16))


if __name__ == "__main__":
    status = ask(sys.argv[1], sys.argv[2:], os.getcwd(), dict(os.environ), [0, 1, 2])
    sys.exit(status if status >= 0 else 128 - status)
