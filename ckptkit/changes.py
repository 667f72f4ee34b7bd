"""What a conversion changes: findings about the output, computed before it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptkit.checkpoint import STATE_DICT, Checkpoint
from ckptkit.formats.torch_zip import PROGRAMS
from ckptkit.normalize.sections import step
from ckptkit.pickling.inert import mapping_items
from ckptkit.plan import Gather, Plan
from ckptkit.report import Finding

__all__ = ["diagnose_losses", "diagnose_renames"]


def diagnose_renames(source: Checkpoint, renames: Mapping[str, str], *, strip: bool) -> Iterator[Finding]:
    """What renaming came to.

    Args:
        source: the checkpoint before it.
        renames: from old name to new, where they differ.
        strip: whether a prefix was to be stripped.
    """
    names = list(source.state_dict.everything)
    if renames:
        old, new = next(iter(renames.items()))
        yield Finding(
            code="renamed",
            severity="info",
            message=f"{len(renames)} of {len(names)} names changed, as {old!r} to {new!r}",
        )
    if strip and not renames:
        yield Finding(
            code="nothing-to-strip", severity="info", message=f"none of {len(names)} names carries the prefix"
        )
    elif strip and len(renames) < len(names):
        kept = next(name for name in names if name not in renames)
        yield Finding(
            code="mixed-prefix",
            severity="warning",
            message=f"{len(names) - len(renames)} of {len(names)} names did not carry the prefix, such as {kept!r}",
        )


def diagnose_losses(source: Checkpoint, result: Checkpoint, plan: Plan) -> Iterator[Finding]:
    """What the output does not hold, or holds in another form.

    Args:
        source: the checkpoint as it was read.
        result: as it is written.
        plan: of the output.
    """
    asked_for = result.rest is STATE_DICT
    program = source.origin.format in PROGRAMS
    left_out: list[str] = []
    if asked_for or program or plan.format == "safetensors":
        pairs = mapping_items(source.rest) or []
        left_out = [step(key) for key, value in pairs if value is not STATE_DICT]
    if left_out:
        more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        yield Finding(
            code="left-out",
            severity="info" if asked_for or program else "warning",
            message=f"not in the output: {', '.join(left_out[:8])}{more}",
            fix=None if asked_for or program else "write a .pth to keep them",
        )
    if plan.format != "safetensors":
        return
    gathered = sum(isinstance(made, Gather) for made in plan.steps)
    stored = [entry for name, entry in result.state_dict.items() if name not in plan.aliases and entry.nbytes]
    overlapping = len(stored) - len({id(entry.storage) for entry in stored})
    if gathered or overlapping:
        yield Finding(
            code="written-out",
            severity="info",
            message=f"{gathered} tensors were not contiguous and {overlapping} shared a storage; "
            "each has its own bytes in the output",
        )
