"""The documents: what each command prints with ``--json`` and renders every other output from, field by field.

This module has those of reports and manifests; `ckptkit.inspection.document` has that of ``inspect``,
`ckptkit.differences.difference` that of ``diff``, and `ckptkit.conversion.document` that of converting a folder.

A document is a dict of JSON values: text, numbers, lists, ``None``.  Functions that make one return the type defined
here, and `ckptkit.cli` renders it.  Within one ``schema_version``, fields are added but never changed or removed.

Sizes (``size``, ``nbytes``) are in bytes; shapes, strides and counts of parameters and buffers in elements; times in
seconds.  ``path`` is a file as it was named; for a section or a module it is the keys joined with dots, and ``""`` is
the whole.  Dtypes have torch's names without the prefix (``"float32"``).  A number that JSON does not have (NaN, Inf)
is ``None``, or its name where a file's values are shown.  Only type checkers import this module; commands do not.
"""

from __future__ import annotations

from typing import Any, TypedDict

from ckptkit.report import CombinedFix, FindingDocument, Severity

__all__ = [
    "ChangesDocument", "CheckDetails", "CheckDocument", "CheckFindingDocument", "CheckedFile", "ConvertDetails",
    "ConvertDocument", "ErrorDocument", "ExplainDocument", "InputsDocument", "ManifestDocument", "ManifestFile",
    "ManifestOptions", "OutputDocument", "PartDocument", "PlanDocument", "ReportDocument", "StepsDocument",
    "TimedDocument", "VerifyCheckDocument", "VerifyDetails", "VerifyDocument", "VerifyFindingDocument",
    "WrittenManifest",
]  # fmt: skip

_From = TypedDict("_From", {"from": str})


class _Report(TypedDict):
    """What every report has.

    Attributes:
        schema_version, ok: of all documents; whether no finding has severity ``"error"``.
        findings: everything found, in the order it was found.
    """

    schema_version: int
    ok: bool
    findings: list[FindingDocument]


class ErrorDocument(TypedDict):
    """Why a file could not be read or converted: the class of the exception, and its message."""

    type: str
    message: str


# ckptkit convert


class StepsDocument(TypedDict):
    """How many steps move bytes in one way, and how many bytes."""

    count: int
    nbytes: int


class ShardDocument(TypedDict):
    """A file that is written beside the index."""

    name: str
    nbytes: int
    tensors: int


class PlanDocument(TypedDict):
    """The plan of a writer.

    Attributes:
        format: the container.
        nbytes: of the file and its shards.
        tensors: number of tensors that a reader of the output will see.
        copies, casts, gathers, literals: bytes that are copied unchanged, converted, reordered, or generated.
        aliases: names that are recorded as another name's tensor.
        shards: the files; none if it is a single file.
    """

    format: str
    nbytes: int
    tensors: int
    copies: StepsDocument
    casts: StepsDocument
    gathers: StepsDocument
    literals: StepsDocument
    aliases: dict[str, str]
    shards: list[ShardDocument]


class RenameDocument(_From):
    """A name ``from`` the source, and what it is called in the output."""

    to: str


class CastDocument(_From):
    """A tensor, by its new name, whose values are converted ``from`` one dtype to another."""

    name: str
    to: str


class ChangesDocument(TypedDict):
    """The changes of a conversion.

    Attributes:
        renames: names that change.
        dropped: names of the weights that are left out.
        like: the model whose tensors are kept.
        casts: tensors whose dtype changes.
        gathered: names whose values have to be reordered.
        compacted: how many storages are cut to the bytes that tensors use, and by how many bytes.
        operations: the rewriters, in order.
    """

    renames: list[RenameDocument]
    dropped: list[str]
    like: str | None
    casts: list[CastDocument]
    gathered: list[str]
    compacted: CompactedDocument
    operations: list[str]


class CompactedDocument(TypedDict):
    """Storages that are cut to the bytes that tensors use, and the bytes saved."""

    storages: int
    nbytes: int


class PartDocument(TypedDict):
    """The part that was written of an output that several processes write.

    Attributes:
        part, of: which part, from 1; and how many there are.
        shards: its shards.
        nbytes: their size in bytes.
        kept: whether they were already there and complete.
    """

    part: int
    of: int
    shards: list[str]
    nbytes: int
    kept: bool


class _PartDetails(TypedDict, total=False):
    """A single part: the written part of the output; there is no checkpoint yet."""

    part: PartDocument


class ConvertDetails(ChangesDocument, _PartDetails):
    """The ``details`` of the report of `ckptkit.convert`.

    Attributes:
        source, destination: files; for shards the destination is their index.
        source_nbytes: of the source, with its shards.
        written, checked: whether it was, and was compared with the source; with ``--dry-run`` nothing is.
        section: path of the weights that were converted.
        plan: how it is, or would be, written.
    """

    source: str
    source_nbytes: int
    destination: str
    written: bool
    checked: bool
    section: str | None
    plan: PlanDocument


class ConvertDocument(_Report, ConvertDetails):
    """The document of ``ckptkit convert``."""


# ckptkit verify


class VerifyFindingDocument(FindingDocument):
    """A finding and the name of the check that made it; ``None``: it came before the first check."""

    check: str | None


class VerifyCheckDocument(TypedDict):
    """One check of `ckptkit.verifier.CHECKS`.

    Attributes:
        name: ``"fit"``, ``"load"``, ``"weights"``, ``"forward"``, ``"behaviour"``, ``"devices"``, ``"golden"``,
            ``"against"``.
        run: whether it had anything to check.
        severity: of its most severe finding; ``None``: it has none.
        codes: of its findings.
        note: what it checked, in words.
        figures: the check's own; each gives an output's ``path``, whether it is ``equal`` and ``close``, ``max_abs``,
            ``max_rel``, and how much was ``allowed``.
    """

    name: str
    run: bool
    severity: Severity | None
    codes: list[str]
    note: str | None
    figures: Any


class CoverageDocument(TypedDict):
    """How many of the model's tensors the file has, how many the model has, and the share of the parameters, 0 to 1."""

    tensors: int
    of: int
    parameters_share: float


class MismatchDocument(TypedDict):
    """A tensor whose shape in the checkpoint is not that in the reference."""

    name: str
    checkpoint: list[int]
    reference: list[int]


class InputDocument(TypedDict):
    """One input of the model; ``name``: the keyword it is given by (``None``: by its position)."""

    name: str | None
    shape: list[int]
    dtype: str


class InputsDocument(TypedDict):
    """The inputs of the model: generated from ``seed``, or read from the file ``path``."""

    seed: int | None
    path: str | None
    tensors: list[InputDocument]


class OutputDocument(TypedDict):
    """One output of the first pass.

    Attributes:
        path: where it is in the model's return value; ``""``: it is the whole value.
        finite: whether no element is NaN or Inf.
        min, max, mean: of the finite values.
    """

    path: str
    shape: list[int]
    dtype: str
    finite: bool
    min: float | None
    max: float | None
    mean: float | None


class TimedDocument(TypedDict):
    """A step of the verification, how long it took, and the peak memory in bytes by its end."""

    name: str
    seconds: float
    peak_memory_nbytes: int | None


class VerifyDetails(TypedDict):
    """The ``details`` of the report of `ckptkit.verify`.

    Attributes:
        reference: the model, in words.
        device: where the outputs were computed; ``devices`` are all the requested ones.
        dtype: the dtype that the model computed in.
        coverage: how much of the model the file has.
        missing_keys, unexpected_keys: names that only the model has, and names that only the file has.
        shape_mismatches: names whose shapes differ.
        loaded: whether every weight is in the model.
        inputs: of the forward pass; ``None``: there was none.
        outputs: of the first pass.
        passes: forward passes on the first device, not counting those that measure noise.
        checks: every check, in the order they ran.
        seconds, steps: how long each part took; and each check.
        peak_memory_nbytes: the peak memory.
        versions: of ckptkit, Python and the packages that computed.
    """

    path: str
    reference: str
    device: str
    devices: list[str]
    dtype: str
    coverage: CoverageDocument
    missing_keys: list[str]
    unexpected_keys: list[str]
    shape_mismatches: list[MismatchDocument]
    loaded: bool
    inputs: InputsDocument | None
    outputs: list[OutputDocument]
    passes: int
    checks: list[VerifyCheckDocument]
    seconds: dict[str, float]
    steps: list[TimedDocument]
    peak_memory_nbytes: int | None
    versions: dict[str, str]
    combined_fix: CombinedFix | None


class VerifyDocument(VerifyDetails):
    """The document of ``ckptkit verify``."""

    schema_version: int
    ok: bool
    findings: list[VerifyFindingDocument]


# ckptkit check


class CheckFindingDocument(FindingDocument):
    """A file that breaks a rule.

    Attributes:
        path: the file, or a path that should be one.
        rule: the policy (``"no-pickle"``), ``"manifest"``, ``"readable"``, ``"whole"`` or ``"selection"``.
        expected, found: what the rule requires, and what was found: text, a number, or a list of these.
    """

    path: str
    rule: str
    expected: Any
    found: Any


class CheckedFile(TypedDict):
    """A file to check.

    Attributes:
        size: bytes; ``None``: it could not be read or does not exist.
        sha256: of the file, if it was computed.
        ok, checked: whether it meets all rules; whether every rule could be applied.
        rules: those applied, in order.
    """

    path: str
    size: int | None
    sha256: str | None
    ok: bool
    checked: bool
    rules: list[str]
    combined_fix: CombinedFix | None


class _CheckDetails(TypedDict):
    checked: int
    passed_over: dict[str, int]
    files: list[CheckedFile]


class CheckDetails(_CheckDetails, total=False):
    """The ``details`` of the report of `ckptkit.check`.

    Attributes:
        checked: how many files every rule could be applied to.
        passed_over: how many files are not checkpoints, by kind.
        files: by path.
        manifest, config: the files with the requirements.
        part: the share of the files that this is, if it is one: ``"2/8"``.
    """

    manifest: str | None
    config: str | None
    part: str


class CheckDocument(CheckDetails):
    """The document of ``ckptkit check``.

    Attributes:
        ok: whether no finding is an error.
        findings: of all files, in the files' order.
    """

    schema_version: int
    ok: bool
    findings: list[CheckFindingDocument]


class ReportDocument(CheckDocument):
    """The document of ``ckptkit report``: the same as one check of all files that the runs covered."""


# ckptkit manifest


class ManifestTensor(TypedDict):
    """What one tensor must be: dtype, shape, and ``"sha256:…"`` of its values."""

    dtype: str
    shape: list[int]
    digest: str


class ManifestShard(TypedDict):
    """What one file must be, alone or in a sharded checkpoint: bytes, and SHA-256 in hexadecimal."""

    size: int
    sha256: str


class ManifestGolden(TypedDict):
    """A file of recorded outputs, and its SHA-256."""

    path: str
    sha256: str


class ManifestOptions(TypedDict, total=False):
    """Fields that a file's record has only if they apply."""

    whole_digest: str
    shards: dict[str, ManifestShard]
    others: list[str]


class ManifestFile(ManifestOptions):
    """What one checkpoint must be; `ckptkit.released.manifest_file` describes each field."""

    path: str
    size: int
    sha256: str | None
    format: str
    kind: str
    trust: str
    content_digest: str | None
    architecture: str | None
    golden: ManifestGolden | None
    tensors: dict[str, ManifestTensor] | None


class ManifestOrigin(TypedDict, total=False):
    """For a manifest of files at URLs: their folder."""

    origin: str


class WrittenManifest(ManifestOrigin):
    """A manifest as it is written."""

    schema_version: int
    folders: list[str]
    files: list[ManifestFile]


class ChangedFiles(TypedDict):
    """Paths by what happened to their records."""

    added: list[str]
    changed: list[str]
    removed: list[str]
    kept: list[str]


class _Manifest(WrittenManifest):
    changes: ChangedFiles


class ManifestDocument(_Manifest, total=False):
    """The document of ``ckptkit manifest``: the manifest and its changes.

    Attributes:
        passed_over: how many files in the folders are not checkpoints, by kind, if there are any.
    """

    passed_over: dict[str, int]


# ckptkit explain


class ExplanationDocument(TypedDict):
    """What a code means: what was seen, in a line; why it matters; what to do (``"-"``: nothing)."""

    title: str
    meaning: str
    remedy: str


class _Explain(TypedDict):
    schema_version: int
    codes: dict[str, ExplanationDocument]


class ExplainDocument(_Explain, total=False):
    """The document of ``ckptkit explain``: the code or topic asked for (its text, as markdown), or all of them."""

    topics: dict[str, str]
