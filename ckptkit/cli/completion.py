"""What the shell offers at Tab.

click completes commands, options, choices and file names by itself, for bash, zsh and fish; here is what only ckptkit
knows (models, codes, dtypes, containers, devices; the sections, tensors, parts, steps and metadata of the files that
are named on the line), and what bash needs for names with a colon.

Of a file no more is read than is to inspect it, and nothing of one that is far or compressed; where it cannot be read,
nothing is offered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from ckptkit import formats, places
from ckptkit.architectures.index import LIBRARIES, load
from ckptkit.arguments import DEVICE_TYPES
from ckptkit.casting import CAST_TARGETS
from ckptkit.checkpoint import Checkpoint
from ckptkit.cli.explain import titled
from ckptkit.codes import CODES, TOPICS, topic
from ckptkit.errors import CkptkitError
from ckptkit.formats.compression import compression_of
from ckptkit.formats.containers import FORMATS, format_named
from ckptkit.report import count_of, human_size, printable

__all__ = ["equip", "register"]

_MOST = 100
"""Names that are offered in full; of more, those of modules above them."""

_MOST_FILES = 4
"""Files of a line that are searched."""

_GLUE = (":", "=")
"""What bash takes for words of their own, by its ``COMP_WORDBREAKS``."""


Offered = Iterable[tuple[str, str]]
"""Values, each with what is said of it, where the shell shows that."""


# What is known without a file.


def _references() -> Offered:
    """The models that ckptkit has an index of."""
    return ((f"{library}:{row.name}", "") for library in LIBRARIES for row in load(library).rows())


def _subjects() -> Offered:
    """The topics and the codes of findings, each with its title."""
    yield from ((name, titled(topic(name))) for name in TOPICS)
    yield from ((code, CODES[code].title) for code in sorted(CODES))


def _containers() -> Offered:
    """Those that are written, by their names and endings."""
    for each in FORMATS:
        if (each if each.shards is None else format_named(each.shards)).writer is not None:
            yield each.name, each.title
            yield from ((ending.removeprefix("."), each.title) for ending in each.suffixes)


def _dtypes() -> Offered:
    return ((name, "") for name in CAST_TARGETS)


def _devices() -> Offered:
    return ((name, "") for name in ("auto", *DEVICE_TYPES))


# What files hold.


def _files() -> Iterator[str]:
    """The local files and folders that are named on the line, wherever on it they stand."""
    words = split_arg_string(os.environ.get("COMP_WORDS", ""))
    at = os.environ.get("COMP_CWORD", "")
    if at.isdecimal() and int(at) < len(words):
        del words[int(at)]
    paths = (os.path.expanduser(word) for word in words[2:] if not word.startswith("-") and not places.is_url(word))
    yield from [path for path in dict.fromkeys(paths) if os.path.exists(path)][:_MOST_FILES]


def _checkpoints() -> Iterator[Checkpoint]:
    for path in _files():
        with suppress(CkptkitError, OSError):
            if os.path.isfile(path) and compression_of(places.head(path, 16)) is not None:
                continue
            checkpoint, file = formats.read(path)
            with closing(file):
                yield checkpoint


def _sections() -> Offered:
    for checkpoint in _checkpoints():
        for each in checkpoint.sections:
            if each.is_weights and each.path:
                yield each.path, f"{count_of(each.tensors, 'tensor')}, {human_size(each.nbytes)}"


def _parts() -> Offered:
    """What there is beside the weights."""
    from ckptkit.rewrite.select import part_paths

    return ((path, "") for checkpoint in _checkpoints() for path in part_paths(checkpoint))


def _names() -> Offered:
    return ((name, "") for checkpoint in _checkpoints() for name in checkpoint.state_dict.everything)


def _prefixes() -> Offered:
    """What names begin with, up to each of their dots."""
    return ((name[: dot.end()], "") for name, _ in _names() for dot in re.finditer(r"\.", name))


def _metadata() -> Offered:
    return ((f"{key}=", "") for checkpoint in _checkpoints() for key in checkpoint.metadata if "=" not in key)


def _tags() -> Offered:
    """The steps that a training folder has: a wrong one is answered with them."""
    from ckptkit.formats.distributed.around import found_in

    for path in filter(os.path.isdir, _files()):
        try:
            found_in(path, ".none.")
        except CkptkitError as error:
            yield from ((name, "") for name in error.names)
        except OSError:
            continue


_OFFERED: dict[str, Callable[[], Offered]] = {
    **dict.fromkeys(("model", "like", "fits"), _references),
    **dict.fromkeys(("section", "section_a", "section_b", "as_key"), _sections),
    **dict.fromkeys(("tag", "tag_a", "tag_b"), _tags),
    **dict.fromkeys(("device", "map_location", "location"), _devices),
    **dict.fromkeys(("filters", "include", "exclude", "keep_dtype", "allow_missing", "allow_unexpected"), _names),
    "subject": _subjects,
    "to": _containers,
    "dtype": _dtypes,
    "leave_out": _parts,
    "strip_prefix": _prefixes,
    "metadata": _metadata,
}
"""What is offered for options and arguments, by their names."""

_FILES_TOO = ("model", "like", "fits")
"""Those that take files as well."""


def equip(command: click.Command) -> None:
    """Have the options of a command completed as `_OFFERED` says."""
    for parameter in command.params:
        if parameter.name in _OFFERED:
            setattr(parameter, "shell_complete", partial(_completed, parameter))  # noqa: B010 - it is a method


def _completed(parameter: click.Parameter, _: click.Context, incomplete: str) -> list[CompletionItem[str]]:
    name = parameter.name or ""
    found = {value: told for value, told in _OFFERED[name]() if value.startswith(incomplete)}
    words = [value for value in found if printable(value) == value]
    if _OFFERED[name] in (_names, _prefixes) and len(words) > _MOST:
        words = _shortened(words, len(incomplete))
    if not words and name in _FILES_TOO:
        return [CompletionItem(incomplete, type="file")]
    return [CompletionItem(word, help=found.get(word) or None) for word in words]


def _shortened(names: list[str], begin: int) -> list[str]:
    """Names cut after the first dots that distinguish them, beyond what was typed."""
    while True:
        ends = [name.find(".", begin) + 1 or len(name) for name in names]
        short = list(dict.fromkeys(name[:end] for name, end in zip(names, ends, strict=True)))
        if len(short) > 1 or ends[0] == len(names[0]):
            return short
        begin = ends[0]


class _Bash(BashComplete):
    """Puts together the words that bash takes apart at ``:`` and ``=``, and answers with what follows the last one."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, last = super().get_completion_args()
        words: list[str] = []
        is_open = False
        for word in (*args, last):
            if words and (is_open or word in _GLUE):
                words[-1] += word
            else:
                words.append(word)
            is_open = word in _GLUE
        incomplete = words.pop()
        option, equals, value = incomplete.partition("=")
        if equals and option.startswith("--"):
            words, incomplete = [*words, option], value
        self._there = incomplete.removesuffix(last) if last not in _GLUE else incomplete
        return words, incomplete

    def format_completion(self, item: CompletionItem[str]) -> str:
        return f"{item.type},{item.value.removeprefix(self._there)}"


def register(wanted: str) -> None:
    """Let click use what is here.

    Args:
        wanted: what the shell asks for, by click's convention: ``bash_source``, ``zsh_complete``.

    Raises:
        click.UsageError: it is none of click's shells.
    """
    add_completion_class(_Bash)
    shell, _, instruction = wanted.partition("_")
    if get_completion_class(shell) is None or instruction not in ("source", "complete"):
        raise click.UsageError(f"completion for {wanted!r}: expected bash_source, zsh_source or fish_source")
