"""One pass over a file: its hashes, and what is known of it, against torch and hashlib."""

from __future__ import annotations

import gc
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import CkptkitError, CorruptError, LimitError, MissingFileError, UnknownFormatError
from ckptkit.formats.torch_archive import TorchArchive
from ckptkit.released import reading
from ckptkit.released.examine import Examined, examine_file
from ckptkit.released.selection import size_of
from ckptkit.transfer.workers import each_file

Save = Callable[..., Path]
FIXTURES = Path(__file__).parents[2] / "fixtures"


def examined(path: Path, *, threads: int = 2) -> Examined:
    return examine_file(str(path), hash_file=True, digest=True, values=True, threads=threads)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_training_checkpoint(ddp_resume: Path) -> None:
    found = examined(ddp_resume)
    assert (found.path, found.size, found.sha256) == (str(ddp_resume), ddp_resume.stat().st_size, sha256(ddp_resume))
    assert (found.format, found.kind, found.trust) == ("torch-zip", "resume", "needs_trust")
    assert found.has_pickle
    assert found.has_optimizer
    assert found.prefixes == ("module.",)
    assert found.locations == ("cpu", "cuda:0", "cuda:1")
    assert {use.name for use in found.globals} >= {"argparse.Namespace"}
    assert {finding.code for finding in found.findings} >= {"module-prefix", "foreign-objects"}
    assert found.architecture is None
    state = torch.load(ddp_resume, map_location="cpu", weights_only=False)["state_dict"]
    assert [fact.name for fact in found.tensors] == sorted(name.removeprefix("module.") for name in state)
    buffers = {fact.name for fact in found.tensors if not fact.is_parameter}
    assert {name.rpartition(".")[2] for name in buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    for fact in found.tensors:
        tensor = state[f"module.{fact.name}"]
        assert (fact.shape, fact.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert (fact.nan, fact.inf) == (0, 0)


def test_only_what_is_asked_for_is_read(ddp_resume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ckptkit.released.examine.read_through")
    found = examine_file(str(ddp_resume), hash_file=False, digest=False, values=False, checksums=False)
    assert (found.sha256, found.content_digest, found.tensors[0].digest, found.tensors[0].nan) == (None,) * 4
    assert found.size == ddp_resume.stat().st_size


@pytest.mark.parametrize("threads", [1, 2])
def test_each_byte_is_read_once(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"{i}.w": torch.randn(1000, 999) for i in range(12)}  # 48 MB: more than one thread is worth
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    spans: list[tuple[int, int]] = []
    original = SourceFile.read_into

    def counted(self: SourceFile, offset: int, buffer: memoryview) -> None:
        spans.append((offset, len(buffer)))
        original(self, offset, buffer)

    monkeypatch.setattr(SourceFile, "read_into", counted)
    found = examined(path, threads=threads)
    assert sum(nbytes for _, nbytes in spans) == path.stat().st_size
    assert found.sha256 == sha256(path)
    for fact in found.tensors:
        assert fact.digest == f"sha256:{hashlib.sha256(state[fact.name].numpy().tobytes()).hexdigest()}"
    spans.clear()
    alone = examine_file(str(path), hash_file=False, digest=True, values=False)
    assert alone.content_digest == found.content_digest
    assert sum(nbytes for _, nbytes in spans) == sum(fact.nbytes for fact in found.tensors)


def test_overlapping_views_have_digests_of_their_own(save: Save) -> None:
    base = torch.arange(1000, dtype=torch.float32)
    state = {"whole": base, "tail": base[10:], "middle": base[5:900], "one": base[7], "empty": base[3:3]}
    for fact in examined(save(state)).tensors:
        expected = hashlib.sha256(state[fact.name].clone().numpy().tobytes()).hexdigest()
        assert fact.digest == f"sha256:{expected}"


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "complex64", "complex128"]
)
@pytest.mark.parametrize("is_strided", [False, True])
def test_nan_and_inf_are_counted(dtype: str, is_strided: bool, save: Save) -> None:
    values = torch.tensor([1.0, math.nan, math.inf, -math.inf, math.nan, -math.nan, 0.0, -1.0])
    if dtype.startswith("complex"):
        tensor = torch.complex(values.double(), torch.zeros(8).double()).to(getattr(torch, dtype))
        expected = (3, 2)
    else:
        tensor = values.to(getattr(torch, dtype))
        plain = tensor.to(torch.float32)
        expected = (int(plain.isnan().sum()), int(plain.isinf().sum()))
        assert expected[0] >= 3
    if is_strided:
        tensor = torch.stack([tensor, tensor], 1).t()[0] if tensor.element_size() > 1 else tensor[:]
    (fact,) = examined(save({"w": tensor})).tensors
    assert (fact.nan, fact.inf) == expected


def test_pieces_that_end_inside_an_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE_NBYTES", 7)
    state = {"a": torch.tensor([math.nan, 1.0, math.inf, 2.0, math.nan]), "b": torch.tensor([1, 2, 3])}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    found = examined(path)
    assert [(fact.nan, fact.inf) for fact in found.tensors] == [(2, 1), (0, 0)]
    assert found.sha256 == sha256(path)
    assert found.tensors[0].digest == f"sha256:{hashlib.sha256(state['a'].numpy().tobytes()).hexdigest()}"


@pytest.mark.filterwarnings("ignore:.*experimental and many operators:UserWarning")
@pytest.mark.parametrize(("name", "counted"), [("complex32", None), ("bits8", None), ("float4_e2m1fn_x2", 0)])
def test_values_numpy_does_not_know_are_not_counted(save: Save, name: str, counted: int | None) -> None:
    """But those of 4 bits are counted: no pattern of them is NaN or infinite."""
    tensor = torch.zeros(4, dtype=torch.uint8).view(getattr(torch, name))
    (fact,) = examined(save({"w": tensor})).tensors
    assert (fact.nan, fact.inf) == (counted, counted)
    assert fact.digest is not None


def test_a_sharded_checkpoint_is_all_its_files() -> None:
    index = FIXTURES / "model.safetensors.index.json"
    found = examined(index)
    assert found.sha256 == sha256(index)
    assert [(s.name, s.size, s.sha256) for s in found.shards] == [
        (path.name, path.stat().st_size, sha256(path)) for path in sorted(FIXTURES.glob("model-0*.safetensors"))
    ]
    assert found.size == index.stat().st_size + sum(shard.size for shard in found.shards)
    assert not found.has_pickle
    assert all(fact.digest for fact in found.tensors)


def test_a_known_architecture(save: Save) -> None:
    from torchvision.models import resnet18

    found = examine_file(str(save(resnet18(num_classes=10).state_dict())), hash_file=False, digest=False, values=False)
    assert found.architecture is not None
    assert (found.architecture.reference, found.architecture.args) == ("torchvision:resnet18", {"num_classes": 10})
    state = resnet18().state_dict()
    del state["fc.bias"]
    other = examine_file(str(save(state)), hash_file=False, digest=False, values=False)
    assert other.architecture is None


def test_what_is_in_a_file(save: Save) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = examined(save(model.state_dict()))
    assert (plain.has_optimizer, plain.prefixes, plain.locations, plain.trust) == (False, (), ("cpu",), "safe")
    resumed = examined(save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    assert resumed.has_optimizer  # without a single tensor of its own
    compiled = examined(save({"_orig_mod.a": torch.ones(1), "layer._orig_mod.b": torch.ones(1)}, device="cuda:2"))
    assert compiled.prefixes == ("_orig_mod.",)
    assert compiled.locations == ("cuda:2",)
    whole = examined(save(model))
    assert {fact.name: fact.is_parameter for fact in whole.tensors} == {"weight": True, "bias": True}


def test_several_in_the_order_given(save: Save, tmp_path: Path) -> None:
    big = save({"w": torch.zeros(9 << 20)}, "big.pth")
    small = save({"w": torch.zeros(1)}, "small.pth")
    (tmp_path / "no.pth").write_text("<html>")

    def look(number: int, threads: int) -> Examined | CkptkitError:
        try:
            return examine_file(paths[number], hash_file=True, digest=True, values=False, threads=threads)
        except CkptkitError as error:
            return error

    paths = [str(small), str(tmp_path / "missing.pth"), str(big), str(tmp_path / "no.pth"), str(small)]
    results = each_file([size_of(path) for path in paths], look)
    assert [type(result) for result in results] == [
        *(Examined, MissingFileError, Examined, UnknownFormatError, Examined)
    ]
    assert [result.path for result in results if isinstance(result, Examined)] == paths[::2]
    assert results[2].sha256 == sha256(big)
    assert each_file([], look) == []


def test_what_was_read_is_gone_without_the_collector(save: Save) -> None:
    """A check of many files keeps it from looking, and must not pile them up meanwhile."""
    path = str(save(torch.nn.Linear(2, 2).state_dict()))
    gc.collect()
    gc.disable()
    try:
        examine_file(path, hash_file=True, digest=True, values=True, whole=True)
        assert not [each for each in gc.get_objects() if type(each) in (TorchArchive, Checkpoint)]
    finally:
        gc.enable()


def test_nothing_is_found_out_that_no_rule_asks_for(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"module.w": torch.ones(2)})
    for name in ("identify", "diagnose"):
        monkeypatch.delattr(f"ckptkit.released.examine.{name}")
    assert ckptkit.check(path).ok
    assert ckptkit.check(path, no_nan=True, allow_dtype="float32", max_trust="safe", location="cpu").ok
    with pytest.raises(NameError, match="diagnose"):  # which says whether the prefix can come off
        ckptkit.check(path, no_prefix=True)
    with pytest.raises(NameError, match="identify"):
        ckptkit.manifest(path)


def test_a_file_that_changes_meanwhile(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"w": torch.zeros(100)})
    original = SourceFile.read_into

    def touched(self: SourceFile, offset: int, buffer: memoryview) -> None:
        original(self, offset, buffer)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(SourceFile, "read_into", touched)
    with pytest.raises(CorruptError, match="changed while it was being read"):
        examined(path)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_read_that_fails_is_told(threads: int, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"w": torch.zeros(9 << 20)})

    def short(self: SourceFile, offset: int, buffer: memoryview) -> None:
        if offset > 2 << 20:
            raise CorruptError("the file became shorter while it was being read", path=self.path)

    monkeypatch.setattr(SourceFile, "read_into", short)
    with pytest.raises(CorruptError, match="became shorter"):
        examined(path, threads=threads)


def test_a_few_bytes_cannot_ask_for_terabytes(save: Save) -> None:
    state = {str(i): torch.zeros(1).expand(1 << 40) for i in range(2)}
    with pytest.raises(LimitError, match="repeat those of the file"):
        examined(save(state))
    found: Examined | CkptkitError = examine_file(str(save(state)), hash_file=True, digest=False, values=False)
    assert found.tensors[0].nbytes == 4 << 40
