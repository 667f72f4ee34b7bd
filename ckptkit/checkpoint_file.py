"""An open checkpoint: its contents and the file with its bytes; and saving values from memory."""

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
"""Any pure function from checkpoint to checkpoint: those in `ckptkit.rewrite`, or your own."""

PathLike = str | os.PathLike[str]


_SHOWN = 90
"""Characters of a long path that a ``repr`` shows: its end."""


class CheckpointFile:
    """An open checkpoint: its contents and the file with its bytes.

    Use it as a context manager, or call `close`.  The result of `rewrite` shares the open file.

    It is immutable, and any number of threads may use it at once: read entries, rewrite, save, load.  They share no
    file position, one of them decompresses compressed data, and no values are cached.  It belongs to its process; pass
    the path to other processes.

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
        """The kind of content; see `ckptkit.checkpoint.Kind`."""
        return self.checkpoint.origin.kind

    @property
    def trust(self) -> Trust:
        """How much a loader that executes pickles would have to trust the file."""
        return self.checkpoint.trust

    @property
    def state_dict(self) -> StateDict:
        """The weights: ordered, name to `TensorEntry`."""
        return self.checkpoint.state_dict

    @property
    def sections(self) -> tuple[Section, ...]:
        """The parts of the file that contain tensors."""
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
        """Noteworthy facts about it, most severe first."""
        from ckptkit.diagnose import diagnose

        return diagnose(self.checkpoint)

    def rewrite(self, *rewriters: Rewriter) -> CheckpointFile:
        """The checkpoint with each rewriter applied in turn; nothing on disk changes.

        Raises:
            RewriteError: a rewriter cannot be applied (for example, because names collide).
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
            destination: the output; its extension determines the container.
            to: container name that overrides the extension; ``"dcp"``: the destination is a folder, new or empty, that
                ``torch.distributed.checkpoint.load`` reads.
            ranks: how many ranks share that folder; each has rows of every tensor, in a separate file.
            max_shard_size: bytes per file, as a number or as ``"5GB"``; a larger output becomes shards and an index.
            force: whether an existing file may be replaced.
            check: whether to open the output again and compare every byte before it gets its name, to check the
                source's checksums, and to wait until everything is on disk.
            receipt: whether to record in the metadata what was done; see `ckptkit.conversion`.
            allow_part: whether it may be one part of a checkpoint stored in several files.
            progress: called with the bytes processed so far and the total.

        Returns:
            The plan that was carried out.

        Raises:
            DestinationExistsError: it exists and ``force`` is false.
            FileAccessError: it cannot be written.
            RewriteError: the container cannot store this checkpoint.
            PartError: it is a part of a checkpoint.
            CorruptError: the source is damaged, or changed while it was being read.
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
        """The weights as torch tensors, as if `ckptkit.load_state_dict` had loaded what `save` writes.

        The changes of rewriters apply (casts, names, selections).  No file is written; each storage is read
        once, into torch's memory.

        Args:
            map_location: as in ``torch.load``, but with the CPU as default; ``None`` puts them where
                `ckptkit.MapLocation` says, or otherwise the file.
            mapped: whether tensors use a mapping of the file if its bytes are as torch needs them, which takes no
                memory; the file must not be overwritten then, and checksums are not checked.  Default: only tensors of
                safetensors files.
            allow_part: whether it may be one part of a checkpoint stored in several files.

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
        """Whether tensors stay in the file: by default those of containers without checksums do."""
        return formats.format_named(self.format).tensors_alone if asked is None else asked

    def close(self) -> None:
        """Close the file; entries remain usable, but their bytes cannot be read.  No other thread may be reading."""
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
        """For notebooks, in one screen; ``None``: no more than ``repr`` does."""
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

    A compressed file (gzip, xz, bzip2, zstd) is decompressed into the temporary folder, and an archive of other files
    is opened at the only checkpoint in it; a finding says so.

    Several threads may use the result at once, or each open the same path; see `CheckpointFile`.

    Args:
        path: a file; a member of a zip or tar archive as ``FILE/MEMBER`` or ``FILE!MEMBER``, if no file has that path;
            ``"-"``: standard input.  An open binary file is read from its current position to its end; afterwards its
            position is unchanged, unless it cannot seek.  Bytes, a bytearray and a memoryview are not copied; a
            bytearray cannot be resized until this is closed.  A file that was given open stays open.  A URL
            (``https://``, ``s3://``, ``gs://``, ``az://``, ``hf://user/repo/path`` and everything that fsspec supports)
            is read by range, a few kilobytes until values are needed; anything but http and hf needs the extra
            ``remote``.  A folder that several processes wrote (FSDP, DeepSpeed, Megatron, torch.distributed.checkpoint)
            is one checkpoint; a folder that names its last step means that step, and any other folder the only
            checkpoint in it.
        section: path of the weights to select, if the file has several.
        tag: which of several steps is meant, if ``path`` is a folder with several: ``"checkpoint-10"``.
        tp_rules: a file with the rules for joining slices of tensor-parallel ranks, a JSON object with globs of names
            as keys: ``{"*.wq.weight": 0, "*.wo.weight": 1, "*.norm.weight": "replicated", "*.w13.weight": "swiglu"}``.
            They override the built-in rules, and turn any folder of files whose names differ in one number into one
            checkpoint.
        ignore_checksums: whether to ignore the recorded checksums of its tensors; those of a file that was edited in
            place are stale.
        storage_options: options for the file system of a URL, as in fsspec: ``{"anon": True}``.  No message contains
            them.

    Raises:
        FileAccessError: the file cannot be opened.
        FormatError: it is not a checkpoint, or damaged; or an archive of several, which the message names.
        SectionError: there is no such section.
        MissingDependencyError: no package is installed for zstd compression, or for this kind of URL.
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
    """Open a file that is not a part and whose weights are known; errors say `purpose`."""
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
    """Write values from memory with the guarantees of `CheckpointFile.save`: bytes compared, no half file.

    Torch tensors on any device, numpy arrays, and entries of open checkpoints or parts of them may be mixed.  They are
    written without a second copy, and nobody may write to them in the meantime.  Shared memory is written once, and
    ties are kept.  The same values give the same bytes.  Arrays do not need torch.

    A ``.safetensors`` and shards store named tensors.  A ``.pth`` can also store a tree of dicts, lists, tuples, sets
    and plain values with tensors anywhere, such as ``{"model": model.state_dict(), "epoch": 3}``; arrays become
    tensors.  ``torch.load(path, weights_only=True)`` loads it.  Python attributes and hooks of tensors are not written.

    Args:
        state: tensors by name, or such a tree.  A state_dict keeps its module versions (``_metadata``).
        path: the output; its extension determines the container.
        metadata: strings to set in the output's metadata.
        force: whether an existing file may be replaced.
        check: whether to open the output again and compare every byte before it gets its name.
        max_shard_size: bytes per file, as a number or as ``"5GB"``; a larger output becomes shards and an index.
        to: container name that overrides the extension; ``"dcp"``: as `CheckpointFile.save`.
        ranks: as there.
        tied: what to do with tensors that have several names; see `ckptkit.Tied`.
        progress: called with the bytes processed so far and the total.

    Returns:
        The plan that was carried out.

    Raises:
        RewriteError: the container cannot store it; the message names the values that are not plain tensors or values.
        DestinationExistsError: it exists and ``force`` is false.
        FileAccessError: it cannot be written.
        CorruptError: it was changed in the meantime.
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
