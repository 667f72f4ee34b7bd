"""What is done with one checkpoint, or with two: inspect, load, convert, diff, verify."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ckptkit.arguments import documented, several
from ckptkit.bytesource import Readable
from ckptkit.checkpoint_file import (
    CheckpointFile,
    PathLike,
    open,  # noqa: A004 - the name users expect
    weights_of,
)
from ckptkit.errors import CorruptError, FileAccessError, RewriteError
from ckptkit.formats import require_sound
from ckptkit.normalize.parts import require_whole
from ckptkit.normalize.selection import require_state_dict
from ckptkit.options import ConvertOptions, DiffOptions, LoadOptions, VerifyOptions
from ckptkit.options.storage import in_session
from ckptkit.report import Report

if TYPE_CHECKING:
    from collections import OrderedDict

    from typing_extensions import Unpack

    from ckptkit.differences import Difference
    from ckptkit.documents import ConvertDocument, VerifyDocument
    from ckptkit.inspection.document import InspectedFile
    from ckptkit.options import ConvertKeywords, DiffKeywords, LoadKeywords, VerifyKeywords
    from ckptkit.rewrite import Like

__all__ = ["convert", "diff", "inspect", "load", "load_state_dict", "verify"]


@in_session
def inspect(
    path: Readable,
    *,
    section: str | None = None,
    tag: str | None = None,
    tp_rules: PathLike | None = None,
    filters: str | Sequence[str] = (),
    sort: str = "file",
    stats: bool = False,
    ignore_checksums: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> InspectedFile:
    """What is in a file: one element of the ``files`` of ``ckptkit inspect --json``.

    Args:
        path: the file, or what else can be read; see `open`.
        section: path of the weights to select.
        tag: which of several steps, where ``path`` is a training folder; see `open`.
        tp_rules: file of rules by which slices of tensor-parallel ranks are joined; see `open`.
        filters: glob patterns of tensor names to list; none lists all.
        sort: ``"file"``, ``"name"`` or ``"size"``.
        stats: whether to read the data and add statistics of each tensor listed; a damaged one is a finding.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.
        storage_options: what the file systems of URLs are made with; see `open`.

    Raises:
        As `open`.
    """
    from ckptkit.inspection import describe

    if sort not in ("file", "name", "size"):
        raise RewriteError(f"sort is {sort!r:.40}; expected 'file', 'name' or 'size'")
    with open(path, section=section, tag=tag, tp_rules=tp_rules, ignore_checksums=ignore_checksums) as file:
        return describe(file.checkpoint, filters=several(filters), sort=sort, stats=stats)


@in_session
@documented(LoadOptions)
def load_state_dict(f: Readable, **options: Unpack[LoadKeywords]) -> OrderedDict[str, Any]:
    """The weights, from any container, without executing the file: every value of the state_dict.

    Tensors of every layout (quantized, sparse, nested, on meta), arrays of numpy's and plain values are what
    ``torch.load`` gives; of a tensor of a class with bytes of its own the plain tensor is given, and in a file without
    any tensor of torch's arrays under names are the weights, as tensors.  Indices, offsets, axes and sizes are checked
    first, which torch does not do.

    What is selected, renamed or cast is what `convert` would write.  A ``.pth`` is copied, and the checksums that it
    recorded are held; a ``.safetensors`` is mapped.  To a CUDA device bytes go from the file in pieces.

    Args:
        f: the file, or what else can be read; see `open`.
        **options: those of `ckptkit.options.LoadOptions`.

    Returns:
        Name to value, in file order, with the module versions that the file has as ``_metadata``, as
        ``Module.load_state_dict`` looks for them.  Tied tensors share memory.  From a whole model they are plain
        tensors, as ``Module.state_dict()`` gives them.

    Raises:
        MissingDependencyError: torch is not installed.
        SectionError: the file holds no state_dict, or several.
        UnsupportedError: values that only the code they come from can make (objects, DTensor and other wrappers);
            the message names each.
        RewriteError: options do not go together, or cannot be applied; this machine lacks the device.
        DTypeError: the installed torch lacks a dtype, or it cannot be cast.
        CorruptError: a tensor's bytes are not those its checksum was recorded for, or what it consists of does not
            fit together.
        PartError: it is a part of a checkpoint.
        FormatError, FileAccessError: as `open`.
    """
    from ckptkit.extras import require_torch

    asked = LoadOptions(**options)
    require_torch()
    with open(f, **_reading(asked)) as file:
        require_whole(file.checkpoint, allow_part=asked.allow_part)
        if not asked.all_tensors:
            require_state_dict(file.checkpoint, "to load")
        if asked.conversion is not None:
            from ckptkit.conversion.options import Conversion

            file = CheckpointFile(Conversion(file.checkpoint, asked.conversion).result, file._file)
        return file.load(map_location=asked.map_location, mapped=asked.mapped, allow_part=True)


@in_session
def load(
    f: Readable,
    *,
    map_location: Any = "cpu",
    section: str | None = None,
    tag: str | None = None,
    tp_rules: PathLike | None = None,
    mapped: bool | None = None,
    allow_part: bool = False,
    ignore_checksums: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """All that a file holds, as ``torch.load`` gives it, without executing the file.

    Dicts, lists, tuples, sets, tensors of every layout, parameters, arrays and numbers of numpy's, and plain values of
    Python's are what they are; what is one object in the file is one.  An optimizer's and a scheduler's
    ``load_state_dict`` take their parts.  For what only code from elsewhere could make (a model, a ``Namespace``, a
    function) stands a `Foreign`, which shows its name and its attributes.  Of a tensor of a class of its own the plain
    tensor is given, a ``defaultdict`` with a foreign function has none, and a path looks at no disk.

    Args:
        f: the file.
        map_location: where tensors go, as in ``torch.load``; ``None``: where the file says that they lay.
        section: the keys that lead to the part to load, joined with dots: ``"optimizer"``, ``"args"``; default: all.
        tag: which of several steps, where ``f`` is a training folder; see `open`.
        tp_rules: file of rules by which slices of tensor-parallel ranks are joined; see `open`.
        mapped: whether tensors on the CPU lie in a mapping of the file; see `load_state_dict`.
        allow_part: whether the file may be a part of a checkpoint that lies in several.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.
        storage_options: what the file systems of URLs are made with; see `open`.

    Returns:
        What was saved; of a program and of a safetensors file a dict of its tensors.

    Raises:
        MissingDependencyError: torch is not installed.
        SectionError: no such keys are in the file.
        UnsupportedError: values nested more than 100 deep, or that this torch does not make.
        CorruptError: a value that does not fit together, or bytes that are not those their checksum was recorded for.
        RewriteError: this machine lacks a device.
        DTypeError: the installed torch lacks a dtype.
        PartError: it is a part of a checkpoint.
        FormatError, FileAccessError: as `open`.
    """
    from ckptkit.extras import require_torch

    require_torch()
    from ckptkit.torch_bridge import tree_of

    with open(f, tag=tag, tp_rules=tp_rules, ignore_checksums=ignore_checksums) as file:
        require_whole(file.checkpoint, allow_part=allow_part)
        require_sound(file._file, file.checkpoint, held=not mapped and not ignore_checksums)
        return tree_of(
            file.checkpoint,
            section=section,
            map_location=map_location,
            mapped=file._is_mapped(mapped),
            checksums=mapped is not True,
        )


@in_session
@documented(ConvertOptions)
def convert(
    source: Readable | Sequence[PathLike], destination: PathLike | None = None, **options: Unpack[ConvertKeywords]
) -> Report[ConvertDocument]:
    """Rewrite a checkpoint into another file, or each one below a folder into another folder; or a file in place.

    A ``.pth`` keeps everything that is in the source; what a safetensors file or shards cannot hold is an
    error unless it is named to be left out.

    Args:
        source: any readable checkpoint (see `open`), or a folder; or a list of paths, of which each is converted into
            the destination, a folder.  With ``in_place`` a path, or a list of paths.
        destination: the output; its ending chooses the container.  A folder, which is there or has a slash at its end:
            the output is put into it and named after the source, with the ending of ``to`` where that is given.  With
            ``to="dcp"`` it is the folder that is written, which must be new or empty.  Of a source folder each
            checkpoint goes to the same place below it; the folder is made where it is not there.  ``None``: with
            ``in_place``.
        **options: those of `ckptkit.options.ConvertOptions`.

    Returns:
        A report whose ``details`` hold the plan and what was changed.  Of a folder, and of a list, they
        hold those of each file, under ``files`` (`ckptkit.ConvertFolderDocument`), and a file that cannot be converted
        is a finding of severity ``"error"``; the others are converted.  In place they hold the path of the ``backup``.

    Raises:
        As `open` and `CheckpointFile.save`; SectionError where weights are needed and none is selected; PartError;
        RewriteError where the weights are not those of ``like``, or several files of a folder would get one name;
        VerifyError where ``like`` names no model.
    """
    from ckptkit.conversion import (
        convert_file,
        outputs,
        replace_file,
        run,
    )  # reading alone starts faster without the writing half

    asked = ConvertOptions(**options)
    if destination is not None:
        outputs.require_file_name(destination)
    if asked.like is not None:
        asked = asked.but(like=_like(asked.like, asked.model_args))
    if asked.in_place:
        if destination is not None:
            raise RewriteError(f"{os.fsdecode(destination)}: with --in-place there is no destination")
        from ckptkit.conversion.in_place import convert_in_place

        return convert_in_place(source, asked, replace_file)
    if destination is None:
        raise TypeError("convert() missing 1 required positional argument: 'destination'")
    if isinstance(source, (list, tuple)):
        from ckptkit.conversion.folder import convert_files

        return convert_files([os.fsdecode(path) for path in source], os.fsdecode(destination), asked, convert_file)
    source = cast("Readable", source)
    if outputs.is_folder_of_files(source, destination, asked):
        from ckptkit.conversion.folder import convert_folder

        return convert_folder(os.fsdecode(source), os.fsdecode(destination), asked, convert_file)
    try:
        opened = open(source, **_reading(asked))
    except FileAccessError as error:
        raise outputs.told(error, source, destination, asked) from error.__cause__
    with opened as file, outputs.destination_of(outputs.named_after(file.path, asked), destination, asked) as path:
        given = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else None
        return run(file.checkpoint, file._file, path, asked, given=given).report()


def _reading(asked: ConvertOptions | LoadOptions | VerifyOptions) -> dict[str, Any]:
    """How `open` is to read what a command is given."""
    return {name: getattr(asked, name) for name in ("section", "tag", "tp_rules", "ignore_checksums")}


def _like(like: Any, args: Mapping[str, Any]) -> Like:
    """The model that a conversion is to be like."""
    from ckptkit.conversion.options import like_checkpoint
    from ckptkit.rewrite import Like

    if isinstance(like, Like):
        return like
    path = os.fsdecode(like) if isinstance(like, (str, bytes, os.PathLike)) else None
    if path is None or (not os.path.lexists(path) and ":" in path and "://" not in path):
        from ckptkit.extras import require_torch

        require_torch()
        from ckptkit.verifier.measure import like_reference

        return like_reference(path or like, args)
    if args:
        raise RewriteError(f"--like {path}: is a checkpoint, so --model-arg does not apply")
    return like_checkpoint(path)


@in_session
@documented(DiffOptions)
def diff(a: Readable, b: Readable, **options: Unpack[DiffKeywords]) -> Difference:
    """What changed from one checkpoint to another, whatever their containers.

    Args:
        a: the file that is compared; see `open`.
        b: the file that it is compared with.
        **options: those of `ckptkit.options.DiffOptions`.

    Returns:
        The difference; ``equal`` is about the tensors.

    Raises:
        SectionError: it is not clear which weights are meant, or neither file holds a tensor.
        KeyCollisionError: without wrapper prefixes two names would become one.
        VerifyError: a tolerance is NaN, negative or infinite.
        FormatError, FileAccessError: as `open`.
    """
    from ckptkit.differences import Tolerance, differ
    from ckptkit.rewrite import StripModule

    asked = DiffOptions(**options)
    chosen = asked.section_a or asked.section, asked.section_b or asked.section
    reading = partial(open, ignore_checksums=asked.ignore_checksums)
    tolerance = None if asked.atol is None and asked.rtol is None else Tolerance(asked.atol or 0.0, asked.rtol or 0.0)
    (tag_a, rules_a), (tag_b, rules_b) = asked.steps(a, b)
    with (
        reading(a, section=chosen[0], tag=tag_a, tp_rules=rules_a) as ours,
        reading(b, section=chosen[1], tag=tag_b, tp_rules=rules_b) as theirs,
    ):
        for file in (ours, theirs):
            require_sound(file._file, file.checkpoint, held=not asked.ignore_checksums)
        rewriters = (StripModule(),) if asked.strip_module else ()
        difference = differ(
            ours.rewrite(*rewriters).checkpoint,
            theirs.rewrite(*rewriters).checkpoint,
            beside=chosen == (None, None),
            tolerance=tolerance,
            strict=asked.strict,
            allow_part=asked.allow_part,
            progress=asked.progress,
        )
        for file in (ours, theirs):
            if file._file.changed():
                raise CorruptError("the file was changed while it was being read", path=file.path)
        return difference


@in_session
@documented(VerifyOptions)
def verify(path: Readable, **options: Unpack[VerifyKeywords]) -> Report[VerifyDocument]:
    """Load into a reference model, strictly, and examine what it computes.

    Args:
        path: the checkpoint; see `open`.  It is read by ckptkit, never executed (but see ``unsafe_load``).
        **options: those of `ckptkit.options.VerifyOptions`.

    Raises:
        MissingDependencyError: torch, or the package of the reference, is not installed.
        VerifyError: the check could not be run (unknown reference, missing device, no input shape).
        DestinationExistsError: ``write_golden`` exists and ``force`` is false.
        SectionError, FormatError, FileAccessError: as `open`.
    """
    from ckptkit.extras import require_torch
    from ckptkit.rewrite import StripModule

    asked = VerifyOptions(**options)
    section = asked.section
    with contextlib.ExitStack() as stack:
        weights = partial(weights_of, allow_part=asked.allow_part, ignore_checksums=asked.ignore_checksums)
        file = stack.enter_context(weights(path, "to verify", section=section, tag=asked.tag, tp_rules=asked.tp_rules))
        other = None
        if asked.against is not None:
            with open(asked.against, ignore_checksums=asked.ignore_checksums) as opened:
                named = section if any(each.path == section for each in opened.sections) else None
            other = stack.enter_context(weights(asked.against, "to compare with", section=named))
        # Only now: importing torch takes seconds, and what cannot be read is told at once.
        require_torch()
        from ckptkit.verifier import verify as run

        subject = file.rewrite(StripModule()) if asked.strip_module else file
        against = None if other is None else other.checkpoint
        return run(subject.checkpoint, asked, file=file._file, against=against)
