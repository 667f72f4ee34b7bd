"""The keywords of each function that takes `ckptkit.options`, as type checkers see them; never imported at run time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import torch

    from ckptkit.fleet.shares import Share
    from ckptkit.rewrite.rename import Renaming
    from ckptkit.rewrite.storages import LocationMap, TiedPolicy
    from ckptkit.transfer.workers import Progress

__all__ = ["ConvertKeywords", "DiffKeywords", "LoadKeywords", "VerifyKeywords"]


class _ReadKeywords(TypedDict, total=False):
    """What every one of them takes."""

    section: str | None
    tag: str | None
    tp_rules: str | os.PathLike[str] | None
    allow_part: bool
    ignore_checksums: bool
    storage_options: Mapping[str, Any] | None


class _RewriteKeywords(_ReadKeywords, total=False):
    """The keywords that select, rename and cast the weights."""

    all_tensors: bool
    strip_module: bool
    add_module: bool
    strip_prefix: str | None
    add_prefix: str | None
    rename: Renaming
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    densify: bool
    dtype: str | torch.dtype | None
    keep_dtype: str | Sequence[str]
    cast_scaled: bool


class ConvertKeywords(_RewriteKeywords, total=False):
    """What `ckptkit.convert` takes as keywords."""

    weights_only: bool
    keep_beside: bool
    as_key: str | None
    leave_out: str | Sequence[str]
    map_location: LocationMap | None
    tied: TiedPolicy
    like: Any
    model_args: Mapping[str, Any] | None
    to: str | None
    ranks: int | None
    max_shard_size: int | str | None
    metadata: Mapping[str, str] | None
    receipt: bool
    dry_run: bool
    force: bool
    in_place: bool
    backup: bool
    confirm: Callable[[Sequence[str]], bool] | None
    part: str | Share | None
    finish: bool
    jobs: int | None
    executor: Executor | None
    files_from: str | os.PathLike[str] | None
    check: bool
    progress: Progress | None


class LoadKeywords(_RewriteKeywords, total=False):
    """What `ckptkit.load_state_dict` takes as keywords."""

    map_location: Any
    device: Any
    mapped: bool | None


class VerifyKeywords(_ReadKeywords, total=False):
    """What `ckptkit.verify` takes as keywords."""

    model: Any
    model_args: Mapping[str, Any] | None
    device: str
    dtype: str | torch.dtype | None
    input_shapes: Sequence[Sequence[int]]
    input: str | os.PathLike[str] | None
    seed: int
    strip_module: bool
    allow_missing: str | Sequence[str]
    allow_unexpected: str | Sequence[str]
    against: str | os.PathLike[str] | None
    golden: str | os.PathLike[str] | None
    write_golden: str | os.PathLike[str] | None
    atol: float | None
    rtol: float | None
    force: bool
    forward: bool
    unsafe_load: bool


class DiffKeywords(_ReadKeywords, total=False):
    """What `ckptkit.diff` takes as keywords."""

    section_a: str | None
    section_b: str | None
    tag_a: str | None
    tag_b: str | None
    strip_module: bool
    atol: float | None
    rtol: float | None
    strict: bool
    progress: Progress | None
