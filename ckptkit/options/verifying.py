"""The options of ``verify`` and ``diff``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ckptkit import places
from ckptkit.arguments import Option, Options, dtype, flag, pairs, path, shapes, text, texts, within
from ckptkit.errors import VerifyError
from ckptkit.options.rewriting import ConvertOptions, allow_part_option, progress_option, section_option, tag_option

if TYPE_CHECKING:
    from ckptkit.bytesource import Readable

__all__ = ["DiffOptions", "VerifyOptions"]


class VerifyOptions(Options):
    """The options of `ckptkit.verify`, in the order of ``ckptkit verify --help``."""

    command = "verify"

    model: Option[Any] = Option(
        "text",
        None,
        "torchvision:NAME, package.module:factory or path/to/file.py:factory.",
        '``"torchvision:resnet18"``, ``"package.module:factory"``, ``"path/to/file.py:factory"``, or an ``nn.Module`` '
        "or callable; may be omitted if ``golden`` names it, or if names and shapes identify the architecture",
        "REF",
    )
    model_args = pairs(
        "--model-arg",
        "Argument of the factory; repeatable.",
        "keyword arguments of the factory; strings are read as Python literals",
    )
    device = Option(
        "device",
        "auto",
        "cpu, cuda, cuda:N, mps or auto; cpu,cuda runs both and compares.",
        '``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``; ``"cpu,cuda"`` runs both and compares',
        "DEV",
        shows_default=True,
    )
    dtype = dtype("Run the forward pass in this dtype, such as bfloat16.", "torch name to run the forward pass in")
    input_shapes: Option[tuple[tuple[int, ...], ...]] = Option(
        "shapes",
        (),
        "Shape of an input; repeatable.",
        "one shape for each input; default from the reference, if known",
        "N,C,H,W",
        switch="--input-shape",
        taken=lambda given: shapes("--input-shape", given),
    )
    input = path(
        "FILE",
        "File with the input tensors, in any container, named 0, 1, … or by keyword.",
        "a file, in any container, with the inputs' values: by position (``0``, ``1``) or by keyword",
    )
    seed = Option(
        "integer", 0, "Seed of the input.", "seed of the input, and of the factory's random numbers", shows_default=True
    )
    section = section_option("verify")
    tag = tag_option("``path`` is a training folder; see `open`")
    tp_rules = ConvertOptions.tp_rules
    strip_module = flag("Remove wrapper prefixes first, as convert does.", "remove wrapper prefixes first")
    allow_missing = texts(
        "GLOB", "Names that may be missing from the file; repeatable.", "glob patterns of names that may be missing"
    )
    allow_unexpected = texts(
        "GLOB", "Names that the file may have in addition; repeatable.", "glob patterns of names that may be left over"
    )
    allow_part = allow_part_option("a file")
    against = path(
        "OTHER",
        "Another checkpoint of the same model, whose outputs must agree.",
        "another checkpoint of the same model, in any container and with any wrapper prefix, whose outputs must agree",
    )
    golden = path(
        "FILE",
        "Recorded outputs that these must match; also names the model.",
        "a file of recorded outputs that these must match",
    )
    write_golden = path("FILE", "Record the outputs, for --golden.", "a file to record these in")
    atol = within(
        "--atol",
        "Absolute difference allowed; default: the noise measured.",
        "absolute difference allowed between outputs; default: several times the measured noise",
    )
    rtol = within(
        "--rtol",
        "The same as a share of the largest output; default by dtype.",
        "the same, as a share of their largest magnitude; the two are added",
    )
    force = flag("Let --write-golden replace a file.", "whether ``write_golden`` may replace a file")
    forward = flag("Check names, shapes and loading only.", "whether to run the forward pass", default=True)
    unsafe_load = flag(
        "Run the pickled model itself: RUNS CODE FROM THE FILE. Not with --model.",
        "run the pickled model itself instead of a reference: **runs code from the file**, after printing on stderr "
        "what it imports. A hostile file is refused",
    )
    ignore_checksums = ConvertOptions.ignore_checksums
    storage_options = ConvertOptions.storage_options

    def _check(self) -> None:
        if self.input is not None and self.input_shapes:
            raise VerifyError(
                "--input and --input-shape: inputs are either read from a file or generated; give only one of them"
            )
        if not self.forward:
            needing = ("against", "golden", "write_golden")
            useless = [self.declared[name].typed for name in needing if getattr(self, name) is not None]
            if useless:
                raise VerifyError(f"{', '.join(useless)}: with --no-forward nothing is computed; omit one of them")
        if self.unsafe_load and self.model is not None:
            raise VerifyError(
                "--model and --unsafe-load: verify runs either a reference model or the pickled one; give only one "
                "of them"
            )
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise VerifyError(f"--seed {self.seed:.6g}: torch accepts whole numbers from -2**63 to 2**64 - 1")


class DiffOptions(Options):
    """The options of `ckptkit.diff`, in the order of ``ckptkit diff --help``."""

    command = "diff"

    section = text(
        "NAME",
        "Weights to compare in both files, and nothing else.",
        "path of the weights to compare in both; nothing beside named weights is compared",
    )
    section_a = text("NAME", "Weights to compare in A.", "the same of ``a`` alone")
    section_b = text("NAME", "Weights to compare in B.", "the same of ``b`` alone")
    tag = tag_option("``a`` or ``b``, or each, is a training folder")
    tp_rules = ConvertOptions.tp_rules
    tag_a = text("NAME", "Step to use in A.", "the same of ``a`` alone")
    tag_b = text("NAME", "Step to use in B.", "the same of ``b`` alone")
    strip_module = flag(
        "Remove wrapper prefixes from the names of both first.", "remove wrapper prefixes from both first"
    )
    atol = within(
        "--atol",
        "Absolute difference that counts as unchanged.",
        "absolute difference between elements that counts as unchanged; if neither is given, bits decide",
    )
    rtol = within(
        "--rtol",
        "The same, as a share of the larger magnitude.",
        "the same, as a share of the larger magnitude of the two; the two are added",
    )
    allow_part = allow_part_option("either")
    strict = flag(
        "Make everything in the files count for the exit code, not only tensors.",
        "whether metadata, ties, parts that only one file has, and every value in the files' trees count for "
        "`Difference.ok`",
    )
    progress = progress_option("called with the bytes processed so far and the total")
    ignore_checksums = ConvertOptions.ignore_checksums
    storage_options = ConvertOptions.storage_options

    def steps(self, a: Readable, b: Readable) -> Iterator[tuple[str | None, str | None]]:
        """The step that is meant of each, and its rules: of one tag, or one file of rules, for both in each folder."""
        folders = [isinstance(path, (str, os.PathLike)) and places.isdir(os.fsdecode(path)) for path in (a, b)]
        for is_folder, own in zip(folders, (self.tag_a, self.tag_b), strict=True):
            is_meant = is_folder or not any(folders)
            yield own or (self.tag if is_meant else None), self.tp_rules if is_meant else None
