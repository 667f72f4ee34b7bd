"""Compares a written file with its source: every node, name and byte.

`check_output` opens the output with its own reader and compares, so that an error in the writer,
the plan, the copying or the reader shows before the file gets its name.  The source's recorded
checksums are checked as its bytes pass by.

A source on another machine is not fetched twice.  As soon as a piece was written, it was read back from the output and
compared with the bytes that were read or converted (`ckptkit.transfer.passing.Passed`).  Where the output's own reader
finds a tensor, exactly these bytes must have been compared, and nothing written since.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from ckptkit.bytesource import ByteRange
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Storage, TensorEntry, shared_storages
from ckptkit.computed import ByteSource, ConvertedRange, DenseRange
from ckptkit.errors import CorruptError
from ckptkit.formats import format_named, read
from ckptkit.formats.json_text import versions_text
from ckptkit.formats.torch_zip_writer import written_tree
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.sections import brief
from ckptkit.normalize.trees import Identical, Place, side_by_side
from ckptkit.plan import Copy, moved
from ckptkit.transfer.checksums import Checksums, damage_error, damage_of, first_difference
from ckptkit.transfer.passing import Passed, pieces_of
from ckptkit.transfer.values import SMALL_NBYTES, Ahead, same_values
from ckptkit.transfer.workers import in_parallel

__all__ = ["check_output"]

_BATCH_NBYTES, _EACH_NBYTES = 4 << 20, 1 << 10
"""Bytes of storages that one thread compares before it looks for other work, and what each costs beside its own."""

Compared = Callable[[int], object]
"""Called with the number of bytes that were just compared; from several threads."""


def check_output(
    source: Checkpoint,
    path: str,
    compared: Compared = lambda _: None,
    passed: Passed | None = None,
    *,
    values: bool = True,
) -> int:
    """Compare a complete output file with the checkpoint it was written from.

    Args:
        source: the checkpoint, as rewritten.
        path: the output; it is opened and read.
        compared: called as bytes are compared.
        passed: what passed by when it was written; ``None``: the source is read again.
        values: whether to compare them; otherwise only names, dtypes and shapes.

    Returns:
        Bytes of tensor data that were compared.

    Raises:
        CorruptError: the output differs, or a source's bytes are not those its checksum was recorded
            for; the message names the tensor.
    """
    output, file = read(path)
    try:
        for key, value in source.metadata.items():
            if output.metadata.get(key) != value:
                raise CorruptError(f"metadata {key!r}: its value is not in the output; nothing was written")
        comparison = _Comparison(compared, passed)
        container = format_named(output.origin.format)
        if container.is_folder:
            _items(source, output, comparison)
        elif container.shards is not None:
            _tensors(source.state_dict, output.state_dict, comparison)
            _extra_values(source, output, comparison)
        elif container.tensors_alone:
            if versions_text(source.state_dict) not in (None, versions_text(output.state_dict)):
                raise CorruptError("the output does not have the same module versions; nothing was written")
            if source.state_dict.keys() == output.state_dict.keys() and [*source.state_dict] != [*output.state_dict]:
                raise CorruptError("the output does not have the tensors in the same order; nothing was written")
            _tensors(source.state_dict, output.state_dict, comparison)
        else:
            _trees(source, output, comparison)
        return comparison.run() if values else 0
    finally:
        file.close()


_At = Place | str
"""Where something is: in a tree, or a tensor's name."""

_Whole = tuple[_At, Storage, Storage]


def _told(place: _At) -> str:
    return f"tensor {place!r}" if isinstance(place, str) else str(place) or "root"


class _Comparison:
    """The pairs to compare: collected first, so that several threads can share them; with places, which few need."""

    def __init__(self, compared: Compared, passed: Passed | None = None) -> None:
        self._compared = compared
        self._passed = passed
        self._storages: dict[int | tuple[int, int], _Whole] = {}
        self._tensors: list[tuple[_At, TensorEntry, TensorEntry]] = []
        self._places: dict[int, tuple[_At, Storage]] = {}

    def storages(self, place: _At, source: Storage, written: Storage) -> None:
        """All bytes of one must be all bytes of the other."""
        whole = place, source, written
        if self._storages.setdefault(id(source), whole)[2] is not written:
            self._storages.setdefault((id(source), id(written)), whole)
        if source.original is not None or isinstance(source.source, DenseRange):
            self._places.setdefault(id(source), (place, source))

    def tensors(self, place: _At, source: TensorEntry, written: TensorEntry) -> None:
        """The values of one must be the values of the other."""
        if source.covers_storage and source.is_plain_bytes and written.covers_storage:
            self.storages(place, source.storage, written.storage)
        else:
            self._places.setdefault(id(source.storage), (place, source.storage))
            self._tensors.append((place, source, written))

    def run(self) -> int:
        """Compare; returns the bytes that were.

        Raises:
            CorruptError: something differs, or does not have the checksum that is recorded for it.
        """
        whole = self._storages.values()
        # Views of larger storages, and storages cut from some: are those that they were cut from sound?
        others = {id(whole): (place, whole) for place, s in self._places.values() for whole in s.originals}
        checked = {id(s.original or s) for _, s, _ in whole if _covers_original(s)} if others else set()
        if self._passed is not None:  # all were summed as they came
            others |= {id(s.original or s): (place, s.original or s) for place, s, _ in whole if _covers_original(s)}
            checked = set()
            self._passed.settle()
        unchecked = Checksums(None if self._passed is None else self._passed.sums)
        unchecked.want(s for key, (_, s) in others.items() if key not in checked)
        tasks: list[Callable[[], object]] = [partial(self._same_storages, part) for part in _in_batches(whole)]
        tasks += [partial(self._same_tensor, *triple) for triple in self._tensors]
        nbytes = sum(source.nbytes for _, source, _ in whole) + sum(source.nbytes for _, source, _ in self._tensors)
        in_parallel(tasks, nbytes=nbytes)
        unchecked.require(lambda: {key: _told(place) for key, (place, _) in others.items()})
        return nbytes

    def _same_storages(self, batch: list[_Whole]) -> None:
        """Small ones are read with what is around them on either side, each exactly once."""
        ours, theirs = Ahead(), Ahead()
        small = 0
        for place, source, written in batch:
            a, b, nbytes = source.source, written.source, source.nbytes
            if self._passed is not None:
                self._same_as_passed(self._passed, place, a, b)
                continue
            if (
                nbytes >= SMALL_NBYTES
                or not isinstance(a, ByteRange)
                or not isinstance(b, ByteRange)
                or a.nbytes != b.nbytes
            ):
                self._same_storage(place, source, written)
                continue
            data = ours.read(a)
            if data != theirs.read(b):
                self._same_storage(place, source, written)  # tells where
            if source.crc32 is not None or source.original is not None:
                self._require_sound(place, source, zlib.crc32(data))
            small += nbytes
        if small:
            self._compared(small)

    def _same_storage(self, place: _At, source: Storage, written: Storage) -> None:
        difference, crc = first_difference(source.source, written.source, self._compared)
        if difference is not None:
            raise _differs(place, difference)
        self._require_sound(place, source, crc)

    def _same_as_passed(self, passed: Passed, place: _At, source: ByteSource, written: ByteSource) -> None:
        """Check that the output was compared when it was written; anything else is read again."""
        if source.nbytes != written.nbytes:
            raise _differs(place, min(source.nbytes, written.nbytes))
        for step in moved(0, source):
            for start, part in pieces_of(step.source):
                theirs = written.part(step.target + start, part.nbytes)
                difference = _known(passed, part, theirs)
                if difference is None:
                    difference, _ = first_difference(part, theirs, summed=False)
                if difference is not None and difference < part.nbytes:
                    raise _differs(place, step.target + start + difference)
                self._compared(part.nbytes)

    def _require_sound(self, place: _At, source: Storage, crc: int) -> None:
        """Raise where all bytes of a storage of the file have another checksum than is recorded."""
        if _covers_original(source):
            damage = damage_of(source.original or source, crc)
            if damage is not None:
                raise damage_error([damage], {id(damage.storage): _told(place)})

    def _same_tensor(self, place: _At, source: TensorEntry, written: TensorEntry) -> None:
        passed = self._passed
        if passed is not None and source.is_plain_bytes and written.is_plain_bytes:
            ours, theirs = (
                each.storage.source.part(each.storage_offset * each.itemsize, each.nbytes) for each in (source, written)
            )
            self._same_as_passed(passed, place, ours, theirs)
            return
        same = None
        if passed is not None and written.is_plain_bytes:
            lying = written.storage.source.part(written.storage_offset * written.itemsize, written.nbytes)
            same = _known(passed, source, lying)
        if same != source.nbytes if same is not None else not same_values(source, written):
            raise CorruptError(f"{_told(place)}: the output's values differ; nothing was written")
        self._compared(source.nbytes)


def _known(passed: Passed, source: ByteSource | TensorEntry, written: ByteSource) -> int | None:
    """As `Passed.same`, for a reader's range of a file, even inside a tensor in pieces."""
    steps = moved(0, written)
    lies_as_one = len(steps) == 1 and isinstance(steps[0], Copy) and steps[0].nbytes == written.nbytes
    return passed.same(source, steps[0].source.plain()) if lies_as_one else None


def _differs(place: _At, at: int) -> CorruptError:
    return CorruptError(f"{_told(place)}: the output differs at byte {at:,} of the storage; nothing was written")


def _in_batches(storages: Iterable[_Whole]) -> Iterator[list[_Whole]]:
    """Storages in their order, as many at a time as are compared in an instant."""
    batch: list[_Whole] = []
    nbytes = 0
    for each in storages:
        batch.append(each)
        nbytes += each[1].nbytes + _EACH_NBYTES
        if nbytes >= _BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _covers_original(storage: Storage) -> bool:
    """Whether all bytes of the storage of the file pass by where this one is read."""
    if storage.original is None:
        return True
    source = storage.source
    read = source.original.nbytes if isinstance(source, ConvertedRange) else source.nbytes
    return read == storage.original.nbytes


def _tensors(ours: Mapping[str, TensorEntry], theirs: Mapping[str, TensorEntry], comparison: _Comparison) -> None:
    """A container of named tensors only: names and values."""
    if set(ours) != set(theirs):
        raise CorruptError("the output does not have the same tensor names; nothing was written")
    several = shared_storages(ours.values())
    pairs: set[tuple[object, ...]] = set()
    for name, entry in ours.items():
        written = theirs[name]
        if entry.dtype != written.dtype or entry.shape != written.shape:
            raise CorruptError(f"tensor {name!r}: the output has another dtype or shape; nothing was written")
        if id(entry.storage) in several:
            key = (*entry.view, *written.view)
            if key in pairs:
                continue
            pairs.add(key)
        comparison.tensors(name, entry, written)


def _items(source: Checkpoint, output: Checkpoint, comparison: _Comparison) -> None:
    """A folder of torch.distributed.checkpoint: names, what leads to each, and values."""
    from ckptkit.formats.distributed.dcp_names import flattened, values_at

    ours = flattened(source)
    tensors, theirs = ours.tensors, values_at(output, ours.paths)
    written = {name: theirs[name] for name in theirs if name in tensors}
    _tensors(tensors, {name: node for name, node in written.items() if isinstance(node, TensorEntry)}, comparison)
    others = [(Place().below(name), node, theirs.get(name)) for name, node in ours.values.items()]
    for pair in _paired_storages([each for each in others if each[0].label not in tensors]):
        comparison.storages(*pair)


def _extra_values(source: Checkpoint, output: Checkpoint, comparison: _Comparison) -> None:
    """The values of a sharded state_dict that are not plain tensors."""
    ours, theirs = source.state_dict.extra, output.state_dict.extra
    if set(ours) != set(theirs):
        raise CorruptError("the output does not have the same values beside its tensors; nothing was written")
    for name, value in ours.items():
        for pair in _paired_storages([(Place().below(name), value, theirs[name])]):
            comparison.storages(*pair)


def _trees(source: Checkpoint, output: Checkpoint, comparison: _Comparison) -> None:
    """A container of a whole tree: every node, and every storage byte."""
    lowered = lower_state_dict(source.state_dict), lower_state_dict(output.state_dict)
    for pair in _paired_storages([(Place(), written_tree(source), output.rest)], lowered):
        comparison.storages(*pair)


# Trees.


def _paired_storages(
    roots: list[tuple[Place, object, object]], lowered: tuple[object, object] = (STATE_DICT, STATE_DICT)
) -> Iterator[tuple[Place, Storage, Storage]]:
    """Go through trees side by side; yields each pair of storages with the place it was met at.

    Args:
        roots: pairs of trees, each with its place.
        lowered: the node in the place of the marker `STATE_DICT` in both.

    Raises:
        CorruptError: the trees differ in anything else.
    """
    for met in side_by_side(roots, Identical(), lowered):
        if met.how == "parted":
            raise CorruptError(f"{_told(met.place)}: no longer the same object in the output; nothing was written")
        if not isinstance(met.a, Storage) or not isinstance(met.b, Storage) or met.how != "bytes":
            raise CorruptError(
                f"{_told(met.place)}: {brief(met.a)} became {brief(met.b)} in the output; nothing was written"
            )
        yield met.place, met.a, met.b
