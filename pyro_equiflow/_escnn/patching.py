# SPDX-License-Identifier: Apache-2.0
"""Names of escnn replaced by ours, each only where it is what we know: a patch that misses its mark says so."""

import inspect
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

__all__ = ["escnn_version", "expected", "replace", "unlike"]

_RANGE = ">=1.0.11,<1.1"
"""The versions of escnn whose names we know, as in the package's requirements."""


def escnn_version() -> str:
    """The version of escnn, under whatever name it was distributed; ``"unknown"`` where that is not recorded."""
    try:
        return version("escnn")
    except PackageNotFoundError:
        for name in packages_distributions().get("escnn", []):
            return version(name)
    return "unknown"


def unlike(what: str, found: str) -> ImportError:
    """The error of an escnn that is not as we know it."""
    return ImportError(
        f"expected {what}, which pyro_equiflow replaces or reads, found {found} in escnn {escnn_version()}: another "
        f"version may have renamed it, and bases would be left to chance in silence. Install one that pyro_equiflow "
        f'knows: pip install "escnn{_RANGE}"',
        name="escnn",
    )


def _name(owner: Any, name: str) -> str:
    inside = f"{owner.__module__}.{owner.__qualname__}" if inspect.isclass(owner) else owner.__name__
    return f"{inside}.{name}"


def expected(owner: Any, name: str) -> Any:
    """An attribute that escnn is known to have.

    :raises ImportError: it has none of that name.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise unlike(_name(owner, name), "none") from None


def replace(owner: Any, name: str, new: Any) -> None:
    """Puts ``new`` in the place of an attribute of a module or class.

    :raises ImportError: there is none of that name, or a function of other parameters.
    """
    old = expected(owner, name)
    # A function that joblib keeps results of shows the parameters of the function inside.
    given, wanted = _parameters(old), _parameters(new)
    if given is not None and wanted is not None and given != wanted:
        raise unlike(f"{_name(owner, name)}({', '.join(wanted)})", f"({', '.join(given)})")
    setattr(owner, name, new)


def _parameters(function: Any) -> list[str] | None:
    """The names of a function's parameters; ``None`` for what is no function, or takes whatever it is given."""
    function = getattr(function, "func", function)
    if not inspect.isroutine(function):
        return None
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return None
    return list(parameters)
