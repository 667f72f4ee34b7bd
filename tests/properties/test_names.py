"""Names: prefixes, rules and globs do what a loop over the state_dict does by hand, and what torch itself names."""

from __future__ import annotations

import fnmatch
import re
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from support.generated_tensors import ANYWHERE, KEYS, LEADING, MANY, SEGMENTS, SOME, WRAPPERS
from support.torch_oracle import Same, convert, load, save
from torch import nn

from ckptkit.bytesource import ByteRange, SourceFile
from ckptkit.checkpoint import STATE_DICT, Checkpoint, Origin, StateDict, Storage, TensorEntry
from ckptkit.errors import KeyCollisionError, RewriteError
from ckptkit.pickling.inert import InertDict
from ckptkit.rewrite import AddModule, AddPrefix, Rename, Select, StripModule, StripPrefix

pytestmark = pytest.mark.thorough


def checkpoint_of(names: list[str], versions: dict[str, object] | None) -> Checkpoint:
    """A checkpoint that no file backs: renaming reads none."""
    nowhere = ByteRange(mock.Mock(SourceFile), 0, 0)
    storage = Storage(key="0", dtype="float32", nbytes=0, location="cpu", source=nowhere)
    entries = {
        name: TensorEntry(storage=storage, storage_offset=0, shape=(0,), stride=(1,), dtype="float32") for name in names
    }
    return Checkpoint(
        state_dict=StateDict(entries, versions=versions),
        rest=STATE_DICT,
        origin=Origin(path="x.pth", size=0, format="torch-zip", kind="state_dict", state_path=""),
    )


def is_bare(name: str) -> bool:
    """Whether a name carries no wrapper."""
    *parents, _ = name.split(".")
    return not {*parents} & {*ANYWHERE} and not {*parents[:1]} & {*LEADING}


BARE = st.lists(KEYS.filter(is_bare), unique=True, min_size=1, max_size=6)


def versions_of(names: list[str]) -> dict[str, object]:
    """The module versions torch saves beside such names: for the root first, then every module."""
    paths = {".".join(name.split(".")[:depth]): None for name in names for depth in range(name.count(".") + 1)}
    return {path: InertDict([("version", number)]) for number, path in enumerate({"": None, **paths})}


@MANY
@given(names=BARE, versioned=st.booleans())
def test_strip_module_undoes_add_module(names: list[str], versioned: bool) -> None:
    versions = versions_of(names) if versioned else None
    before = checkpoint_of(names, versions)
    wrapped = before.rewrite(AddModule())
    assert list(wrapped.state_dict) == [f"module.{name}" for name in names]
    after = wrapped.rewrite(StripModule())
    assert list(after.state_dict.items()) == list(before.state_dict.items())
    assert after.state_dict.versions == versions
    assert list(after.state_dict.versions or ()) == list(versions or ())


@MANY
@given(names=BARE, wrappers=WRAPPERS)
def test_strip_module_takes_off_every_wrapper(names: list[str], wrappers: list[str]) -> None:
    prefix = ".".join(wrappers)
    after = checkpoint_of([f"{prefix}.{name}" for name in names], None).rewrite(StripModule())
    assert list(after.state_dict) == names


@MANY
@given(names=st.lists(KEYS | WRAPPERS.map(".".join) | st.tuples(WRAPPERS, KEYS).map(
    lambda pair: ".".join([*pair[0], pair[1]])), unique=True, max_size=8))  # fmt: skip
def test_strip_module_loses_nothing(names: list[str]) -> None:
    before = checkpoint_of(names, None)
    try:
        after = before.rewrite(StripModule())
    except KeyCollisionError as error:
        assert {error.first, error.second} <= set(names)
        assume(False)
    assert list(after.state_dict.values()) == list(before.state_dict.values())
    assert all(is_bare(name) for name in after.state_dict)
    assert list(after.rewrite(StripModule()).state_dict.items()) == list(after.state_dict.items())


DOTTED = st.lists(st.sampled_from(["a", "ab", "module", "é", "0"]), min_size=1, max_size=3).map(".".join)


@MANY
@given(names=st.lists(KEYS | DOTTED, unique=True, min_size=1, max_size=8), prefix=DOTTED)
def test_prefixes_are_taken_off_by_whole_segments(names: list[str], prefix: str) -> None:
    wanted = [name[len(prefix) + 1 :] if name.startswith(prefix + ".") else name for name in names]
    before = checkpoint_of(names, None)
    try:
        after = before.rewrite(StripPrefix(prefix))
    except KeyCollisionError:
        assert len(set(wanted)) < len(wanted)
        return
    assert list(after.state_dict) == wanted
    assert list(before.rewrite(AddPrefix(prefix)).state_dict) == [f"{prefix}.{name}" for name in names]
    assert list(before.rewrite(AddPrefix(prefix), StripPrefix(prefix)).state_dict) == names


RULES = st.sampled_from(
    [
        (r"\.", "_"),
        ("^", "net."),
        (r"^module\.", ""),
        (r"([a-z]+)\.([a-z0-9]+)", r"\2.\1"),
        (r"(?P<first>.)$", r"\g<first>!"),
        ("(?i)WEIGHT", "w"),
        ("[aeiou]", ""),
        (r"\d+", r"<\g<0>>"),
        ("a|b", "a"),
    ]
) | st.tuples(SEGMENTS.filter(bool).map(re.escape), SEGMENTS.map(lambda text: text.replace("\\", r"\\")))


@MANY
@given(names=st.lists(KEYS, unique=True, min_size=1, max_size=8), rules=st.lists(RULES, min_size=1, max_size=3))
def test_rules_are_what_re_makes_of_them(names: list[str], rules: list[tuple[str, str]]) -> None:
    wanted = names
    for pattern, replacement in rules:
        wanted = [re.sub(pattern, replacement, name) for name in wanted]
    try:
        after = checkpoint_of(names, versions_of(names)).rewrite(Rename(tuple(rules)))
    except KeyCollisionError as error:
        assert error.target in wanted
        assert len(set(wanted)) < len(wanted)
    except RewriteError:
        assert "" in wanted
    else:
        assert list(after.state_dict) == wanted


GLOBS = st.sampled_from(["*", "*.weight", "module.*", "layer*", "?", "[!m]*", "*é*", "nothing like it"]) | KEYS.map(
    lambda name: name[:2] + "*"
)


@MANY
@given(
    names=st.lists(KEYS, unique=True, min_size=1, max_size=8),
    include=st.lists(GLOBS, max_size=2),
    exclude=st.lists(GLOBS, max_size=2),
)
def test_globs_choose_as_fnmatch_does(names: list[str], include: list[str], exclude: list[str]) -> None:
    def matches(name: str, globs: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(f"net.{name}", glob) for glob in globs)

    wanted = [name for name in names if (not include or matches(name, include)) and not matches(name, exclude)]
    select = Select(tuple(include), tuple(exclude), rename=lambda name: f"net.{name}")
    try:
        after = checkpoint_of(names, None).rewrite(select)
    except RewriteError:
        useless = [glob for glob in include if not any(matches(name, [glob]) for name in names)]
        assert useless or not wanted
    else:
        assert list(after.state_dict) == wanted


# Modules of torch: what a state_dict is called when the very same module stands somewhere else.

LAYERS = st.sampled_from(
    [
        lambda: nn.Linear(2, 1),
        lambda: nn.BatchNorm1d(2),
        lambda: nn.LayerNorm(1, elementwise_affine=False),
        lambda: nn.MultiheadAttention(2, 1),
        nn.ReLU,
    ]
).map(lambda make: make())
MODULE_NAMES = st.sampled_from(["layer", "0", "module_list", "mlp_module", "norm", "é", "layer2"])
MODULES = st.recursive(
    LAYERS,
    lambda inside: (
        st.lists(inside, max_size=3).map(lambda layers: nn.Sequential(*layers))
        | st.dictionaries(MODULE_NAMES, inside, max_size=3).map(nn.ModuleDict)
    ),
    max_leaves=6,
)


class Compiled(nn.Module):
    """Keeps a module where ``torch.compile`` does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class Parallel(nn.Module):
    """Keeps a module where DataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def converted(folder: Path, module: nn.Module, ending: str, **options: object) -> OrderedDict[str, torch.Tensor]:
    """A module's state_dict after ``options``, and through a container of that ending."""
    result = convert(save(module.state_dict(), folder / "module.pth"), folder / f"result{ending}", **options)
    return load(convert(result, folder / "back.pth")).tree


def check_same_state(found: OrderedDict[str, torch.Tensor], expected: OrderedDict[str, torch.Tensor]) -> None:
    Same()(list(expected.items()), list(found.items()))
    assert found._metadata == expected._metadata


ENDINGS = st.sampled_from([".pth", ".safetensors"])


@SOME
@given(module=MODULES, wrappers=st.lists(st.sampled_from([Parallel, Compiled]), min_size=1, max_size=3), ending=ENDINGS)
def test_wrapped_modules(folder: Path, module: nn.Module, wrappers: list[type[nn.Module]], ending: str) -> None:
    bare = module.state_dict()
    assume(bare)
    wrapped = module
    for wrap in wrappers:
        wrapped = wrap(wrapped)
    check_same_state(converted(folder, wrapped, ending, strip_module=True), bare)
    check_same_state(converted(folder, module, ending, add_module=True), Parallel(module).state_dict())
    inner = nn.ModuleDict({"encoder": Compiled(module), "head": nn.Linear(1, 1)})
    plain = nn.ModuleDict({"encoder": module, "head": inner["head"]})
    check_same_state(converted(folder, inner, ending, strip_module=True), plain.state_dict())


@settings(SOME, max_examples=30)
@given(module=MODULES, below=MODULES, ending=ENDINGS)
def test_moved_modules(folder: Path, module: nn.Module, below: nn.Module, ending: str) -> None:
    assume(module.state_dict() and below.state_dict())
    encoder = nn.ModuleDict({"encoder": module})
    check_same_state(converted(folder, encoder, ending, strip_prefix="encoder."), module.state_dict())
    check_same_state(converted(folder, module, ending, add_prefix="encoder"), encoder.state_dict())
    both = nn.ModuleDict({"encoder": module, "decoder": below})
    moved = nn.ModuleDict({"a": nn.ModuleDict({"b": module}), "decoder": below})
    rule = r"^encoder\.=>a.b."
    found = converted(folder, both, ending, rename=[rule])
    Same()(list(moved.state_dict().items()), list(found.items()))
    # What a rule cannot know of is the module that now lies above.
    assert found._metadata == {key: value for key, value in moved.state_dict()._metadata.items() if key != "a"}
    for options, kept in (
        ({"include": ["encoder.*"], "strip_prefix": "encoder"}, module.state_dict()),
        ({"exclude": ["decoder.*"]}, encoder.state_dict()),
        (
            {"include": ["*encoder.*", "none.*"], "rename": ["^decoder=>none"], "exclude": ["none.*"]},
            encoder.state_dict(),
        ),
    ):
        # Versions stay of modules that keep something; of others there is nothing to load.
        for path in [path for path in kept._metadata if path and not any(name.startswith(f"{path}.") for name in kept)]:
            del kept._metadata[path]
        check_same_state(converted(folder, both, ending, **options), kept)
