"""Moves the bytes of remote sources in the order in which they are stored, whatever the order of the output.

A file on this machine is read by position, and finding the next bytes costs nothing.  Each byte of a remote source is
fetched once, in long runs and ahead of its use (`ckptkit.bytesource.Source.will_read`), in bounded memory: so the steps
of all files of an output are carried out in the order of the source.  Written bytes are read back at once and compared
(`ckptkit.transfer.passing.Passed`), while they are in a core's own cache; before that, converted values are converted a
second time, from the same bytes, and must be the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter

from ckptkit.bytesource import ByteRange, Source, write_at
from ckptkit.computed import Buffer, ByteSource, ConvertedRange, DenseRange, is_made, read_into
from ckptkit.errors import CorruptError
from ckptkit.plan import Cast, Checksum, Copy, Digest, Gather, LiteralBytes, Plan
from ckptkit.transfer.passing import READ_BACK_NBYTES, DigestsInPassing, Passed, each_of, pieces_of
from ckptkit.transfer.steps import Progress, Small, Tally
from ckptkit.transfer.values import SMALL_NBYTES, lying_in, stream
from ckptkit.transfer.workers import buffer, in_parallel, near_together

__all__ = ["is_nearly_whole", "move_far"]

_TOGETHER_NBYTES = 4 << 20
"""Bytes of small pieces that one thread moves before it looks for other work."""

_APART = 4
"""Portions, of at most 8 MiB each, within which threads are at work."""

_SPARE = 8
"""A file is read as a whole where what is not moved of it is at most this part of it: its hash is worth that."""

_SMALL_NBYTES = 1 << 20
"""Bytes of a file that cost little more than the trips for parts of it."""

_Moving = Copy | Cast | Gather
_Placed = tuple[int, int, int, _Moving]
"""Its place: number of the file and position; the output's descriptor; the step."""


def is_nearly_whole(plan: Plan, files: Iterable[Source]) -> bool:
    """Whether a plan moves nearly all bytes of some files, or they are small: the rest may be fetched to hash them."""
    runs = {(id(run.file), run.offset): run.nbytes for step in _moving(plan) for run in _lying(step)}
    size = sum(file.size for file in files)
    return size <= _SMALL_NBYTES or size - sum(runs.values()) <= size // _SPARE


def _moving(plan: Plan) -> Iterator[_Moving]:
    return (step for step in plan.all_steps() if isinstance(step, (Copy, Cast, Gather)))


def _lying(step: _Moving) -> Iterator[ByteRange]:
    return lying_in(step.entry if isinstance(step, Gather) else step.source)


def move_far(
    outputs: Sequence[tuple[Plan, int]],
    tally: Tally,
    moved: Progress,
    digests: DigestsInPassing,
    passed: Passed | None,
    stop: threading.Event,
) -> None:
    """Carry out the steps that bring bytes, of all files of an output; as `ckptkit.transfer.steps.move`.

    Args:
        outputs: the plan of each file, and its descriptor.
        tally: counts what conversions lose.
        moved: called with the number of bytes as they are written.
        digests: of source files, which are fetched as a whole for it.
        passed: reads back and compares what is written; ``None``: it is not compared.
        stop: set when a thread fails.

    Raises:
        As `ckptkit.transfer.steps.execute`.
    """
    files: dict[int, Source] = {}
    areas: dict[int, list[tuple[int, int]]] = {}
    placed: list[_Placed] = []
    for plan, fd in outputs:
        literals = Small(fd, moved)
        for step in plan.steps:
            if isinstance(step, LiteralBytes):
                literals.add(step.data, step.target)
            elif isinstance(step, (Checksum, Digest)):
                if passed is not None:
                    passed.will_write(fd, step.target, step.nbytes)
            else:
                runs = [*_lying(step)]
                for run in runs:
                    files.setdefault(id(run.file), run.file)
                    areas.setdefault(id(run.file), []).append((run.offset, run.nbytes))
                first = runs[0] if runs else None
                at = (-1, 0) if first is None else (list(files).index(id(first.file)), first.offset)
                placed.append((*at, fd, step))
        literals.flush()
    for key, file in files.items():
        if file.is_far:
            takers: list[Callable[[int, memoryview], object]] = []
            if passed is not None:
                takers.append(passed.sums.along_file(file))
                held = (storage.source for storage in passed.sums.wanted)  # more than views of it that are moved
                areas[key] += [(run.offset, run.nbytes) for each in held for run in lying_in(each) if run.file is file]
            takers += [digests.in_order[key]] if key in digests.in_order else []
            wanted = [(0, file.size)] if key in digests.in_order else sorted(areas[key])
            file.will_read(wanted, each_of(*takers) if takers else None)
    placed.sort(key=itemgetter(0, 1))
    mover = _Mover(tally, moved, passed)
    in_parallel(near_together(mover.tasks(placed), _APART), nbytes=sum(step.nbytes for *_, step in placed), stop=stop)


class _Mover:
    """Carries out steps, piece by piece."""

    def __init__(self, tally: Tally, moved: Progress, passed: Passed | None) -> None:
        self._tally = tally
        self._moved = moved
        self._passed = passed

    def tasks(self, placed: Iterable[_Placed]) -> Iterator[Callable[[], object]]:
        """The steps in their order, in portions for one thread each."""
        small: list[tuple[int, Copy]] = []
        nbytes = 0
        for _, _, fd, step in placed:
            if isinstance(step, Copy) and step.nbytes < SMALL_NBYTES:
                small.append((fd, step))
                nbytes += step.nbytes
            if nbytes >= _TOGETHER_NBYTES or (small and step.nbytes >= SMALL_NBYTES):
                yield partial(self._copy_small, small)
                small, nbytes = [], 0
            if isinstance(step, Gather):
                yield partial(self._gather, fd, step)
            elif step.nbytes >= SMALL_NBYTES or isinstance(step, Cast):
                for start, part in pieces_of(step.source):
                    carry_out = self._make if is_made(part) else self._copy
                    yield partial(carry_out, fd, part, step.target + start)  # type: ignore[arg-type]
        yield partial(self._copy_small, small)

    def _write(self, fd: int, data: Buffer, target: int) -> None:
        """Write, and prove it."""
        if self._passed is None:
            write_at(fd, data, target)
            return
        view = memoryview(data)
        for start in range(0, len(view), READ_BACK_NBYTES):
            piece = view[start : start + READ_BACK_NBYTES]
            write_at(fd, piece, target + start)
            self._passed.read_back(fd, piece, target + start)

    def _copy_small(self, steps: Sequence[tuple[int, Copy]]) -> None:
        outputs: dict[int, Small] = {}
        for fd, step in steps:
            run = step.source.plain()
            if fd not in outputs:
                outputs[fd] = Small(fd, self._moved, self._write)
            outputs[fd].add(run.read(), step.target)
            if self._passed is not None:
                self._passed.note(step.source, fd, step.target)
        for small in outputs.values():
            small.flush()

    def _copy(self, fd: int, source: ByteSource, target: int) -> None:
        run = source.plain()
        if self._passed is not None:
            self._passed.note(source, fd, target)
        for view in run.file.views(run.offset, run.nbytes):
            self._write(fd, view, target)
            target += len(view)
        self._moved(source.nbytes)

    def _make(self, fd: int, source: ConvertedRange | DenseRange, target: int) -> None:
        after = buffer("after", source.nbytes)
        if isinstance(source, ConvertedRange):
            before = buffer("before", source.original.nbytes)
            source.into(after, before)
            self._tally.add(source.whole, before, after)
            if self._passed is not None and source.whole.function(before) != bytes(after):
                raise CorruptError(
                    f"{source.whole.name}: converting it twice gave different bytes; nothing was written"
                )
        else:
            read_into(source, after)
        self._write(fd, after, target)
        if self._passed is not None:
            self._passed.note(source, fd, target)
        self._moved(source.nbytes)

    def _gather(self, fd: int, step: Gather) -> None:
        small, target = Small(fd, self._moved, self._write), step.target
        for chunk in stream(step.entry, self._tally.add):
            small.add(chunk, target)
            target += len(chunk)
        small.flush()
        if self._passed is not None:
            self._passed.note(step.entry, fd, step.target)
