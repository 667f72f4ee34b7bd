"""Arguments mean what they say: a string is one, tolerances, devices, shapes; and every error survives pickling."""

from __future__ import annotations

import argparse
import ast
import copy
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ckptkit
from ckptkit import CkptkitError, RewriteError, VerifyError, api, errors
from ckptkit.arguments import Options, device_problem, several, tolerance
from ckptkit.checkpoint import GlobalUse
from ckptkit.cli.options import keywords_of
from ckptkit.options import ConvertOptions, DiffOptions, VerifyOptions
from ckptkit.options import keywords as declared_options
from ckptkit.released import policy
from ckptkit.released.policy import POLICY_FIELDS, Policy
from ckptkit.rewrite.storages import TiedPolicy
from ckptkit.testing import assert_fits, assert_matches_manifest, assert_same_outputs, assert_same_weights

SaveAs = Callable[..., Path]

STATE = {"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2), "1.weight": torch.ones(1, 2), "1.bias": torch.zeros(1)}


class Slash:
    """A path that is no string."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def names(path: Path) -> list[str]:
    with ckptkit.open(path) as file:
        return list(file.state_dict)


# A string is one.

ONE_STRING: dict[str, Callable[[Path, Path], object]] = {
    "inspect(filters)": lambda p, o: len(ckptkit.inspect(p, filters="0.*")["tensors"]) == 2,
    "convert(include)": lambda p, o: ckptkit.convert(p, o, include="0.*") and len(names(o)) == 2,
    "convert(exclude)": lambda p, o: ckptkit.convert(p, o, exclude="0.*") and len(names(o)) == 2,
    "convert(rename)": lambda p, o: ckptkit.convert(p, o, rename="^0=>zero") and "zero.bias" in names(o),
    "convert(leave_out)": lambda p, o: ckptkit.convert(resume(p), o, leave_out="epoch").ok,
    "convert(keep_dtype)": lambda p, o: (
        len(ckptkit.convert(p, o, dtype="float16", keep_dtype="0.*").details["casts"]) == 2
    ),
    "Select(include)": lambda p, o: len(rewritten(p, ckptkit.Select("0.*"))) == 2,
    "Select(exclude)": lambda p, o: len(rewritten(p, ckptkit.Select(exclude="0.*"))) == 2,
    "Rename": lambda p, o: "zero.bias" in rewritten(p, ckptkit.Rename("^0=>zero")),
    "Rename of several": lambda p, o: "one.bias" in rewritten(p, ckptkit.Rename(["^0=>zero", ("zero", "one")])),
    "LeaveOut": lambda p, o: len(rewritten(resume(p), ckptkit.LeaveOut("epoch"))) == 4,
    "CastDtype(keep)": lambda p, o: len(rewritten(p, ckptkit.CastDtype("float16", keep="0.*"))) == 4,
    "verify(allow_missing)": lambda p, o: (
        not ckptkit.verify(without(p, o, "0.weight"), model=model, allow_missing="1.*", forward=False).ok
    ),
    "verify(allow_missing), met": lambda p, o: (
        ckptkit.verify(without(p, o, "0.weight"), model=model, allow_missing="0.w*", forward=False).ok
    ),
    "verify(allow_unexpected)": lambda p, o: (
        ckptkit.verify(p, model=lambda: nn.Sequential(nn.Linear(3, 2)), allow_unexpected="1.*", forward=False).ok
    ),
    "check(paths)": lambda p, o: ckptkit.check(str(p)).exit_code == 0,
    "check(allow_dtype)": lambda p, o: ckptkit.check(p, allow_dtype="float32").ok,
    "check(location)": lambda p, o: ckptkit.check(p, location="cpu").ok,
    "check(require_format)": lambda p, o: ckptkit.check(p, require_format="torch-zip").ok,
    "manifest(paths)": lambda p, o: len(ckptkit.manifest(str(p)).files) == 1,
    "assert_fits(allow_missing)": lambda p, o: (
        assert_fits(without(p, o, "0.bias"), model, allow_missing="0.b*") is None
    ),
}


def resume(path: Path) -> Path:
    torch.save({"state_dict": STATE, "epoch": 3}, path.with_name("resume.pth"))
    return path.with_name("resume.pth")


def without(path: Path, out: Path, name: str) -> Path:
    ckptkit.convert(path, out, exclude=[name])
    return out


def rewritten(path: Path, rewriter: ckptkit.Rewriter) -> list[str]:
    with ckptkit.open(path) as file:
        return list(file.rewrite(rewriter).state_dict)


@pytest.mark.parametrize("parameter", ONE_STRING)
def test_a_string_is_one(parameter: str, save: SaveAs, tmp_path: Path) -> None:
    assert ONE_STRING[parameter](save(STATE), tmp_path / "out.pth"), parameter


@pytest.mark.parametrize("kind", [str, Path, Slash], ids=["str", "Path", "own"])
def test_paths_of_every_kind(kind: Callable[[Path], Any], save: SaveAs, tmp_path: Path) -> None:
    path, out = kind(save(STATE)), kind(tmp_path / "out.pth")
    assert ckptkit.inspect(path)["kind"] == "state_dict"
    assert len(ckptkit.load_state_dict(path)) == 4
    report = ckptkit.convert(path, out)
    assert report.to_json() and report.details["source"] == str(tmp_path / "model.pth")
    with ckptkit.open(path) as file:
        file.save(out, force=True)
    assert ckptkit.diff(path, out).to_dict()["equal"]
    assert ckptkit.verify(path, model=model, against=out, input_shapes=[(1, 3)], device="cpu").ok
    lock = kind(tmp_path / "lock.json")
    assert len(ckptkit.manifest(path).files) == len(ckptkit.manifest([path, out], lock).files) - 1 == 1
    assert ckptkit.check(path).ok and ckptkit.check([path, out], manifest=lock).ok
    assert_matches_manifest(path, lock)
    assert_matches_manifest([path, out], lock)


def test_bytes_are_a_path_to_write_and_a_content_to_read(save: SaveAs, tmp_path: Path) -> None:
    path, out = save(STATE), os.fsencode(tmp_path / "out.pth")
    ckptkit.convert(path, out)
    assert ckptkit.diff(path, (tmp_path / "out.pth").read_bytes()).ok
    with pytest.raises(ckptkit.UnknownFormatError, match="<bytes>: a text file, not a checkpoint"):
        ckptkit.open(os.fsencode(path))


def test_what_several_is() -> None:
    path = Path("a")
    assert [several(x) for x in ("ab", b"ab", path)] == [("ab",), (b"ab",), (path,)]
    assert several(x for x in ("a", "b")) == several(["a", "b"]) == ("a", "b") and several(()) == ()


# Tolerances.


@pytest.mark.parametrize("bad", [float("nan"), -1e-9, float("inf"), -float("inf"), "x", [1.0]])
@pytest.mark.parametrize("name", ["atol", "rtol"])
def test_tolerances_within_which_nothing_can_be(name: str, bad: Any, save: SaveAs) -> None:
    a, b = save({"a": torch.zeros(9)}, "a.pth"), save({"a": torch.ones(9)}, "b.pth")
    weights = save(STATE)
    for call in (
        lambda: ckptkit.diff(a, b, **{name: bad}),
        lambda: ckptkit.verify(weights, model=model, input_shapes=[(1, 3)], **{name: bad}),
        lambda: assert_same_weights(a, b, **{name: bad}),
        lambda: assert_same_outputs(weights, weights, model, input_shapes=[(1, 3)], **{name: bad}),
    ):
        with pytest.raises(VerifyError, match=f"{name} .*expected a finite number of at least 0"):
            call()


@pytest.mark.parametrize("bad", ["nan", "-1", "inf", "-nan"])
def test_tolerances_on_the_command_line(bad: str, save: SaveAs, command: Any) -> None:
    a, b = save({"a": torch.zeros(9)}, "a.pth"), save({"a": torch.ones(9)}, "b.pth")
    for words in (["diff", a, b], ["verify", a, "--model", "x:y"]):
        done = command(*words, f"--rtol={bad}")
        assert done.code == 2 and "Usage: " in done.err and "finite number of at least 0" in done.err
    assert tolerance("x", 0) == 0.0 and tolerance("x", None) is None and tolerance("x", "1e-3") == 1e-3


# Devices.


def torch_has(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore:.*no longer used as device type")
def test_devices_are_those_of_torch() -> None:
    told = "Expected one of "
    try:
        torch.device("nosuchdevice")
    except RuntimeError as error:
        known = str(error).partition(told)[2].partition(" device type")[0].split(", ")
    assert {"cpu", "cuda", "meta"} <= set(known)
    for kind in known:
        assert device_problem(kind) is None and device_problem(f"{kind}:1") is None
    for text in (
        "cud", "gpu", "cudaa:0", "cuda:-1", "cuda:x", "cuda:", "cuda:01", "CUDA", "cuda 0", "", ":0", "0", "cuda:0:1",
        "cpu\n", " cpu", "cuda:1e3", "cuda:٣",
    ):  # fmt: skip
        assert not torch_has(text) and device_problem(text) is not None, text
    for text in ("cuda:128", "cuda:300", "cuda:99999999"):  # torch wraps around, or overflows
        assert device_problem(text) is not None


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("cud", "'cuda'"), ("gpu", "'cuda'"), ("cudaa:0", "'cuda'"), ("CUDA:1", "'cuda'"), ("cuda:-1", "'cuda:N'"),
        ("mpss", "'mps'"),
    ],
)  # fmt: skip
def test_what_was_meant_is_told(given: str, meant: str, save: SaveAs, command: Any, tmp_path: Path) -> None:
    path = save(STATE)
    problem = device_problem(given)
    assert problem is not None and meant in problem
    for form in (given, {"cpu": given}):
        with pytest.raises(RewriteError, match="is not a device location"):
            ckptkit.convert(path, tmp_path / "out.pth", map_location=form)
    with pytest.raises(VerifyError, match="is not a device location"):
        Policy(location=given)
    with pytest.raises(VerifyError, match="is not a device location"):
        ckptkit.verify(path, model=model, device=given, forward=False)
    with pytest.raises(RewriteError, match=meant if given != "cuda:-1" else "cuda:-1"):
        ckptkit.load_state_dict(path, map_location=given)
    for words in (
        ["convert", path, tmp_path / "out.pth", "--map-location", given],
        ["convert", path, tmp_path / "out.pth", "--map-location", f"cpu={given}"],
        ["check", path, "--location", given],
        ["verify", path, "--model", "x:y", "--device", f"cpu,{given}"],
    ):
        done = command(*words)
        assert done.code == 2 and "Usage: " in done.err and meant in done.err, words
    assert not (tmp_path / "out.pth").exists()


def test_a_map_that_meets_nothing_is_told(save: SaveAs, tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, device="cuda:0")

    def told(location: Any) -> list[str]:
        report = ckptkit.convert(path, tmp_path / "out.pth", map_location=location, force=True)
        return [finding.message for finding in report.findings if finding.code == "nothing-moved"]

    (message,) = told({"cuda": "cpu"})
    assert "nothing in the file is on 'cuda'; it has cuda:0" in message
    assert len(told({"gpu": "cpu", "cuda:0": "cpu", "cuda:1": "cpu"})) == 2
    assert told({"cuda:0": "cpu"}) == told("cpu") == told("cuda:0") == told(lambda storage, tag: None) == []


# Shapes, sizes, sorts.


@pytest.mark.parametrize("shapes", [[(1, -3)], [()], (1, 3), "1,3", [("1", "3")], 3, [(1.5, 3)], [(True, 3)]])
def test_what_is_no_shape(shapes: Any, save: SaveAs) -> None:
    with pytest.raises(VerifyError, match=r"--input-shape: .* is not a shape"):
        ckptkit.verify(save(STATE), model=model, input_shapes=shapes)


def test_other_absurd_values(save: SaveAs, tmp_path: Path) -> None:
    path = save(STATE)
    for size in (0, -1, float("nan"), float("inf"), 1.5):
        with pytest.raises(RewriteError):
            ckptkit.convert(path, tmp_path / "out.pth", max_shard_size=size)  # type: ignore[arg-type]
    with pytest.raises(RewriteError, match="expected 'file', 'name' or 'size'"):
        ckptkit.inspect(path, sort="nmae")
    with pytest.raises(VerifyError):
        ckptkit.verify(path, model=model, input_shapes=[(1, 3)], seed=1 << 70)


# Pickling.


def every_error() -> list[CkptkitError]:
    use = GlobalUse(name="os.system", verdict="dangerous", count=2, where=("data.pkl",))
    made: list[CkptkitError] = [
        errors.LimitError("bytes", limit=3, actual=4, where="data.pkl"),
        errors.KeyCollisionError("a", "b", "c"),
        errors.MissingDependencyError("pip install torch", name="torch"),
        errors.FileAccessError(13, "Permission denied", "x.pth"),
    ]
    for cls in errors.__all__:
        kind = getattr(errors, cls)
        if issubclass(kind, errors.FormatError) and kind is not errors.LimitError:
            error = kind("damaged", path="a.pth", where="data.pkl", offset=7)
            error.globals = (use,)
            made.append(error)
        elif kind not in (errors.LimitError, errors.KeyCollisionError):
            made += [kind("it is so"), kind("it is so", path="a.pth", names=iter("ab"))]
    return made


def test_every_error_is_among_them() -> None:
    assert {type(error).__name__ for error in every_error()} == set(errors.__all__)
    assert len(errors.__all__) >= 16


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: CkptkitError) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))
        for one in (again, copy.copy(error), copy.deepcopy(error)):
            assert type(one) is type(error) and str(one) == str(error)
            assert (one.args, vars(one)) == (error.args, vars(error))
            for name in ("errno", "strerror", "filename", "msg", "name"):
                assert getattr(one, name, None) == getattr(error, name, None)


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=repr)
def test_dtypes_are_torchs_or_their_names(save: SaveAs, tmp_path: Path, given: Any) -> None:
    path = save(nn.Linear(2, 2).state_dict(), "model.pth")
    assert {value.dtype for value in ckptkit.load_state_dict(path, dtype=given).values()} == {torch.bfloat16}
    assert "bfloat16" in ckptkit.convert(path, tmp_path / "out.safetensors", dtype=given).to_json()
    report = ckptkit.verify(path, model=lambda: nn.Linear(2, 2), dtype=given, input_shapes=[(1, 2)])
    assert report.ok and report.details["dtype"] == "bfloat16"


def test_errors_have_no_field_that_is_not_set() -> None:
    told = CkptkitError("so", path="p", names="ab")
    for error in (CkptkitError("so"), errors.FileAccessError(13, "no", "x.pth"), told):
        fields = (error.path, error.where, error.offset, error.names)
        assert fields == (("p", None, None, ("a", "b")) if error is told else (None, None, None, ()))


def test_errors_have_what_they_say_as_fields(save: SaveAs, tmp_path: Path) -> None:
    twins = {"module.a": torch.ones(2), "a": torch.ones(2)}
    many = {f"layers.{i}": torch.ones(2).to_sparse() for i in range(30)}
    weights = {"w.weight": torch.ones(2, 2), "b": torch.ones(2)}
    both = save({"model": weights, "ema": {name: tensor + 1 for name, tensor in weights.items()}}, "both.pth")
    scaled = save({"w.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "w.weight_scale": torch.ones(2)}, "fp8.pth")
    foreign = save({f"{i}": torch.ones(1) for i in range(9)} | {"x": object, "y": argparse.Namespace()}, "foreign.pth")
    there, gone, out = save(weights, "there.pth"), tmp_path / "gone.pth", tmp_path / "out.safetensors"
    cases: list[tuple[type[CkptkitError], Callable[[], object], dict[str, object]]] = [
        (errors.MissingFileError, lambda: ckptkit.open(gone), {"path": str(gone)}),
        (errors.FileAccessError, lambda: ckptkit.open(tmp_path), {"path": str(tmp_path)}),
        (errors.DestinationExistsError, lambda: ckptkit.convert(there, there), {"path": str(there)}),
        (errors.MissingFileError, lambda: ckptkit.convert(there, gone / "a.pth"), {"path": str(gone / "a.pth")}),
        (errors.RewriteError, lambda: ckptkit.convert(there, tmp_path / "a.xyz"), {"path": str(tmp_path / "a.xyz")}),
        (errors.SectionError, lambda: ckptkit.load_state_dict(both), {"path": str(both), "names": ("model", "ema")}),
        (errors.SectionError, lambda: ckptkit.open(both, section="no"), {"path": str(both), "names": ("model", "ema")}),
        *(
            (RewriteError, partial(ckptkit.load_state_dict, there, **given), {"path": str(there), "names": names})
            for given, names in (
                ({"include": "no"}, ("w.weight", "b")),
                ({"exclude": "*"}, ("w.weight", "b")),
                ({"rename": "^b$=>"}, ("b",)),
                ({"rename": {"lacking": "x"}}, ("lacking",)),
            )
        ),
        (
            errors.RewriteError,
            lambda: ckptkit.open(there).rewrite(ckptkit.Rename(lambda _: 3)),  # type: ignore[arg-type, return-value]
            {"path": str(there), "names": ("w.weight",)},
        ),
        (errors.RewriteError, lambda: ckptkit.save({"\ud800": torch.ones(1)}, out), {"names": ("\ud800",)}),
        (errors.SectionError, lambda: ckptkit.diff(there, both), {"path": str(both), "names": ("model", "ema")}),
        (errors.SectionError, lambda: ckptkit.convert(there, out, like=both), {"names": ("model", "ema")}),
        (errors.KeyCollisionError, lambda: ckptkit.convert(save(twins, "twins.pth"), out, strip_module=True),
         {"names": ("module.a", "a"), "first": "module.a", "second": "a", "target": "a"}),
        (errors.RewriteError, lambda: ckptkit.convert(save(many, "many.pth"), out), {"names": tuple(many)}),
        (errors.DTypeError, lambda: ckptkit.convert(scaled, out, dtype="float16"),
         {"names": ("w.weight_scale", "w.weight")}),
        (errors.UnsupportedError, lambda: ckptkit.load_state_dict(foreign),
         {"path": str(foreign), "names": ("x", "y")}),
        (errors.RewriteError, lambda: ckptkit.convert(save({"a": weights["b"], "b": weights["b"]}, "tied.pth"), out,
                                                      tied="error"), {"names": ("a", "b")}),
        (errors.RewriteError, lambda: ckptkit.save({"a": torch.ones(1), "x": object()}, out), {"names": ("x",)}),
    ]  # fmt: skip
    for kind, call, fields in cases:
        with pytest.raises(kind) as caught:
            call()
        error = pickle.loads(pickle.dumps(caught.value))
        assert {name: getattr(error, name) for name in fields} == fields
    assert list(tmp_path.glob("out*")) == []


def test_an_error_of_another_process_is_itself(save: SaveAs, tmp_path: Path) -> None:
    path = save({"module.a": torch.ones(2), "a": torch.ones(2)}, "collision.pth")
    (tmp_path / "text.pth").write_text("hello")
    with ProcessPoolExecutor(1) as pool:
        collision = pool.submit(ckptkit.convert, path, tmp_path / "out.pth", strip_module=True)
        with pytest.raises(ckptkit.KeyCollisionError) as caught:
            collision.result(timeout=120)
        assert (caught.value.first, caught.value.second, caught.value.target) == ("module.a", "a", "a")
        unknown = pool.submit(ckptkit.inspect, tmp_path / "text.pth")
        with pytest.raises(ckptkit.UnknownFormatError) as refused:
            unknown.result(timeout=120)
        assert refused.value.path == str(tmp_path / "text.pth")
        report = pool.submit(ckptkit.check, path).result(timeout=120)
        assert report.exit_code == 0


def test_documents_survive_pickling(save: SaveAs, tmp_path: Path) -> None:
    path = save(STATE)
    other = save({**STATE, "0.bias": torch.ones(2)}, "other.pth")
    documents = [
        ckptkit.convert(path, tmp_path / "out.safetensors", dtype="float16"),
        ckptkit.diff(path, other),
        ckptkit.check(path, max_size=1),
        ckptkit.verify(path, model=model, input_shapes=[(1, 3)]),
        ckptkit.manifest(path),
        ckptkit.inspect(path, stats=True),
    ]
    for document in documents:
        again = pickle.loads(pickle.dumps(document))
        told = document if isinstance(document, dict) else document.to_dict()
        assert (again if isinstance(again, dict) else again.to_dict()) == told
    (finding,) = documents[2].findings  # type: ignore[union-attr]
    assert pickle.loads(pickle.dumps(finding)) == finding


# An option is declared once, and stands in both help screens.

DECLARED: dict[str, type[Options]] = {"convert": ConvertOptions, "verify": VerifyOptions, "diff": DiffOptions}

TYPED_ALONE = {
    "convert": {"paths", "rename_file", "yes"},
    "verify": {"path"},
    "diff": {"a", "b", "top"},
}
"""What only the command line has, beside what all commands have."""

COMMON = {"output", "output_file", "as_json", "quiet", "color", "debug"}


def typed_of(name: str) -> set[str]:
    """The options that the command line has too; Python alone takes those without a line of help."""
    return {option.name for option in DECLARED[name].declared.values() if option.line}


def command_of(name: str) -> click.Command:
    found: click.Command = import_module(f"ckptkit.cli.{name}").command
    return found


def on_one_line(text: str | None) -> str:
    return " ".join((text or "").split())


@pytest.mark.parametrize("name", DECLARED)
def test_every_option_stands_in_both_help_screens(name: str) -> None:
    typed = on_one_line(CliRunner().invoke(command_of(name), ["--help"], terminal_width=100).output)
    documented = on_one_line(getattr(ckptkit, name).__doc__)
    at = [0, 0]
    for option in DECLARED[name].declared.values():  # in the order in which they are declared
        metavar = option.metavar or {"integer": "INTEGER"}.get(option.kind, "") or "|".join(option.choices)
        switch = f"{option.typed} / --no-{option.name}" if option.kind == "switch" else option.typed
        metavar = f"[{metavar}]" if option.choices else metavar
        if option.name in typed_of(name):
            at[0] = typed.index(on_one_line(f"{switch} {metavar} {option.line}"), at[0])
            assert option.line.endswith("."), option.name
        else:
            assert switch not in typed
        at[1] = documented.index(f" {on_one_line(option.documented)}", at[1])
        assert not option.meaning.endswith("."), option.name
    assert "**options" not in documented


@pytest.mark.parametrize("name", DECLARED)
def test_the_command_has_the_options_that_are_declared_and_no_others(name: str) -> None:
    parameters = {parameter.name for parameter in command_of(name).params}
    assert parameters - COMMON == typed_of(name) | TYPED_ALONE[name]


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_not_typed_is_what_is_not_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[dict[str, Any]] = []

    def function(*_: object, **options: Any) -> None:
        called.append(options)
        raise VerifyError("enough")

    monkeypatch.setattr(api, name, function)
    CliRunner().invoke(command_of(name), ["x"] * (1 if name == "verify" else 2))
    ((options),) = called
    assert options.keys() == typed_of(name)
    assert vars(DECLARED[name](**options)) == vars(DECLARED[name]())


def declarations() -> dict[str, ast.ClassDef]:
    trees = [ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")) for module in (declared_options, policy)]
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def keywords_in(title: str) -> list[str]:
    """Those of a ``TypedDict``, and of those that it is made of."""
    node = declarations()[title]
    own = [
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != "TypedDict"]
    return [*(name for base in bases for name in keywords_in(base)), *own]


@pytest.mark.parametrize("name", [*DECLARED, "check"])
def test_type_checkers_see_each_keyword(name: str) -> None:
    title = {"check": "Policy"}.get(name, name.title())
    assert sorted(keywords_in(f"{title}Keywords")) == sorted(
        POLICY_FIELDS if name == "check" else DECLARED[name].declared
    )


def test_choices_are_those_of_the_type() -> None:
    assert ConvertOptions.tied.choices == get_args(TiedPolicy)


@pytest.mark.parametrize(
    ("call", "wrong", "meant"),
    [
        (lambda p: ckptkit.convert(p, p, strip_modul=True), "convert() got .* 'strip_modul'", "strip_module"),
        (lambda p: ckptkit.convert(p, p, colour=True), "convert() got .* 'colour'", None),
        (lambda p: ckptkit.verify(p, modle=nn.Linear), "verify() got .* 'modle'", "model"),
        (lambda p: ckptkit.diff(p, p, sectoin="x"), "diff() got .* 'sectoin'", "section"),
        (lambda p: ckptkit.check(p, no_pickel=True), "check() got .* 'no_pickel'", "no_pickle"),
        (lambda p: ckptkit.check(p, manifst=p), "check() got .* 'manifst'", "manifest"),
    ],
)
def test_a_keyword_that_is_none_is_told_before_anything_is_read(
    call: Callable[[Path], object], wrong: str, meant: str | None
) -> None:
    with pytest.raises(TypeError) as caught:
        call(Path("no.pth"))
    said = wrong.replace(".*", "an unexpected keyword argument")
    assert str(caught.value) == said + (f". Did you mean {meant!r}?" if meant else "")


def test_options_do_not_change() -> None:
    options = ConvertOptions(include="a.*", like="other.pth")
    assert (options.include, options.weights_only, options.tied) == (("a.*",), True, "alias")
    with pytest.raises(AttributeError, match="options cannot be changed; cannot set 'dtype'"):
        options.dtype = "float16"  # type: ignore[misc]
    assert repr(options) == "ConvertOptions(include=('a.*',), weights_only=True, like='other.pth')"
    assert options.but(dtype="float16").dtype == "float16"
    assert options.dtype is None


def test_options_are_typed_as_they_are_read() -> None:
    given = {"seed": 3, "forward": False, "allow_missing": "a b", "input_shapes": [[1, 3]], "atol": 0.5}
    options = VerifyOptions(**given)
    words = options.typed(*VerifyOptions.declared)
    assert words == ["--input-shape", "1,3", "--seed", "3", "--allow-missing", "a b", "--atol", "0.5", "--no-forward"]
    with command_of("verify").make_context("verify", ["x", *words]) as context:
        typed = {name: value for name, value in context.params.items() if name in VerifyOptions.declared}
    assert vars(VerifyOptions(**keywords_of(VerifyOptions, typed))) == vars(options)
