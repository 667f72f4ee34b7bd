"""Verdicts on names: what runs, imports or opens is dangerous; what is merely unknown is not accused."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import io
import pathlib
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from ckptkit import formats
from ckptkit.pickling.inert import Global
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.trust import assess, global_uses

Save = Callable[..., Path]


def verdict(module: str, name: str) -> str:
    return assess(Global(module, name)).verdict


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter_with_state"),
        ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "FloatStorage"), ("torch.cuda", "HalfStorage"),
        ("torch", "bfloat16"), ("torch", "Size"), ("torch", "device"), ("torch.storage", "UntypedStorage"),
        ("torch.nn.parameter", "Parameter"),
    ],
)  # fmt: skip
def test_torchs_own(module: str, name: str) -> None:
    assert verdict(module, name) == "torch"


@pytest.mark.parametrize(
    ("module", "name"),
    [("collections", "OrderedDict"), ("collections", "Counter"), ("_codecs", "encode"), ("builtins", "set"),
     ("__builtin__", "unicode"), ("__builtin__", "long"), ("builtins", "complex")],
)  # fmt: skip
def test_plain_containers(module: str, name: str) -> None:
    assert verdict(module, name) == "allowed"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("nt", "system"), ("os.path", "join"), ("subprocess", "Popen"),
        ("builtins", "eval"), ("__builtin__", "exec"), ("builtins", "__import__"), ("builtins", "open"),
        ("importlib", "import_module"), ("importlib.util", "find_spec"), ("sys", "modules"), ("socket", "socket"),
        ("pickle", "loads"), ("_pickle", "loads"), ("marshal", "loads"), ("runpy", "run_path"), ("pty", "spawn"),
        ("shutil", "rmtree"), ("webbrowser", "open"), ("urllib.request", "urlopen"), ("ctypes", "CDLL"),
        ("io", "open"), ("_io", "FileIO"), ("types", "CodeType"), ("operator", "attrgetter"), ("code", "interact"),
        ("torch", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes"), ("torch.jit", "load"),
        ("torch.utils.cpp_extension", "load"), ("torch.utils.collect_env", "run"), ("numpy", "load"),
        ("numpy.testing._private.utils", "runstring"), ("dill._dill", "_create_function"), ("imp", "load_source"),
        ("cloudpickle.cloudpickle", "_make_function"), ("logging.config", "dictConfig"), ("commands", "getoutput"),
        ("distutils.spawn", "spawn"), ("setuptools.command.install", "install"),
    ],
)  # fmt: skip
def test_what_runs_imports_or_opens(module: str, name: str) -> None:
    assert verdict(module, name) == "dangerous"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__.get"),
        ("collections", "OrderedDict.__reduce__"),
        ("torch.serialization", "os.system"),
        ("torch.serialization", "os"),
        ("mine.utils", "np.os.popen"),
        ("mine", "Net.__init__.__globals__"),
        ("mine", "__builtins__"),
        ("builtins", "__build_class__"),
        ("torch", "serialization.pickle.loads"),
    ],
)
def test_modules_and_internals_reached_through_attributes(module: str, name: str) -> None:
    assert verdict(module, name) == "dangerous"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("models.resnet", "ResNet"), ("__main__", "Net"), ("torch.nn.modules.linear", "Linear"),
        # A user's own modules may be called as one of the standard library is.
        ("code.models", "Net"), ("code", "Net"), ("test.models", "Net"), ("types_.net", "Net"), ("imp.networks", "Net"),
        ("nt.layers", "Dense"), ("commands.train", "Config"), ("profile.model", "Net"), ("trace.net", "Net"),
        ("osmodel", "Net"), ("system.net", "Net"), ("picklenet", "Net"), ("socketmodels", "Net"), ("iou", "Loss"),
        ("mine", "Outer.Inner"), ("mine", "_private"), ("mine", "__mangled"), ("mine", "OS"), ("mine", "Evaluate"),
        # Seen in honest checkpoints.
        ("builtins", "getattr"), ("__builtin__", "getattr"), ("builtins", "object"), ("builtins", "print"),
        ("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("functools", "partial"),
        ("torch._dynamo.eval_frame", "OptimizedModule"), ("torch.fx.graph_module", "reduce_graph_module"),
        ("torch.fx.experimental.proxy_tensor", "PythonKeyTracer"), ("distutils.version", "LooseVersion"),
        ("setuptools._distutils.version", "LooseVersion"), ("_io", "BytesIO"), ("io", "StringIO"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy", "dtype"), ("numpy.random._pickle", "__randomstate_ctor"),
        ("pathlib", "PosixPath"), ("argparse", "Namespace"), ("pandas.core.frame", "DataFrame"),
        ("torch.distributed.fsdp.api", "StateDictType"), ("torch._utils", "_other"), ("torch._utils", "rebuild_"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_not_accused(module: str, name: str) -> None:
    assert verdict(module, name) == "unknown"


HONEST = {
    "namespace": argparse.Namespace(lr=0.1),
    "path": pathlib.PurePosixPath("a/b"),
    "array": numpy.arange(3),
    "scalar": numpy.float64(1),
    "random state": numpy.random.RandomState(0),
    "generator": numpy.random.default_rng(0),
    "python random": random.Random(0),
    "partial": functools.partial(int, base=2),
    "datetime": datetime.datetime(2020, 1, 1),
    "bytes io": io.BytesIO(b"x"),
    "deque": collections.deque([1]),
    "module": torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU()),
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 1),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", HONEST)
def test_honest_objects_hold_no_dangerous_name(name: str, protocol: int) -> None:
    class Storages(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return "storage" if isinstance(obj, (torch.UntypedStorage, torch.storage.TypedStorage)) else None

    buffer = io.BytesIO()
    Storages(buffer, protocol).dump(HONEST[name])
    uses = global_uses(read_pickle(buffer.getvalue()).globals)
    assert [use.name for use in uses if use.verdict == "dangerous"] == []


def test_uses_are_listed_in_order_with_their_counts() -> None:
    uses = global_uses(read_pickle(pickle.dumps([collections.OrderedDict(), argparse.Namespace(), set,
                                                 collections.OrderedDict()], 2)).globals)  # fmt: skip
    assert [(use.name, use.verdict, use.count) for use in uses] == [
        ("collections.OrderedDict", "allowed", 2),
        ("argparse.Namespace", "unknown", 1),
        ("__builtin__.set", "allowed", 1),
    ]


def test_the_trust_of_a_file_is_that_of_its_worst_name(save: Save) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return eval, ("1",)

    weights = torch.nn.Linear(1, 1).state_dict()
    for extra, trust in ((1, "safe"), (argparse.Namespace(a=1), "needs_trust"), (Payload(), "hostile")):
        checkpoint, file = formats.read(save({"model": weights, "extra": extra}))
        file.close()
        assert checkpoint.trust == trust
        assert list(checkpoint.state_dict) == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
def test_what_torchs_weights_only_loader_accepts_is_safe_here(save: Save) -> None:
    value = {"w": torch.ones(2), "p": torch.nn.Parameter(torch.ones(1)), "s": {1, 2}, "b": b"x",
             "size": torch.Size([1]), "dtype": torch.float16, "device": torch.device("cpu"),
             "c": collections.Counter("ab"),
             "f8": torch.ones(2).to(torch.float8_e5m2), "sparse": torch.eye(2).to_sparse()}  # fmt: skip
    path = save(value)
    torch.load(path, weights_only=True)
    checkpoint, file = formats.read(path)
    file.close()
    assert {use.name for use in checkpoint.globals if use.verdict not in ("torch", "allowed")} == set()
    assert checkpoint.trust == "safe"
