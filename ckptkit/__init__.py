"""Inspect, convert, verify, compare and check PyTorch checkpoints without executing them.

Importing ckptkit imports neither torch nor numpy.

The layers, each importing only from those to its right; a test enforces it:

    cli, testing > page > api > checkpoint_file, released > verifier > torch_bridge > differences
        > inspection, conversion > diagnose, compare, stats, architectures, digests, options > rewrite > formats
        > transfer > normalize > pickling > plan, casting > checkpoint > tensor > computed > places > remote
        > bytesource > codes, documents, fleet, fixes > report, arguments, dtypes, limits, extras > nearness
        > errors, display, shell

Some rooms need a reason: `plan`, because writers make plans and `transfer` executes them and neither should know the
other; `compare`, because the proof that an output is right must go through the readers, which the mover of bytes must
not know; `inspection` (the document that is shown) apart from `diagnose` (what is remarkable about a checkpoint).
`architectures` knows which models have a checkpoint's names and shapes, `arguments` what values mean that are given,
`nearness` which word was probably meant, `shell` how a command is typed, and `options` declares what each command can
be asked for.  `conversion` turns options into rewriters, plans and carries out one output, or those of a folder, and
tells what came of it; `checkpoint_file` is what `open` gives.  `remote` makes a byte source of a file on another
machine, one module a kind of server, and `places` answers what a path is, and what is below it, of paths and URLs
alike.  `fleet` has work done for very many tasks in several processes, and knows nothing of checkpoints.  `page` makes
self-contained HTML pages of documents, with the styles and scripts that they consist of.  `documents` has the types of
what commands print as JSON; `differences` is what `ckptkit.diff` tells; `released` what `ckptkit.manifest` records and
`ckptkit.check` holds files against; `digests` says when two files contain the same tensors.  Inside `normalize` stand
the one enumeration of everything in a file that has bytes (`tensors`) and the one comparison of two trees (`trees`),
which everything that shows, compares, counts or digests goes through.  Bytes that have to be made before they can be
moved are `computed`, and `casting` is what one way of making them computes; what another does, which reads tensors for
it, is in `transfer`, which is why `rewrite` is above that.  Inside `formats` stand the containers, one module each, and
all that others ask about one in its row of the table (`containers`, `format_named`): no other room compares their
names; `distributed` are the folders that several processes wrote, one module a layout, and the way from a folder to the
one that it means; `sources` and `inside` are what may be given in a file's place (open files, what is compressed or is
in an archive), `tar_archive` and `zip_archive` are tar and zip as such, `folder` says what is in a folder, `contents`
what pickles and programs are in bytes that no reader reads, and `refused` is what is said of files that are not
checkpoints.  No room has the name of a public function: importing it would put the module in the function's place,
which is why what does the work of `ckptkit.verify` lives in `verifier`.
"""

from typing import TYPE_CHECKING, Any

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
from ckptkit.extras import __version__ as __version__
from ckptkit.report import Finding, Report

if TYPE_CHECKING:
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
    """Import what only writing needs when it is asked for, so that inspecting starts faster."""
    if name not in __all__:
        raise AttributeError(f"module 'ckptkit' has no attribute {name!r}")
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
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING"})
