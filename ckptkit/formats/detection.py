"""Which container a file is: by its content, once, and for exactly one of them."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.errors import AmbiguousError
from ckptkit.formats.archives.zip_archive import CENTRAL_SIGNATURE, LOCAL_SIGNATURE
from ckptkit.formats.archives.zip_end import END, LOCATOR, MAX16
from ckptkit.formats.format import Format, Probe

__all__ = ["ends_like_a_zip", "identify"]


def identify(probe: Probe, containers: Sequence[Format]) -> Format:
    """The one of the containers that claims the file.

    Raises:
        UnknownFormatError: none does; the message says what the file is instead and what helps.
        AmbiguousError: more than one does: torch looks at the first bytes, unzip at the last ones.
    """
    claims = [container for container in containers if container.claims(probe)]
    if not claims:
        from ckptkit.formats.refused.first_bytes import unknown  # only here, as many patterns take a moment to compile

        raise unknown(probe)
    names = [container.name for container in claims]
    if not probe.head.startswith(LOCAL_SIGNATURE) and ends_like_a_zip(probe):
        names.append("a zip archive by its end")
    if len(names) > 1:
        raise AmbiguousError(f"the file is {' and '.join(names)} at once; readers would disagree about it")
    return claims[0]


def ends_like_a_zip(probe: Probe) -> bool:
    """Whether the last bytes are a zip archive's end record with a directory or a locator before it."""
    size = probe.file.size
    start = max(0, size - END.size - MAX16)
    tail = probe.file.read(start, size - start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        return False
    _, _, _, _, count, nbytes, _, comment_nbytes = END.unpack_from(tail, at)
    if not count or at + END.size + comment_nbytes != len(tail):
        return False
    if tail[max(0, at - LOCATOR.size) :].startswith(b"PK\x06\x07"):
        return True
    directory = start + at - nbytes
    return directory >= 0 and probe.file.read(directory, 4) == CENTRAL_SIGNATURE
