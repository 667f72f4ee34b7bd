"""Arguments of a factory: from what a user typed to the values it takes."""

from __future__ import annotations

import ast

__all__ = ["literal"]


def literal(value: object) -> object:
    """A string that is a Python literal as its value; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value
