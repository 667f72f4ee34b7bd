"""One command for all that the findings about a file advise.

Each finding advises the conversion that it needs, by itself.  `combined_fix` combines them; if two conflict, these
rules decide, and it says what is left out:

- A command that writes only weights takes precedence over one that keeps everything: the others advised to drop what it
  drops.
- The weights are the selected ones; if none are selected, or another section is asked for, those of the most severe
  finding. A section advised besides them, such as averaged weights, gets a separate command.
- The weights go into the ``.safetensors`` that was advised, unless one of the commands needs a ``.pth``.  A
  ``.safetensors`` has no devices, so nothing needs to be moved to the CPU.
- Of two values for one option that takes one, the more severe finding's counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from ckptkit.report import CONVERT, CombinedFix, Finding, convert_command, listed
from ckptkit.shell import words_in

__all__ = ["combined_fix"]

_ALONE, _SECTION, _LOCATION = "--weights-only", "--section", "--map-location"

_FLAGS = frozenset({_ALONE, "--all-tensors", "--allow-part", "--densify", "--ignore-checksums", "--strip-module"})
"""Options of the commands that are advised which take no value."""

_REPEATED = frozenset({"--exclude", "--model-arg", "--rename"})
"""Those that may be given several times."""

_TELLING = {
    "--strip-module": "without wrapper prefixes",
    "--rename": "renamed",
    "--exclude": "without the excluded ones",
    "--like": "only those of the model",
    "--densify": "as plain tensors",
    "--map-location": "moved to {}",
}
"""What options do to the weights."""

_MOST_DROPPED = 6
"""Parts that are named."""


_Option = tuple[str, str | None]
"""An option, and its value."""


class _Advice(NamedTuple):
    """The conversion that a finding advises."""

    code: str
    command: str
    path: str
    destination: str
    options: tuple[_Option, ...]

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.destination)[1]

    @property
    def is_alone(self) -> bool:
        """Whether it writes weights and nothing else."""
        return self.suffix == ".safetensors" or (_ALONE, None) in self.options

    @property
    def is_named(self) -> bool:
        """Whether its output is named after the source alone, without a number against equal names."""
        stem = os.path.splitext(self.destination)[0]
        return not stem.rpartition("-")[2].isdigit()

    @property
    def section(self) -> str | None:
        return dict(self.options).get(_SECTION)


def combined_fix(
    findings: Iterable[Finding],
    beside: Sequence[str] | None = None,
    *,
    is_model: bool = False,
    partly: Collection[str] = (),
    needs: Callable[[str], Iterable[str]] = lambda _: (),
) -> CombinedFix | None:
    """The one conversion that does what all findings about a file advise; ``None``: none advises one.

    Args:
        findings: of one file, most severe first, as reported (`ckptkit.report.apart`).
        beside: the keys of everything beside the file's weights; ``None``: unknown.
        is_model: whether the file is a pickled model; every conversion then writes only the weights.
        partly: codes of findings that the advised conversion fixes only in part.
        needs: the flags that the weights of a section need beside, where the findings are of another.
    """
    every = [_advice(each.code, each.fix) for each in findings if each.fix is not None and each.fix.startswith(CONVERT)]
    every = [each for each in every if each.path == every[0].path]
    if not every:
        return None
    alone = [each for each in every if each.is_alone]
    is_selected = any(each.section is None for each in alone)
    section = None if is_selected else (alone or every)[0].section
    suffix = next((each.suffix for each in alone if each.suffix != ".safetensors"), (alone or every)[0].suffix)
    options, done = _merged(every, section, suffix)
    if alone and section is not None:
        options.update(dict.fromkeys((flag, None) for flag in needs(section)))
    codes = [code for code in done if code not in partly]
    if not codes:
        return None
    left = [code for code in dict.fromkeys(each.code for each in every) if code not in codes]
    ordered = sorted(options, key=lambda option: (option[0] != _SECTION, option[0] == _ALONE))
    keeps = _told(ordered, beside, left, is_alone=bool(alone), is_model=is_model)
    return {"command": _command(every, ordered, suffix), "keeps": keeps, "codes": codes}


def _merged(every: Sequence[_Advice], section: str | None, suffix: str) -> tuple[dict[_Option, None], list[str]]:
    """The options of all that go together, and the codes of the findings that these fix."""
    options: dict[_Option, None] = {}
    done: dict[str, None] = {}
    for each in every:
        wanted = _wanted(each, section, suffix)
        if wanted is not None and not any(_clashes(option, options) for option in wanted):
            options.update(dict.fromkeys(wanted))
            done[each.code] = None
    return options, [*done]


def _command(every: Sequence[_Advice], options: Sequence[_Option], suffix: str) -> str:
    """The command with these options: a finding's own, if it is the same and has the usual name."""
    for each in every:
        if each.suffix == suffix and {*each.options} == {*options} and each.is_named:
            return each.command
    words = [word for option in options for word in option if word is not None]
    others = {each.destination for each in every}
    return convert_command(every[0].path, *words, suffix=suffix, taken=others, is_clean=True)


def _advice(code: str, command: str) -> _Advice:
    _, _, path, destination, *words = words_in(command)
    options: list[_Option] = []
    rest = iter(words)
    for word in rest:
        options.append((word, None if word in _FLAGS else next(rest, None)))
    return _Advice(code, command, path, destination, tuple(options))


def _wanted(advice: _Advice, section: str | None, suffix: str) -> list[_Option] | None:
    """The options that one conversion needs for what another does; ``None``: it cannot be done with it."""
    if advice.section != section and (advice.is_alone or advice.section is not None):
        return None
    if suffix != ".safetensors":
        return [*advice.options]
    if any(name == _LOCATION and value != "cpu" for name, value in advice.options):
        return None
    return [option for option in advice.options if option[0] != _LOCATION]


def _clashes(option: _Option, given: dict[_Option, None]) -> bool:
    """Whether an option that takes one value has another."""
    name, value = option
    return name not in _REPEATED and any(known == name and other != value for known, other in given)


def _told(
    options: Sequence[_Option],
    beside: Sequence[str] | None,
    left: Sequence[str],
    *,
    is_alone: bool,
    is_model: bool,
) -> str:
    """The parts that the conversion keeps, drops, and does not fix."""
    section = dict(options).get(_SECTION)
    of = "" if section is None else f" of {section!r}"
    does = {_TELLING[name].format(value): None for name, value in options if name in _TELLING}
    done = f", {', '.join(does)}" if does else ""
    if is_model:
        text = f"keeps the weights{done}; drops the model around them: its class and settings"
    elif is_alone:
        own = [] if beside is None else [name for name in beside if section is None or not _leads_to(name, section)]
        drops = f"; drops {listed(own, _MOST_DROPPED, last=' and ')}" if own else ""
        drops = "; drops what is beside them" if beside is None and (_ALONE, None) in options else drops
        text = f"keeps the weights{of}{done}{drops}"
    else:
        text = f"keeps everything{done}"
    return f"{text}; does not fix all of {listed(left, 4, last=' and ')}" if left else text


def _leads_to(name: str, section: str) -> bool:
    return section == name or section.startswith(f"{name}.")
