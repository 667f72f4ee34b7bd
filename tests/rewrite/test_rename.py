"""Names are renamed by regular expressions, and what goes by them comes along."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ckptkit
from ckptkit import (
    AddModule,
    AddPrefix,
    CkptkitError,
    FileAccessError,
    KeyCollisionError,
    MissingFileError,
    Rename,
    RewriteError,
    StripModule,
    StripPrefix,
)  # fmt: skip
from ckptkit.checkpoint import Checkpoint, Origin, StateDict
from ckptkit.rewrite.rename import parse_rule, read_rules

Save = Callable[..., Path]
Through = Callable[..., Any]
Rules = tuple[tuple[str, str], ...]


def by_hand(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def checkpoint(names: list[str], versions: list[str] | None = None) -> Checkpoint:
    """A state_dict of these names; each value, and each module's version, says where it was."""
    state_dict = StateDict(
        {name: f"value of {name}" for name in names},
        versions=None if versions is None else {path: f"version of {path}" for path in versions},
    )
    return Checkpoint(
        state_dict=state_dict, rest=None, origin=Origin(path="", size=0, format="torch-zip", kind="state_dict")
    )


RULES: dict[str, Rules] = {
    "anywhere in the name": (("layer", "block"),),
    "every occurrence": ((r"\.", "/"),),
    "groups": ((r"^layer(\d)\.(\d)", r"stages.\1.blocks.\2"),),
    "named groups": ((r"(?P<kind>conv|bn)(?P<n>\d)", r"\g<n>.\g<kind>"),),
    "in order": (("a", "b"), ("b", "c"), ("^c", "d")),
    "a swap": (("^left", "tmp"), ("^right", "left"), ("^tmp", "right")),
    "flags": (("(?i)LAYER", "x"),),
    "nothing matches": (("^zzz", "y"),),
    "spaces count": ((" ", ""),),
    "no rules": (),
}
NAMES = [
    "layer1.0.conv1.weight", "layer1.0.bn1.running_mean", "layer2.1.conv2.weight", "left.a", "right.a", "with space",
    "größe.重み", "new\nline", "a/b::c{d}",
]  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules_do_what_re_sub_does(through: Through, name: str) -> None:
    rules = RULES[name]
    saved = {name: torch.tensor(float(index)) for index, name in enumerate(NAMES)}
    found = through(saved, Rename(rules))
    assert list(found) == [by_hand(rules, name) for name in NAMES]
    assert [value.item() for value in found.values()] == list(range(len(NAMES)))
    assert [Rename(rules).rename(name) for name in NAMES] == list(found)


@given(
    st.lists(st.text("ab.", max_size=6), unique=True, max_size=6),
    st.lists(st.tuples(st.sampled_from(["a", "b$", r"^(.)", r"\.", "a+(b)?"]), st.sampled_from(["", "c", r"x\g<0>"]))),
)
def test_rules_one_after_the_other_are_rules_at_once(names: list[str], rules: list[tuple[str, str]]) -> None:
    start = checkpoint(names)

    def outcome(*rewriters: Rename) -> object:
        try:
            return list(start.rewrite(*rewriters).state_dict.everything.items())
        except RewriteError as error:
            return type(error)

    at_once = outcome(Rename(tuple(rules)))
    after_each_other = outcome(*(Rename((rule,)) for rule in rules))
    if isinstance(at_once, list) and isinstance(after_each_other, list):
        assert at_once == after_each_other
        assert [new for new, _ in at_once] == [by_hand(tuple(rules), name) for name in names]
    else:  # names may collide, or be empty, on the way alone
        targets = [by_hand(tuple(rules), name) for name in names]
        fits = len(set(targets)) == len(targets) and all(
            new or not old for new, old in zip(targets, names, strict=True)
        )
        assert isinstance(at_once, list) == fits


def test_its_repr_is_its_rules() -> None:
    assert repr(Rename([["a", "b"]])) == repr(Rename((("a", "b"),))) == "Rename(rules=(('a', 'b'),))"  # type: ignore[arg-type,list-item]


def test_a_collision_names_both_and_changes_nothing() -> None:
    before = checkpoint(["a.1", "b", "a.2"])
    with pytest.raises(KeyCollisionError) as caught:
        Rename(((r"a\.\d", "a"),))(before)
    assert (caught.value.first, caught.value.second, caught.value.target) == ("a.1", "a.2", "a")
    assert list(before.state_dict.everything) == ["a.1", "b", "a.2"]


def test_a_name_that_is_taken_away(save: Save) -> None:
    rename = Rename((("x", "y"), (r"^fc\.", ""), ("weight", ""), ("z", "")))
    with pytest.raises(RewriteError, match=r"rule 'weight=>' leaves the name 'fc\.weight' empty"):
        rename.rename("fc.weight")
    with ckptkit.open(save({"fc.weight": torch.ones(1)})) as file, pytest.raises(RewriteError, match="empty"):
        file.rewrite(rename)
    assert rename.rename("") == ""
    assert Rename((("a", ""), ("^$", "b"))).rename("a") == "b"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("(", "x"), r"rule '\(=>x': bad regular expression: missing \), unterminated"),
        (("*", "x"), "bad regular expression: nothing to repeat"),
        ((f"a{{{'9' * 20}}}", "x"), "bad regular expression"),
        (("(" * 100_000 + ")" * 100_000, "x"), "bad regular expression"),
        (("a", r"\1"), r"rule 'a=>\\1': bad replacement: invalid group reference 1"),
        (("(a)", r"\g<2>"), "bad replacement: invalid group reference 2"),
        (("(?P<a>a)", r"\g<b>"), "bad replacement: unknown group name 'b'"),
        (("a", r"\q"), r"bad replacement: bad escape"),
        (("a", "\\"), "bad replacement: bad escape"),
    ],
)
def test_bad_rules(rule: tuple[str, str], message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        Rename((("fine", "fine"), rule))


# Rules as text.


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a=>b", ("a", "b")),
        ("a=>", ("a", "")),
        (" a => b ", (" a ", " b ")),
        ("a=>b=>c", ("a", "b=>c")),
        (r"a=\>b=>c", (r"a=\>b", "c")),
        ("^=>model.", ("^", "model.")),
        (r"^(\w+)\.=>\1_", (r"^(\w+)\.", r"\1_")),
    ],
)
def test_rules_as_text(text: str, rule: tuple[str, str]) -> None:
    assert parse_rule(text) == rule
    if r"\>" in text:
        assert Rename((rule,)).rename("a=>b") == "c"


@pytest.mark.parametrize("text", ["", "a", "a->b", "a=b", "=>b", "=>", "(=>b", r"a=>\1"])
def test_text_that_is_no_rule(text: str) -> None:
    with pytest.raises(RewriteError, match=r"^rule "):
        parse_rule(text)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_file_of_rules(tmp_path: Path, newline: str, start: str) -> None:
    lines = ["# backbone", "^layer=>stage ", "", "  ", r"(\d)=>#\1", " #=>x", "größe=>重み\u2028"]
    path = tmp_path / "rules.txt"
    path.write_bytes((start + newline.join(lines)).encode())
    expected = (("^layer", "stage "), (r"(\d)", r"#\1"), (" #", "x"), ("größe", "重み\u2028"))
    assert read_rules(path) == read_rules(str(path)) == expected
    path.write_bytes(b"")
    assert read_rules(path) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a=>b\n\nc\n", r"rules\.txt, line 3: rule 'c' has no '=>'"),
        (b"(=>b", r"rules\.txt, line 1: rule '\(=>b': bad regular expression"),
        (b"a=>b\n\xff=>b\n", r"rules\.txt, line 2: is not UTF-8: byte 0"),
    ],
)
def test_a_file_with_a_line_that_is_no_rule(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rules.txt"
    path.write_bytes(content)
    with pytest.raises(RewriteError, match=message):
        read_rules(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    cases: list[tuple[Any, type[CkptkitError]]] = [
        (tmp_path / "none", MissingFileError), (tmp_path, FileAccessError), ("nul\0byte", FileAccessError),
    ]  # fmt: skip
    for path, error in cases:
        with pytest.raises(error):
            read_rules(path)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(FileAccessError, match="is larger than"):
        read_rules(large)


# Module versions.


def model(first: str = "conv", block: str = "block") -> nn.Module:
    inner = nn.Sequential(OrderedDict(fc=nn.Linear(2, 2), act=nn.ReLU(), norm=nn.BatchNorm1d(2)))
    return nn.Sequential(OrderedDict([(first, nn.Conv2d(1, 2, 3)), ("norm", nn.BatchNorm2d(2)), (block, inner)]))


@pytest.mark.parametrize(
    ("rule", "first", "block"),
    [
        ((r"^block\.", "encoder."), "conv", "encoder"),
        (("block", "body"), "conv", "body"),
        (("^block(?=[.](fc|norm))", "body"), "conv", "body"),
        ((r"^(conv|block)\.", r"\1_x."), "conv_x", "block_x"),
        ((r"^conv\.(weight|bias)$", r"stem.\1"), "stem", "block"),
    ],
)
def test_versions_are_those_of_a_model_so_named(
    through: Through, rule: tuple[str, str], first: str, block: str
) -> None:
    torch.manual_seed(0)
    old = model().state_dict()
    found = through(old, Rename((rule,)))
    expected = model(first, block).state_dict()
    assert list(found) == list(expected)
    assert found._metadata == expected._metadata
    assert list(found._metadata) == list(expected._metadata)
    assert all(torch.equal(new, value) for new, value in zip(found.values(), old.values(), strict=True))
    model(first, block).load_state_dict(found)


def test_what_a_regular_expression_does_as_a_prefix_would(save: Save) -> None:
    same = [
        (AddPrefix("a.b"), (("^", "a.b."),)),
        (AddModule(), (("^", "module."),)),
        (StripPrefix("module"), ((r"^module\.", ""),)),
        (StripModule(), ((r"^module\.", ""),)),
    ]
    for prefix, rules in same:
        for saved in (model(), nn.DataParallel(model())):
            wrapped = isinstance(saved, nn.DataParallel)
            if wrapped == (rules[0][1] == ""):
                with ckptkit.open(save(saved.state_dict())) as file:
                    one, two = prefix(file.checkpoint).state_dict, Rename(rules)(file.checkpoint).state_dict
                    assert list(one) == list(two)
                    assert list((one.versions or {}).items())[-6:] == list((two.versions or {}).items())[-6:]
                    assert list(one.versions or {}) == list(two.versions or {})


VERSIONS: dict[str, tuple[Rules, list[str], list[str], dict[str, str]]] = {
    # rules, names, module paths; expected: path -> whose version it is
    "the last segment is renamed too": (((r"fc\.weight", "head.w"), (r"fc\.bias", "head.b")), ["fc.weight", "fc.bias"],
        ["", "fc"], {"": "", "head": "fc"}),
    "a module is split": (((r"fc\.bias", "out.bias"),), ["fc.weight", "fc.bias"], ["", "fc"], {"": "", "fc": "fc"}),
    "a child is renamed": (((r"a\.c", "a.d"),), ["a.b.w", "a.c.w"], ["", "a", "a.b", "a.c"],
        {"": "", "a": "a", "a.b": "a.b", "a.d": "a.c"}),
    "a module without tensors": (((r"^a(?=\.w)", "b"),), ["a.w"], ["", "a", "a.act", "act"],
        {"": "", "b": "a", "b.act": "a.act", "act": "act"}),
    "a path that would be none": (((r"^act$", ""), ("^relu$", "x..y")), ["a.w"], ["", "a", "act", "relu"],
        {"": "", "a": "a", "act": "act", "relu": "relu"}),
    "some fall to the root": (((r"^a\.", ""),), ["a.w", "b.w"], ["", "a", "b"], {"": "", "b": "b"}),
    "all fall to the root": (((r"^a\.", ""),), ["a.w", "a.c.w"], ["", "a", "a.c"], {"": "a", "c": "a.c"}),
    "wrapped in the middle": (((r"\._orig_mod", ""),), ["m._orig_mod.f.w"], ["", "m", "m._orig_mod", "m._orig_mod.f"],
        {"": "", "m": "m._orig_mod", "m.f": "m._orig_mod.f"}),
    "takes the place of one without tensors": (((r"^a\.", "b."),), ["a.w", "c.w"], ["", "a", "b", "c"],
        {"": "", "b": "a", "c": "c"}),
    "a swap": ((("^a", "t"), ("^b", "a"), ("^t", "b")), ["a.w", "b.w"], ["", "a", "b"], {"": "", "b": "a", "a": "b"}),
    "no root": (((r"^a\.", "b."),), ["a.w"], ["a"], {"b": "a"}),
    "segments are inserted": (((r"^a\.(\d)", r"a.layers.\1"),), ["a.0.w", "a.1.w"], ["", "a", "a.0", "a.1"],
        {"": "", "a.layers": "a", "a.layers.0": "a.0", "a.layers.1": "a.1"}),
}  # fmt: skip


@pytest.mark.parametrize("case", VERSIONS)
def test_where_versions_go(case: str) -> None:
    rules, names, paths, expected = VERSIONS[case]
    found = Rename(rules)(checkpoint(names, paths)).state_dict.versions
    assert found == {path: f"version of {origin}" for path, origin in expected.items()}


def test_a_name_of_a_million_dots() -> None:
    name = "." * 1_000_000
    found = Rename(((r"^\.", "a."),))(checkpoint([name], ["", "b"])).state_dict
    assert list(found.everything) == ["a" + name]
    assert found.versions == {"": "version of ", "b": "version of b"}


# The optimizer.


def test_an_optimizers_parameter_names_are_renamed_along(through: Through) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.param_groups[0]["param_names"] = [name for name, _ in net.named_parameters()]  # as torch 2.6 does
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    written = through(
        {"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}, Rename(((r"^(\d)\.", r"layers.\1."),))
    )
    names = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    assert list(written["state_dict"]) == names
    assert written["optimizer"]["param_groups"][0]["param_names"] == names
    fresh = nn.Sequential(OrderedDict(layers=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))))
    fresh.load_state_dict(written["state_dict"])
    resumed = torch.optim.Adam(fresh.parameters())
    resumed.load_state_dict(written["optimizer"])
    for old, new in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert torch.equal(old["exp_avg"], new["exp_avg"])
        assert torch.equal(old["step"], new["step"])


@pytest.mark.parametrize("rewriter", [StripModule(), AddModule(), StripPrefix("module"), AddPrefix("x."), Rename(())])
def test_every_renaming_rewriter_says_how(rewriter: Any) -> None:
    names = ["module.a.b", "c", "module._orig_mod.d", "e.f"]
    assert list(rewriter(checkpoint(names)).state_dict.everything) == [rewriter.rename(name) for name in names]


# By a dict, and by a function.


def shout(name: str) -> str:
    return name.upper()


def test_by_a_dict_of_whole_names(through: Through) -> None:
    state = OrderedDict({"a.w": torch.ones(1), "b.w": torch.zeros(1), "a.w.x": torch.ones(2)})
    state._metadata = {"": {"version": 1}, "a": {"version": 2}, "b": {"version": 3}}
    swap = {"a.w": "b.w", "b.w": "a.w"}
    found = through(state, Rename(swap))
    assert [(name, tensor.tolist()) for name, tensor in found.items()] == [
        *(("b.w", [1]), ("a.w", [0]), ("a.w.x", [1, 1])),
    ]
    rename = Rename(swap)
    swap.clear()  # it is kept as it was
    assert rename.rename("a.w") == "b.w"
    versions = Rename({"a.w": "c.d.w"})(checkpoint(["a.w", "b.w"], ["", "a", "b"])).state_dict.versions
    assert versions == {"": "version of ", "c.d": "version of a", "b": "version of b"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a.v": "c"}, r"1 name in the dict is not in the state_dict: 'a\.v'; did you mean 'a\.w'\?"),
        ({"x": "c", "y": "d"}, r"2 names in the dict are not in the state_dict: 'x', 'y'"),
        ({"a.w": ""}, r"the dict leaves the name 'a\.w' empty"),
        ({"a.w": 3}, r"'a\.w': 3 is not a pair of an old name and a new name"),
        (lambda name: None, r"<lambda>\(\) returned None for the name 'a\.w'; expected its new name"),
        (lambda name: "", r"<lambda>\(\) leaves the name 'a\.w' empty"),
        (len, r"len\(\) returned 3 for the name"),
    ],
)
def test_what_a_dict_or_a_function_may_not_say(rules: Any, message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        Rename(rules)(checkpoint(["a.w", "b.w"]))
    for same in ({"a.w": "b.w"}, lambda name: "x"):
        with pytest.raises(KeyCollisionError):
            Rename(same)(checkpoint(["a.w", "b.w"]))


def test_by_a_function(through: Through) -> None:
    assert list(through({"a.w": torch.ones(1), "b": torch.ones(1)}, Rename(shout))) == ["A.W", "B"]
    versions = Rename(lambda name: f"net.{name}")(checkpoint(["a.w"], ["", "a"])).state_dict.versions
    assert versions is not None
    assert list(versions.items())[1:] == [("net", "version of "), ("net.a", "version of a")]
    only_names = {"a.w": "b.w"}.__getitem__  # it is asked for names alone, and not for what modules are called
    assert list(Rename(only_names)(checkpoint(["a.w"], ["", "a"])).state_dict.everything) == ["b.w"]


def test_convert_takes_a_dict_or_a_function(save: Save, tmp_path: Path) -> None:
    path = save({"module.a.w": torch.ones(1), "module.b.w": torch.zeros(1)})
    for rename in ({"a.w": "c"}, lambda name: "c" if name == "a.w" else name):
        ckptkit.convert(path, tmp_path / "b.pth", strip_module=True, rename=rename, include=["c"], force=True)
        assert list(torch.load(tmp_path / "b.pth")) == ["c"]
    report = ckptkit.convert(path, tmp_path / "b.pth", rename={"module.a.w": "a"}, force=True)
    assert report.details["renames"] == [{"from": "module.a.w", "to": "a"}]
    with pytest.raises(RewriteError, match="not in the state_dict"):
        ckptkit.convert(path, tmp_path / "b.pth", rename={"a.w": "c"}, force=True)


def test_receipts_say_who_renamed(save: Save, tmp_path: Path) -> None:
    path, written = save({"a": torch.ones(1)}), []
    for _ in range(2):
        ckptkit.convert(path, tmp_path / "b.safetensors", rename=shout, force=True)
        written.append((tmp_path / "b.safetensors").read_bytes())
        ckptkit.convert(path, tmp_path / "b.safetensors", rename={"a": "b"}, force=True)
        written.append((tmp_path / "b.safetensors").read_bytes())
    assert written[:2] == written[2:]
    assert b"<function shout>" in written[0]
    assert b"Rename(rules={'a': 'b'})" in written[1]
    many = {f"w{number}": f"x{number}" for number in range(1000)}
    told = repr(Rename(many))
    assert re.fullmatch(r"Rename\(rules=<dict of 1,000 names, SHA-256 [0-9a-f]{64}>\)", told)
    assert told == repr(Rename(dict(reversed(many.items())))) != repr(Rename({**many, "w0": "y"}))
