"""References of transformers': through a small stand-in, and, where transformers is installed, its own.

``pytest -m needs_transformers tests/verifier/test_transformers.py`` runs the tests with transformers itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.fitting import check_file
from torch import nn

from ckptkit.errors import MissingDependencyError, VerifyError
from ckptkit.verifier.inputs import Input
from ckptkit.verifier.references import build

IDS = Input(shape=(1, 16), name="input_ids", below=50)


class Config:
    """A configuration of the stand-in."""

    def __init__(
        self, width: int = 4, vocab_size: int = 50, architectures: list[str] | None = None, **rest: Any
    ) -> None:
        self.width, self.vocab_size, self.architectures = width, vocab_size, architectures
        vars(self).update(rest)

    def get_text_config(self) -> Config:
        return self

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class PreTrainedModel(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.width)

    @classmethod
    def _from_config(cls, config: Config) -> PreTrainedModel:
        return cls(config)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": self.embed(input_ids)}


class Head(PreTrainedModel):
    """The same with an output layer."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.width, 2)


class Pair(PreTrainedModel):
    def forward(self, input_ids: Any, pixel_values: Any, return_loss: Any = None) -> None: ...


class Translator(PreTrainedModel):
    def forward(self, input_ids: Any, decoder_input_ids: Any = None) -> None: ...


class Seer(PreTrainedModel):
    main_input_name = "pixel_values"


class Hearer(PreTrainedModel):
    main_input_name = "input_features"

    def forward(self, input_features: Any, decoder_input_ids: Any = None) -> None: ...


class Listener(PreTrainedModel):
    main_input_name = "input_values"


def from_pretrained(folder: str, *, local_files_only: bool, trust_remote_code: bool, **settings: Any) -> Config:
    assert local_files_only and not trust_remote_code
    return Config(**{**json.loads((Path(folder) / "config.json").read_text()), **settings})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = ModuleType("transformers")
    classes = [PreTrainedModel, Head, Pair, Translator, Seer, Hearer, Listener]
    vars(transformers).update(
        {each.__name__: each for each in classes},
        AutoConfig=SimpleNamespace(
            from_pretrained=from_pretrained, for_model=lambda name, **settings: Config(**settings)
        ),
        AutoModel=SimpleNamespace(from_config=PreTrainedModel),
        MODEL_MAPPING={Config: PreTrainedModel},
        models=SimpleNamespace(
            auto=SimpleNamespace(configuration_auto=SimpleNamespace(CONFIG_MAPPING={"small": Config}))
        ),
    )
    monkeypatch.setitem(sys.modules, "transformers", transformers)


def folder(at: Path, **config: Any) -> str:
    (at / "config.json").write_text(json.dumps(config))
    return f"transformers:{at}"


@pytest.mark.usefixtures("stand_in")
def test_a_model_type() -> None:
    model, reference = build("transformers:small", {"width": "6"})
    assert type(model) is PreTrainedModel and model.embed.embedding_dim == 6 and model.embed.weight.is_meta
    assert reference.inputs == (IDS,) and reference.args == {"width": 6} and not model.training


@pytest.mark.usefixtures("stand_in")
def test_a_folder_names_its_class(tmp_path: Path) -> None:
    model, _ = build(folder(tmp_path, architectures=["Head"], width=3), {"width": "5"})
    assert type(model) is Head and model.head.in_features == 5
    for other in (["NoSuch"], ["models"], None):  # not a model of transformers': the bare one
        assert type(build(folder(tmp_path, architectures=other), {})[0]) is PreTrainedModel


PIXELS = {"image_size": 32, "num_channels": 1}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        ({"max_position_embeddings": 8}, [("input_ids", (1, 8))]),
        ({"vocab_size": 0}, []),
        ({"architectures": ["Pair"], **PIXELS}, [("input_ids", (1, 16)), ("pixel_values", (1, 1, 32, 32))]),
        (
            {"architectures": ["Translator"], "is_encoder_decoder": True},
            [("input_ids", (1, 16)), ("decoder_input_ids", (1, 16))],
        ),
        ({"architectures": ["Translator"]}, [("input_ids", (1, 16))]),
        ({"architectures": ["Seer"], **PIXELS}, [("pixel_values", (1, 1, 32, 32))]),
        ({"architectures": ["Seer"], **PIXELS, "image_size": [16, 24]}, [("pixel_values", (1, 1, 16, 24))]),
        ({"architectures": ["Seer"], **PIXELS, "num_frames": 4}, [("pixel_values", (1, 4, 1, 32, 32))]),
        ({"architectures": ["Seer"], "num_channels": 3}, [("pixel_values", (1, 3, 224, 224))]),
        ({"architectures": ["Seer"]}, []),
        (
            {"architectures": ["Hearer"], "num_mel_bins": 8, "max_source_positions": 20, "is_encoder_decoder": True},
            [("input_features", (1, 8, 40)), ("decoder_input_ids", (1, 16))],
        ),
        ({"architectures": ["Listener"], "conv_stride": [5, 2]}, [("input_values", (1, 16000))]),
        ({"architectures": ["Listener"], "num_mel_bins": 8, "max_length": 30}, [("input_values", (1, 30, 8))]),
    ],
)
def test_inputs(config: dict[str, Any], inputs: list[tuple[str, tuple[int, ...]]], tmp_path: Path) -> None:
    _, reference = build(folder(tmp_path, **config), {})
    assert [(each.name, each.shape) for each in reference.inputs] == inputs
    assert all((each.below is not None) == each.name.endswith("_ids") for each in reference.inputs)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "smal",
            {},
            "no folder .smal. with a config.json, .*; did you mean small\\?; names on a hub are not looked up",
        ),
        ("someone/small", {}, "names on a hub are not looked up"),
        ("small", {"width": "x"}, "--model-arg width=x: expected int"),
        ("small", {"widht": "3"}, "its configuration has no 'widht'; did you mean width?"),
    ],
)
def test_what_goes_wrong(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        build(f"transformers:{name}", args)


@pytest.mark.usefixtures("stand_in")
def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VerifyError, match="the configuration cannot be read: JSONDecodeError"):
        build(f"transformers:{tmp_path}", {})


@pytest.mark.usefixtures("stand_in")
def test_a_checkpoint_of_one(save: Any) -> None:
    report = check_file(save(PreTrainedModel(Config()).state_dict()), model="transformers:small", forward=True)
    assert report.ok and report.details["outputs"][0]["shape"] == [1, 16, 4]


@pytest.mark.usefixtures("stand_in")
def test_names_of_an_earlier_version(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class WeightRenaming:
        pass

    core, mapping = ModuleType("core"), ModuleType("mapping")
    vars(core).update(
        WeightRenaming=WeightRenaming,
        rename_source_key=lambda name, renamings, converters: (name.replace("words", "embed"), None),
    )
    vars(mapping).update(get_model_conversion_mapping=lambda model: [WeightRenaming(), "a converter"])
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", core)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", mapping)
    for name in ("words.weight", "embed.weight"):
        report = check_file(save({name: torch.randn(50, 4)}), model="transformers:small", forward=True)
        assert report.ok and report.details["coverage"]["tensors"] == 1
    report = check_file(save({"other.weight": torch.randn(50, 4)}), model="transformers:small", forward=True)
    assert not report.ok


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"transformers, which .* pip install '\.\[transformers\]'"):
        build("transformers:bert", {})


SMALL = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2},
    "vit": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    "whisper": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
                "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}  # fmt: skip


@pytest.mark.needs_transformers
@pytest.mark.parametrize("kind", SMALL)
def test_with_transformers_itself(kind: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SMALL[kind])
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    config.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # safetensors, tied names once, beside a config.json that names its class
    for spec, args in ((f"transformers:{tmp_path}", {}), (f"transformers:{kind}", SMALL[kind])):
        report = check_file(tmp_path / "model.safetensors", model=spec, model_args=args, forward=True)
        assert report.ok, report.findings
        assert report.details["coverage"]["parameters_share"] == 1
        assert next(build(spec, args)[0].parameters()).is_meta
