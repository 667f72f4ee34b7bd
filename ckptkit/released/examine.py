"""The facts about a released file: opened, read once at most, and described as far as requested.

Nothing is executed, and torch is not needed.  Bytes of tensors are read only where hashes, digests, recorded checksums
or counts of NaN and Inf are asked for, and then once for all of them (`ckptkit.released.reading`).  Facts from the tree
alone (noteworthy ones, the architecture, each tensor) are computed when a rule or a manifest first asks for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from functools import cached_property

from ckptkit import formats
from ckptkit.architectures import Architecture, identify
from ckptkit.bytesource import Source
from ckptkit.checkpoint import Checkpoint, GlobalUse, Kind, Storage, TensorEntry, Trust, as_tensor
from ckptkit.diagnose import diagnose, everything_in
from ckptkit.digests import (
    DigestLine,
    content_digest,
    tree_digest,
    unwrapped_names,
    value_kind,
    whole_digest,
    whole_nodes,
)
from ckptkit.errors import CorruptError, LimitError
from ckptkit.formats.format import is_folder
from ckptkit.inspection.listing import list_tensors
from ckptkit.inspection.state import has_optimizer
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.modules import tensor_role, unwrapped_in_digests, wrapper_of
from ckptkit.normalize.parts import part_findings, require_whole
from ckptkit.normalize.sections import join
from ckptkit.normalize.tensors import FoundTensor, other_tensors, storage_names
from ckptkit.pickling.arrays import Array
from ckptkit.pickling.inert import InertDict, Object, tensors_in, walk
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.released.reading import (
    OtherValue,
    Reading,
    damages_of,
    files_of,
    is_opaque,
    look_at_ends,
    other_values_in,
    read_through,
)
from ckptkit.report import Finding
from ckptkit.startup import dataclass, made_by_position
from ckptkit.stats import NonFinite
from ckptkit.transfer.checksums import damage_text

__all__ = ["Examined", "ShardFact", "TensorFact", "examine_file"]

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
        is_parameter: whether it is a parameter, not a buffer (if a file does not say, the customary names of buffers
            decide); ``None``: it is not part of a model.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str | None = None
    nan: int | None = None
    inf: int | None = None
    is_parameter: bool | None = None


_fact_of = made_by_position(TensorFact)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFact:
    """One file of a sharded checkpoint: its name relative to the index, its size in bytes, its SHA-256."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class _Weights:
    """The tensors that count, and the other values beside them; and the names in the file, unchanged."""

    tensors: list[tuple[str, TensorEntry, bool | None]]
    others: list[tuple[str, object]]
    names: list[str]

    @property
    def hanging(self) -> dict[str, object]:
        """Class and attributes of the tensors of custom classes that have any, by name."""
        classes = ((name, entry) for name, entry, _ in self.tensors if entry.subclass is not None)
        return {name: (entry.subclass, entry.attributes) for name, entry in classes if not _is_empty(entry.attributes)}


def _is_empty(node: object) -> bool:
    return node is None or (isinstance(node, (InertDict, tuple)) and len(node) == 0)


def _selected_weights(checkpoint: Checkpoint) -> _Weights:
    state = checkpoint.state_dict
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


def _all_tensors(checkpoint: Checkpoint, beside: Sequence[FoundTensor]) -> _Weights:
    """For a file in which no weights are selected: every tensor, by its section and its name there."""
    rows = list_tensors(checkpoint, beside).rows
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


class _Contents:
    """What is in a checkpoint, found when it is first asked for.

    Raises:
        LimitError: then: the names of its tensors are more, or longer, than those of any checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def values(self) -> list[FoundTensor]:
        """Everything but the state_dict's plain tensors: tensors, storages, arrays, and values made from them."""
        found = other_tensors(self.checkpoint, values=True)
        if len(found) > DEFAULT_LIMITS.entries:
            raise LimitError("names of tensors", limit=DEFAULT_LIMITS.entries, actual=len(found))
        return found

    @cached_property
    def beside(self) -> list[FoundTensor]:
        """The same without values made from tensors that are there too."""
        return [found for found in self.values if not found.is_value]

    @cached_property
    def storages(self) -> list[Storage]:
        """Every storage, once."""
        beside = [node.storage if isinstance(node, TensorEntry) else node for _, _, node, *_ in self.values]
        every = [*(entry.storage for entry in self.checkpoint.state_dict.values()), *beside]
        return list({id(storage): storage for storage in every if isinstance(storage, Storage)}.values())

    @cached_property
    def weights(self) -> _Weights:
        """The tensors that a policy and a manifest are about."""
        if self.checkpoint.origin.state_path is None:
            return _all_tensors(self.checkpoint, self.beside)
        return _selected_weights(self.checkpoint)

    @cached_property
    def not_finite(self) -> list[OtherValue]:
        """What else has values that may be NaN."""
        plain = {id(entry) for _, entry, _ in self.weights.tensors}
        return list(other_values_in(self.checkpoint, plain, self.weights.others, self.beside))


@dataclass(frozen=True, kw_only=True)  # without slots: results are cached
class Examined:
    """A file, as far as it was examined.

    Attributes:
        path: as it was given.
        size: in bytes, with its shards; for a compressed file or a member of an archive, that of the stored file.
        sha256: of the file in hexadecimal (for an index, only the index); ``None``: not requested, or it is a folder.
        format: container name.
        is_inside: whether the container is compressed, or in an archive.
        kind: of content.
        trust: how much a loader that executes pickles would have to trust.
        globals: every Python name in its pickles.
        unvouched: its parts that are code, or could not be read.
        has_pickle: whether it has any.
        is_program: whether it contains a program, of which only the weights can be written.
        shards: of a sharded checkpoint, in the order of the index; of a folder its own files.
        damage: the damage that recorded checksums show; ``None``: none, or they were not checked.
        unlike: which copies are not what they are copies of; ``None``: none, or they were not compared.
        malformed: quantized, sparse and nested tensors whose parts do not fit each other, with what is wrong.
        content_digest: of all tensors (`ckptkit.digests`); ``None``: not asked for, or there is no tensor.
        former_digest: the same in version 1.
        whole_digest: of everything in the file; ``None``: not asked for, or it has none.
        is_counted: whether NaN and Inf were counted.
    """

    path: str
    size: int
    sha256: str | None
    format: str
    is_inside: bool
    kind: Kind
    trust: Trust
    globals: tuple[GlobalUse, ...]
    unvouched: tuple[GlobalUse, ...]
    has_pickle: bool
    is_program: bool
    shards: tuple[ShardFact, ...]
    damage: str | None
    unlike: str | None
    malformed: tuple[str, ...]
    content_digest: str | None = None
    former_digest: str | None = None
    whole_digest: str | None = None
    is_counted: bool = False
    _contents: _Contents = field(repr=False)
    _reading: Reading = field(repr=False)

    @cached_property
    def tensors(self) -> tuple[TensorFact, ...]:
        """Those of the weights, sorted by name; for a file without selected weights, all."""
        return tuple(_fact(name, entry, of, self._reading) for name, entry, of in self._contents.weights.tensors)

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Names of the weights' values that are not plain tensors, or have attributes, sorted."""
        weights = self._contents.weights
        return tuple(sorted([*(name for name, _ in weights.others), *weights.hanging]))

    @cached_property
    def beside(self) -> tuple[TensorFact, ...]:
        """Those of other sections, those inside of other values, and arrays; only where values were counted."""
        counted = self._contents.not_finite if self.is_counted else []
        return tuple(_beside_fact(each, self._reading) for each in counted)

    @cached_property
    def unseen(self) -> tuple[str, ...]:
        """Names of the weights' values that contain nothing that can be read; only if values were counted."""
        others = self._contents.weights.others if self.is_counted else ()
        return tuple(name for name, value in others if is_opaque(value))

    @property
    def has_optimizer(self) -> bool:
        """Whether it contains the state of one."""
        whole = self._contents.checkpoint
        return any(section.kind == "optimizer" for section in whole.sections) or has_optimizer(whole.rest)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Of wrappers that names carry, such as ``"module."``, sorted."""
        return tuple(sorted({prefix for prefix in map(wrapper_of, self._contents.weights.names) if prefix}))

    @property
    def locations(self) -> tuple[str, ...]:
        """Device tags of all its storages, sorted."""
        return tuple(sorted({storage.location for storage in self._contents.storages}))

    @property
    def noticed(self) -> tuple[Finding, ...]:
        """What its reader noticed, before any diagnosis."""
        return self._contents.checkpoint.findings

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What is remarkable about it, most severe first."""
        checkpoint = self._contents.checkpoint
        return diagnose(checkpoint, everything_in(checkpoint, self._contents.beside))

    @property
    def part(self) -> Finding | None:
        """The warning that it is a part of a checkpoint; ``None``: it is whole."""
        return next(part_findings(self._contents.checkpoint), None)

    @cached_property
    def architecture(self) -> Architecture | None:
        """The known model it belongs to, if every name and shape is that model's."""
        candidates = identify(self._contents.checkpoint.state_dict)
        return next((found for found in candidates if found.exact and not found.others), None)


def examine_file(
    path: str,
    *,
    hash_file: bool,
    digest: bool,
    values: bool,
    checksums: bool = True,
    tp_rules: str | None = None,
    ignore_checksums: bool = False,
    allow_part: bool = True,
    whole: bool = False,
    threads: int = 2,
) -> Examined:
    """Look at a file, and read it once for all that is asked for.

    Args:
        path: the file; an index includes its shards too.
        hash_file: whether to compute the SHA-256 of the file, and of its shards.
        digest: whether to digest the tensors' values.
        values: whether to count NaN and Inf in them.
        checksums: whether to hold recorded checksums against the bytes; what they show is among the findings.
        tp_rules: file with the rules for joining slices of tensor-parallel ranks.
        ignore_checksums: whether to forget them.
        allow_part: whether it may be a part of a checkpoint.
        whole: whether to digest everything else in the file too.
        threads: how many may hash side by side.

    Raises:
        PartError: it is a part, and may not be.
        FileAccessError: it cannot be opened or read.
        FormatError: it is not a checkpoint, damaged, changed while it was read, or asks for more than any checkpoint.
        DTypeError: values that would have to be computed have a type that numpy does not have.
    """
    checkpoint, file = formats.read(path, tp_rules=tp_rules, ignore_checksums=ignore_checksums)
    try:
        require_whole(checkpoint, allow_part=allow_part)
        contents = _Contents(checkpoint)
        held = [s for s in contents.storages if s.crc32 is not None] if checksums and not is_folder(file) else []
        if checkpoint.origin.state_path is None:
            contents.weights  # noqa: B018 - what has names beyond all use is refused, whatever is asked of it
        reading, given = Reading(), formats.given_of(file)
        is_whole = given is file  # otherwise a compressed file or an archive, and its content
        is_read, unlike = bool(hash_file or digest or values or held), None
        is_held = checksums and not ignore_checksums
        if checksums or is_folder(file):
            checkpoint, unlike = _looked_into(file, checkpoint, is_read=is_read, held=is_held)
            contents.checkpoint = checkpoint  # its content is the same
        files, parts = files_of(file)
        if is_read:
            reading = read_through(
                files,
                _digested(contents, whole) if digest else (),
                hash_files=hash_file and is_whole,
                digest=digest,
                counted=_counted(contents) if values else (),
                held=held,
                threads=threads,
            )
        else:
            look_at_ends(files)
        if is_folder(file) and is_held:  # the sources of pieces are known by now
            reading.damages.extend(damages_of(contents.storages, reading.sums))
        hashes = reading.files
        if hash_file and not is_whole:
            hashes = read_through([given], (), hash_files=True, digest=False).files
        origin = checkpoint.origin
        return Examined(
            path=path,
            size=origin.size if is_whole else given.size,
            sha256=hashes.get(id(given)),
            format=origin.format,
            is_inside=not is_whole,
            kind=origin.kind,
            trust=checkpoint.trust,
            globals=checkpoint.globals,
            unvouched=checkpoint.unvouched,
            has_pickle=origin.has_pickle,
            is_program=origin.is_program,
            shards=tuple(
                ShardFact(name=name, size=shard.size, sha256=reading.files.get(id(shard)))
                for name, shard in (parts if is_whole else {}).items()
            ),
            damage=damage_text(reading.damages, storage_names(checkpoint)) if reading.damages else None,
            unlike=unlike,
            malformed=tuple(_malformed(contents.values)),
            **(_digests(contents, reading, whole) if digest else {}),
            is_counted=values,
            _contents=contents,
            _reading=reading,
        )
    finally:
        file.close()


def _looked_into(file: Source, checkpoint: Checkpoint, *, is_read: bool, held: bool) -> tuple[Checkpoint, str | None]:
    """The checkpoint once nothing in it is unread; and of a folder, which copies are not what they are copies of."""
    if not is_folder(file):
        return (formats.require_sound(file, checkpoint) if is_read and held else checkpoint), None
    checkpoint = formats.judged(checkpoint, file)
    if held and checkpoint.replicas:
        from ckptkit.transfer.replicas import require_equal

        try:
            require_equal(checkpoint.replicas)
        except CorruptError as error:
            return checkpoint, error.message
    return checkpoint, None


def _digested(contents: _Contents, whole: bool) -> Iterator[TensorEntry]:
    """The tensors, and storages as tensors, whose values are digested."""
    weights = contents.weights
    yield from (entry for _, entry, _ in weights.tensors)
    trees = [*(value for _, value in weights.others), *weights.hanging.values()]
    nodes = [node for tree in trees for node in tensors_in(tree)]
    yield from map(as_tensor, [*nodes, *(whole_nodes(contents.checkpoint) if whole else ())])


def _counted(contents: _Contents) -> list[TensorEntry]:
    """The tensors whose NaN and Inf are counted."""
    beside = (each.entry for each in contents.not_finite if each.entry is not None)
    return [*(entry for _, entry, _ in contents.weights.tensors), *beside]


def _digests(contents: _Contents, reading: Reading, whole: bool) -> dict[str, str | None]:
    """The digests of an `Examined`."""

    def tell(node: TensorEntry | Storage) -> str:
        return _digest_of(as_tensor(node), reading) or ""

    weights = contents.weights
    trees = {name: tree_digest(value, tell, flags=False) for name, value in weights.others}
    trees |= {name: tree_digest(hanging, tell, flags=False) for name, hanging in weights.hanging.items()}
    lines = [
        DigestLine(name=name, kind=entry.dtype, shape=entry.shape, digest=_digest_of(entry, reading))
        for name, entry, _ in weights.tensors
    ]
    for name, value in weights.others:
        inside = [node for node in tensors_in(value) if isinstance(node, TensorEntry)]
        parts = tuple((entry.dtype, entry.shape, tell(entry)) for entry in inside)
        lines.append(DigestLine(name=name, kind=value_kind(value), parts=parts))
    content = content_digest(replace(line, tree=trees[line.name]) if line.name in trees else line for line in lines)
    return {
        "content_digest": content,
        "former_digest": content_digest(line for line in lines if line.name != _NOT_PLAIN) if trees else content,
        "whole_digest": whole_digest(contents.checkpoint, tell) if whole else None,
    }


def _digest_of(entry: TensorEntry, reading: Reading) -> str | None:
    values = reading.of(entry)
    return values.digest if values is not None else None


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
        dtype=dtype or "an unsupported type",
        shape=(),
        nbytes=len(data),
        nan=None if counts is None else counts.nan,
        inf=None if counts is None else counts.inf,
        is_parameter=each.is_parameter,
    )


def _fact(name: str, entry: TensorEntry, is_parameter: bool | None, reading: Reading) -> TensorFact:
    values = reading.of(entry)
    digest = nan = inf = None
    if values is not None:
        digest, counts = values.digest, values.counts
        if counts is not None:
            nan, inf = counts.nan, counts.inf
    return _fact_of(name, entry.dtype, entry.shape, entry.nbytes, digest, nan, inf, is_parameter)


def _malformed(values: Sequence[FoundTensor]) -> Iterator[str]:
    """The values that torch would rebuild without a look at indices, offsets and axes that are outside of them."""
    made = [found for found in values if found.is_value]
    if made:
        from ckptkit.pickling.layouts import rebuilt
        from ckptkit.transfer.values import check_indices
    for found in made:
        try:
            value = rebuilt(found.node)
            if value is not None:
                check_indices(value.layout)
        except CorruptError as error:
            yield f"{found.path:.200}: {error.message}"
