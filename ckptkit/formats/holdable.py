"""What a container of named tensors cannot hold: all of it is said before anything is written.

safetensors holds plain tensors of the dtypes it knows, and strings.  A sharded checkpoint holds a
state_dict alone, in whatever its shards are.  What else there is must be named by whoever writes,
to be left out: training state with ``--weights-only`` or ``--leave-out``, tensors with ``--exclude``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptkit.checkpoint import Checkpoint
from ckptkit.dtypes import DTYPES
from ckptkit.errors import DTypeError, RewriteError
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.beside import beside_weights
from ckptkit.normalize.parts import wrapped_text
from ckptkit.normalize.sections import brief
from ckptkit.report import glob_of, listed

__all__ = ["require_holdable", "require_writable_size"]

_LISTED = 8
"""Names in a message."""

_OPTIONS = 2000
"""Characters of options in a message."""


def require_holdable(checkpoint: Checkpoint, what: str, *, plain: bool) -> None:
    """Raise unless a container of named tensors can hold the checkpoint.

    Args:
        checkpoint: what is to be written.
        what: the container, for messages: ``"safetensors"``.
        plain: whether it holds plain tensors of the dtypes of safetensors alone.

    Raises:
        DTypeError: all that it cannot hold are tensors of certain dtypes.
        RewriteError: it cannot hold something; the message lists everything and says how to leave it out.
    """
    if not checkpoint.state_dict.everything:
        raise RewriteError(f"there is no state_dict to write; {what} holds named tensors only")
    problems = list(_training_state(checkpoint))
    dtypes = list(_dtypes(checkpoint)) if plain else []
    if plain:
        problems += _values(checkpoint)
    if problems or dtypes:
        error = RewriteError if problems else DTypeError
        raise error(f"{what} cannot hold {'; nor '.join([*problems, *dtypes])}; or write a .pth, which holds all")


def _training_state(checkpoint: Checkpoint) -> Iterator[str]:
    beside = beside_weights(checkpoint)
    if beside:
        yield f"what is beside the weights ({_listed(beside)}): --weights-only leaves it out, --leave-out KEY a part"


def _values(checkpoint: Checkpoint) -> Iterator[str]:
    extra = checkpoint.state_dict.extra
    wrapped = {name: value for name, value in extra.items() if wrapped_text(value) is not None}
    others = {name: value for name, value in extra.items() if name not in wrapped}
    if wrapped:
        yield f"tensors of other classes ({_kinds(wrapped)}), which the program that made them turns into plain ones"
    if others:
        leaves_out = f"{_exclude(list(others), checkpoint)} leaves them out"
        yield f"values that are not plain tensors ({_kinds(others)}): {leaves_out}"


def _kinds(values: Mapping[str, object]) -> str:
    return _listed([f"{name} ({brief(value)})" for name, value in values.items()])


def _dtypes(checkpoint: Checkpoint) -> Iterator[str]:
    odd = {
        name: entry.dtype
        for name, entry in checkpoint.state_dict.items()
        if not DTYPES[entry.dtype].safetensors or (entry.dtype == "float4_e2m1fn_x2" and not entry.shape)
    }  # a pair of F4 has a dimension there
    if odd:
        kinds = _listed([f"{name} ({dtype})" for name, dtype in odd.items()])
        yield f"these dtypes ({kinds}): {_exclude(list(odd), checkpoint)} leaves them out"


def _exclude(names: list[str], checkpoint: Checkpoint) -> str:
    """The options that leave these names out, and no others."""
    odd, endings = set(names), {name.rpartition(".")[2] for name in names}
    patterns = [glob_of(name) for name in names]
    if len(names) > _LISTED and len(endings) == 1:
        ending = endings.pop()  # `_extra_state`, say
        if all(name in odd for name in checkpoint.state_dict.everything if name.endswith(ending)):
            patterns = [glob_of(ending, before="*")]
    shown = ""
    for pattern in patterns:
        if len(shown) + len(pattern) > _OPTIONS:
            return f"{shown}..."
        shown += f"--exclude {pattern} "
    return shown[:-1]


def _listed(names: list[str]) -> str:
    return listed([f"{name:.100}" for name in names], _LISTED)


def require_writable_size(checkpoint: Checkpoint) -> None:
    """Raise where tensors repeat their elements beyond all use; see `Limits.expanded_nbytes`.

    Raises:
        RewriteError: they do.
    """
    grown = {name: entry.nbytes - entry.storage.nbytes for name, entry in checkpoint.state_dict.items()}
    if sum(more for more in grown.values() if more > 0) > DEFAULT_LIMITS.expanded_nbytes:
        name = max(grown, key=grown.__getitem__)
        entry = checkpoint.state_dict[name]
        raise RewriteError(
            f"{name!r} of shape {entry.shape} and stride {entry.stride} would take {entry.nbytes:,} bytes, its storage "
            f"has {entry.storage.nbytes:,}: safetensors cannot repeat elements; write a .pth, or leave it out"
        )
