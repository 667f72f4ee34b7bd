"""What a pickle pops: calls for their effect are kept, recursion is understood, the rest is listed."""

from __future__ import annotations

import collections
import copyreg
import functools
import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.normalize.trees import Place, SameContent, side_by_side
from ckptkit.pickling.inert import ITSELF, Global, InertDict, Object, TreeMap, attributes, effects_of, walk
from ckptkit.pickling.reader import PickleResult, read_pickle
from ckptkit.pickling.writer import write_pickle

PICKLERS = {"C": pickle.Pickler, "Python": pickle._Pickler}  # type: ignore[attr-defined]


def same(a: object, b: object) -> bool:
    """Whether two trees have the same content, tensors and storages apart."""
    return all(met.how == "bytes" for met in side_by_side([(Place(), a, b)], SameContent()))


def put(target: Any, state: dict[str, object]) -> None:
    vars(target).update(state)


def put_both(target: Any, state: tuple[dict[str, object], dict[str, object]]) -> object:
    for part in state:
        vars(target).update(part)
    return target  # as cloudpickle's does


def put_named(name: list[str], target: Any, state: object) -> None:
    setattr(target, name[0], state)


class Effect:
    """Something that is restored by a setter, the sixth item of what it is reduced to."""

    setter: Callable[..., object] = staticmethod(put)

    def __init__(self, **state: object) -> None:
        vars(self).update(state)

    def state(self) -> object:
        return dict(vars(self))

    def __reduce__(self) -> Any:
        return type(self), (), self.state(), None, None, self.setter


class Slots(Effect):
    setter = staticmethod(put_both)

    def state(self) -> object:
        return {"a": vars(self)["a"]}, {k: v for k, v in vars(self).items() if k != "a"}


class New(Effect):
    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (type(self),), self.state(), None, None, put  # type: ignore[attr-defined]


class Mapping(Effect, dict):  # type: ignore[type-arg]
    def __reduce__(self) -> Any:
        return Mapping, (), self.state(), None, iter(self.items()), put


class Sequence(Effect, list):  # type: ignore[type-arg]
    def __reduce__(self) -> Any:
        return Sequence, (), self.state(), iter(self), None, put


class Partial(Effect):
    def __init__(self, shared: list[str] | None = None, value: object = None) -> None:
        self.shared, self.value = shared, value

    def __reduce__(self) -> Any:
        return Partial, (self.shared,), self.value, None, None, functools.partial(put_named, ["value"])


class Built:
    """What BUILD gives its state."""

    def __init__(self, **state: object) -> None:
        vars(self).update(state)


class Made:
    """What is made from what may lead back to it."""

    def __init__(self, content: object) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return Made, (self.content,)


def _mapping() -> object:
    value = Mapping(label="x", deep=Built(inside=[1, 2]))
    value.update(one=1, two=[2])
    return value


def _sequence() -> object:
    value = Sequence(label="y")
    value.extend([1, "two", (3,)])
    return value


def _shared() -> object:
    shared: list[Any] = ["s"]
    return [Effect(a=shared), shared, Effect(a=shared), Partial(["p"], shared)]


def _itself() -> object:
    value = Effect(name="loop")
    value.me = [value]  # type: ignore[attr-defined]
    return [value, value]


def _inside_made() -> object:
    value = Effect(a=1)
    value.made = Made([value])  # type: ignore[attr-defined]
    return value


SHAPES: dict[str, Callable[[], object]] = {
    "attributes": lambda: Effect(a=[1], b={"c": (2.5, None)}),
    "no attributes": lambda: Effect(),
    "two parts": lambda: Slots(a=1, b=2),
    "by __newobj__": lambda: [New(a=1), New(a=2)],
    "a dict": _mapping,
    "a list": _sequence,
    "state with BUILD": lambda: Built(inner=Effect(a=Built(b=Effect(c=1))), after=1),
    "one in another": lambda: Effect(a=Effect(b=Effect(c=[Effect(d=0)]))),
    "shared arguments": _shared,
    "itself": _itself,
    "made of itself": _inside_made,
    "keys": lambda: {("k", 1): Effect(a=1), "last": Effect(b=2)},
}


def pickled(value: object, protocol: int = 2, pickler: str = "C") -> bytes:
    file = io.BytesIO()
    PICKLERS[pickler](file, protocol).dump(value)
    return file.getvalue()


def through(result: PickleResult) -> bytes:
    return write_pickle(result.root, lower=lambda node: node, protocol=result.protocol)


def shape(root: object) -> list[object]:
    """All of a graph of Python objects that can be told: kinds, values, and which are one object; in order."""
    seen: dict[int, int] = {}
    told: list[object] = []
    stack: list[Any] = [root]
    while stack:
        value = stack.pop()
        if value is None or isinstance(value, (bool, int, float, str)):
            told.append(value)
            continue
        if id(value) in seen:
            told.append(("again", seen[id(value)]))
            continue
        seen[id(value)] = len(seen)
        below: list[object] = []
        if isinstance(value, dict):
            below += [part for pair in value.items() for part in pair]
        if isinstance(value, (list, tuple)):
            below += value
        below += [part for pair in getattr(value, "__dict__", {}).items() for part in pair]
        told.append((type(value), len(below)))
        stack += reversed(below)
    return told


@pytest.mark.parametrize("pickler", PICKLERS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_setter_is_called_after_a_rewrite_too(kind: str, protocol: int, pickler: str) -> None:
    value = SHAPES[kind]()
    data = pickled(value, protocol, pickler)
    result = read_pickle(data)
    assert result.discarded == ()
    assert shape(pickle.loads(through(result))) == shape(value)
    copied = TreeMap(lambda leaf: leaf)(result.root)
    assert shape(pickle.loads(write_pickle(copied, lower=lambda node: node, protocol=2))) == shape(value)
    # And once more: what was written reads as what was read.
    assert same(read_pickle(through(result)).root, result.root)


def test_what_a_setter_is_given_is_in_the_tree() -> None:
    one, other = (read_pickle(pickled(Effect(a=[value], name="x"))).root for value in (1, 2))
    assert same(one, one)
    assert not same(one, other)
    (call,) = effects_of(one)
    assert isinstance(call.cls, Global)
    assert (call.cls.name, call.args[0]) == ("put", ITSELF)
    assert call in list(walk(one))
    state = attributes(one)
    assert state is not None
    assert state["name"] == "x"


def test_effects_are_called_in_their_order() -> None:
    """Several on one object, as dill writes them, on what is no object of a class, and on a name."""
    head = b"\x80\x02]q\x00("
    setter = b"c__main__\nf\n"
    dictionary = b"}q\x01" + b"".join(setter + b"h\x01K" + bytes([n]) + b"\x86R0" for n in (3, 1, 2))
    name = b"c__main__\nNet\nq\x02" + setter + b"h\x02h\x01\x86R0"
    result = read_pickle(head + dictionary + name + b"h\x02e.")
    assert isinstance(result.root, list)
    first, second, third = result.root
    assert isinstance(first, InertDict)
    assert [call.args for call in first.effects] == [(ITSELF, 3), (ITSELF, 1), (ITSELF, 2)]
    assert second is third
    assert effects_of(second)[0].args[1] is first
    again = read_pickle(through(result))
    assert same(again.root, result.root)
    ops = [op.name for op, _, _ in pickletools.genops(through(result))]
    assert ops.count("POP") == 4
    # A copy has its own effects, for what is in them may be replaced.
    copied = TreeMap(lambda leaf: leaf)(result.root)
    assert isinstance(copied, list)
    assert copied[1] is not second
    assert effects_of(copied[1])[0].args[1] is copied[0]


RECURSIVE: dict[str, Callable[[], object]] = {}


def _recursive(make: Callable[[], object]) -> Callable[[], object]:
    RECURSIVE[make.__name__] = make
    return make


for _count in (1, 2, 3, 4, 7):

    def _tuple(count: int = _count, last: bool = False) -> object:
        inner: list[object] = []
        others: list[object] = [Effect(a=number) for number in range(count - 1)]
        value = tuple([*others, inner] if last else [inner, *others])
        inner.append(value)
        return [value, inner]

    RECURSIVE[f"tuple of {_count}"] = _tuple
    RECURSIVE[f"tuple of {_count}, the list last"] = functools.partial(_tuple, last=True)


@_recursive
def in_a_dict() -> object:
    inner: dict[str, object] = {}
    value = (inner,)
    inner["back"] = value
    return [Made(0), value, inner]


@_recursive
def by_its_arguments() -> object:
    inner = Built()
    value = Made(inner)
    inner.back = [value]  # type: ignore[attr-defined]
    return [value, inner]


@_recursive
def by_a_list_in_its_arguments() -> object:
    inner: list[object] = []
    value = Made(inner)
    inner.append(value)
    return [Built(), value, inner]


@_recursive
def after_what_it_is_made_of() -> object:
    """``Made(first)`` is popped while ``first`` is on top: like a setter's call but for what follows."""
    first = Built(a=1)
    middle: Any = Built()
    value = Twice(first, middle)
    middle.back = value
    return [first, value]


@_recursive
def in_a_set() -> object:
    member = Built()
    member.of = Made(frozenset([member]))  # type: ignore[attr-defined]
    return member.of  # type: ignore[attr-defined]


class Twice:
    def __init__(self, first: object, second: object) -> None:
        self.first, self.second = first, second

    def __reduce__(self) -> Any:
        return Twice, (self.first, self.second)


@pytest.mark.parametrize("pickler", PICKLERS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", RECURSIVE)
def test_what_contains_itself_pops_honestly(kind: str, protocol: int, pickler: str) -> None:
    value = RECURSIVE[kind]()
    data = pickled(value, protocol, pickler)
    assert {op.name for op, _, _ in pickletools.genops(data)} & {"POP", "POP_MARK"} or kind == "in_a_set"
    result = read_pickle(data)
    assert result.discarded == ()
    setters = [call for node in walk(result.root) for call in effects_of(node)]
    assert {call.cls.name for call in setters if isinstance(call.cls, Global)} <= {"put"}
    if kind != "in_a_set":  # which Python orders by address
        assert shape(pickle.loads(through(result))) == shape(pickle.loads(data))


class Counted(Made):
    """Knows how much there was of what it is made from."""

    def __init__(self, content: dict[object, object]) -> None:
        super().__init__(content)
        self.count = len(content)


@pytest.mark.parametrize("more", [0, 1, 1500])
def test_what_is_set_late_of_a_dict_is_set_late_again(more: int) -> None:
    """As dill fills the globals of a function: they name it, and what is made of it."""
    pairs = [b"K\x00h\x01", *(b"M" + number.to_bytes(2, "little") + b"N" for number in range(1, more + 1))]
    batches = [pairs[at : at + 1000] for at in range(0, len(pairs), 1000)]
    late = b"h\x00" + b"".join(b"(" + b"".join(batch) + b"u" for batch in batches) + b"0"
    made = b"c%s\nCounted\n}q\x00X\x01\x00\x00\x00nNs\x85Rq\x01" % __name__.encode()
    data = b"\x80\x02" + made + late + b"h\x00\x86."
    result = read_pickle(data)
    assert result.discarded == ()
    for written in (data, through(result), through(read_pickle(through(result)))):
        value, content = pickle.loads(written)
        assert value.content is content
        assert content[0] is value
        assert list(content) == ["n", *range(more + 1)]
        assert value.count == 1
    assert isinstance(result.root, tuple)
    # Something else may take the dict's place, as the marker for the weights does.
    marker = object()
    taken = TreeMap(lambda leaf: leaf, [(result.root[1], marker)])(result.root[0])
    other = write_pickle(taken, lower=lambda node: InertDict([("a", 1)]) if node is marker else node)
    assert pickle.loads(other).content == {"a": 1}


@st.composite
def graphs(draw: st.DrawFn) -> object:
    """Objects that refer to each other in any direction; tuples and what is made of arguments to what can wait."""
    kinds = draw(
        st.lists(st.sampled_from(["list", "dict", "built", "effect", "tuple", "made"]), min_size=1, max_size=9)
    )
    open_kinds: dict[str, Callable[[], Any]] = {"list": list, "dict": dict, "built": Built, "effect": Effect}
    nodes: list[Any] = [open_kinds[kind]() for kind in kinds if kind in open_kinds] or [[]]
    waiting = list(nodes)
    for kind in kinds:
        if kind not in open_kinds:
            inside = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=4))
            nodes.append(tuple(inside) if kind == "tuple" else Made(inside[0]))
    for node in waiting:
        below = draw(st.lists(st.sampled_from([*nodes, 1, "text"]), max_size=3))
        if isinstance(node, list):
            node.extend(below)
        else:
            named = {f"k{number}": part for number, part in enumerate(below)}
            (node if isinstance(node, dict) else vars(node)).update(named)
    return [nodes[-1], *nodes[:2]]


@given(graphs(), st.sampled_from([2, 4]))
def test_graphs_load_as_they_were(value: object, protocol: int) -> None:
    data = pickled(value, protocol)
    result = read_pickle(data)
    assert result.discarded == ()
    assert shape(pickle.loads(through(result))) == shape(pickle.loads(data))


DISCARDED = {
    "a call": (b"cfoo\nbar\n(K\x01tR0", ["foo.bar"]),
    "a call that is given what is kept": (b"cfoo\nbar\n(h\x00tR0", ["foo.bar"]),
    "a call below a MARK": (b"(cfoo\nbar\n)R1", ["foo.bar"]),
    "a call that is memoized": (b"cfoo\nbar\n)Rq\x090", ["foo.bar"]),
    "what has a state": (b"cfoo\nBar\n)\x81}X\x01\x00\x00\x00aK\x01sb0", ["foo.Bar"]),
    "an instance of Python 2": (b"(ifoo\nBar\n0", ["foo.Bar"]),
    "two": (b"cfoo\nbar\n)R0cfoo\nbaz\n)R0", ["foo.bar", "foo.baz"]),
    "a setter of another object": (b"cfoo\nsetter\ncfoo\nBar\n)RK\x01\x86R0", ["foo.setter"]),
    "setattr of what is not the file's": (b"c__builtin__\nsetattr\n(cfoo\nBar\nX\x01\x00\x00\x00aK\x01tR0", []),
    "a setter below another call": (b"cfoo\nBar\n)\x81q\x08cfoo\nput\nh\x08K\x01\x86R00", ["foo.Bar"]),
}


@pytest.mark.parametrize(("call", "names"), DISCARDED.values(), ids=DISCARDED)
def test_what_belongs_to_nothing_is_listed(call: bytes, names: list[str]) -> None:
    result = read_pickle(b"\x80\x02]q\x00" + call + b"K\x05a.")
    assert result.root == [5]
    called = [node.class_name for node in result.discarded if isinstance(node, Object)]
    assert [name for name in called if name.startswith("foo")] == names
    assert len(result.discarded) == max(len(names), 1)
    assert {name.module for name in result.globals} & {"foo", "__builtin__"}


def test_a_call_that_is_kept_elsewhere_is_no_effect() -> None:
    result = read_pickle(b"\x80\x02](}q\x00cfoo\nf\nh\x00K\x01\x86Rq\x010h\x01e.")
    assert result.discarded == ()
    assert isinstance(result.root, list)
    assert effects_of(result.root[0]) == ()
    assert result.root[1].args == (result.root[0], 1)


def test_an_effect_before_the_object_is_complete_is_no_effect() -> None:
    """Written back after it, the call would find another object: it is listed instead."""
    head = b"\x80\x02cfoo\nBar\n)Rq\x00cfoo\nput\nh\x00K\x01\x86R0"
    assert [call.args[1] for call in effects_of(read_pickle(head + b".").root)] == [1]
    for filling in (b"}b.", b"K\x01a.", b"K\x01K\x02s."):
        result = read_pickle(head + filling)
        assert effects_of(result.root) == ()
        assert len(result.discarded) == 1


def test_a_long_row_of_pops_takes_no_time() -> None:
    call = b"cfoo\nf\n)R0"
    assert len(read_pickle(b"\x80\x02" + call * 20_000 + b"N.").discarded) == 20_000
    changes = b"c__builtin__\nsetattr\n(h\x00X\x01\x00\x00\x00aK\x01tR0"
    root = read_pickle(b"\x80\x02cfoo\nBar\n)Rq\x00" + changes * 20_000 + b".").root
    assert len(effects_of(root)) == 20_000


def test_counters_and_other_reductions_are_as_before() -> None:
    value = [collections.Counter("abca"), collections.OrderedDict(a=1), {1, 2}, frozenset("x"), complex(1, 2)]
    result = read_pickle(pickled(value))
    assert result.discarded == ()
    assert pickle.loads(through(result)) == value
