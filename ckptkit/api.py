"""Each command's Python twin.

    with ckptkit.open("model.pth") as ckpt:
        clean = ckpt.rewrite(ckptkit.StripModule(), ckptkit.MapLocation("cpu"))
        clean.save("model.safetensors")

    state = ckptkit.load_state_dict("anything.pth", map_location="cpu")
    ckptkit.convert("ddp.pth", "clean.safetensors", strip_module=True)
    ckptkit.verify("clean.safetensors", model="torchvision:resnet18").raise_if_failed()

Nothing here imports torch but `load_state_dict` and `verify`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ckptkit import formats
from ckptkit.arguments import several
from ckptkit.checkpoint import Checkpoint
from ckptkit.checkpoint_file import CheckpointFile, PathLike, Rewriter, open  # noqa: A004 - the name users expect
from ckptkit.errors import CorruptError, PartError, RewriteError, SectionError
from ckptkit.normalize.parts import require_whole
from ckptkit.report import Report

if TYPE_CHECKING:
    from collections import OrderedDict

    from ckptkit.differences import Difference
    from ckptkit.released.manifest_file import Manifest
    from ckptkit.released.results import CheckReport
    from ckptkit.rewrite import Like
    from ckptkit.rewrite.device import LocationMap
    from ckptkit.transfer.workers import Progress

__all__ = [
    "CheckpointFile",
    "Rewriter",
    "check",
    "convert",
    "diff",
    "inspect",
    "load_state_dict",
    "manifest",
    "open",
    "verify",
]


def inspect(
    path: PathLike,
    *,
    section: str | None = None,
    filters: str | Sequence[str] = (),
    sort: str = "file",
    stats: bool = False,
    ignore_checksums: bool = False,
) -> dict[str, Any]:
    """What is in a file: one element of the ``files`` of ``ckptkit inspect --json``.

    Args:
        path: the file.
        section: path of the weights to select.
        filters: glob patterns of tensor names to list; none lists all.
        sort: ``"file"``, ``"name"`` or ``"size"``.
        stats: whether to read the data and add statistics of each tensor listed; a damaged one is a finding.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.

    Raises:
        As `open`.
    """
    from ckptkit.inspection import describe

    if sort not in ("file", "name", "size"):
        raise RewriteError(f"sort is {sort!r:.40}; expected 'file', 'name' or 'size'")
    with open(path, section=section, ignore_checksums=ignore_checksums) as file:
        return describe(file.checkpoint, filters=several(filters), sort=sort, stats=stats)


def load_state_dict(
    path: PathLike,
    *,
    map_location: Any = None,
    section: str | None = None,
    allow_part: bool = False,
    ignore_checksums: bool = False,
) -> OrderedDict[str, Any]:
    """The weights, from any container, without executing the file: every value of the state_dict.

    Tensors of every layout (quantized, sparse, nested, on meta), arrays of numpy's and plain values are what
    ``torch.load`` gives; of a tensor of a class with bytes of its own the plain tensor is given.  Their indices,
    offsets, axes and sizes are checked first, which torch does not do.

    Args:
        path: the file.
        map_location: as in ``torch.load``: a string, a ``torch.device``, a dict, a callable.
        section: path of the weights to select, where the file holds several.
        allow_part: whether the file may be a part of a checkpoint that lies in several.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.

    Returns:
        Name to value, in file order, with the module versions that the file has as ``_metadata``, as
        ``Module.load_state_dict`` looks for them.  Tied tensors share memory.  From a whole model they are plain
        tensors, as ``Module.state_dict()`` gives them.

    Raises:
        MissingDependencyError: torch is not installed.
        SectionError: the file holds no state_dict, or several.
        UnsupportedError: values that only the code they come from can make (objects, DTensor and other wrappers);
            the message names each.
        DTypeError: the installed torch lacks a dtype.
        CorruptError: a tensor's bytes are not those its checksum was recorded for, or what it consists of does not
            fit together.
        PartError: it is a part of a checkpoint.
        FormatError, FileAccessError: as `open`.
    """
    from ckptkit.extras import require_torch

    require_torch()
    from ckptkit.torch_bridge import state_dict_of

    with open(path, section=section, ignore_checksums=ignore_checksums) as file:
        require_whole(file.checkpoint, allow_part=allow_part)
        _require_state_dict(file.checkpoint, "to load")
        state = state_dict_of(file.state_dict, file.path, map_location=map_location, checksums=True)
        if file.checkpoint.module is not None:
            for name, value in state.items():
                state[name] = value.detach() if hasattr(value, "detach") else value
        return state


def convert(
    source: PathLike,
    destination: PathLike,
    *,
    section: str | None = None,
    strip_module: bool = False,
    add_module: bool = False,
    strip_prefix: str | None = None,
    add_prefix: str | None = None,
    rename: str | Sequence[str | tuple[str, str]] = (),
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    leave_out: str | Sequence[str] = (),
    weights_only: bool = False,
    map_location: LocationMap | None = None,
    dtype: str | None = None,
    keep_dtype: str | Sequence[str] = (),
    cast_scaled: bool = False,
    tied: Literal["alias", "duplicate", "error"] = "alias",
    like: Any = None,
    model_args: Mapping[str, Any] | None = None,
    to: str | None = None,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    allow_part: bool = False,
    receipt: bool = True,
    dry_run: bool = False,
    force: bool = False,
    check: bool = True,
    ignore_checksums: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Rewrite a checkpoint into another file.

    A ``.pth`` keeps everything that is in the source; what a safetensors file or shards cannot hold is an
    error unless it is named to be left out.

    Args:
        source: any readable checkpoint.
        destination: the output; its ending chooses the container.
        section: path of the weights, where the file holds several.
        strip_module: take off every wrapper prefix (``module.``, ``_orig_mod.``).
        add_module: then put one ``module.`` before every name.
        strip_prefix: then strip this one leading prefix of whole segments.
        add_prefix: then put this prefix before every name.
        rename: then apply rules, in order: ``"REGEX=>REPLACEMENT"`` or pairs of both; see `ckptkit.Rename`.
        include: globs of the names to keep, as they are in the source or as they will be; none keeps all.
        exclude: globs of the names to drop, in the same way.
        leave_out: parts of the file beside the weights to drop: keys, or sections as `inspect` lists them.
        weights_only: drop all but the state_dict.
        map_location: new device tags; see `ckptkit.MapLocation`.
        dtype: cast the floating-point weights to it; see `ckptkit.CastDtype`.
        keep_dtype: globs of the names that are not cast, in the source or in the output.
        cast_scaled: whether to cast weights that have scales beside them, and such scales, each by itself.
        tied: what becomes of tensors with several names; see `ckptkit.Tied`.
        like: the model whose tensors alone are kept, under its names: another checkpoint, or a reference as the
            ``model`` of `verify` (which needs torch).  Section and prefix are found; it goes after all that is
            named to be selected or renamed.  See `ckptkit.Like`.
        model_args: keyword arguments of the reference's factory; strings are read as Python literals.
        to: container name that overrides the ending.
        max_shard_size: bytes of a file, as a number or as ``"5GB"``; what has more becomes shards and an index.
        metadata: strings to set in the output's metadata.
        allow_part: whether the source may be a part of a checkpoint that lies in several files.
        receipt: whether to record in the metadata what was done; see `ckptkit.conversion`.
        dry_run: make the plan, write nothing.
        force: whether an existing destination may be replaced.
        check: whether to compare the output with the source before it gets its name; see `CheckpointFile.save`.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.
        progress: called with the bytes dealt with so far, and those to deal with in all.

    Returns:
        A report whose ``details`` hold the plan and what was changed.

    Raises:
        As `open` and `CheckpointFile.save`; SectionError where weights are needed and none is selected; PartError;
        RewriteError where the weights are not those of ``like``; VerifyError where ``like`` names no model.
    """
    from ckptkit.conversion import Job
    from ckptkit.conversion.options import Conversion, Options  # reading alone starts faster without the writing half

    options = Options(
        strip_module=strip_module,
        add_module=add_module,
        strip_prefix=strip_prefix,
        add_prefix=add_prefix,
        rename=rename,
        include=include,
        exclude=exclude,
        leave_out=leave_out,
        weights_only=weights_only,
        map_location=map_location,
        dtype=dtype,
        keep_dtype=keep_dtype,
        cast_scaled=cast_scaled,
        tied=tied,
        like=None if like is None else _like(like, model_args or {}),
        metadata=metadata or {},
    )
    if model_args and like is None:
        raise RewriteError("--model-arg is for the model of --like, which is not given")
    with contextlib.ExitStack() as stack:
        reading = partial(open, source, ignore_checksums=ignore_checksums)
        file = stack.enter_context(reading(section=section))
        require_whole(file.checkpoint, allow_part=allow_part)
        if options.like is not None and section is None:
            from ckptkit.conversion.options import section_like

            found = section_like(file.checkpoint, options, ignore_checksums=ignore_checksums)
            if found != file.checkpoint.origin.state_path:
                file = stack.enter_context(reading(section=found))
        _, container, most = formats.target(os.fsdecode(destination), to)
        weights_alone = container.tensors_alone or most is not None or max_shard_size is not None
        if weights_alone or options.needs_weights:
            _require_state_dict(file.checkpoint, "to rewrite" if options.needs_weights else "to write")
        conversion = Conversion(file.checkpoint, options)
        job = Job.of(
            conversion.result,
            file._file,
            os.fsdecode(destination),
            to=to,
            max_shard_size=max_shard_size,
            receipt=receipt,
            hashed=check and not dry_run,
        )
        findings = (*job.findings(), *conversion.findings(job.plan, None if dry_run else job.path))
        if not dry_run:
            tally = job.carry_out(force=force, check=check, progress=progress)
            findings = (*findings, *conversion.losses(tally))
        return Report(
            findings=findings,
            details={
                "source": os.fsdecode(source),
                "destination": job.path,
                "written": not dry_run,
                "checked": check and not dry_run,
                "section": file.checkpoint.origin.state_path,
                "plan": job.plan.to_dict(),
                **conversion.details(job.plan),
            },
        )


def _like(like: Any, args: Mapping[str, Any]) -> Like:
    """The model that a conversion is to be like."""
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
        raise RewriteError(f"--like {path}: is a checkpoint, and takes no --model-arg")
    with open(path) as file:
        require_whole(file.checkpoint, allow_part=False)
        if file.checkpoint.origin.state_path is None:
            from ckptkit.normalize.selection import paths_listed

            weights = paths_listed(file.sections) or "no section holds any"
            raise SectionError(f"{path}: has no one set of weights to be like ({weights})")
        return Like(file.state_dict, label=path)


def diff(
    a: PathLike,
    b: PathLike,
    *,
    section: str | None = None,
    section_a: str | None = None,
    section_b: str | None = None,
    strip_module: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    strict: bool = False,
    allow_part: bool = False,
    ignore_checksums: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """What changed from one checkpoint to another, whatever their containers.

    Args:
        a: the file that is compared.
        b: the file that it is compared with.
        section: path of the weights to compare, in both; what stands beside named weights is not compared.
        section_a: the same of ``a`` alone.
        section_b: the same of ``b`` alone.
        strip_module: take off wrapper prefixes of both first.
        atol: how far elements may be apart and count as unchanged; without both, bits decide.
        rtol: the same as a share of the larger magnitude of the two; what it allows is added.
        strict: whether metadata, ties, parts that one file alone has, and every value in the files' trees count
            for `Difference.ok`.
        allow_part: whether either may be a part of a checkpoint that lies in several files.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.
        progress: called with the bytes gone through so far, and those to go through in all.

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

    chosen = section_a or section, section_b or section
    reading = partial(open, ignore_checksums=ignore_checksums)
    tolerance = None if atol is None and rtol is None else Tolerance(0.0 if atol is None else atol, rtol or 0.0)
    with reading(a, section=chosen[0]) as ours, reading(b, section=chosen[1]) as theirs:
        rewriters = (StripModule(),) if strip_module else ()
        difference = differ(
            ours.rewrite(*rewriters).checkpoint,
            theirs.rewrite(*rewriters).checkpoint,
            beside=chosen == (None, None),
            tolerance=tolerance,
            strict=strict,
            allow_part=allow_part,
            progress=progress,
        )
        for file in (ours, theirs):
            if file._file.changed():
                raise CorruptError("the file was changed while it was read", path=file.path)
        return difference


def _require_state_dict(checkpoint: Checkpoint, purpose: str) -> None:
    if checkpoint.origin.state_path is not None:
        return
    from ckptkit.normalize.selection import held_instead, paths_listed

    path, weights = checkpoint.origin.path, paths_listed(checkpoint.sections)
    if weights:
        raise SectionError(f"{path}: several sections hold weights ({weights}); name the one {purpose} with --section")
    kind = f"its kind is {checkpoint.origin.kind!r}"
    raise SectionError(f"{path}: the file holds no state_dict {purpose} ({kind}); {held_instead(checkpoint)}")


def manifest(
    paths: PathLike | Sequence[PathLike] = (),
    destination: PathLike | None = None,
    *,
    digests: Literal["total", "tensor"] | None = None,
    golden: Mapping[str, PathLike] | PathLike | None = None,
    allow_part: bool = False,
    update: bool = False,
    force: bool = False,
    ignore_checksums: bool = False,
) -> Manifest:
    """Record what released files are: sizes, hashes, and digests of their tensors that no container changes.

    Args:
        paths: files, and folders that are searched for checkpoints, one or several; with ``update`` none means what
            the manifest was made of.  In the folders `check` lets no other checkpoint lie.
        destination: the manifest to write; paths in it are relative to its folder.  ``None``: nothing is written,
            and they are relative to the working directory, or where files lie elsewhere to the folder above them.
        digests: ``"tensor"`` lists each tensor, ``"total"`` folds them; default: as the manifest has it, a new one
            lists them.
        golden: a file that `verify` wrote with ``write_golden``, for the one checkpoint there is; or such files by
            the paths of theirs.
        allow_part: whether a file may be a part of a checkpoint that lies in several.
        update: whether to keep what an existing manifest says of files that are unchanged, and of those not named.
        force: whether to replace an existing manifest as a whole.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.

    Returns:
        The manifest; its ``changes`` say what was added, changed, removed and kept.

    Raises:
        DestinationExistsError: it exists, and neither ``update`` nor ``force`` is given.
        FileAccessError: a file cannot be read, is not below the manifest's folder, or there is none.
        FormatError: a file is not a checkpoint, or the manifest to update is none.
    """
    from ckptkit.released.manifest_maker import make_at

    return make_at(
        [os.fsdecode(path) for path in several(paths)],
        None if destination is None else os.fsdecode(destination),
        digests=digests,
        golden=golden,
        allow_part=allow_part,
        update=update,
        force=force,
        ignore_checksums=ignore_checksums,
    )


def verify(
    path: PathLike,
    *,
    model: Any = None,
    model_args: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str | None = None,
    input_shapes: Sequence[Sequence[int]] = (),
    input: PathLike | None = None,  # noqa: A002 - the option's name
    seed: int = 0,
    section: str | None = None,
    strip_module: bool = False,
    allow_missing: str | Sequence[str] = (),
    allow_unexpected: str | Sequence[str] = (),
    allow_part: bool = False,
    forward: bool = True,
    against: PathLike | None = None,
    golden: PathLike | None = None,
    write_golden: PathLike | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    force: bool = False,
    unsafe_load: bool = False,
    ignore_checksums: bool = False,
) -> Report:
    """Load into a reference model, strictly, and examine what it computes.

    Args:
        path: the checkpoint; it is read by ckptkit, never executed (but see ``unsafe_load``).
        model: ``"torchvision:resnet18"``, ``"package.module:factory"``, ``"path/to/file.py:factory"``, or an
            ``nn.Module`` or callable; may be left out where ``golden`` names it, or the architecture is
            known by its names and shapes.
        model_args: keyword arguments of the factory; strings are read as Python literals.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``"cpu,cuda"`` runs both and compares.
        dtype: torch name to run the forward pass in.
        input_shapes: one shape for each input; default from the reference where it is known.
        input: a file, in any container, with the inputs' values: by position (``0``, ``1``) or by keyword.
        seed: of the input.
        section: path of the weights, where the file holds several.
        strip_module: take off wrapper prefixes first.
        allow_missing: glob patterns of names that may be missing.
        allow_unexpected: glob patterns of names that may be left over.
        allow_part: whether a file may be a part of a checkpoint that lies in several.
        forward: whether to run the forward pass.
        against: another checkpoint of the same model, in any container and with any wrapper prefix, whose
            outputs must agree.
        golden: a file of outputs recorded earlier, which these must agree with.
        write_golden: a file to record these in.
        atol: how far outputs may be apart, whatever their size; default: several times the noise that is measured.
        rtol: the same, as a share of their largest magnitude; what it allows is added.
        force: whether ``write_golden`` may replace a file.
        unsafe_load: run the pickled model itself in place of a reference: **runs code of the file**, after
            printing on stderr what it imports.  A hostile file is refused.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.

    Raises:
        MissingDependencyError: torch, or the package of the reference, is not installed.
        VerifyError: the check could not be run (unknown reference, missing device, no input shape).
        DestinationExistsError: ``write_golden`` exists and ``force`` is false.
        SectionError, FormatError, FileAccessError: as `open`.
    """
    from ckptkit.extras import require_torch
    from ckptkit.rewrite import StripModule

    with contextlib.ExitStack() as stack:
        reading = partial(open, ignore_checksums=ignore_checksums)
        file = stack.enter_context(reading(path, section=section))
        require_whole(file.checkpoint, allow_part=allow_part)
        _require_state_dict(file.checkpoint, "to verify")
        other = None if against is None else stack.enter_context(_other(against, section, reading, allow_part))
        # Only now: importing torch takes seconds, and what cannot be read is told at once.
        require_torch()
        from ckptkit.verifier import verify as run

        subject = file.rewrite(StripModule()) if strip_module else file
        return run(
            subject.checkpoint,
            model=model,
            model_args=dict(model_args or {}),
            device=device,
            dtype=dtype,
            input_shapes=input_shapes,
            input=None if input is None else os.fsdecode(input),
            seed=seed,
            allow_missing=allow_missing,
            allow_unexpected=allow_unexpected,
            forward=forward,
            against=None if other is None else other.checkpoint,
            golden=None if golden is None else os.fsdecode(golden),
            write_golden=None if write_golden is None else os.fsdecode(write_golden),
            atol=atol,
            rtol=rtol,
            force=force,
            unsafe_load=unsafe_load,
            strip_module=strip_module,
            reading=[*["--allow-part"] * allow_part, *["--ignore-checksums"] * ignore_checksums],
        )


def _other(
    path: PathLike, section: str | None, reading: Callable[..., CheckpointFile], allow_part: bool
) -> CheckpointFile:
    """The other checkpoint; the section is selected in it too, where it has one of that name."""
    file = reading(path)
    if section is not None and any(each.path == section for each in file.sections):
        file.close()
        file = reading(path, section=section)
    try:
        require_whole(file.checkpoint, allow_part=allow_part)
        _require_state_dict(file.checkpoint, "to compare with")
    except (PartError, SectionError):
        file.close()
        raise
    return file


def check(
    paths: PathLike | Sequence[PathLike] = (),
    *,
    manifest: PathLike | None = None,
    config: PathLike | None = None,
    no_pickle: bool | None = None,
    max_trust: Literal["safe", "needs_trust"] | None = None,
    require_format: str | Sequence[str] | None = None,
    max_size: int | str | None = None,
    allow_dtype: str | Sequence[str] | None = None,
    no_nan: bool | None = None,
    no_optimizer: bool | None = None,
    no_prefix: bool | None = None,
    location: str | Sequence[str] | None = None,
    allow_part: bool | None = None,
    fits: str | None = None,
    forward: bool | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shapes: Sequence[Sequence[int]] | None = None,
    skip_others: bool = False,
    ignore_checksums: bool | None = None,
) -> CheckReport:
    """Hold files against a manifest and a policy.

    Whatever is asked for, each file must be readable and may not be hostile, nor a part of a checkpoint.

    Args:
        paths: files and folders, one or several; none: those that the configuration names, or all of the manifest's
            and whatever else lies in the folders it was made of.  An index stands for its shards, and a shard for
            all of them where its index lies beside it.
        manifest: what the files must be, as `ckptkit.manifest` wrote it; none: the configuration's.
        config: a ``ckptkit.toml`` or ``pyproject.toml``; none is looked for.  What is given here wins over it.
        no_pickle: whether a file may hold no pickle at all.
        max_trust: the most a loader may have to be trusted with: ``"safe"`` or ``"needs_trust"``.
        require_format: the containers that files may be.
        max_size: bytes of a file, as a number or as ``"2GB"``.
        allow_dtype: the dtypes that tensors may have.
        no_nan: whether no tensor may hold NaN and no parameter Inf; reads the data.
        no_optimizer: whether an optimizer's state may not be in the file.
        no_prefix: whether names may not carry a wrapper's prefix.
        location: the device tags that storages may have.
        allow_part: whether a file may be a part of a checkpoint that lies in several; else it is an error.
        fits: the reference model that the weights must load into; see `verify`.  Needs torch.
        forward: whether to run the verifier's forward pass too, of the model of ``fits``, of the manifest's golden
            or of the architecture that was identified.  Needs torch.
        model_args: keyword arguments of the reference's factory.
        input_shapes: of the forward pass; default from the reference where it is known.
        skip_others: whether files that are named and no checkpoint are passed over, as those in folders are; that
            none is left is well.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.

    Returns:
        A report whose findings name path, rule, expected and found, and whose ``passed_over`` counts by kind the
        files that are not checkpoints.  What could not be read or checked is in it
        too: ``exit_code`` is that of ``ckptkit check``.

    Raises:
        VerifyError: a policy has a value that it cannot have, or there is nothing to check.
        FormatError, FileAccessError: manifest or configuration cannot be read.
        MissingDependencyError: a model is needed, and torch or the reference's package is not installed.
    """
    from ckptkit.released import check as run

    given = {
        "no_pickle": no_pickle,
        "max_trust": max_trust,
        "require_format": require_format,
        "max_size": max_size,
        "allow_dtype": allow_dtype,
        "no_nan": no_nan,
        "no_optimizer": no_optimizer,
        "no_prefix": no_prefix,
        "location": location,
        "allow_part": allow_part,
        "fits": fits,
        "forward": forward,
        "model_args": model_args,
        "input_shapes": input_shapes,
        "ignore_checksums": ignore_checksums,
    }
    return run(
        [os.fsdecode(path) for path in several(paths)],
        skip_others=skip_others,
        manifest=None if manifest is None else os.fsdecode(manifest),
        config=None if config is None else os.fsdecode(config),
        typed={name: value for name, value in given.items() if value is not None},
        verify=verify,
    )
