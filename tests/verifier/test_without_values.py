"""Models without values: what can be built so, what is noticed and built with values instead."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fitting import Run, finding
from torch import nn
from torch.nn.modules.module import _global_parameter_registration_hooks as hooks

from ckptkit.errors import VerifyError
from ckptkit.verifier.references import build


def made(factory: Any, **args: object) -> nn.Module:
    return build(factory, args)[0]


def has_values(factory: Any) -> bool:
    """Whether the model was built with values; with some of each it is neither."""
    model = made(factory)
    assert not hooks
    [answer] = {not p.is_meta for p in model.parameters()}
    return answer


def module(build_parts: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """A factory of a module whose ``__init__`` is ``build_parts``."""

    class Built(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            build_parts(self)

    return Built


class Sorted(nn.Module):
    """Keeps an order that it finds in the values; without values it fails as if it could not be inverted."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight[self.order]

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        order = sorted(range(len(weight)), key=weight.flatten().tolist().__getitem__)
        self.register_buffer("order", torch.tensor(order))
        return weight


def parametrized(parametrization: nn.Module) -> nn.Module:
    layer = nn.Linear(1, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", parametrization, unsafe=True)
    return layer


def parts(**given: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """A factory of a module with these attributes, each made from the module as it is by then."""

    def build_parts(self: nn.Module) -> None:
        for name, make in given.items():
            setattr(self, name, make(self))

    return module(build_parts)


def test_shapes_without_values_and_real_buffers() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(3, 5, dtype=torch.float64), nn.BatchNorm1d(5)))
    assert model[0].weight.is_meta and model[0].weight.dtype == torch.float64
    assert model[0].weight.shape == (5, 3) and model[0].weight.requires_grad
    assert model[1].running_var.tolist() == [1] * 5


def test_memory_and_random_numbers_are_not_used() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    made(lambda: nn.Sequential(*(nn.Linear(1 << 13, 1 << 15) for _ in range(256))))  # 256 GiB, a layer at a time
    assert torch.equal(torch.get_rng_state(), state)


def shared() -> nn.Module:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def test_a_parameter_registered_twice_stays_one() -> None:
    assert (model := made(shared))[0].weight is model[1].weight and model[0].weight.is_meta

    def twice(self: nn.Module) -> None:
        given = nn.Parameter(torch.ones(2), requires_grad=False)
        given.note = "kept"  # type: ignore[attr-defined]
        self.a = self.b = given

    model = made(module(twice))
    assert model.a is model.b and model.a.is_meta and not model.a.requires_grad and model.a.note == "kept"


def test_two_parameters_over_one_memory_stay_tied() -> None:
    def twice(self: nn.Module) -> None:
        values = torch.ones(4)
        self.a, self.b = nn.Parameter(values), nn.Parameter(values)

    model = made(module(twice))
    assert model.a.is_meta and model.a.untyped_storage()._cdata == model.b.untyped_storage()._cdata


@pytest.mark.parametrize(
    "factory",
    [
        parts(values=lambda self: nn.ParameterList([torch.ones(2), nn.Parameter(torch.ones(3))])),
        parts(values=lambda self: nn.ParameterDict({"a": nn.Parameter(torch.ones(2))})),
        parts(rnn=lambda self: nn.LSTM(3, 4, 2, bidirectional=True)),
        parts(attention=lambda self: nn.MultiheadAttention(8, 2, kdim=4)),
        lambda: nn.DataParallel(nn.Linear(2, 2)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: nn.Linear(2, 2, device="meta"),
        shared,
    ],
    ids=["list", "dict", "rnn", "attention", "wrapped", "weight_norm", "meta", "tied"],
)
def test_built_without_values(factory: Any) -> None:
    assert not has_values(factory)


def held(self: nn.Module) -> None:
    self.weight = given = nn.Parameter(torch.ones(2))
    self.given = [given]


def overlapping(self: nn.Module) -> None:
    values = torch.ones(4)
    self.whole, self.part = nn.Parameter(values), nn.Parameter(values[:2])


class Holder:
    """An object that is no module."""

    def __init__(self, value: object) -> None:
        self.value = value


def linear(self: nn.Module) -> nn.Module:
    return nn.Linear(2, 2)


CONSTANT = torch.ones(3)


class Named(nn.Parameter):
    """A class of parameters."""


@pytest.mark.parametrize(
    "factory",
    [
        module(held),
        module(overlapping),
        parts(weight=lambda self: nn.Parameter(CONSTANT)),
        parts(layer=linear, plain=lambda self: {"a": (self.layer.weight,)}),
        parts(layer=linear, holder=lambda self: Holder(self.layer.weight)),
        parts(layer=linear, call=lambda self: lambda x, weight=self.layer.weight: x @ weight),
        parts(layer=linear, norm=lambda self: self.layer.weight.norm()),
        parts(layer=linear, number=lambda self: self.layer.weight.sum().item()),
        parts(layer=linear, sign=lambda self: 1 if self.layer.weight.sum() > 0 else -1),
        parts(layer=linear, array=lambda self: self.layer.weight.detach().numpy()),
        parts(layer=linear, run=lambda self: self.layer(torch.ones(1, 2)).shape),
        parts(layer=linear, hidden=lambda self: [nn.Linear(2, 2)]),
        parts(weight=lambda self: Named(torch.ones(2))),
        module(lambda self: (setattr(self, "w", nn.Parameter(torch.ones(2))), setattr(self.w, "data", torch.zeros(2)))),
        module(
            lambda self: (
                setattr(self, "layer", nn.Linear(2, 2)),
                self.register_buffer("mask", self.layer.weight > 0, persistent=False),
            )
        ),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
        lambda: parametrized(Sorted()),
        nn.Linear(2, 2),
    ],
)
def test_built_with_values(factory: Any) -> None:
    assert has_values(factory)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_the_old_norms_run_with_the_weights_of_the_file(norm: Any, run: Run) -> None:
    source = norm(nn.Linear(3, 2))
    report = run(source.state_dict(), model=lambda: norm(nn.Linear(3, 2)), forward=True, input_shapes=[(1, 3)])
    assert report.ok


def test_with_values_the_seed_draws_them_as_ever() -> None:
    factory = parts(layer=linear, holder=lambda self: Holder(self.layer.weight))
    torch.manual_seed(3)
    expected = factory().layer.weight
    torch.manual_seed(3)
    model, reference = build(factory, {})
    assert torch.equal(model.layer.weight, expected)
    assert torch.equal(reference.make().layer.weight, expected)  # every call draws the same


def test_a_module_that_is_given_keeps_its_values() -> None:
    given = nn.Linear(2, 2)
    model = made(given)
    assert model is not given and torch.equal(model.weight, given.weight)


def test_lazy_modules_have_their_own_error(run: Run) -> None:
    with pytest.raises(VerifyError, match="'weight' is not initialized; run its lazy modules once"):
        run(nn.Linear(2, 3).state_dict(), model=lambda: nn.LazyLinear(3))


def raises() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("leave", "error"),
    [(raises, VerifyError), (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt)],
    ids=["of its own making", "Ctrl-C"],
)
def test_the_hook_is_gone_after_an_error(leave: Callable[[], None], error: type[BaseException]) -> None:
    def fails() -> nn.Module:
        nn.Linear(2, 2)
        leave()
        return nn.Linear(2, 2)

    with pytest.raises(error):
        made(fails)
    assert not hooks and not nn.Linear(2, 2).weight.is_meta


def test_other_threads_build_with_values() -> None:
    others: list[nn.Module] = []

    def factory() -> nn.Module:
        thread = threading.Thread(target=lambda: others.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return nn.Linear(2, 2)

    assert made(factory).weight.is_meta
    assert not others[0].weight.is_meta


def test_nothing_is_kept_of_the_model_that_was_given_up() -> None:
    first: list[weakref.ref[nn.Module]] = []

    def factory() -> nn.Module:
        model = parts(layer=linear, norm=lambda self: self.layer.weight.norm())()
        first.append(weakref.ref(model))
        return model

    made(factory)
    assert first[0]() is None and len(first) == 2


def test_a_factory_that_loads_weights_of_its_own(run: Run) -> None:
    pretrained = nn.Linear(3, 2).state_dict()

    def factory() -> nn.Module:
        model = nn.Linear(3, 2)
        model.load_state_dict(pretrained)
        return model

    assert not has_values(factory)
    report = run(
        {"weight": torch.ones(2, 3)}, model=factory, allow_missing=["bias"], forward=True, input_shapes=[(1, 3)]
    )
    assert finding(report, "allowed-missing") and report.ok
