"""The writing half of `ckptkit.formats.torch_zip`, where the layout is described."""

from __future__ import annotations

import json

from ckptkit.checkpoint import STATE_DICT, Checkpoint, Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import DTypeError, RewriteError, UnsupportedError
from ckptkit.formats.archives.zip_writer import ZipWriter
from ckptkit.formats.torch_archive import METADATA
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.beside import discarded_text, held_instead
from ckptkit.normalize.selection import paths_listed
from ckptkit.pickling.tensors import lower_storage, lower_tensor
from ckptkit.pickling.writer import write_pickle
from ckptkit.plan import Plan
from ckptkit.report import count_of, glob_of, listed

__all__ = ["write", "written_tree"]

NAME = "torch-zip"


def written_tree(checkpoint: Checkpoint) -> object:
    """What is written of a checkpoint: its tree, or of a program its state_dict alone.

    Raises:
        RewriteError: it is a program, and none of its sections was selected, or it has no weights; its pickle makes
            what belongs to nothing in the tree.
    """
    if not checkpoint.origin.is_program:
        if checkpoint.discarded:
            raise RewriteError(
                f"{checkpoint.origin.path}: its pickle makes {discarded_text(checkpoint.discarded)} and drops the "
                "result, which a .pth would lose; --weights-only leaves it out, and so does a .safetensors"
            )
        return checkpoint.rest
    only = f"{checkpoint.origin.path}: of a {checkpoint.origin.format} file only the weights can be written, and"
    if checkpoint.origin.state_path is None:
        weights = paths_listed(checkpoint.sections)
        if weights:
            raise RewriteError(f"{only} none are selected; name the section with --section: {weights}")
        raise RewriteError(f"{only} {held_instead(checkpoint)}")
    if not checkpoint.state_dict.everything:
        frozen = any(finding.code == "frozen-program" for finding in checkpoint.findings)
        why = "has none under names, as programs have that were frozen" if frozen else "holds no tensors under names"
        raise RewriteError(f"{only} it {why}")
    return STATE_DICT


def write(checkpoint: Checkpoint) -> Plan:
    """The plan of a torch-zip; see `ckptkit.formats.torch_zip` for the layout.

    Raises:
        RewriteError: as `written_tree`.
        DTypeError: a tensor that torch could load and not use, or has no dtype for.
        UnsupportedError: storages of both byte orders.
    """
    if unknown := [name for name, entry in checkpoint.state_dict.items() if DTYPES[entry.dtype].bits]:
        raise DTypeError(
            f"torch has no dtype for {count_of(len(unknown), 'tensor')}: "
            f"{listed([f'{name:.100} ({checkpoint.state_dict[name].dtype})' for name in unknown], 4)}; write a "
            f".safetensors, which holds all, or leave them out with --exclude {glob_of(unknown[0])}"
        )
    keys: dict[int, str] = {}
    used: list[Storage] = []
    tensors = 0

    def lower(node: object) -> object:
        nonlocal tensors
        if node is STATE_DICT:
            return lower_state_dict(checkpoint.state_dict)
        if isinstance(node, TensorEntry):
            tensors += 1
            _require_usable(node)
            return lower_tensor(node)
        if isinstance(node, Storage):
            if id(node) not in keys:
                keys[id(node)] = str(len(used))
                used.append(node)
            return lower_storage(node, keys[id(node)])
        return node

    # Of a program only the state_dict is written, as torch would; no name in it means another thing in protocol 2.
    protocol = None if checkpoint.origin.is_program else checkpoint.origin.pickle_protocol
    data = write_pickle(written_tree(checkpoint), lower=lower, protocol=protocol)
    byteorders = {storage.byteorder for storage in used if storage.dtype not in ("bool", "uint8", "int8")}
    if len(byteorders) > 1:
        raise UnsupportedError("storages of both byte orders cannot be written into one file")
    archive = ZipWriter("archive")
    archive.add_literal("data.pkl", data)
    archive.add_literal("byteorder", (byteorders.pop() if byteorders else "little").encode())
    for key, storage in enumerate(used):
        archive.add_copy(f"data/{key}", storage.source, storage.crc32)
    if checkpoint.metadata:
        text = json.dumps(dict(checkpoint.metadata), ensure_ascii=True, indent=1).encode()
        archive.add_literal(METADATA, text, is_final=False)
    archive.add_literal("version", b"3\n")
    steps, nbytes = archive.finish()
    return Plan(format=NAME, nbytes=nbytes, steps=steps, tensors=tensors, aliases={})


def _require_usable(entry: TensorEntry) -> None:
    """Raise for the negated view that a cast can make and torch cannot resolve: it negates no 8-bit floats."""
    if entry.is_neg and DTYPES[entry.dtype].is_floating and DTYPES[entry.dtype].itemsize == 1:
        raise DTypeError(
            f"a lazily negated tensor of shape {entry.shape} would be {entry.dtype} in the output, which torch loads "
            "and cannot use; write a .safetensors, which holds its values, or leave its dtype with --keep-dtype"
        )
