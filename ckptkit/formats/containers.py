"""The table of containers: the name of each, how a file is recognized, and which modules read and write it.

Adding a container is a module with a function ``read(probe)``, whose docstring is its specification,
and one row in `CONTAINERS`, with its facts.  A module is imported when there is a file for it.

Which container a file is: by its content, once, and for exactly one of them.  Whether a remote file is also a zip
archive by its end is unknown before values are read or `ckptkit.bytesource.Source.settle` asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from ckptkit.bytesource import Source
from ckptkit.errors import AmbiguousError
from ckptkit.formats.format import Format, Probe
from ckptkit.formats.tar_archive import BLOCK_NBYTES, is_header
from ckptkit.formats.zip_archive import LOCAL_SIGNATURE, TAIL_NBYTES, ends_like_a_zip

__all__ = [
    "CONTAINERS",
    "FORMATS",
    "INDEX_SUFFIXES",
    "PACKED",
    "SHARED_SUFFIXES",
    "SUFFIXES",
    "format_named",
    "holds_files",
    "identify",
    "index_of",
    "index_over",
]


def _archive(kind: str) -> Callable[[Probe], bool]:
    """Whether a file is this kind of torch zip archive."""

    def claims(probe: Probe) -> bool:
        if not probe.records:
            return False
        from ckptkit.formats.torch_archive import archive_kind

        return archive_kind(probe) == kind

    return claims


def _legacy(probe: Probe) -> bool:
    if probe.head[:1] not in (b"\x80", b"\x8a", b"L"):  # PROTO, LONG1, LONG
        return False
    from ckptkit.formats.torch_legacy import begins_one

    return begins_one(probe.head)


def _tar(probe: Probe) -> bool:
    return is_header(probe.head[:BLOCK_NBYTES])


def _safetensors(probe: Probe) -> bool:
    # A plausible size and a brace: text, pickles and zips have larger first words or no brace there.
    return probe.head[8:9] == b"{" and int.from_bytes(probe.head[:8], "little") < 1 << 40


def _pickle(probe: Probe) -> bool:
    # A tuple, call, dict or list of protocol 0 or 1; what joblib compresses with zlib, gzip, bz2, xz.
    if probe.head[:1] not in (b"\x80", b"(", b"c", b"}", b"]", b"\x78", b"\x1f", b"B", b"\xfd"):
        return False
    if probe.records:  # an archive's that was unpacked
        return False
    from ckptkit.formats.plain_pickle import outcome

    return outcome(probe) is not None


def _folder(layout: str) -> Callable[[Probe], bool]:
    """Whether a folder is of this layout (`ckptkit.formats.distributed`)."""
    return lambda probe: getattr(probe.file, "layout", None) == layout


def _index(of: str) -> Callable[[Probe], bool]:
    """Whether a file is an index of shards of this container."""
    return lambda probe: index_of(probe) == of


def index_of(probe: Probe) -> str | None:
    """The container of the shards of an index, or of a folder without one; ``None``: it is not an index."""
    layout: str | None = getattr(probe.file, "layout", None)
    if layout is not None:
        return layout if _BY_NAME[layout].shards else None
    text = probe.json_object
    if text is None or b'"weight_map"' not in text:
        return None
    # Metadata, which usually comes before the map, may name files too.
    begin = re.search(rb'"weight_map"\s*:\s*\{', text)
    found = re.compile(rb'\.safetensors"\s*[,}]').search(text, begin.end() if begin else 0)
    return "torch-sharded" if found is None else "safetensors-sharded"


CONTAINERS: tuple[Format, ...] = (
    Format(
        name="torch-zip", title="torch.save since 1.6",
        suffixes=(".pth", ".pt", ".pkl", ".ckpt", ".bin"), claims=_archive("torch-zip"),
        reader="torch_zip", writer="torch_zip_writer", loader="torch.load", maps_location=True,
    ),
    Format(
        name="torch-legacy", title="torch.save before 1.6",
        claims=_legacy, reader="torch_legacy", loader="torch.load", maps_location=True,
    ),
    Format(
        name="torch-tar", title="torch.save of 0.1",
        claims=_tar, reader="torch_tar", loader="torch.load", maps_location=True,
    ),
    Format(
        name="pickle", title="pickle, cloudpickle, dill, joblib",
        claims=_pickle, reader="plain_pickle", loader="pickle.load",
    ),
    Format(
        name="torchscript", title="torch.jit.save, torch.jit.trace, mobile",
        suffixes=(".jit", ".ptl", ".torchscript"), claims=_archive("torchscript"),
        reader="torchscript", is_program=True, loader="torch.jit.load", maps_location=True, has_classes=True,
        words="a TorchScript program{}, its code included: torch.jit.load runs it",
    ),
    Format(
        name="torch-package", title="torch.package", claims=_archive("torch-package"),
        reader="torch_package", is_program=True, loader="torch.package.PackageImporter",
        words="a torch.package archive{}, its code included: torch.package.PackageImporter runs it",
    ),
    Format(
        name="pt2", title="torch.export.save", suffixes=(".pt2",), claims=_archive("pt2"),
        reader="pt2", is_program=True, loader="torch.export.load",
        words="an exported program{}, its graph included: torch.export.load reads it",
    ),
    Format(
        name="safetensors", title="safetensors", suffixes=(".safetensors",), claims=_safetensors,
        reader="safetensors", writer="safetensors_writer", loader="safetensors.torch.load_file",
        has_pickle=False, tensors_alone=True, ties_once=True,
    ),
)  # fmt: skip
"""Every container that is one file, in no order that matters: a file two of them claim is refused."""

FORMATS: tuple[Format, ...] = (
    *CONTAINERS,
    Format(
        name="safetensors-sharded", title="*.safetensors.index.json and its shards",
        claims=_index("safetensors-sharded"), reader="sharded", shards="safetensors",
        has_pickle=False, tensors_alone=True, ties_once=True,
    ),
    Format(
        name="torch-sharded", title="pytorch_model.bin.index.json and its shards",
        claims=_index("torch-sharded"), reader="sharded", shards="torch-zip",
    ),
    Format(
        name="dcp", title="torch.distributed.checkpoint: FSDP2 and others",
        claims=_folder("dcp"), reader="distributed.dcp", writer="distributed.dcp_writer", is_folder=True,
        loader="torch.distributed.checkpoint.load",
    ),
    Format(
        name="fsdp", title="one .pt per rank: FSDP1, DTensor",
        claims=_folder("fsdp"), reader="distributed.fsdp", is_folder=True,
    ),
    Format(
        name="deepspeed", title="DeepSpeed: ZeRO 0 to 3, universal checkpoints",
        claims=_folder("deepspeed"), reader="distributed.deepspeed", is_folder=True,
    ),
    Format(
        name="megatron", title="Megatron's folders; Llama's consolidated.*.pth",
        claims=_folder("megatron"), reader="distributed.megatron", is_folder=True,
    ),
    Format(
        name="safetensors-dcp", title="the hub's sharded safetensors, one file per rank",
        claims=_folder("safetensors-dcp"), reader="distributed.safetensors_dcp", is_folder=True,
        has_pickle=False, tensors_alone=True,
    ),
)  # fmt: skip
"""Every container: these, and the indexes and folders that make one checkpoint of several files."""

_BY_NAME = {container.name: container for container in FORMATS}

SUFFIXES = frozenset(suffix for container in FORMATS for suffix in container.suffixes)
"""Endings of checkpoint files; they never decide what a file is."""

SHARED_SUFFIXES = frozenset((".bin", ".jit", ".pkl"))
"""Those that files of other kinds have as well; by any other a file says that it is a checkpoint."""

INDEX_SUFFIXES = tuple(
    f"{suffix}.index.json" for index in FORMATS if index.shards for suffix in _BY_NAME[index.shards].suffixes
)
"""Endings of an index's name; used to find indexes in folders, never to decide what a file is."""


def format_named(name: str) -> Format:
    """The container with a name (`Origin.format`, `Plan.format`): the place to ask for its facts.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


def index_over(container: Format) -> Format | None:
    """The container that makes one checkpoint of several files of this one; ``None``: none does."""
    return next((each for each in FORMATS if each.shards == container.name), None)


_COMPRESSED = (
    *(b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd"),
    *(bytes((first,)) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)),
)
"""First bytes of what is decompressed: gzip, xz, bzip2, zstd, and zstd's frames that are skipped."""

PACKED = (LOCAL_SIGNATURE, *_COMPRESSED)
"""First bytes of everything that may contain files, except tar archives, which have none."""


def holds_files(probe: Probe) -> bool:
    """Whether a file is compressed, or an archive of other files than torch's records; `ckptkit.formats.inside`."""
    if probe.head.startswith(LOCAL_SIGNATURE):
        from ckptkit.formats.torch_archive import archive_kind

        return bool(probe.records) and archive_kind(probe) is None
    if probe.head.startswith(_COMPRESSED):
        return not _safetensors(probe)
    return _tar(probe)


def identify(probe: Probe, containers: Sequence[Format]) -> Format:
    """The one of the containers that claims the file.

    Raises:
        UnknownFormatError: none does; the message says what the file is instead and what helps.
        AmbiguousError: more than one does: torch looks at the first bytes, unzip at the last ones.
    """
    claims = [container for container in containers if container.claims(probe)]
    if not claims:
        from ckptkit.formats.refused import unknown  # only here, as many patterns take a moment to compile

        raise unknown(probe)
    names = [container.name for container in claims]
    if not probe.head.startswith(LOCAL_SIGNATURE) and not _end_is_left(probe.file, names):
        _require_no_zip_end(probe.file, names, None)
    if len(names) > 1:
        raise AmbiguousError(_AT_ONCE.format(" and ".join(names)))
    return claims[0]


_AT_ONCE = "the file is {} at once; readers would disagree about it"


def _end_is_left(file: Source, names: Sequence[str]) -> bool:
    """Whether the end of a file is checked when its values are read: for a remote one that takes a request."""
    nbytes = min(TAIL_NBYTES, file.size)
    check = partial(_require_no_zip_end, file, names)
    return len(names) == 1 and file.is_far and file.on_read(file.size - nbytes, nbytes, check)


def _require_no_zip_end(file: Source, names: Sequence[str], tail: bytes | None) -> None:
    if ends_like_a_zip(file.whole, tail):
        raise AmbiguousError(_AT_ONCE.format(" and ".join([*names, "a zip archive (by its end)"])), path=file.path)
