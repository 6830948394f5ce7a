# SPDX-License-Identifier: Apache-2.0
"""escnn made fit on first import: a cache in the user's folder, no noise, bases that no chance decides."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib

from pyro_equiflow._escnn.patching import escnn_version, expected, replace, unlike

__all__: list[str] = []

# ---- where escnn's slow grids are kept, and its import --------------------------------------


def _cache_folder() -> str | None:
    """The folder for escnn's cache, made if need be; ``None`` where none can be written."""
    root = os.environ.get("PYRO_EQUIFLOW_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pyro_equiflow")
    try:
        folder = Path(root).expanduser() / f"escnn-{escnn_version()}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "joblib").mkdir(exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    return str(folder) if os.access(folder / "joblib", os.W_OK) else None


class _Memory(joblib.Memory):
    """joblib's memory that says in one line what it tells by a traceback: a file of the cache cannot be read.

    A log, not a warning: it must not stop, where warnings are errors, what goes on well.
    """

    said = False
    asked = False

    def cache(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = True
        function = super().cache(*args, **kwargs)
        if isinstance(function, joblib.memory.MemorizedFunc):
            replace(function, "warn", self._say)
        return function

    def _say(self, msg: str) -> None:
        if not self.said:
            self.said = True
            logging.getLogger("pyro_equiflow").warning(
                "pyro_equiflow: a file of the cache in %s cannot be read: it is computed anew and written again",
                self.location,
            )


@contextmanager
def _redirected(memory: joblib.Memory) -> Iterator[None]:
    # escnn makes its folder inside site-packages while it is imported, which fails where that is
    # read-only; it offers no setting, so the class it asks is exchanged for the while.
    original = joblib.Memory
    joblib.Memory = lambda *args, **kwargs: memory
    try:
        # What its modules warn of (an optional package, escapes in a docstring) no user of ours
        # can act on.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        joblib.Memory = original


_imported_before = "escnn.group" in sys.modules
_memory = _Memory(_cache_folder(), verbose=0)
try:
    with _redirected(_memory):
        import escnn.group
        import escnn.nn

        from pyro_equiflow._escnn import bases
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] not in ("escnn", "lie_learn"):
        raise
    raise ImportError(
        f"escnn cannot be imported: {error}. From a checkout of pyro_equiflow, which has stand-ins "
        "for the two requirements of escnn that do not install everywhere, run "
        "`pip install ./stand_ins/py3nj ./stand_ins/lie_learn .`",
        name=error.name,
    ) from error


def _cached_functions() -> Iterator[tuple[Any, str, Any]]:
    for name, module in list(sys.modules.items()):
        if name.startswith("escnn.group"):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, joblib.memory.MemorizedFunc):
                    yield module, attribute, value


def _built_groups() -> Iterator[str]:
    for name, group_class in escnn.group.groups_dict.items():
        for attribute in ("_cached_group_instance", "_cached_group_instances"):
            if getattr(group_class, attribute, None):
                yield name


class _SparseMatrices:
    """``scipy.sparse`` whose ``block_diag`` returns sparse matrices, which is what escnn computes with.

    scipy is about to return sparse arrays for blocks that are arrays, and warns of it at every call.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(_sparse, name)

    @staticmethod
    def block_diag(mats: Sequence[Any], format: str | None = None, dtype: Any = None) -> Any:
        first, *others = mats
        return _sparse.block_diag([_sparse.coo_matrix(first), *others], format=format, dtype=dtype)


# ---- put in place -----------------------------------------------------------------------------


_sparse = expected(escnn.group.representation, "sparse")


def _install() -> None:
    if not _imported_before and not _memory.asked:
        raise unlike("escnn.group's caches by joblib.Memory(...)", "none")
    if _imported_before:
        for module, name, function in _cached_functions():
            replace(module, name, _memory.cache(function.func, ignore=function.ignore))
        built = sorted(set(_built_groups()))
        if built:
            warnings.warn(
                f"escnn groups were built before pyro_equiflow was imported ({', '.join(built)}): "
                "their bases may differ from one run to the next, and saved parameters with them. "
                "Import pyro_equiflow first.",
                stacklevel=2,
            )
    for module in (escnn.group.group, escnn.group.representation, escnn.nn.field_type):
        replace(module, "sparse", _SparseMatrices())
    bases.install()


_install()
