"""Which container a file is: by its content, once, and for exactly one of them."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.errors import AmbiguousError
from ckptkit.formats.archives.zip_archive import LOCAL_SIGNATURE, ends_like_a_zip
from ckptkit.formats.format import Format, Probe

__all__ = ["identify"]


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
    if not probe.head.startswith(LOCAL_SIGNATURE) and ends_like_a_zip(probe.file.whole):
        names.append("a zip archive by its end")
    if len(names) > 1:
        raise AmbiguousError(f"the file is {' and '.join(names)} at once; readers would disagree about it")
    return claims[0]
