"""What users write with the documents and errors of ckptkit, as mypy sees it; checked with the package, never run.

Each wrong line is one that mypy must refuse: strict as it is here, it tells of an ignored error that is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ckptkit


def inspected(path: Path) -> dict[str, int]:
    """The document of ``inspect``: every field has its type, and what may be missing has to be asked about."""
    file: ckptkit.InspectedFile = ckptkit.inspect(path, filters="*.weight", stats=True)
    weights = file["state_dict"]
    parameters: int = 0 if weights is None else weights["parameters"]
    adapter: ckptkit.AdapterDocument | None = file["adapter"]
    if adapter is not None and adapter["rank"] != "mixed":
        rank: int | None = adapter["rank"]
        print(adapter["kind"], rank, adapter["targets"].get("q_proj", 0) + 1)
    quantization: ckptkit.QuantizationDocument | None = file["quantization"]
    if quantization is not None:
        print([layout["block"] for layout in quantization["layouts"] if layout["method"] == "fp8"])
    for finding in file["findings"]:
        print(finding["severity"] == "error", finding["fix"] or "nothing to run")
    return {tensor["name"]: tensor["nbytes"] for tensor in file["tensors"]} | {"": parameters}


def parsed(document: ckptkit.InspectDocument) -> list[str]:
    """What ``ckptkit inspect --json`` prints: files that could be read, and those that could not."""
    unread: list[str] = []
    for file in document["files"]:
        if file["error"] is not None:
            unread.append(f"{file['path']}: {file['error']['message']}")
        else:
            print(file["size"])
    return unread


def converted(path: Path) -> int:
    """The report of ``convert``, and its document."""
    report = ckptkit.convert(path, path.with_suffix(".safetensors"), strip_module=True, dtype="bfloat16")
    report.raise_if_failed()
    document: ckptkit.ConvertDocument = report.to_dict()
    renamed: list[str] = [rename["to"] for rename in document["renames"]]
    print(report.ok, renamed, document["plan"]["casts"]["nbytes"] + 1, document["section"])
    any_report: ckptkit.Report = report
    details: Mapping[str, Any] = any_report.details
    return len(details)


def verified(path: Path) -> float:
    """The report of ``verify``, and its document."""
    report: ckptkit.Report[ckptkit.VerifyDocument] = ckptkit.verify(path, model="torchvision:resnet18", device="auto")
    document = report.to_dict()
    failed: list[str] = [check["name"] for check in document["checks"] if check["severity"] == "error"]
    print(failed, document["coverage"]["parameters_share"] < 1.0)
    return document["seconds"].get("forward", 0.0)


def compared(path: Path, other: Path) -> dict[str, float]:
    """What ``diff`` gives."""
    difference: ckptkit.Difference = ckptkit.diff(path, other, atol=1e-6)
    document: ckptkit.DiffDocument = difference.to_dict()
    print(difference.equal, document["unchanged"] + 1, [pair["to"] for pair in document["renamed"]])
    return {row["name"]: row["max_abs"] or 0.0 for row in document["changed"]}


def released(folder: Path) -> int:
    """What ``manifest`` and ``check`` give."""
    manifest: ckptkit.Manifest = ckptkit.manifest(folder, folder / "weights.lock.json", digests="tensor")
    written: ckptkit.WrittenManifest = manifest.to_dict()
    report: ckptkit.CheckReport = ckptkit.check(folder, manifest=folder / "weights.lock.json", no_pickle=True)
    document: ckptkit.CheckDocument = report.to_dict()
    for finding in document["findings"]:
        print(finding["path"], finding["rule"], finding["expected"])
    return report.exit_code + sum(file["size"] for file in written["files"])


def caught(path: Path) -> tuple[str, ...]:
    """Errors by their fields."""
    try:
        ckptkit.convert(path, "out.safetensors", strip_module=True)
    except ckptkit.KeyCollisionError as error:
        return (error.first, error.second, error.target)
    except ckptkit.LimitError as error:
        print(error.actual - error.limit, error.offset)
    except ckptkit.SectionError as error:
        return error.names
    except ckptkit.FormatError as error:
        place: str = error.where or "the file"
        print(error.path, place, error.offset or 0, error.message)
    except ckptkit.CkptkitError as error:
        print(error.path or "no file", error.names)
    return ()


def wrong(path: Path) -> None:
    """A field that is none, one that may be missing, and values of other types."""
    file = ckptkit.inspect(path)
    print(file["state_dict"]["parameters"])  # type: ignore[index]
    print(file["tensor"])  # type: ignore[typeddict-item]
    print(ckptkit.convert(path, path).to_dict()["renamed"])  # type: ignore[typeddict-item]
    print(ckptkit.verify(path).to_dict()["passes"].upper())  # type: ignore[attr-defined]
    print(ckptkit.diff(path, path).to_dict()["unchanged"] + "")  # type: ignore[operator]
    names: list[str] = ckptkit.CkptkitError("so").names  # type: ignore[assignment]
    rank: int = ckptkit.inspect(path)["adapter"]["rank"]  # type: ignore[index, assignment]
    print(names, rank)
