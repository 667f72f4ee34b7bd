"""What an output says about its making: the source's SHA-256, the operations, the ckptkit version.

A receipt stands in the string metadata (`ckptkit.normalize.receipts`): JSON, a list that begins with those the source
had, so that the last element is about this file::

    [{"ckptkit": "0.1.0", "format": "torch-zip", "sha256": "9f86d0…", "operations": ["StripModule()"]}]

``sha256`` is of the source's bytes; of a sharded source it is an object: the SHA-256 of the index and of each
shard, by name.  Nothing in a receipt depends on time, place or machine.

The digests are computed while the bytes are moved, and so after the metadata is laid out.  Until then
unguessable tokens of the same length stand in their place.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.normalize.receipts import KEY, earlier
from ckptkit.plan import Checksum, Digest, Literal, Plan, Step

__all__ = ["Tokens", "with_digests", "with_receipt"]

_DIGITS = 64
"""Characters of a SHA-256 in hexadecimal."""


class Tokens:
    """Stand-ins for digests that are not known yet."""

    def __init__(self) -> None:
        self.prefix = os.urandom(_DIGITS // 4).hex()
        self.files: dict[str, SourceFile] = {}

    def of(self, file: SourceFile) -> str:
        """The stand-in for the digest of a file."""
        token = f"{self.prefix}{len(self.files):0{_DIGITS // 2}x}"
        self.files[token] = file
        return token


def with_receipt(checkpoint: Checkpoint, file: SourceFile, version: str, tokens: Tokens | None) -> Checkpoint:
    """The checkpoint with a receipt in its metadata.

    Args:
        checkpoint: as rewritten.
        file: the source.
        version: of ckptkit.
        tokens: gives stand-ins for the source's digests; ``None``: the receipt holds none.
    """
    receipt: dict[str, object] = {"ckptkit": version, "format": checkpoint.origin.format}
    if tokens is not None:
        folder = os.path.dirname(file.path)
        shards = {os.path.relpath(part.path, folder).replace(os.sep, "/"): part for part in file.parts}
        named = {os.path.basename(file.path): file, **shards}
        receipt["sha256"] = (
            {name: tokens.of(part) for name, part in sorted(named.items())} if shards else tokens.of(file)
        )
    receipt["operations"] = list(checkpoint.operations)
    text = json.dumps([*earlier(checkpoint.metadata), receipt])  # ASCII: half a surrogate pair may stand in them
    return checkpoint.replace(metadata={**checkpoint.metadata, KEY: text})


def with_digests(plan: Plan, tokens: Tokens) -> Plan:
    """The plan with a step for every stand-in in what it writes."""
    prefix = tokens.prefix.encode()
    found: list[Step] = []
    for step in plan.steps:
        at = step.data.find(prefix) if isinstance(step, Literal) else -1
        while isinstance(step, Literal) and at >= 0:
            file = tokens.files[step.data[at : at + _DIGITS].decode()]
            found.append(Digest(step.target + at, file))
            at = step.data.find(prefix, at + _DIGITS)
    others = [step for step in plan.steps if not isinstance(step, Checksum)]
    checksums = [step for step in plan.steps if isinstance(step, Checksum)]
    return replace(
        plan,
        steps=(*others, *found, *checksums),
        shards={name: with_digests(shard, tokens) for name, shard in plan.shards.items()},
    )
