"""Options, alone and many at once, do what is done in torch by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from support.by_hand import Refused, by_hand
from support.generated_tensors import (
    LOCATIONS,
    MANY,
    SEGMENTS,
    SOME,
    STORABLE,
    WRAPPERS,
    resumes,
    state_dicts,
    tagged,
    tensors_of,
)
from support.torch_oracle import Loaded, Same, check_compacted, check_tags, convert, load, save, snapshot, through

import ckptkit
from ckptkit.casting import CAST_TARGETS
from ckptkit.conversion.options import Conversion
from ckptkit.errors import DTypeError, RewriteError
from ckptkit.options import ConvertOptions
from ckptkit.rewrite import MapLocation

pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore:.*omplex.* support is experimental")]

# Names that share their beginnings, so that prefixes, rules and globs meet some of them.
NAMES = st.one_of(
    st.tuples(WRAPPERS, st.sampled_from(["layer.weight", "layer.bias", "norm.weight", "0"])).map(
        lambda pair: ".".join([*pair[0], pair[1]])
    ),
    st.lists(st.sampled_from(["layer", "norm", "0", "weight"]), min_size=1, max_size=3).map(".".join),
    SEGMENTS,
)
TREES = resumes(names=NAMES) | state_dicts(names=NAMES)

RENAMINGS = {
    "strip_module": st.just(True),
    "add_module": st.just(True),
    "strip_prefix": st.sampled_from(["module", "layer", "norm.0"]),
    "add_prefix": st.sampled_from(["net", "module", "a.b"]),
    "rename": st.lists(
        st.sampled_from([r"\.=>_", "^layer=>block", r"(\w+)\.(\w+)=>\2.\1", "0=>", "weight$=>w", "^=>x."]),
        min_size=1,
        max_size=2,
    ),
}
CASTS = st.sampled_from([name for name in CAST_TARGETS if name in STORABLE])
GLOBS = st.sampled_from(["*", "*weight", "module*", "layer*", "*norm*", "*0*", "block*", "net.*", "*[!w]"])
SELECTIONS = {"include": st.lists(GLOBS, min_size=1, max_size=2), "exclude": st.lists(GLOBS, min_size=1, max_size=2)}
PLACES = {"map_location": LOCATIONS | st.dictionaries(LOCATIONS, LOCATIONS)}
TIES = {"tied": st.sampled_from(["duplicate", "error"])}


@st.composite
def chosen(draw: st.DrawFn, tree: dict[Any, Any]) -> dict[str, Any]:
    """A few options for a tree, together."""
    options: dict[str, Any] = {}
    for name, values in (RENAMINGS | SELECTIONS | PLACES | TIES).items():
        if draw(st.integers(0, 3)) == 0:
            options[name] = draw(values)
    if draw(st.booleans()):
        options["dtype"] = draw(CASTS)
        if draw(st.integers(0, 2)) == 0:
            options["keep_dtype"] = draw(st.lists(GLOBS, min_size=1, max_size=2))
    beside = [str(key) for key in tree if key != "state_dict"] if "state_dict" in tree else []
    if draw(st.booleans()):
        options["weights_only"] = True
    if beside and draw(st.booleans()):
        options["leave_out"] = draw(st.lists(st.sampled_from(beside), min_size=1, max_size=2, unique=True))
    return options


def check_converted(folder: Path, source: Path, options: dict[str, Any]) -> Loaded | None:
    """Convert, and hold the output against what is made by hand; ``None``: it is refused, and must be."""
    target = folder / "result.pth"
    target.unlink(missing_ok=True)
    cast = getattr(torch, options.get("dtype", "bool"))
    try:
        expected = by_hand(load(source), **options)
    except Refused:
        with pytest.raises(RewriteError):
            convert(source, target, **options)
        assert not target.exists()
        return None
    if any(each.is_neg() and each.element_size() == 1 for each in tensors_of(expected.tree)):
        with pytest.raises(DTypeError, match="lazily negated"):
            convert(source, target, **options)
        return None
    found = load(convert(source, target, **options))
    for loaded in (expected, found):
        for state in mappings(loaded.tree):
            # Versions go with the modules: see the tests of names.
            versions = vars(state).pop("_metadata", None)
            assert versions is None or all(isinstance(path, str) for path in versions)
    same = Same(compacted=True, cast=cast)
    same(expected.tree, found.tree)
    check_compacted(same.tensors)
    check_tags(expected, found, same.tensors)
    return found


def mappings(tree: Any) -> Iterator[Any]:
    """The dicts that can have attributes: the state_dict."""
    yield from (node for node in (tree, tree.get("state_dict")) if hasattr(node, "__dict__"))


def saved(folder: Path, data: st.DataObject, tree: dict[Any, Any]) -> Path:
    return save(tree, folder / "source.pth", data.draw(tagged(tensors_of(tree))))


@pytest.mark.parametrize("option", [*RENAMINGS, *SELECTIONS, *PLACES, *TIES])
@settings(SOME, max_examples=25)
@given(data=st.data(), tree=TREES)
def test_one_option(folder: Path, option: str, data: st.DataObject, tree: dict[Any, Any]) -> None:
    values = (RENAMINGS | SELECTIONS | PLACES | TIES)[option]
    result = check_converted(folder, saved(folder, data, tree), {option: data.draw(values)})
    event(f"refused: {result is None}")


@SOME
@given(data=st.data(), tree=TREES, dtype=CASTS, keep=st.lists(GLOBS, max_size=2))
def test_casts(folder: Path, data: st.DataObject, tree: dict[Any, Any], dtype: str, keep: list[str]) -> None:
    check_converted(folder, saved(folder, data, tree), {"dtype": dtype, "keep_dtype": keep})


@SOME
@given(data=st.data(), tree=resumes(names=NAMES))
def test_parts_left_out(folder: Path, data: st.DataObject, tree: dict[Any, Any]) -> None:
    source = saved(folder, data, tree)
    weights = check_converted(folder, source, {"weights_only": True})
    assert weights is not None
    assert list(weights.tree) == list(tree["state_dict"])
    beside = [key for key in tree if key != "state_dict"]
    gone = data.draw(st.lists(st.sampled_from(beside), min_size=1, unique=True))
    result = check_converted(folder, source, {"leave_out": [str(key) for key in gone]})
    assert result is not None
    assert list(result.tree) == [key for key in tree if key not in gone]


@settings(MANY, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), tree=TREES)
def test_options_together(folder: Path, data: st.DataObject, tree: dict[Any, Any]) -> None:
    source = saved(folder, data, tree)
    options = data.draw(chosen(tree))
    result = check_converted(folder, source, options)
    event(f"refused: {result is None}")


@SOME
@given(data=st.data(), tree=resumes(), new=LOCATIONS)
def test_map_location_changes_tags_alone(folder: Path, data: st.DataObject, tree: dict[Any, Any], new: str) -> None:
    source = saved(folder, data, tree)
    expected = load(source)
    mapping = data.draw(st.dictionaries(LOCATIONS, LOCATIONS))
    for given_map, wanted in (
        (new, [new] * len(expected.tags)),
        (mapping, [mapping.get(tag, tag) for tag in expected.tags]),
        (lambda storage, tag: {"mps": new}.get(tag), [new if tag == "mps" else tag for tag in expected.tags]),
    ):
        found = load(through(source, folder / "result.pth", MapLocation(given_map)))
        Same()(expected.tree, found.tree)
        assert found.tags == wanted


@SOME
@given(data=st.data(), tree=TREES)
def test_map_location_is_what_torch_loads_with(folder: Path, data: st.DataObject, tree: dict[Any, Any]) -> None:
    source = saved(folder, data, tree)
    new = data.draw(LOCATIONS)
    if new == "cpu":  # this machine has it: torch loads without being asked to map, and all lies there
        loaded = torch.load(convert(source, folder / "result.pth", map_location=new), weights_only=False)
        same = Same(compacted=True)
        same(torch.load(source, map_location=new, weights_only=False), loaded)
        check_compacted(same.tensors)
    with ckptkit.open(convert(source, folder / "result.pth", map_location=new)) as file:
        assert {entry.location for entry in file.state_dict.values()} <= {new}
    found = load(
        convert(source, folder / "result.pth", map_location=lambda _, tag: {"mps": new, "cuda:1": None}.get(tag))
    )
    old = load(source)
    same = Same(compacted=True)
    same(old.tree, found.tree)
    for before, after in same.tensors:
        assert found.tag(after) == (new if old.tag(before) == "mps" else old.tag(before))


@SOME
@given(data=st.data(), tree=TREES)
def test_options_leave_what_was_read_alone(folder: Path, data: st.DataObject, tree: dict[Any, Any]) -> None:
    source = saved(folder, data, tree)
    options = data.draw(chosen(tree))
    with ckptkit.open(source) as file:
        before = snapshot(file.checkpoint)
        try:
            conversion = Conversion(file.checkpoint, ConvertOptions(**options))
        except RewriteError:
            conversion = None
        assert snapshot(file.checkpoint).keys() == before.keys()
        assert {key: parts[1:] for key, parts in snapshot(file.checkpoint).items()} == {
            key: parts[1:] for key, parts in before.items()
        }
        if conversion is not None:
            plan = ckptkit.CheckpointFile(conversion.result, file._file).plan(folder / "never.pth")
            assert plan.nbytes > 0
            assert {key: parts[1:] for key, parts in snapshot(file.checkpoint).items()} == {
                key: parts[1:] for key, parts in before.items()
            }


@SOME
@given(data=st.data(), tree=TREES)
def test_the_same_options_give_the_same_bytes(folder: Path, data: st.DataObject, tree: dict[Any, Any]) -> None:
    source = saved(folder, data, tree)
    options = data.draw(chosen(tree))
    try:
        once = convert(source, folder / "once.pth", **options).read_bytes()
    except RewriteError:
        return
    assert convert(source, folder / "twice.pth", **options).read_bytes() == once
    bare = convert(source, folder / "bare.pth", **options, receipt=False)
    unchecked = convert(source, folder / "unchecked.pth", **options, receipt=False, check=False)
    assert unchecked.stat().st_size == bare.stat().st_size  # checksums alone are not in it
    Same()(load(bare).tree, load(unchecked).tree)
    # Stripped twice, cast twice, moved twice, cut twice: nothing more happens.
    again = {
        k: v for k, v in options.items() if k in ("strip_module", "map_location", "tied") and not isinstance(v, dict)
    }
    try:
        after = convert(bare, folder / "after.pth", **again, receipt=False)
    except RewriteError:
        return
    twice = convert(after, folder / "more.pth", **again, receipt=False)
    assert twice.read_bytes() == after.read_bytes()


@SOME
@given(
    data=st.data(), tree=TREES, ending=st.sampled_from([".pth", ".safetensors"]), size=st.none() | st.integers(1, 9000)
)
def test_in_one_go_or_one_after_another(
    folder: Path, data: st.DataObject, tree: dict[Any, Any], ending: str, size: int | None
) -> None:
    source = saved(folder, data, tree)
    options = data.draw(chosen(tree)) | {"weights_only": True, "receipt": False}
    container = {"max_shard_size": size, "receipt": False}
    try:
        first = convert(source, folder / "first.pth", **options)
        then = convert(first, folder / f"output{ending}", **container)
    except RewriteError:
        with pytest.raises(RewriteError):
            convert(source, folder / f"output{ending}", **options | container)
        return
    expected = written(then)
    assert written(convert(source, folder / f"output{ending}", **options | container)) == expected
    event(f"files: {len(expected)}")


def written(path: Path) -> dict[str, bytes]:
    """A file, or an index and its shards."""
    shards = path.parent.glob(path.name.partition(".")[0] + "-*") if path.suffix == ".json" else ()
    return {part.name: part.read_bytes() for part in (path, *shards)}
