"""Archives and files of which two readers could see two different contents, or that lead elsewhere."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from typing import Any

import pytest

HOSTILE, REFUSED, READ, ANSWERED = "hostile", "refused", "read", "answered"


def changed(m: Any, number: int, **fields: Any) -> bytes:
    """An honest archive but for fields of one entry."""
    entries = m.entries()
    entries[number].update(fields)
    return m.raw_zip(entries)  # type: ignore[no-any-return]


def evil(m: Any) -> bytes:
    return m.beside(m.payload)  # type: ignore[no-any-return]


def tar(members: dict[str, bytes], kinds: dict[str, Any] | None = None, twice: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in [*members.items(), *([("pickle", twice)] if twice is not None else [])]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (kinds or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return buffer.getvalue()


def torch_tar(m: Any, pickle: bytes | None = None, **more: bytes) -> dict[str, bytes]:
    sys_info = (
        b"\x80\x02}(" + m.text("protocol_version") + b"M\xe8\x03" + m.text("little_endian") + b"\x88"
        + m.text("type_sizes") + b"}(" + m.text("short") + b"K\x02" + m.text("int") + b"K\x04" + m.text("long") + b"K\x04uu."
    )  # fmt: skip
    return {
        "sys_info": sys_info,
        "pickle": b"\x80\x02}." if pickle is None else pickle,
        "tensors": b"\x80\x02K\x00.",
        "storages": b"\x80\x02K\x00.",
        **more,
    }


SAMPLES: Any = {
    "honest": (READ, lambda m: m.raw_zip(m.entries())),
    # Which records are there.
    "a record twice, the second evil": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "archive/data.pkl", "data": evil(m)}])),
    "a record twice, the first evil": (HOSTILE, lambda m: m.raw_zip([{"name": "archive/data.pkl", "data": evil(m)}, *m.entries()])),
    "records differ only in case": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "archive/DATA.PKL", "data": evil(m)}])),
    "records differ only in case, in Unicode": (
        HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "archive/stra\u00dfe", "data": b"", "flags": 0x800}, {"name": "archive/STRASSE", "data": b""}])
    ),
    "a first record that is not listed": (HOSTILE, lambda m: m.raw_zip([{"name": "archive/data.pkl", "data": evil(m), "unlisted": True}, *m.entries()])),
    "two archives end to end": (HOSTILE, lambda m: m.raw_zip(m.entries(evil(m))) + m.raw_zip(m.entries())),
    "two archives end to end, offsets that fit both": (
        HOSTILE, lambda m: (lambda first: first + m.raw_zip(m.entries(), prefix=b"")[0:0] + m.raw_zip([{**e} for e in m.entries()]))(m.raw_zip(m.entries(evil(m))))
    ),
    "an archive behind other bytes": (ANSWERED, lambda m: b"#!/bin/sh\n" + m.raw_zip(m.entries(evil(m)))),
    "an archive behind an archive's first bytes": (HOSTILE, lambda m: b"PK\x03\x04" + bytes(26) + m.raw_zip(m.entries(evil(m)))),
    "bytes after the end": (REFUSED, lambda m: m.raw_zip(m.entries()) + b"more"),
    "another end record in the comment": (ANSWERED, lambda m: m.raw_zip(m.entries()) + b"PK\x05\x06" + bytes(18)),
    "two roots": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "other/data.pkl", "data": evil(m)}])),
    "a root inside a root": (ANSWERED, lambda m: m.raw_zip([*m.entries(), {"name": "archive/archive/data.pkl", "data": b"\x80\x02N."}])),
    "more records than the end record counts": (REFUSED, lambda m: m.raw_zip(m.entries(), count=3, on_disk=3)),
    "fewer records than the end record counts": (REFUSED, lambda m: m.raw_zip(m.entries(), count=5, on_disk=5)),
    "multi-volume": (REFUSED, lambda m: m.raw_zip(m.entries(), on_disk=2)),
    "a directory that lies elsewhere": (REFUSED, lambda m: m.raw_zip(m.entries(), offset=0)),
    "a directory of four gigabytes": (REFUSED, lambda m: m.raw_zip(m.entries(), nbytes=0xFFFFFFF0)),
    "a directory that holds more": (REFUSED, lambda m: (lambda z: z[:-22].replace(b"PK\x01\x02", b"PK\x01\x02", 1) + z[-22:-10] + struct.pack("<I", struct.unpack("<I", z[-10:-6])[0]) + z[-6:])(m.raw_zip(m.entries(), count=2, on_disk=2))),
    # Headers that contradict each other.
    "another name in the local header": (HOSTILE, lambda m: changed(m, 0, l_name=b"archive/evil.pkl")),
    "another name of another length": (HOSTILE, lambda m: changed(m, 0, l_name=b"archive/e.pkl")),
    "another size in the local header": (HOSTILE, lambda m: changed(m, 0, l_nbytes=3)),
    "another packed size in the local header": (HOSTILE, lambda m: changed(m, 0, l_packed=3)),
    "another checksum in the local header": (HOSTILE, lambda m: changed(m, 0, l_crc=3)),
    "another method in the local header": (HOSTILE, lambda m: changed(m, 0, l_method=8)),
    "other flags in the local header": (HOSTILE, lambda m: changed(m, 0, l_flags=1)),
    "a stored record of two sizes": (REFUSED, lambda m: changed(m, 0, nbytes=3)),
    "an unknown method": (REFUSED, lambda m: changed(m, 0, method=12)),
    "encrypted": (REFUSED, lambda m: changed(m, 0, flags=1)),
    "strongly encrypted": (REFUSED, lambda m: changed(m, 0, flags=0x40)),
    "patched data": (REFUSED, lambda m: changed(m, 0, flags=0x20)),
    "masked headers": (REFUSED, lambda m: changed(m, 0, flags=0x2000)),
    "a wrong checksum": (REFUSED, lambda m: changed(m, 0, crc=7)),
    "a record that reaches into the directory": (REFUSED, lambda m: changed(m, 3, packed=200, nbytes=200)),
    "a record outside the file": (REFUSED, lambda m: changed(m, 3, offset=1 << 31)),
    "records that overlap": (HOSTILE, lambda m: (lambda e: m.raw_zip([e[0], e[1], e[2], {**e[3], "packed": 2, "nbytes": 2}, {"name": "archive/x", "data": b"", "offset": 0, "packed": 10}]))(m.entries())),
    "one record's data inside another's": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "archive/data.pkl2", "data": b"", "offset": 0, "unlisted_body": True}])),
    "a second name in the extra field": (HOSTILE, lambda m: changed(m, 0, extra=struct.pack("<HHBI", 0x7075, 9, 1, 0) + b"evil")),
    "a zip64 field that is missing": (REFUSED, lambda m: changed(m, 0, packed=0xFFFFFFFF, nbytes=0xFFFFFFFF)),
    "a zip64 field that is short": (REFUSED, lambda m: changed(m, 0, packed=0xFFFFFFFF, nbytes=0xFFFFFFFF, extra=struct.pack("<HHQ", 1, 8, 5))),
    "exabytes in a zip64 field": (REFUSED, lambda m: changed(m, 0, packed=0xFFFFFFFF, nbytes=0xFFFFFFFF, extra=struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62))),
    # Names.
    "a name that leaves the folder": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "archive/../../evil", "data": b""}])),
    "an absolute name": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "/etc/passwd", "data": b""}])),
    "a name with a backslash": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "archive\\data.pkl", "data": b""}])),
    "a name with a NUL": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "archive/data.pkl\0.txt", "data": b""}])),
    "an empty name": (HOSTILE, lambda m: m.raw_zip([*m.entries(), {"name": "", "data": b""}])),
    "a name of 60,000 bytes": (REFUSED, lambda m: m.raw_zip([*m.entries(), {"name": "archive/" + "n" * 60_000, "data": b""}])),
    "a name that is not UTF-8": (REFUSED, lambda m: m.raw_zip([*m.entries(), {"name": "a", "data": b"", "l_name": b"\xff\xfe", "flags": 0x800}])),
    "a storage key that leads elsewhere": (
        REFUSED, lambda m: m.zip(m.state_dict().replace(m.storage_id("0", 4), m.storage_id("../data.pkl", 4)))
    ),
    "a storage key of a directory": (REFUSED, lambda m: m.zip(m.state_dict().replace(m.storage_id("0", 4), m.storage_id("", 4)))),
    "control characters in names": (READ, lambda m: m.zip(m.state_dict(key="\x1b[31mred\x1b]0;title\x07\r\n\u202egnp.exe"))),
    # One file, two formats.
    "safetensors and zip": (HOSTILE, lambda m: m.raw_zip(m.entries(evil(m)), prefix=m.safetensors({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}))),
    "legacy and zip": (HOSTILE, lambda m: m.raw_zip(m.entries(evil(m)), prefix=m.legacy(m.state_dict()))),
    "legacy, and a zip with offsets of its own": (HOSTILE, lambda m: m.legacy(m.state_dict()) + m.raw_zip(m.entries(evil(m)))),
    "tar and zip": (HOSTILE, lambda m: m.raw_zip(m.entries(evil(m)), prefix=tar(torch_tar(m)))),
    "text and zip": (ANSWERED, lambda m: m.raw_zip(m.entries(evil(m)), prefix=b"GIF89a")),
    "JSON index and zip": (HOSTILE, lambda m: m.raw_zip(m.entries(evil(m)), prefix=json.dumps({"weight_map": {}}).encode())),
    "torch-zip and TorchScript": (ANSWERED, lambda m: m.raw_zip([*m.entries(), {"name": "archive/constants.pkl", "data": b"\x80\x02)."}])),
    "torch-zip and torch.package": (ANSWERED, lambda m: m.raw_zip([*m.entries(), {"name": "archive/.data/extern_modules", "data": b""}])),
    "torch-zip and pt2": (ANSWERED, lambda m: m.raw_zip([*m.entries(), {"name": "archive/archive_format", "data": b"pt2"}])),
    # Tar.
    "tar: a payload": (HOSTILE, lambda m: tar(torch_tar(m, b"\x80\x02" + m.payload + b"."))),
    "tar: a payload in sys_info": (HOSTILE, lambda m: tar(torch_tar(m, sys_info=b"\x80\x02" + m.payload + b"."))),
    "tar: a payload in storages": (HOSTILE, lambda m: tar(torch_tar(m, storages=b"\x80\x02" + m.payload + b"."))),
    "tar: a payload in tensors": (HOSTILE, lambda m: tar(torch_tar(m, tensors=b"\x80\x02" + m.payload + b"."))),
    "tar: a member twice": (HOSTILE, lambda m: tar(torch_tar(m), twice=b"\x80\x02" + m.payload + b".")),
    "tar: a symbolic link": (ANSWERED, lambda m: tar(torch_tar(m), {"link": tarfile.SYMTYPE})),
    "tar: a symbolic link for a member": (REFUSED, lambda m: tar({k: v for k, v in torch_tar(m).items() if k != "pickle"}, {"pickle": tarfile.SYMTYPE})),
    "tar: a device": (ANSWERED, lambda m: tar(torch_tar(m), {"dev": tarfile.CHRTYPE})),
    "tar: an absolute path": (ANSWERED, lambda m: tar(torch_tar(m) | {"/etc/passwd": b""})),
    "tar: a size of 8 GB": (REFUSED, lambda m: tar(torch_tar(m)).replace(b"00000000000", b"77777777777", 1)),
    # Sizes in the legacy format.
    "legacy: a storage of exabytes": (REFUSED, lambda m: m.legacy(m.state_dict(), tail=struct.pack("<q", 1 << 60))),
    "legacy: a storage of a negative size": (REFUSED, lambda m: m.legacy(m.state_dict(), tail=struct.pack("<q", -1) + bytes(16))),
    "legacy: another size than the pickle says": (REFUSED, lambda m: m.legacy(m.state_dict(), tail=struct.pack("<q", 3) + bytes(12))),
    "legacy: a key twice": (REFUSED, lambda m: m.legacy(m.state_dict(), keys=b"\x80\x02](X\x01\x00\x00\x000X\x01\x00\x00\x000e.", tail=(struct.pack("<q", 4) + bytes(16)) * 2)),
    "legacy: a key nobody named": (ANSWERED, lambda m: m.legacy(m.state_dict(), keys=b"\x80\x02](X\x01\x00\x00\x000X\x01\x00\x00\x001e.", tail=(struct.pack("<q", 4) + bytes(16)) * 2)),
    "legacy: bytes after the last storage": (ANSWERED, lambda m: m.legacy(m.state_dict()) + bytes(64)),
    "legacy: no keys": (REFUSED, lambda m: m.legacy(m.state_dict(), keys=b"\x80\x02].", tail=b"")),
    "legacy: keys that are no list": (REFUSED, lambda m: m.legacy(m.state_dict(), keys=b"\x80\x02K\x01.")),
    # Deflate.
    "deflated pickle": (READ, lambda m: m.zip(m.state_dict(), method=zipfile.ZIP_DEFLATED)),
    "deflated to more than is declared": (REFUSED, lambda m: (lambda z: z.replace(struct.pack("<I", len(m.state_dict())), struct.pack("<I", 9)))(m.zip(m.state_dict(), method=zipfile.ZIP_DEFLATED))),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_container(name: str, court: Any) -> None:
    court.judge(name)


@pytest.mark.thorough
def test_every_command_refuses(court: Any) -> None:
    court.judge_refused()


def test_control_characters_of_a_file_do_not_reach_the_terminal(court: Any) -> None:
    for command in ("inspect", "flat", "markdown"):
        shown = court.output("control characters in names", command)
        assert "gnp.exe" in shown
        assert not set(shown) & set("\x1b\x07\r\u202e")
