"""Arguments of a factory: typed by its signature."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Optional

import pytest

from ckptkit.errors import VerifyError
from ckptkit.verifier.references.factory import typed


class Norm(enum.Enum):
    BATCH = "batch"
    LAYER = 2


def factory(
    whole: int,
    real: float,
    flag: bool,
    text: str,
    maybe: Optional[int],  # noqa: UP045 - the old form is to be understood
    either: int | str | None,
    pair: tuple[int, float],
    many: tuple[int, ...],
    some: list[str],
    sizes: Sequence[int],
    mode: Literal["fast", 3],
    norm: Norm,
    noted: Annotated[int, "in pixels"],
    table: dict[str, int],
    unknown: NoSuchName,  # type: ignore[name-defined]  # noqa: F821
    bare,
    ten=10,
    rate=0.5,
    name="net",
    on=False,
    shape=(1, 2),
    nothing=None,
    kind=Norm.BATCH,
    **rest: int,
) -> None:
    """Takes one of each."""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("whole", "10", 10),
        ("whole", " -3 ", -3),
        ("real", "1", 1.0),
        ("real", "1e-3", 0.001),
        ("real", "inf", float("inf")),
        ("flag", "true", True),
        ("flag", "No", False),
        ("flag", "1", True),
        ("text", "1", "1"),
        ("text", "None", "None"),
        ("text", "'a'", "'a'"),
        ("maybe", "None", None),
        ("maybe", "4", 4),
        ("either", "4", 4),
        ("either", "none", None),
        ("either", "4x", "4x"),
        ("pair", "(1, 2)", (1, 2.0)),
        ("pair", "1,2.5", (1, 2.5)),
        ("many", "[1, 2, 3]", (1, 2, 3)),
        ("many", "7", (7,)),
        ("some", "a,b", ["a", "b"]),
        ("some", "['a', 'b']", ["a", "b"]),
        ("sizes", "3,4", [3, 4]),
        ("mode", "fast", "fast"),
        ("mode", "3", 3),
        ("norm", "LAYER", Norm.LAYER),
        ("norm", "batch", Norm.BATCH),
        ("noted", "5", 5),
        ("table", "{'a': 1}", {"a": 1}),
        ("unknown", "(1, 2)", (1, 2)),
        ("bare", "1.5", 1.5),
        ("bare", "x", "x"),
        ("ten", "12", 12),
        ("ten", "0.1", 0.1),
        ("rate", "1", 1.0),
        ("name", "1", "1"),
        ("on", "yes", True),
        ("shape", "(3, 4)", (3, 4)),
        ("nothing", "5", 5),
        ("kind", "LAYER", Norm.LAYER),
        ("other", "5", 5),
    ],
)
def test_a_text_becomes_what_the_parameter_takes(name: str, text: str, value: object) -> None:
    made = typed(factory, {name: text}, "here:factory")[name]
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("whole", "1.5", "int"),
        ("whole", "True", "int"),
        ("real", "fast", "float"),
        ("flag", "perhaps", "bool"),
        ("maybe", "x", "int or None"),
        ("pair", "1,2,3", "tuple.int, float."),
        ("many", "1,x", "tuple.int, "),
        ("mode", "slow", "one of fast, 3"),
        ("norm", "GROUP", "one of BATCH, LAYER"),
        ("table", "[1]", "dict.str, int."),
        ("ten", "many", "int or float"),
        ("on", "5", "bool"),
    ],
)
def test_what_does_not_fit_names_the_type(name: str, text: str, kind: str) -> None:
    with pytest.raises(VerifyError, match=f"here:factory: --model-arg {name}=.*: expected {kind}"):
        typed(factory, {name: text}, "here:factory")


@pytest.mark.parametrize("value", [5, None, 1.5, ["a"], Norm.LAYER])
def test_what_is_no_text_stays_as_it_is(value: Any) -> None:
    assert typed(factory, {"text": value}, "here") == {"text": value}


def test_a_class_and_what_has_no_signature() -> None:
    class Net:
        def __init__(self, width: int, label: str = "x") -> None:
            pass

    assert typed(Net, {"width": "3", "label": "3"}, "here") == {"width": 3, "label": "3"}
    assert typed(print.__class__, {"a": "3"}, "here") == {"a": 3}
    assert typed(3, {"a": "3"}, "here") == {"a": 3}
