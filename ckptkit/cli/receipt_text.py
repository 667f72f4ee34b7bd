"""What a file says about its making, in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptkit.cli.options import printable
from ckptkit.normalize.receipts import KEY, earlier
from ckptkit.report import count_of

__all__ = ["receipt_line"]

_MAX_OPERATIONS = 160
"""Characters."""

_SHOWN_DIGITS = 12
"""Of a SHA-256: enough to tell files apart."""


def receipt_line(metadata: Mapping[str, Any]) -> str:
    """The last of the receipts (`ckptkit.conversion.receipt`); empty where there is none."""
    receipts = [receipt for receipt in earlier(metadata) if isinstance(receipt, dict)]
    if not receipts:
        return ""
    last = receipts[-1]
    text = f"ckptkit {_shown(last.get('ckptkit'))} from {_shown(last.get('format'))}"
    digest = last.get("sha256")
    if isinstance(digest, dict):
        text += f" of {count_of(len(digest), 'file')}"
    elif isinstance(digest, str):
        text += f", sha256 {_shown(digest[:_SHOWN_DIGITS])}…"
    operations = last.get("operations")
    if isinstance(operations, list) and operations:
        listed = ", ".join(map(str, operations))
        text += f": {printable(listed[:_MAX_OPERATIONS])}{'…' if len(listed) > _MAX_OPERATIONS else ''}"
    before = len(receipts) - 1
    return text + (f"; {before:,} earlier (--json shows all under {KEY})" if before else "")


def _shown(value: object) -> str:
    return printable(f"{value}"[:40]) if isinstance(value, str) else "?"
