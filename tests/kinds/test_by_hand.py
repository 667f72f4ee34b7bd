"""Trees that this torch does not write: modules of old versions, and hostile ones."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest

from ckptkit.checkpoint import STATE_DICT, Checkpoint, TensorEntry
from ckptkit.errors import CorruptError, LimitError
from ckptkit.limits import Limits
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.modules import module_state, walk_module, wrapper_prefixes
from ckptkit.normalize.shapes import named_values, parts, tensor_at_a_glance
from ckptkit.pickling.inert import ABSENT, Global, InertDict, InertSet, Object, children

Module = Callable[..., Object]
Normalized = Callable[..., Checkpoint]


def ordered(*pairs: tuple[object, object]) -> Object:
    """An OrderedDict as Python 2 pickled it: its pairs are an argument."""
    return Object("reduce", Global("collections", "OrderedDict"), ([list(pair) for pair in pairs],))


def made(module: str, name: str, *args: object, how: Any = "reduce", state: object = ABSENT) -> Object:
    node = Object(how, Global(module, name), args)
    node.state = state
    return node


# Modules of old versions.


def old_module(parameters: Object, buffers: Object, children: Object) -> Object:
    backend = made("torch.nn.backends.thnn", "_get_thnn_function_backend")
    return made("model", "Net", how="newobj", state=InertDict([
        ("_backend", backend), ("_parameters", parameters), ("_buffers", buffers), ("_backward_hooks", ordered()),
        ("_forward_hooks", ordered()), ("_forward_pre_hooks", ordered()), ("_modules", children), ("training", True),
    ]))  # fmt: skip


def test_modules_before_0_4(entry: TensorEntry, normalized: Normalized) -> None:
    # OrderedDicts everywhere; what stands among the parameters is one, even where the pickle does not say so.
    mean = ordered(("mean", entry), ("none", None))
    inner = old_module(ordered(("weight", entry), ("none", None)), mean, ordered())
    odd = made("torch.nn.parameter", "Parameter", [entry])
    root = old_module(ordered(("first", entry), ("odd", odd)), ordered(), ordered(("inner", inner), ("gone", None)))
    checkpoint = normalized(root)
    assert checkpoint.origin.kind == "whole_model"
    assert [(name, value.is_parameter) for name, value in checkpoint.state_dict.items()] == [
        ("first", True),
        ("inner.weight", True),
        ("inner.mean", False),
    ]
    assert list(checkpoint.state_dict.extra) == ["odd"]


def test_modules_before_buffers_could_be_transient(entry: TensorEntry, module_node: Module) -> None:
    node = module_node(buffers=[("kept", entry), ("dropped", entry)])
    assert [name for name, _ in walk_module(node)] == ["kept", "dropped"]
    for members in (InertSet(["dropped"]), made("__builtin__", "set", ["dropped"])):
        node.state.pairs[3:] = [("_non_persistent_buffers_set", members)]
        node.state = InertDict(node.state.pairs)
        assert [name for name, _ in walk_module(node)] == ["kept"]


@pytest.mark.parametrize(
    "function", ["reduce_graph_module", "reduce_package_graph_module", "reduce_deploy_graph_module"]
)
def test_graph_modules_however_they_are_made(
    entry: TensorEntry, module_node: Module, normalized: Normalized, function: str
) -> None:
    body = module_node(parameters=[("w", entry)]).state
    given = {
        "reduce_graph_module": (body, "import os"),
        "reduce_package_graph_module": (made("torch.package", "importer"), body, "fx-generated._0"),
        "reduce_deploy_graph_module": (made("torch.package", "importer"), body, "import os"),
    }[function]
    checkpoint = normalized(made("torch.fx.graph_module", function, *given))
    assert checkpoint.origin.kind == "whole_model"
    assert list(checkpoint.state_dict) == ["w"]


def test_compiled_modules_of_torch_2_0(entry: TensorEntry, module_node: Module) -> None:
    inner = module_node(parameters=[("w", entry)])
    outer = module_node([("_orig_mod", inner)])
    outer.cls = Global("torch._dynamo.eval_frame", "OptimizedModule")
    assert [name for name, _ in walk_module(outer)] == ["_orig_mod.w"]
    assert wrapper_prefixes(outer) == [("torch._dynamo.eval_frame.OptimizedModule", "_orig_mod.")]
    assert module_state(made("torch._dynamo.eval_frame", "OptimizedModule", InertDict())) is None
    assert module_state(made("torch._dynamo.eval_frame", "OptimizedModule")) is None
    assert module_state(made("elsewhere", "OptimizedModule", inner)) is None


def test_packed_weights_of_a_class_that_is_not_known_are_given_whole(
    entry: TensorEntry, normalized: Normalized
) -> None:
    packed = made("torch", "ScriptObject", how="newobj", state=((1, [entry]), "__torch__.torch.classes.x.Y"))
    state = InertDict(
        [("_parameters", InertDict()), ("_buffers", InertDict()), ("_modules", InertDict()), ("p", packed)]
    )
    checkpoint = normalized(made("torch.ao.nn.quantized.modules.new", "New", how="newobj", state=state))
    assert list(checkpoint.state_dict.extra) == ["p"]
    assert [finding.code for finding in checkpoint.findings] == ["not-a-plain-tensor"]


def test_a_quantized_convolution_with_another_tuple_is_no_module(entry: TensorEntry, normalized: Normalized) -> None:
    for state in ((entry, 3), (), (entry,) * 14):
        node = made("torch.ao.nn.quantized.modules.conv", "Conv2d", how="newobj", state=state)
        assert module_state(node) is None
        assert normalized(node).origin.kind == ("collection" if state else "other")


def test_an_old_ordered_dict_loses_nothing_when_written(entry: TensorEntry, normalized: Normalized) -> None:
    checkpoint = normalized(ordered(("w", entry), ("v", entry)))
    assert list(checkpoint.state_dict) == ["w", "v"]
    lowered = lower_state_dict(checkpoint.state_dict)
    assert isinstance(lowered, Object)
    assert lowered.args == ()
    assert lowered.pairs == [("w", entry), ("v", entry)]


# Modules no program would save.


def test_a_module_that_contains_itself(entry: TensorEntry, module_node: Module, normalized: Normalized) -> None:
    inner = module_node()
    outer = module_node([("inner", inner)], [("w", entry)])
    inner.state.pairs[2][1].pairs.append(("outer", outer))  # type: ignore[attr-defined]
    with pytest.raises(CorruptError, match=r"module 'inner\.outer' contains itself"):
        normalized(outer)


@pytest.mark.parametrize(
    "cls",
    [
        ("mmcv.parallel.distributed", "MMDistributedDataParallel"),
        ("apex.parallel.distributed", "DistributedDataParallel"),
        ("torch.nn.parallel.distributed_cpu", "DistributedDataParallelCPU"),
    ],
)
def test_wrappers_of_other_libraries(entry: TensorEntry, module_node: Module, cls: tuple[str, str]) -> None:
    node = module_node([("module", module_node(parameters=[("w", entry)]))])
    node.cls = Global(*cls)
    assert wrapper_prefixes(node) == [(".".join(cls), "module.")]
    node.state.pairs[2][1].pairs.append(("other", module_node()))  # type: ignore[attr-defined]
    assert wrapper_prefixes(node) == []


def test_wrappers_without_end(module_node: Module) -> None:
    node = module_node()
    node.cls = Global("torch.nn.parallel.data_parallel", "DataParallel")
    node.state.pairs[2][1].pairs.append(("module", node))  # type: ignore[attr-defined]
    assert len(wrapper_prefixes(node)) == 1000


def test_modules_nested_without_end(module_node: Module) -> None:
    node = module_node()
    for _ in range(999):
        node = module_node([("m", node)])
    assert list(walk_module(node)) == []
    with pytest.raises(LimitError, match="modules inside modules"):
        list(walk_module(module_node([("m", node)])))


def test_modules_shared_until_they_explode(
    entry: TensorEntry, module_node: Module, normalized: Normalized, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptkit.normalize.modules.DEFAULT_LIMITS", Limits(entries=10_000))
    node = module_node([], [("w", entry)])
    for _ in range(40):
        node = module_node([("a", node), ("b", node)])
    with pytest.raises(LimitError, match="modules and tensors in a model"):
        collections.deque(walk_module(node), maxlen=0)
    with pytest.raises(LimitError, match="modules and tensors in a model"):
        normalized(InertDict([("model", node), ("ema", module_node([("a", node)]))]))


def test_names_that_grow_without_end(module_node: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptkit.normalize.modules.DEFAULT_LIMITS", Limits(pickle_nbytes=1_000_000))
    node = module_node()
    for _ in range(900):
        node = module_node([("m" * 100_000, node)])
    with pytest.raises(LimitError, match="characters of names"):
        list(walk_module(node))


# What nodes look like.


def test_parts_name_everything_below_a_node(entry: TensorEntry) -> None:
    node = made("m", "C", "first", entry, state=(InertDict([("a", 1)]), InertDict([("b", 2)])))
    node.items, node.pairs = ["item"], [("key", "value")]
    assert parts(node) == [(0, "first"), (1, entry), (0, "item"), ("key", "value"), ("a", 1), ("b", 2)]
    assert {id(child) for child in children(node) if not isinstance(child, (str, Global, tuple))} <= {id(entry)}
    assert parts(made("m", "C", state="text")) == [(0, "text")]
    assert parts(made("m", "C")) == []
    assert parts(entry) == parts(3) == parts(InertSet([entry])) == []
    assert parts(["a", entry, 3]) == [(1, entry)]


def test_named_values_of_each_node(entry: TensorEntry) -> None:
    pairs: list[tuple[object, object]] = [("a", entry), ("b", 3)]
    assert named_values(InertDict(pairs)) == pairs
    assert named_values(ordered(*pairs)) == pairs
    assert named_values(pairs) == named_values(tuple(pairs)) == named_values([list(pair) for pair in pairs]) == pairs
    for other in (
        [],
        (),
        [1],
        [("a",)],
        [(1, 2)],
        [("a", 1), ("a", 2)],
        [("a", 1), ["b", 2]],
        made("m", "C"),
        entry,
        3,
    ):
        assert named_values(other) is None


def test_the_marker_stands_where_the_weights_were(entry: TensorEntry, normalized: Normalized) -> None:
    weights = InertDict([("w", entry)])
    holder = made("argparse", "Namespace", state=InertDict([("model", weights), ("again", [weights])]))
    checkpoint = normalized(holder)
    assert checkpoint.origin.state_path == "model"
    rest = checkpoint.rest
    assert isinstance(rest, Object)
    assert isinstance(rest.state, InertDict)
    assert rest.state["model"] is STATE_DICT
    assert rest.state["again"] == [STATE_DICT]


def test_a_glance_for_a_tensor(entry: TensorEntry) -> None:
    many: list[object] = [[0] for _ in range(100)]
    chain: object = entry
    for _ in range(100):
        chain = [chain]
    cycle: list[object] = []
    cycle.append(cycle)
    for node, seen in (
        (entry, True), (entry.storage, True), ([1, [entry]], True), (InertDict([("a", entry), *[("b", 1)] * 99]), True),
        (InertDict([(entry, 1)]), True), (made("m", "C", entry), True), (made("m", "C", state=(entry,)), True),
        ([], False), ("text", False), (InertDict([("a", [1, (2, None)])]), False), (made("m", "C", 1), False),
        ([*many, entry], None), ([0] * 100, None), (chain, None), (InertSet([entry]), None), (cycle, None),
    ):  # fmt: skip
        assert tensor_at_a_glance(node) is seen, node
