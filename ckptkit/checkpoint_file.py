"""An open checkpoint: what is in it, and the file its bytes lie in; and a file of what is in memory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from ckptkit import formats
from ckptkit.bytesource import Readable, Source
from ckptkit.checkpoint import Checkpoint, Kind, Section, StateDict, Trust
from ckptkit.errors import CkptkitError
from ckptkit.normalize.parts import require_whole
from ckptkit.normalize.selection import require_state_dict
from ckptkit.options.storage import in_session
from ckptkit.report import Finding, count_of, human_size

if TYPE_CHECKING:
    from collections import OrderedDict

    from typing_extensions import Unpack

    from ckptkit.options import ConvertKeywords
    from ckptkit.plan import Plan
    from ckptkit.rewrite.storages import TiedPolicy
    from ckptkit.transfer.memory import Storages
    from ckptkit.transfer.workers import Progress

__all__ = ["CheckpointFile", "PathLike", "Rewriter", "open", "save", "weights_of"]

Rewriter = Callable[[Checkpoint], Checkpoint]
"""Any pure function from checkpoint to checkpoint; those in `ckptkit.rewrite`, or your own."""

PathLike = str | os.PathLike[str]


_SHOWN = 90
"""Characters of a long path that a ``repr`` shows: its end."""


class CheckpointFile:
    """An open checkpoint: what is in it, and the file its bytes lie in.

    Use it as a context manager, or call `close`.  What `rewrite` returns shares the open file.

    It does not change, and any number of threads may use one at once: read entries, rewrite, save, load.  Nothing is
    read by a position that they would share, what is compressed is inflated by one of them, and no values are kept.
    It belongs to its process: to another, hand the path.

    Attributes:
        checkpoint: the common representation that rewriters work on.
    """

    def __init__(self, checkpoint: Checkpoint, file: Source) -> None:
        self.checkpoint = checkpoint
        self._file = file

    @property
    def path(self) -> str:
        """The file."""
        return self.checkpoint.origin.path

    @property
    def format(self) -> str:
        """Container: ``"torch-zip"``, ``"safetensors"``."""
        return self.checkpoint.origin.format

    @property
    def kind(self) -> Kind:
        """What the file holds; see `ckptkit.checkpoint.Kind`."""
        return self.checkpoint.origin.kind

    @property
    def trust(self) -> Trust:
        """What a loader that executes pickles would have to be trusted with."""
        return self.checkpoint.trust

    @property
    def state_dict(self) -> StateDict:
        """The weights: ordered, name to `TensorEntry`."""
        return self.checkpoint.state_dict

    @property
    def sections(self) -> tuple[Section, ...]:
        """The parts of the file that hold tensors."""
        return self.checkpoint.sections

    @property
    def rest(self) -> object:
        """Everything beside the weights, as an inert tree."""
        return self.checkpoint.rest

    @property
    def metadata(self) -> Mapping[str, str]:
        """The container's own string metadata."""
        return self.checkpoint.metadata

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is remarkable about it, gravest first."""
        from ckptkit.diagnose import diagnose

        return diagnose(self.checkpoint)

    def rewrite(self, *rewriters: Rewriter) -> CheckpointFile:
        """The checkpoint with each rewriter applied in turn; nothing on disk changes.

        Raises:
            RewriteError: a rewriter cannot be applied (colliding names, say).
        """
        return CheckpointFile(self.checkpoint.rewrite(*rewriters), self._file)

    def plan(
        self,
        destination: PathLike,
        *,
        to: str | None = None,
        ranks: int | None = None,
        max_shard_size: int | str | None = None,
    ) -> Plan:
        """What `save` would do, without doing it."""
        return self._converted(
            destination, to=to, ranks=ranks, max_shard_size=max_shard_size, allow_part=True, receipt=False, dry_run=True
        )

    def save(
        self,
        destination: PathLike,
        *,
        to: str | None = None,
        ranks: int | None = None,
        max_shard_size: int | str | None = None,
        force: bool = False,
        check: bool = True,
        receipt: bool = True,
        allow_part: bool = False,
        progress: Progress | None = None,
    ) -> Plan:
        """Write it; the destination is either what it was before or the complete new file.

        Args:
            destination: the output; its ending chooses the container.
            to: container name that overrides the ending; ``"dcp"``: the destination is a folder, new or empty, that
                ``torch.distributed.checkpoint.load`` reads.
            ranks: how many share that folder; each has rows of every tensor, in a file of its own.
            max_shard_size: bytes of a file, as a number or as ``"5GB"``; what has more becomes shards and an index.
            force: whether an existing file may be replaced.
            check: whether to open the output again and compare every byte before it gets its name, and to hold
                the source's checksums against its bytes; and to wait until all is on disk.
            receipt: whether to record in the metadata what was done; see `ckptkit.conversion`.
            allow_part: whether it may be a part of a checkpoint that lies in several files.
            progress: called with the bytes dealt with so far, and those to deal with in all.

        Returns:
            The plan that was carried out.

        Raises:
            DestinationExistsError: it exists and ``force`` is false.
            FileAccessError: it cannot be written.
            RewriteError: the container cannot hold this checkpoint.
            PartError: it is a part of a checkpoint.
            CorruptError: the source is damaged, or changed while it was read.
        """
        return self._converted(
            destination,
            to=to,
            ranks=ranks,
            max_shard_size=max_shard_size,
            force=force,
            check=check,
            receipt=receipt,
            allow_part=allow_part,
            progress=progress,
        )

    def _converted(self, destination: PathLike, **options: Unpack[ConvertKeywords]) -> Plan:
        from ckptkit.conversion import run  # reading alone starts faster without the writing half
        from ckptkit.options import ConvertOptions

        return run(self.checkpoint, self._file, destination, ConvertOptions(**options), rewrite=False).job.plan

    def load(
        self, *, map_location: Any = "cpu", mapped: bool | None = None, allow_part: bool = False
    ) -> OrderedDict[str, Any]:
        """The weights as torch's tensors, as `ckptkit.load_state_dict` gives what `save` writes; no file is made.

        What rewriters cast, renamed or left out is so here; each storage is read once, into memory that torch has.

        Args:
            map_location: as in ``torch.load``, but that they lie on the CPU by default; ``None`` puts them where
                `ckptkit.MapLocation` says, or else the file.
            mapped: whether tensors lie in the file where its bytes are as torch wants them, which takes no memory; the
                file must not be overwritten then, and checksums are not held.  Default: those of safetensors files do.
            allow_part: whether it may be a part of a checkpoint that lies in several files.

        Returns:
            Name to value, with the module versions as ``_metadata``.

        Raises:
            As `ckptkit.load_state_dict`.
        """
        from ckptkit.extras import require_torch

        require_whole(self.checkpoint, allow_part=allow_part)
        require_state_dict(self.checkpoint, "to load")
        require_torch()
        from ckptkit.torch_bridge import state_dict_of

        held = not mapped and "--ignore-checksums" not in self.checkpoint.origin.options
        formats.require_sound(self._file, self.checkpoint, held=held)
        state = state_dict_of(
            self.state_dict, self.path, map_location=map_location, mapped=self._is_mapped(mapped), checksums=not mapped
        )
        if self.checkpoint.module is not None:  # as Module.state_dict() gives them
            for name, value in state.items():
                state[name] = value.detach() if hasattr(value, "detach") else value
        return state

    def _is_mapped(self, asked: bool | None) -> bool:
        """Whether tensors are to lie in the file: where that is not said, those of containers without checksums do."""
        return formats.format_named(self.format).tensors_alone if asked is None else asked

    def close(self) -> None:
        """Close the file; entries stay readable as records, their bytes do not.  No other thread may be reading."""
        self._file.close()

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.path}: an open checkpoint cannot be copied or pickled; open it where it is needed")

    def __repr__(self) -> str:
        origin, count = self.checkpoint.origin, count_of(len(self.state_dict), "tensor")
        path = self.path if len(self.path) <= _SHOWN else f"…{self.path[-_SHOWN:]}"
        return f"<{self.format} {self.kind} {path!r:.120}, {human_size(origin.size)}, {count}>"

    def _repr_html_(self) -> str | None:
        """What a notebook shows of it, in one screen; ``None``: no more than ``repr`` does."""
        from ckptkit.inspection import html_screen

        try:
            return html_screen(self.checkpoint)
        except CkptkitError:  # of names that are more, or longer, than those of any checkpoint
            return None


@in_session
def open(  # noqa: A001 - the name users expect
    path: Readable,
    *,
    section: str | None = None,
    tag: str | None = None,
    tp_rules: str | os.PathLike[str] | None = None,
    ignore_checksums: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> CheckpointFile:
    """Open a checkpoint without executing or loading it.

    A file that is compressed (gzip, xz, bzip2, zstd) is decompressed into the temporary folder, and of an archive of
    other files the one checkpoint in it is opened; a finding says so.

    Several threads may use what it gives at once, and open one path each for themselves; see `CheckpointFile`.

    Args:
        path: a file; a member of a zip or tar archive as ``FILE/MEMBER`` or ``FILE!MEMBER``, where no file has that
            path; ``"-"``: standard input.  An open binary file is read from its present position to its end; its
            position is then what it was, but for one that cannot seek, which is read to its end.  Bytes, a bytearray
            and a memoryview are not copied; a bytearray cannot be resized until this is closed.  What was given open
            stays open.
            A URL (``https://``, ``s3://``, ``gs://``, ``az://``, ``hf://user/repo/path`` and all that fsspec knows) is
            read by range, a few kilobytes until values are asked for; what is not http or hf needs the extra
            ``remote``.
            A folder that several processes wrote (FSDP, DeepSpeed, Megatron, torch.distributed.checkpoint) is one
            checkpoint; one that names its last step stands for that, and any other for the one checkpoint in it.
        section: path of the weights to select, where the file holds several.
        tag: which of several steps is meant, where ``path`` is a folder that holds such: ``"checkpoint-10"``.
        tp_rules: a file of rules by which slices of tensor-parallel ranks are joined, a JSON object of globs of names:
            ``{"*.wq.weight": 0, "*.wo.weight": 1, "*.norm.weight": "replicated", "*.w13.weight": "swiglu"}``.  They go
            before those that are known, and make one checkpoint of any folder of files that differ in one number.
        ignore_checksums: whether to forget the recorded checksums of its tensors, so that nothing holds them: those of
            a file that was edited in place are stale.
        storage_options: what the file system of a URL is made with, as fsspec takes it: ``{"anon": True}``.  No
            message has them.

    Raises:
        FileAccessError: the file cannot be opened.
        FormatError: it is not a checkpoint, or damaged; or an archive of several, which the message names.
        SectionError: there is no such section.
        MissingDependencyError: it is compressed by zstd, and nothing that decompresses it is installed; or what reads
            URLs of its kind is not.
    """
    return CheckpointFile(
        *formats.read(path, section=section, tag=tag, tp_rules=tp_rules, ignore_checksums=ignore_checksums)
    )


@contextlib.contextmanager
def weights_of(
    path: Readable,
    purpose: str,
    *,
    section: str | None,
    tag: str | None = None,
    tp_rules: PathLike | None = None,
    allow_part: bool,
    ignore_checksums: bool,
) -> Iterator[CheckpointFile]:
    """A file that is whole and whose weights are known; `purpose` is what for, as errors say it."""
    with open(path, section=section, tag=tag, tp_rules=tp_rules, ignore_checksums=ignore_checksums) as file:
        require_whole(file.checkpoint, allow_part=allow_part)
        require_state_dict(file.checkpoint, purpose)
        formats.require_sound(file._file, file.checkpoint, held=not ignore_checksums)
        yield file


def save(
    state: object,
    path: PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    check: bool = True,
    max_shard_size: int | str | None = None,
    to: str | None = None,
    ranks: int | None = None,
    tied: TiedPolicy = "alias",
    progress: Progress | None = None,
) -> Plan:
    """Write what is in memory, as `CheckpointFile.save` writes: the old file or the complete new one, and compared.

    Tensors of torch, on any device, arrays of numpy, and entries of open checkpoints or parts of such may be mixed.
    They are written from where they lie: no second copy of them is made, and nobody may write to them meanwhile.  What
    shares memory is written once, and what is tied stays so.  The same values give the same bytes.  torch is not
    imported for arrays.

    A ``.safetensors`` and shards hold tensors under names.  A ``.pth`` holds also a tree of dicts, lists, tuples, sets
    and plain values with tensors anywhere, such as ``{"model": model.state_dict(), "epoch": 3}``, as it stands;
    arrays become tensors.  ``torch.load(path, weights_only=True)`` loads it.  Python attributes and hooks of tensors
    are not written.

    Args:
        state: tensors by name, or such a tree.  A state_dict keeps its module versions (``_metadata``).
        path: the output; its ending chooses the container.
        metadata: strings to set in the output's metadata.
        force: whether an existing file may be replaced.
        check: whether to open the output again and compare every byte before it gets its name.
        max_shard_size: bytes of a file, as a number or as ``"5GB"``; what has more becomes shards and an index.
        to: container name that overrides the ending; ``"dcp"``: as `CheckpointFile.save`.
        ranks: as there.
        tied: what becomes of tensors with several names; see `ckptkit.Tied`.
        progress: called with the bytes dealt with so far, and those to deal with in all.

    Returns:
        The plan that was carried out.

    Raises:
        RewriteError: the container cannot hold it; the message names what is not a plain tensor or value.
        DestinationExistsError: it exists and ``force`` is false.
        FileAccessError: it cannot be written.
        CorruptError: it was written to meanwhile.
    """
    from ckptkit.conversion import run
    from ckptkit.options import ConvertOptions
    from ckptkit.transfer.memory import Memory, checkpoint_of

    options = ConvertOptions(
        metadata=metadata, force=force, check=check, max_shard_size=max_shard_size, to=to, ranks=ranks, tied=tied,
        progress=progress, receipt=False,
    )  # fmt: skip
    _, container, most = formats.target(path, to)
    shards = most is not None or max_shard_size is not None
    memory = Memory("<memory>")
    alone = f"a {container.name} file" if container.tensors_alone else "a sharded checkpoint" if shards else None
    with formats.collector_paused():
        checkpoint = checkpoint_of(state, memory, _torch_node, container.name, alone=alone)
        return run(checkpoint, memory, path, options).job.plan


def _torch_node(value: object, storages: Storages) -> object:
    """The node of what is torch's; ``None`` of anything else."""
    if "torch" not in sys.modules:  # whoever has a tensor has imported it
        return None
    from ckptkit.torch_bridge.handles import node_of

    return node_of(value, storages)
