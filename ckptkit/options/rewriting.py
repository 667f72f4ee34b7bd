"""The options of ``convert`` and ``load_state_dict``, and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.arguments import Option, Options, count, dtype, flag, pairs, path, several, text, texts
from ckptkit.errors import RewriteError, VerifyError
from ckptkit.options import storage

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckptkit.fleet.shares import Share
    from ckptkit.rewrite.like import Like
    from ckptkit.rewrite.rename import Renaming
    from ckptkit.rewrite.storages import LocationMap, TiedPolicy
    from ckptkit.transfer.workers import Progress

__all__ = ["ConvertOptions", "LoadOptions", "allow_part_option", "progress_option", "section_option", "tag_option"]


def progress_option(meaning: str) -> Option[Progress | None]:
    """The function that receives the progress; ``meaning`` is for the docstring."""
    return Option("switch", None, "Show progress on stderr; default: on a terminal.", meaning)


def allow_part_option(which: str) -> Option[bool]:
    """Whether a part of a checkpoint is accepted; ``which`` is what may be one."""
    line = "Take one part of a sharded checkpoint without the others."
    return flag(line, f"whether {which} may be one part of a checkpoint stored in several files")


def section_option(verb: str, told: str = "if the file has several") -> Option[str | None]:
    """The weights to use; ``verb`` says what for."""
    return text("NAME", f"Weights to {verb}, {told}.", f"path of the weights, {told}")


def tag_option(which: str) -> Option[str | None]:
    """The step of a training folder; ``which`` is what it belongs to."""
    return text("NAME", "Step to use in a training folder with several.", f"which of several steps, if {which}")


def _share(given: Any) -> Share:
    from ckptkit.fleet.shares import Share

    if isinstance(given, Share):
        return given
    try:
        return Share.of(given)
    except VerifyError as error:
        raise RewriteError(f"--{error}") from None


class ConvertOptions(Options):
    """The options of `ckptkit.convert`, in the order of ``ckptkit convert --help``."""

    command = "convert"

    strip_module = flag(
        "Remove every wrapper prefix, including nested ones: module., _orig_mod. ...",
        "remove every wrapper prefix (``module.``, ``_orig_mod.``)",
    )
    add_module = flag("Put one module. before every name.", "then put one ``module.`` before every name")
    strip_prefix = text(
        "P",
        "Strip the prefix P, once, from the names that have it.",
        "then strip this one leading prefix of whole segments",
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
        "globs of the names to keep, before or after renaming; none keeps all",
    )
    exclude = texts(
        "GLOB", "Drop names that match, before or after renaming.", "globs of the names to drop, in the same way"
    )
    section = section_option("convert")
    tag = tag_option("the source is a training folder; see `open`")
    tp_rules = path(
        "FILE", "Rules for joining tensor-parallel slices.", "rules for joining the slices of ranks; see `open`"
    )
    all_tensors = flag(
        "Take every tensor of the file, named by the keys that lead to it.",
        "use every tensor of the file as a weight, each named by the keys that lead to it: ``0``, "
        "``optimizer.state.3.exp_avg``; see `ckptkit.AllTensors`",
    )
    weights_only = flag("Drop everything except the state_dict.", "drop all but the state_dict")
    keep_beside = flag(
        "Keep plain values beside the weights: in the metadata of a .safetensors.",
        "keep the plain values beside the weights (``epoch``, settings) when the container stores only tensors or "
        "everything else is dropped: as text in the metadata, and in their places in a ``.pth``; see "
        "`ckptkit.KeepBeside`",
    )
    as_key: Option[str | None] = Option(
        "text",
        None,
        "Put the weights under this key of a .pth, replacing its current value.",
        "put the weights under this key of a ``.pth``, with dots between nested keys, replacing its current value; "
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
        "Turn sparse, nested, quantized and block-scaled tensors into dense ones.",
        "turn sparse, nested, quantized and block-scaled tensors into dense ones; see `ckptkit.Densify`",
    )
    dtype = dtype(
        "Cast floating-point weights: float16, bfloat16, float32, float8_...",
        "cast the floating-point weights to it; see `ckptkit.CastDtype`",
    )
    keep_dtype = texts(
        "GLOB",
        "Names that --dtype does not cast.",
        "globs of the names that are not cast, in the source or in the output",
    )
    cast_scaled = flag(
        "Let --dtype cast weights that have scales, and the scales.",
        "whether to cast weights that have scales beside them, and the scales, each separately",
    )
    tied: Option[TiedPolicy] = Option(
        "text",
        "alias",
        "Tensors with several names: keep them tied, write copies, or refuse.",
        "what to do with tensors that have several names; see `ckptkit.Tied`",
        choices=("alias", "duplicate", "error"),
    )
    like: Option[Like | None] = Option(
        "text",
        None,
        "Keep exactly the tensors of this model, under its names: a checkpoint, or a REF as in verify.",
        "keep exactly the tensors of this model, under its names: another checkpoint, or a reference like the "
        "``model`` of `verify` (which needs torch). Section and prefix are found; it is applied after every other "
        "selection and renaming. See `ckptkit.Like`",
        "REF",
    )
    model_args = pairs(
        "--model-arg",
        "Argument of --like's factory; repeatable.",
        "keyword arguments of the reference's factory; strings are read as Python literals",
    )
    to = text(
        "FORMAT",
        "torch-zip or safetensors, either also with -sharded, or dcp; overrides DST's extension.",
        'container name that overrides the extension; ``"dcp"``: a folder for ``torch.distributed.checkpoint.load``',
    )
    ranks = count(
        "--ranks",
        "With --to dcp: write one file for each of N ranks, each with its rows of every tensor.",
        "how many ranks share a ``dcp`` folder: each has rows of every tensor, in a separate file",
    )
    max_shard_size: Option[int | str | None] = Option(
        "text",
        None,
        "Split larger outputs into shards with an index: 5GB, 500MB.",
        'bytes per file, as a number or as ``"5GB"``; a larger output becomes shards and an index',
        "SIZE",
    )
    metadata = pairs("--metadata", "Set this in the output's metadata.", "strings to set in the output's metadata")
    allow_part = allow_part_option("the source")
    receipt = flag(
        "Do not record in the metadata what was done.",
        "whether to record in the metadata what was done; see `ckptkit.conversion`",
        default=True,
    )
    dry_run = flag("Show the plan; write nothing.", "make the plan, write nothing")
    force = flag("Overwrite DST if it exists.", "whether an existing destination may be replaced")
    in_place = flag(
        "Convert each SRC in place; there is no DST. Other hard links to it keep the old content.",
        "whether to replace the source, in its own container; there is no destination then, and ``source`` may be a "
        "list of paths, which are converted each by itself; other hard links to the file keep the old content, and a "
        "finding says so",
    )
    backup = flag(
        "With --in-place: keep the old file as SRC.bak.",
        "with ``in_place``: whether to keep the old file beside it, as ``FILE.bak`` or ``FILE.bak.1`` and so on",
    )
    confirm: Option[Callable[[Sequence[str]], bool] | None] = Option(
        "text",
        None,
        "",
        "called, before anything is written, with the paths of files that would be replaced and not kept; if it "
        "returns false, nothing is written",
    )
    part: Option[Share | None] = Option(
        "text",
        None,
        "Write one of N parts of the shards, as one of N processes, and combine them with --finish. For a folder: "
        "convert one of N parts of its files.",
        'one of N parts of the shards, such as ``"2/8"``: for N processes, on one machine or on several with a shared '
        "file system, each of which writes its own part; ``finish`` combines the parts into a checkpoint.  For a "
        "folder to a folder: a share of the files, by their paths",
        "I/N",
        taken=_share,
    )
    finish = flag(
        "Combine what --part wrote into one checkpoint; give the same SRC, DST and options.",
        "combine the parts that ``part`` wrote into one checkpoint, with the same source, destination and options",
    )
    jobs = count(
        "--jobs",
        "Share shards, or the files of a folder, among N processes.",
        "how many processes share the shards, or the files of a folder; one process writes each file. The threads "
        "of one process copy as fast as a disk accepts data: more processes help with casts, with disks that are "
        "faster in parallel, and with many small files",
    )
    executor: Option[Executor | None] = Option(
        "text",
        None,
        "",
        "any ``concurrent.futures.Executor`` to use instead of local processes, including one on other machines that "
        "have the same files under the same paths; it receives importable functions and plain data",
    )
    files_from = path(
        "FILE",
        "For a folder: only the files listed in FILE, one path per line; - for stdin.",
        "for a folder to a folder: a file that lists the files to convert, one path per line or before each NUL; "
        '``"-"``: standard input',
    )
    check = flag(
        "Only copy bytes: no checksums, no comparison, no waiting for the disk.",
        "whether to compare the output with the source before it gets its name; see `CheckpointFile.save`",
        default=True,
    )
    progress = progress_option("called with the bytes processed so far and the total")
    ignore_checksums = flag(
        "Accept bytes that do not match their recorded checksums.",
        "whether to accept a file whose bytes do not match its recorded checksums; see `open`",
    )
    storage_options = storage.storage_options

    def _check(self) -> None:
        metadata: Mapping[Any, Any] = self.metadata
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise RewriteError(
                    f"metadata {key!r:.100}: {value!r:.100} is not text; metadata maps strings to strings"
                )
        if self.keep_dtype and self.dtype is None:
            raise RewriteError("--keep-dtype makes exceptions to --dtype, which is not given")
        if self.cast_scaled and self.dtype is None:
            raise RewriteError("--cast-scaled applies to --dtype, which is not given")
        if self.model_args and self.like is None:
            raise RewriteError("--model-arg is for the model of --like, which is not given")
        if self.all_tensors and self.section is not None:
            told = "--all-tensors takes every section; use --section instead, or --include with the names of one"
            raise RewriteError(told)
        if self.all_tensors and self.keep_beside:
            raise RewriteError("--keep-beside applies to values beside the weights, and --all-tensors keeps none")
        if self.finish and (self.part is not None or self.dry_run):
            other = "--dry-run" if self.part is None else f"--part {self.part}"
            raise RewriteError(f"--finish combines the parts; omit {other}")
        self._check_in_place()
        if self.executor is not None and self.jobs is not None:
            raise RewriteError("jobs and executor both choose the workers; give only one of them")
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            raise RewriteError(f"executor is {type(self.executor).__name__}; expected a concurrent.futures.Executor")
        if self.like is not None:
            vars(self)["weights_only"] = True

    def _check_in_place(self) -> None:
        if self.backup and not self.in_place:
            raise RewriteError("--backup keeps the old file of --in-place, which is not given")
        useless = ("tag", "tp_rules", "max_shard_size", "ranks", "part", "finish", "files_from")
        given = [self.declared[name].typed for name in useless if getattr(self, name) not in (None, False)]
        if self.in_place and given:
            told = "--in-place replaces single files; leave it out, and name a destination"
            raise RewriteError(f"{', '.join(given)}: {told}")


class LoadOptions(Options):
    """The options of `ckptkit.load_state_dict`: those of `ConvertOptions` that concern the weights, and more."""

    command = "load_state_dict"

    map_location: Option[Any] = Option(
        "text",
        "cpu",
        "",
        "where the tensors go, as in ``torch.load``: a string, a ``torch.device``, a dict, a callable; ``None``: the "
        "devices recorded in the file",
    )
    device: Option[Any] = Option("text", None, "", "the same for one device, instead of ``map_location``")
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
        "whether tensors on the CPU use a private mapping of the file, for which nothing is read and no checksum is "
        "compared. Writing to them never changes the file; the file must not be overwritten or shortened while they "
        "are in use, which would change them or end the process. Default: tensors of safetensors files do, as with "
        "the library's ``load_file``, and others are copied",
    )
    allow_part = allow_part_option("the file")
    ignore_checksums = ConvertOptions.ignore_checksums
    storage_options = storage.storage_options

    def __init__(self, **given: Any) -> None:
        device = given.pop("device", None)
        if device is not None:
            if "map_location" in given:
                raise RewriteError("device and map_location both say where tensors go; give only one of them")
            given["map_location"] = device
        super().__init__(**given)

    @property
    def conversion(self) -> ConvertOptions | None:
        """What to do to the weights, as options of `ckptkit.convert`; ``None``: nothing."""
        shared = {name for name, option in self.declared.items() if ConvertOptions.declared.get(name) is option}
        of_reading = {"section", "tag", "tp_rules", "ignore_checksums", "storage_options"}
        given = {name: vars(self)[name] for name in shared - of_reading}
        if all(value == self.declared[name].default for name, value in given.items()):
            return None
        return ConvertOptions(weights_only=True, section=self.section, **given)

    def _check(self) -> None:
        _ = self.conversion  # which has the same rules for what goes together
