"""The input of the checks of one `verify`, and the results they leave for one another."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ckptkit.arguments import device_problem
from ckptkit.bytesource import Source
from ckptkit.checkpoint import Checkpoint
from ckptkit.errors import DTypeError, VerifyError
from ckptkit.normalize.selection import holding_suffix, other_parts
from ckptkit.options import VerifyOptions
from ckptkit.report import Finding, convert_command
from ckptkit.shell import command_line
from ckptkit.startup import dataclass
from ckptkit.torch_bridge import dtype_of
from ckptkit.verifier.inputs import Inputs
from ckptkit.verifier.measure import Fit
from ckptkit.verifier.outputs import OutputTolerance, Trace, dtype_name, tolerance_of
from ckptkit.verifier.references import Reference

if TYPE_CHECKING:
    from ckptkit.documents import OutputDocument, TimedDocument, VerifyFindingDocument

__all__ = [
    "Check", "Context", "VerifyFinding", "floating_dtype", "peak_memory", "pick_device", "pick_devices",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyFinding(Finding):
    """A finding of the verifier.

    Attributes:
        check: the name of the check that found it; ``None``: it came before the first.
    """

    check: str | None = None

    @classmethod
    def of(cls, finding: Finding, check: str | None) -> VerifyFinding:
        """A finding, and who found it."""
        return cls(code=finding.code, severity=finding.severity, message=finding.message, fix=finding.fix, check=check)

    def to_dict(self) -> VerifyFindingDocument:
        """The finding for JSON documents."""
        return {**Finding.to_dict(self), "check": self.check}


@dataclass(slots=True, kw_only=True)
class Context:
    """The settings of one verification, and its results so far.

    Attributes:
        reference: the model's recipe.
        devices: where the forward pass runs: on the first, and once more on each other to compare.
        options: as requested.
        inputs: of the model; ``None``: no forward check was requested.
        against: another checkpoint of the same model, to compare outputs with; its file is open.
        golden: outputs recorded earlier, to compare with.
        file: the file of the checkpoint, for a look at its other sections; ``None``: no file is open.
        given: options of ``verify`` and ``convert`` that selected these weights in the file.
        failed: whether a check has found an error.
        fit: set by the fit check.
        loaded: set by the load check once every weight is in the model.
        zeroed: set by the weights check: names of matrices that are all zero.
        first: set by the forward check: the outputs of the first pass, on the CPU.
        trace: filled by the forward check where something will be compared with it.
        outputs: set by the forward check: the outputs' figures, as in the JSON document.
        passes: forward passes of the checkpoint on the first device, less those that measure noise.
        notes: by check, what it examined, in words: for checks without findings.
        figures: by check, its figures, for programs.
        seconds: how long each part took.
        steps: how long each check took, and the peak memory by then.
    """

    reference: Reference
    devices: tuple[torch.device, ...]
    options: VerifyOptions = field(default_factory=VerifyOptions)
    inputs: Inputs | None = None
    against: Checkpoint | None = None
    golden: Any = None
    file: Source | None = None
    given: tuple[str, ...] = ()
    failed: bool = False
    fit: Fit | None = None
    loaded: bool = False
    zeroed: tuple[str, ...] = ()
    first: Mapping[str, torch.Tensor] | None = None
    trace: Trace | None = None
    outputs: list[OutputDocument] = field(default_factory=list)
    passes: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[TimedDocument] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the forward check runs."""
        return self.devices[0]

    def tolerance(self, checkpoints: Sequence[Checkpoint], *outputs: Mapping[str, torch.Tensor]) -> OutputTolerance:
        """How far outputs may be apart, by the types of weights and outputs on both sides; noise aside."""
        dtype = self.options.dtype
        weights = {entry.dtype for checkpoint in checkpoints for entry in checkpoint.state_dict.values()}
        types = {dtype_name(tensor) for side in outputs for tensor in side.values()}
        return tolerance_of({*weights, *types, *([dtype] if dtype else [])}, self.options.atol, self.options.rtol)

    @property
    def reading(self) -> list[str]:
        """Options, as typed, without which the file could not be read."""
        return self.options.typed("tag", "tp_rules", "allow_part", "ignore_checksums")

    @property
    def asked(self) -> list[str]:
        """All others of this ``verify`` but for those in `given` and the reference."""
        single = ("device", "dtype", "input", "seed", "against", "golden", "write_golden", "atol", "rtol")
        return self.options.typed(*single, "input_shapes", "allow_missing", "allow_unexpected", "force", "forward")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note how long the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = round(time.perf_counter() - started, 6)
            self.steps.append({"name": name, "seconds": seconds, "peak_memory_nbytes": peak_memory()})

    def command(self, path: str, *options: str, model: str | None = None, **args: object) -> str | None:
        """This verification with more options, ready to be pasted.

        Args:
            path: the file.
            options: to add.
            model: the reference to name instead of this one.
            args: of its factory, to add to this one's.

        Returns:
            The command; ``None`` for a reference that has no name, and for another model than a golden's.
        """
        spec = model or self.reference.spec
        if spec is None or (self.golden is not None and (model or args)):
            return None
        like = self.model_options("--model", spec, {**(self.reference.args if model is None else {}), **args})
        return command_line(["ckptkit", "verify", *self.reading, *self.asked, path, *like, *self.taken(options)])

    @staticmethod
    def model_options(option: str, spec: str, args: Mapping[str, object]) -> list[str]:
        """The options that name a model."""
        return [option, spec, *(part for name, value in args.items() for part in ("--model-arg", f"{name}={value}"))]

    def conversion(self, checkpoint: Checkpoint, *options: str, like: bool = False) -> str:
        """The conversion that writes only the verified weights, ready to be pasted.

        Args:
            checkpoint: the weights.
            options: to add to those that selected the weights.
            like: whether to write exactly the reference's tensors; it has to have a name.
        """
        alone = ("--weights-only",) if other_parts(checkpoint) and not like else ()
        spec = self.reference.spec
        model = self.model_options("--like", spec, self.reference.args) if like and spec is not None else ()
        suffix = holding_suffix(checkpoint.state_dict)
        path, taken = checkpoint.origin.path, self.taken(options)
        return convert_command(path, *taken, *model, *self.reading, *alone, suffix=suffix)

    def taken(self, options: Sequence[str]) -> tuple[str, ...]:
        """Options, after those that selected these weights unless they are among them."""
        section, strip = self.given[:2] if "--section" in self.given else (), "--strip-module"
        kept = section if "--section" not in options else ()
        return (*kept, *[strip] * (strip in self.given and strip not in options), *options)


Check = Callable[[Checkpoint, nn.Module, Context], Iterator[Finding]]
"""One check.  It yields what it finds; a check that cannot be run at all raises `VerifyError`."""


def peak_memory() -> int | None:
    """The peak memory of this process so far, in bytes; ``None`` if the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes elsewhere


def pick_devices(names: str) -> tuple[torch.device, ...]:
    """The devices that names, separated by commas, mean on this machine; see `pick_device`.

    Raises:
        VerifyError: one is not such a name, is not here, or is named twice.
    """
    devices = tuple(pick_device(name.strip()) for name in names.split(","))
    known = [(device.type, device.index or 0) for device in devices]
    if len(set(known)) < len(known):
        raise VerifyError(f"--device {names}: names a device twice; expected different ones, such as cpu,cuda")
    return devices


def pick_device(name: str) -> torch.device:
    """The device a name means on this machine.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or ``"auto"``: the first of CUDA, MPS
            and the CPU that is here.

    Raises:
        VerifyError: it is not such a name, or this machine lacks the device.
    """
    if name == "auto":
        here = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(here)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        expected = f"{name!r:.80} is not a device for verify; expected auto, cpu, cuda, cuda:N or mps"
        raise VerifyError(device_problem(name) or expected)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise VerifyError(
                f"device {name!r} is not available: torch sees {count} CUDA devices; use --device cpu or auto"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise VerifyError(f"device {name!r} is not available; use --device cpu or auto")
    return device


def floating_dtype(name: str) -> torch.dtype:
    """The floating point type a model can be cast to.

    Raises:
        VerifyError: it is not one, or this torch lacks it.
    """
    try:
        found = dtype_of(name)
    except DTypeError as error:
        raise VerifyError(f"the model cannot be cast: {error}") from error
    if not found.is_floating_point:
        raise VerifyError(f"the model cannot be cast to {name}: expected a floating-point type, such as float16")
    return found
