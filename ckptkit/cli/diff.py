"""``ckptkit diff A B``: what changed between two checkpoints, whatever their containers."""

from __future__ import annotations

from typing import Any

import click

from ckptkit import api
from ckptkit.cli import diff_text, ending
from ckptkit.cli.ending import progress_line
from ckptkit.cli.options import (
    common_options,
    echo,
    echo_json,
    json_errors,
    options_of,
    path_argument,
    styler,
    terminal_width,
    with_examples,
)
from ckptkit.options import DiffOptions

__all__ = ["command"]


_top = click.option(
    "--top", type=click.IntRange(0), default=10, show_default=True, metavar="N", help="Rows of each list."
)
_format = click.option(
    "--format", "output", type=click.Choice(["text", "json", "markdown"]), default="text", help="Output."
)


@click.command(
    "diff",
    epilog=with_examples(
        "ckptkit diff epoch10.pth epoch11.pth",
        "ckptkit diff original.pth converted.safetensors",
        "ckptkit diff ddp.pth clean.safetensors --strip-module",
        "ckptkit diff resume.pth ema.safetensors --section-a ema",
        "ckptkit diff gpu.pth cpu.pth --rtol 1e-5 --atol 1e-8",
        "ckptkit diff main.pth pull_request.pth --format markdown",
    ),
)
@path_argument("a")
@path_argument("b")
@options_of(DiffOptions, behind={"rtol": _top, "strict": _format})
@common_options
def command(
    a: str,
    b: str,
    top: int,
    output: str,
    progress: bool | None,
    as_json: bool,
    quiet: bool,
    color: str,
    **options: Any,
) -> int:
    """Compare the checkpoints A and B: names, shapes, dtypes and every bit of every tensor.

    Exit code 0: the tensors are the same; 1: one differs, or could not be compared; 2: it could not be done.
    Tensors that both hold elsewhere (optimizer moments, averaged weights, attributes of modules) are compared too. All
    else that differs is listed, and decides only with --strict: parts that only one holds, metadata, ties, and every
    value, class and key in the files' trees. Containers, devices and the order of tensors' names never do.

    With --atol or --rtol an element is unchanged where |b - a| <= atol + rtol * max(|a|, |b|).
    """
    as_json = as_json or output == "json"
    with json_errors(as_json), progress_line(progress, quiet=quiet or as_json) as update:
        difference = api.diff(a, b, progress=update, **options)
    code = ending.verdict(0 if difference.ok else 1)
    document = difference.to_dict()
    if as_json:
        echo_json(document)
    elif output == "markdown":
        from ckptkit.cli.diff_text import markdown

        for line in markdown(document, top=top):
            echo(line)
    else:
        for line in diff_text.text(document, styler(color), top=top, width=terminal_width()):
            echo(line)
    return code
