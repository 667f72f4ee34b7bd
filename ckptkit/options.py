"""The options of ``convert``, ``verify`` and ``diff``, each declared once, for Python and the command line.

`ckptkit.arguments` says what a declaration is.  `ckptkit.cli.options` makes the command's options of them, and
`ckptkit.arguments.documented` the list in the function's docstring.  Type checkers see the keywords in the
``TypedDict`` of each class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from ckptkit.arguments import Option, Options, count, dtype, flag, pairs, path, several, shapes, text, texts, within
from ckptkit.errors import RewriteError, VerifyError

if TYPE_CHECKING:
    import torch

    from ckptkit.rewrite.like import Like
    from ckptkit.rewrite.rename import Renaming
    from ckptkit.rewrite.storages import LocationMap, TiedPolicy
    from ckptkit.transfer.workers import Progress

__all__ = ["ConvertOptions", "DiffOptions", "LoadOptions", "VerifyOptions"]


def _progress(meaning: str) -> Option[Progress | None]:
    return Option("switch", None, "Progress on stderr; default: on a terminal.", meaning)


def _allow_part(which: str) -> Option[bool]:
    line = "Take one part of a sharded checkpoint as it is, without the others."
    return flag(line, f"whether {which} may be a part of a checkpoint that lies in several files")


def _section(verb: str, told: str = "where the file holds several") -> Option[str | None]:
    return text("NAME", f"The weights to {verb}, {told}.", f"path of the weights, {told}")


def _tag(which: str) -> Option[str | None]:
    return text("NAME", "Which of several steps in a training folder.", f"which of several steps, where {which}")


class ConvertOptions(Options):
    """What `ckptkit.convert` can be asked for, in the order of ``ckptkit convert --help``."""

    command = "convert"

    strip_module = flag(
        "Take off every wrapper prefix, nested ones too: module., _orig_mod. ...",
        "take off every wrapper prefix (``module.``, ``_orig_mod.``)",
    )
    add_module = flag("Put one module. before every name.", "then put one ``module.`` before every name")
    strip_prefix = text(
        "P", "Strip one leading prefix of whole segments.", "then strip this one leading prefix of whole segments"
    )
    add_prefix = text("P", "Put a prefix before every name.", "then put this prefix before every name")
    rename: Option[Renaming] = Option(
        "texts",
        (),
        "Rename as re.sub does; repeatable, in order.",
        'then apply rules, in order: ``"REGEX=>REPLACEMENT"`` or pairs of both; or a dict of whole names, or a '
        "function from a name to its new one; see `ckptkit.Rename`",
        "REGEX=>REPLACEMENT",
        taken=lambda given: given if callable(given) or isinstance(given, Mapping) else several(given),
    )
    include = texts(
        "GLOB",
        "Keep only names that match, before or after renaming.",
        "globs of the names to keep, as they are in the source or as they will be; none keeps all",
    )
    exclude = texts(
        "GLOB", "Drop names that match, before or after renaming.", "globs of the names to drop, in the same way"
    )
    section = _section("convert")
    tag = _tag("the source is a training folder; see `open`")
    tp_rules = path("FILE", "Rules that join tensor-parallel slices.", "rules that join slices of ranks; see `open`")
    all_tensors = flag(
        "Take every tensor of the file, named by the keys that lead to it.",
        "take every tensor of the file for the weights, each named by the keys that lead to it: ``0``, "
        "``optimizer.state.3.exp_avg``; see `ckptkit.AllTensors`",
    )
    weights_only = flag("Drop all but the state_dict.", "drop all but the state_dict")
    keep_beside = flag(
        "Keep plain values beside the weights: in the metadata of a .safetensors.",
        "keep the plain values beside the weights (``epoch``, settings) where a container holds tensors alone, or all "
        "else is dropped: as text in the metadata, and in their places in a ``.pth``; see `ckptkit.KeepBeside`",
    )
    as_key: Option[str | None] = Option(
        "text",
        None,
        "Put the weights under this key of a .pth, in place of what is there.",
        "put the weights under this key of a ``.pth``, with dots between dicts in dicts, in place of what is there; "
        "see `ckptkit.PutUnder`",
        "KEY",
        switch="--as",
    )
    leave_out = texts(
        "KEY",
        "Drop a part beside the weights: optimizer, epoch, ...",
        "parts of the file beside the weights to drop: keys, or sections as `inspect` lists them",
    )
    map_location: Option[LocationMap | None] = Option(
        "texts",
        None,
        "Device tags: 'cpu' for all, or OLD=NEW, repeatable; torch's meaning.",
        "new device tags; see `ckptkit.MapLocation`",
        "LOC",
    )
    densify = flag(
        "Make dense tensors of sparse, nested, quantized and block-scaled ones.",
        "make dense tensors of the values that are sparse, nested, quantized or scaled by blocks; see "
        "`ckptkit.Densify`",
    )
    dtype = dtype(
        "Cast floating-point weights: float16, bfloat16, float32, float8_...",
        "cast the floating-point weights to it; see `ckptkit.CastDtype`",
    )
    keep_dtype = texts(
        "GLOB",
        "Names that --dtype leaves as they are.",
        "globs of the names that are not cast, in the source or in the output",
    )
    cast_scaled = flag(
        "Let --dtype cast weights whose scales are beside them, and scales.",
        "whether to cast weights that have scales beside them, and such scales, each by itself",
    )
    tied: Option[TiedPolicy] = Option(
        "text",
        "alias",
        "Tensors with several names: keep them tied, write copies, or refuse.",
        "what becomes of tensors with several names; see `ckptkit.Tied`",
        choices=("alias", "duplicate", "error"),
    )
    like: Option[Like | None] = Option(
        "text",
        None,
        "Keep exactly the tensors of this model, under its names: a checkpoint, or a REF as in verify.",
        "the model whose tensors alone are kept, under its names: another checkpoint, or a reference as the ``model`` "
        "of `verify` (which needs torch).  Section and prefix are found; it goes after all that is named to be "
        "selected or renamed.  See `ckptkit.Like`",
        "REF",
    )
    model_args = pairs(
        "--model-arg",
        "Argument of --like's factory; repeatable.",
        "keyword arguments of the reference's factory; strings are read as Python literals",
    )
    to = text(
        "FORMAT",
        "torch-zip, safetensors, either -sharded, or dcp; overrides DST's ending.",
        'container name that overrides the ending; ``"dcp"``: a folder for ``torch.distributed.checkpoint.load``',
    )
    ranks = count(
        "--ranks",
        "With --to dcp: a file for each of N ranks, with rows of every tensor.",
        "how many ranks share a ``dcp`` folder: each has rows of every tensor, in a file of its own",
    )
    max_shard_size: Option[int | str | None] = Option(
        "text",
        None,
        "Split what is larger into files and an index: 5GB, 500MB.",
        'bytes of a file, as a number or as ``"5GB"``; what has more becomes shards and an index',
        "SIZE",
    )
    metadata = pairs("--metadata", "Set in the output's metadata.", "strings to set in the output's metadata")
    allow_part = _allow_part("the source")
    receipt = flag(
        "Do not record in the metadata what was done.",
        "whether to record in the metadata what was done; see `ckptkit.conversion`",
        default=True,
    )
    dry_run = flag("Show the plan; write nothing.", "make the plan, write nothing")
    force = flag("Overwrite DST if it exists.", "whether an existing destination may be replaced")
    check = flag(
        "Only move bytes: no checksums, no comparison, no waiting for the disk.",
        "whether to compare the output with the source before it gets its name; see `CheckpointFile.save`",
        default=True,
    )
    progress = _progress("called with the bytes dealt with so far, and those to deal with in all")
    ignore_checksums = flag(
        "Accept bytes that recorded checksums show to be others.",
        "whether to insist on a file whose recorded checksums are not those of its bytes; see `open`",
    )

    def _check(self) -> None:
        metadata: Mapping[Any, Any] = self.metadata
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise RewriteError(
                    f"metadata {key!r:.100}: {value!r:.100} is not text; metadata maps strings to strings"
                )
        if self.keep_dtype and self.dtype is None:
            raise RewriteError("--keep-dtype exempts from --dtype, which is not given")
        if self.cast_scaled and self.dtype is None:
            raise RewriteError("--cast-scaled is about --dtype, which is not given")
        if self.model_args and self.like is None:
            raise RewriteError("--model-arg is for the model of --like, which is not given")
        if self.all_tensors and self.section is not None:
            told = "--all-tensors takes every section; give --section alone, or --include with the names of one"
            raise RewriteError(told)
        if self.all_tensors and self.keep_beside:
            raise RewriteError("--keep-beside is about what stands beside the weights; with --all-tensors nothing does")
        if self.like is not None:
            vars(self)["weights_only"] = True


class LoadOptions(Options):
    """What `ckptkit.load_state_dict` can be asked for: of what `ConvertOptions` declares what is about the weights."""

    command = "load_state_dict"

    map_location: Option[Any] = Option(
        "text",
        "cpu",
        "",
        "where the tensors go, as in ``torch.load``: a string, a ``torch.device``, a dict, a callable; ``None``: where "
        "the file says that they lay",
    )
    device: Option[Any] = Option("text", None, "", "the same for one device, in place of ``map_location``")
    section = ConvertOptions.section
    tag = ConvertOptions.tag
    tp_rules = ConvertOptions.tp_rules
    all_tensors = ConvertOptions.all_tensors
    strip_module = ConvertOptions.strip_module
    add_module = ConvertOptions.add_module
    strip_prefix = ConvertOptions.strip_prefix
    add_prefix = ConvertOptions.add_prefix
    rename = ConvertOptions.rename
    include = ConvertOptions.include
    exclude = ConvertOptions.exclude
    densify = ConvertOptions.densify
    dtype = ConvertOptions.dtype
    keep_dtype = ConvertOptions.keep_dtype
    cast_scaled = ConvertOptions.cast_scaled
    mapped: Option[bool | None] = Option(
        "switch",
        None,
        "",
        "whether tensors on the CPU lie in a private mapping of the file, for which nothing is read, and no checksum "
        "held.  Writing to them never reaches the file; the file must not be overwritten nor shortened while they are "
        "in use, which would change them or end the process.  Default: those of safetensors files do, as with the "
        "library's ``load_file``, and others are copied",
    )
    allow_part = _allow_part("the file")
    ignore_checksums = ConvertOptions.ignore_checksums

    def __init__(self, **given: Any) -> None:
        device = given.pop("device", None)
        if device is not None:
            if "map_location" in given:
                raise RewriteError("device and map_location both say where tensors go; give one of them")
            given["map_location"] = device
        super().__init__(**given)

    @property
    def conversion(self) -> ConvertOptions | None:
        """What is to be done to the weights, as `ckptkit.convert` is told; ``None``: nothing."""
        shared = {name for name, option in self.declared.items() if ConvertOptions.declared.get(name) is option}
        given = {name: vars(self)[name] for name in shared - {"section", "tag", "tp_rules", "ignore_checksums"}}
        if all(value == self.declared[name].default for name, value in given.items()):
            return None
        return ConvertOptions(weights_only=True, section=self.section, **given)

    def _check(self) -> None:
        _ = self.conversion  # which has the same rules for what goes together


class VerifyOptions(Options):
    """What `ckptkit.verify` can be asked for, in the order of ``ckptkit verify --help``."""

    command = "verify"

    model: Option[Any] = Option(
        "text",
        None,
        "torchvision:NAME, package.module:factory or path/to/file.py:factory.",
        '``"torchvision:resnet18"``, ``"package.module:factory"``, ``"path/to/file.py:factory"``, or an ``nn.Module`` '
        "or callable; may be left out where ``golden`` names it, or the architecture is known by its names and shapes",
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
        "one shape for each input; default from the reference where it is known",
        "N,C,H,W",
        switch="--input-shape",
        taken=lambda given: shapes("--input-shape", given),
    )
    input = path(
        "FILE",
        "The inputs' values, in any container: 0, 1, … or by keyword.",
        "a file, in any container, with the inputs' values: by position (``0``, ``1``) or by keyword",
    )
    seed = Option(
        "integer", 0, "Seed of the input.", "of the input, and of whatever the factory draws", shows_default=True
    )
    section = _section("verify")
    tag = _tag("``path`` is a training folder; see `open`")
    tp_rules = ConvertOptions.tp_rules
    strip_module = flag("Take off wrapper prefixes first, as convert does.", "take off wrapper prefixes first")
    allow_missing = texts(
        "GLOB", "Names that may be missing; repeatable.", "glob patterns of names that may be missing"
    )
    allow_unexpected = texts(
        "GLOB", "Names that may be left over; repeatable.", "glob patterns of names that may be left over"
    )
    allow_part = _allow_part("a file")
    against = path(
        "OTHER",
        "Another checkpoint of the same model: outputs must agree.",
        "another checkpoint of the same model, in any container and with any wrapper prefix, whose outputs must agree",
    )
    golden = path(
        "FILE",
        "Outputs recorded earlier: these must agree; names the model too.",
        "a file of outputs recorded earlier, which these must agree with",
    )
    write_golden = path("FILE", "Record the outputs, for --golden.", "a file to record these in")
    atol = within(
        "--atol",
        "Absolute difference allowed; default: the noise measured.",
        "how far outputs may be apart, whatever their size; default: several times the noise that is measured",
    )
    rtol = within(
        "--rtol",
        "The same as a share of the largest output; default by dtype.",
        "the same, as a share of their largest magnitude; what it allows is added",
    )
    force = flag("Let --write-golden replace a file.", "whether ``write_golden`` may replace a file")
    forward = flag("Check names, shapes and loading only.", "whether to run the forward pass", default=True)
    unsafe_load = flag(
        "Run the pickled model itself: RUNS CODE OF THE FILE. Never with --model.",
        "run the pickled model itself in place of a reference: **runs code of the file**, after printing on stderr "
        "what it imports.  A hostile file is refused",
    )
    ignore_checksums = ConvertOptions.ignore_checksums

    def _check(self) -> None:
        if self.input is not None and self.input_shapes:
            raise VerifyError("--input and --input-shape: the inputs are read from a file, or made; give one of them")
        if not self.forward:
            needing = ("against", "golden", "write_golden")
            useless = [self.declared[name].typed for name in needing if getattr(self, name) is not None]
            if useless:
                raise VerifyError(f"{', '.join(useless)}: with --no-forward nothing is computed; leave one of them out")
        if self.unsafe_load and self.model is not None:
            raise VerifyError(
                "--model and --unsafe-load: a reference model is run, or the pickled one; give one of them"
            )
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise VerifyError(f"--seed {self.seed:.6g}: torch takes whole numbers from -2**63 to 2**64 - 1")


class DiffOptions(Options):
    """What `ckptkit.diff` can be asked for, in the order of ``ckptkit diff --help``."""

    command = "diff"

    section = text(
        "NAME",
        "The weights to compare, in both; nothing beside them is.",
        "path of the weights to compare, in both; what stands beside named weights is not compared",
    )
    section_a = text("NAME", "The weights of A.", "the same of ``a`` alone")
    section_b = text("NAME", "The weights of B.", "the same of ``b`` alone")
    tag = _tag("``a`` or ``b``, or each, is a training folder")
    tp_rules = ConvertOptions.tp_rules
    tag_a = text("NAME", "The step of A.", "the same of ``a`` alone")
    tag_b = text("NAME", "The step of B.", "the same of ``b`` alone")
    strip_module = flag("Take wrapper prefixes off the names of both first.", "take off wrapper prefixes of both first")
    atol = within(
        "--atol",
        "Differences up to this count as unchanged.",
        "how far elements may be apart and count as unchanged; without both, bits decide",
    )
    rtol = within(
        "--rtol",
        "The same as a share of the larger magnitude.",
        "the same as a share of the larger magnitude of the two; what it allows is added",
    )
    allow_part = _allow_part("either")
    strict = flag(
        "Everything in the files counts for the exit code, not the tensors alone.",
        "whether metadata, ties, parts that one file alone has, and every value in the files' trees count for "
        "`Difference.ok`",
    )
    progress = _progress("called with the bytes gone through so far, and those to go through in all")
    ignore_checksums = ConvertOptions.ignore_checksums


if TYPE_CHECKING:

    class _ReadKeywords(TypedDict, total=False):
        """What every one of them takes."""

        section: str | None
        tag: str | None
        tp_rules: str | os.PathLike[str] | None
        allow_part: bool
        ignore_checksums: bool

    class _RewriteKeywords(_ReadKeywords, total=False):
        """What says how the weights are selected, renamed and cast."""

        all_tensors: bool
        strip_module: bool
        add_module: bool
        strip_prefix: str | None
        add_prefix: str | None
        rename: Renaming
        include: str | Sequence[str]
        exclude: str | Sequence[str]
        densify: bool
        dtype: str | torch.dtype | None
        keep_dtype: str | Sequence[str]
        cast_scaled: bool

    class ConvertKeywords(_RewriteKeywords, total=False):
        """What `ckptkit.convert` takes as keywords."""

        weights_only: bool
        keep_beside: bool
        as_key: str | None
        leave_out: str | Sequence[str]
        map_location: LocationMap | None
        tied: TiedPolicy
        like: Any
        model_args: Mapping[str, Any] | None
        to: str | None
        ranks: int | None
        max_shard_size: int | str | None
        metadata: Mapping[str, str] | None
        receipt: bool
        dry_run: bool
        force: bool
        check: bool
        progress: Progress | None

    class LoadKeywords(_RewriteKeywords, total=False):
        """What `ckptkit.load_state_dict` takes as keywords."""

        map_location: Any
        device: Any
        mapped: bool | None

    class VerifyKeywords(_ReadKeywords, total=False):
        """What `ckptkit.verify` takes as keywords."""

        model: Any
        model_args: Mapping[str, Any] | None
        device: str
        dtype: str | torch.dtype | None
        input_shapes: Sequence[Sequence[int]]
        input: str | os.PathLike[str] | None
        seed: int
        strip_module: bool
        allow_missing: str | Sequence[str]
        allow_unexpected: str | Sequence[str]
        against: str | os.PathLike[str] | None
        golden: str | os.PathLike[str] | None
        write_golden: str | os.PathLike[str] | None
        atol: float | None
        rtol: float | None
        force: bool
        forward: bool
        unsafe_load: bool

    class DiffKeywords(_ReadKeywords, total=False):
        """What `ckptkit.diff` takes as keywords."""

        section_a: str | None
        section_b: str | None
        tag_a: str | None
        tag_b: str | None
        strip_module: bool
        atol: float | None
        rtol: float | None
        strict: bool
        progress: Progress | None
