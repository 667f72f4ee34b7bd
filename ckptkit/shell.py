"""Command lines for the current shell, so that a fix can be pasted where it is read.

- POSIX shells (also Git Bash and MSYS on Windows): as `shlex` quotes.
- ``cmd.exe``: a program is given the line as a whole and splits it by the rules of the C runtime
  (https://learn.microsoft.com/cpp/c-language/parsing-c-command-line-arguments), but cmd looks at it before and acts
  upon ``& | < > ^ %``, and upon ``!`` where that was switched on.  In double quotes all but ``%`` and ``!`` are plain;
  of a word with one of these, or with a quote in it, every such character is escaped with ``^``.
- PowerShell: single quotes, in which a quote is written twice.  Versions before 7.3 take double quotes from words that
  they hand to a program (``about_Parsing``): in names of files there are none on Windows.

No shell but POSIX's expands ``*``; `ckptkit.places.expanded` does for the others.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from typing import Literal

__all__ = ["Shell", "at_hand", "command_line", "mkdir_command", "named", "quoted", "words_in"]

Shell = Literal["posix", "cmd", "powershell"]

_QUOTES = "'\u2018\u2019\u201a\u201b"
"""The characters that PowerShell treats as a single quote."""


def named(system: str, environment: Mapping[str, str]) -> Shell:
    """The shell that started a process.

    ``cmd.exe`` leaves no mark.  PowerShell adds folders of its own to those of ``PSModulePath``, which Windows sets for
    all with at most two, and Git Bash sets ``MSYSTEM``.

    Args:
        system: ``os.name``.
        environment: of the process.
    """
    if system != "nt" or environment.get("MSYSTEM") or environment.get("SHELL", "").endswith(("sh", "sh.exe")):
        return "posix"
    folders = [folder for folder in environment.get("PSModulePath", "").split(";") if folder]
    return "powershell" if len(folders) > 2 else "cmd"


@functools.cache
def at_hand() -> Shell:
    """The shell that this process was started from, as far as that can be told."""
    return named(os.name, os.environ)


def quoted(word: str, shell: Shell | None = None) -> str:
    """A word as typed.

    Args:
        word: for the program.
        shell: whose rules; ``None``: those of the one at hand.
    """
    shell = shell or at_hand()
    if shell == "posix":
        is_plain = re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII)  # what shlex.quote does, whose import takes long
        return word if is_plain else "'" + word.replace("'", "'\"'\"'") + "'"
    if shell == "powershell":
        is_plain = re.fullmatch(r"[\w\\/.:*?\[\]=+-]+", word, re.ASCII)
        if is_plain and not re.match(r"-[^-].*[.:]", word):  # of -a.b it makes two words
            return word
        return "'" + re.sub(f"([{_QUOTES}])", r"\1\1", word) + "'"
    if re.fullmatch(r"[\w\\/.:*?\[\]+=#@$~{}-]+", word, re.ASCII):
        return word
    held = '"' + re.sub(r'(\\*)("|\Z)', r"\1\1\2", word).replace('"', r"\"") + '"'
    return re.sub(r'([()%!^"<>&|])', r"^\1", held) if re.search('["%!]', word) else held


def command_line(words: Iterable[str], shell: Shell | None = None) -> str:
    """A command line of words, each as `quoted` has it."""
    return " ".join(quoted(word, shell) for word in words)


def words_in(line: str, shell: Shell | None = None) -> list[str]:
    """The words of a command line that `command_line` made."""
    shell = shell or at_hand()
    if shell == "posix":
        if not {"'", '"', "\\"}.intersection(line):
            return line.split()
        import shlex  # most lines quote nothing, and are taken apart sooner without

        return shlex.split(line)
    if shell == "powershell":
        found = re.finditer(rf"'((?:[^{_QUOTES}]|([{_QUOTES}])\2)*)'|(\S+)", line)
        return [each[3] or re.sub(rf"([{_QUOTES}])\1", r"\1", each[1]) for each in found]
    seen = re.findall(r'"[^"]*"?|\^.|[^"^]+', line, re.DOTALL)  # by cmd, which takes the carets away
    words: list[str] = []
    word, begun, is_quoted = "", False, False
    for each in re.finditer(r'(\\*)"|([ \t])|.', "".join(part.removeprefix("^") for part in seen) + " ", re.DOTALL):
        if each[1] is not None:
            word += each[1][: len(each[1]) // 2] + '"' * (len(each[1]) % 2)
            is_quoted ^= len(each[1]) % 2 == 0
            begun = True
        elif each[2] is None or is_quoted:
            word += each[0]
            begun = True
        elif begun:
            words.append(word)
            word, begun = "", False
    return words


def mkdir_command(folder: str, shell: Shell | None = None) -> str:
    """The command that makes a folder and those above it."""
    shell = shell or at_hand()
    return f"mkdir {'-p ' if shell == 'posix' else ''}{quoted(folder, shell)}"
