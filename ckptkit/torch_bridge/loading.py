"""Entries -> ``torch.Tensor``: the only way tensor values reach torch.  Imports torch.

No pickle is read and no class is looked up: bytes go from the file straight into memory that torch
has allocated, one torch storage for each `Storage`, and tensors are strided views of it.  What
shared or was tied in the file therefore shares and is tied in memory, with the same shape, stride
and offset, as after ``torch.load``.

Of a tensor subclass the plain tensor is given, and Python attributes saved with a tensor are left
out: both would need the file's classes.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Mapping
from functools import partial

from ckptkit.arguments import device_problem
from ckptkit.bytesource import ByteRange, Source
from ckptkit.checkpoint import StateDict, Storage, TensorEntry
from ckptkit.dtypes import DTYPES, dtype
from ckptkit.errors import CorruptError, DTypeError, RewriteError, UnsupportedError
from ckptkit.extras import require_torch
from ckptkit.normalize.tensors import storage_names
from ckptkit.report import listed
from ckptkit.transfer.checksums import SUMMED_NBYTES, Checksums, Passing
from ckptkit.transfer.workers import in_parallel

require_torch()

import torch  # noqa: E402 - behind the check, so that its absence is explained

__all__ = ["Loader", "TorchLocation", "dtype_of", "require_dtypes", "restore", "tensors"]

TorchLocation = (
    str | torch.device | Mapping[str, str] | Callable[[torch.UntypedStorage, str], "torch.UntypedStorage | None"] | None
)
"""All that ``torch.load`` takes as ``map_location``."""

_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_WRITABLE = 0x200
"""``PyBUF_WRITE``."""

_ONE_READ = 1 << 30
"""Bytes asked of one read: well under the 2 GiB a single call gives on Linux."""

_SUMMED_READ = 1 << 20
"""Bytes of one read that are summed while they are in a core's own cache."""

_ALIGNMENT = 64
"""Bytes: as torch allocates.  Kernels choose by alignment how they sum up, so that the last bits of a product may
differ between a tensor in a file and its copy in memory; aligned, they were the same wherever it was measured."""

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
        raise DTypeError(f"torch has no dtype {name}, whose elements fill no whole byte")
    if not isinstance(found, torch.dtype):
        newer = f"torch {_SINCE[name]} or later has it" if name in _SINCE else "a newer torch may have it"
        raise DTypeError(f"torch {torch.__version__} has no dtype {name}; {newer}")
    return found


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
        state_dict: the names and entries; the file they lie in must still be open.
        map_location: as for ``torch.load``: ``None`` puts each storage where the file says it lay;
            a string or ``torch.device`` puts all there; a dict maps locations; a callable gets the
            storage on the CPU and its location, and returns where it shall lie, or ``None`` for
            the file's own.  ``"meta"`` reads nothing.
        mapped: let tensors on the CPU lie in a private mapping of the file where its bytes are as torch wants them
            (not compressed, of this machine's byte order, aligned to 64 bytes), which takes no memory of its own and
            reads when a value is used.  Writing to such a tensor never reaches the file.  The mapping lives as long
            as the tensors, also when the file is closed; whoever shortens the file meanwhile ends the process, as
            with ``torch.load(mmap=True)``.
        checksums: hold the recorded checksums of the storages that are read; of mapped ones too, all of whose bytes
            are read for it.

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
    loader = Loader(restore(map_location), mapped=mapped, checksums=sums if checksums else None)
    with sums.held(lambda: storage_names(state_dict.everything)):
        loaded = {name: loader.tensor(entry) for name, entry in state_dict.items()}
        loader.finish()
    return loaded


class Loader:
    """Makes each storage and each tensor once."""

    def __init__(
        self,
        restore: Callable[[Storage, Callable[[], torch.UntypedStorage]], torch.UntypedStorage],
        *,
        mapped: bool,
        checksums: Checksums | None,
    ) -> None:
        self._restore = restore
        self._mapped = mapped
        self._checksums = checksums
        self._maps: dict[int, mmap.mmap | None] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._widths: dict[int, int] = {}
        self._files: dict[int, Source] = {}
        self._kept: list[object] = []  # keeps every id taken

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """The entry's tensor; for one entry always the same object, as a pickle's memo gives it."""
        if id(entry) not in self._tensors:
            self._tensors[id(entry)] = self._view(entry)
            self._kept.append(entry)
        return self._tensors[id(entry)]

    def _view(self, entry: TensorEntry) -> torch.Tensor:
        element = dtype_of(entry.dtype)
        storage = self.storage(entry)
        # Not empty() of the dtype itself, which warns of complex32.
        view = torch.empty((0,), dtype=torch.uint8, device=storage.device).view(element)
        view = view.set_(storage, entry.storage_offset, entry.shape, entry.stride)
        # The bits torch keeps beside the bytes.
        view = torch._neg_view(view) if entry.is_neg else view
        view = view.conj() if entry.is_conj else view
        if entry.requires_grad and not (element.is_floating_point or element.is_complex):
            raise CorruptError(
                f"a tensor of {entry.dtype} is marked requires_grad; only floating point and complex ones can be",
                path=entry.storage.source.file.path,
            )
        if entry.is_parameter:
            return torch.nn.Parameter(view, requires_grad=entry.requires_grad)
        return view.requires_grad_(entry.requires_grad)

    def storage(self, entry: TensorEntry) -> torch.UntypedStorage:
        """The storage that an entry views, in this machine's byte order."""
        storage = entry.storage
        width = _swap_width(entry)
        if self._widths.setdefault(id(storage), width) != width:
            raise UnsupportedError(
                f"storage {storage.key!r} is viewed as elements of different widths, in a byte order foreign to "
                "this machine",
                path=storage.source.file.path,
            )
        if id(storage) not in self._storages:
            self._storages[id(storage)] = self._restore(storage, lambda: self._read(storage, width))
            self._kept.append(storage)
        return self._storages[id(storage)]

    def _read(self, storage: Storage, width: int) -> torch.UntypedStorage:
        self._files[id(storage.source.file)] = storage.source.file
        if self._checksums is not None:
            self._checksums.want([storage])
        source = storage.source.plain().part(0, storage.nbytes)
        found = self._map(source) if self._mapped and width == 1 else None
        if found is not None:
            return found
        memory = _allocated(storage.nbytes)
        _read_into(memory, source, self._checksums if storage.crc32 is not None else None)
        if width > 1:
            memory.byteswap(_SAME_WIDTH[width])  # type: ignore[no-untyped-call]
        return memory

    def _map(self, source: ByteRange) -> torch.UntypedStorage | None:
        """The bytes where they lie in the file; ``None`` where they have to be read."""
        if source.offset % _ALIGNMENT or not source.nbytes:
            return None
        if id(source.file) not in self._maps:
            self._maps[id(source.file)] = _private_map(source.file)
            self._kept.append(source.file)
        mapping, offset = self._maps[id(source.file)], source.offset
        if mapping is not None and offset + source.nbytes > len(mapping):  # a spool has grown since
            begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            mapping, offset = _private_map(source.file, begin, offset - begin + source.nbytes), offset - begin
        if mapping is None:
            return None
        return torch.frombuffer(mapping, dtype=torch.uint8, count=source.nbytes, offset=offset).untyped_storage()

    def finish(self) -> None:
        """Make sure that what was read is one state of the file."""
        for file in self._files.values():
            if file.changed():
                raise CorruptError("the file was changed while it was being read; read it again", path=file.path)


def _private_map(file: Source, begin: int = 0, nbytes: int = 0) -> mmap.mmap | None:
    """A part of a file (default: all) as memory that may be written to without changing it.

    ``None`` where the bytes can only be read, or the system refuses, as it does where the file has become shorter.
    """
    fd = file.fileno()
    try:
        return None if fd is None else mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY, offset=begin)
    except (OSError, ValueError):
        return None


def _allocated(nbytes: int, device: str = "cpu") -> torch.UntypedStorage:
    """Memory of torch's own, not yet filled."""
    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]


def _swap_width(entry: TensorEntry) -> int:
    """Bytes that are to be reversed as one, 1 where nothing is; the parts of a complex one each on its own."""
    if entry.storage.byteorder == sys.byteorder:
        return 1
    row = DTYPES[entry.dtype]
    return row.itemsize // 2 if row.kind == "complex" else row.itemsize


def _read_into(memory: torch.UntypedStorage, source: ByteRange, checksums: Checksums | None) -> None:
    """Fill torch's memory from the file, with no copy in between where the system can; ``checksums`` gets its sums."""
    if not source.nbytes:
        return
    view: memoryview = _memory_at(memory.data_ptr(), source.nbytes, _WRITABLE)
    if checksums is None:
        _fill(view, source, _ONE_READ)
        return
    tasks = []
    for start in range(0, source.nbytes, SUMMED_NBYTES):
        part = source.part(start, min(SUMMED_NBYTES, source.nbytes - start))
        tasks.append(partial(_fill, view[start : start + part.nbytes], part, _SUMMED_READ, checksums.passing(part)))
    in_parallel(tasks, nbytes=source.nbytes)


def _fill(view: memoryview, source: ByteRange, step: int, passing: Passing | None = None) -> None:
    for start in range(0, source.nbytes, step):
        piece = view[start : start + step]
        source.file.read_into(source.offset + start, piece)
        if passing is not None:
            passing.update(piece)


# Where a storage goes: torch.serialization's ``_get_restore_location``, with errors that say what to do.


def restore(
    map_location: TorchLocation,
) -> Callable[[Storage, Callable[[], torch.UntypedStorage]], torch.UntypedStorage]:
    """From a storage and the function that reads it to the torch storage at its place."""
    if map_location is None:
        return lambda storage, read: _place(storage, read, storage.location)
    if isinstance(map_location, (str, torch.device)):
        return lambda storage, read: _place(storage, read, str(map_location))
    if isinstance(map_location, Mapping):
        table = map_location
        return lambda storage, read: _place(storage, read, str(table.get(storage.location, storage.location)))
    if not callable(map_location):
        raise RewriteError(
            f"map_location is of type {type(map_location).__name__}; "
            "expected a string, a torch.device, a dict or a callable"
        )
    function = map_location

    def restore(storage: Storage, read: Callable[[], torch.UntypedStorage]) -> torch.UntypedStorage:
        memory = read()
        result: object = function(memory, storage.location)
        if result is None:
            return _place(storage, lambda: memory, storage.location)
        if not isinstance(result, torch.UntypedStorage) or result.nbytes() != storage.nbytes:
            raise RewriteError(
                f"map_location returned {result!r:.80} for storage {storage.key!r}; "
                f"expected a torch.UntypedStorage of {storage.nbytes:,} bytes, such as storage.cuda(1), or None"
            )
        return result

    return restore


def _place(storage: Storage, read: Callable[[], torch.UntypedStorage], location: str) -> torch.UntypedStorage:
    """The storage at a location.

    Raises:
        RewriteError: this machine, or this torch, lacks the location.
    """
    if location == "meta":
        return _allocated(storage.nbytes, "meta")
    if location == "cpu":
        return read()
    # An empty storage finds out, before anything is read, whether the location is there.
    _registered(storage, _allocated(0), location)
    return _registered(storage, read(), location)


def _registered(storage: Storage, memory: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
    """The storage where torch's own registry of locations puts it."""
    try:
        restored = torch.serialization.default_restore_location(memory, location)  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise RewriteError(
            f"{storage.source.file.path}: storage {storage.key!r}, saved on {storage.location!r}, cannot be put on "
            f'{location!r} on this machine ({device_problem(location) or reason}); give map_location="cpu"',
            path=storage.source.file.path,
        ) from error
    if not isinstance(restored, torch.UntypedStorage):
        raise RewriteError(f"torch restored {location!r} as {type(restored).__name__}, which is not an UntypedStorage")
    return restored
