"""Exported programs: torch.export.load is the oracle; older layouts are made of what torch itself serialized."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import assert_refused_when_cut, read, with_data
from torch import nn

import ckptkit
from ckptkit import formats
from ckptkit.errors import CorruptError, FormatError, UnsupportedError
from ckptkit.torch_bridge import tensors

pytestmark = [
    pytest.mark.skipif(
        torch.torch_version.TorchVersion(torch.__version__) < "2.10",
        reason="an older torch writes older layouts, which are made here of what the newer one serialized",
    ),
    pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.low = nn.Parameter(torch.randn(3).bfloat16())
        base = torch.arange(10.0)
        self.register_buffer("head", base[:4])
        self.register_buffer("tail", base[4:])
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("transient", torch.ones(5), persistent=False)
        self.constant = torch.arange(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.head.sum() + self.tail.sum() + self.transient.sum() + self.constant.sum() + self.count
        return self.tied(self.first(x)) + self.low.float() + total


@pytest.fixture(scope="module")
def exported() -> Any:
    return torch.export.export(Net(), (torch.ones(2, 3),))


@pytest.fixture
def path(tmp_path: Path, exported: Any) -> Path:
    path = tmp_path / "model.pt2"
    torch.export.save(exported, path)
    return path


def same(ours: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> bool:
    return list(ours) == list(oracle) and all(
        torch.equal(ours[name], value) and ours[name].stride() == value.stride() for name, value in oracle.items()
    )


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11 on its own buffer
def test_weights_are_those_torch_loads(path: Path) -> None:
    oracle = torch.export.load(path)
    with ckptkit.open(path) as file:
        assert (file.format, file.kind, file.trust) == ("pt2", "state_dict", "safe")
        assert file.checkpoint.origin.writer == "torch 2.9 or later"
        assert same(tensors(file.state_dict), dict(oracle.state_dict))
        assert {name for name, entry in file.state_dict.items() if entry.is_parameter} == {
            name for name, value in oracle.state_dict.items() if isinstance(value, nn.Parameter)
        }
        assert file.state_dict["head"].storage is file.state_dict["tail"].storage
        assert file.state_dict["first.weight"].view == file.state_dict["tied.weight"].view
    assert read(path).findings == ()


def test_constants_stand_beside_them(path: Path, exported: Any) -> None:
    with ckptkit.open(path, section="constants") as file:
        assert same(tensors(file.state_dict), dict(exported.constants))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_converting_writes_the_state_dict(ending: str, path: Path, exported: Any) -> None:
    target = path.with_name(f"out.{ending}")
    report = ckptkit.convert(path, target)
    assert any("constants" in finding.message for finding in report.findings if finding.code == "left-out")
    written = torch.load(target) if ending == "pth" else ckptkit.load_state_dict(target)
    assert all(torch.equal(written[name], value) for name, value in exported.state_dict.items())
    assert set(written) == set(exported.state_dict)


def test_several_models(tmp_path: Path, exported: Any) -> None:
    from torch.export.pt2_archive._package import package_pt2

    path = tmp_path / "two.pt2"
    package_pt2(str(path), exported_programs={"one": exported, "two": exported}, extra_files={"notes": "hello"})
    checkpoint = read(path)
    assert [section.path for section in checkpoint.sections] == [
        "one.state_dict", "one.constants", "two.state_dict", "two.constants"
    ]  # fmt: skip
    assert checkpoint.origin.state_path is None or checkpoint.origin.state_path.endswith("state_dict")


# Older layouts.


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_weights_as_a_file_of_torch_save(path: Path, exported: Any) -> None:
    """2.8 kept them so, and `torch.export.load` still reads it."""

    def change(name: str, data: bytes) -> bytes | None:
        return None if name.startswith(("data/weights/", "data/constants/")) else data

    more = [("model/data/weights/model.pt", saved(dict(exported.state_dict))),
            ("model/data/constants/model.pt", saved(exported.constants))]  # fmt: skip
    with ckptkit.open(with_data(path, change, more)) as file:
        assert file.checkpoint.origin.writer == "torch 2.8 or 2.9"
        assert same(tensors(file.state_dict), dict(exported.state_dict))
        assert [section.path for section in file.sections] == ["state_dict", "constants"]


@pytest.mark.parametrize("ending", ["pt", "json"])
def test_archives_without_a_root_folder(ending: str, tmp_path: Path, exported: Any) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("serialized_exported_program.json", "{}")
        out.writestr(f"serialized_state_dict.{ending}", saved(dict(exported.state_dict)))
        out.writestr(f"serialized_constants.{ending}", saved({}))
        out.writestr("version", "5.3")
    with ckptkit.open(path) as file:
        origin = file.checkpoint.origin
        assert (origin.format, origin.format_version, origin.writer) == ("pt2", "5.3", "torch 2.1 to 2.7")
        assert same(tensors(file.state_dict), dict(exported.state_dict))


# What cannot be listed.


def config(change: Callable[[dict[str, Any]], None]) -> Callable[[str, bytes], bytes]:
    def changed(name: str, data: bytes) -> bytes:
        if name != "data/weights/model_weights_config.json":
            return data
        document = json.loads(data)
        change(document["config"])
        return json.dumps(document).encode()

    return changed


def test_weights_without_bytes(path: Path) -> None:
    """A program exported under a fake mode has empty records, which torch reads as zeros."""
    with zipfile.ZipFile(path) as archive:
        listed = json.loads(archive.read("model/data/weights/model_weights_config.json"))["config"]
    record = f"data/weights/{listed['low']['path_name']}"
    checkpoint = read(with_data(path, lambda name, data: b"" if name == record else data))
    assert "low" not in checkpoint.state_dict
    assert "first.weight" in checkpoint.state_dict
    assert ["low" in finding.message for finding in checkpoint.findings] == [True]
    assert checkpoint.findings[0].code == "not-a-plain-tensor"


def test_tensors_that_are_pickled(path: Path) -> None:
    def change(listed: dict[str, Any]) -> None:
        listed["low"].update(use_pickle=True)

    with zipfile.ZipFile(path) as archive:
        listed = json.loads(archive.read("model/data/weights/model_weights_config.json"))["config"]
    record, value = f"data/weights/{listed['low']['path_name']}", torch.arange(3.0)
    both = lambda name, data: saved(value) if name == record else config(change)(name, data)  # noqa: E731
    with ckptkit.open(with_data(path, both)) as file:
        assert torch.equal(tensors(file.state_dict)["low"], value)


def test_objects_are_judged_by_the_names_in_their_pickles(path: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, (f"touch {tmp_path / 'canary'}",)

    def change(listed: dict[str, Any]) -> None:
        listed["thing"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    more = [("model/data/weights/opaque_obj_0", pickle.dumps(Payload(), protocol=2))]
    checkpoint = read(with_data(path, config(change), more))
    assert checkpoint.trust == "hostile"
    assert not (tmp_path / "canary").exists()


def test_a_payload_in_the_sample_inputs(path: Path) -> None:
    def change(name: str, data: bytes) -> bytes:
        if name != "data/sample_inputs/model.pt":
            return data
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.")
        return out.getvalue()

    assert read(with_data(path, change)).trust == "hostile"


def test_compiled_programs_are_named(path: Path) -> None:
    more = [("model/data/aotinductor/model/model.so", b"\x7fELF"), ("model/data/executorch/m.pte", b"")]
    found = {finding.code: finding for finding in read(with_data(path, lambda _, d: d, more)).findings}
    assert found["foreign-program"].severity == "warning"
    assert "data/aotinductor/model/model.so" in found["foreign-program"].message
    alone = with_data(path, lambda name, data: data if name == "archive_format" else None, more)
    assert read(alone).origin.kind == "other"


@pytest.mark.parametrize(
    ("record", "data"),
    [
        ("data/aotinductor/model/model.so", b"\x7fELF"), ("data/aotinductor/model/wrapper.cpp", b"int main() {}"),
        ("data/executorch/m.pte", b""), ("extra/kernel.cubin", b"x"), ("extra/notes", b"\x7fELF\x02"),
        ("data/weights/plugin.dll", b"MZ"),
    ],
)  # fmt: skip
def test_compiled_code_is_not_safe_and_is_no_pickle(record: str, data: bytes, path: Path) -> None:
    keep = lambda name, data: data if name == "archive_format" or name.startswith("models/") else None  # noqa: E731
    code = with_data(path, keep, [(f"model/{record}", data)])
    checkpoint = read(code)
    assert (checkpoint.trust, checkpoint.origin.has_pickle, checkpoint.globals) == ("needs_trust", False, ())
    assert [(part.kind, part.where) for part in checkpoint.unvouched] == [("code", (record,))]
    assert ckptkit.check([code], no_pickle=True).ok
    (finding,) = ckptkit.check([code], no_pickle=True, max_trust="safe").findings
    assert finding.code == "trust-not-allowed" and f"it contains compiled code ({record})" in finding.message
    assert "pickle" not in finding.message
    assert ckptkit.manifest([code]).files[0].trust == ckptkit.inspect(code)["trust"] == "needs_trust"


def test_a_pickle_in_a_program_counts(path: Path) -> None:
    assert read(path).origin.has_pickle, "its sample inputs"
    bare = with_data(path, lambda name, data: None if name.startswith("data/sample_inputs") else data)
    bare = bare.rename(bare.with_name("bare.pt2"))
    checkpoint = read(bare)
    assert (checkpoint.origin.has_pickle, checkpoint.trust) == (False, "safe")
    assert ckptkit.check([bare], no_pickle=True, max_trust="safe").ok
    hidden = with_data(bare, lambda name, data: data, [("model/extra/notes.txt", pickle.dumps([1], 0))])
    assert read(hidden).trust == "safe"
    hidden = with_data(bare, lambda name, data: data, [("model/extra/notes.txt", pickle.dumps([1], 4))])
    assert not ckptkit.check([hidden], no_pickle=True).ok


@pytest.mark.parametrize("name", ["extra/inputs.npz", "data/aotinductor/model/constants.pt", "models/notes"])
def test_a_payload_in_an_archive_in_a_program(name: str, path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/x", b"cos\nsystem\n(S'id'\ntR.")
    assert read(with_data(path, lambda _, d: d, [(f"model/{name}", out.getvalue())])).trust == "hostile"


# What is refused.


def setting(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda listed: listed["first.weight"].update(fields)


def meta(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda listed: listed["first.weight"]["tensor_meta"].update(fields)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (setting(path_name="weight_99"), CorruptError, "no record with that name"),
        (setting(path_name=3), CorruptError, "'path_name' is an int; str is expected"),
        (setting(is_param="yes"), CorruptError, "'is_param'"),
        (setting(tensor_meta=None), CorruptError, "'tensor_meta'"),
        (setting(use_pickle=True, path_name="gone"), CorruptError, "no record with that name"),
        (meta(dtype=99), UnsupportedError, "scalar type 99"),
        (meta(dtype=True), CorruptError, "'dtype'"),
        (meta(sizes=[{"as_expr": "s0"}, {"as_int": 3}]), CorruptError, "not a whole number"),
        (meta(sizes=[{"as_int": -3}, {"as_int": 3}]), CorruptError, "not a whole number"),
        (meta(sizes=[{"as_int": 3}]), CorruptError, "differ in length"),
        (meta(sizes=[{"as_int": 1}] * 65, strides=[{"as_int": 1}] * 65), CorruptError, "65 dimensions"),
        (meta(storage_offset={"as_int": 4}), CorruptError, "reach to byte"),
        (meta(device={"type": 3}), CorruptError, "'type'"),
        (lambda listed: listed.update(x=3), CorruptError, "'path_name'"),
    ],
)
def test_configs(change: Callable[[dict[str, Any]], None], error: type[FormatError], words: str, path: Path) -> None:
    with pytest.raises(error, match=words) as caught:
        formats.read(with_data(path, config(change)))
    assert caught.value.where == "data/weights/model_weights_config.json"


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"config": []}', b"\xff", b'{"config": {"a": 1, "a": 2}}'])
def test_configs_that_are_no_json_of_payloads(text: bytes, path: Path) -> None:
    with pytest.raises(CorruptError):
        formats.read(
            with_data(path, lambda name, data: text if name == "data/weights/model_weights_config.json" else data)
        )


def test_an_archive_without_a_model(path: Path) -> None:
    with pytest.raises(UnsupportedError, match="without a model"):
        formats.read(with_data(path, lambda name, data: data if name == "archive_format" else None))


def test_truncation_at_every_record(path: Path) -> None:
    assert_refused_when_cut(path)
