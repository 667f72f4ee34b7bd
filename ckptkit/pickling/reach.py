"""Calls that reach further than the name that is called: by what they are given.

- ``getattr(a.B, "c")`` is the name ``a.B.c``, and is judged as one: Python pickles bound methods,
  nested classes and enumeration members so, and attackers ``getattr(torch.serialization, "os")``.
- ``reduce_graph_module(body, imports)`` of ``torch.fx`` runs ``imports + body["_code"]`` as Python
  text, function body included (``torch/fx/graph_module.py`` traces it).  That is how every FX
  GraphModule is pickled, so the call needs trust but is not hostile by itself.  It is where the
  text holds what torch never generates there: anything but imports in the first part, anything but
  one function (and ``wrap("name")``) in the second, or dangerous names in either.

The text is held against these patterns; it is neither compiled nor parsed.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial

from ckptkit.pickling.dangerous import is_dangerous, is_dangerous_attribute
from ckptkit.pickling.inert import Global, Object, mapping_items

__all__ = ["Reach"]

_MAX_CHAIN = 8
"""Attributes of attributes: nested classes go two or three deep."""

_MAX_TEXT = 16 << 20
"""Characters of generated code in one pickle; a large graph has one million."""

_IMPORT = re.compile(r"import ([\w.]+)(?: as \w+)?|from ([\w.]+) import (\w+)(?: as \w+)?")
_OTHER_TOP_LEVEL = re.compile(
    r"NoneType = type\(None\)|\w+ = '[^'\\]*'|\w+ = \"[^\"\\]*\"|#.*|(?:\w+\.)*wrap\(\"\w+\"\)|wrap\('\w+'\)"
    r"|def forward\(.*|\).*:"
)
_WORD = re.compile(r"(\.[\s\\]*|['\"])?(?<!\w)([^\W\d]\w*)")
_BUILTINS = frozenset(
    {"__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "globals", "locals", "open"}
)
"""What generated code neither calls nor gives a variable's name."""


class Reach:
    """Looks at such calls in one pickle.

    Args:
        name: from module and name to the pickle's node for it; what is reached is listed so.
    """

    def __init__(self, name: Callable[[str, str], Global]) -> None:
        self._name = name
        self._text_left = _MAX_TEXT

    def watcher(self, callee: Global) -> Callable[[tuple[object, ...]], object] | None:
        """What is to be called with the arguments of each call of a name; ``None``: nothing."""
        if callee.name == "getattr" and callee.module in ("builtins", "__builtin__"):
            return partial(self._getattr, callee)
        if callee.name == "reduce_graph_module" and callee.module.startswith("torch.fx."):
            return partial(self._graph_module, callee)
        return None

    def _getattr(self, callee: Global, args: tuple[object, ...]) -> object:
        names: list[str] = []
        node: object = Object("reduce", callee, args)
        while isinstance(node, Object) and isinstance(node.cls, Global) and node.cls.name == "getattr":
            if len(names) >= _MAX_CHAIN or len(node.args) < 2 or not isinstance(node.args[1], str):
                callee.offence = "an attribute whose name is computed, or a chain of attributes"
                return NotImplemented
            names.append(node.args[1])
            node = node.args[0]
        if isinstance(node, Object):
            node = node.cls
        if isinstance(node, Global):
            self._name(node.module, ".".join((node.name, *reversed(names))))
        elif any(is_dangerous_attribute(part) for name in names for part in name.split(".")):
            callee.offence = f"the attribute {names[0]!r:.80}"
        return NotImplemented

    def _graph_module(self, callee: Global, args: tuple[object, ...]) -> object:
        body = dict(_strings(args[0])) if args else {}
        code = body.get("_code") or body.get("code")
        if len(args) != 2 or not isinstance(args[1], str) or not isinstance(code, str):
            callee.offence = "runs text that is not there, or is computed"
            return NotImplemented
        self._text_left -= len(args[1]) + len(code)
        if self._text_left < 0:
            callee.offence = f"runs more than {_MAX_TEXT:,} characters of text"
        elif not callee.offence:
            callee.offence = _offence(args[1] + code)
        return NotImplemented


def _strings(node: object) -> list[tuple[str, object]]:
    return [(key, value) for key, value in mapping_items(node) or [] if isinstance(key, str)]


def _offence(text: str) -> str:
    """What is in generated code that torch never generates; ``""``: nothing."""
    text = unicodedata.normalize("NFKC", text)  # as Python does with identifiers
    for line in text.splitlines():
        if not line or line[0] in " \t":
            continue
        found = _IMPORT.fullmatch(line)
        if found is not None:
            module, name = found[1] or found[2], found[3] or ""
            if is_dangerous(module, name or "_"):
                return f"its text says {line[:80]!r}"
        elif not _OTHER_TOP_LEVEL.fullmatch(line):
            return f"its text is more than imports and one function: {line[:80]!r}"
    for found in _WORD.finditer(text):
        before, word = found[1] or "", found[2]
        # Parameters may have any name ("signal", "input"); attributes that are modules are never used.
        if before.startswith(".") or (word.startswith("__") and word.endswith("__")):
            if is_dangerous_attribute(word):
                return f"its text names {word[:80]!r}"
        elif word in _BUILTINS and not before:
            return f"its text names {word[:80]!r}"
    return ""
