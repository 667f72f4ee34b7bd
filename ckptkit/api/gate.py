"""Functions for released files: manifest and check."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ckptkit.api.weights import verify
from ckptkit.arguments import several, unexpected
from ckptkit.checkpoint_file import PathLike
from ckptkit.options.storage import in_session

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from typing_extensions import Unpack

    from ckptkit.released.manifest_file import Manifest
    from ckptkit.released.policy import PolicyKeywords
    from ckptkit.released.results import CheckReport

__all__ = ["check", "manifest"]


@in_session
def manifest(
    paths: PathLike | Sequence[PathLike] = (),
    destination: PathLike | None = None,
    *,
    digests: Literal["total", "tensor"] | None = None,
    golden: Mapping[str, PathLike] | PathLike | None = None,
    tag: str | None = None,
    tp_rules: PathLike | None = None,
    allow_part: bool = False,
    update: bool = False,
    force: bool = False,
    ignore_checksums: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    executor: Executor | None = None,
) -> Manifest:
    """Record what released files are: sizes, hashes, and digests of their tensors that no container changes.

    Args:
        paths: files, and folders to search for checkpoints, one or several; with ``update``, none means the paths that
            the manifest was made from.  `check` reports any other checkpoint in these folders.
        destination: the manifest to write; paths in it are relative to its folder.  ``None``: nothing is written, and
            paths are relative to the working directory, or to the folder above the files if they are elsewhere.
        digests: ``"tensor"`` lists each tensor, ``"total"`` combines them; default: as in the existing manifest, and
            ``"tensor"`` for a new one.
        golden: a file that `verify` wrote with ``write_golden``, for the only checkpoint; or a mapping from checkpoint
            paths to such files.
        tag: which of several steps, if ``paths`` are training folders; see `open`.
        tp_rules: file with the rules for joining slices of tensor-parallel ranks; see `open`.
        allow_part: whether a file may be one part of a checkpoint stored in several files.
        update: whether to keep what an existing manifest says about files that are unchanged or not named.
        force: whether to replace an existing manifest as a whole.
        ignore_checksums: whether to accept a file whose bytes do not match its recorded checksums; see `open`.
        storage_options: options for the file systems of URLs; see `open`.
        jobs: how many processes share a large number of files; see `check`.
        executor: the executor to use instead; see `check`.

    Returns:
        The manifest; its ``changes`` say what was added, changed, removed and kept.

    Raises:
        DestinationExistsError: it exists, and neither ``update`` nor ``force`` is given, or it is a checkpoint.
        FileAccessError: a file cannot be read, is not below the manifest's folder, or there is none.
        FormatError: a file is not a checkpoint, or the file to update is not a manifest.
    """
    from ckptkit.released.manifest_maker import make_at
    from ckptkit.transfer.many import Workers

    return make_at(
        [os.fsdecode(path) for path in several(paths)],
        None if destination is None else os.fsdecode(destination),
        digests,
        golden,
        tag=tag,
        tp_rules=None if tp_rules is None else os.fsdecode(tp_rules),
        allow_part=allow_part,
        update=update,
        force=force,
        ignore_checksums=ignore_checksums,
        workers=Workers(jobs=jobs, executor=executor),
    )


@in_session
def check(
    paths: PathLike | Sequence[PathLike] = (),
    *,
    manifest: PathLike | None = None,
    config: PathLike | None = None,
    tag: str | None = None,
    skip_others: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    part: str | None = None,
    jobs: int | None = None,
    executor: Executor | None = None,
    timeout: float | None = None,
    **policy: Unpack[PolicyKeywords],
) -> CheckReport:
    """Check files against a manifest and a policy.

    In every case, each file must be readable, and may not be hostile or a part of a checkpoint.

    Args:
        paths: files and folders, one or several; none: those that the configuration names, or all of the manifest's and
            anything else in the folders it was made from.  Of a folder that names its last step, without a manifest,
            the files around that step are checked too.  An index includes its shards, and a shard all of them if its
            index is beside it.
        manifest: a manifest that `ckptkit.manifest` wrote; none: the configuration's.
        config: a ``ckptkit.toml`` or ``pyproject.toml``; there is no automatic search.  Arguments override it.
        tag: which of several steps, if ``paths`` are training folders; see `open`.
        no_pickle: whether to forbid pickles entirely.
        max_trust: the highest trust level allowed: ``"safe"`` or ``"needs_trust"``.
        require_format: the containers allowed.
        max_size: bytes allowed per file, as a number or as ``"2GB"``.
        allow_dtype: the dtypes allowed for tensors.
        no_nan: whether to forbid NaN in tensors and Inf in parameters; reads the data.
        no_optimizer: whether to forbid optimizer state in the file.
        no_prefix: whether to forbid wrapper prefixes in names.
        location: the device tags allowed for storages.
        allow_part: whether a file may be one part of a checkpoint stored in several files; otherwise it is an error.
        fits: the reference model that the weights must load into; see `verify`.  Needs torch.
        forward: whether to run a forward pass too, with the model of ``fits``, of the manifest's golden file or of the
            identified architecture.  Needs torch.
        model_args: keyword arguments of the reference's factory.
        input_shapes: input shapes of the forward pass; default from the reference, if known.
        skip_others: whether to skip named files that are not checkpoints, as in folders; it is fine if none is left.
        part: the share of the files to check, such as ``"2/8"``: the eight shares together contain every file exactly
            once.
        jobs: how many processes share a large number of files; default: the number of cores.
        executor: any `concurrent.futures.Executor` to use instead, whose workers have the same files and the same
            ckptkit.
        timeout: seconds allowed per file.
        ignore_checksums: whether to accept a file whose bytes do not match its recorded checksums; see `open`.
        storage_options: options for the file systems of URLs; see `open`.

    Returns:
        A report whose findings name path, rule, expected and found, and whose ``passed_over`` counts the files that are
        not checkpoints, by kind.  It includes files that could not be read or checked; ``exit_code`` is that of
        ``ckptkit check``.

    Raises:
        VerifyError: a policy has an invalid value, or there is nothing to check.
        CkptkitError: ``jobs``, ``executor`` or ``timeout`` is invalid, or two of them cannot be combined.
        FormatError, FileAccessError: manifest or configuration cannot be read.
        MissingDependencyError: a model is needed, and torch or the reference's package is not installed.
    """
    from ckptkit.released import check as run
    from ckptkit.released.policy import POLICY_FIELDS
    from ckptkit.transfer.many import Workers

    for name in policy:
        if name not in POLICY_FIELDS:
            own = ("manifest", "config", "tag", "skip_others", "part", "jobs", "executor", "timeout", "storage_options")
            raise unexpected("check", name, (*POLICY_FIELDS, *own))
    return run(
        [os.fsdecode(path) for path in several(paths)],
        tag=tag,
        skip_others=skip_others,
        part=part,
        workers=Workers(jobs=jobs, executor=executor, seconds=timeout),
        manifest=None if manifest is None else os.fsdecode(manifest),
        config=None if config is None else os.fsdecode(config),
        typed={name: value for name, value in policy.items() if value is not None},
        verify=verify,
    )
