"""What ``print(model)`` would show of a pickled module, without its class: ``Linear(in_features=4, ...)``.

A module prints as its class name around what its ``extra_repr`` gives (``torch/nn/modules/module.py``
``Module.__repr__``), then its children.  Each class of ``torch.nn`` has one row in `_RULES`, as of torch 2.15: its
normalization layers have ``bias=`` too, those of 2.11 do not.

A class that is not torch's may derive from one that is: it is identified by its attributes (`_FAMILIES`).  Any other
prints with its scalars, unless it has children: such a class rarely has an ``extra_repr``, and its scalars repeat what
the children say.
"""

from __future__ import annotations

from typing import NamedTuple

from ckptkit.checkpoint import TensorEntry
from ckptkit.dtypes import DTYPES
from ckptkit.normalize.modules import persistent
from ckptkit.pickling.inert import Global, InertDict, Object, named_items

__all__ = ["class_name", "is_printed", "is_scalar", "module_text", "plain_value"]

_MAX_TEXT = 200
"""Characters of a string setting that are shown."""

_MAX_ITEMS = 32
"""Items of a tuple or list that are shown; honest settings have one for each dimension."""

_MAX_NESTING = 4
"""Tuples in tuples: padding is given as pairs, at most."""

_MAX_SCALARS = 16
"""Scalars shown of a class that is not known."""

_MAX_PARAMETERS = 1000
"""Lines of a ParameterList or ParameterDict."""


class _Text(str):
    """Text that ``repr`` shows without quotes: a name, not a string."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class _Part(NamedTuple):
    """One setting as printed: a format over the module's attributes.

    It is left out where ``attribute`` has its ``usual`` value (or is a tuple of nothing else), and
    where the file has no such attribute, as those of older versions of torch.
    """

    text: str
    attribute: str | None = None
    usual: object = None


def _always(*texts: str) -> tuple[_Part, ...]:
    return tuple(_Part(text) for text in texts)


_INPLACE = (_Part("inplace={inplace}", "inplace", False),)
_AFFINE = _always("affine={affine}", "bias={bias?}")
_CONV = (
    *_always("{in_channels}", "{out_channels}", "kernel_size={kernel_size}", "stride={stride}"),
    _Part("padding={padding}", "padding", 0),
    _Part("dilation={dilation}", "dilation", 1),
    _Part("output_padding={output_padding}", "output_padding", 0),
    _Part("groups={groups}", "groups", 1),
    _Part("bias={bias?}", "bias?", True),
    _Part("padding_mode={padding_mode}", "padding_mode", "zeros"),
)
_NORM = (
    *_always("{num_features}", "eps={eps}", "momentum={momentum}"),
    *_AFFINE,
    _Part("track_running_stats={track_running_stats}"),
)
_RNN = (
    *_always("{input_size}", "{hidden_size}"),
    _Part("proj_size={proj_size}", "proj_size", 0),
    _Part("num_layers={num_layers}", "num_layers", 1),
    _Part("bias={bias}", "bias", True),
    _Part("batch_first={batch_first}", "batch_first", False),
    _Part("dropout={dropout}", "dropout", 0),
    _Part("bidirectional={bidirectional}", "bidirectional", False),
)
_CELL = (
    *_always("{input_size}", "{hidden_size}"),
    _Part("bias={bias}", "bias", True),
    _Part("nonlinearity={nonlinearity}", "nonlinearity", "tanh"),
)
_EMBEDDING = (
    *_always("{num_embeddings}", "{embedding_dim}"),
    _Part("padding_idx={padding_idx}", "padding_idx", None),
    _Part("max_norm={max_norm}", "max_norm", None),
    _Part("norm_type={norm_type}", "norm_type", 2),
    _Part("scale_grad_by_freq={scale_grad_by_freq}", "scale_grad_by_freq", False),
    _Part("sparse={sparse}", "sparse", False),
)
_EMBEDDING_BAG = (
    *_always("{num_embeddings!r}", "{embedding_dim!r}"),
    *_EMBEDDING[3:6],
    _Part("mode={mode!r}"),
    _Part("padding_idx={padding_idx}", "padding_idx", None),
)
_LINEAR = _always("in_features={in_features}", "out_features={out_features}", "bias={bias?}")
_LAYER_NORM = _always("{normalized_shape}", "eps={eps}", "elementwise_affine={elementwise_affine}", "bias={bias?}")
_GROUP_NORM = (*_always("{num_groups}", "{num_channels}", "eps={eps}"), *_AFFINE)
_DROPOUT = _always("p={p}", "inplace={inplace}")
_MAX_POOL = _always("kernel_size={kernel_size}", "stride={stride}", "padding={padding}", "dilation={dilation}",
                    "ceil_mode={ceil_mode}")  # fmt: skip
_POOL = _always("kernel_size={kernel_size}", "stride={stride}", "padding={padding}")
_LP_POOL = _always("norm_type={norm_type}", "kernel_size={kernel_size}", "stride={stride}", "ceil_mode={ceil_mode}")
_UPSAMPLE = (_Part("scale_factor={scale_factor!r}", "scale_factor", None), _Part("size={size!r}", "size", None),
             _Part("mode={mode!r}"))  # fmt: skip


def _numbered(name: str, *, to: int = 3) -> tuple[str, ...]:
    return tuple(f"{name}{n}d" for n in range(1, to + 1))


_RULES: dict[str, tuple[_Part, ...]] = {
    **dict.fromkeys(("Linear", "NonDynamicallyQuantizableLinear", "LazyLinear"), _LINEAR),
    "Bilinear": _always("in1_features={in1_features}", "in2_features={in2_features}", "out_features={out_features}",
                        "bias={bias?}"),
    **dict.fromkeys((*_numbered("Conv"), *_numbered("ConvTranspose"), *_numbered("LazyConv"),
                     *_numbered("LazyConvTranspose")), _CONV),
    **dict.fromkeys((*_numbered("BatchNorm"), *_numbered("InstanceNorm"), *_numbered("LazyBatchNorm"),
                     *_numbered("LazyInstanceNorm"), "SyncBatchNorm"), _NORM),
    "LayerNorm": _LAYER_NORM,
    "GroupNorm": _GROUP_NORM,
    "RMSNorm": _LAYER_NORM[:3],
    **dict.fromkeys(("LocalResponseNorm", "CrossMapLRN2d"), _always("{size}", "alpha={alpha}", "beta={beta}", "k={k}")),
    "Embedding": _EMBEDDING,
    "EmbeddingBag": _EMBEDDING_BAG,
    **dict.fromkeys(("RNN", "LSTM", "GRU"), _RNN),
    **dict.fromkeys(("RNNCell", "LSTMCell", "GRUCell"), _CELL),
    **dict.fromkeys(("Dropout", *_numbered("Dropout"), "AlphaDropout", "FeatureAlphaDropout"), _DROPOUT),
    **dict.fromkeys(_numbered("MaxPool"), _MAX_POOL),
    **dict.fromkeys((*_numbered("AvgPool"), *_numbered("MaxUnpool")), _POOL),
    **dict.fromkeys(_numbered("LPPool"), _LP_POOL),
    **dict.fromkeys((*_numbered("AdaptiveAvgPool"), *_numbered("AdaptiveMaxPool")),
                    _always("output_size={output_size}")),
    **dict.fromkeys(("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"), _UPSAMPLE),
    **dict.fromkeys(("ReLU", "ReLU6", "SiLU", "Mish", "SELU"), _INPLACE),
    **dict.fromkeys(("ELU", "CELU"), (_Part("alpha={alpha}"), *_INPLACE)),
    "LeakyReLU": (_Part("negative_slope={negative_slope}"), *_INPLACE),
    "RReLU": (*_always("lower={lower}", "upper={upper}"), *_INPLACE),
    "Hardtanh": (*_always("min_val={min_val}", "max_val={max_val}"), *_INPLACE),
    "Threshold": (*_always("threshold={threshold}", "value={value}"), *_INPLACE),
    "GELU": _always("approximate={approximate!r}"),
    **dict.fromkeys(("Hardshrink", "Softshrink"), _always("{lambd}")),
    "Softplus": _always("beta={beta}", "threshold={threshold}"),
    "PReLU": _always("num_parameters={num_parameters}"),
    **dict.fromkeys(("GLU", "Softmax", "Softmin", "LogSoftmax"), _always("dim={dim}")),
    "Flatten": _always("start_dim={start_dim}", "end_dim={end_dim}"),
    "Unflatten": _always("dim={dim}", "unflattened_size={unflattened_size}"),
    "Fold": _always("output_size={output_size}", "kernel_size={kernel_size}", "dilation={dilation}",
                    "padding={padding}", "stride={stride}"),
    "Unfold": _always("kernel_size={kernel_size}", "dilation={dilation}", "padding={padding}", "stride={stride}"),
    **dict.fromkeys(_numbered("ConstantPad"), _always("padding={padding}", "value={value}")),
    **dict.fromkeys((*_numbered("ZeroPad"), *_numbered("ReflectionPad"), *_numbered("ReplicationPad"),
                     *_numbered("CircularPad")), _always("{padding}")),
    "PixelShuffle": _always("upscale_factor={upscale_factor}"),
    "PixelUnshuffle": _always("downscale_factor={downscale_factor}"),
    "ChannelShuffle": _always("groups={groups}"),
}  # fmt: skip
"""For each class of ``torch.nn``, what its ``extra_repr`` shows; those it does not list show nothing."""

_ELSEWHERE: dict[str, tuple[_Part, ...]] = {
    "torchvision.ops.stochastic_depth.StochasticDepth": _always("p={p}", "mode={mode}"),
    "torchvision.ops.misc.FrozenBatchNorm2d": _always("{weight_size}", "eps={eps}"),
    "torchvision.models.convnext.LayerNorm2d": _LAYER_NORM,
}
"""The same for classes outside ``torch.nn`` that print themselves in their own way."""

_FAMILIES: tuple[tuple[frozenset[str], tuple[_Part, ...]], ...] = tuple(
    (frozenset(names.split()), parts)
    for names, parts in (
        ("in_channels out_channels kernel_size stride padding dilation transposed output_padding groups", _CONV),
        ("num_features eps momentum affine track_running_stats", _NORM),
        ("num_groups num_channels eps affine", _GROUP_NORM),
        ("normalized_shape eps elementwise_affine", _LAYER_NORM),
        ("num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse", _EMBEDDING),
        ("mode input_size hidden_size num_layers bias batch_first dropout bidirectional", _RNN),
        ("kernel_size stride padding dilation ceil_mode return_indices", _MAX_POOL),
        ("in_features out_features", _LINEAR),
    )
)
"""Attributes that together identify a class derived from one of torch's, and what it then shows."""

_CONTAINERS = frozenset({"ParameterList", "ParameterDict"})


_MAX_CLASS = 200
"""Characters of a class's name that a file gives as text."""


def class_name(node: Object) -> str:
    """``"module.Class"`` of a pickled module; an FX GraphModule is pickled as a call of a function, StyleGAN's too."""
    name, kept = node.class_name, persistent(node)
    if kept is not None and isinstance(own := kept.get("class_name"), str):
        return own[:_MAX_CLASS]
    return "torch.fx.graph_module.GraphModule" if name.startswith("torch.fx.graph_module.reduce_") else name


def module_text(node: Object, state: InertDict, *, has_children: bool) -> str:
    """The class with its settings, as ``print`` shows it, without its children.

    ``"Conv2d(3, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False)"``.  Settings of several lines
    (ParameterList) are between the brackets as ``extra_repr`` gives them.

    Args:
        node: the pickled module.
        state: its ``__dict__``.
        has_children: whether it has modules below it.
    """
    qualified = class_name(node)
    short = qualified.rpartition(".")[2]
    is_torch = qualified.startswith("torch.")
    if is_torch and short in _CONTAINERS:
        return f"{short}({_parameter_lines(short, state)})"
    parts = _RULES.get(short, ()) if is_torch else _ELSEWHERE.get(qualified)
    if parts is None:
        given = {key for key in state if isinstance(key, str)}
        parts = next((shown for names, shown in _FAMILIES if names <= given), None)
    if parts is None:
        prints_nothing = has_children or qualified.startswith("torchvision.")
        return f"{short}({'' if prints_nothing else _scalars(state)})"
    view = _View(state)
    return f"{short}({', '.join(shown for part in parts if (shown := _filled(part, view)) is not None)})"


class _View(dict[str, object]):
    """A module's attributes as plain values; ``bias?`` says whether it has a bias."""

    def __init__(self, state: InertDict) -> None:
        super().__init__()
        self._state = state

    def __missing__(self, key: str) -> object:
        if key == "bias?":
            return dict(named_items(self._state.get("_parameters"))).get("bias") is not None
        if key == "weight_size":
            weight = dict(named_items(self._state.get("_buffers"))).get("weight")
            return weight.shape[0] if isinstance(weight, TensorEntry) and weight.shape else None
        value = plain_value(self._state[key])
        if value is None and self._state[key] is not None:
            raise KeyError(key)
        return value


def _filled(part: _Part, view: _View) -> str | None:
    """The part with its values; ``None``: it is not shown."""
    try:
        if part.attribute is not None:
            value = view[part.attribute]
            usual = (part.usual,) * len(value) if isinstance(value, tuple) else part.usual
            if value == usual:
                return None
        return part.text.format_map(view)
    except LookupError:
        return None


def is_printed(node: object) -> bool:
    """Whether a value is a setting: a scalar, or a tuple of scalars."""
    return is_scalar(node) or (isinstance(node, tuple) and len(node) <= _MAX_ITEMS and all(map(is_scalar, node)))


def is_scalar(node: object) -> bool:
    """Whether a value is a number, a text or nothing."""
    return node is None or isinstance(node, (bool, int, float, str))


def plain_value(node: object, nesting: int = 0) -> object:
    """An inert node as the Python value it prints like; ``None`` for what is not a setting."""
    if isinstance(node, str):
        return node[:_MAX_TEXT]
    if is_scalar(node):
        return node
    if isinstance(node, (tuple, list)) and len(node) <= _MAX_ITEMS and nesting < _MAX_NESTING:
        return type(node)([plain_value(item, nesting + 1) for item in node])
    if isinstance(node, Global):
        return _Text(node.qualified[:_MAX_TEXT])
    if isinstance(node, Object) and node.class_name == "torch.Size" and len(node.args) == 1:
        size = plain_value(node.args[0], nesting + 1)
        return _Text(f"torch.Size({list(size)})") if isinstance(size, (tuple, list)) else None
    return None


def _scalars(state: InertDict) -> str:
    """The scalars of a class that is not known: its own attributes, as keyword arguments."""
    shown = [
        f"{key[:_MAX_TEXT]}={plain_value(value)!r}"
        for key, value in state.pairs
        if isinstance(key, str) and not key.startswith("_") and key != "training" and is_printed(value)
    ]
    return ", ".join(shown[:_MAX_SCALARS]) + (", ..." if len(shown) > _MAX_SCALARS else "")


def _parameter_lines(short: str, state: InertDict) -> str:
    """One line for each item of a ParameterList or ParameterDict: its kind and size."""
    named = dict([*named_items(state.get("_buffers")), *named_items(state.get("_parameters"))])
    keys = [key for key, _ in named_items(state.get("_keys"))] or list(named)
    size = state.get("_size")
    if isinstance(size, int) and 0 <= size <= _MAX_PARAMETERS:
        keys = [str(number) for number in range(size)]
    lines = []
    for key in keys[:_MAX_PARAMETERS]:
        value = named.get(key, state.get(key))
        if isinstance(value, TensorEntry):
            on_device = value.location.startswith("cuda")
            kind = f"torch.{value.dtype}"
            if short == "ParameterDict":  # which names the type as torch did before there were dtypes
                storage = DTYPES[value.dtype].storage_class or "Storage"
                kind = f"torch.{'cuda.' if on_device else ''}{storage.removesuffix('Storage')}Tensor"
            shape = "x".join(map(str, value.shape))
            device = f" ({value.location})" if on_device else ""
            lines.append(f"  ({key}): Parameter containing: [{kind} of size {shape}{device}]")
        else:
            lines.append(f"  ({key}): Object of type: {'NoneType' if value is None else type(value).__name__}")
    return "\n".join(lines)
