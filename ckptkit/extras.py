"""The installed packages: this version of ckptkit, and the optional ones: torch, torchvision, timm and others.

Imports none of them.  Code that is about to import a layer that does (`ckptkit.torch_bridge`, `ckptkit.verifier`) calls
`require` first, so that the message is the same everywhere.
"""

from __future__ import annotations

import importlib
import re

from ckptkit.errors import MissingDependencyError

__all__ = ["INSTALL_TORCH", "OLDEST_TORCH", "__version__", "package_file", "require", "require_torch"]

INSTALL_TORCH = "pip install '.[torch]'"
"""Installs both, when run in a clone of ckptkit (a package named ckptkit on PyPI is another project)."""

OLDEST_TORCH = (2, 1)
"""The first with ``Module.load_state_dict(assign=True)``; pyproject.toml asks for it too."""

_INSTALL = {package: f"pip install '.[{package}]'" for package in ("timm", "transformers")}
_EXTRAS = {"zstandard": "zstd", "fsspec": "remote", "s3fs": "s3", "gcsfs": "gs", "adlfs": "az", "plotly": "report"}
_INSTALL |= {package: f"pip install '.[{extra}]'" for package, extra in _EXTRAS.items()}
"""Installs an extra with its own name."""


def require(package: str) -> None:
    """Make sure that an optional package can be imported.

    Args:
        package: ``"torch"``, ``"torchvision"``, ``"timm"``, ``"zstandard"``, ``"fsspec"`` or another that is an extra.

    Raises:
        MissingDependencyError: it is not installed or cannot be imported; the message contains the command that
            installs it.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise _broken(package, error) from error
        raise _missing(package) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken(package, error) from error


def package_file(package: str, path: str) -> bytes:
    """A file in an optional package, read without importing the package.

    Args:
        package: as in `require`.
        path: below the package's folder, with ``/``.

    Raises:
        MissingDependencyError: the package is not installed, or has no such file.
    """
    import importlib.util
    from contextlib import suppress
    from pathlib import Path

    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        with suppress(FileNotFoundError):
            return Path(folder, path).read_bytes()
    if found is None:
        raise _missing(package)
    raise _broken(package, FileNotFoundError(path))


def require_torch() -> None:
    """`require` torch, in a version that has everything ckptkit uses.

    Raises:
        MissingDependencyError: see `require`; or it is older than `OLDEST_TORCH`.
    """
    require("torch")
    version = str(importlib.import_module("torch").__version__)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        raise MissingDependencyError(
            f"torch {version} is installed, but this needs torch {'.'.join(map(str, OLDEST_TORCH))} or later; "
            f"in the clone of ckptkit run: {INSTALL_TORCH}",
            name="torch",
        )


def _missing(package: str) -> MissingDependencyError:
    command = _INSTALL.get(package, INSTALL_TORCH)
    message = f"this needs {package}, which is not installed; in the clone of ckptkit run: {command}"
    return MissingDependencyError(message, name=package)


def _broken(package: str, error: Exception) -> MissingDependencyError:
    return MissingDependencyError(
        f"{package} is installed but cannot be imported ({type(error).__name__}: {error}); "
        f"in the clone of ckptkit run: {_INSTALL.get(package, INSTALL_TORCH)}",
        name=package,
    )


__version__ = "0.2.0"
