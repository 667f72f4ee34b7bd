"""``--storage-option`` and ``storage_options``: options for the file systems of other machines.

They apply to everything that a command reads while it runs (`ckptkit.remote.session`), so they need not be passed on.
They may be secrets: no message, report, receipt or printed fix contains them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from ckptkit.arguments import Option
from ckptkit.errors import RewriteError

__all__ = ["in_session", "local", "session_of", "storage_options", "taken_options", "typed_options"]

F = TypeVar("F", bound=Callable[..., Any])


def typed_options(given: Iterable[str]) -> dict[str, Any]:
    """What ``KEY=VALUE`` mean: JSON where the value is an object, an array, a number, true, false or null; else text.

    Dots in the key lead into mappings: ``client_kwargs.endpoint_url=http://localhost:9000``.

    Raises:
        RewriteError: one does not have that form, or a key is given twice; the message contains no value.
    """
    made: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        *above, last = names = key.split(".")
        if not equals or not all(names):
            raise RewriteError(f"--storage-option {key!r:.80}: expected KEY=VALUE")
        inside: Any = made
        for name in above:
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                break
        if not isinstance(inside, dict) or last in inside:
            raise RewriteError(f"--storage-option {key}: is given twice")
        inside[last] = _value(value)
    return made


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def taken_options(given: Any) -> dict[str, Any]:
    """The mapping of options given in Python.

    Raises:
        RewriteError: it is not a mapping, or a name in it is not text.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RewriteError("storage_options: expected a mapping of names to values, as {'anon': True}")
    return dict(given)


storage_options: Option[dict[str, Any]] = Option(
    "storage",
    {},
    "Option for the file system of a URL, as in fsspec: anon=true; repeatable.",
    'options for the file systems of URLs, as in fsspec: ``{"anon": True}``; see `open`',
    "KEY=VALUE",
    switch="--storage-option",
    taken=taken_options,
)
"""For everything that reads checkpoints; each class of options includes it."""


def local(given: Any) -> Any:
    """The given paths, with local paths for ``file://`` and ``local://``, and URLs without credentials.

    These are kept by the session that this is within (`ckptkit.remote.Session.shown`).  Of several each is taken so.
    """
    if isinstance(given, str):
        if "://" in given:
            from ckptkit.remote import current_session, is_url, local_path

            path, current = local_path(given), current_session()
            return path if current is None or not is_url(path) else current.shown(path)
    elif isinstance(given, list | tuple):
        return type(given)(map(local, given)) if _is_far(given) else given
    return given


def _is_far(given: Any) -> bool:
    """Whether it names URLs: they are few, and other strings do no harm."""
    if isinstance(given, list | tuple):
        return any(isinstance(each, str) and "://" in each for each in given)
    return isinstance(given, str) and "://" in given


def session_of(options: Mapping[str, Any] | None, *given: Any) -> AbstractContextManager[object]:
    """A session for a command that was given this, with its servers; nothing is imported if it asks none.

    Raises:
        RewriteError: the options are invalid.
    """
    taken = taken_options(options)
    if not taken and not any(map(_is_far, given)):
        return nullcontext()
    from ckptkit.remote import session

    return session(taken)


def in_session(function: F) -> F:
    """The function in a new session, or in the one that it is called in, with its ``storage_options``."""

    @functools.wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        values = (*given, *named.values())
        with session_of(named.get("storage_options"), *values):
            if any(map(_is_far, values)):
                given = tuple(map(local, given))
                named = {name: local(value) for name, value in named.items()}
            return function(*given, **named)

    return cast(F, called)
