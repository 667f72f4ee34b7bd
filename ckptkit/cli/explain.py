"""``ckptkit explain CODE``: what a finding code means and how to fix it."""

from __future__ import annotations

from difflib import get_close_matches

import click

from ckptkit.cli import ending
from ckptkit.cli.completion import complete_code
from ckptkit.cli.options import common_options, echo, echo_json, styler, with_examples
from ckptkit.codes import CODES
from ckptkit.report import SCHEMA_VERSION

__all__ = ["command"]


@click.command("explain", epilog=with_examples("ckptkit explain module-prefix", "ckptkit explain"))
@click.argument("code", required=False, shell_complete=complete_code)
@common_options
def command(code: str | None, as_json: bool, quiet: bool, color: str) -> int:
    """Explain a finding's CODE; without one, list all codes."""
    style = styler(color)
    if code is not None and code not in CODES:
        near = get_close_matches(code, CODES, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; 'ckptkit explain' lists all"
        raise click.UsageError(f"there is no code {code!r}{hint}")
    verdict = ending.verdict(0)
    if as_json:
        shown = CODES if code is None else {code: CODES[code]}
        echo_json({"schema_version": SCHEMA_VERSION, "codes": {k: v._asdict() for k, v in shown.items()}})
    elif code is None:
        for name in sorted(CODES):
            echo(f"{name.ljust(max(map(len, CODES)))}  {CODES[name].title}")
    else:
        title, meaning, remedy = CODES[code]
        echo(f"{style(code, bold=True)}: {title}")
        echo(f"\n{meaning}")
        if remedy != "-":
            echo(f"\n{remedy}")
    return verdict
