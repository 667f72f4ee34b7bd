"""What is to be known of a released file, found in one pass over it.

Nothing is executed, and torch is not needed.  Bytes of tensors are read only where hashes, digests or counts of NaN and
Inf are asked for, and then once for all of them (`ckptkit.released.reading`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ckptkit import formats
from ckptkit.architectures import Architecture, identify
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint, GlobalUse, Kind, Storage, TensorEntry, Trust
from ckptkit.diagnose import diagnose
from ckptkit.digests import Line, content_digest, kind_of, unwrapped_names
from ckptkit.errors import CkptkitError
from ckptkit.inspection.listing import list_tensors
from ckptkit.inspection.training import training_document
from ckptkit.normalize.roles import tensor_role
from ckptkit.normalize.sections import is_plain, join
from ckptkit.normalize.wrappers import unwrapped
from ckptkit.pickling.inert import walk
from ckptkit.released.reading import Reading, read_through
from ckptkit.report import Finding
from ckptkit.transfer.workers import in_parallel

__all__ = ["Examined", "ShardFact", "TensorFact", "examine", "examine_all", "over_the_cores", "size_of"]

_WITHOUT_PICKLE = ("safetensors", "safetensors-sharded")
"""Containers in which there is none."""


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
        tensors: those of the weights, sorted by name; of a file without selected weights, all.
        others: names of the weights' values that are not plain tensors, sorted.
        globals: every Python name in its pickles.
        has_pickle: whether its container has any.
        has_optimizer: whether it holds the state of one.
        prefixes: of wrappers that names carry, such as ``"module."``, sorted.
        locations: device tags of all its storages, sorted.
        findings: what is remarkable about it, gravest first.
        architecture: the known model it is of, where every name and shape is that model's.
        shards: of a sharded checkpoint, in the order of the index.
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
    has_pickle: bool
    has_optimizer: bool
    prefixes: tuple[str, ...]
    locations: tuple[str, ...]
    findings: tuple[Finding, ...]
    architecture: Architecture | None
    shards: tuple[ShardFact, ...] = ()


def examine(path: str, *, hash_file: bool, digest: bool, values: bool, threads: int = 2) -> Examined:
    """Look at a file, and read it once for all that is asked for.

    Args:
        path: the file; an index stands for its shards too.
        hash_file: whether to compute the SHA-256 of the file, and of its shards.
        digest: whether to digest the tensors' values.
        values: whether to count NaN and Inf in them.
        threads: how many may hash side by side.

    Raises:
        FileAccessError: it cannot be opened or read.
        FormatError: it is no checkpoint, damaged, changed while it was read, or asks for more than any checkpoint.
        DTypeError: values that would have to be computed are of a type that numpy does not know.
    """
    checkpoint, file = formats.read(path)
    try:
        weights = _weights(checkpoint)
        inner = {name: _tensors_in(value) for name, value in weights.others}
        entries = [entry for _, entry, _ in weights.tensors]
        every = [*entries, *(entry for part in inner.values() for entry in part)]
        reading = (
            read_through(
                [file, *file.parts],
                every,
                hash_files=hash_file,
                digest=digest,
                counted=entries if values else (),
                threads=threads,
            )
            if hash_file or digest or values
            else Reading()
        )
        facts = [_fact(name, entry, is_parameter, reading) for name, entry, is_parameter in weights.tensors]
        lines = [
            *(Line(name=fact.name, kind=fact.dtype, shape=fact.shape, digest=fact.digest) for fact in facts),
            *(
                Line(name=name, kind=kind_of(value), parts=tuple(_part(entry, reading) for entry in inner[name]))
                for name, value in weights.others
            ),
        ]
        return _examined(checkpoint, file, path, reading, facts, content_digest(lines) if digest else None, weights)
    finally:
        file.close()


def examine_all(
    paths: Sequence[str], *, hash_file: bool, digest: bool, values: bool
) -> Iterator[tuple[str, Examined | CkptkitError]]:
    """Look at several files, side by side over the processors; in the order given.

    Yields:
        Each path, and what was found or why it could not be.
    """
    results: dict[int, Examined | CkptkitError] = {}

    def work(number: int, threads: int) -> None:
        try:
            results[number] = examine(paths[number], hash_file=hash_file, digest=digest, values=values, threads=threads)
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
    bare = [join(row.section, unwrapped(row.name)) if row.section else unwrapped(row.name) for row in rows]
    if len(set(bare)) != len(bare):
        bare = [join(row.section, row.name) if row.section else row.name for row in rows]
    times: Counter[str] = Counter()
    tensors: list[tuple[str, TensorEntry, bool | None]] = []
    for name, row in zip(bare, rows, strict=True):
        times[name] += 1
        unique = name if times[name] == 1 else f"{name}#{times[name]}"
        tensors.append((unique, row.entry, None if row.role == "unknown" else row.role == "parameter"))
    return _Weights(sorted(tensors, key=lambda item: item[0]), [], [row.name for row in rows])


def _tensors_in(value: object) -> list[TensorEntry]:
    return [node for node in walk(value) if isinstance(node, TensorEntry)]


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


def _part(entry: TensorEntry, reading: Reading) -> tuple[str, tuple[int, ...], str]:
    values = reading.of(entry)
    return entry.dtype, entry.shape, (values.digest if values is not None else None) or ""


def _examined(
    checkpoint: Checkpoint,
    file: SourceFile,
    path: str,
    reading: Reading,
    facts: list[TensorFact],
    digest: str | None,
    weights: _Weights,
) -> Examined:
    origin = checkpoint.origin
    folder = os.path.dirname(os.path.abspath(path))
    exact = (found for found in identify(checkpoint.state_dict) if found.exact and not found.others)
    return Examined(
        path=path,
        size=origin.size,
        sha256=reading.files.get(id(file)),
        format=origin.format,
        kind=origin.kind,
        trust=checkpoint.trust,
        content_digest=digest,
        tensors=tuple(facts),
        others=tuple(name for name, _ in weights.others),
        globals=checkpoint.globals,
        has_pickle=origin.format not in _WITHOUT_PICKLE,
        has_optimizer=_has_optimizer(checkpoint),
        prefixes=tuple(sorted(set(_prefixes(weights.names)))),
        locations=_locations(checkpoint),
        findings=diagnose(checkpoint),
        architecture=next(exact, None),
        shards=tuple(
            ShardFact(
                name=os.path.relpath(shard.path, folder).replace(os.sep, "/"),
                size=shard.size,
                sha256=reading.files.get(id(shard)),
            )
            for shard in file.parts
        ),
    )


def _has_optimizer(checkpoint: Checkpoint) -> bool:
    if any(section.kind == "optimizer" for section in checkpoint.sections):
        return True
    return bool(training_document(checkpoint.rest)["optimizers"])


def _prefixes(names: Sequence[str]) -> Iterator[str]:
    """What wrappers put into names: before them, or (``_orig_mod``) somewhere inside."""
    for name in names:
        bare = unwrapped(name)
        if bare != name:
            yield name.removesuffix(bare) if name.endswith(bare) else "_orig_mod."


def _locations(checkpoint: Checkpoint) -> tuple[str, ...]:
    found: set[str] = set()
    values = checkpoint.state_dict.everything.values()
    for entry in checkpoint.state_dict.values():
        found.add(entry.location)
    for node in walk([*(value for value in values if not is_plain(value)), checkpoint.rest]):
        if isinstance(node, (TensorEntry, Storage)):
            found.add(node.location)
    return tuple(sorted(found))
