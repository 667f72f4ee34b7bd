"""A check from beginning to end: configuration, manifest, the files, the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptkit.errors import VerifyError
from ckptkit.extras import require_torch
from ckptkit.released.config import Config, read_config
from ckptkit.released.judge import judge
from ckptkit.released.manifests.reader import read_manifest
from ckptkit.released.policy import Policy
from ckptkit.released.results import CheckReport
from ckptkit.report import Report

__all__ = ["check"]


def check(
    paths: Sequence[str],
    *,
    manifest: str | None,
    config: str | None,
    skip_others: bool,
    typed: Mapping[str, Any],
    verify: Callable[..., Report],
) -> CheckReport:
    """Hold files against a manifest and policies; see `ckptkit.check`.

    Args:
        paths: files and folders; none: those of the configuration, or all that the manifest names.
        manifest: its path; ``None``: that of the configuration.
        config: path of the configuration; ``None``: there is none.
        skip_others: whether files that are named and no checkpoint are passed over.
        typed: fields of a `Policy` that go before the configured ones.
        verify: `ckptkit.verify`.

    Raises:
        As `ckptkit.check`.
    """
    Policy(**typed)
    configured = replace(Config() if config is None else read_config(config), typed=typed)
    manifest = configured.manifest if manifest is None else manifest
    paths = paths or configured.paths
    if not paths and manifest is None:
        raise VerifyError("nothing to check: name files or folders, or a manifest with --manifest FILE")
    released = None
    if manifest is not None:
        # Paths are told as the manifest's own was given, not from the root of the disk.
        released = replace(read_manifest(manifest), folder=os.path.dirname(manifest))
    if configured.needs_model:
        require_torch()
    report = judge(
        paths,
        manifest=released,
        config=configured,
        manifest_path=manifest,
        skip_others=skip_others,
        verify=verify,
    )
    return replace(report, details={**report.details, "manifest": manifest, "config": configured.path})
