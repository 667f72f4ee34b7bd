"""What released files must be: one `Policy`, its values checked when it is made, and how policies are combined.

The names of the fields are those of the command's options and of the configuration's keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from ckptkit.arguments import device_problem, several, shapes
from ckptkit.checkpoint import Trust
from ckptkit.dtypes import DTYPES, meant_dtype
from ckptkit.errors import RewriteError, VerifyError
from ckptkit.formats import FORMATS
from ckptkit.nearness import did_you_mean
from ckptkit.report import parse_size
from ckptkit.startup import dataclass

__all__ = ["CONTAINERS", "POLICY_FIELDS", "POLICY_KEYS", "TRUST_ORDER", "Policy", "close_match"]

CONTAINERS: tuple[str, ...] = tuple(container.name for container in FORMATS)
"""The containers, by the names that `inspect` gives them."""


class _Unasked(str):
    """The value of an option that was not given."""

    __slots__ = ()


_UNASKED = _Unasked("needs_trust")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What every file must meet.

    Attributes:
        no_pickle: whether pickles are forbidden.
        max_trust: the highest trust level allowed; no policy lets a hostile file pass.
        no_nan: whether no tensor may hold NaN and no parameter Inf; reads the data.
        tp_rules: file with the rules for joining slices of tensor-parallel ranks.
        ignore_checksums: whether a file's recorded checksums are not checked against its bytes.
        max_size: bytes of a file (of a sharded set: of all its files); a number or ``"2GB"``.
        allow_dtype: the dtypes that tensors may have; empty: all.
        no_optimizer: whether an optimizer's state may not be in the file.
        no_prefix: whether names may not have a wrapper's prefix.
        location: the device tags that storages may have; empty: all.
        allow_part: whether a file may be a part of a checkpoint that is in several.
        require_format: the containers that files may be, a sharded set of them included; empty: all.
        fits: the reference model that the weights must load into; see `ckptkit.verify`.
        forward: whether to run the verifier's forward pass; of the model of ``fits``, of the manifest's golden or
            of the architecture that was identified.
        model_args: keyword arguments of the reference's factory.
        input_shapes: of the forward pass; empty: what the reference implies.

    Raises:
        VerifyError: a value is invalid for the policy.
    """

    no_pickle: bool = False
    max_trust: str = _UNASKED
    no_nan: bool = False
    max_size: int | str | None = None
    allow_dtype: Sequence[str] = ()
    no_optimizer: bool = False
    no_prefix: bool = False
    location: Sequence[str] = ()
    allow_part: bool = False
    require_format: Sequence[str] = ()
    fits: str | None = None
    forward: bool = False
    model_args: Mapping[str, Any] = field(default_factory=dict)
    input_shapes: Sequence[Sequence[int]] = ()
    tp_rules: str | None = None
    ignore_checksums: bool = False

    def __post_init__(self) -> None:
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _refused(name, getattr(self, name), "true or false")
        for name in _LISTS:
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        _among("max_trust", self.max_trust, ("safe", "needs_trust"))
        for given in self.allow_dtype:
            _among("allow_dtype", given, DTYPES)
        for given in self.require_format:
            _among("require_format", given, CONTAINERS)
        fits: Any = self.fits  # a configured value may have any type
        if fits is not None and (not isinstance(fits, str) or not fits):
            raise _refused("fits", fits, "a reference such as torchvision:resnet18")
        rules: Any = self.tp_rules
        if rules is not None and (not isinstance(rules, str) or not rules):
            raise _refused("tp_rules", rules, "the path of a file")
        model_args: Any = self.model_args
        if not isinstance(model_args, Mapping) or not all(isinstance(key, str) for key in model_args):
            raise _refused("model_args", model_args, "names and values")
        object.__setattr__(self, "max_size", _nbytes(self.max_size))
        object.__setattr__(self, "input_shapes", shapes("policy input-shapes", self.input_shapes))
        for problem in filter(None, map(device_problem, self.location)):
            raise VerifyError(f"policy location: {problem}")

    @property
    def every_pickle(self) -> bool:
        """Whether it says something of pickles, so that those count too which torch did not write."""
        return self.no_pickle or not isinstance(self.max_trust, _Unasked)

    @property
    def needs_model(self) -> bool:
        """Whether the verifier, and with it torch, is needed."""
        return self.fits is not None or self.forward

    def overridden(self, settings: Mapping[str, Any]) -> Policy:
        """The policy with these values instead of its own.

        Raises:
            VerifyError: a value is invalid for the policy.
        """
        return replace(self, **settings)


POLICY_FIELDS = tuple(each.name for each in fields(Policy))
"""The names of the policies, in the order in which they are checked."""

POLICY_KEYS = tuple(name.replace("_", "-") for name in POLICY_FIELDS)
"""The policies as they are typed, in the order in which they are checked."""

if TYPE_CHECKING:

    class PolicyKeywords(TypedDict, total=False):
        """The arguments of `ckptkit.check` for a `Policy`; ``None``: the configured value applies."""

        no_pickle: bool | None
        max_trust: Literal["safe", "needs_trust"] | None
        no_nan: bool | None
        max_size: int | str | None
        allow_dtype: str | Sequence[str] | None
        no_optimizer: bool | None
        no_prefix: bool | None
        location: str | Sequence[str] | None
        allow_part: bool | None
        require_format: str | Sequence[str] | None
        fits: str | None
        forward: bool | None
        model_args: Mapping[str, Any] | None
        input_shapes: Sequence[Sequence[int]] | None
        tp_rules: str | None
        ignore_checksums: bool | None


_FLAGS = ("no_pickle", "no_nan", "no_optimizer", "no_prefix", "allow_part", "forward", "ignore_checksums")
_LISTS = ("allow_dtype", "location", "require_format")

TRUST_ORDER: dict[str, int] = {trust: i for i, trust in enumerate(get_args(Trust))}
"""From what needs no trust to what deserves none."""


def close_match(given: str, known: Sequence[str]) -> str:
    """What a wrong word is answered with: the word that was probably meant, or all that could be."""
    return did_you_mean(given, known, 1).removeprefix("; ") or f"known: {', '.join(known)}"


def _among(name: str, given: object, known: Sequence[str] | Mapping[str, object]) -> None:
    if not isinstance(given, str) or given not in known:
        near = meant_dtype if known is DTYPES else did_you_mean
        meant = near(given, known) if isinstance(given, str) else ""
        raise _refused(name, given, f"one of {', '.join(known)}{meant}")


def _texts(name: str, given: object) -> tuple[str, ...]:
    texts = several(given) if isinstance(given, (str, list, tuple, set, frozenset)) else None
    if texts is None or not all(isinstance(text, str) and text for text in texts):
        raise _refused(name, given, "a string or a list of strings")
    return tuple(dict.fromkeys(texts))


def _nbytes(given: object) -> int | None:
    if given is None:
        return None
    if isinstance(given, str):
        try:
            return parse_size(given)
        except RewriteError as error:
            raise VerifyError(f"policy max-size: {error}") from None
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise _refused("max_size", given, "a size such as 2GB, or bytes as a number")
    return given


def _refused(name: str, given: object, expected: str) -> VerifyError:
    return VerifyError(f"policy {name.replace('_', '-')}: {given!r:.80} is not a valid value; expected {expected}")
