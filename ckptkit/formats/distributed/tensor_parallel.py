"""Slices of tensors that several ranks have, joined by rules; and folders that consist of such ranks only.

Tensor parallelism cuts a matrix along its outputs (dimension 0) or its inputs (dimension 1) and leaves a rank one slice
of it under the whole's name.  No file says how it was cut, so that rules do, by the tensor's name:

- an axis: the slices are joined along it, in the order of the ranks
- an axis, in parts: each slice is itself as many parts, one of each of as many matrices that are stored as one.  The
  first layer of a SwiGLU is two: the gates of all ranks come first, then what they gate
- replicated: every rank has a copy; one is taken, and the others are compared where values are read

A tensor without a rule counts as a copy if all ranks' tensors begin with the same values, and is compared like one;
otherwise it is refused and never guessed.

`MEGATRON_RULES` and `LLAMA_RULES` are those of Megatron (names of megatron-core and its predecessors) and of Meta's
``consolidated.00.pth``, ``consolidated.01.pth``, ... (`transformers`' ``convert_llama_weights_to_hf.py``).  Others are
given as a file, a JSON object of globs of names; the first that matches counts, before those rules::

    {"*.attention.wqkv.weight": 0, "*.attention.wo.weight": 1, "*.norm.weight": "replicated", "*.w13.weight": "swiglu"}
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ckptkit.bytesource import SourceFile
from ckptkit.checkpoint import Replica, TensorEntry
from ckptkit.errors import CorruptError, FileAccessError, UnsupportedError
from ckptkit.formats.json_text import parse, shown
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.nearness import with_meant_file
from ckptkit.pickling.tensors import is_tensor_like
from ckptkit.report import Finding, count_of, listed
from ckptkit.transfer.pieces import Piece, pieced
from ckptkit.transfer.values import same_values

__all__ = ["INSIDE", "LLAMA_RULES", "MEGATRON_RULES", "Joiner", "Rule", "ending", "rules_in", "shown_name"]

_LISTED = 5
"""Names that a message lists."""

_HEAD_NUMEL = 16 << 10
"""Elements of a tensor without a rule that are compared when it is opened."""

INSIDE = "\0"
"""The separator between the keys that lead to a tensor; in a name, a dot."""


class Rule(NamedTuple):
    """How the slices of tensors of some names are joined.

    Attributes:
        pattern: of their names, all of one.
        axis: the dimension along which they are joined; ``None``: they are copies.
        parts: how many matrices are stored as one; 0: one or two, as the size of the layer's second matrix says.
        is_even: whether all slices have one size, as slices made by even splitting do.
    """

    pattern: str
    axis: int | None
    parts: int = 1
    is_even: bool = True


def ending(tails: str, axis: int | None, parts: int = 1) -> Rule:
    """The rule for names that end so, after a dot or altogether."""
    return Rule(rf"(?:.*\.)?(?:{tails})", axis, parts)


_BOTH = r"\.(?:weight|bias)"

MEGATRON_RULES: tuple[Rule, ...] = (
    ending(rf"(?:lm_head\.dense|pooler\.dense|binary_head){_BOTH}", None),
    ending(rf"(?=[^.]*norm)[^.]*{_BOTH}|(?=[^.]*layer_?norm_)[^.]*_(?:weight|bias)", None),
    ending(r"(?:position|tokentype)_embeddings\.weight|inv_freq|router\.(?:weight|bias|expert_bias)", None),
    ending(r"shared_experts\.gate_weight", None),
    ending(r"word_embeddings(?:_for_head)?\.weight|output_layer\.(?:weight|bias)|lm_head\.bias|softmax_offset", 0),
    ending(rf"linear_(?:qkv|q|kv|q_proj|q_up_proj|kv_up_proj){_BOTH}", 0),
    ending(rf"(?:query_key_value|query|key_value){_BOTH}", 0),
    ending(rf"(?:linear_fc1|dense_h_to_4h){_BOTH}\d*", 0, 0),
    ending(r"(?:linear_proj|linear_fc2|dense_4h_to_h|[^.]*attention\.dense)\.weight\d*", 1),
    ending(r"(?:linear_proj|linear_fc2|dense_4h_to_h|[^.]*attention\.dense)\.bias\d*", None),
)
"""Names of ``megatron/core/transformer`` (``linear_qkv``, ``linear_fc1``) and of ``megatron/legacy/model``."""

LLAMA_RULES: tuple[Rule, ...] = (
    ending(rf"(?=[^.]*norm\.)[^.]*{_BOTH}|rope\.freqs", None),
    ending(rf"(?:wq|wk|wv|w1|w3|output){_BOTH}", 0),
    ending(r"(?:wo|w2)\.weight", 1),
)
"""All but ``tok_embeddings.weight``, of which Llama 2 splits each row and Llama 3 the rows."""

_SECOND = {"linear_fc1": "linear_fc2", "dense_h_to_4h": "dense_4h_to_h"}


def rules_in(path: str) -> tuple[Rule, ...]:
    """The rules that a file gives.

    Args:
        path: a JSON object as described above.

    Raises:
        FileAccessError: it cannot be read.
        FormatError: it is not such an object; the message says what is wrong.
    """
    try:
        file = SourceFile(path)
    except FileAccessError as error:
        raise with_meant_file(error) from error.__cause__
    try:
        if file.size > DEFAULT_LIMITS.record_nbytes:
            raise CorruptError("a rules file is smaller", path=path)
        document = parse(file.read(0, file.size), DEFAULT_LIMITS, "a rules file")
        if not isinstance(document, dict) or not document:
            raise CorruptError('a rules file is a JSON object: {"*.wq.weight": 0, "*.norm.weight": "replicated"}')
        return tuple(_rule(glob, how) for glob, how in document.items())
    except CorruptError as error:
        raise error.at(path=path) from None
    finally:
        file.close()


def _rule(glob: str, how: object) -> Rule:
    if how in ("replicated", "swiglu"):
        axis, parts = (None, 1) if how == "replicated" else (0, 2)
    elif type(how) is int and 0 <= how < DEFAULT_LIMITS.dimensions:
        axis, parts = how, 1
    else:
        raise CorruptError(
            f'the rule for {shown(glob)} is {shown(how)}; expected a dimension (0 or 1), "replicated" or "swiglu"'
        )
    return Rule(fnmatch.translate(glob), axis, parts, is_even=False)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


# Joining.


class Joiner:
    """Joins the slices of ranks, and collects findings.

    Args:
        rules: the first whose pattern matches a name counts.
        gated: whether first layers without second ones are two matrices; ``None``: unknown.

    Attributes:
        replicas: copies that must be equal.
        unruled: names without a rule, that all ranks seem to have a copy of.
        taken: names of what the first rank's was taken of: no tensors of weights.
        left: keys of what was left out, and why.
    """

    def __init__(self, rules: Sequence[Rule], gated: bool | None = None) -> None:
        self.rules = rules
        self.gated = gated
        self.replicas: list[Replica] = []
        self.unruled: list[str] = []
        self.taken: list[str] = []
        self.left: list[str] = []
        self._made: dict[tuple[object, ...], TensorEntry] = {}

    def join(self, ranks: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
        """The values of several ranks as one would have them.

        Args:
            ranks: the values by name, of each rank by what messages call it, in the ranks' order.

        Raises:
            CorruptError: a name is not in all ranks, or slices do not fit together.
            UnsupportedError: no rule says how some are joined; or some are not plain tensors.
        """
        (first, own), *others = ranks.items()
        for rank, values in others:
            if values.keys() != own.keys():
                odd = [shown_name(name) for name in (*own, *values) if (name in own) != (name in values)]
                raise CorruptError(
                    f"{first} and {rank} do not have tensors with the same names: only one has {listed(odd, _LISTED)}",
                    names=odd,
                )
        if not others:
            return dict(own)
        joined: dict[str, object] = {}
        unknown: list[str] = []
        for name in own:
            values = {rank: values[name] for rank, values in ranks.items()}
            joined[name] = self._joined(name, values, own, unknown)
        if unknown:
            raise UnsupportedError(
                f"no rule says how to join the slices of {count_of(len(unknown), 'tensor')}: "
                f"{listed(unknown, _LISTED)}; give rules with --tp-rules FILE",
                names=unknown,
            )
        return joined

    def _joined(self, name: str, values: Mapping[str, object], own: Mapping[str, object], unknown: list[str]) -> object:
        said = shown_name(name)
        tensors = {rank: value for rank, value in values.items() if isinstance(value, TensorEntry)}
        first = next(iter(values.values()))
        if said.endswith("_extra_state") or not tensors:
            if any(is_tensor_like(value) for value in values.values()) and not said.endswith("_extra_state"):
                unknown.append(f"{said} (not a plain tensor)")
            elif first is not None:
                self.taken.append(said)
            return first
        if len(tensors) < len(values) or len({tensor.dtype for tensor in tensors.values()}) > 1:
            raise CorruptError(f"tensor {said!r:.200} does not have the same dtype in all ranks", names=(said,))
        rule = next((rule for rule in self.rules if _compiled(rule.pattern).fullmatch(said)), None)
        if rule is None or rule.axis is None:
            return self._copy(said, tensors, unknown if rule is None else None)
        parts = rule.parts or self._matrices(name, said, own)
        if not parts:
            unknown.append(f"{said} (one matrix or two: args do not say whether its layer is gated)")
            return first
        return self._side_by_side(said, tensors, rule.axis, parts, rule.is_even)

    def _copy(self, name: str, tensors: Mapping[str, TensorEntry], unknown: list[str] | None) -> TensorEntry:
        """The first of what should be copies."""
        (rank, first), *others = tensors.items()
        if unknown is not None:
            if not all(first.shape == other.shape and _begin_alike(first, other) for _, other in others):
                unknown.append(f"{name} {[*first.shape]}")
                return first
            self.unruled.append(name)
        told = "" if unknown is None else "; no rule says how to join it: give one with --tp-rules FILE"
        for other, copy in others:
            self.same(name, first, copy, f"{rank} and {other}{told}")
        return first

    def same(self, name: str, value: TensorEntry, copy: TensorEntry, where: str) -> None:
        """Have two tensors compared.

        Raises:
            CorruptError: they cannot be copies.
        """
        if value.shape != copy.shape or value.dtype != copy.dtype:
            raise CorruptError(
                f"tensor {name!r:.200} should be the same in {where}: "
                f"it is {value.dtype} {[*value.shape]} and {copy.dtype} {[*copy.shape]}",
                names=(name,),
            )
        self.replicas.append(Replica(name, value, copy, where))

    def _matrices(self, name: str, said: str, own: Mapping[str, object]) -> int:
        """How many matrices a first layer is, by the size of the second; 0: not known."""
        first = own[re.sub(r"\bbias(\d*)$", r"weight\1", name)] if said.rpartition(".")[2].startswith("bias") else None
        first = own[name] if first is None else first
        name = re.sub(r"\bbias(\d*)$", r"weight\1", name)
        second = own.get(re.sub("linear_fc1|dense_h_to_4h", lambda match: _SECOND[match[0]], name))
        shapes = [value.shape for value in (first, second) if isinstance(value, TensorEntry)]
        if len(shapes) == 2 and all(len(shape) == 2 for shape in shapes) and shapes[1][1]:
            parts, left = divmod(shapes[0][0], shapes[1][1])
            return parts if not left and parts in (1, 2) else 0
        return 0 if self.gated is None else 1 + self.gated

    def _side_by_side(
        self, name: str, tensors: Mapping[str, TensorEntry], axis: int, parts: int, is_even: bool
    ) -> TensorEntry:
        """The slices along a dimension; of each rank the parts in turn."""
        first = next(iter(tensors.values()))
        for rank, tensor in tensors.items():
            fits = axis < len(tensor.shape) == len(first.shape) and not tensor.shape[axis] % parts
            fits = fits and (tensor.shape == first.shape or not is_even)
            if not fits or _without(tensor.shape, axis) != _without(first.shape, axis):
                how = f"dimension {axis}" + (f" in {parts} parts" if parts > 1 else "")
                raise CorruptError(
                    f"tensor {name!r:.200}: the slice {[*tensor.shape]} in {rank} does not fit the first one, "
                    f"{[*first.shape]}: the tensor is split along {how}",
                    names=(name,),
                )
        key = (axis, parts, *(tensor.view for tensor in tensors.values()))
        if key not in self._made:
            pieces: list[Piece] = []
            at, before = 0, (0,) * axis
            after = (0,) * (len(first.shape) - axis - 1)
            for part in range(parts):
                for rank, tensor in tensors.items():
                    size = tensor.shape[axis] // parts
                    own = (*[slice(None)] * axis, slice(part * size, (part + 1) * size))
                    local = tensor[own] if parts > 1 else tensor
                    pieces.append(Piece((*before, at, *after), local.shape, local, rank))
                    at += size
            shape = (*first.shape[:axis], at, *first.shape[axis + 1 :])
            self._made[key] = pieced(
                name, shape, first.dtype, pieces, requires_grad=first.requires_grad, is_parameter=first.is_parameter
            )
        return self._made[key]

    def findings(self) -> Iterator[Finding]:
        """All findings."""
        if self.left:
            yield Finding(
                code="not-merged",
                severity="warning",
                message=f"left out, because the ranks' values are not merged: {listed(self.left, _LISTED)}",
            )
        if self.unruled:
            message = f"{count_of(len(self.unruled), 'tensor')} without a rule, of which all ranks have a copy"
            yield Finding(
                code="taken-of-one-rank", severity="info", message=f"{message}: {listed(self.unruled, _LISTED)}"
            )
        if self.taken:
            message = f"{count_of(len(self.taken), 'value')} taken from the first rank"
            yield Finding(code="rank-values", severity="info", message=f"{message}: {listed(self.taken, _LISTED)}")


def shown_name(name: str) -> str:
    """A readable name: with dots between the keys that lead to the tensor."""
    return name.replace(INSIDE, ".")


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _begin_alike(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors of one shape begin with the same values, where that costs one read of each."""
    if not a.is_plain_bytes or not b.is_plain_bytes:
        return True
    count = min(a.numel, _HEAD_NUMEL)
    return same_values(replace(a, shape=(count,), stride=(1,)), replace(b, shape=(count,), stride=(1,)))
