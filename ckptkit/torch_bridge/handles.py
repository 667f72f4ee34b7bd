"""One tensor at a time, both ways: `TensorEntry.torch`, and torch's tensors as `ckptkit.save` takes them.

A tensor in memory is a `TensorEntry` like any other: its storage, offset, sizes and strides are torch's own, and its
bytes are read in place, on a device in pieces of a few MiB.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

from ckptkit.bytesource import CHUNK_NBYTES, ByteRange
from ckptkit.checkpoint import StateDict, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, DTypeError, UnsupportedError
from ckptkit.extras import require_torch
from ckptkit.pickling.inert import Global, Object
from ckptkit.torch_bridge.loading import dtype_of, tensors
from ckptkit.transfer.memory import Storages, fill, least, memory_at

require_torch()

import torch  # noqa: E402 - behind the check, so that its absence is explained

__all__ = ["node_of", "read"]


def read(entry: TensorEntry, device: str | torch.device | None) -> torch.Tensor:
    """The values of a tensor; see `TensorEntry.torch`."""
    element = dtype_of(entry.dtype)
    if DTYPES[entry.dtype].kind == "quantized":
        raise DTypeError(f"elements of {entry.dtype} have values only together with the scales of their tensor")
    lying, stride = least(entry)
    where = torch.device("cpu")
    if str(device) != "cpu" or entry.requires_grad:  # an unsupported tensor is reported before a byte is read
        none = replace(entry.storage, nbytes=0, source=entry.storage.source.part(0, 0), crc32=None, original=None)
        nothing = replace(entry, storage=none, storage_offset=0, shape=(0,), stride=(1,), is_parameter=False)
        where = tensors(StateDict({"": nothing}), map_location=device)[""].device
    if where.type == "meta":
        tensor = torch.empty_strided(entry.shape, stride, dtype=element, device=where)
    else:
        memory = torch.UntypedStorage(lying.nbytes)  # type: ignore[no-untyped-call]
        if lying.nbytes:
            fill(memory_at(memory.data_ptr(), lying.nbytes, writable=True), lying)
        width = lying.itemsize // (2 if DTYPES[lying.dtype].kind == "complex" else 1)
        if sys.byteorder == "big" and width > 1:
            memory.byteswap({2: torch.int16, 4: torch.int32, 8: torch.int64}[width])  # type: ignore[no-untyped-call]
        # Not empty() of the dtype itself, which warns of complex32.
        flat = torch.empty((0,), dtype=torch.uint8).view(element).set_(memory)
        tensor = flat.to(where).as_strided(entry.shape, stride)
    if entry.is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=entry.requires_grad)
    return tensor.requires_grad_(entry.requires_grad)


def node_of(value: object, storages: Storages) -> object:
    """The node of a tensor, or of one of torch's objects without bytes; ``None`` for anything else.

    Args:
        value: any object.
        storages: those of the state by now.

    Raises:
        UnsupportedError: it is a tensor, and not a plain one; the message says what makes it one.
        DTypeError: of a dtype that ckptkit does not know.
    """
    if isinstance(value, torch.Tensor):
        return _entry(value, storages)
    if type(value) is torch.Size:
        return Object("reduce", Global("torch", "Size"), (tuple(value),))
    if isinstance(value, torch.device):
        kind, _, number = str(value).partition(":")
        return Object("reduce", Global("torch", "device"), (kind, int(number)) if number else (kind,))
    return Global("torch", str(value).removeprefix("torch.")) if isinstance(value, torch.dtype) else None


def _entry(tensor: torch.Tensor, storages: Storages) -> TensorEntry:
    if problem := _problem(tensor):
        raise UnsupportedError(problem)
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DTypeError(f"a tensor of {tensor.dtype}, which no known container can store")
    try:
        memory = tensor.untyped_storage()
        address, nbytes = memory.data_ptr(), memory.nbytes()
    except RuntimeError:  # of zeros that are not there, or that a transformation wraps
        raise UnsupportedError("a tensor without memory of its own; .clone() makes it a plain one") from None
    if nbytes and not address:
        raise UnsupportedError("a tensor whose memory was released")
    on_cpu = tensor.device.type == "cpu"

    def take() -> ByteRange:
        if on_cpu:
            return storages.memory.add_at(address, nbytes, memory)
        return storages.memory.add(nbytes, partial(_from_device, memory), memory)

    # Memory shared by arrays and tensors is recognized by its address and size.
    key: Any = (address, nbytes) if on_cpu and nbytes else (str(tensor.device), address, nbytes, memory._cdata)
    location = "cpu" if on_cpu else str(torch.serialization.location_tag(memory))
    entry = TensorEntry(
        storage=storages.get(key, name, take, location),
        storage_offset=int(tensor.storage_offset()),
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        dtype=name,
        requires_grad=tensor.requires_grad,
        is_parameter=type(tensor) is torch.nn.Parameter,
        is_conj=tensor.is_conj(),
        is_neg=tensor.is_neg(),
    )
    try:
        return entry.check()
    except CorruptError:
        raise UnsupportedError("a tensor whose memory was released") from None


def _problem(tensor: torch.Tensor) -> str | None:
    """The reason why a tensor is not plain, and what helps."""
    if tensor.is_nested:
        return "a nested tensor; .to_padded_tensor(0) or .unbind() gives plain ones"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {str(tensor.layout).removeprefix('torch.')}; .to_dense() makes it a plain one"
    if tensor.is_quantized:
        return "a quantized tensor; .dequantize() makes it a plain one"
    if tensor.device.type == "meta":
        return "a tensor on the meta device, which has no values"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        plain = ".as_subclass(torch.Tensor) makes it a plain one"
        if hasattr(tensor, "full_tensor"):
            plain = ".full_tensor() gives the plain one"
        elif hasattr(tensor, "__tensor_flatten__"):
            plain = "a plain one can be saved"
        return f"a tensor of class {kind}; {plain}"
    return None


def _from_device(memory: torch.UntypedStorage, start: int, nbytes: int) -> bytes:
    """Some bytes of a storage that is elsewhere."""
    nbytes = min(nbytes, CHUNK_NBYTES)
    view = torch.empty((0,), dtype=torch.uint8, device=memory.device).set_(memory, start, (nbytes,), (1,))
    host = view.cpu()
    return bytes(memory_at(host.data_ptr(), nbytes))
