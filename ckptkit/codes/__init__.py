"""Every finding code: what it means and how to fix it.  ``ckptkit explain CODE`` prints it.

Codes are stable: scripts match on them.  They stand with the commands that report them.
"""

from __future__ import annotations

from ckptkit.codes import of_commands, of_files, of_verification
from ckptkit.report import Explanation

__all__ = ["CODES", "Explanation"]

_PARTS = (of_files.CODES, of_commands.CONVERSION, of_verification.CODES, of_commands.DIFFERENCES, of_commands.CHECKS)

CODES: dict[str, Explanation] = {code: explanation for part in _PARTS for code, explanation in part.items()}
"""By code.  No code is in two parts; a test counts them."""
