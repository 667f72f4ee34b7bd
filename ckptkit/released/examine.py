"""What is to be known of a released file, found in one pass over it.

Nothing is executed, and torch is not needed.  Bytes of tensors are read only where hashes, digests or counts of NaN and
Inf are asked for, and then once for all of them (`ckptkit.released.reading`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ckptkit import formats
from ckptkit.architectures import Architecture, identify
from ckptkit.bytesource import Source
from ckptkit.checkpoint import Checkpoint, GlobalUse, Kind, Storage, TensorEntry, Trust, as_tensor
from ckptkit.diagnose import diagnose
from ckptkit.digests import DigestLine, content_digest, tree_digest, unwrapped_names, value_kind, whole_digest
from ckptkit.errors import CkptkitError, CorruptError
from ckptkit.inspection.listing import list_tensors, storage_names
from ckptkit.inspection.state import training_document
from ckptkit.normalize.modules import tensor_role
from ckptkit.normalize.parts import part_findings, require_whole
from ckptkit.normalize.sections import is_plain_value, join
from ckptkit.normalize.tensors import FoundTensor, other_tensors
from ckptkit.normalize.wrappers import unwrapped_in_digests, wrapper_of
from ckptkit.pickling.arrays import Array
from ckptkit.pickling.inert import InertDict, Object, mapping_shell, tensors_in, walk
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.released.reading import OtherValue, Reading, is_opaque, other_values_in, read_through
from ckptkit.report import Finding
from ckptkit.stats import NonFinite
from ckptkit.transfer.checksums import damage_text
from ckptkit.transfer.workers import in_parallel

__all__ = ["Examined", "ShardFact", "TensorFact", "examine_all", "examine_file", "over_the_cores", "size_of"]

_NOT_PLAIN = "(not plain tensors)"
"""Name of all values that are not plain tensors, in a file without selected weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFact:
    """One tensor of the weights.

    Attributes:
        name: without wrappers, as in content digests (`ckptkit.digests`).
        dtype: torch name.
        shape: its sizes.
        nbytes: its size in bytes, contiguous.
        digest: ``"sha256:…"`` of its values; ``None``: not asked for.
        nan, inf: how many of its values are; ``None``: not asked for, or not known to numpy.
        is_parameter: whether it is a parameter, not a buffer (where a file does not say it, the customary names
            of buffers tell); ``None``: it is none of a model's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str | None = None
    nan: int | None = None
    inf: int | None = None
    is_parameter: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFact:
    """One file of a sharded checkpoint: its name relative to the index, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A file, as far as it was looked at.

    Attributes:
        path: as it was given.
        size: in bytes, with its shards.
        sha256: of the file in hexadecimal (of an index, the index alone); ``None``: not asked for.
        format: container name.
        kind: what it holds.
        trust: what a loader that executes pickles would have to be trusted with.
        content_digest: of all tensors (`ckptkit.digests`); ``None``: not asked for, or there is no tensor.
        former_digest: the same in version 1.
        whole_digest: of everything in the file; ``None``: not asked for, or it has none.
        tensors: those of the weights, sorted by name; of a file without selected weights, all.
        others: names of the weights' values that are not plain tensors, or have attributes of their own, sorted.
        globals: every Python name in its pickles.
        unvouched: its parts that are code, or could not be looked into.
        has_pickle: whether it has any.
        is_program: whether it holds a program, of which only the weights can be written.
        has_optimizer: whether it holds the state of one.
        prefixes: of wrappers that names carry, such as ``"module."``, sorted.
        locations: device tags of all its storages, sorted.
        findings: what is remarkable about it, gravest first.
        part: the warning that it is a part of a checkpoint; ``None``: it is whole.
        architecture: the known model it is of, where every name and shape is that model's.
        shards: of a sharded checkpoint, in the order of the index.
        beside: what else in the file has values that may be NaN, named by section and place: tensors of other
            sections, in values that are none themselves, and numpy's arrays; only where values were counted.
        unseen: names of the weights' values in which nothing was found to look at.
        damage: what recorded checksums show to be damaged; ``None``: nothing, or they were not held.
        malformed: quantized, sparse and nested tensors whose parts do not fit each other, with what is wrong.
    """

    path: str
    size: int
    sha256: str | None
    format: str
    kind: Kind
    trust: Trust
    content_digest: str | None
    tensors: tuple[TensorFact, ...]
    others: tuple[str, ...]
    globals: tuple[GlobalUse, ...]
    unvouched: tuple[GlobalUse, ...]
    has_pickle: bool
    is_program: bool
    has_optimizer: bool
    prefixes: tuple[str, ...]
    locations: tuple[str, ...]
    findings: tuple[Finding, ...]
    part: Finding | None
    architecture: Architecture | None
    shards: tuple[ShardFact, ...] = ()
    beside: tuple[TensorFact, ...] = ()
    unseen: tuple[str, ...] = ()
    damage: str | None = None
    malformed: tuple[str, ...] = ()
    former_digest: str | None = None
    whole_digest: str | None = None


def examine_file(
    path: str,
    *,
    hash_file: bool,
    digest: bool,
    values: bool,
    checksums: bool = True,
    ignore_checksums: bool = False,
    allow_part: bool = True,
    whole: bool = False,
    threads: int = 2,
) -> Examined:
    """Look at a file, and read it once for all that is asked for.

    Args:
        path: the file; an index stands for its shards too.
        hash_file: whether to compute the SHA-256 of the file, and of its shards.
        digest: whether to digest the tensors' values.
        values: whether to count NaN and Inf in them.
        checksums: whether to hold recorded checksums against the bytes; what they show is among the findings.
        ignore_checksums: whether to forget them.
        allow_part: whether it may be a part of a checkpoint.
        whole: whether to digest everything else in the file too.
        threads: how many may hash side by side.

    Raises:
        PartError: it is a part, and may not be.
        FileAccessError: it cannot be opened or read.
        FormatError: it is not a checkpoint, damaged, changed while it was read, or asks for more than any checkpoint.
        DTypeError: values that would have to be computed are of a type that numpy does not know.
    """
    checkpoint, file = formats.read(path, ignore_checksums=ignore_checksums)
    try:
        require_whole(checkpoint, allow_part=allow_part)
        storages = _storages(checkpoint)
        held = [storage for storage in storages if checksums and storage.crc32 is not None]
        weights = _weights(checkpoint)
        inner = {name: list(tensors_in(value)) for name, value in weights.others}
        entries = [entry for _, entry, _ in weights.tensors]
        every = [*entries, *(as_tensor(node) for part in inner.values() for node in part)]
        every += map(as_tensor, tensors_in(list(weights.hanging.values())))
        if whole:
            every += map(as_tensor, tensors_in(_everything(checkpoint)))
        plain = {id(entry) for entry in entries}
        beside = list(other_values_in(checkpoint, plain, weights.others)) if values else []
        reading = (
            read_through(
                [file, *file.parts.values()],
                every,
                hash_files=hash_file,
                digest=digest,
                counted=[*entries, *(each.entry for each in beside if each.entry is not None)] if values else (),
                held=held,
                threads=threads,
            )
            if hash_file or digest or values or held
            else Reading()
        )
        facts = [_fact(name, entry, is_parameter, reading) for name, entry, is_parameter in weights.tensors]
        found = _examined(checkpoint, file, path, reading, facts, weights, storages)
        if digest:
            tell = partial(_digest_of, reading=reading)
            trees = {name: tree_digest(value, tell, flags=False) for name, value in weights.others}
            trees |= {name: tree_digest(hanging, tell, flags=False) for name, hanging in weights.hanging.items()}
            lines = [
                DigestLine(name=fact.name, kind=fact.dtype, shape=fact.shape, digest=fact.digest) for fact in facts
            ]
            lines += [
                DigestLine(name=name, kind=value_kind(value), parts=tuple(_parts(inner[name], reading)))
                for name, value in weights.others
            ]
            content = content_digest(
                replace(line, tree=trees[line.name]) if line.name in trees else line for line in lines
            )
            found = replace(
                found,
                content_digest=content,
                former_digest=content_digest(line for line in lines if line.name != _NOT_PLAIN) if trees else content,
                whole_digest=whole_digest(checkpoint, tell) if whole else None,
            )
        unseen = tuple(name for name, value in weights.others if values and is_opaque(value))
        return replace(found, beside=tuple(_beside_fact(each, reading) for each in beside), unseen=unseen)
    finally:
        file.close()


def examine_all(
    paths: Sequence[str],
    *,
    hash_file: bool,
    digest: bool,
    values: bool,
    checksums: bool = True,
    ignore_checksums: bool = False,
    allow_part: bool = True,
    whole: bool = False,
) -> Iterator[tuple[str, Examined | CkptkitError]]:
    """Look at several files, side by side over the processors; in the order given.

    Yields:
        Each path, and what was found or why it could not be.
    """
    results: dict[int, Examined | CkptkitError] = {}

    def work(number: int, threads: int) -> None:
        try:
            results[number] = examine_file(
                paths[number],
                hash_file=hash_file,
                digest=digest,
                values=values,
                checksums=checksums,
                ignore_checksums=ignore_checksums,
                allow_part=allow_part,
                whole=whole,
                threads=threads,
            )
        except CkptkitError as error:
            results[number] = error

    over_the_cores([size_of(path) for path in paths], work)
    for number, path in enumerate(paths):
        yield path, results[number]


def over_the_cores(sizes: Sequence[int], work: Callable[[int, int], object]) -> None:
    """Deal with several files side by side, the largest first, so that none is left for one processor at the end.

    Args:
        sizes: of each file, in bytes.
        work: called with a file's number and how many threads it may use.
    """
    cores = os.cpu_count() or 1
    threads = 2 if len(sizes) < cores else 1
    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    in_parallel((partial(work, number, threads) for number in order), nbytes=sum(sizes), most=cores)


def size_of(path: str) -> int:
    """Bytes of a file; 0 for what cannot be asked, which opening it will tell."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True, slots=True)
class _Weights:
    """The tensors that count, and the values beside them that are none; and the names as they are in the file."""

    tensors: list[tuple[str, TensorEntry, bool | None]]
    others: list[tuple[str, object]]
    names: list[str]

    @property
    def hanging(self) -> dict[str, object]:
        """Class and attributes of the tensors of classes of their own that have any, by name."""
        classes = ((name, entry) for name, entry, _ in self.tensors if entry.subclass is not None)
        return {name: (entry.subclass, entry.attributes) for name, entry in classes if not _is_empty(entry.attributes)}


def _is_empty(node: object) -> bool:
    return node is None or (isinstance(node, (InertDict, tuple)) and len(node) == 0)


def _weights(checkpoint: Checkpoint) -> _Weights:
    state = checkpoint.state_dict
    if checkpoint.origin.state_path is None:
        return _all_tensors(checkpoint)
    names = list(state.everything)
    known = checkpoint.module is not None
    tensors: list[tuple[str, TensorEntry, bool | None]] = []
    others: list[tuple[str, object]] = []
    for name, (own, value) in zip(unwrapped_names(names), state.everything.items(), strict=True):
        if isinstance(value, TensorEntry):
            tensors.append((name, value, tensor_role(own, value, known=known)[0] == "parameter"))
        else:
            others.append((name, value))
    return _Weights(sorted(tensors, key=lambda item: item[0]), sorted(others, key=lambda item: item[0]), names)


def _all_tensors(checkpoint: Checkpoint) -> _Weights:
    """Of a file in which no weights are selected: every tensor, by its section and its name there."""
    rows = list_tensors(checkpoint).rows
    names = [unwrapped_in_digests(row.name) for row in rows]
    bare = [join(row.section, name) if row.section else name for row, name in zip(rows, names, strict=True)]
    if len(set(bare)) != len(bare):
        bare = [join(row.section, row.name) if row.section else row.name for row in rows]
    times: Counter[str] = Counter()
    tensors: list[tuple[str, TensorEntry, bool | None]] = []
    for name, row in zip(bare, rows, strict=True):
        times[name] += 1
        unique = name if times[name] == 1 else f"{name}#{times[name]}"
        tensors.append((unique, row.tensor, None if row.role == "unknown" else row.role == "parameter"))
    values = [node for node in walk(checkpoint.rest) if isinstance(node, Object) and is_tensor_like(node)]
    others: list[tuple[str, object]] = [(_NOT_PLAIN, values)] if values else []
    return _Weights(sorted(tensors, key=lambda item: item[0]), others, [row.name for row in rows])


def _digest_of(node: TensorEntry | Storage, reading: Reading) -> str:
    values = reading.of(as_tensor(node))
    return (values.digest if values is not None else None) or ""


def _everything(checkpoint: Checkpoint) -> list[object]:
    """The trees that make up a file, without the plain tensors of the state_dict."""
    values = [value for value in checkpoint.state_dict.everything.values() if not is_plain_value(value)]
    around = mapping_shell(checkpoint.state_dict.container)
    return [*values, around, checkpoint.rest, checkpoint.module, *checkpoint.discarded]


def _beside_fact(each: OtherValue, reading: Reading) -> TensorFact:
    if each.entry is not None:
        return _fact(each.name, each.entry, each.is_parameter, reading)
    dtype, data = each.array or Array(None, b"")
    counts = None
    if dtype is not None:
        counts = NonFinite(dtype)
        counts.update(data)
    return TensorFact(
        name=each.name,
        dtype=dtype or "a type that is not understood",
        shape=(),
        nbytes=len(data),
        nan=None if counts is None else counts.nan,
        inf=None if counts is None else counts.inf,
        is_parameter=each.is_parameter,
    )


def _fact(name: str, entry: TensorEntry, is_parameter: bool | None, reading: Reading) -> TensorFact:
    values = reading.of(entry)
    counts = values.counts if values is not None else None
    return TensorFact(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        nbytes=entry.nbytes,
        digest=values.digest if values is not None else None,
        nan=counts.nan if counts is not None else None,
        inf=counts.inf if counts is not None else None,
        is_parameter=is_parameter,
    )


def _parts(nodes: list[TensorEntry | Storage], reading: Reading) -> Iterator[tuple[str, tuple[int, ...], str]]:
    for entry in nodes:
        if isinstance(entry, TensorEntry):
            yield entry.dtype, entry.shape, _digest_of(entry, reading)


def _examined(
    checkpoint: Checkpoint,
    file: Source,
    path: str,
    reading: Reading,
    facts: list[TensorFact],
    weights: _Weights,
    storages: list[Storage],
) -> Examined:
    origin = checkpoint.origin
    beside = other_tensors(checkpoint, values=True)
    exact = (found for found in identify(checkpoint.state_dict) if found.exact and not found.others)
    return Examined(
        path=path,
        size=origin.size,
        sha256=reading.files.get(id(file)),
        format=origin.format,
        kind=origin.kind,
        trust=checkpoint.trust,
        content_digest=None,
        tensors=tuple(facts),
        others=tuple(sorted([*(name for name, _ in weights.others), *weights.hanging])),
        globals=checkpoint.globals,
        unvouched=checkpoint.unvouched,
        has_pickle=origin.has_pickle,
        is_program=origin.is_program,
        has_optimizer=_has_optimizer(checkpoint),
        prefixes=tuple(sorted({prefix for prefix in map(wrapper_of, weights.names) if prefix})),
        locations=tuple(sorted({storage.location for storage in storages})),
        findings=diagnose(checkpoint, [found for found in beside if not found.is_value]),
        part=next(part_findings(checkpoint), None),
        architecture=next(exact, None),
        shards=tuple(
            ShardFact(name=name, size=shard.size, sha256=reading.files.get(id(shard)))
            for name, shard in file.parts.items()
        ),
        damage=damage_text(reading.damages, storage_names(checkpoint)) if reading.damages else None,
        malformed=tuple(_malformed(beside)),
    )


def _malformed(beside: Sequence[FoundTensor]) -> Iterator[str]:
    """The values that torch would rebuild without a look at indices, offsets and axes that lie outside of them."""
    for found in beside:
        if not found.is_value:
            continue
        from ckptkit.pickling.layouts import rebuilt
        from ckptkit.transfer.values import check_indices

        try:
            value = rebuilt(found.node)
            if value is not None:
                check_indices(value.layout)
        except CorruptError as error:
            yield f"{found.path:.200}: {error.message}"


def _has_optimizer(checkpoint: Checkpoint) -> bool:
    if any(section.kind == "optimizer" for section in checkpoint.sections):
        return True
    return bool(training_document(checkpoint.rest)["optimizers"])


def _storages(checkpoint: Checkpoint) -> list[Storage]:
    """Every storage of the file, once."""
    found = {id(entry.storage): entry.storage for entry in checkpoint.state_dict.values()}
    for node in tensors_in(_everything(checkpoint)):
        storage = node.storage if isinstance(node, TensorEntry) else node
        found[id(storage)] = storage
    return list(found.values())
