"""Entries -> ``torch.Tensor``: the only way tensor values reach torch.  Imports torch.

No pickle is read and no class is looked up: bytes go from the file straight into memory that torch
has allocated, one torch storage for each `Storage`, and tensors are strided views of it.  What
shared or was tied in the file therefore shares and is tied in memory, with the same shape, stride
and offset, as after ``torch.load``.

Of a tensor subclass the plain tensor is given: the other would need the file's class.  Python
attributes saved with a tensor are left out here; a whole tree has them.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from ckptkit.bytesource import ByteRange, Source, first_changed
from ckptkit.checkpoint import StateDict, Storage, TensorEntry
from ckptkit.computed import ConvertedRange, DenseRange, files_of, is_made, piece_nbytes, read_into
from ckptkit.dtypes import DTYPES, dtype
from ckptkit.errors import CorruptError, DTypeError, UnsupportedError
from ckptkit.extras import require_torch
from ckptkit.normalize.tensors import storage_names
from ckptkit.report import listed
from ckptkit.torch_bridge.devices import STAGED, Places, Staging, TorchLocation, allocated
from ckptkit.transfer.checksums import SUMMED_NBYTES, Checksums
from ckptkit.transfer.memory import memory_at
from ckptkit.transfer.values import will_read
from ckptkit.transfer.workers import buffer, in_parallel, near_together

require_torch()

import torch  # noqa: E402 - behind the check, so that its absence is explained

__all__ = ["ALIGNMENT", "Loader", "dtype_of", "require_dtypes", "tensors", "typed"]

_Readable = ByteRange | ConvertedRange | DenseRange
"""Bytes that are read unchanged, or made as they are read."""

_SUMMED_READ = 1 << 20
"""Bytes of one read that are summed while they are in a core's own cache."""

_APART = 2
"""Storages, or pieces of 16 MiB, of remote files that threads work on at the same time."""

ALIGNMENT = 64
"""Bytes: as torch allocates.  Kernels choose by alignment how they sum up, so that the last bits of a product may
differ between a tensor in a file and its copy in memory; aligned, they were the same wherever it was measured."""

_WIDEST = max(row.itemsize for row in DTYPES.values())
"""Bytes of the widest element."""

_SINCE = {
    **dict.fromkeys(("float8_e4m3fnuz", "float8_e5m2fnuz"), "2.2"),
    **dict.fromkeys(("uint16", "uint32", "uint64"), "2.3"),
    "float8_e8m0fnu": "2.7",
    "float4_e2m1fn_x2": "2.8",
}
"""The first torch of the dtypes that the oldest supported one lacks."""

_SAME_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A type of each width to swap bytes as: only the width matters, and not every torch can swap every type."""


def dtype_of(name: str) -> torch.dtype:
    """The ``torch.dtype`` of a name such as ``"float32"``.

    Raises:
        DTypeError: the name is unknown, or the installed torch has no such dtype.
    """
    found = getattr(torch, dtype(name).name, None)
    if DTYPES[name].bits:
        raise DTypeError(f"torch has no dtype {name}, whose elements are smaller than a byte")
    if not isinstance(found, torch.dtype):
        newer = f"torch {_SINCE[name]} or later has it" if name in _SINCE else "a newer torch may have it"
        raise DTypeError(f"torch {torch.__version__} has no dtype {name}; {newer}")
    return found


def typed(memory: torch.UntypedStorage, dtype: str) -> torch.TypedStorage:
    """The storage of a dtype, a torch name, over memory."""
    return torch.storage.TypedStorage(wrap_storage=memory, dtype=dtype_of(dtype), _internal=True)  # type: ignore[no-untyped-call]


def require_dtypes(state_dict: StateDict) -> None:
    """See that this torch has the dtypes of a state_dict's tensors.

    Raises:
        DTypeError: it lacks one; the message names the tensors.
    """
    lacking: dict[str, list[str]] = {}
    for name, entry in state_dict.items():
        if entry.dtype in lacking or not isinstance(getattr(torch, entry.dtype, None), torch.dtype):
            lacking.setdefault(entry.dtype, []).append(name)
    for wanted, names in lacking.items():
        try:
            dtype_of(wanted)
        except DTypeError as error:
            raise DTypeError(f"{listed([repr(name[:200]) for name in names])}: {error}", names=names) from None


def tensors(
    state_dict: StateDict, *, map_location: TorchLocation = None, mapped: bool = False, checksums: bool = False
) -> dict[str, torch.Tensor]:
    """The state_dict's plain tensors, read from their file.

    Values that are not plain tensors (`StateDict.extra`) are not among them.

    Args:
        state_dict: the names and entries; the file they are in must still be open.
        map_location: as for ``torch.load``: ``None`` uses the device recorded in the file; a string or ``torch.device``
            is used for all; a dict maps locations; a callable gets the storage on the CPU and its location, and returns
            the new location, or ``None`` for the recorded one.  ``"meta"`` reads nothing.
        mapped: use a private mapping of the file for tensors on the CPU if its bytes are as torch needs them (not
            compressed, in this machine's byte order, aligned to 64 bytes).  A mapping takes no memory of its own and
            reads when a value is used; writing to such a tensor never changes the file.  It lives as long as the
            tensors, even after the file is closed; shortening the file in the meantime ends the process, as with
            ``torch.load(mmap=True)``.
        checksums: check the recorded checksums of the storages that are read, and of mapped ones, whose bytes are all
            read for this.

    Returns:
        Tensors in the mapping's order.  Entries saved as ``nn.Parameter`` become one.

    Raises:
        RewriteError: this machine lacks a location, or ``map_location`` returned no storage.
        DTypeError: the installed torch lacks a dtype.
        CorruptError: the file was changed, became shorter, or is damaged; the message names the tensor.
        FileAccessError: it could not be read, or was closed.
    """
    require_dtypes(state_dict)
    sums = Checksums()
    loader = Loader(map_location, alignment=ALIGNMENT if mapped else None, checksums=sums if checksums else None)
    loader.expect(state_dict.values)
    with sums.held(lambda: storage_names(state_dict.everything)):
        loaded = {name: loader.tensor(entry) for name, entry in state_dict.items()}
        loader.finish()
    return loaded


class Loader:
    """Makes each storage and each tensor once.

    `finish` reads the bytes of storages on the CPU all together, on several cores; `at_once` is for values needed
    before.

    Args:
        map_location: as `tensors` takes it.
        alignment: bytes at a multiple of which a tensor of the CPU must begin in the file to be in a mapping of it, at
            least those of an element; ``None``: all are copied.
        checksums: what contains the recorded checksums of what is read; ``None``: nothing does.
    """

    def __init__(
        self, map_location: TorchLocation, *, alignment: int | None = None, checksums: Checksums | None = None
    ) -> None:
        self._places = Places(map_location)
        self._alignment = alignment
        self._checksums = checksums
        self._maps: dict[int, tuple[mmap.mmap, torch.UntypedStorage] | None] = {}
        self._storages: dict[int, tuple[torch.UntypedStorage, int, Storage]] = {}  # which keeps every id taken
        self._tensors: dict[int, tuple[torch.Tensor, TensorEntry]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._files: dict[int, Source] = {}
        self._staging: dict[torch.device, Staging] = {}
        self._tasks: list[Callable[[], object]] = []
        self._nbytes = 0
        self._is_patient = True
        self._is_far = False

    def expect(self, nodes: Callable[[], Iterable[TensorEntry | Storage]]) -> None:
        """These will be requested, in about this order: remote sources are notified."""

        def storages() -> Iterator[Storage]:
            for node in nodes():
                storage = node.storage if isinstance(node, TensorEntry) else node
                if self._places.asks or self._places.location(storage) != "meta":
                    yield storage

        def along(file: Source) -> Callable[[int, memoryview], object]:
            checksums = self._checksums or Checksums()
            checksums.want(storages())
            return checksums.along_file(file)

        self._is_far = will_read(storages(), None if self._checksums is None else along)

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """The entry's tensor; for one entry always the same object, as a pickle's memo gives it."""
        known = self._tensors.get(id(entry))
        if known is None:
            known = self._tensors[id(entry)] = self._view(entry), entry
        return known[0]

    def _view(self, entry: TensorEntry) -> torch.Tensor:
        element = self._dtypes.get(entry.dtype)
        if element is None:
            element = self._dtypes[entry.dtype] = dtype_of(entry.dtype)
        storage = self.storage(entry)
        if entry.dtype == "complex32":  # of which empty() warns
            view = torch.empty((0,), dtype=torch.uint8, device=storage.device).view(element)
        else:
            view = torch.empty((0,), dtype=element, device=storage.device)
        view.set_(storage, entry.storage_offset, entry.shape, entry.stride)
        # The bits torch keeps beside the bytes.
        view = torch._neg_view(view) if entry.is_neg else view
        view = view.conj() if entry.is_conj else view
        if entry.requires_grad and not (element.is_floating_point or element.is_complex):
            raise CorruptError(
                f"a tensor of {entry.dtype} is marked requires_grad; only floating-point and complex tensors can be",
                path=entry.storage.source.file.path,
            )
        if entry.is_parameter:
            return torch.nn.Parameter(view, requires_grad=entry.requires_grad)
        return view.requires_grad_() if entry.requires_grad else view

    def storage(self, entry: TensorEntry) -> torch.UntypedStorage:
        """The storage that an entry views, in this machine's byte order."""
        storage = entry.storage
        known = self._storages.get(id(storage))
        width = 1 if storage.byteorder == sys.byteorder else _swap_width(entry)
        if known is None:
            known = self._storages[id(storage)] = self._placed(entry, width), width, storage
        if known[1] != width:
            raise UnsupportedError(
                f"storage {storage.key!r} is viewed as elements of different widths, in a byte order that is not "
                "this machine's",
                path=storage.source.file.path,
            )
        return known[0]

    def _placed(self, entry: TensorEntry, width: int) -> torch.UntypedStorage:
        storage, places = entry.storage, self._places
        if places.asks:
            memory = self._on_the_cpu(entry, width)
            self._read_all()
            return places.asked(storage, memory)
        location = places.location(storage)
        if location == "cpu":
            return self._on_the_cpu(entry, width)
        if location == "meta":
            return allocated(storage.nbytes, "meta")
        device = places.device(storage, location)
        if device.type in STAGED:
            return self._staged(storage, width, device)
        memory = self._on_the_cpu(entry, width)
        self._read_all()
        return places.moved(storage, memory, location)

    def _noted(self, storage: Storage) -> _Readable:
        """The range of a storage's bytes that are about to be read."""
        source = storage.source
        for file in files_of(source):
            self._files[id(file)] = file
        if self._checksums is not None:
            self._checksums.want([storage])
        source = source if is_made(source) else source.plain()
        return source if source.nbytes == storage.nbytes else source.part(0, storage.nbytes)

    def _on_the_cpu(self, entry: TensorEntry, width: int) -> torch.UntypedStorage:
        storage = entry.storage
        source = self._noted(storage)
        if self._alignment is not None and width == 1 and isinstance(source, ByteRange):
            # What others view the storage as is not known; what the file declares is all that they do.
            widest = DTYPES[entry.dtype].itemsize if storage.dtype == entry.dtype else _WIDEST
            found = self._mapped(source, max(self._alignment, widest))
            if found is not None:
                return found
        memory = allocated(storage.nbytes)
        self._tasks += _reading(memory, source, width, self._summed(storage, source))
        self._nbytes += storage.nbytes
        if not self._is_patient:
            self._read_all()
        return memory

    def _staged(self, storage: Storage, width: int, device: torch.device) -> torch.UntypedStorage:
        source = self._noted(storage)
        memory = allocated(storage.nbytes, str(device))
        checksums = self._summed(storage, source)

        def read(start: int, piece: torch.Tensor) -> None:
            part = source.part(start, piece.numel())
            in_parallel(_reading(piece, part, width, checksums), nbytes=part.nbytes)

        self._staging.setdefault(device, Staging(device)).fill(memory, read)
        return memory

    def _summed(self, storage: Storage, source: _Readable) -> Checksums | None:
        """What sums the bytes as they pass by: of those that are converted the ones before."""
        whole = (storage.original or storage) if isinstance(source, ConvertedRange) else storage
        return self._checksums if whole.crc32 is not None else None

    def _mapped(self, source: ByteRange, alignment: int) -> torch.UntypedStorage | None:
        """The bytes in the file; ``None`` if they have to be read."""
        source = source.file.located(source)
        if source.offset % alignment or not source.nbytes:
            return None
        key, offset = id(source.file), source.offset
        if key not in self._maps:
            self._maps[key] = _private_map(source.file)
        found = self._maps[key]
        if found is not None and offset + source.nbytes > len(found[0]):  # a spool has grown since
            begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            found, offset = _private_map(source.file, begin, offset - begin + source.nbytes), offset - begin
        return None if found is None else found[1][offset : offset + source.nbytes]

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """The values that the block requests are there at once, and so is everything requested before."""
        self._read_all()
        self._is_patient, before = False, self._is_patient
        try:
            yield
        finally:
            self._is_patient = before

    def _read_all(self) -> None:
        tasks, nbytes, self._tasks, self._nbytes = self._tasks, self._nbytes, [], 0
        in_parallel(near_together(tasks, _APART) if self._is_far else tasks, nbytes=nbytes)

    def finish(self) -> None:
        """Read what is left, and make sure that all is one state of the file."""
        self._read_all()
        for staging in self._staging.values():
            staging.finish()
        if (file := first_changed(self._files.values())) is not None:
            raise CorruptError("the file was changed while it was being read; read it again", path=file.path)


def _private_map(file: Source, begin: int = 0, nbytes: int = 0) -> tuple[mmap.mmap, torch.UntypedStorage] | None:
    """A part of a file (default: all) as memory that may be written to without changing it.

    ``None`` where the bytes can only be read, or the system refuses, as it does where the file has become shorter.
    """
    fd = file.fileno()
    try:
        mapping = None if fd is None else mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY, offset=begin)
    except (OSError, ValueError):
        return None
    # Made a storage once, of which tensors take slices: in half the time.
    return None if mapping is None else (mapping, torch.frombuffer(mapping, dtype=torch.uint8).untyped_storage())


def _swap_width(entry: TensorEntry) -> int:
    """Bytes to reverse together, 1 if there are none; the parts of a complex number are reversed separately."""
    if entry.storage.byteorder == sys.byteorder:
        return 1
    row = DTYPES[entry.dtype]
    return row.itemsize // 2 if row.kind == "complex" else row.itemsize


def _reading(
    memory: torch.UntypedStorage | torch.Tensor,
    source: _Readable,
    width: int,
    checksums: Checksums | None,
) -> list[Callable[[], object]]:
    """What fills memory of the CPU with bytes of a file, with no copy in between where the system can.

    Args:
        memory: where they go.
        source: the bytes.
        width: of the elements whose bytes are reversed; 1: none are.
        checksums: gets their sums.

    Returns:
        Tasks that may be carried out side by side, before the memory is let go of.
    """
    if not source.nbytes:
        return []
    view = memory_at(memory.data_ptr(), source.nbytes, writable=True)
    step = piece_nbytes(source, _SUMMED_READ) if is_made(source) else SUMMED_NBYTES
    tasks: list[Callable[[], object]] = []
    for first in range(0, source.nbytes, step):
        part = source if source.nbytes <= step else source.part(first, min(step, source.nbytes - first))
        tasks.append(partial(_fill, memory, view[first : first + part.nbytes], part, width, checksums))
    return tasks


def _fill(
    memory: object,
    view: memoryview,
    source: _Readable,
    width: int,
    checksums: Checksums | None,
) -> None:
    """Fill a part of the memory, which is kept until that is done."""
    if isinstance(source, ConvertedRange):
        before = buffer("before", source.original.nbytes)
        source.into(view, before)
        if checksums is not None and not is_made(source.original):
            checksums.passing(source.original.plain()).update(before)
        return
    if isinstance(source, DenseRange):
        read_into(source, view)
        return
    if checksums is None:
        source.file.read_into(source.offset, view)
    else:
        passing = checksums.passing(source)
        for start in range(0, source.nbytes, _SUMMED_READ):
            piece = view[start : start + _SUMMED_READ]
            source.file.read_into(source.offset + start, piece)
            passing.update(piece)
    if width > 1:
        swapped = torch.frombuffer(view, dtype=torch.uint8)
        swapped.untyped_storage().byteswap(_SAME_WIDTH[width])  # type: ignore[no-untyped-call]
