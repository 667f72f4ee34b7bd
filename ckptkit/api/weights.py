"""Functions for one checkpoint or two: inspect, load, convert, diff, verify."""

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
    """Describe a file: one element of the ``files`` of ``ckptkit inspect --json``.

    Args:
        path: the file, or anything else that can be read; see `open`.
        section: path of the weights to select.
        tag: which of several steps, if ``path`` is a training folder; see `open`.
        tp_rules: file with the rules for joining slices of tensor-parallel ranks; see `open`.
        filters: glob patterns of tensor names to list; none lists all.
        sort: ``"file"``, ``"name"`` or ``"size"``.
        stats: whether to read the data and add statistics for each tensor listed; a damaged tensor is a finding.
        ignore_checksums: whether to accept a file whose bytes do not match its recorded checksums; see `open`.
        storage_options: options for the file systems of URLs; see `open`.

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
    """Load the weights from any container without executing the file: every value of the state_dict.

    Tensors of every layout (quantized, sparse, nested, on meta), numpy arrays and plain values are what ``torch.load``
    returns; a tensor of a subclass with its own bytes becomes a plain tensor, and in a file without torch tensors,
    named arrays are the weights, as tensors.  Unlike torch, ckptkit checks indices, offsets, axes and sizes first.

    The weights are those that `convert` would write with the same selections, names and casts.  A ``.pth`` is copied
    and its recorded checksums are checked; a ``.safetensors`` is mapped.  To a CUDA device, bytes go from the file in
    pieces.

    Args:
        f: the file, or anything else that can be read; see `open`.
        **options: those of `ckptkit.options.LoadOptions`.

    Returns:
        Name to value, in file order, with the file's module versions as ``_metadata``, where ``Module.load_state_dict``
        looks for them.  Tied tensors share memory.  From a whole model they are plain tensors, as from
        ``Module.state_dict()``.

    Raises:
        MissingDependencyError: torch is not installed.
        SectionError: the file contains no state_dict, or several.
        UnsupportedError: values that only their own code can build (objects, DTensor and other wrappers); the message
            names each.
        RewriteError: options conflict or cannot be applied, or this machine lacks the device.
        DTypeError: the installed torch lacks a dtype, or it cannot be cast.
        CorruptError: a tensor's bytes do not match its recorded checksum, or its parts do not fit together.
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
    """Load everything in a file, as ``torch.load`` returns it, without executing the file.

    Dicts, lists, tuples, sets, tensors of every layout, parameters, numpy arrays and numbers, and plain Python values
    are rebuilt as such; one object in the file is one object in the result.  The ``load_state_dict`` of an optimizer or
    a scheduler accepts its part.  A `Foreign`, which shows name and attributes, replaces whatever only other code could
    build (a model, a ``Namespace``, a function).  A tensor of a custom class becomes a plain tensor, a ``defaultdict``
    with a foreign function loses it, and building a path does not access the disk.

    Args:
        f: the file.
        map_location: where tensors go, as in ``torch.load``; ``None``: the devices recorded in the file.
        section: the keys that lead to the part to load, joined with dots: ``"optimizer"``, ``"args"``; default: all.
        tag: which of several steps, if ``f`` is a training folder; see `open`.
        tp_rules: file with the rules for joining slices of tensor-parallel ranks; see `open`.
        mapped: whether tensors on the CPU use a mapping of the file; see `load_state_dict`.
        allow_part: whether the file may be one part of a checkpoint stored in several files.
        ignore_checksums: whether to accept a file whose bytes do not match its recorded checksums; see `open`.
        storage_options: options for the file systems of URLs; see `open`.

    Returns:
        The saved object; for a program or a safetensors file, a dict of its tensors.

    Raises:
        MissingDependencyError: torch is not installed.
        SectionError: there is no such section in the file.
        UnsupportedError: values nested more than 100 levels deep, or values that this torch cannot create.
        CorruptError: the parts of a value do not fit together, or bytes do not match their recorded checksum.
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
    """Rewrite a checkpoint into another file or in place, or every checkpoint below a folder into another folder.

    A ``.pth`` keeps everything in the source; anything that a safetensors file or shards cannot store is an error
    unless you leave it out explicitly.

    Args:
        source: any readable checkpoint (see `open`), or a folder; or a list of paths, each to be converted into the
            destination, a folder.  With ``in_place``: a path or a list of paths.
        destination: the output; its extension determines the container.  In a folder that exists or whose path ends in
            a slash, the output is named after the source, with the extension of ``to``, if given.  With ``to="dcp"`` it
            is the folder to write, which must be new or empty.  If the source is a folder, each checkpoint goes to the
            same place below the destination, which is created if needed.  ``None``: with ``in_place``.
        **options: those of `ckptkit.options.ConvertOptions`.

    Returns:
        A report whose ``details`` contain the plan and the changes.  For a folder or a list they contain those of each
        file, under ``files`` (`ckptkit.ConvertFolderDocument`), and a file that cannot be converted is a finding of
        severity ``"error"``; the others are converted.  In place they contain the path of the ``backup``.

    Raises:
        As `open` and `CheckpointFile.save`; SectionError if weights are needed and none are selected; PartError;
        RewriteError if the weights are not those of ``like``, or several files of a folder would get the same name;
        VerifyError if ``like`` does not name a model.
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
    """The model that a conversion must match."""
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
    """Compare two checkpoints, whatever their containers.

    Args:
        a: the first file; see `open`.
        b: the second file.
        **options: those of `ckptkit.options.DiffOptions`.

    Returns:
        The difference; ``equal`` is about the tensors.

    Raises:
        SectionError: it is not clear which weights are meant, or neither file contains a tensor.
        KeyCollisionError: without wrapper prefixes two names would be the same.
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
    """Load the weights strictly into a reference model, and check what it computes.

    Args:
        path: the checkpoint; see `open`.  ckptkit reads it and never executes it (but see ``unsafe_load``).
        **options: those of `ckptkit.options.VerifyOptions`.

    Raises:
        MissingDependencyError: torch, or the package of the reference, is not installed.
        VerifyError: the check could not run (unknown reference, missing device, no input shape).
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
        # Only now: importing torch takes seconds, and an unreadable file is reported at once.
        require_torch()
        from ckptkit.verifier import verify as run

        subject = file.rewrite(StripModule()) if asked.strip_module else file
        against = None if other is None else other.checkpoint
        return run(subject.checkpoint, asked, file=file._file, against=against)
