"""Containers: one module each, and the functions that choose among them.

Adding a container is a module that ends in ``FORMAT = Format(...)`` and one line in `FORMATS`.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import CorruptError, FormatError, RewriteError, UnknownFormatError
from ckptkit.formats import safetensors, torch_zip
from ckptkit.formats.first_bytes import describe
from ckptkit.formats.format import Format, Probe
from ckptkit.limits import DEFAULT_LIMITS, Limits
from ckptkit.normalize import normalize

__all__ = ["FORMATS", "SUFFIXES", "detect", "format_for", "read"]

FORMATS: tuple[Format, ...] = (torch_zip.FORMAT, safetensors.FORMAT)
"""Every container, in no order that matters: a file two of them claim is refused."""

SUFFIXES = frozenset(suffix for container in FORMATS for suffix in container.suffixes)
"""Endings of checkpoint files; used to find files in folders, never to decide what a file is."""


def detect(probe: Probe) -> Format:
    """The container a file is, by its content alone.

    Raises:
        UnknownFormatError: none; the message says what the file is instead and what helps.
        CorruptError: more than one claims it.
    """
    claims = [container for container in FORMATS if container.sniff(probe)]
    if not claims:
        raise UnknownFormatError(describe(probe.head, probe.file.size), path=probe.file.path)
    if len(claims) > 1:
        names = " and ".join(container.name for container in claims)
        raise CorruptError(f"the file is {names} at once; readers would disagree about it", path=probe.file.path)
    return claims[0]


def read(
    path: str | os.PathLike[str], *, section: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> tuple[Checkpoint, SourceFile]:
    """Open a file and read what is in it, not its tensors.

    Args:
        path: the file.
        section: path of the weights to select, where the file holds several.
        limits: bounds on what the file may ask for.

    Returns:
        The checkpoint, and the open file its bytes lie in; close it when done with both.

    Raises:
        FileAccessError: the file cannot be opened.
        FormatError: its content is not what it claims to be; the path is in the message.
        SectionError: the section is not there.
    """
    file = SourceFile(path)
    try:
        with _collector_paused():
            probe = Probe(file, limits)
            return normalize(detect(probe).read(probe), file, section=section), file
    except FormatError as error:
        file.close()
        raise error.at(path=file.path) from error.__cause__
    except BaseException:
        file.close()
        raise


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Reading makes objects by the million and no cyclic garbage; looking for it takes two fifths of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def format_for(destination: str | os.PathLike[str], name: str | None = None) -> Format:
    """The container to write.

    Args:
        destination: the output file; its ending decides.
        name: overrides the ending: a container's name, or its ending without the dot.

    Raises:
        RewriteError: no container is meant by it; the message lists what can be written.
    """
    writable = [container for container in FORMATS if container.write is not None]
    ending = os.path.splitext(os.fspath(destination))[1].lower()
    for container in writable:
        if name is None and ending in container.suffixes:
            return container
        if name is not None and (name == container.name or "." + name in container.suffixes):
            return container
    endings = ", ".join(suffix for container in writable for suffix in container.suffixes)
    if name is not None:
        raise RewriteError(f"no container {name!r}; one of: {', '.join(c.name for c in writable)}")
    raise RewriteError(f"{os.fspath(destination)}: the ending {ending!r} chooses no container; use {endings}, or --to")
