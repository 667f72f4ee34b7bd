"""``ckptkit explain``: what a finding code means and how to fix it; topics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from ckptkit.cli import ending
from ckptkit.cli import options as ui
from ckptkit.cli.tables import columns, wrapped
from ckptkit.codes import CODES, TOPICS, topic
from ckptkit.nearness import did_you_mean
from ckptkit.report import SCHEMA_VERSION

if TYPE_CHECKING:
    from ckptkit.documents import ExplainDocument

__all__ = ["RENDERERS", "command", "text", "titled"]


_CONTAINERS = "<!-- table: containers -->"
"""Where the table of containers is in a topic."""

_STRESSED = re.compile(r"`[^`]*`|\*{1,2}([^*]+)\*{1,2}")
"""Code, which stays as it is, or what is between asterisks in prose."""


def text(document: ExplainDocument, view: ui.View) -> Iterator[str]:
    """A code, a topic, or the lists of all with their titles."""
    codes, topics = document["codes"], document.get("topics", {})
    if codes and topics:
        yield view.style("topics", bold=True)
        yield from _titles({name: titled(topics[name]) for name in topics}, view)
        yield f"\n{view.style('codes of findings', bold=True)}"
        yield from _titles({name: codes[name]["title"] for name in sorted(codes)}, view)
        return
    for name, said in codes.items():
        yield from wrapped(f"{view.style(name, bold=True)}: {said['title']}", view.width)
        for part in (said["meaning"], said["remedy"]):
            if part != "-":
                yield ""
                yield from wrapped(part, None if part.startswith("ckptkit ") else view.width, 0)  # to copy whole
    for said_of_it in topics.values():
        yield from _plain(said_of_it, view)


def _titles(titles: Mapping[str, str], view: ui.View) -> Iterator[str]:
    widest = max(map(len, titles))
    for name, title in titles.items():
        yield from wrapped(f"{name:{widest}}  {title}", view.width, widest + 2)


def titled(topic: str) -> str:
    """The title of a topic's text."""
    return topic.partition("\n")[0].partition(": ")[2]


def _plain(markdown: str, view: ui.View) -> Iterator[str]:
    """A topic on a terminal: heads and what is stressed are bold, commands are indented, tables have columns."""
    in_block = False
    table: list[list[str]] = []
    for line in (*(markdown if view.width is None else _in_paragraphs(markdown)).splitlines(), ""):
        if line.startswith("|"):
            table.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
            continue
        if table:
            head, *rows = columns(table[2:], table[0], "n" + "l" * (len(table[0]) - 1), view.width)
            yield from (view.style(head, bold=True), *rows)
            table = []
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            yield f"    {line}".rstrip()
        elif line.startswith("#"):
            yield from wrapped(view.style(line.lstrip("# "), bold=True), view.width)
        else:
            stressed = _STRESSED.sub(lambda found: view.style(found[1], bold=True) if found[1] else found[0], line)
            yield from wrapped(stressed, view.width, 2 * line.startswith("- "))


def _in_paragraphs(markdown: str) -> str:
    """A topic whose paragraphs are one line each; blocks of commands are as they were."""
    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    blocks[::2] = [re.sub(r"(?<=[^\n|])\n *(?![ \n|#-]|\d+\. |$)", " ", text) for text in blocks[::2]]
    return "".join(blocks)


def _filled(markdown: str) -> str:
    """A topic with the tables in it that are made from the code."""
    if _CONTAINERS not in markdown:
        return markdown
    from ckptkit.formats.containers import FORMATS, format_named

    rows = ["| container | comes from | also written |", "|---|---|---|"]
    for each in FORMATS:
        is_written = (each if each.shards is None else format_named(each.shards)).writer is not None
        rows.append(f"| `{each.name}` | {each.title} | {'yes' if is_written else ''} |")
    return markdown.replace(_CONTAINERS, "\n".join(rows))


RENDERERS: dict[str, ui.Renderer] = {"text": text, "markdown": ui.later("markdown.explain")}


@click.command(
    "explain", epilog=ui.with_examples("ckptkit explain module-prefix", "ckptkit explain trust", "ckptkit explain")
)
@click.argument("subject", metavar="[CODE|TOPIC]", required=False)
@ui.common_options(RENDERERS)
def command(subject: str | None, output: str, quiet: bool, color: str) -> int:
    """Explain the CODE of a finding or a TOPIC; without one, list them all."""
    if subject is not None and subject not in CODES and subject not in TOPICS:
        hint = did_you_mean(subject, (*TOPICS, *CODES)) or "; 'ckptkit explain' lists all of them"
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
    ui.show(document, output, RENDERERS, ui.View(ui.styler(color), ui.terminal_width()))
    return verdict
