"""A check's report as the JSON document of the contract."""

from __future__ import annotations

import json

from ckptkit.released.results import CheckReport

__all__ = ["render"]


def render(report: CheckReport) -> str:
    """The document, on one line; non-ASCII is escaped, so that any terminal and any name will do."""
    return json.dumps(report.to_dict()) + "\n"
