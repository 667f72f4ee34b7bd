"""What is done with released files: manifest and check."""

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
        paths: files, and folders that are searched for checkpoints, one or several; with ``update`` none means what
            the manifest was made of.  In the folders `check` lets no other checkpoint lie.
        destination: the manifest to write; paths in it are relative to its folder.  ``None``: nothing is written,
            and they are relative to the working directory, or where files lie elsewhere to the folder above them.
        digests: ``"tensor"`` lists each tensor, ``"total"`` folds them; default: as the manifest has it, a new one
            lists them.
        golden: a file that `verify` wrote with ``write_golden``, for the one checkpoint there is; or such files by
            the paths of theirs.
        tag: which of several steps, where ``paths`` are training folders; see `open`.
        tp_rules: file of rules by which slices of tensor-parallel ranks are joined; see `open`.
        allow_part: whether a file may be a part of a checkpoint that lies in several.
        update: whether to keep what an existing manifest says of files that are unchanged, and of those not named.
        force: whether to replace an existing manifest as a whole.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.
        storage_options: what the file systems of URLs are made with; see `open`.
        jobs: how many processes share very many files; see `check`.
        executor: what does the work in their place; see there.

    Returns:
        The manifest; its ``changes`` say what was added, changed, removed and kept.

    Raises:
        DestinationExistsError: it exists, and neither ``update`` nor ``force`` is given.
        FileAccessError: a file cannot be read, is not below the manifest's folder, or there is none.
        FormatError: a file is not a checkpoint, or the manifest to update is none.
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
    """Hold files against a manifest and a policy.

    Whatever is asked for, each file must be readable and may not be hostile, nor a part of a checkpoint.

    Args:
        paths: files and folders, one or several; none: those that the configuration names, or all of the manifest's
            and whatever else lies in the folders it was made of.  An index stands for its shards, and a shard for
            all of them where its index lies beside it.
        manifest: what the files must be, as `ckptkit.manifest` wrote it; none: the configuration's.
        config: a ``ckptkit.toml`` or ``pyproject.toml``; none is looked for.  What is given here wins over it.
        tag: which of several steps, where ``paths`` are training folders; see `open`.
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
        part: the share of the files to look at, ``"2/8"``: all eight together are all files, each once.
        jobs: how many processes share very many files; default: as many as there are cores.
        executor: any `concurrent.futures.Executor` in their place, whose workers have the same files and ckptkit.
        timeout: seconds that one file may take.
        ignore_checksums: whether to insist on a file whose recorded checksums are not those of its bytes; see `open`.
        storage_options: what the file systems of URLs are made with; see `open`.

    Returns:
        A report whose findings name path, rule, expected and found, and whose ``passed_over`` counts by kind the
        files that are not checkpoints.  What could not be read or checked is in it
        too: ``exit_code`` is that of ``ckptkit check``.

    Raises:
        VerifyError: a policy has a value that it cannot have, or there is nothing to check.
        CkptkitError: ``jobs``, ``executor`` or ``timeout`` cannot be, or two of them do not go together.
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
