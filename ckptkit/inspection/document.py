"""The document of ``ckptkit inspect``, field by field; `ckptkit.documents` says what documents are."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from ckptkit.checkpoint import Kind, Trust, Verdict
from ckptkit.documents import ErrorDocument
from ckptkit.normalize.adapters import AdapterDocument
from ckptkit.normalize.quantized import LayoutDocument, QuantizationDocument
from ckptkit.report import CombinedFix, FindingDocument

__all__ = ["AdapterDocument", "EveryTensorDocument", "FileFacts", "InspectDocument", "InspectedFile",
           "LayoutDocument", "ModuleDocument", "QuantizationDocument", "SectionDocument", "StorageDocument",
           "TensorDocument", "TrainingDocument", "UnreadFile", "WeightsDocument"]  # fmt: skip

_Class = TypedDict("_Class", {"class": str})


class WeightsDocument(TypedDict):
    """The selected weights.

    Attributes:
        path: where they are in the file.
        tensors: names, tied ones too.
        parameters, buffers: elements; tied tensors count once.
        nbytes: of both; tied tensors count once.
    """

    path: str
    tensors: int
    parameters: int
    buffers: int
    nbytes: int


class SectionDocument(TypedDict):
    """A part of a file that contains tensors.

    Attributes:
        path: the keys that lead to it.
        kind: ``"state_dict"``, ``"whole_model"``, ``"optimizer"``, ``"collection"`` or ``"tensor"``.
        tensors: how many are in it.
        parameters, buffers: elements; ``None``: it is not weights.
        nbytes: of the storages it uses, shared ones once.
        share: of the file's size, 0 to 1.
        selected: whether commands use it as the weights.
    """

    path: str
    kind: str
    tensors: int
    parameters: int | None
    buffers: int | None
    nbytes: int
    share: float
    selected: bool


class StorageDocument(TypedDict):
    """How the bytes of a file are used.

    Attributes:
        storages: how many there are.
        nbytes: of all of them.
        unique_tensor_nbytes: of all tensors, tied ones once.
        tied: tensors that also have another name.
        shared: tensors that are different views of a storage that others view too.
        unused_nbytes: bytes of storages that no tensor uses.
    """

    storages: int
    nbytes: int
    unique_tensor_nbytes: int
    tied: int
    shared: int
    unused_nbytes: int


class EveryTensorDocument(TypedDict):
    """What all tensors of a file have, whichever of them are listed.

    Attributes:
        tensors: names of tensors, tied ones too.
        locations: device tags.
        dtypes: those of the selected weights, if any, else of all; that of most bytes first.
        roles_inferred: whether parameters are told from buffers by name and dtype, in the same tensors.
    """

    tensors: int
    locations: list[str]
    dtypes: list[str]
    roles_inferred: bool


class _Stats(TypedDict):
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    zeros: int | None
    nan: int | None
    inf: int | None


class StatsDocument(_Stats, total=False):
    """Statistics of a tensor's values; ``None`` if they cannot be computed.

    Attributes:
        min, max, mean, std: of the finite values; ``std`` is that of the population.
        zeros, nan, inf: number of such elements.
        histogram: only for pages; see `ckptkit.stats.Histogram`.
    """

    histogram: list[int] | None


class _Tensor(TypedDict):
    section: str | None
    name: str
    dtype: str
    shape: list[int]
    stride: list[int]
    nbytes: int
    location: str
    storage: str
    role: Literal["parameter", "buffer", "unknown"]
    role_inferred: bool
    tied_to: str | None


class TensorDocument(_Tensor, total=False):
    """One tensor, under one name.

    Attributes:
        section: the path of the section it is in; ``None``: in none.
        name: in its section.
        shape, stride: per dimension, in elements; a size that varies in a nested value is -1.
        nbytes: of its elements, whatever its storage has.
        location: the device tag in the file: ``"cpu"``, ``"cuda:1"``; ``""``: it has none.
        storage: key of its storage; tensors with the same key share memory.
        role: its role in its module; ``"unknown"`` outside weights.
        role_inferred: whether the role is inferred from name and dtype.
        tied_to: an earlier name of the same tensor, after its section if that is another.
        form: ``"storage"``, ``"numpy"`` or ``"quantized"``, ``"sparse"`` and the like: how it is stored in the file.
        value: for a value that is not a plain tensor, what it is, in words.
        stats: if requested.
    """

    form: str
    value: str
    stats: StatsDocument


class OptimizerDocument(TypedDict):
    """An optimizer's state.

    Attributes:
        path: where it is in the file.
        kind: its class; ``None``: its options do not reveal it.
        inferred: whether the class is inferred from the options; otherwise the pickle names it.
        groups: of parameters.
        lr: the learning rate of each group.
        steps: number of steps taken.
        tensors, nbytes: of its state.
    """

    path: str
    kind: str | None
    inferred: bool
    groups: int
    lr: list[float | str | None]
    steps: float | str | None
    tensors: int
    nbytes: int


class SchedulerDocument(TypedDict):
    """A learning rate scheduler's state; ``path``, ``kind``, ``inferred``, ``lr`` as for an optimizer."""

    path: str
    kind: str | None
    inferred: bool
    last_epoch: float | str | None
    lr: list[float | str | None]


class TrainingDocument(TypedDict):
    """What training left beside the weights.

    Attributes:
        scalars: numbers and short text by name: ``epoch``, ``args.lr``; long text is cut.
        optimizers, schedulers: everything that is or looks like one.
    """

    scalars: dict[str, Any]
    optimizers: list[OptimizerDocument]
    schedulers: list[SchedulerDocument]


class GlobalDocument(TypedDict):
    """A Python name in a pickle, never resolved; or a part that matters for trust too, such as compiled code.

    Attributes:
        name: ``"module.attribute"``, or what the part is.
        verdict: how much a loader would have to trust it.
        count: how often it is called; for parts, how many there are.
        where: a few of the places: the record, and the keys in its tree.
        reason: what else to know about it; ``""``: nothing.
    """

    name: str
    verdict: Verdict
    count: int
    where: list[str]
    reason: str


class ModuleDocument(_Class):
    """A module of a whole model; its ``class`` is ``"package.Class"``.

    Attributes:
        path: as in ``named_modules()``.
        text: the class with its settings, as ``print`` shows it.
        settings: its scalar attributes.
        children: their paths.
    """

    path: str
    text: str
    settings: dict[str, Any]
    children: list[str]


class PartDocument(TypedDict):
    """Which part of a checkpoint stored in several files a file is; see `ckptkit.Part`."""

    layout: str
    piece: str
    lacks: str
    instead: str | None
    opens: bool


class SpreadDocument(TypedDict):
    """How a folder that several processes wrote is spread over files; see `ckptkit.checkpoint.Spread`."""

    world_size: int | None
    mesh: dict[str, int] | None
    files: int
    tag: str | None


class ArchitectureDocument(TypedDict):
    """A known model that the weights belong to or resemble.

    Attributes:
        reference: as ``ckptkit verify --model`` takes it; ``args`` its arguments.
        exact: whether names and shapes are the same.
        similarity: 0 to 1; 1 if it is exact.
        prefix: before the model's own names, apart from wrappers.
        others: tensors that do not have the prefix.
        differs: the one thing in which it is not exact.
        label: the model in words.
    """

    reference: str
    args: dict[str, Any]
    exact: bool
    similarity: float
    prefix: str
    others: int
    differs: str | None
    label: str


class FileFacts(TypedDict):
    """Everything about one file except its tensors; see `InspectedFile`."""

    path: str
    size: int
    format: str
    writer: str | None
    kind: Kind
    state_dict: WeightsDocument | None
    sections: list[SectionDocument]
    storage: StorageDocument
    every_tensor: EveryTensorDocument
    metadata: dict[str, Any]
    training: TrainingDocument
    has_pickle: bool
    trust: Trust
    globals: list[GlobalDocument]
    modules: list[ModuleDocument]
    part: PartDocument | None
    architecture: list[ArchitectureDocument]
    adapter: AdapterDocument | None
    quantization: QuantizationDocument | None
    layout: SpreadDocument | None
    findings: list[FindingDocument]
    combined_fix: CombinedFix | None
    error: None


class InspectedFile(FileFacts):
    """The content of one file.

    Attributes:
        size: of the file, with its shards.
        format: the container: ``"torch-zip"``, ``"safetensors"``.
        writer: what wrote it, with its version; ``None``: the file does not say.
        kind: of content.
        state_dict: the selected weights; ``None``: there are none, or several of which none was chosen.
        sections: the parts that contain tensors, in file order.
        storage: how the bytes are used.
        every_tensor: what all tensors have, whichever are listed.
        tensors: every tensor, under each of its names, in the order requested; with ``--filter`` those that match.
        metadata: the container's own text, and the scalars of the training state.
        training: what training left.
        has_pickle: whether loading it with other tools unpickles something.
        trust: how much a loader that executes pickles would have to trust it.
        globals: the names in its pickles.
        modules: for a whole model, parents first.
        part: what it is a part of; ``None``: it is whole.
        architecture: known models, best first.
        adapter: what the weights add to a model; ``None``: they contain no adapter.
        quantization: how the weights are quantized; ``None``: they are not, or have no scales beside them.
        layout: for a folder that several processes wrote, how it is spread over files; ``None``: it is not one.
        findings: noteworthy facts, most severe first.
        combined_fix: the single command that does what the findings advise; ``None``: none advises a conversion.
        error: ``None``, because it could be read; see `UnreadFile`.
    """

    tensors: list[TensorDocument]


class UnreadFile(TypedDict):
    """A file that could not be read, and why; ``globals`` are names in its pickles, if they are the reason.

    Findings are those of a hostile sharded checkpoint.
    """

    path: str
    size: None
    format: None
    writer: None
    kind: None
    state_dict: None
    sections: list[Any]
    storage: None
    every_tensor: None
    tensors: list[Any]
    metadata: dict[str, Any]
    training: None
    has_pickle: None
    trust: Trust | None
    globals: list[GlobalDocument]
    modules: list[Any]
    part: None
    architecture: list[Any]
    adapter: None
    quantization: None
    layout: None
    findings: list[Any]
    combined_fix: None
    error: ErrorDocument


class InspectDocument(TypedDict):
    """The document of ``ckptkit inspect``.

    Attributes:
        passed_over: how many files in the folders are not checkpoints, by kind.
        files: in the order they were named; those of a folder by name.
    """

    schema_version: int
    passed_over: dict[str, int]
    files: list[InspectedFile | UnreadFile]
