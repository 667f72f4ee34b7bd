"""What a file calls for its effect, through convert: state setters, cloudpickle's and dill's functions and classes."""

from __future__ import annotations

import collections
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit.checkpoint import TensorEntry
from ckptkit.pickling.inert import effects_of, walk


def put(target: Any, state: dict[str, object]) -> None:
    vars(target).update(state)


def put_tensor(target: torch.Tensor, state: dict[str, object]) -> None:
    target.note = state["note"]  # type: ignore[attr-defined]


class Average:
    """An average of weights that a setter restores."""

    def __init__(self, **state: object) -> None:
        vars(self).update(state)

    def __reduce__(self) -> Any:
        return Average, (), dict(vars(self)), None, None, put


class Noted(torch.Tensor):
    def __reduce_ex__(self, protocol: Any) -> Any:
        function, (rebuild, _, args, _) = torch.Tensor.__reduce_ex__(self, protocol)[:2]
        return function, (rebuild, Noted, args, None), {"note": self.note}, None, None, put_tensor


class NotedParameter(torch.nn.Parameter):
    """Pickled as a parameter, whose attribute a setter restores."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, args = torch.nn.Parameter(self.data).__reduce_ex__(protocol)
        return function, args, {"note": self.note}, None, None, put_tensor


class NotedDict(collections.OrderedDict[str, Any]):
    def __reduce__(self) -> Any:
        return NotedDict, (), dict(vars(self)), None, iter(self.items()), put


class Net(torch.nn.Module):
    """A module whose state a setter restores."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def __reduce__(self) -> Any:
        return Net, (), dict(vars(self)), None, None, put


def noted(cls: type, value: float) -> Any:
    tensor = torch.full((3,), value).as_subclass(cls) if cls is Noted else cls(torch.full((3,), value))
    tensor.note = torch.full((2,), -value)
    return tensor


def _average() -> dict[str, object]:
    shared = torch.arange(4.0)
    return {"state_dict": {"fc.weight": shared}, "ema": Average(shadow=[torch.ones(5), shared]), "epoch": 3}


def _subclass() -> dict[str, object]:
    return {"state_dict": {"fc.weight": torch.ones(2, 2), "fc.bias": noted(Noted, 2.0)}}


def _parameter() -> dict[str, object]:
    return {"fc.weight": torch.ones(2, 2), "fc.bias": noted(NotedParameter, 2.0)}


def _mapping(extra: object = 0.5) -> object:
    weights = NotedDict({"fc.weight": torch.ones(2, 2), "fc.bias": torch.zeros(2)})
    weights.extra = {"scale": extra}  # type: ignore[attr-defined]
    return weights


def _many() -> dict[str, object]:
    """So many tensors that most are read in one step each, effects among them."""
    weights = {f"layers.{index}.weight": torch.full((2,), float(index)) for index in range(150)}
    return {"state_dict": weights, "ema": Average(shadow=list(weights.values())), "tail": torch.ones(3)}


FILES: dict[str, Callable[[], object]] = {
    "an average": _average,
    "a tensor subclass": _subclass,
    "a parameter": _parameter,
    "a state_dict's class": _mapping,
    "a state_dict's class, with a tensor": lambda: _mapping(torch.full((7,), 0.5)),
    "many tensors": _many,
}


def flat(value: Any, seen: dict[int, int] | None = None) -> list[object]:
    """All that a loaded object holds, and which of its parts are one object."""
    seen = {} if seen is None else seen
    if isinstance(value, (str, int, float, type(None))):
        return [value]
    if id(value) in seen:
        return [("again", seen[id(value)])]
    seen[id(value)] = len(seen)
    told: list[object] = [type(value)]
    if isinstance(value, torch.Tensor):
        told += [value.dtype, value.detach().as_subclass(torch.Tensor).tolist(), value.requires_grad]
    elif isinstance(value, (list, tuple, dict)):
        told += [part for item in (value.items() if isinstance(value, dict) else value) for part in flat(item, seen)]
    return told + [part for item in getattr(value, "__dict__", {}).items() for part in flat(item, seen)]


@pytest.mark.parametrize("kind", FILES)
def test_a_pth_keeps_what_is_called_for_its_effect(
    kind: str, convert: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    source = save(FILES[kind](), device="cuda:0")
    done = convert(source, "out.pth", "--map-location", "cpu")
    assert done.code == 0, done.err
    out = tmp_path / "out.pth"
    expected = torch.load(source, map_location="cpu", weights_only=False)
    assert flat(torch.load(out, weights_only=False)) == flat(expected)
    with ckptkit.open(source) as before, ckptkit.open(out) as after:
        assert before.checkpoint.discarded == after.checkpoint.discarded == ()
        tagged = [_locations(opened.checkpoint) for opened in (before, after)]
        assert tagged[0].keys() == {"cuda:0"}
        assert tagged[1] == {"cpu": tagged[0]["cuda:0"]}


def _locations(checkpoint: Any) -> dict[str, int]:
    """How many tensors have each device tag, wherever they stand."""
    roots = [
        list(checkpoint.state_dict.everything.values()),
        checkpoint.rest,
        effects_of(checkpoint.state_dict.container),
    ]
    return dict(collections.Counter(node.location for node in walk(roots) if isinstance(node, TensorEntry)))


def test_what_a_setter_holds_is_cast_with_the_rest(
    convert: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    assert convert(save(_average()), "out.pth", "--dtype", "float16").code == 0
    loaded = torch.load(tmp_path / "out.pth", weights_only=False)
    shadow = loaded["ema"].shadow
    assert loaded["state_dict"]["fc.weight"].dtype == torch.float16
    assert shadow[1].data_ptr() == loaded["state_dict"]["fc.weight"].data_ptr()


def test_names_change_and_effects_stay(convert: Callable[..., Any], save: Callable[..., Path], tmp_path: Path) -> None:
    assert convert(save(_mapping()), "out.pth", "--add-prefix", "net.").code == 0
    loaded = torch.load(tmp_path / "out.pth", weights_only=False)
    assert list(loaded) == ["net.fc.weight", "net.fc.bias"]
    assert loaded.extra == {"scale": 0.5}


def test_diff_and_inspect_see_it(save: Callable[..., Path], tmp_path: Path) -> None:
    one, other = _average(), _average()
    other["ema"] = Average(shadow=[torch.full((5,), 9.0), other["state_dict"]])
    path = save(one, "one.pth")
    assert not ckptkit.diff(path, save(other, "other.pth"), strict=True).ok
    assert ckptkit.diff(path, path, strict=True).ok
    assert [5] in [tensor["shape"] for tensor in ckptkit.inspect(path)["tensors"]]


def test_a_module_that_a_setter_fills_is_one(save: Callable[..., Path]) -> None:
    net = Net()
    with ckptkit.open(save(net)) as checkpoint:
        assert checkpoint.kind == "whole_model"
        assert list(checkpoint.state_dict) == ["fc.weight", "fc.bias"]


# Functions and classes that a file keeps by their code.

_MODEL = """
    import torch

    def positive(x):
        return torch.relu(x) + 0.25 * helper(x)

    def helper(x, depth=2):
        return torch.tanh(x) if not depth else helper(x, depth - 1)

    class Block(torch.nn.Module):
        scale = 0.5

        def __init__(self, width):
            super().__init__()
            self.fc = torch.nn.Linear(width, width)

        def forward(self, x):
            return positive(self.fc(x)) * self.scale

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(3), Block(3)])
            self.owner = [self]

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.mean(x)

        @staticmethod
        def mean(x):
            return x.mean(-1)

        @classmethod
        def made(cls):
            return cls()

    """

_SAVE = """
    torch.manual_seed(0)
    net, x = Net.made(), torch.randn(4, 3)
    content = {"state_dict": net.state_dict(), "net": net, "x": x, "y": net(x).detach()}
    """

_LOAD = """
    import sys
    import torch

    for path in sys.argv[1:]:
        loaded = torch.load(path, weights_only=False)
        net = loaded["net"]
        assert type(net).__module__ not in sys.modules or type(net).__module__ == "__main__"
        assert torch.equal(net(loaded["x"]), loaded["y"])
        assert type(net).made()(loaded["x"]).shape == loaded["y"].shape
        assert net.owner[0] is net
        for name, value in net.state_dict().items():
            assert value.data_ptr() == loaded["state_dict"][name].data_ptr()
    """

_CLOUDPICKLE = """
    import sys
    import cloudpickle
    import torch
    import kept_by_value
    from kept_by_value import Net
    cloudpickle.register_pickle_by_value(kept_by_value)
    """

_DILL = """
    import sys
    import dill
    dill.settings["recurse"] = True
    """


@pytest.fixture
def run_code(python: Callable[..., Any]) -> Callable[..., None]:
    """``run_code(folder, code, ...)``: in a process of its own, which must end well."""

    def run(folder: Path, code: str, *arguments: object) -> None:
        quiet = "import warnings\nwarnings.simplefilter('ignore')\n"
        done = python("-c", quiet + code, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr

    return run


def _dedent(*parts: str) -> str:
    return "".join(map(textwrap.dedent, parts))


@pytest.mark.parametrize(("keeper", "protocol"), [("cloudpickle", 5), ("dill", 2)])
def test_a_model_kept_by_its_code_still_runs(
    keeper: str, protocol: int, convert: Callable[..., Any], run_code: Callable[..., None], tmp_path: Path
) -> None:
    pytest.importorskip(keeper)
    written = f'torch.save(content, "model.pth", pickle_module={keeper}, pickle_protocol={protocol})\n'
    making, elsewhere = tmp_path / "making", tmp_path / "elsewhere"
    making.mkdir()
    elsewhere.mkdir()
    if keeper == "cloudpickle":
        (making / "kept_by_value.py").write_text(_dedent(_MODEL))
        run_code(making, _dedent(_CLOUDPICKLE, _SAVE) + written)
    else:
        run_code(making, _dedent(_DILL, _MODEL, _SAVE) + written)
    source = making / "model.pth"
    done = convert(source, "out.pth", "--map-location", "cpu")
    assert done.code == 0, done.err
    assert convert("out.pth", "again.pth").code == 0
    run_code(elsewhere, _dedent(_LOAD), source, tmp_path / "out.pth", tmp_path / "again.pth")
    with ckptkit.open(source) as before, ckptkit.open("out.pth") as after:
        assert before.checkpoint.discarded == after.checkpoint.discarded == ()
        assert before.trust == after.trust == "needs_trust"
        assert _names(before.checkpoint) == _names(after.checkpoint)


def test_such_a_model_stays_one_where_it_is_all_of_the_file(
    convert: Callable[..., Any], run_code: Callable[..., None], tmp_path: Path
) -> None:
    pytest.importorskip("cloudpickle")
    (tmp_path / "kept_by_value.py").write_text(_dedent(_MODEL))
    run_code(
        tmp_path, _dedent(_CLOUDPICKLE, "net = Net.made()\ntorch.save(net, 'model.pth', pickle_module=cloudpickle)")
    )
    (tmp_path / "kept_by_value.py").unlink()
    assert convert("model.pth", "out.pth").code == 0
    run_code(
        tmp_path,
        """
import torch
one, other = (torch.load(path, weights_only=False) for path in ("model.pth", "out.pth"))
x = torch.randn(4, 3)
assert torch.equal(one(x), other(x))
""",
    )
    assert convert("model.pth", "weights.pth", "--weights-only").code == 0
    assert list(torch.load(tmp_path / "weights.pth")) == [
        f"blocks.{index}.{name}" for index in range(2) for name in ("fc.weight", "fc.bias")
    ]


def _names(checkpoint: Any) -> set[str]:
    return {use.name for use in checkpoint.globals}


# What belongs to nothing.


def spliced(path: Path, name: str, code: bytes) -> Path:
    """A copy of a file whose pickle does something more before it does anything else."""
    result = path.with_name(name)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(result, "w") as target:
        for record in source.namelist():
            data = source.read(record)
            if record.endswith("data.pkl"):
                data = data[:2] + code + data[2:]
            target.writestr(record, data)
    return result


_TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
)
"""A tensor over the first storage of the file."""

CALLS = {
    "logging.info": b"clogging\ninfo\n(X\x02\x00\x00\x00hitR0",
    "atexit.register": b"cmodels\nregister\n(" + _TENSOR + b"tR0",
    "a tensor": _TENSOR + b"0",
    "below a MARK": b"(cmodels\nregister\n)R" + _TENSOR + b"1",
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_pth_of_what_belongs_to_nothing_is_refused(
    kind: str, refused: Callable[..., str], convert: Callable[..., Any], save: Callable[..., Path]
) -> None:
    weights = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.zeros(2)}
    source = spliced(save({"state_dict": weights, "epoch": 3}), "spliced.pth", CALLS[kind])
    with ckptkit.open(source) as opened:
        found = list(walk(opened.checkpoint.discarded))
    assert [node.shape for node in found if isinstance(node, TensorEntry)] == [(4,)] * (_TENSOR in CALLS[kind])
    document = ckptkit.inspect(source)
    assert [tensor["shape"] for tensor in document["tensors"] if tensor["section"] is None] == [
        list(node.shape) for node in found if isinstance(node, TensorEntry)
    ]
    findings = [finding for finding in document["findings"] if finding["code"] == "discarded-call"]
    assert [finding["severity"] for finding in findings] == ["warning"]
    line = refused(source, "out.pth")
    assert "discards the result" in line
    assert "--weights-only" in line
    for output, options in (("out.pth", ["--weights-only"]), ("out.safetensors", ["--leave-out", "epoch"])):
        done = convert(source, output, *options)
        assert done.code == 0, done.err
        assert "not in the output: " in done.err
        assert ("a call of" in done.err) == (kind != "a tensor")
        loaded = ckptkit.load_state_dict(output)
        assert {name: value.tolist() for name, value in loaded.items()} == {
            name: value.tolist() for name, value in weights.items()
        }


def test_an_old_file_is_refused_too(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"fc.weight": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    at = data.index(b"\x80\x02}q\x00X\x09\x00\x00\x00fc.weight") if b"fc.weight" in data else -1
    path.write_bytes(data[: at + 2] + CALLS["logging.info"] + data[at + 2 :])
    assert "a call of logging.info" in refused(path, "out.pth")
