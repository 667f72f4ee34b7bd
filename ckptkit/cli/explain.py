"""``ckptkit explain``: what a finding code means and how to fix it; topics; and what the shell offers at Tab.

click completes commands, options, choices and file names by itself, for bash, zsh and fish; here is what only
ckptkit knows (references of models, codes of findings), and what bash needs for names with a colon.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

from ckptkit.architectures.index import LIBRARIES, load
from ckptkit.cli import ending
from ckptkit.cli import options as ui
from ckptkit.cli.tables import columns
from ckptkit.codes import CODES, TOPICS, topic
from ckptkit.nearness import did_you_mean
from ckptkit.report import SCHEMA_VERSION

if TYPE_CHECKING:
    from ckptkit.documents import ExplainDocument

__all__ = ["RENDERERS", "command", "complete_code", "complete_reference", "register", "text", "titled"]


_GLUE = (":", "=")
"""What bash takes for words of their own, by its ``COMP_WORDBREAKS``."""

_CONTAINERS = "<!-- table: containers -->"
"""Where the table of containers stands in a topic."""

_STRESSED = re.compile(r"`[^`]*`|\*{1,2}([^*]+)\*{1,2}")
"""Code, which stays as it is, or what stands between asterisks in prose."""


def complete_reference(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The models that ckptkit has an index of, and files for what is none: ``path/to/file.py:factory``."""
    known = {f"{library}:{row.name}" for library in LIBRARIES for row in load(library).rows()}
    found = sorted(name for name in known if name.startswith(incomplete))
    return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]


def complete_code(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The topics and the codes of findings, each with its title."""
    titles = {name: titled(topic(name)) for name in TOPICS} | {code: CODES[code].title for code in sorted(CODES)}
    return [CompletionItem(name, help=title) for name, title in titles.items() if name.startswith(incomplete)]


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


def text(document: ExplainDocument, view: ui.View) -> Iterator[str]:
    """A code, a topic, or the lists of all with their titles."""
    codes, topics = document["codes"], document.get("topics", {})
    if codes and topics:
        yield view.style("topics", bold=True)
        yield from columns([[name, titled(topics[name])] for name in topics], [], "ll")
        yield f"\n{view.style('codes of findings', bold=True)}"
        yield from columns([[name, codes[name]["title"]] for name in sorted(codes)], [], "ll")
        return
    for name, said in codes.items():
        yield f"{view.style(name, bold=True)}: {said['title']}"
        yield from (f"\n{part}" for part in (said["meaning"], said["remedy"]) if part != "-")
    for said_of_it in topics.values():
        yield from _plain(said_of_it, view)


def titled(topic: str) -> str:
    """The title of a topic's text."""
    return topic.partition("\n")[0].partition(": ")[2]


def _plain(markdown: str, view: ui.View) -> Iterator[str]:
    """A topic on a terminal: heads and what is stressed are bold, commands are indented, tables have columns."""
    in_block = False
    table: list[list[str]] = []
    for line in (*markdown.splitlines(), ""):
        if line.startswith("|"):
            table.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
            continue
        if table:
            head, *rows = columns(table[2:], table[0], "l" * len(table[0]))
            yield from (view.style(head, bold=True), *rows)
            table = []
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            yield f"    {line}".rstrip()
        elif line.startswith("#"):
            yield view.style(line.lstrip("# "), bold=True)
        else:
            yield _STRESSED.sub(lambda found: view.style(found[1], bold=True) if found[1] else found[0], line)


def _filled(markdown: str) -> str:
    """A topic with the tables in it that are made from the code."""
    from ckptkit.formats.containers import FORMATS, format_named

    if _CONTAINERS not in markdown:
        return markdown
    rows = ["| container | what writes it | written |", "|---|---|---|"]
    for each in FORMATS:
        is_written = (each if each.shards is None else format_named(each.shards)).writer is not None
        rows.append(f"| `{each.name}` | {each.title} | {'yes' if is_written else ''} |")
    return markdown.replace(_CONTAINERS, "\n".join(rows))


RENDERERS: dict[str, ui.Renderer] = {"text": text, "markdown": ui.later("markdown.explain")}


@click.command(
    "explain", epilog=ui.with_examples("ckptkit explain module-prefix", "ckptkit explain trust", "ckptkit explain")
)
@click.argument("subject", metavar="[CODE|TOPIC]", required=False, shell_complete=complete_code)
@ui.common_options(RENDERERS)
def command(subject: str | None, output: str, quiet: bool, color: str) -> int:
    """Explain a finding's CODE, or a TOPIC; without one, list all of both."""
    if subject is not None and subject not in CODES and subject not in TOPICS:
        hint = did_you_mean(subject, (*TOPICS, *CODES)) or "; 'ckptkit explain' lists all"
        raise click.UsageError(f"there is no code or topic {subject!r}{hint}")
    verdict = ending.verdict(0)
    shown = CODES if subject is None else {subject: CODES[subject]} if subject in CODES else {}
    topics = TOPICS if subject is None else (subject,) if subject in TOPICS else ()
    document: ExplainDocument = {
        "schema_version": SCHEMA_VERSION,
        "codes": {
            name: {"title": said.title, "meaning": said.meaning, "remedy": said.remedy} for name, said in shown.items()
        },
        "topics": {name: _filled(topic(name)) for name in topics},
    }
    ui.show(document, output, RENDERERS, ui.View(ui.styler(color)))
    return verdict
