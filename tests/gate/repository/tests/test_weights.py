"""The released weights are those of the model, and fit for use."""

from ckptkit.testing import assert_matches_manifest, assert_no_nan, assert_safe

WEIGHTS = "weights/net.safetensors"


def test_the_weights_are_what_was_released() -> None:
    assert_matches_manifest(WEIGHTS, "weights/weights.lock.json")


def test_the_weights_are_fit_for_use() -> None:
    assert_safe(WEIGHTS)
    assert_no_nan(WEIGHTS)
