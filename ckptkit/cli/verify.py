"""``ckptkit verify PATH --model REF``: load into a reference model and run a forward check."""

from __future__ import annotations

from typing import Any

import click

from ckptkit import api
from ckptkit.cli.options import (
    common_options,
    echo,
    echo_findings,
    echo_json,
    json_errors,
    key_values,
    path_argument,
    printable,
    styler,
    with_examples,
)

__all__ = ["command"]


@click.command(
    "verify",
    epilog=with_examples(
        "ckptkit verify clean.safetensors --model torchvision:resnet18",
        "ckptkit verify head10.pth --model torchvision:resnet18 --model-arg num_classes=10",
        "ckptkit verify net.pth --model models/net.py:build --input-shape 1,3,64,64",
    ),
)
@path_argument("path")
@click.option(
    "--model", required=True, metavar="REF", help="torchvision:NAME, package.module:factory or path/to/file.py:factory."
)
@click.option(
    "--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="Argument of the factory; repeatable."
)
@click.option("--device", default="auto", show_default=True, metavar="DEV", help="cpu, cuda, cuda:N, mps or auto.")
@click.option("--dtype", metavar="DTYPE", help="Run the forward pass in this dtype, such as bfloat16.")
@click.option("--input-shape", "shapes", multiple=True, metavar="N,C,H,W", help="Shape of an input; repeatable.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the input.")
@click.option("--section", metavar="NAME", help="The weights to verify, where the file holds several.")
@click.option("--strip-module", is_flag=True, help="Take off wrapper prefixes first, as convert does.")
@click.option("--allow-missing", multiple=True, metavar="GLOB", help="Names that may be missing; repeatable.")
@click.option("--allow-unexpected", multiple=True, metavar="GLOB", help="Names that may be left over; repeatable.")
@click.option("--no-forward", is_flag=True, help="Check names, shapes and loading only.")
@common_options
def command(
    path: str,
    model: str,
    model_args: tuple[str, ...],
    shapes: tuple[str, ...],
    no_forward: bool,
    as_json: bool,
    quiet: bool,
    color: str,
    **options: Any,
) -> int:
    """Load PATH into a reference model, strictly, and run a forward pass.

    The checkpoint is read by ckptkit and never executed; the reference's own code is. Exit code 0:
    it fits and runs; 1: it does not; 2: it could not be checked.
    """
    with json_errors(as_json):
        report = api.verify(
            path,
            model=model,
            model_args=key_values("--model-arg", model_args),
            input_shapes=[_shape(text) for text in shapes],
            forward=not no_forward,
            **options,
        )
    if as_json:
        echo_json(report.to_dict())
    else:
        style = styler(color)
        echo_findings(list(report.findings), style)
        verdict = style("passed", fg="green", bold=True) if report.ok else style("FAILED", fg="red", bold=True)
        if not quiet:
            echo(f"{printable(path)}: {verdict} against {printable(model)}")
    return 0 if report.ok else 1


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise click.UsageError(
            f"--input-shape {text!r}: whole numbers separated by commas are expected, as 1,3,224,224"
        )
    return shape
