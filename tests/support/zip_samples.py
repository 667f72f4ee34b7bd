"""ZIP archives for tests: whole ones, and with one thing in them that readers disagree about."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from ckptkit.formats.zip_archive import Record, read_record

RECORDS = {"root/a": b"first", "root/data/0": bytes(range(256)), "root/empty": b"", "root/é": "é".encode()}

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def archive(
    records: dict[str, bytes] = RECORDS, *, compression: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        for name, data in records.items():
            out.writestr(zipfile.ZipInfo(name), data, compression)
        out.comment = comment
    return buffer.getvalue()


def content(records: dict[str, Record]) -> dict[str, bytes]:
    return {name: read_record(record, 1 << 20) for name, record in records.items()}


def patched(data: bytes, signature: bytes, offset: int, format_: str, *values: int, nth: int = 0) -> bytes:
    """The archive with a field of its nth header of that signature changed."""
    at = -1
    for _ in range(nth + 1):
        at = data.index(signature, at + 1)
    out = bytearray(data)
    struct.pack_into(format_, out, at + offset, *values)
    return bytes(out)


def both(data: bytes, local: int, central: int, format_: str, *values: int) -> bytes:
    return patched(patched(data, LOCAL, local, format_, *values), CENTRAL, central, format_, *values)


def renamed(*names: bytes) -> bytes:
    """An archive whose records are named by bytes no writer would take."""
    data = archive({f"root/{n}".ljust(len(name), "x"): b"1" for n, name in enumerate(names)})
    for n, name in enumerate(names):
        data = data.replace(f"root/{n}".ljust(len(name), "x").encode(), name)
    return data


def with_second_name() -> bytes:
    info = zipfile.ZipInfo("root/a")
    info.extra = struct.pack("<HHBI", 0x7075, 11, 1, zlib.crc32(b"root/a")) + b"root/b"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr(info, b"x")
    return buffer.getvalue()


def hidden_first_record() -> bytes:
    hidden, shown = archive({"root/hidden": b"1"}), archive({"root/shown": b"2"})
    start = hidden[: hidden.index(CENTRAL)]
    at = shown.index(CENTRAL)
    moved = patched(start + shown, CENTRAL, 42, "<I", len(start))
    return patched(moved, END, 16, "<I", len(start) + at)


def with_gap(gap: bytes, *, behind: int = 0) -> bytes:
    """Two records (or one) with bytes put in behind the first one's data."""
    data = archive({"root/a": b"first", "root/b": b"second"} if not behind else {"root/a": b"first"})
    at = data.index(b"first") + 5
    data = data[:at] + gap + data[at:]
    if not behind:
        data = patched(data, CENTRAL, 42, "<I", at + len(gap), nth=1)
    return patched(data, END, 16, "<I", data.index(CENTRAL))


def hidden_record_between() -> bytes:
    hidden = archive({"root/hidden": b"1"})
    return with_gap(hidden[: hidden.index(CENTRAL)])


def hidden_record_behind() -> bytes:
    hidden = archive({"root/hidden": b"1"})
    return with_gap(hidden[: hidden.index(CENTRAL)], behind=1)


def with_descriptor(
    signature: bytes, layout: str, crc: int | None, packed: int, nbytes: int, *, flag: int = 8
) -> bytes:
    """A record with a data descriptor behind it."""
    crc = zlib.crc32(b"first") if crc is None else crc
    return both(with_gap(signature + struct.pack(layout, crc, packed, nbytes)), 6, 8, "<H", flag)


def with_local_second_name() -> bytes:
    """The second name stands in the record's own header alone."""
    data = with_second_name()
    at = data.index(CENTRAL)
    return data[:at] + data[at:].replace(struct.pack("<H", 0x7075), struct.pack("<H", 0x7076))


def zip64_end(data: bytes, **changes: int) -> bytes:
    """The archive with a zip64 end record and its locator put in."""
    at = data.index(END)
    _, _, _, _, count, nbytes, offset, _ = struct.unpack("<4sHHHHIIH", data[at:])
    fields = {
        "size": 44,
        "count": count,
        "nbytes": nbytes,
        "offset": offset,
        "at": at,
        "signature": 0x06064B50,
        "disk": 0,
        "start_disk": 0,
        "end_disk": 0,
        "disks": 1,
    } | changes
    record = struct.pack("<IQHHIIQQQQ", fields["signature"], fields["size"], 45, 45, fields["disk"],
                         fields["start_disk"], fields["count"], fields["count"], fields["nbytes"],
                         fields["offset"])  # fmt: skip
    locator = struct.pack("<4sIQI", b"PK\x06\x07", fields["end_disk"], fields["at"], fields["disks"])
    return data[:at] + record + locator + data[at:]
