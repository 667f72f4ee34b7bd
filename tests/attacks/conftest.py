"""Shared by the attacks: how hostile files are made, and the court they are brought before.

Every test module here holds a table of samples, ``name: (expectation, function)``; the function gets
`Make` and returns the file's bytes.  A sample goes through all `COMMANDS` (one that is to be refused: `REFUSING`), in a process of its own
(`support/warden.py` forks it), where they are large each command in one of its own; what must never happen is asserted for each (`Court.judge`), and
the expectation on top:

- ``HOSTILE``: refused or read, the verdict is ``hostile`` and the exit code is not 0
- ``REFUSED``: an error of ckptkit's own
- ``READ``: legal, if odd: it is read, whatever it asks for
- ``ANSWERED``: either
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import warden

COMMANDS: dict[str, list[str]] = {
    "inspect": ["inspect", "{file}"],
    "json": ["inspect", "--json", "{file}"],
    "flat": ["inspect", "--flat", "--stats", "{file}"],
    "markdown": ["inspect", "--format", "markdown", "{file}"],
    "safetensors": ["convert", "{file}", "out.safetensors", "--weights-only", "--dtype", "bfloat16", "--tied", "duplicate",
                    "--rename", "a=>b", "--exclude", "x", "--max-shard-size", "1GB"],
    "pth": ["convert", "{file}", "out.pth"],
}  # fmt: skip

REFUSING = ["json", "pth"]
"""Those that a sample goes through that is to be refused, but for `Court.judge_refused`: what they differ in comes later."""


class Make:
    """Makes hostile files out of pieces; everything in them is harmless if it runs: it leaves a canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def text(self, text: str) -> bytes:
        """A string on the pickle's stack."""
        raw = text.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw

    def call(self, module: str, name: str, *args: str) -> bytes:
        """A call with strings as arguments, as protocol 2 has it."""
        return f"c{module}\n{name}\n(".encode() + b"".join(map(self.text, args)) + b"tR"

    @property
    def payload(self) -> bytes:
        """The call that is not to happen: it would leave the canary file."""
        return self.call("os", "system", f"touch {self.canary}")

    @property
    def storage(self) -> bytes:
        """A float32 storage of four elements, ``data/0``."""
        return self.storage_id("0", 4)

    def storage_id(self, key: str, numel: int, cls: bytes = b"ctorch\nFloatStorage\n", location: str = "cpu") -> bytes:
        number = b"J" + struct.pack("<i", numel) if abs(numel) < 1 << 31 else self.long(numel)
        return b"(" + self.text("storage") + cls + self.text(key) + self.text(location) + number + b"tQ"

    def long(self, number: int) -> bytes:
        nbytes = number.bit_length() // 8 + 1
        return b"\x8b" + struct.pack("<I", nbytes) + number.to_bytes(nbytes, "little", signed=True)

    def number(self, number: int) -> bytes:
        return b"J" + struct.pack("<i", number) if abs(number) < 1 << 31 else self.long(number)

    def numbers(self, *numbers: int) -> bytes:
        return b"(" + b"".join(map(self.number, numbers)) + b"t"

    def tensor(
        self,
        storage: bytes | None = None,
        offset: int = 0,
        shape: tuple[int, ...] = (4,),
        stride: tuple[int, ...] = (1,),
    ) -> bytes:
        """A tensor; by default the whole of `storage`."""
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage or self.storage) + self.number(offset)
            + self.numbers(*shape) + self.numbers(*stride) + b"\x89ccollections\nOrderedDict\n)RtR"
        )  # fmt: skip

    def state_dict(self, *more: bytes, key: str = "weight") -> bytes:
        """An honest state_dict, and after it more keys and values."""
        return b"\x80\x02}(" + self.text(key) + self.tensor() + b"".join(more) + b"u."

    def beside(self, value: bytes) -> bytes:
        """An honest state_dict, and a value beside it."""
        return b"\x80\x02}(" + self.text("state_dict") + self.state_dict()[2:-1] + self.text("extra") + value + b"u."

    def zip(
        self,
        pickle: bytes,
        records: dict[str, bytes] | None = None,
        *,
        storages: dict[str, bytes] | None = None,
        method: int = zipfile.ZIP_STORED,
        root: str = "archive",
    ) -> bytes:
        """A torch archive around a pickle."""
        storages = {"0": bytes(16)} if storages is None else storages
        return self.archive(
            {
                f"{root}/data.pkl": pickle,
                f"{root}/byteorder": b"little",
                **{f"{root}/data/{key}": data for key, data in storages.items()},
                f"{root}/version": b"3\n",
                **(records or {}),
            },
            method,
        )

    def archive(self, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in records.items():
                archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
        return buffer.getvalue()

    def legacy(
        self, pickle: bytes, *, keys: bytes = b"\x80\x02]X\x01\x00\x00\x000a.", tail: bytes | None = None
    ) -> bytes:
        """A file as torch wrote it before 1.6: three pickles, the object, the keys, the storages."""
        magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
        protocol = b"\x80\x02M\xe9\x03."
        system = (
            b"\x80\x02}(" + self.text("protocol_version") + b"M\xe9\x03" + self.text("little_endian") + b"\x88"
            + self.text("type_sizes") + b"}(" + self.text("short") + b"K\x02" + self.text("int") + b"K\x04"
            + self.text("long") + b"K\x04uu."
        )  # fmt: skip
        tail = struct.pack("<q", 4) + bytes(16) if tail is None else tail
        return magic + protocol + system + pickle.replace(b"tQ", b"NtQ") + keys + tail

    def raw_zip(self, entries: list[dict[str, Any]], *, prefix: bytes = b"", suffix: bytes = b"", **end: int) -> bytes:
        """A zip archive in which any field may lie.

        Args:
            entries: ``name`` and ``data``, and fields to set in the local (``l_``) or central header.
            prefix, suffix: bytes before and after.
            end: fields of the end record.
        """
        body, directory = bytearray(prefix), bytearray()
        for entry in entries:
            name, data = entry["name"].encode(), entry["data"]
            fields = {
                "flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "nbytes": len(data), "name": name,
                "extra": b"", "offset": len(body),
            } | {key: value for key, value in entry.items() if key not in ("name", "data")}  # fmt: skip
            local = {key: fields.get(f"l_{key}", fields[key]) for key in fields if not key.startswith("l_")}
            if not entry.get("unlisted_body"):
                body += struct.pack(
                    "<4sHHHHHIIIHH", b"PK\x03\x04", 20, local["flags"], local["method"], 0, 0, local["crc"],
                    local["packed"], local["nbytes"], len(local["name"]), len(local["extra"]),
                ) + local["name"] + local["extra"] + data  # fmt: skip
            if entry.get("unlisted"):
                continue
            directory += struct.pack(
                "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, fields["flags"], fields["method"], 0, 0, fields["crc"],
                fields["packed"], fields["nbytes"], len(fields["name"]), len(fields["extra"]), 0, 0, 0, 0, fields["offset"],
            ) + fields["name"] + fields["extra"]  # fmt: skip
        count = sum(not entry.get("unlisted") for entry in entries)
        facts = {"count": count, "on_disk": count, "nbytes": len(directory), "offset": len(body)} | end
        return bytes(body) + bytes(directory) + struct.pack(
            "<4sHHHHIIH", b"PK\x05\x06", 0, 0, facts["on_disk"], facts["count"], facts["nbytes"], facts["offset"], 0
        ) + suffix  # fmt: skip

    def entries(self, pickle: bytes | None = None) -> list[dict[str, Any]]:
        """Those of an honest torch archive, for `raw_zip`."""
        return [
            {"name": "archive/data.pkl", "data": self.state_dict() if pickle is None else pickle},
            {"name": "archive/byteorder", "data": b"little"},
            {"name": "archive/data/0", "data": bytes(16)},
            {"name": "archive/version", "data": b"3\n"},
        ]

    def safetensors(self, header: object, data: bytes = b"", *, nbytes: int | None = None) -> bytes:
        """A safetensors file; the header may be anything."""
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(raw) if nbytes is None else nbytes) + raw + data


HOSTILE, REFUSED, READ, ANSWERED = "hostile", "refused", "read", "answered"

Samples = dict[str, tuple[str, Callable[[Make], bytes]]]


class Warden:
    """The process that runs the commands, asked for one job after another; a payload would leave its ``canary``."""

    def __init__(self, root: Path) -> None:
        self.canary, modules = root / "canary", root / "modules"
        modules.mkdir()
        (modules / "canary_module.py").write_text(f"open({str(self.canary)!r}, 'w')\nclass Net: pass\n")
        script = Path(warden.__file__)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(script.parents[2]), str(modules)))}
        argv = [sys.executable, "-X", "utf8", str(script)]
        self._process = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, folder: Path, commands: list[tuple[list[str], Path]], **bounds: int) -> list[dict[str, Any]]:
        """What became of commands, arguments and the file for what they print, that one process runs in turn."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = [{"argv": argv, "output": str(output)} for argv, output in commands]
        job = {"cwd": str(folder), "commands": asked, **bounds}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())  # type: ignore[no-any-return]

    def dismiss(self) -> None:
        """End it, once all is done."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


class Court:
    """What becomes of each sample under each command; every sample is made and run when it is asked for."""

    def __init__(
        self, held: Warden, samples: Samples, commands: list[str], bounds: dict[str, int], apart: bool, root: Path
    ) -> None:
        self._samples = samples
        self._commands = commands
        self._bounds = {"memory": warden.MEMORY, "seconds": warden.SECONDS} | bounds
        self._apart = apart
        self._folder = root / "samples"
        self._results: dict[str, dict[str, dict[str, Any]]] = {}
        self._refusing = [command for command in commands if command in REFUSING]
        self._warden = held

    def results(self, name: str) -> dict[str, dict[str, Any]]:
        """What became of a sample, by command."""
        if name not in self._results:
            folder = self._folder / name
            folder.mkdir(parents=True)
            (folder / "file.pth").write_bytes(self._samples[name][1](Make(self._warden.canary)))
            commands = self._refusing if self._samples[name][0] == REFUSED else self._commands
            outputs = {command: self._folder.parent / f"output{len(self._results)}.{command}" for command in commands}
            found = {}
            for together in [[command] for command in outputs] if self._apart else [list(outputs)]:
                jobs = [([word.format(file="file.pth") for word in COMMANDS[each]], outputs[each]) for each in together]
                for command, result in zip(together, self._warden.run(folder, jobs, **self._bounds), strict=True):
                    found[command] = {**result, "output": outputs[command]}
            self._results[name] = found
        return self._results[name]

    def judge(self, name: str) -> None:
        """Assert what holds for every hostile file, and what is expected of this one."""
        expectation = self._samples[name][0]
        results = self.results(name)
        for command, result in results.items():
            told = f"{name}, {command}: {result['stderr'][-600:]}"
            assert result["signal"] is None, f"killed by signal {result['signal']}: {told}"
            assert result["code"] in (0, 1, 2), told
            assert "Traceback" not in result["stderr"], told
            assert "internal error" not in result["stderr"], told
            assert result["events"] == [], told
            assert result["peak"] < self._bounds["memory"], told
            assert len(result["stderr"]) < 10_000, told
        assert not self._warden.canary.exists(), f"{name}: its payload ran"
        left = {path.name for path in (self._folder / name).iterdir()} - {"file.pth", "out.safetensors", "out.pth"}
        assert not left, f"{name}: half-written files are left"
        for command in {"safetensors", "pth"} & set(results):
            written = (self._folder / name / f"out.{command}").exists()
            assert written == (results[command]["code"] == 0), f"{name}: half written by {command}"
        self._meets(name, expectation)

    def judge_refused(self) -> None:
        """What is to be refused, under every command."""
        self._refusing, self._folder, self._results = self._commands, self._folder.parent / "refused", {}
        refused = [name for name, (expectation, _) in self._samples.items() if expectation == REFUSED]
        assert refused
        for name in refused:
            self.judge(name)

    def document(self, name: str) -> dict[str, Any]:
        """The JSON document of a sample."""
        (document,) = json.loads(self.output(name, "json"))["files"]
        return document  # type: ignore[no-any-return]

    def output(self, name: str, command: str) -> str:
        """What a command printed of a sample."""
        return Path(self.results(name)[command]["output"]).read_text(errors="replace")

    def verdict(self, name: str) -> tuple[str | None, bool, bool]:
        """Trust, whether there is an error, whether a name is dangerous; from the text, which may be 100 MB long."""
        text = self.output(name, "json")
        trust = re.compile(r'"trust": (?:null|"(\w+)"), "globals": ').search(text, max(text.rfind('"trust": '), 0))
        assert trust is not None, f"{name}: no verdict in {text[-300:]}"
        return trust[1], not text.endswith('"error": null}]}\n'), '"verdict": "dangerous"' in text

    def _meets(self, name: str, expectation: str) -> None:
        (trust, is_error, is_dangerous), result = self.verdict(name), self.results(name)["json"]
        assert (result["code"] == 2) == is_error
        if expectation == HOSTILE:
            assert trust == "hostile", f"{name}: {trust}, {result['stderr']}"
            assert result["code"] != 0
        elif expectation == REFUSED:
            assert is_error, f"{name} was read"
        elif expectation == READ:
            assert not is_error, f"{name}: {result['stderr']}"
        # Where something dangerous was put in, no answer is without the word.
        assert trust == "hostile" or not is_dangerous


@pytest.fixture(scope="session")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warden]:
    """The warden of all courts."""
    held = Warden(tmp_path_factory.mktemp("warden"))
    yield held
    held.dismiss()


@pytest.fixture(scope="module")
def court(request: pytest.FixtureRequest, held: Warden, tmp_path_factory: pytest.TempPathFactory) -> Court:
    """For the samples of the module's table ``SAMPLES``, under the commands ``ASKED`` for (default: all).

    Where there is an ``ASKED``, each of them has a process of its own; ``BOUNDS`` are those of `warden` but for small
    samples.
    """
    return Court(
        held,
        request.module.SAMPLES,
        getattr(request.module, "ASKED", list(COMMANDS)),
        getattr(request.module, "BOUNDS", {}),
        hasattr(request.module, "ASKED"),
        tmp_path_factory.mktemp("attacks"),
    )


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """For tests that make their own files."""
    return Make(tmp_path / "canary")
