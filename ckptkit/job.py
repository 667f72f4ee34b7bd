"""One output: planned, then carried out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from ckptkit import formats
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.compare import check_output
from ckptkit.errors import DestinationExistsError
from ckptkit.formats.sharded import shard_names
from ckptkit.plan import Plan
from ckptkit.receipt import Tokens, with_digests, with_receipt
from ckptkit.report import parse_size
from ckptkit.transfer import Tally, write_atomically
from ckptkit.version import __version__

__all__ = ["Job", "Progress"]

Progress = Callable[[int, int], object]
"""Called with the bytes dealt with so far, and those to deal with in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A checkpoint and the plan that writes it.

    Attributes:
        checkpoint: what is written, its metadata included.
        asked: the destination that was asked for.
        path: the file that is written: of shards, their index.
        plan: how.
    """

    checkpoint: Checkpoint
    asked: str
    path: str
    plan: Plan

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        file: SourceFile,
        destination: str | os.PathLike[str],
        *,
        to: str | None,
        max_shard_size: int | str | None,
        receipt: bool,
        hashed: bool,
    ) -> Job:
        """Plan an output.

        Args:
            checkpoint: what is to be written.
            file: the source its bytes lie in.
            destination: the output.
            to: container name that overrides its ending.
            max_shard_size: the most bytes of a file, as a number or as ``"5GB"``; ``None``: one file.
            receipt: whether the metadata tell how it was made.
            hashed: whether with the SHA-256 of the source.

        Raises:
            RewriteError: the container cannot hold the checkpoint.
        """
        size = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
        tokens = Tokens()
        if receipt:
            checkpoint = with_receipt(checkpoint, file, __version__, tokens if hashed else None)
        path, plan = formats.plan(checkpoint, destination, to=to, shard_nbytes=size)
        plan = with_digests(plan, tokens) if tokens.files else plan
        return cls(checkpoint=checkpoint, asked=os.fspath(destination), path=path, plan=plan)

    def carry_out(self, *, force: bool, check: bool, progress: Progress | None) -> Tally:
        """Write it; see `ckptkit.transfer.write_atomically`."""
        if not force and os.path.lexists(self.asked):
            raise DestinationExistsError(f"{self.asked}: exists already; --force overwrites it")
        return write_atomically(
            self.path,
            self.plan,
            force=force,
            check=(lambda path, compared: check_output(self.checkpoint, path, compared)) if check else None,
            replaces=self._stale() if self.plan.index is not None else (),
            progress=progress,
        )

    def _stale(self) -> tuple[str, ...]:
        """What an earlier output of this name left beside it: the shards of its index, or the one file."""
        stem, ending = os.path.splitext(os.path.basename(self.path).removesuffix(".index.json"))
        customary = re.compile(re.escape(stem) + r"-[0-9]{5}-of-[0-9]{5}" + re.escape(ending) + r"\Z")
        old = shard_names(self.path) if os.path.isfile(self.path) else frozenset()
        shards = {name for name in old if customary.match(name)} - self.plan.shards.keys()
        return (*sorted(shards), stem + ending)
