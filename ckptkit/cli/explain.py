"""``ckptkit explain CODE``: what a finding code means and how to fix it; and what the shell offers at Tab.

click completes commands, options, choices and file names by itself, for bash, zsh and fish; here is what only
ckptkit knows (references of models, codes of findings), and what bash needs for names with a colon.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

from ckptkit.architectures.index import LIBRARIES, load
from ckptkit.cli import ending
from ckptkit.cli import options as ui
from ckptkit.cli.tables import wrapped
from ckptkit.codes import CODES
from ckptkit.report import SCHEMA_VERSION

if TYPE_CHECKING:
    from ckptkit.documents import ExplainDocument

__all__ = ["RENDERERS", "command", "complete_code", "complete_reference", "register", "text"]


_GLUE = (":", "=")
"""What bash takes for words of their own, by its ``COMP_WORDBREAKS``."""


def complete_reference(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The models that ckptkit has an index of, and files for what is none: ``path/to/file.py:factory``."""
    known = {f"{library}:{row.name}" for library in LIBRARIES for row in load(library).rows()}
    found = sorted(name for name in known if name.startswith(incomplete))
    return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]


def complete_code(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The codes of findings, each with its title."""
    return [CompletionItem(code, help=CODES[code].title) for code in sorted(CODES) if code.startswith(incomplete)]


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
    """A code, or the list of all with their titles."""
    codes = document["codes"]
    if len(codes) > 1:
        widest = max(map(len, codes))
        for name in sorted(codes):
            yield from wrapped(f"{name:{widest}}  {codes[name]['title']}", view.width, widest + 2)
        return
    for name, said in codes.items():
        yield from wrapped(f"{view.style(name, bold=True)}: {said['title']}", view.width)
        for part in (said["meaning"], said["remedy"]):
            if part != "-":
                yield ""
                yield from wrapped(part, None if part.startswith("ckptkit ") else view.width, 0)  # to copy whole


RENDERERS: dict[str, ui.Renderer] = {"text": text, "markdown": ui.later("markdown.explain")}


@click.command("explain", epilog=ui.with_examples("ckptkit explain module-prefix", "ckptkit explain"))
@click.argument("code", required=False, shell_complete=complete_code)
@ui.common_options(RENDERERS)
def command(code: str | None, output: str, quiet: bool, color: str) -> int:
    """Explain a finding's CODE; without one, list all codes."""
    if code is not None and code not in CODES:
        near = get_close_matches(code, CODES, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; 'ckptkit explain' lists all"
        raise click.UsageError(f"there is no code {code!r}{hint}")
    verdict = ending.verdict(0)
    shown = CODES if code is None else {code: CODES[code]}
    document: ExplainDocument = {
        "schema_version": SCHEMA_VERSION,
        "codes": {
            name: {"title": said.title, "meaning": said.meaning, "remedy": said.remedy} for name, said in shown.items()
        },
    }
    ui.show(document, output, RENDERERS, ui.View(ui.styler(color), ui.terminal_width()))
    return verdict
