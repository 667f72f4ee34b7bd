"""Where a storage goes, and how its bytes get there.

What ``map_location`` means is what ``torch.serialization`` makes of it (``_get_restore_location``), with errors that
say what to do.  To a CUDA device bytes go straight from the file, in pieces: two buffers of the host, which the device
may read by itself (pinned), are filled in turn, and while the device copies one the other is read, swapped, cast and
summed.  No more than the two are on the host at any time.  Copies are queued on the device's current stream, as
``Tensor.to(device, non_blocking=True)`` queues them, so that whatever the caller queues next waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ckptkit.arguments import device_problem
from ckptkit.checkpoint import Storage
from ckptkit.errors import RewriteError
from ckptkit.extras import require_torch
from ckptkit.report import listed

require_torch()

import torch  # noqa: E402 - behind the check, so that its absence is explained

__all__ = ["Places", "Staging", "TorchLocation", "allocated"]

TorchLocation = (
    str | torch.device | Mapping[str, str] | Callable[[torch.UntypedStorage, str], "torch.UntypedStorage | None"] | None
)
"""All that ``torch.load`` takes as ``map_location``."""

STAGED = ("cuda",)
"""Types of devices that are filled in pieces; torch moves storages to others."""

_PIECE_NBYTES = 32 << 20
"""Bytes of one buffer: a copy of as many takes longer than to start it, and the two are soon pinned."""

_APART = 512
"""Bytes from which a piece begins in a buffer: as CUDA aligns what it allocates."""


def allocated(nbytes: int, device: str = "cpu") -> torch.UntypedStorage:
    """Memory that torch owns, not yet filled."""
    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]


class Places:
    """The devices that ``map_location`` gives storages.

    Raises:
        RewriteError: it is of a type that says nothing.
    """

    def __init__(self, map_location: TorchLocation) -> None:
        is_one = isinstance(map_location, (str, torch.device))
        if not (map_location is None or is_one or isinstance(map_location, Mapping) or callable(map_location)):
            raise RewriteError(
                f"map_location is of type {type(map_location).__name__}; "
                "expected a string, a torch.device, a dict or a callable"
            )
        self.asks = callable(map_location) and not is_one and not isinstance(map_location, Mapping)
        """Whether to call a function for each storage, once it is on the CPU."""
        self._given = map_location
        self._everywhere = str(map_location) if is_one else None
        self._known: dict[str, torch.device] = {}

    def location(self, storage: Storage) -> str:
        """The device for a storage; a function is asked with the device in the file."""
        if self._everywhere is not None:
            return self._everywhere
        if isinstance(self._given, Mapping):
            return str(self._given.get(storage.location, storage.location))
        return storage.location

    def asked(self, storage: Storage, memory: torch.UntypedStorage) -> torch.UntypedStorage:
        """A storage on the CPU where the function puts it.

        Raises:
            RewriteError: it gives something else, or this machine lacks the place.
        """
        result: object = self._given(memory, storage.location)  # type: ignore[operator, misc]
        if result is None:
            return memory if storage.location == "cpu" else self.moved(storage, memory, storage.location)
        if not isinstance(result, torch.UntypedStorage) or result.nbytes() != storage.nbytes:
            raise RewriteError(
                f"map_location returned {result!r:.80} for storage {storage.key!r}; "
                f"expected a torch.UntypedStorage of {storage.nbytes:,} bytes, such as storage.cuda(1), or None"
            )
        return result

    def device(self, storage: Storage, location: str) -> torch.device:
        """The device of a location.

        Raises:
            RewriteError: this machine, or this torch, lacks it.  Nothing was read by then.
        """
        if location not in self._known:
            self._known[location] = self.moved(storage, allocated(0), location).device
        return self._known[location]

    def moved(self, storage: Storage, memory: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        """The storage where torch's own registry of locations puts it.

        Raises:
            RewriteError: this machine, or this torch, lacks the location.
        """
        try:
            restored = torch.serialization.default_restore_location(memory, location)  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
            raise RewriteError(
                f"{storage.source.file.path}: storage {storage.key!r}, saved on {storage.location!r}, cannot be put on "
                f"{location!r} on this machine, which has {_here()} ({device_problem(location) or reason}); give "
                'map_location="cpu"',
                path=storage.source.file.path,
            ) from error
        if not isinstance(restored, torch.UntypedStorage):
            raise RewriteError(
                f"torch restored {location!r} as {type(restored).__name__}, which is not an UntypedStorage"
            )
        return restored


def _here() -> str:
    """The devices of this machine."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for name in ("mps", "xpu"):
        module = getattr(torch.backends, name, None) or getattr(torch, name, None)
        if module is not None and module.is_available():
            found.append(name)
    return listed(found)


class Staging:
    """Buffers of the host that a device copies from, while others are filled.

    Args:
        device: where the bytes go.
        nbytes: of one buffer, a multiple of every element's width.
        count: how many buffers take turns.
    """

    def __init__(self, device: torch.device, nbytes: int = _PIECE_NBYTES, count: int = 2) -> None:
        self._device = device
        self._nbytes = nbytes
        self._buffers: list[torch.Tensor] = []
        self._copied: list[torch.cuda.Event | None] = []
        self._count = count
        self._turn = -1
        self._used = nbytes

    def fill(self, memory: torch.UntypedStorage, read: Callable[[int, torch.Tensor], object]) -> None:
        """Fill a storage of the device; small ones share a buffer.

        Args:
            memory: the storage.
            read: puts its bytes from a position on into a piece of a buffer, in the form for the device.
        """
        target = torch.empty((0,), dtype=torch.uint8, device=memory.device).set_(memory)
        start, end = 0, memory.nbytes()
        while start < end:
            piece = self._room(end - start)
            read(start, piece)
            target[start : start + piece.numel()].copy_(piece, non_blocking=True)
            start += piece.numel()

    def finish(self) -> None:
        """Wait until the device has all; the buffers are free then."""
        if self._device.type == "cuda" and self._buffers:
            torch.cuda.current_stream(self._device).synchronize()
        self._buffers.clear()
        self._copied.clear()
        self._turn, self._used = -1, self._nbytes

    def _room(self, nbytes: int) -> torch.Tensor:
        """A piece for so many bytes, or for as many of them as fit into a buffer."""
        if nbytes > self._nbytes - self._used:
            self._next()
        start = self._used
        end = min(start + nbytes, self._nbytes)
        self._used = min(-(-end // _APART) * _APART, self._nbytes)
        return self._buffers[self._turn][start:end]

    def _next(self) -> None:
        """Turn to the buffer that was used longest ago, once the device has copied all of it."""
        if self._turn >= 0 and self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._copied[self._turn] = event
        self._turn, self._used = (self._turn + 1) % self._count, 0
        if self._turn == len(self._buffers):
            self._buffers.append(self._buffer())
            self._copied.append(None)
        event_before = self._copied[self._turn]
        if event_before is not None:
            event_before.synchronize()

    def _buffer(self) -> torch.Tensor:
        """Memory that the device may read by itself; where the system pins no more, other, which torch copies."""
        if self._device.type == "cuda":
            try:
                return torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                pass
        return torch.empty(self._nbytes, dtype=torch.uint8)
