"""Files that, by their names, do to those who check them what files on failing disks and machines do."""

from __future__ import annotations

import os
import time
from typing import Any

from ckptkit.errors import FileAccessError
from ckptkit.released import file_check, manifest_maker
from ckptkit.released.examine import examine_file


def odd(path: str, **asked: Any) -> Any:
    """In place of `examine_file`."""
    name = os.path.basename(path)
    if name.startswith("dies"):
        os._exit(9)
    if name.startswith("hangs"):
        for _ in range(600):  # a signal that comes just before a sleep does not end it
            time.sleep(0.1)
    if name.startswith("memory"):
        raise MemoryError
    if name.startswith("denied"):
        raise FileAccessError(f"{path}: cannot be read: Input/output error", path=path)
    return examine_file(path, **asked)


def are_odd() -> None:
    """Let them be so in this process: what a pool's workers call first."""
    file_check.examine_file = manifest_maker.examine_file = odd  # type: ignore[assignment]
