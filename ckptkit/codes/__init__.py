"""Every finding code: what it means and how to fix it.  ``ckptkit explain CODE`` prints it.

Codes are stable: scripts match on them.  They stand by the command that tells them.
"""

from __future__ import annotations

from ckptkit.codes import of_conversion, of_differences, of_files, of_released, of_verification
from ckptkit.codes.explanation import Explanation

__all__ = ["CODES", "Explanation"]

_PARTS = (of_files.CODES, of_conversion.CODES, of_verification.CODES, of_differences.CODES, of_released.CODES)

CODES: dict[str, Explanation] = {code: explanation for part in _PARTS for code, explanation in part.items()}
"""By code.  No code is in two parts; a test counts them."""
