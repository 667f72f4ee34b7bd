"""Exported programs: what ``torch.export.save`` and ``torch._inductor.aoti_compile_and_package`` write.

Layout since 2.8: a torch archive (`ckptkit.formats.torch_archive`; ``torch/export/pt2_archive/_package.py``,
``constants.py`` and ``torch/_export/serde/schema.py``):

- ``archive_format``: ``pt2``; ``archive_version``; ``.data/version``
- ``models/NAME.json``: the graph
- ``data/weights/NAME_weights_config.json``: for each weight's name where and what it is: ``path_name``,
  ``is_param``, ``use_pickle`` and ``tensor_meta`` (dtype as a number, sizes, strides, storage offset,
  device, layout); ``data/weights/weight_N``: the storage's bytes, or with ``use_pickle`` a file of
  ``torch.save``'s
- ``data/constants/NAME_constants_config.json`` and ``tensor_N``: constants and buffers that are not
  persistent, likewise; ``custom_obj_N`` and ``opaque_obj_N`` are pickled
- ``data/weights/NAME.pt``, ``data/constants/NAME.pt``: the same as files of ``torch.save``'s, before 2.9
- ``data/sample_inputs/NAME.pt``: a file of ``torch.save``'s
- ``data/aotinductor/NAME/…``, ``data/executorch/…``: programs for one machine; they are named
- ``extra/…``: files of the user's

Before 2.8 the zip archive has no root folder: ``serialized_exported_program.json``,
``serialized_state_dict.pt`` (``.json`` in 2.1), ``serialized_constants.pt``,
``serialized_example_inputs.pt`` (2.4 and later) and ``version``.

A size that is not a number (a symbol) is not accepted: weights have none.  Of the pickles the names
are judged, since ``torch.export.load`` executes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeVar

from ckptkit.checkpoint import Storage, TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, FormatError, UnsupportedError
from ckptkit.formats.format import Probe
from ckptkit.formats.json_text import parse, shown
from ckptkit.formats.torch_archive import TorchArchive
from ckptkit.formats.torchscript import vouched
from ckptkit.formats.zip_records import record_source
from ckptkit.normalize import RawCheckpoint
from ckptkit.pickling.inert import InertDict
from ckptkit.pickling.tensors import StorageTable
from ckptkit.report import Finding, count_of

__all__ = ["read"]

_NAME = "pt2"
_COMPILED = ("data/aotinductor/", "data/executorch/")
_FOLDERS = ("models/", "extra/", "data/sample_inputs/", *_COMPILED)
_OLD = "serialized_exported_program.json"
_STRIDED = 7

_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip
"""``ScalarType`` of ``torch/_export/serde/schema.py``."""


def read(probe: Probe) -> RawCheckpoint:
    """The tree and the container's facts.

    Raises:
        FormatError: the file is damaged or refused.
    """
    archive = TorchArchive(probe.records, probe.limits)
    archive.programs = _COMPILED
    reader = _Reader(archive)
    models = reader.old() if _OLD in archive.records else reader.models()
    parts: list[tuple[object, object]] = models[0][1] if len(models) == 1 else [(n, InertDict(p)) for n, p in models]
    if not models and not any(name.startswith(_COMPILED) for name in archive.records):
        raise UnsupportedError("an exported program without a model: a newer torch may use other records")
    has_weights = any(key == "state_dict" for _, model in models for key, _ in model)
    return RawCheckpoint(
        root=InertDict(parts),
        kind="state_dict" if has_weights and len(models) == 1 else None,
        format=_NAME,
        format_version=archive.small("archive_version") or archive.small("version"),
        byteorder=reader.byteorder,
        writer=reader.writer,
        globals=vouched(archive.uses()),
        has_pickle=archive.has_pickle,
        discarded=archive.discarded,
        findings=(*archive.findings(), *reader.findings()),
    )


_Parts = list[tuple[object, object]]


class _Reader:
    """The description of an archive's models, in any of the layouts."""

    def __init__(self, archive: TorchArchive) -> None:
        self._archive = archive
        self._unlisted: list[str] = []
        self.byteorder: Literal["little", "big"] = archive.byteorder()
        self.writer: str | None = None

    def models(self) -> list[tuple[str, _Parts]]:
        """Each model's name, and its ``state_dict`` and ``constants`` if it has them."""
        self._archive.mark(name for name in self._archive.records if name.startswith(_FOLDERS))
        self._archive.mark(("archive_format", "archive_version"))
        names = [
            name[len("models/") : -len(".json")]
            for name in self._archive.records
            if name.startswith("models/") and name.endswith(".json")
        ]
        found = []
        for name in names:
            parts: _Parts = []
            for key, folder in (("state_dict", "data/weights/"), ("constants", "data/constants/")):
                config = f"{folder}{name}_{folder.split('/')[1]}_config.json"
                if config in self._archive.records:
                    self.writer = "torch 2.9 or later"
                    values = InertDict(list(self._configured(config, folder).items()))
                    parts += [(key, values)] if values.pairs or key == "state_dict" else []
                elif f"{folder}{name}.pt" in self._archive.records:
                    self.writer = "torch 2.8 or 2.9"
                    parts += self._saved(key, f"{folder}{name}.pt")
            self._saved("", f"data/sample_inputs/{name}.pt")
            found.append((name, parts))
        return found

    def old(self) -> list[tuple[str, _Parts]]:
        """The one model of an archive of 2.1 to 2.7."""
        self.writer = "torch 2.1 to 2.7"
        self._archive.mark((_OLD, "version"))
        self._archive.mark(name for name in self._archive.records if name.startswith("extra_files/"))
        parts: _Parts = []
        for key, stem in (("state_dict", "serialized_state_dict"), ("constants", "serialized_constants")):
            for name in (f"{stem}.pt", f"{stem}.json"):
                parts += self._saved(key, name)
        self._saved("", "serialized_example_inputs.pt")
        return [("model", parts)]

    def _saved(self, key: str, name: str) -> _Parts:
        """The object that ``torch.save`` wrote into a record, under a key; empty if the record is."""
        if name not in self._archive.records:
            return []
        root = self._load(name)
        empty = root is None or (isinstance(root, InertDict) and not root.pairs and key == "constants")
        return [] if empty else [(key, root)]

    def _load(self, name: str) -> object:
        """The object that ``torch.save`` wrote into a record; ``None``: it is not a torch archive."""
        nested = self._archive.nested(name)
        if nested is None:
            if self._archive.records[name].nbytes:
                self._unlisted.append(name)
            return None
        try:
            table = StorageTable(nested.locator("data/"), byteorder=nested.byteorder(), limits=nested.limits)
            pickle = nested.pickle("data.pkl", table)
        except FormatError as error:
            error.where = f"{name}, {error.where}" if error.where else name
            raise
        self._archive.include(name, nested)
        return pickle.root

    def _configured(self, config: str, folder: str) -> dict[object, object]:
        """The tensors that a config lists, by name."""
        limits = self._archive.limits
        try:
            listed = parse(self._archive.read(config, limits.header_nbytes), limits, "the config")
            payloads = _field(listed, "config", dict)
            storages = self._storages(payloads, folder)
            found: dict[object, object] = {}
            for name, payload in payloads.items():
                value = self._payload(name, payload, folder, storages)
                if value is not None:
                    found[name] = value
            return found
        except FormatError as error:
            raise error.at(where=config) from error.__cause__

    def _storages(self, payloads: dict[str, object], folder: str) -> dict[str, Storage]:
        """The storages of the tensors that are not pickles, by their path; typed where all views are of one type."""
        dtypes: dict[str, set[str]] = {}
        locations: dict[str, str] = {}
        for payload in payloads.values():
            meta = payload.get("tensor_meta") if isinstance(payload, dict) else None
            if isinstance(payload, dict) and isinstance(meta, dict) and payload.get("use_pickle") is False:
                path = _field(payload, "path_name", str)
                dtypes.setdefault(path, set()).add(_dtype(meta))
                locations[path] = _location(meta)
        found = {}
        for path, names in dtypes.items():
            record = self._archive.records.get(folder + path)
            if record is None:
                raise CorruptError(f"{shown(path)} is listed, but the archive has no record with that name")
            self._archive.mark((folder + path,), known=True)
            found[path] = Storage(
                key=path,
                dtype=names.pop() if len(names) == 1 else None,
                nbytes=record.nbytes,
                location=locations[path],
                source=record_source(record),
                crc32=record.crc32,
                byteorder=self.byteorder,
            )
        return found

    def _payload(self, name: str, payload: object, folder: str, storages: dict[str, Storage]) -> object:
        """One tensor; ``None``: it has no bytes or is not a tensor, and is not listed."""
        path = _field(payload, "path_name", str)
        if _field(payload, "use_pickle", bool):
            return self._pickled(name, folder + path)
        meta = _field(payload, "tensor_meta", dict)
        storage = storages[path]
        shape, stride = _sizes(meta, "sizes", name), _sizes(meta, "strides", name)
        if _field(meta, "layout", int) != _STRIDED or (not storage.nbytes and 0 not in shape):
            self._unlisted.append(name)  # sparse, or exported from a fake tensor
            return None
        if len(shape) > self._archive.limits.dimensions:
            most = self._archive.limits.dimensions
            raise CorruptError(f"{shown(name)}: {count_of(len(shape), 'dimension')}; torch allows {most}")
        return TensorEntry(
            storage=storage,
            storage_offset=_size(_field(meta, "storage_offset", dict), name),
            shape=shape,
            stride=stride,
            dtype=_dtype(meta),
            requires_grad=_field(meta, "requires_grad", bool),
            is_parameter=_field(payload, "is_param", bool),
        ).check()

    def _pickled(self, name: str, record: str) -> object:
        """A tensor subclass as ``torch.save`` wrote it; of objects only the names in their pickles are taken."""
        if record not in self._archive.records:
            raise CorruptError(f"{shown(record)} is listed, but the archive has no record with that name")
        if "/opaque_obj_" not in record:
            value = self._load(record)
            if "/custom_obj_" not in record:
                return value
        self._archive.mark((record,))
        self._unlisted.append(name)
        return None

    def findings(self) -> Iterator[Finding]:
        """Noteworthy facts about the models."""
        if self._unlisted:
            names = ", ".join(name[:80] for name in self._unlisted[:4]) + (", ..." if len(self._unlisted) > 4 else "")
            yield Finding(
                code="not-a-plain-tensor",
                severity="warning",
                message=f"{count_of(len(self._unlisted), 'value')} of the program not listed: objects, or tensors "
                f"that are sparse or have no bytes in the file: {names}",
            )


# The fields of a config.


_T = TypeVar("_T")


def _field(node: object, name: str, kind: type[_T]) -> _T:
    """A field of a JSON object, of the type it must have.

    Raises:
        CorruptError: the node is not an object, or has no such field, or it is of another type.
    """
    value = node.get(name) if isinstance(node, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CorruptError(f"a payload whose {name!r} is {shown(value)}; {kind.__name__} is expected")
    return value


def _size(node: object, name: str) -> int:
    value = node.get("as_int") if isinstance(node, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise CorruptError(f"{shown(name)}: a size, stride or offset that is not a whole number")
    return value


def _sizes(meta: dict[str, object], field: str, name: str) -> tuple[int, ...]:
    return tuple(_size(node, name) for node in _field(meta, field, list))


def _dtype(meta: dict[str, object]) -> str:
    number = _field(meta, "dtype", int)
    name = _DTYPES.get(number)
    if name is None or name not in DTYPES:
        raise UnsupportedError(f"a tensor of scalar type {number}; a newer ckptkit may support it")
    return name


def _location(meta: dict[str, object]) -> str:
    device = _field(meta, "device", dict)
    index = device.get("index")
    kind = _field(device, "type", str)
    return f"{kind}:{index}" if isinstance(index, int) and kind != "cpu" else kind
