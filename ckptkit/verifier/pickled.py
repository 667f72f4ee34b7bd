"""Runs a pickled model itself: the one place where a file's own code is executed, and only on request.

Everything else in ckptkit reads pickles without resolving a name.  Here ``torch.load`` imports and calls whatever the
file says; so every name is reported first, and a file whose names run, import or open things is refused in any case.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import VerifyError
from ckptkit.formats import format_named
from ckptkit.report import Finding, count_of, listed
from ckptkit.torch_bridge import tensors
from ckptkit.verifier.foreign import error_text, foreign
from ckptkit.verifier.measure import model_values
from ckptkit.verifier.outputs import same_bits
from ckptkit.verifier.references import Reference
from ckptkit.verifier.references.factory import importable

__all__ = ["load_pickled", "unsafe_findings"]

_LOADER = "torch.load"
"""What runs it."""


def load_pickled(checkpoint: Checkpoint) -> tuple[nn.Module, Reference]:
    """The pickled model, in eval mode, as its own reference.

    Prints on stderr every name that will be imported, before it is.

    Raises:
        VerifyError: the file is hostile, contains no pickled model, or cannot be loaded.
        CorruptError: it is damaged.
    """
    path = checkpoint.origin.path
    dangerous = [use.name for use in checkpoint.globals if use.verdict == "dangerous"]
    if checkpoint.trust == "hostile":
        raise VerifyError(
            f"{path}: is hostile and is not loaded, even with --unsafe-load: it names {listed(dangerous)}", path=path
        )
    if checkpoint.module is None or format_named(checkpoint.origin.format).loader != _LOADER:
        raise VerifyError(
            f"{path}: contains no pickled model to run (its kind is {checkpoint.origin.kind!r}); give --model REF",
            path=path,
        )
    files = {entry.storage.source.file for entry in checkpoint.state_dict.values()}
    if not all(isinstance(file, SourceFile) and file.folder is not None for file in files):
        raise VerifyError(f"{path}: is not a separate file, which --unsafe-load requires; unpack it first")
    tensors(checkpoint.state_dict, map_location="cpu", mapped=True, checksums=True)
    sys.stderr.write(f"{_printable(path)}: --unsafe-load runs code; loading it imports:\n")
    sys.stderr.writelines(f"  {_printable(use.name)}\n" for use in checkpoint.globals)
    sys.stderr.flush()
    try:
        with foreign(), importable(os.getcwd()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise VerifyError(
            f"{path}: the pickled model cannot be loaded: {error_text(error)}; its classes must be "
            "importable from here, or give --model REF",
            path=path,
        ) from error
    module = _module(loaded, checkpoint.origin.state_path or "")
    if module is None:
        raise VerifyError(
            f"{path}: torch.load returned no module at {checkpoint.origin.state_path!r}; give --model REF", path=path
        )
    if isinstance(module, nn.DataParallel):
        module.device_ids = []  # it computes where the weights are
    with foreign(f"{path}: the pickled model cannot be put into eval mode"):
        module.eval()
    return module, Reference(spec=None, label="the pickled model", args={}, make=lambda: module)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _module(loaded: object, path: str) -> nn.Module | None:
    """The value at these keys, joined with dots; keys may contain dots themselves."""
    found: Any = loaded
    while path:
        if not isinstance(found, Mapping):
            return None
        keys = [key for key in found if path == str(key) or path.startswith(f"{key}.")]
        if not keys:
            return None
        key = max(keys, key=lambda key: len(str(key)))
        path = path[len(str(key)) + 1 :]
        found = found[key]
    if inspect.ismethod(found):  # the method was saved instead of its result
        found = found.__self__
    return found if isinstance(found, nn.Module) else None


def unsafe_findings(checkpoint: Checkpoint, module: nn.Module) -> Iterator[Finding]:
    """The imported names, and whether the module contains the weights that ckptkit read without running anything."""
    names = [use.name for use in checkpoint.globals]
    yield Finding(
        code="unsafe-load",
        severity="warning",
        message="the pickled model itself is run because of --unsafe-load; loading it imported "
        f"{count_of(len(names), 'name')}: {listed(names, 8)}",
    )
    theirs = model_values(module)
    ours = tensors(checkpoint.state_dict, map_location="cpu")
    apart = [name for name in dict.fromkeys((*ours, *theirs)) if not _same(ours.get(name), theirs.get(name))]
    apart = [name for name in apart if name not in checkpoint.state_dict.extra]
    if apart:
        yield Finding(
            code="pickled-differs",
            severity="error",
            message=f"{count_of(len(apart), 'tensor', 'differs', 'differ')} between the loaded module and the file: "
            f"{listed(apart)}; its code changes them while it loads",
        )


def _same(a: object, b: object) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and same_bits(a, b)
