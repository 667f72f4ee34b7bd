"""Inspect, convert, verify, compare and check PyTorch checkpoints without executing them.

Importing ckptkit imports neither torch nor numpy.

The layers, each importing only from those to its right; a test enforces it:

    cli, testing > page > api > checkpoint_file, released > verifier > torch_bridge > differences
        > inspection, conversion > diagnose, compare, stats, architectures, digests, options > rewrite > formats
        > transfer > normalize > pickling > plan, casting > checkpoint > tensor > computed > places > remote
        > bytesource > codes, documents, fleet, fixes > report, arguments, dtypes, limits, extras > nearness
        > errors, display, shell, startup

The purpose of rooms whose names do not say it:

- `plan`: what writers make and `transfer` carries out; neither knows the other.
- `compare`: the proof that an output is right. It reads through the readers, which the mover of bytes must not know.
- `conversion`: turns options into rewriters, carries out one output or a folder of them, and reports what happened.
- `inspection`: makes the document that is shown; `diagnose` finds what is noteworthy about a checkpoint.
- `computed`: bytes that must be made before they can be moved. `casting` computes one kind. Another kind reads tensors
  and is in `transfer`, which is why `rewrite` is above that.
- `normalize`: has the one enumeration of everything in a file that has bytes (`tensors`), and the one comparison of two
  trees (`trees`). Everything that shows, compares, counts or digests uses them.
- `formats`: the containers, one module each. Everything others ask about a container is in its row of the table
  (`containers`, `format_named`); no other room compares their names. `distributed` has the folders that several
  processes wrote, one module per layout. `sources` and `inside` open anything that can take a file's place: open files,
  compressed files, members of archives. `folder` lists the content of a folder, `contents` finds pickles and programs
  in bytes that no reader understands, and `refused` says what files that are not checkpoints are.
- `remote`: makes a byte source of a file on another machine, one module per kind of server. `places` says what a path
  is and what is below it, for paths and URLs alike.
- `fleet`: runs large numbers of tasks in several processes, and knows nothing about checkpoints.
- `released`: what `ckptkit.manifest` records and `ckptkit.check` compares files with. `digests` says when two files
  contain the same tensors. `differences` makes what `ckptkit.diff` reports.
- `architectures`: knows which models have given names and shapes. `options` declares the options of every command, and
  `arguments` checks values. `nearness` finds the word that was meant, `fixes` the one command that does what several
  findings advise, and `shell` quotes it.
- `documents`: has the types of JSON documents; `display` escapes text and formats sizes, `page` makes HTML pages, and
  `startup` declares dataclasses, and regular expressions that are only compiled when they are used, in less time.

No room has the name of a public function: importing it would put the module in the function's place. That is why
`ckptkit.verify` does its work in `verifier`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckptkit.extras import __version__ as __version__

if TYPE_CHECKING:
    from ckptkit.api import (
        CheckpointFile,
        Rewriter,
        check,
        convert,
        diff,
        inspect,
        load,
        load_state_dict,
        manifest,
        open,  # noqa: A004 - ckptkit.open
        save,
        verify,
    )
    from ckptkit.checkpoint import Checkpoint, Origin, Part, Section, StateDict, Storage, TensorEntry
    from ckptkit.conversion.document import ConvertFolderDocument
    from ckptkit.differences import Difference
    from ckptkit.differences.difference import DiffDocument
    from ckptkit.documents import (
        CheckDocument,
        ConvertDocument,
        ExplainDocument,
        ManifestDocument,
        ReportDocument,
        VerifyDocument,
        WrittenManifest,
    )
    from ckptkit.errors import (
        AmbiguousError,
        CkptkitError,
        CorruptError,
        DestinationExistsError,
        DTypeError,
        FailedReportError,
        FileAccessError,
        FormatError,
        KeyCollisionError,
        LimitError,
        MissingDependencyError,
        MissingFileError,
        PartError,
        RewriteError,
        SectionError,
        UnknownFormatError,
        UnsupportedError,
        VerifyError,
    )
    from ckptkit.inspection.document import (
        AdapterDocument,
        InspectDocument,
        InspectedFile,
        QuantizationDocument,
        UnreadFile,
    )
    from ckptkit.pickling.foreign import Foreign
    from ckptkit.plan import Plan
    from ckptkit.released.document import CheckEnd, CheckHead, CheckLine
    from ckptkit.released.manifest_file import Manifest
    from ckptkit.released.results import CheckFinding, CheckReport
    from ckptkit.report import Finding, Report
    from ckptkit.rewrite import (
        AddModule,
        AddPrefix,
        AllTensors,
        CastDtype,
        Compact,
        Densify,
        KeepBeside,
        LeaveOut,
        Like,
        MapLocation,
        PutUnder,
        Rename,
        Select,
        StripModule,
        StripPrefix,
        Tied,
        WeightsOnly,
    )

__all__ = [
    "AdapterDocument",
    "AddModule",
    "AddPrefix",
    "AllTensors",
    "AmbiguousError",
    "CastDtype",
    "CheckDocument",
    "CheckEnd",
    "CheckFinding",
    "CheckHead",
    "CheckLine",
    "CheckReport",
    "Checkpoint",
    "CheckpointFile",
    "CkptkitError",
    "Compact",
    "ConvertDocument",
    "ConvertFolderDocument",
    "CorruptError",
    "DTypeError",
    "Densify",
    "DestinationExistsError",
    "DiffDocument",
    "Difference",
    "ExplainDocument",
    "FailedReportError",
    "FileAccessError",
    "Finding",
    "Foreign",
    "FormatError",
    "InspectDocument",
    "InspectedFile",
    "KeepBeside",
    "KeyCollisionError",
    "LeaveOut",
    "Like",
    "LimitError",
    "Manifest",
    "ManifestDocument",
    "MapLocation",
    "MissingDependencyError",
    "MissingFileError",
    "Origin",
    "Part",
    "PartError",
    "Plan",
    "PutUnder",
    "QuantizationDocument",
    "Rename",
    "Report",
    "ReportDocument",
    "RewriteError",
    "Rewriter",
    "Section",
    "SectionError",
    "Select",
    "StateDict",
    "Storage",
    "StripModule",
    "StripPrefix",
    "TensorEntry",
    "Tied",
    "UnknownFormatError",
    "UnreadFile",
    "UnsupportedError",
    "VerifyDocument",
    "VerifyError",
    "WeightsOnly",
    "WrittenManifest",
    "check",
    "convert",
    "diff",
    "inspect",
    "load",
    "load_state_dict",
    "manifest",
    "open",
    "save",
    "verify",
]


_DOCUMENTS = ("CheckEnd", "CheckHead", "CheckLine", "InspectedFile", "UnreadFile", "WrittenManifest")


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that a command starts without all that it does not need."""
    if name not in __all__:
        from importlib.util import find_spec

        if name.startswith("_") or find_spec(f"ckptkit.{name}") is None:
            raise AttributeError(f"module 'ckptkit' has no attribute {name!r}")
        return import_module(f"ckptkit.{name}")
    for room in ("errors", "report", "checkpoint", "api"):
        module = import_module(f"ckptkit.{room}")
        if name in module.__all__:
            return globals().setdefault(name, getattr(module, name))
    if name == "Difference":
        from ckptkit.differences import Difference

        return Difference
    if name == "Manifest":
        from ckptkit.released.manifest_file import Manifest

        return Manifest
    if name == "Foreign":
        from ckptkit.pickling.foreign import Foreign

        return Foreign
    if name in ("CheckFinding", "CheckReport"):
        from ckptkit.released import results

        return getattr(results, name)
    if name.endswith("Document") or name in _DOCUMENTS:
        from ckptkit import documents
        from ckptkit.conversion import document as of_folders
        from ckptkit.differences import difference
        from ckptkit.inspection import document
        from ckptkit.released import document as of_runs

        modules = (documents, document, difference, of_folders, of_runs)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    from ckptkit import plan, rewrite

    return getattr(plan if name == "Plan" else rewrite, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "import_module"})
