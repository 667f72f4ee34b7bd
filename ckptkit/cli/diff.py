"""``ckptkit diff A B``: what changed between two checkpoints, whatever their containers."""

from __future__ import annotations

from typing import Any

import click

from ckptkit import api
from ckptkit.cli import diff_text, ending
from ckptkit.cli.ending import progress_line
from ckptkit.cli.options import (
    allow_part_option,
    common_options,
    echo,
    echo_json,
    ignore_checksums,
    json_errors,
    path_argument,
    styler,
    terminal_width,
    tolerance_option,
    with_examples,
)

__all__ = ["command"]


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
@click.option("--section", metavar="NAME", help="The weights to compare, in both; nothing beside them is.")
@click.option("--section-a", metavar="NAME", help="The weights of A.")
@click.option("--section-b", metavar="NAME", help="The weights of B.")
@click.option("--strip-module", is_flag=True, help="Take wrapper prefixes off the names of both first.")
@tolerance_option("--atol", "Differences up to this count as unchanged.")
@tolerance_option("--rtol", "The same as a share of the larger magnitude.")
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, metavar="N", help="Rows of each list.")
@allow_part_option
@click.option("--strict", is_flag=True, help="Everything in the files counts for the exit code, not the tensors alone.")
@click.option("--format", "output", type=click.Choice(["text", "json", "markdown"]), default="text", help="Output.")
@click.option("--progress/--no-progress", default=None, help="Progress on stderr; default: on a terminal.")
@ignore_checksums
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
