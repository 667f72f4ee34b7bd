"""TorchScript: what torch.jit writes is listed as torch.jit.load gives it, and nothing of it runs.

Annotations are evaluated here: torch.jit.script reads them.
"""

import os
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import read, with_data
from torch import nn

import ckptkit
from ckptkit import formats
from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import Checkpoint, TensorEntry
from ckptkit.errors import CorruptError, FormatError, LimitError, RewriteError, UnsupportedError
from ckptkit.formats import torch_zip_writer, torchscript_code
from ckptkit.limits import Limits
from ckptkit.pickling.dialects import ScriptStorageTable
from ckptkit.pickling.inert import Global, InertDict, Object
from ckptkit.torch_bridge import tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Lite Interpreter:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Lite Interpreter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(3))
        self.register_buffer("shift", torch.ones(3))
        self.register_buffer("transient", torch.ones(4), persistent=False)
        self.plain = torch.randn(5)
        self.steps: int = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain + self.shift + self.plain.sum() + self.transient.sum()


class Net(nn.Module):
    sizes: list[int]
    kept: list[torch.Tensor]
    table: dict[str, torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.part = Part()
        self.again = self.first
        self.bare = nn.Linear(3, 3, bias=False)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))
        self.many = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.sizes = [1, 2]
        self.kept = [torch.ones(1), torch.zeros(2)]
        self.table = {"a": torch.ones(2)}
        self.rate = 1.5
        self.label = "x"

    @torch.jit.export
    def attributes(self) -> tuple[list[int], list[torch.Tensor], dict[str, torch.Tensor], float, str]:
        return self.sizes, self.kept, self.table, self.rate, self.label

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rest(self.bare(self.part(self.norm(self.again(self.first(x))))))
        for module in self.many:
            x = module(x)
        return x


def scripted(path: Path) -> Path:
    torch.jit.save(torch.jit.script(Net()), path)
    return path


def traced(path: Path) -> Path:
    torch.jit.save(torch.jit.trace(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.ones(2, 3)), path)
    return path


def mobile(path: Path) -> Path:
    torch.jit.script(Net())._save_for_lite_interpreter(str(path))
    return path


def frozen(path: Path) -> Path:
    torch.jit.save(torch.jit.freeze(torch.jit.script(Net().eval())), path)
    return path


def quantized(path: Path) -> Path:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2), nn.LSTM(2, 2)), {nn.Linear, nn.LSTM})
    torch.jit.save(torch.jit.script(model), path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "my.model.v1.pt"


def codes(checkpoint: Checkpoint) -> dict[str, str]:
    return {finding.code: finding.message for finding in checkpoint.findings}


# Against torch.


@pytest.mark.parametrize("make", [scripted, traced, mobile])
def test_names_order_values_and_roles_are_those_of_torch(make: Callable[[Path], Path], path: Path) -> None:
    oracle = torch.jit.load(make(path))
    parameters = {name for name, _ in oracle.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in oracle.named_buffers(remove_duplicate=False)}
    with ckptkit.open(path) as file:
        assert (file.format, file.kind, file.trust) == ("torchscript", "whole_model", "safe")
        ours = tensors(file.state_dict)
        assert {name for name, entry in file.state_dict.items() if entry.is_parameter} == parameters
        assert {name for name, entry in file.state_dict.items() if not entry.is_parameter} == buffers
    assert list(ours) == list(oracle.state_dict())
    for name, value in oracle.state_dict().items():
        assert torch.equal(ours[name], value)
        assert (ours[name].dtype, ours[name].stride()) == (value.dtype, value.stride())


def test_attributes_stand_beside_the_weights(path: Path) -> None:
    oracle = torch.jit.load(scripted(path))
    document = ckptkit.inspect(path)
    beside = {t["name"]: t["shape"] for t in document["tensors"] if t["section"] == "attributes"}
    assert beside == {"kept.0": [1], "kept.1": [2], "table.a": [2], "part.plain": [5]}
    assert not set(beside) & set(oracle.state_dict())
    assert [(s["path"], s["selected"]) for s in document["sections"]] == [("model", True), ("attributes", False)]


def test_what_torch_ties_is_tied(path: Path) -> None:
    checkpoint = read(scripted(path))
    assert checkpoint.state_dict["first.weight"].view == checkpoint.state_dict["again.weight"].view
    assert checkpoint.state_dict["first.weight"].view != checkpoint.state_dict["bare.weight"].view


def test_modules_have_the_names_and_settings_of_their_classes(path: Path) -> None:
    modules = {module["path"]: module for module in ckptkit.inspect(scripted(path))["modules"]}
    assert modules["norm"]["class"] == "torch.nn.modules.batchnorm.BatchNorm1d"
    assert modules["rest.1"]["class"] == "torch.nn.modules.linear.Linear"
    assert modules["norm"]["settings"]["momentum"] == 0.1
    assert modules[""]["settings"]["rate"] == 1.5
    assert modules["part"]["settings"]["steps"] == 3


def test_the_qualified_name_is_kept(path: Path) -> None:
    root = read(traced(path)).module
    assert isinstance(root, Object)
    assert root.class_name == "torch.nn.modules.container.Sequential"
    assert isinstance(root.state, InertDict)
    qualified = str(root.state["_script_class"])
    assert qualified.startswith("__torch__.torch.nn.modules.container.")
    assert qualified in codes(read(path))["torchscript-program"]


def test_constants_of_traced_code(path: Path) -> None:
    document = ckptkit.inspect(traced(path))
    constants = [t for t in document["tensors"] if t["section"] == "constants"]
    assert [(t["name"], t["dtype"], t["shape"]) for t in constants] == [("0", "int64", [])]


@pytest.mark.parametrize("lite", [False, True])
def test_frozen_programs_hold_their_weights_in_constants(lite: bool, path: Path) -> None:
    module = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(7, 5), nn.ReLU()).eval()))
    if lite:
        module._save_for_lite_interpreter(str(path))
    else:
        torch.jit.save(module, path)
    checkpoint = read(path)
    assert checkpoint.origin.kind == "whole_model"
    assert "frozen-program" in codes(checkpoint)
    shapes = sorted(tuple(t["shape"]) for t in ckptkit.inspect(path)["tensors"])
    assert shapes == [(5,), (5, 7)]
    with ckptkit.open(path, section="constants") as file:
        assert sorted(value.numel() for value in tensors(file.state_dict).values()) == [5, 35]


def test_quantized_and_packed_parameters_are_what_they_are(path: Path) -> None:
    oracle = torch.jit.load(quantized(path))
    checkpoint = read(path)
    assert dict(checkpoint.state_dict) == dict(oracle.state_dict()) == {}
    assert "0._packed_params._packed_params" in codes(checkpoint)["not-a-plain-tensor"]
    listed = [t["name"] for t in ckptkit.inspect(path)["tensors"]]
    assert listed
    assert all(name.startswith(("0._packed_params", "1._all_weight_values")) for name in listed)


def test_a_scripted_module_without_tensors(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), path)
    checkpoint = read(path)
    assert (checkpoint.origin.kind, len(checkpoint.state_dict)) == ("whole_model", 0)
    assert "frozen-program" not in codes(checkpoint)


# Converting.


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("make", [scripted, traced, mobile])
def test_converting_writes_the_state_dict(make: Callable[[Path], Path], ending: str, path: Path) -> None:
    oracle = torch.jit.load(make(path)).state_dict()
    target = path.with_name(f"out.{ending}")
    report = ckptkit.convert(path, target)
    left_out = [finding.message for finding in report.findings if finding.code == "left-out"]
    assert bool(left_out) == (make is not traced) or "constants" in left_out[0]
    written = torch.load(target, weights_only=True) if ending == "pth" else ckptkit.load_state_dict(target)
    assert set(written) == set(oracle)
    assert all(torch.equal(written[name], value) for name, value in oracle.items())
    if ending == "pth":
        assert list(written) == list(oracle)


def test_the_converted_weights_load_into_the_python_model(path: Path) -> None:
    ckptkit.convert(scripted(path), path.with_name("out.pth"))
    model = Net()
    keys = model.load_state_dict(torch.load(path.with_name("out.pth")), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], ["part.transient"])


def test_nothing_selected_nothing_written(path: Path) -> None:
    checkpoint = read(scripted(path))
    unselected = checkpoint.replace(
        origin=ckptkit.Origin(path="p", size=0, format="torchscript", kind="whole_model", is_program=True)
    )
    with pytest.raises(RewriteError, match="name the section with --section"):
        torch_zip_writer.write(unselected)


# Trust, damage and hostility.


def test_a_name_that_runs_things_makes_it_hostile_and_runs_nothing(path: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = b"\x80\x02cos\nsystem\nX%s%s\x85R." % (
        len(f"touch {canary}").to_bytes(4, "little"),
        f"touch {canary}".encode(),
    )
    for record in ("data.pkl", "constants.pkl", "bytecode.pkl"):
        changed = with_data(mobile(path), lambda n, d, r=record: payload if n == r else d)  # type: ignore[misc]
        assert read(changed).trust == "hostile"
    assert not canary.exists()


def test_foreign_names_are_not_vouched_for(path: Path) -> None:
    changed = with_data(scripted(path), lambda n, d: d.replace(b"c__torch__", b"cmycode", 1))
    checkpoint = read(changed)
    assert checkpoint.trust == "needs_trust"


def test_without_source_gradients_tell(path: Path) -> None:
    oracle = torch.jit.load(scripted(path))
    checkpoint = read(with_data(path, lambda n, d: None if n.startswith("code/") else d))
    assert "torchscript-without-code" in codes(checkpoint)
    parameters = {name for name, _ in oracle.named_parameters(remove_duplicate=False)}
    assert {name for name, entry in checkpoint.state_dict.items() if entry.is_parameter} == parameters
    assert set(checkpoint.state_dict) == {*oracle.state_dict(), "part.plain"}


def test_programs_of_torch_1_0_are_refused_by_name(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("model/version", "1\n")
        out.writestr("model/model.json", "{}")
    with pytest.raises(UnsupportedError, match=r"torch 1.0 to 1.3 \(model.json\).* torch 1.4 to 1.9 does.*trust"):
        formats.read(path)


@pytest.mark.parametrize("record", ["data.pkl", "constants.pkl"])
def test_pickles_that_are_damaged(record: str, path: Path) -> None:
    for cut in (0, 1, -1):
        with pytest.raises(CorruptError) as caught:
            formats.read(with_data(scripted(path), lambda n, d, c=cut: d[:c] if n == record else d))  # type: ignore[misc]
        assert caught.value.where == record
        assert caught.value.path


def test_a_constant_without_its_record(path: Path) -> None:
    with pytest.raises(CorruptError, match="no record constants/0"):
        formats.read(with_data(traced(path), lambda n, d: None if n == "constants/0" else d))


def test_modules_too_deep(path: Path) -> None:
    depth = 1500
    nested = b"c__torch__\nDeep\n)\x81}X\x01\x00\x00\x00m" * depth + b"N" + b"sb" * depth
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("m/data.pkl", b"\x80\x02" + nested + b".")
        out.writestr("m/constants.pkl", b"\x80\x02).")
        out.writestr("m/code/__torch__.py", "class Deep(Module):\n  __parameters__ = []\n  __buffers__ = []\n")
    with pytest.raises(LimitError, match="modules inside modules"):
        formats.read(path)


def test_an_attribute_whose_name_is_no_string(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("m/data.pkl", b"\x80\x02c__torch__\nM\n)\x81}K\x01Nsb.")
        out.writestr("m/constants.pkl", b"\x80\x02).")
        out.writestr("m/code/__torch__.py", "class M(Module):\n  __parameters__ = []\n")
    with pytest.raises(CorruptError, match="whose name is not a string"):
        formats.read(path)


def test_source_is_bounded(path: Path) -> None:
    with pytest.raises(LimitError, match="bytes of a program's source"):
        formats.read(scripted(path), limits=Limits(source_nbytes=1000))


def test_classes_are_bounded(path: Path) -> None:
    with pytest.raises(LimitError, match="classes in a program's source"):
        formats.read(scripted(path), limits=Limits(source_classes=3))


def test_names_as_the_source_escapes_them() -> None:
    text = (
        'class M(Module):\n  __parameters__ = ["a\\"b", "t\\tx", "\\303\\251", "plain", ]\n'
        '  k : Final[int] = 3\n  v : Final[int] = f()\n  p : Final[str] = "ze\\164"\n'
        "  t : Final[Tuple[int, int]] = (1, 2)\n"
    )
    parsed: dict[str, Any] = dict(torchscript_code.parse_classes(text))
    assert parsed["M"].parameters == {'a"b', "t\tx", "é", "plain"}
    assert parsed["M"].constants == [("k", 3), ("v", "f()"), ("p", "zet"), ("t", (1, 2))]
    assert dict(torchscript_code.parse_classes("class A:\n  x : int\nclass B(NamedTuple):\n  y : int\n")) == {
        "A": None,
        "B": None,
    }


def test_truncation_at_every_record(path: Path) -> None:
    scripted(path)
    with zipfile.ZipFile(path) as archive:
        offsets = [info.header_offset for info in archive.infolist()]
    for length in sorted(offsets, reverse=True):
        os.truncate(path, length)
        with pytest.raises(FormatError):
            formats.read(path)


def test_every_flipped_bit_of_the_pickle_gives_a_result_or_an_error_of_ours(path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 1))
    torch.jit.save(torch.jit.script(module), path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("my.model.v1/data.pkl")
    refused = 0
    for at in range(0, len(pickled), 3):
        changed = pickled[:at] + bytes([pickled[at] ^ 0x21]) + pickled[at + 1 :]
        try:
            checkpoint = read(with_data(path, lambda n, d, c=changed: c if n == "data.pkl" else d))  # type: ignore[misc]
            assert all(isinstance(value, TensorEntry) for value in checkpoint.state_dict.values())
        except FormatError:
            refused += 1
    assert refused > 20


# Buffers that C++ pickles in words of its own.


class Bearer(nn.Module):
    """Bears one buffer."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("value", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def bits_of(name: str) -> Callable[[], torch.Tensor]:
    return lambda: torch.arange(16, dtype=torch.uint8).view(getattr(torch, name))


BUFFERS: dict[str, Callable[[], torch.Tensor]] = {
    **{name: bits_of(name) for name in (
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
        "uint16", "uint32", "uint64", "complex32", "bits8", "bits16",
    )},
    "meta": lambda: torch.empty(3, 4, device="meta").t(),
    "meta of uint16": lambda: torch.empty(3, device="meta", dtype=torch.uint16),
    "coo": lambda: torch.eye(3).to_sparse(),
    "coo of places twice": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (4, 4)),
    "coo with a dense dimension": lambda: torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 3), (4, 3)),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "per tensor": lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 3, torch.qint8),
    "per channel": lambda: torch.quantize_per_channel(torch.ones(4, 3), torch.ones(3), torch.ones(3), 1, torch.qint8),
}  # fmt: skip


def comparable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return torch.empty(0)
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor.to_dense() if tensor.layout != torch.strided else tensor.clone().view(torch.uint8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_of_every_kind(path: Path, name: str, tmp_path: Path) -> None:
    script = torch.jit.script(Bearer(BUFFERS[name]()))
    torch.jit.save(script, path)
    expected = dict(torch.jit.load(path).named_buffers())["value"]
    ckptkit.convert(path, tmp_path / "out.pth")
    for state in (ckptkit.load_state_dict(path), torch.load(tmp_path / "out.pth", weights_only=False)):
        assert list(state) == ["weight", "value"]
        value = state["value"]
        for fact in ("dtype", "layout", "device", "shape", "is_quantized"):
            assert getattr(value, fact) == getattr(expected, fact)
        assert torch.equal(comparable(value), comparable(expected))
        assert value.layout != torch.strided or value.stride() == expected.stride()
    assert ckptkit.inspect(path)["error"] is None
    assert ckptkit.diff(path, tmp_path / "out.pth").equal


def test_a_storage_named_with_two_types(path: Path) -> None:
    path.write_bytes(bytes(8))
    with closing(SourceFile(path)) as file:
        table = ScriptStorageTable(lambda key, nbytes: (ByteRange(file, 0, nbytes), None))
        table.persistent_load(("storage", Global("torch", "UInt16Storage"), "0", "cpu", 4))
        with pytest.raises(CorruptError, match="'0' is named with two element types"):
            table.persistent_load(("storage", Global("torch", "Bits16Storage"), "0", "cpu", 4))


def test_files_of_the_authors_own_are_told(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(
        torch.jit.script(nn.Linear(2, 2)), path, _extra_files={"labels.txt": "cat", "config.json": '{"a": 1}'}
    )
    told = [finding for finding in ckptkit.inspect(path)["findings"] if finding["code"] == "extra-files"]
    assert len(told) == 1 and all(name in told[0]["message"] for name in ("'labels.txt' (3 B)", "'config.json' (8 B)"))
    report = ckptkit.convert(path, tmp_path / "m.safetensors")
    assert [finding.message for finding in report.findings if finding.code == "extra-files"] == [told[0]["message"]]
