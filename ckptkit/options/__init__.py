"""The options of ``convert``, ``verify``, ``diff`` and ``load_state_dict``, each declared once.

`ckptkit.arguments` defines declarations.  `ckptkit.cli.options` turns them into the command's options, and
`ckptkit.arguments.documented` into the list in the function's docstring.  Type checkers see the keywords in the
``TypedDict`` of each class (`ckptkit.options.keywords`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.options.rewriting import ConvertOptions, LoadOptions
from ckptkit.options.verifying import DiffOptions, VerifyOptions

if TYPE_CHECKING:
    from ckptkit.options.keywords import ConvertKeywords, DiffKeywords, LoadKeywords, VerifyKeywords

    __all__ = [
        "ConvertKeywords", "ConvertOptions", "DiffKeywords", "DiffOptions", "LoadKeywords", "LoadOptions",
        "VerifyKeywords", "VerifyOptions",
    ]  # fmt: skip
else:
    __all__ = ["ConvertOptions", "DiffOptions", "LoadOptions", "VerifyOptions"]
