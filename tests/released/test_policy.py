"""The values that policies can have, and what is said of others."""

from __future__ import annotations

from typing import Any

import pytest

from ckptkit.errors import VerifyError
from ckptkit.formats import FORMATS
from ckptkit.released.policy import CONTAINERS, POLICY_KEYS, Policy, close_match


def test_without_anything_a_hostile_file_is_still_refused() -> None:
    assert Policy().max_trust == "needs_trust"
    assert not Policy().needs_model


def test_a_single_value_stands_for_a_list_of_it_and_none_is_counted_twice() -> None:
    policy = Policy(allow_dtype="float32", location=["cpu", "cuda:0", "cpu"], require_format=("safetensors",))
    assert (policy.allow_dtype, policy.location) == (("float32",), ("cpu", "cuda:0"))
    assert policy.require_format == ("safetensors",)


@pytest.mark.parametrize(
    ("given", "nbytes"), [("2GB", 2_000_000_000), ("1.5 MiB", 1_572_864), (7, 7), ("700", 700), (None, None)]
)
def test_sizes(given: Any, nbytes: int | None) -> None:
    assert Policy(max_size=given).max_size == nbytes


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"no_pickle": "yes"}, r"no-pickle: 'yes' .* true or false"),
        ({"forward": 1}, r"forward: 1 .* true or false"),
        ({"max_trust": "hostile"}, r"max-trust: 'hostile' .* safe, needs_trust"),
        ({"max_trust": ["safe"]}, r"max-trust: \['safe'\]"),
        ({"max_size": "big"}, r"max-size: 'big' is not a valid size"),
        ({"max_size": 0}, r"max-size: 0 "),
        ({"max_size": True}, r"max-size: True "),
        ({"max_size": 1.5}, r"max-size: 1.5 "),
        ({"allow_dtype": ["float31"]}, r"allow-dtype: 'float31' .* float64"),
        ({"allow_dtype": [32]}, r"allow-dtype: \[32\] .* list of strings"),
        ({"allow_dtype": ""}, r"allow-dtype: ''"),
        ({"require_format": "torch"}, r"require-format: 'torch' .* safetensors"),
        ({"location": {"cpu": 1}}, r"location: .* list of strings"),
        ({"fits": ""}, r"fits: '' .* torchvision:resnet18"),
        ({"fits": 3}, r"fits: 3 "),
        ({"model_args": ["a"]}, r"model-args: \['a'\] .* names and values"),
        ({"input_shapes": 3}, r"input-shapes: 3 .* list of shapes"),
        ({"input_shapes": [[1, -1]]}, r"input-shapes: \[1, -1\] .* shape"),
        ({"input_shapes": [["1"]]}, r"input-shapes: \['1'\]"),
        ({"input_shapes": [[]]}, r"input-shapes: \[\]"),
    ],
)
def test_what_a_policy_cannot_be_is_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(VerifyError, match=f"policy {told}"):
        Policy(**settings)


def test_a_policy_overridden_is_checked_too() -> None:
    assert Policy(no_pickle=True, max_size=5).overridden({"no_pickle": False}) == Policy(max_size=5)
    with pytest.raises(VerifyError, match="no-nan"):
        Policy().overridden({"no_nan": "x"})


def test_names() -> None:
    assert tuple(container.name for container in FORMATS) == CONTAINERS
    assert "require-format" in POLICY_KEYS and "max-size" in POLICY_KEYS
    assert close_match("no-pickel", POLICY_KEYS) == "did you mean no-pickle?"
    assert close_match("zzz", ["a", "b"]) == "known: a, b"
