"""torch.package: its pickles are listed, its code is counted, and PackageImporter is the oracle."""

from __future__ import annotations

import importlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.conformance import Conformance
from support.files import assert_refused_when_cut, read, with_data
from torch import nn
from torch.package import PackageExporter, PackageImporter, package_exporter

import ckptkit
from ckptkit import formats
from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import CorruptError, RewriteError
from ckptkit.torch_bridge import tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

SOURCE = """
from torch import nn
import torch

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("transient", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.lin(x) * self.scale
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A model whose class lies in a module of its own, as PackageExporter wants it."""
    (tmp_path / "packaged_net.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("packaged_net").Net()
    sys.modules.pop("packaged_net", None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "package.pt"


def export(path: Path, *, intern: tuple[str, ...] = (), text: bool = False, **resources: object) -> Path:
    with PackageExporter(str(path)) as exporter:
        for module in intern:
            exporter.intern(module)
        exporter.extern("**")
        for name, value in resources.items():
            exporter.save_pickle("held", f"{name}.pkl", value)
        if text:
            exporter.save_text("files", "notes.txt", "hello")
            exporter.save_binary("files", "blob.bin", b"\x00\x01")
    return path


def messages(checkpoint: Checkpoint) -> dict[str, str]:
    return {finding.code: finding.message for finding in checkpoint.findings}


class TestTorchPackage(Conformance):
    reads = "torch-package"
    step = 7

    def written(self, state: dict[str, torch.Tensor], folder: Path) -> Path:
        return export(folder / "package.pt", weights=state)


def test_a_model_with_its_code(net: nn.Module, path: Path) -> None:
    export(path, intern=("packaged_net",), model=net, text=True)
    oracle = PackageImporter(str(path)).load_pickle("held", "model.pkl").state_dict()
    with ckptkit.open(path) as file:
        assert (file.format, file.kind) == ("torch-package", "whole_model")
        assert file.checkpoint.origin.state_path == "held/model.pkl"
        ours = tensors(file.state_dict)
    assert list(ours) == list(oracle) == ["scale", "lin.weight", "lin.bias"]
    assert all(torch.equal(ours[name], value) for name, value in oracle.items())
    checkpoint = read(path)
    assert checkpoint.trust == "needs_trust"
    assert (
        "1 pickled object, and 1 Python source that its importer runs (packaged_net.py)"
        in (messages(checkpoint)["package-code"])
    )
    assert f"Python {sys.version_info.major}." in messages(checkpoint)["package-code"]
    assert "unreferenced-records" not in messages(checkpoint)


def test_plain_weights_are_safe(path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    checkpoint = read(export(path, weights=state))
    assert (checkpoint.trust, checkpoint.origin.kind) == ("safe", "state_dict")
    assert [finding.severity for finding in checkpoint.findings if finding.code == "package-code"] == ["info"]
    assert list(checkpoint.state_dict) == list(state)


def test_several_resources_are_sections_and_share_storages(net: nn.Module, path: Path) -> None:
    export(path, intern=("packaged_net",), model=net, weights={"sd": net.state_dict(), "epoch": 3})
    checkpoint = read(path)
    assert [section.path for section in checkpoint.sections] == ["held/model.pkl", "held/weights.pkl.sd"]
    assert checkpoint.origin.kind == "collection"
    assert [section.nbytes for section in checkpoint.sections] == [40, 40], "the transient buffer is in no section"
    with ckptkit.open(path, section="held/weights.pkl.sd") as file:
        ours = tensors(file.state_dict)
    assert all(torch.equal(ours[name], value) for name, value in net.state_dict().items())


def test_torchscript_inside(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_exporter, "_gate_torchscript_serialization", False)
    script = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    export(path, both={"a": script, "b": script})
    oracle = PackageImporter(str(path)).load_pickle("held", "both.pkl")["a"].state_dict()
    checkpoint = read(path)
    assert checkpoint.trust == "safe"
    assert "and 1 TorchScript module" in messages(checkpoint)["package-code"]
    assert [section.path for section in checkpoint.sections] == ["held/both.pkl.a", "held/both.pkl.b"]
    with ckptkit.open(path, section="held/both.pkl.a") as file:
        ours = tensors(file.state_dict)
        parameters = [name for name, entry in file.state_dict.items() if entry.is_parameter]
    assert list(ours) == list(oracle)
    assert all(torch.equal(ours[name], value) for name, value in oracle.items())
    assert parameters == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_converting_writes_the_state_dict(ending: str, net: nn.Module, path: Path) -> None:
    export(path, intern=("packaged_net",), model=net)
    target = path.with_name(f"out.{ending}")
    ckptkit.convert(path, target)
    written = ckptkit.load_state_dict(target)
    assert set(written) == set(net.state_dict())
    assert all(torch.equal(written[name], value) for name, value in net.state_dict().items())


def test_nothing_is_written_of_objects_alone(path: Path) -> None:
    export(path, settings={"lr": 0.1})
    assert read(path).origin.kind == "other"
    with pytest.raises(RewriteError, match="only the weights of a torch-package file can be written"):
        ckptkit.convert(path, path.with_name("out.pth"))


# What is refused.


def test_a_payload_in_any_resource_is_seen_and_not_run(path: Path, tmp_path: Path) -> None:
    export(path, weights=nn.Linear(3, 2).state_dict())
    command = f"touch {tmp_path / 'canary'}".encode()
    payload = b"\x80\x03cos\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R."
    changed = with_data(path, lambda name, data: data, more=[("package/held/innocent.bin", payload)])
    assert read(changed).trust == "hostile"
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("record", ["held/notes.txt", "held/data.json", ".data/ts_code/x", ".data/serialization_id"])
@pytest.mark.parametrize(
    "data", [b"cos\nsystem\n(S'id'\ntR.", b"(S'id'\nios\nsystem\n.", b"\x80\x04\x8c\x02os\x8c\x06system\x93)R."]
)
def test_a_payload_of_any_protocol_in_any_resource(record: str, data: bytes, path: Path) -> None:
    export(path, weights=nn.Linear(3, 2).state_dict())
    drop = lambda name, data: None if name == record else data  # noqa: E731
    assert read(with_data(path, drop, more=[(f"package/{record}", data)])).trust == "hostile"


def test_a_program_in_a_package_is_looked_into(path: Path) -> None:
    export(path, weights=nn.Linear(3, 2).state_dict())
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), program)
    honest = with_data(path, lambda name, data: data, more=[("package/held/program", program.getvalue())])
    assert read(honest).trust == "safe"
    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cos\nsystem\n(X\x02\0\0\0idtR.")
    changed = with_data(path, lambda name, data: data, more=[("package/held/program", hostile.getvalue())])
    assert read(changed).trust == "hostile"


def graph(path: Path, text: bytes | None = None) -> Checkpoint:
    with PackageExporter(str(path)) as exporter:
        exporter.extern("**")
        exporter.save_pickle("held", "graph.pkl", torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    return read(with_data(path, lambda name, data: text if text and name.endswith("/_0.py") else data))


def test_a_graph_is_judged_by_its_text(path: Path) -> None:
    checkpoint = graph(path)
    assert checkpoint.trust == "needs_trust"
    (use,) = [use for use in checkpoint.globals if use.name.endswith("reduce_package_graph_module")]
    assert (use.verdict, use.reason) == ("unknown", "runs Python text from the file")
    hostile = graph(path, b"import os\nos.system('id')\ndef forward(self, x):\n    return x\n")
    assert hostile.trust == "hostile"
    assert graph(path, b"\ndef forward(self, x):\n    return eval(x)\n").trust == "hostile"


def test_a_graph_whose_text_is_not_in_the_package(path: Path) -> None:
    graph(path)
    gone = with_data(path, lambda name, data: None if name.endswith("/_0.py") else data)
    assert read(gone).trust == "hostile"


def test_what_the_importer_is_told_to_call_is_judged_by_what_it_is_given(path: Path) -> None:
    export(path, weights={"a": torch.ones(2)})
    reduced = lambda name, *args: (  # noqa: E731
        b"\x80\x03(X\x0e\0\0\0reduce_packageK\x01" + name + b"(" + b"".join(args) + b"ttQ."
    )
    for data, trust in (
        (reduced(b"cmine\nmake\n", b"K\x01"), "needs_trust"),
        (reduced(b"cbuiltins\ngetattr\n", b"X\x0d\0\0\0import_module"), "hostile"),
        (reduced(b"cos\nsystem\n"), "hostile"),
        (reduced(b"cfunctools\nreduce\n", b"]"), "hostile"),
    ):
        assert read(with_data(path, lambda n, d, data=data: data if n == "held/weights.pkl" else d)).trust == trust


def test_sources_need_trust(path: Path) -> None:
    export(path, weights=nn.Linear(3, 2).state_dict())
    checkpoint = read(with_data(path, lambda name, data: data, more=[("package/mine.py", b"import os\n")]))
    assert checkpoint.trust == "needs_trust"
    assert [(part.kind, part.name, part.where) for part in checkpoint.unvouched] == [
        ("code", "Python source", ("mine.py",))
    ]


def test_a_storage_without_its_record(path: Path) -> None:
    export(path, weights=nn.Linear(3, 2).state_dict())
    with pytest.raises(CorruptError, match=r"no record .data/0.storage") as caught:
        formats.read(with_data(path, lambda name, data: None if name == ".data/0.storage" else data))
    assert caught.value.where == "held/weights.pkl"


@pytest.mark.parametrize("pid", [b"K\x01", b"(X\x01\x00\x00\x00xt", b"(K\x01K\x02K\x03t"])
def test_odd_persistent_ids(pid: bytes, path: Path) -> None:
    export(path, weights={"a": torch.ones(2)})
    with pytest.raises(CorruptError, match="neither a storage nor an object of the package"):
        formats.read(
            with_data(path, lambda name, data: b"\x80\x03" + pid + b"Q." if name == "held/weights.pkl" else data)
        )


def test_a_script_that_is_not_there(path: Path) -> None:
    export(path, weights={"a": torch.ones(2)})
    pickle = (
        b"\x80\x03(X\x0e\x00\x00\x00reduce_packageK\x01ctorch.jit._script\nunpackage_script_module\n"
        b"X\x01\x00\x00\x007\x85tQ."
    )
    with pytest.raises(CorruptError, match=r"no record '\.data/ts_code/7/data\.pkl'"):
        formats.read(with_data(path, lambda name, data: pickle if name == "held/weights.pkl" else data))


def test_truncation_at_every_record(net: nn.Module, path: Path) -> None:
    export(path, intern=("packaged_net",), model=net)
    assert_refused_when_cut(path)
