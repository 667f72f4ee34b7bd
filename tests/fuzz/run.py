"""Coverage-guided fuzzing of every reader, with atheris (libFuzzer); apart from the test run.

    pip install atheris
    python tests/fuzz/seeds.py build/fuzz                      (once; needs torch)
    python tests/fuzz/run.py TARGET build/fuzz --seconds 900

A find is any exception but ckptkit's own, more than 10 seconds, or more than 1 GiB.  libFuzzer writes
it to FOLDER/finds and stops; once understood it becomes a test in ``tests/attacks``.

What is done with every file is what ``ckptkit inspect --json`` and a planned conversion do: read,
describe, print, plan.  torch is never imported here.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ckptkit"]):
    from ckptkit import formats, inspection
    from ckptkit.bytesource import ByteRange, SourceFile
    from ckptkit.cli import inspect_text, markdown
    from ckptkit.cli.options import View
    from ckptkit.errors import CkptkitError
    from ckptkit.limits import DEFAULT_LIMITS
    from ckptkit.pickling.reader import read_pickle
    from ckptkit.pickling.tensors import StorageTable
    from ckptkit.pickling.writer import write_pickle

PEAK_MIB, SECONDS = 1024, 10
"""What no file may take."""

MEMORY = os.memfd_create("fuzzed")
FILE = f"/proc/self/fd/{MEMORY}"


def written(data: bytes) -> str:
    """The path of a file that holds ``data``."""
    os.ftruncate(MEMORY, 0)
    os.pwrite(MEMORY, data, 0)
    return FILE


def use(path: str) -> None:
    """Inspect a file in every form, and plan its conversion to every container."""
    checkpoint, file = formats.read(path)
    try:
        document = inspection.survey(checkpoint)
        json.loads("".join(inspection.json_chunks(document)), parse_constant=_no_number)
        for lines in (
            inspect_text.text(document, View(width=80, sort="name")),
            inspect_text.flat(document, View()),
            markdown.inspect(document, View()),
        ):
            for _ in lines:
                pass
        for container in formats.FORMATS:
            if container.writer is not None:
                try:
                    container.write(checkpoint)
                except CkptkitError:
                    continue
    finally:
        file.close()


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def whole_file(data: bytes) -> None:
    """The container as it stands."""
    use(written(data))


def bare_pickle(data: bytes) -> None:
    """The pickle interpreter, its storages, and the writer of what it read."""
    with closing(SourceFile(written(data))) as file:
        table = StorageTable(lambda key, nbytes: (ByteRange(file, 0, 0), None), limits=DEFAULT_LIMITS)
        result = read_pickle(data, persistent_load=table.persistent_load, constructors=table.constructors)
        write_pickle(result.root, lower=lambda node: "leaf")


def pickle_in_zip(data: bytes) -> None:
    """A pickle in a sound archive that has eight storages of eight bytes."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key in range(8):
            archive.writestr(f"archive/data/{key}", bytes(8))
    use(written(output.getvalue()))


def index(data: bytes) -> None:
    """An index beside two shards."""
    path = INDEXES / "model.safetensors.index.json"
    path.write_bytes(data)
    use(str(path))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "pickle": bare_pickle,
    "torch-zip": whole_file,
    "torch-zip-pickle": pickle_in_zip,
    "torch-legacy": whole_file,
    "plain-pickle": whole_file,
    "torch-tar": whole_file,
    "torchscript": whole_file,
    "torch-package": whole_file,
    "pt2": whole_file,
    "safetensors": whole_file,
    "sharded": index,
    "first-bytes": whole_file,
}
"""Every target: what is done with the bytes the fuzzer makes."""

INDEXES = Path("/dev/shm") / f"ckptkit-fuzz-{os.getpid()}"


def _shards() -> None:
    INDEXES.mkdir()
    for name, tensor in (("one", "a"), ("two", "b")):
        header = json.dumps({tensor: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        (INDEXES / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def main(arguments: list[str]) -> None:
    """Run one target until the time is over or something is found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("folder", type=Path, help="where the seeds are, and what is found goes")
    parser.add_argument("--seconds", type=int, default=900, help="how long (default: 900)")
    options = parser.parse_args(arguments)
    target = TARGETS[options.target]
    _shards()
    (options.folder / "finds").mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        try:
            target(data)
        except CkptkitError as error:
            str(error)

    atheris.Setup(
        [
            sys.argv[0],
            str(options.folder / options.target),
            f"-artifact_prefix={options.folder}/finds/{options.target}-",
            f"-max_total_time={options.seconds}",
            f"-timeout={SECONDS}",
            f"-rss_limit_mb={PEAK_MIB}",
            "-max_len=65536",
            "-print_final_stats=1",
        ],
        one,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
