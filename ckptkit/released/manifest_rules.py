"""The rules of a manifest and a model for a file, as findings of a check.

`compare` holds a file against its record: the same bytes, the same tensors, or which are others.  `model_findings`
is what the verifier finds, under the rules ``fits`` and ``forward``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptkit import places
from ckptkit.errors import CkptkitError, MissingDependencyError, MissingFileError
from ckptkit.formats.distributed.folder import listing
from ckptkit.normalize.parts import CODE
from ckptkit.released.examine import Examined, TensorFact
from ckptkit.released.policy import TRUST_ORDER, Policy
from ckptkit.released.reading import file_sha256
from ckptkit.released.results import CheckFinding
from ckptkit.released.selection import size_of
from ckptkit.report import Report, count_of, listed

if TYPE_CHECKING:
    from ckptkit.architectures import Architecture
    from ckptkit.documents import VerifyFindingDocument
    from ckptkit.released.manifest_file import FileRecord, TensorRecord

__all__ = ["compare", "golden_findings", "incomplete_finding", "is_same_file", "model_findings"]

_MOST_LISTED = 100
"""Names in ``found``; a checkpoint may have 100,000."""


def is_same_file(examined: Examined, record: FileRecord) -> bool:
    """Whether the file's bytes, and those of its shards, are the manifest's."""
    shards = {shard.name: (shard.size, shard.sha256) for shard in examined.shards}
    recorded = {name: (shard.size, shard.sha256) for name, shard in record.shards.items()}
    return (examined.size, examined.sha256, shards) == (record.size, record.sha256, recorded)


def compare(examined: Examined, digested: Examined, record: FileRecord) -> Iterator[CheckFinding]:
    """What of a file is not as its record says.

    Args:
        examined: the file, hashed.
        digested: the file with its digests, where the bytes are not the manifest's.
        record: what it must be.
    """
    if is_same_file(examined, record):
        yield from _contradictions(examined, record)
    else:
        yield _difference(examined, digested, record)
    if TRUST_ORDER[examined.trust] > TRUST_ORDER[record.trust]:
        yield _finding(
            examined.path,
            code="trust-worse",
            expected=record.trust,
            found=examined.trust,
            message=f"the file is {examined.trust}; when it was recorded it was {record.trust}",
        )


def _bytes_told(sha256: str | None, size: int, *others: str) -> str:
    """The bytes of a file, or of the files in a folder, as expected or found."""
    return ", ".join([f"sha256 {sha256}"] * (sha256 is not None) + [f"{size} bytes", *others])


def parts_differ(record: FileRecord, found: Mapping[str, tuple[int, str | None]]) -> str:
    """Which files of a folder differ from the record: missing, not recorded, with different bytes; ``""``: none.

    Args:
        record: what it must be.
        found: size and SHA-256 of each file by its name; ``None``: it was not computed.
    """
    recorded = {name: (shard.size, shard.sha256) for name, shard in record.shards.items()}
    changed = [
        name
        for name in sorted(recorded.keys() & found.keys())
        if recorded[name][0] != found[name][0] or found[name][1] not in (None, recorded[name][1])
    ]
    kinds = {
        "missing": sorted(recorded.keys() - found.keys()),
        "not recorded": sorted(found.keys() - recorded.keys()),
        "with different bytes": changed,
    }
    return "; ".join(
        f"{count_of(len(names), 'file')} {kind}: {listed(names)}" for kind, names in kinds.items() if names
    )


def incomplete_finding(path: str, record: FileRecord | None) -> Iterator[CheckFinding]:
    """For a folder that cannot be read, which files do not match the record, as far as sizes show."""
    if record is None or record.sha256 is not None or not places.isdir(path):
        return
    found = {name: (size_of(places.below(path, name)), None) for name in listing(path)}
    known = {name: facts for name, facts in found.items() if name in record.shards}
    told = parts_differ(record, known)
    if told:
        yield _finding(
            path,
            code="file-changed",
            expected=_bytes_told(None, record.size),
            found=_bytes_told(None, sum(size for size, _ in known.values())),
            message=f"the files do not match the record: {told}",
        )


def _difference(examined: Examined, digested: Examined, record: FileRecord) -> CheckFinding:
    finding = _difference_of(examined, digested, record)
    if record.sha256 is not None or examined.sha256 is not None:
        return finding
    told = parts_differ(record, {shard.name: (shard.size, shard.sha256) for shard in examined.shards})
    return replace(finding, message=f"{finding.message}; {told}") if told else finding


def _difference_of(examined: Examined, digested: Examined, record: FileRecord) -> CheckFinding:
    if record.content_digest is not None and record.content_digest in (digested.content_digest, digested.former_digest):
        how = f"a {record.format} file was recorded, but this is a {examined.format} file"
        if record.whole_digest is not None and digested.whole_digest == record.whole_digest:
            how = "everything else is the same too (the whole digests agree); only the layout of the file differs"
        elif examined.format == record.format:
            how = "the difference is in the layout of the file or in what is stored beside the tensors"
            if record.whole_digest is not None:
                how = "what is stored beside them differs (the whole digests differ): ckptkit diff --strict shows it"
        return _finding(
            examined.path,
            code="file-rewritten",
            expected=_bytes_told(record.sha256, record.size, record.format),
            found=_bytes_told(examined.sha256, examined.size, examined.format),
            message=f"different bytes than recorded, but the same tensors (the content digests agree): {how}",
        )
    if digested.content_digest is None and record.content_digest is None:
        return _finding(
            examined.path,
            code="file-changed",
            expected=_bytes_told(record.sha256, record.size),
            found=_bytes_told(examined.sha256, examined.size),
            message="different bytes than recorded; neither file contains a tensor",
        )
    return _finding(
        examined.path,
        code="tensors-differ",
        expected=record.content_digest or "no tensors",
        found=digested.content_digest or "no tensors",
        message=f"the tensors do not match the record: {_which(digested, record)}",
    )


def _which(digested: Examined, record: FileRecord) -> str:
    if record.tensors is None:
        return (
            "the manifest has only one digest for all of them, so the ones that differ cannot be named (see "
            "--digests tensor)"
        )
    found = {tensor.name: tensor for tensor in digested.tensors}
    names = sorted({*found, *record.tensors})
    parts = {
        "missing": [name for name in names if name not in found],
        "not recorded": [name for name in names if name not in record.tensors],
        "with another dtype or shape": [],
        "with different values": [],
    }
    for name in names:
        if name in found and name in record.tensors and _fact(found[name]) != _recorded(record.tensors[name]):
            same_kind = _fact(found[name])[:2] == _recorded(record.tensors[name])[:2]
            kind = "with different values" if same_kind else "with another dtype or shape"
            text = name if same_kind else f"{name} ({_told(record.tensors[name])} → {_told(found[name])})"
            parts[kind].append(text)
    told = [f"{len(some):,} {kind} ({listed(some)})" for kind, some in parts.items() if some]
    if told:
        return f"of {count_of(len(record.tensors), 'tensor')} {'; '.join(told)}"
    if digested.others != record.others:
        return "the plain tensors match, but other values do not: " + listed(
            sorted(set(digested.others) ^ set(record.others))
        )
    return "each plain tensor matches, but other values do not: " + listed(digested.others or ("their order",))


def _fact(tensor: TensorFact) -> tuple[str, tuple[int, ...], str | None]:
    return tensor.dtype, tensor.shape, tensor.digest


def _recorded(tensor: TensorRecord) -> tuple[str, tuple[int, ...], str | None]:
    return tensor.dtype, tensor.shape, tensor.digest


def _told(tensor: TensorFact | TensorRecord) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _contradictions(examined: Examined, record: FileRecord) -> Iterator[CheckFinding]:
    """The facts in a record that the file with its hash contradicts: someone edited the manifest."""
    for name, recorded, found in (
        ("format", record.format, examined.format),
        ("kind", record.kind, examined.kind),
        ("others", list(record.others[:_MOST_LISTED]), list(examined.others[:_MOST_LISTED])),
    ):
        is_older = name == "others" and record.whole_digest is None and {*record.others} <= {*examined.others}
        if recorded != found and not is_older:
            yield _contradiction(examined, name, recorded, found, f"{name} {recorded}, and it is {found}")
    if record.tensors is None:
        return
    facts = {tensor.name: (tensor.dtype, tensor.shape) for tensor in examined.tensors}
    wrong = [
        name
        for name in sorted({*facts, *record.tensors})
        if name not in facts
        or name not in record.tensors
        or facts[name] != (record.tensors[name].dtype, record.tensors[name].shape)
    ]
    if wrong:
        few = wrong[:_MOST_LISTED]
        recorded_ones = [f"{name} {_told(record.tensors[name])}" for name in few if name in record.tensors]
        found_ones = [f"{name} {facts[name][0]} {list(facts[name][1])}" for name in few if name in facts]
        yield _contradiction(
            examined,
            "tensors",
            recorded_ones,
            found_ones,
            f"tensors that it does not have in that form: {listed(wrong)}",
        )


def _contradiction(examined: Examined, name: str, expected: Any, found: Any, what: str) -> CheckFinding:
    return _finding(
        examined.path,
        code="manifest-contradicts",
        expected=expected,
        found=found,
        message=f"the bytes match the recorded hash, but the record says {what}",
    )


def golden_findings(path: str, record: FileRecord, folder: str) -> Iterator[CheckFinding]:
    """Whether the file of recorded outputs is there, and is the manifest's."""
    if record.golden is None:
        return
    golden = os.path.normpath(os.path.join(folder, *record.golden.path.split("/")))
    try:
        found = file_sha256(golden)
    except MissingFileError:
        found = "no such file"
    except CkptkitError as error:
        found = str(error)
    if found != record.golden.sha256:
        yield _finding(
            path,
            code="golden-changed",
            expected=f"{golden}: sha256 {record.golden.sha256}",
            found=found,
            message=f"the outputs recorded in {golden} do not match the manifest",
        )


def _finding(path: str, *, code: str, expected: Any, found: Any, message: str) -> CheckFinding:
    return CheckFinding(
        code=code, severity="error", path=path, rule="manifest", expected=expected, found=found, message=message
    )


_IGNORE = " --ignore-checksums"

_FIT_CHECKS = ("fit", "load", "weights")
"""Checks of the verifier that need no forward pass."""


def model_findings(
    path: str, policy: Policy, golden: str | None, architecture: Architecture | None, verify: Callable[..., Report]
) -> Iterator[CheckFinding]:
    """What the verifier finds to be wrong with a file.

    Args:
        path: the file.
        policy: what it must meet.
        golden: the file of its recorded outputs.
        architecture: the known model it is of.
        verify: `ckptkit.verify`.

    The model is that of ``fits``; without it that of the golden file, or the identified architecture.

    Raises:
        MissingDependencyError: torch, or the package of the reference, is not installed.
    """
    rule = "fits" if policy.fits is not None else "forward"
    options: dict[str, Any] = {
        "model": policy.fits,
        "model_args": dict(policy.model_args),
        "allow_part": policy.allow_part,
    }
    if policy.forward and golden is not None:
        options["golden"] = golden  # with the model and the inputs, if they are not given
    elif policy.fits is None and architecture is not None and not architecture.prefix:
        options["model"] = architecture.reference
        options["model_args"] = {**architecture.args, **policy.model_args}
    elif policy.fits is None:
        yield _not_run(
            path,
            rule,
            "a model to run",
            "the forward pass was asked for, but no model is named (--fits REF), in a golden file, or identified",
        )
        return
    try:
        # Checksums were held already, or the file's own is the manifest's.  What is advised does hold them.
        options |= {"forward": policy.forward, "input_shapes": policy.input_shapes, "ignore_checksums": True}
        report = verify(path, **options)
    except MissingDependencyError:
        raise
    except CkptkitError as error:
        message = re.sub(r"--model(?!-)", "--fits", str(error))  # as the option is called here
        yield _not_run(path, rule, _reference(options), message.removeprefix(f"{path}: "))
        return
    yield from _model_rules(report, path, policy, _reference(options))


def _model_rules(report: Report, path: str, policy: Policy, reference: str) -> Iterator[CheckFinding]:
    """The verifier's findings but those that are only worth knowing, each under the rule whose it is."""
    findings: list[VerifyFindingDocument] = report.to_dict()["findings"]
    for finding in findings:
        if finding["severity"] == "info" or finding["code"] == CODE:  # which its own rule has reported
            continue
        fits = policy.fits is not None and (not policy.forward or finding["check"] in (None, *_FIT_CHECKS))
        fix = finding["fix"]
        yield CheckFinding(
            code=finding["code"],
            severity=finding["severity"],
            path=path,
            rule="fits" if fits else "forward",
            expected=f"{'loads into' if fits else 'runs in'} {reference}",
            found=finding["code"],
            message=finding["message"],
            fix=fix if fix is None or policy.ignore_checksums else fix.replace(_IGNORE, ""),
        )


def _reference(options: dict[str, Any]) -> str:
    return str(options["model"] or "the model of the golden file")


def _not_run(path: str, rule: str, expected: str, message: str) -> CheckFinding:
    return CheckFinding(
        code="check-not-run",
        severity="error",
        path=path,
        rule=rule,
        expected=expected,
        found="could not be checked",
        message=message,
    )
