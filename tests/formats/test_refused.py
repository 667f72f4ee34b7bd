"""What is said of files that are not checkpoints: what each is, and what to do about it."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from ckptkit import formats
from ckptkit.errors import CkptkitError, FileAccessError, FormatError, UnknownFormatError


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def numpy_file(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, numpy.arange(3))
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        member = tarfile.TarInfo("readme")
        member.size = 2
        out.addfile(member, io.BytesIO(b"hi"))
    return buffer.getvalue()


def proto(*fields: tuple[int, int | bytes]) -> bytes:
    """A protobuf message (short fields only)."""
    return b"".join(
        bytes([number << 3, value]) if isinstance(value, int) else bytes([number << 3 | 2, len(value)]) + value
        for number, value in fields
    )


def pickled(module: str, name: str, *, protocol: int = 4) -> bytes:
    """A pickle of an object of a class that is not installed."""
    if protocol == 0:
        return f"ccopy_reg\n_reconstructor\n(c{module}\n{name}\nc__builtin__\nobject\nNtR.".encode()
    parts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() + b"\x94" for text in (module, name))
    return b"\x80\x04" + parts + b"\x93\x94)\x81\x94."


WEIGHTS = {"w": torch.ones(2)}
DIGEST = hashlib.sha256(b"").hexdigest()
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{DIGEST}\nsize 102530333\n".encode()
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in &middot; Example</title></head>"
DENIED = (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message>'
          b"<RequestId>1</RequestId></Error>")  # fmt: skip
JOBLIB = (
    b"\x80\x03cjoblib.numpy_pickle\nNumpyArrayWrapper\nq\x00)\x81q\x01}q\x02X\x05\x00\x00\x00dtypeq\x03sb\x93\xfa\xfb"
)


def leb128(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + leb128(value >> 7)) if value > 0x7F else bytes([value])


def torchsharp(state: dict[str, torch.Tensor]) -> bytes:
    """As TorchSharp's ``exportsd.save_state_dict`` writes it."""
    kinds = {torch.float32: 6, torch.float64: 7, torch.int64: 4, torch.float16: 5}
    parts = [leb128(len(state))]
    for name, tensor in state.items():
        parts += [leb128(len(name)), name.encode(), leb128(kinds[tensor.dtype]), leb128(tensor.dim())]
        parts += [*map(leb128, tensor.shape), tensor.numpy().tobytes()]
    return b"".join(parts)


def ctranslate(spec: str, version: int = 6) -> bytes:
    """The first fields of CTranslate2's ``model.bin``."""
    text = spec.encode() + b"\0"
    return struct.pack("<IH", version, len(text)) + text + struct.pack("<II", 7, 1000) + bytes(40)


def torch7(*numbers_and_text: int | bytes, lines: bool = False) -> bytes:
    """What Torch7 writes in Lua: numbers, and text with its length."""
    if lines:
        return b"".join(b"%d\n" % n if isinstance(n, int) else b"%d\n%s\n" % (len(n), n) for n in numbers_and_text)
    return b"".join(
        struct.pack("<i", n) if isinstance(n, int) else struct.pack("<i", len(n)) + n for n in numbers_and_text
    )


NO_CHECKPOINTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty .0 bytes.: an interrupted download"),
    "zeros": (bytes(1_000_000), "1,000,000 bytes of zeros: space for the file was reserved but"),
    "zeros first": (bytes(1_000_000) + b"x", "it begins with zeros up to about byte 983,040"),
    "git-lfs pointer": (POINTER, rf"git-lfs pointer, not the file of 102,530,333 bytes .sha256 {DIGEST}. it stands for"
                                 "; run: git lfs pull"),
    "odd pointer": (b"version https://git-lfs.github.com/spec/v1\nsize x\n", "not the file it stands for"),
    "html": (b"<!DOCTYPE html>\n<html>", "an HTML page, not a checkpoint: the download got an error or login page"),
    "html with a title": (PAGE, "an HTML page, not a checkpoint .its title: 'Sign in · Example'."),
    "html of an error": (b"<html><title>404 Not Found</title>", "there is no file at that address"),
    "html in capitals": (b"\n\n  <HTML><head>", "an HTML page, not a checkpoint"),
    "html with spaces": (b"<!doctype  HTML PUBLIC>", "an HTML page, not a checkpoint"),
    "access denied": (DENIED, "message from a storage server .* .AccessDenied: 'Access Denied'.; you have no access"),
    "no such key": (DENIED.replace(b"AccessDenied", b"NoSuchKey"), "NoSuchKey.*there is no file at that address"),
    "xml": (b"<?xml version='1.0'?><svg/>", "an XML document, not a checkpoint"),
    "an error in json": (b'{"error":"Repository not found"}', "'Repository not found'.: there is no file at that addr"),
    "a login in json": (b'{"error":"Invalid credentials in Authorization header"}', "log in or give a token"),
    "404": (b"404: Not Found", "an error message instead of the file .'404: Not Found'.: there is no file"),
    "hf, no entry": (b"Entry not found", "'Entry not found'.: there is no file at that address"),
    "hf, no login": (b"Invalid username or password.", "'Invalid username or password.'.: the server requires"),
    "hf, gated": (b"Access to model x is restricted. You must be authenticated to access it.", "you have no access"
                  "|the server requires authentication"),
    "gzip": (gzip.compress(b"hello, world"), "decompressed: a text file, not a checkpoint"),
    "xz": (lzma.compress(PAGE), "decompressed: an HTML page, not a checkpoint .its title: 'Sign in"),
    "lzma": (lzma.compress(saved(WEIGHTS), lzma.FORMAT_ALONE), "lzma-compressed"),
    "bzip2": (bz2.compress(pickle.dumps({"a": 1}, 4)), "decompressed: a Python pickle of a dict of 1"),
    "gzip in gzip": (gzip.compress(gzip.compress(b"")), "decompressed: decompressed: the file is empty"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(20), "lz4-compressed; decompress it first .unlz4."),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(20), "7z archive; unpack it first"),
    "rar": (b"Rar!\x1a\x07\x01\x00", "RAR archive; unpack it first"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "an empty zip archive"),
    "the end of a zip": (saved(WEIGHTS)[100:], "the end of a zip archive: its first 100 bytes are missing"),
    "before a zip": (b"\x01HTTP" + saved(WEIGHTS), "a zip archive with 5 bytes of something else before it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file .Keras weights, .h5."),
    "onnx": (proto((1, 8), (2, b"pytorch"), (3, b"2.4.0")), "an ONNX model .IR version 8, by pytorch."),
    "onnx without a producer": (proto((1, 7), (7, b"\n\x03abc"), (8, b"")), "an ONNX model .IR version 7."),
    "saved model": (proto((1, 1), (2, proto((1, b"\x12\x00")))), "a TensorFlow SavedModel"),
    "frozen graph": (proto((1, proto((1, b"input"), (2, b"Placeholder")))), "a frozen TensorFlow graph"),
    "core ml": (proto((1, 4), (2, proto((1, b"\n\x05image")))), "a Core ML model .specification version 4."),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(20), "a TensorFlow Lite model"),
    "executorch": (b"\x1c\0\0\0ET12" + bytes(20), "an ExecuTorch program .*convert the checkpoint it was exp"),
    "gguf": (b"GGUF" + struct.pack("<I", 3), "a GGUF file, version 3 .llama.cpp., which ckptkit does not read"),
    "ggml": (struct.pack("<I", 0x67676A74), "a GGML file"),
    "lua": (torch7(4, 1, b"V 1", b"nn.Sequential", 3, 2), "Torch7 for Lua .* with a nn.Sequential, .*torchfile"),
    "lua, ascii": (torch7(4, 1, b"V 1", b"torch.FloatTensor", 2, lines=True), "with a torch.FloatTensor, not a Py"),
    "lua table": (torch7(3, 1, 5, 2, b"model", 4, 2), "Torch7 for Lua .* with a table, not a PyTorch checkpoint"),
    "lua table, ascii": (torch7(3, 1, 5, 2, b"model", 4, 2, lines=True), "with a table, not a PyTorch checkpoint"),
    "ctranslate2": (ctranslate("TransformerSpec"), "a CTranslate2 model .TransformerSpec., .*faster-whisper"),
    "ctranslate2, older": (ctranslate("WhisperSpec", 4), "a CTranslate2 model .WhisperSpec."),
    "torchsharp": (torchsharp({"a.weight": torch.ones(300, 2), "a.b": torch.ones(3)}), "of 2 tensors, .*'a.weight'"),
    "torchsharp, one": (torchsharp({"w": torch.tensor(1.0).double()}), "a TorchSharp state_dict .* of 1 tensor, "),
    "npy": (numpy_file(numpy.save), "a numpy array .* numpy.load reads it"),
    "msgpack": (b"\x81\xa6params\x81\xa6kernel\x90", "a msgpack document with the key 'params' .flax weights"),
    "tar": (tarred(), "a tar archive"),
    "elf": (b"\x7fELF\x02\x01\x01", "a program or library for Linux"),
    "pe": (b"MZ\x90\x00\x03", "a program or library for Windows .* do not run it"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "png": (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0", "a JPEG image"),
    "sqlite": (b"SQLite format 3\x00", "an SQLite database"),
    "config.json": (b'{"model_type": "bert"}', "a JSON file, apparently a model's configuration, .* give the weights"),
    "tokenizer.json": (b'{"version": "1.0", "added_tokens": []}', "apparently a tokenizer,"),
    "json": (json.dumps({"a": {"b": 1}}).encode(), "a JSON file, not a checkpoint; give the weights"),
    "a json list": (b"[1, 2]", "a JSON file, not a checkpoint"),
    "csv": (b"epoch,loss\n1,0.5\n2,0.25\n", "a table .CSV., not a checkpoint"),
    "yaml": (b"model:\n  name: x\n", "a configuration .YAML., not a checkpoint"),
    "ini": (b"[train]\nlr = 0.1\n", "a configuration .INI., not a checkpoint"),
    "python": (b"import torch\n\nclass Net: pass\n", "source code, not a checkpoint"),
    "text": (b"hello, world", "a text file, not a checkpoint; it begins with 'hello, world'"),
    "utf-8 text": ("größe".encode(), "a text file, not a checkpoint"),
    "utf-16 text": ("größe".encode("utf-16"), "a text file, not a checkpoint; it begins with 'größe'"),
    "controls": (b"line\none\ttwo", r"a text file, not a checkpoint; it begins with 'line\\none\\ttwo'"),
    "pickle": (pickle.dumps({"a": 1}, 4), "a Python pickle of a dict of 1 .'a'., but not written by torch.save"),
    "pickle of protocol 2": (pickle.dumps({"a": 1}, 2), "a Python pickle of a dict of 1"),
    "pickle of protocol 0": (pickle.dumps({"a": 1}, 0), "a Python pickle of a dict of 1"),
    "pickle of protocol 1": (pickle.dumps({"a": 1}, 1), "a Python pickle of a dict of 1"),
    "pickle of arrays": (pickle.dumps(numpy.arange(3), 2), "written by pickle, of numpy arrays.; names in it, which"),
    "a pickle of torch without values": (
        pickle.dumps(OrderedDict(w=torch.ones(2, device="meta"), dtype=torch.float32), 2),
        "written by pickle.dump, of torch objects but without the bytes of any tensor",
    ),
    "sklearn": (pickled("sklearn.svm", "SVC"), "a Python pickle of sklearn.svm.SVC, .* of a scikit-learn model"),
    "pandas, protocol 0": (pickled("pandas.frame", "DataFrame", protocol=0), "of a pandas table.* pandas.frame.Data"),
    "joblib": (JOBLIB, "a joblib file, not written by torch.save; joblib.load reads it; .*_pickle.NumpyArrayWrapper"),
    "a dangerous pickle": (b"\x80\x02cposix\nsystem\nq\x00X\x02\x00\x00\x00lsq\x01\x85q\x02Rq\x03.",
                           "a Python pickle of posix.system, .* posix.system .dangerous."),
    "dcp metadata": (pickled("torch.distributed.checkpoint.metadata", "Metadata"), "what is in the .distcp files"),
    "noise": (bytes(range(144, 156)) + b"\x01", "not a known checkpoint container; it begins with the bytes 90 91 92"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    data, words = NO_CHECKPOINTS[name]
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    with pytest.raises(UnknownFormatError, match=words) as caught:
        formats.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:Lite Interp:FutureWarning", "ignore::DeprecationWarning"
)
def test_a_flatbuffer_that_torch_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.ptl"
    torch.jit.script(torch.nn.Linear(2, 3))._save_for_lite_interpreter(str(path), _use_flatbuffer=True)
    with pytest.raises(
        UnknownFormatError, match=r"for mobile as a flatbuffer \(.ptl, .ff\).*torch.jit.load does.*trust"
    ):
        formats.read(path)
    assert isinstance(torch.jit.load(path), torch.jit.ScriptModule)


@pytest.mark.parametrize("cut", [1, -1])
def test_what_only_resembles_a_torchsharp_file_is_none(cut: int, tmp_path: Path) -> None:
    data = torchsharp({"w": torch.ones(3)})
    (tmp_path / "w.dat").write_bytes(data + b"x" if cut > 0 else data[:cut])
    with pytest.raises(UnknownFormatError, match="not a known checkpoint container"):
        formats.read(tmp_path / "w.dat")


def test_the_names_of_a_pickle_are_reported_with_their_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    for name, verdict in (("a dangerous pickle", "dangerous"), ("sklearn", "unknown"), ("joblib", "unknown")):
        path.write_bytes(NO_CHECKPOINTS[name][0])
        with pytest.raises(UnknownFormatError) as caught:
            formats.read(path)
        assert [use.verdict for use in caught.value.globals] == [verdict]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 9, 13, 21, 34, 55, 90, 200, 511, 513])
def test_any_first_bytes_of_anything_are_described_in_one_line(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    for data, _ in NO_CHECKPOINTS.values():
        path.write_bytes(data[:length])
        with pytest.raises(FormatError) as caught:
            formats.read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["part", "crdownload"])
def test_a_download_that_is_not_finished(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.pth.{ending}"
    path.write_bytes(bytes(100))
    with pytest.raises(UnknownFormatError, match=f"The extension .{ending} means that its download is not finished"):
        formats.read(path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "is a folder, not a file"),
        (["saved_model.pb"], "is a TensorFlow SavedModel"),
        (["manifest.ocdbt"], "is an orbax checkpoint"),
        (["notes.txt", "data.pkl"], "is a folder, not a file"),
        (["a.pth", "b.pt"], "2 checkpoints are in this folder: a.pth, b.pt; give one of them, or choose with --tag"),
        (["model.safetensors", "pytorch_model.bin", "x.pt"], "2 checkpoints .*: model.safetensors, pytorch_model.bin;"),
        (["m.safetensors.index.json", "m.bin.index.json"], "2 checkpoints .*: m.bin.index.json, m.safetensors.index.j"),
        (["trainer_state.json", "optimizer.pt", "scheduler.pt"], "2 checkpoints .*: optimizer.pt, scheduler.pt;"),
    ],
)
def test_folders(names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileAccessError, match=words) as caught:
        formats.read(tmp_path)
    assert isinstance(caught.value, CkptkitError)


# ZIP archives that are not checkpoints: each is named, with what to do.


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["x.npy", "y.npy"], r"numpy archive \(.npz\) of 2 arrays: 'x.npy', 'y.npy'; numpy.load reads it"),
        (["config.json", "metadata.json", "model.weights.h5"], r"Keras model \(.keras\).*keras.saving.load_model"),
        (["MAR-INF/MANIFEST.json", "model.pth", "handler.py"], r"TorchServe .*weights are 'model.pth': unpack"),
        (["MAR-INF/MANIFEST.json", "handler.py"], r"TorchServe model archive \(.mar\); unpack it first"),
        (["[Content_Types].xml", "word/document.xml"], "office document"),
        (["META-INF/MANIFEST.MF", "A.class"], "Java or Android"),
        (["p/__init__.py", "p-1.dist-info/METADATA"], r"Python package \(.whl\), not a checkpoint"),
        (
            ["p/w.pth", "p-1.dist-info/METADATA"],
            r"Python package \(.whl\), which contains 'p/w.pth': unpack that first",
        ),
        (["data.pkl", "data/0", "version"], "without their folder"),
        (
            ["a/model.safetensors", "b.ckpt", "README"],
            "with 2 checkpoints in it",
        ),
        ([f"f{n}.txt" for n in range(6)], r"it contains 6 files: 'f0.txt', 'f1.txt', 'f2.txt', 'f3.txt' and 2 more"),
        (["folder/"], "without any files"),
        (["x" * 300 + ".txt"], "x{80}…"),
    ],
)
def test_each_is_named(names: list[str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as out:
        for name in names:
            out.writestr(name, b"")
    with pytest.raises(UnknownFormatError, match=words) as caught:
        formats.read(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_what_numpy_writes(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "a.npz", first=numpy.ones(3), second=numpy.zeros(2))
    with pytest.raises(UnknownFormatError, match=r"2 arrays: 'first\.npy', 'second\.npy'"):
        formats.read(tmp_path / "a.npz")


def test_a_checkpoint_zipped_once_more(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("model.pth", buffer.getvalue())
    checkpoint, file = formats.read(tmp_path / "model.zip")
    assert [*checkpoint.state_dict] == ["a"]
    file.close()
