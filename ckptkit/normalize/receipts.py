"""The receipts in a checkpoint's string metadata; `ckptkit.conversion.receipt` says what is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping

__all__ = ["KEY", "earlier"]

KEY = "ckptkit_receipts"
"""The key of the metadata."""


def earlier(metadata: Mapping[str, object]) -> list[object]:
    """The receipts a file came with; none where what stands there is not a list."""
    text = metadata.get(KEY)
    try:
        receipts = json.loads(text) if isinstance(text, str) else []
    except (ValueError, RecursionError):
        return []
    return receipts if isinstance(receipts, list) else []
