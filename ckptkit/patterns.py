r"""Regular expressions that are compiled when they are first used.

Compiling one takes 0.1 to 1.5 ms, and there are more than a hundred: a command uses few of them, and starts faster
without the others.  `pattern` declares one where `re.compile` would; from its second use on it is as fast::

    _SHARD = pattern(r"(.+)-(\d{5})-of-(\d{5})", re.ASCII)
    _SHARD.fullmatch("model-00001-of-00002")

What is used whenever a file is read is compiled at once, as anywhere else.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, AnyStr, cast

__all__ = ["pattern"]


class _Pattern:
    """Has what ``re.Pattern`` has; `re`'s own functions do not take it in place of one.

    Several threads may use one for the first time: each finds the same.

    Args:
        text: the expression, ``str`` or ``bytes``.
        flags: as `re.compile` takes them.
    """

    def __init__(self, text: Any, flags: int) -> None:
        self._text, self._flags = text, flags

    @cached_property
    def _compiled(self) -> re.Pattern[Any]:
        return re.compile(self._text, self._flags)

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__[name] = getattr(self._compiled, name)  # asked for once
        return found


def pattern(text: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """A regular expression, compiled when it is first used.

    Args:
        text: the expression; what is wrong with it is raised at its first use.
        flags: as `re.compile` takes them.
    """
    return cast("re.Pattern[AnyStr]", _Pattern(text, flags))
