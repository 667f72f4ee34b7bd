"""Verdicts on names: what runs, imports or opens is dangerous; what is merely unknown is not accused."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import io
import itertools
import pathlib
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.generated_tensors import STORABLE

from ckptkit import formats
from ckptkit.checkpoint import GRAVITY, GlobalUse, trust_of
from ckptkit.pickling.inert import Global
from ckptkit.pickling.reader import read_pickle
from ckptkit.pickling.trust import assess, global_uses, merge_uses, with_places

Save = Callable[..., Path]


def verdict(module: str, name: str) -> str:
    return assess(Global(module, name)).verdict


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter_with_state"),
        ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "FloatStorage"), ("torch.cuda", "HalfStorage"),
        ("torch", "bfloat16"), ("torch", "Size"), ("torch", "device"), ("torch.storage", "UntypedStorage"),
        ("torch.nn.parameter", "Parameter"), ("torch.jit._pickle", "build_intlist"), ("torch", "strided"),
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
        ("torch._utils", "_rebuild_anything"), ("mine.enums", "Kind.signal"), ("mine.resource", "Pool"),
        ("http", "HTTPStatus"), ("signal", "Signals"), ("inspect", "Signature"), ("re", "_compile"),
        ("torch.distributed.checkpoint.metadata", "Metadata"), ("torch.optim.adam", "Adam"),
        ("sklearn.linear_model._logistic", "LogisticRegression"), ("pandas.core.indexes.base", "_new_Index"),
        ("transformers.training_args", "TrainingArguments"), ("transformers_modules.mine.modeling", "Net"),
        ("lightning.pytorch.callbacks.model_checkpoint", "ModelCheckpoint"), ("omegaconf.dictconfig", "DictConfig"),
        ("pkg_resources.extern.packaging.version", "Version"), ("fairseq.data.dictionary", "Dictionary"),
        ("\uff4dodels", "\uff2eet"), ("modèles", "Réseau"),
        # Classes of packages that are listed otherwise, and what makes plain objects.
        ("joblib.numpy_pickle", "NumpyArrayWrapper"), ("joblib.numpy_pickle", "NDArrayWrapper"),
        ("joblib.numpy_pickle", "ZNDArrayWrapper"), ("joblib.numpy_pickle_compat", "ZNDArrayWrapper"),
        ("sklearn.externals.joblib.numpy_pickle", "NumpyArrayWrapper"), ("copyreg", "__newobj__"),
        ("copyreg", "__newobj_ex__"), ("copy_reg", "__newobj_ex__"), ("mine", "Net.__new__"),
        ("torch.testing._internal.common_utils", "TestCase"), ("torch.testing._internal.common_utils", "CrossRefMode"),
        ("torch.testing._internal.distributed.fake_pg", "FakeStore"),
        ("torch.testing._internal.common_nn", "_Net.Inner"),
        ("torch._dynamo.repro.after_dynamo", "WrapBackendDebug"), ("torch._dynamo.hooks", "Hooks"),
        ("torch._dynamo.backends.debugging", "eager"), ("typing", "ForwardRef"), ("sympy.core.symbol", "Symbol"),
        ("omegaconf.base", "ContainerMetadata"), ("networkx.classes.graph", "Graph"),
        ("mmengine.config.config", "ConfigDict"), ("ultralytics.nn.tasks", "DetectionModel"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("pandas.core.frame", "DataFrame.to_json"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_not_accused(module: str, name: str) -> None:
    assert verdict(module, name) == "unknown"


HONEST: dict[str, Any] = {
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
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), 1),
}  # fmt: skip


class WithKeywords:
    """Under protocol 2 and 3 made by ``functools.partial(cls.__new__, cls, …)()``."""

    def __new__(cls, number: int, *, scale: int = 1) -> WithKeywords:
        made = super().__new__(cls)
        made.value = (number, scale)  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        return (1,), {"scale": 2}


HONEST["new with keywords"] = WithKeywords(1)
HONEST["union of types"] = {"hint": int | None, "more": int | str | None}
HONEST["ufunc"] = numpy.add


@pytest.mark.parametrize(
    ("name", "protocol"), [(name, protocol) for name in HONEST for protocol in range(2 * (name == "bytes io"), 6)]
)
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


def test_every_name_that_torchs_weights_only_loader_accepts_is_safe_here() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    names = [qualified.rpartition(".") for qualified in _get_allowed_globals()]
    assert len(names) > 80
    assert [name for module, _, name in names if verdict(module, name) not in ("torch", "allowed")] == []


def loads_weights_only(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
def test_what_torchs_weights_only_loader_accepts_is_safe_here(save: Save) -> None:
    value = {"w": torch.ones(2), "p": torch.nn.Parameter(torch.ones(1)), "s": {1, 2}, "b": b"x",
             "size": torch.Size([1]), "dtype": torch.float16, "device": torch.device("cpu"),
             "c": collections.Counter("ab"),
             "sparse": torch.eye(2).to_sparse()}  # fmt: skip
    if "float8_e5m2" in STORABLE:
        value["f8"] = torch.ones(2).to(torch.float8_e5m2)
    accepted = {name: each for name, each in value.items() if loads_weights_only(save(each))}
    assert accepted == value or not hasattr(torch.serialization, "add_safe_globals")  # older ones know fewer names
    path = save(accepted)
    checkpoint, file = formats.read(path)
    file.close()
    assert {use.name for use in checkpoint.globals if use.verdict not in ("torch", "allowed")} == set()
    assert checkpoint.trust == "safe"


# Where.


def with_tree(data: bytes, record: str = "data.pkl") -> dict[str, tuple[str, ...]]:
    pickle = read_pickle(data)
    return {use.name: use.where for use in with_places(global_uses(pickle.globals, record), pickle.root)}


def test_places_are_the_keys_that_lead_to_a_name() -> None:
    value = {"args": argparse.Namespace(device=pathlib.PurePosixPath("a")), "epoch": 3, "o": collections.OrderedDict(),
             "deep": {"er": {"and": {"deeper": [pathlib.PurePosixPath("b")]}}}, 7: [datetime.timedelta(1)]}  # fmt: skip
    assert with_tree(pickle.dumps(value, 4)) == {
        "argparse.Namespace": ("data.pkl: args",),
        "pathlib.PurePosixPath": ("data.pkl: args", "data.pkl: deep.er.and"),
        "collections.OrderedDict": ("data.pkl",),
        "datetime.timedelta": ("data.pkl: 7",),
    }


def test_a_name_at_the_root_or_in_a_key_has_a_place_too() -> None:
    assert with_tree(pickle.dumps(argparse.Namespace(a=1), 4)) == {"argparse.Namespace": ("data.pkl",)}
    assert with_tree(pickle.dumps({"a": {datetime.timedelta(1): 1}}, 4)) == {"datetime.timedelta": ("data.pkl: a",)}
    assert with_tree(pickle.dumps(argparse.Namespace(a=1), 4), "") == {"argparse.Namespace": ()}


def test_places_are_a_handful_however_many_there_are_and_long_keys_are_cut() -> None:
    value = {f"{'k' * 1000}{i}": datetime.timedelta(i) for i in range(1000)}
    (where,) = with_tree(pickle.dumps(value, 4)).values()
    assert where == ("data.pkl: " + "k" * 80,)
    value = {f"k{i}": datetime.timedelta(i) for i in range(1000)}
    (where,) = with_tree(pickle.dumps(value, 4)).values()
    assert where == tuple(f"data.pkl: k{i}" for i in range(4))


@pytest.mark.parametrize(
    "data",
    [
        b"]" * 100_000 + b"cmine\nNet\n" + b"a" * 100_000 + b".",
        b"}K\x01" * 100_000 + b"cmine\nNet\n" + b"s" * 100_000 + b".",
        b"(]q\x00cmine\nNet\na" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(200)) + b"l.",
    ],
    ids=["lists", "dicts", "doubled"],
)
def test_places_in_trees_that_are_deep_or_shared(data: bytes) -> None:
    assert set(with_tree(data)) == {"mine.Net"}


def test_the_names_of_several_pickles_are_put_together() -> None:
    first = global_uses(read_pickle(pickle.dumps([argparse.Namespace(), set], 2)).globals, "data.pkl")
    second = global_uses(read_pickle(pickle.dumps([argparse.Namespace(), eval], 2)).globals, "other.pkl")
    assert [(use.name, use.verdict, use.count, use.where) for use in merge_uses(first, second)] == [
        ("argparse.Namespace", "unknown", 2, ("data.pkl", "other.pkl")),
        ("__builtin__.set", "allowed", 1, ("data.pkl",)),
        ("__builtin__.eval", "dangerous", 1, ("other.pkl",)),
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(GRAVITY, 3)))
def test_of_several_verdicts_the_gravest_counts_in_whatever_order(order: tuple[Any, ...]) -> None:
    uses = [
        GlobalUse(name="a.b", verdict=verdict, count=1, where=(verdict,), reason=f"as {verdict}") for verdict in order
    ]
    (merged,) = merge_uses(*([use] for use in uses))
    grave = max(order, key=lambda verdict: GRAVITY[verdict])
    assert (GRAVITY[merged.verdict], merged.count) == (GRAVITY[grave], 3)
    assert merged.where[0] == merged.verdict and merged.reason == f"as {merged.verdict}"
    assert set(merged.where) == set(order)
    assert trust_of(uses) == trust_of([merged]) == ("safe", "needs_trust", "hostile")[GRAVITY[grave]]


def test_the_gravest_verdict_on_a_name_counts() -> None:
    harmless, harmful = Global("builtins", "getattr"), Global("builtins", "getattr")
    harmful.offence = "reaches out"
    (use,) = merge_uses(global_uses([harmless]), global_uses([harmful]))
    assert (use.verdict, use.reason, use.count) == ("dangerous", "reaches out", 2)
