"""Loads the pickles of the original systems, Python 2 ones, too, without running code from them.

Captions are taken out of them in captions.py, file names and classes in layout.py.
"""

import codecs
import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np

try:  # numpy 2 moved its internals; pickles of either age name the one or the other
    from numpy._core import multiarray, numeric
except ImportError:  # numpy 1
    from numpy.core import multiarray, numeric

from miscc.errors import DataError


def _encode(text: str, encoding: str = "latin1", errors: str = "strict") -> bytes:
    """Protocol 2 stores bytes as a call of this. The codec is checked, because looking one up can import modules."""
    if str(encoding).lower().replace("-", "") not in ("latin1", "utf8", "ascii"):
        raise ValueError(f"codec {encoding!r}")
    return codecs.encode(text, encoding, errors)


_BUILTINS = {
    c.__name__: c for c in (set, frozenset, list, dict, tuple, str, bytes, bytearray, int, float, complex, bool)
}
_BUILTINS |= {"unicode": str, "long": int}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
for _module in ("builtins", "__builtin__"):
    _ALLOWED |= {(_module, _name): _value for _name, _value in _BUILTINS.items()}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED |= {
        (f"{_core}.multiarray", "_reconstruct"): multiarray._reconstruct,
        (f"{_core}.multiarray", "scalar"): multiarray.scalar,
        (f"{_core}.numeric", "_frombuffer"): numeric._frombuffer,  # pyrefly: ignore[missing-attribute]  # private, not in the stubs
    }


class _NotPlainError(Exception):
    """The pickle refers to something that is not plain data."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _NotPlainError(f"{module}.{name}") from None


def load_legacy_pickle(path: str | Path) -> Any:
    """Load a pickle of plain containers, strings, numbers and numpy arrays; Python 2's strings are read as latin-1.

    Anything else is refused, so that a file from an unknown source cannot run code. Raises DataError, naming the file
    (and the class where there is one), when it is missing, damaged or holds anything else.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin-1").load()

    # Refused.
    except _NotPlainError as error:
        raise DataError(
            f"{path}: holds {error}, which is more than plain data, and is not loaded, because that could "
            f"run code from it; get the file from its authors again, or delete it and rebuild the data set"
        ) from None

    # Missing or damaged.
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"{path}: cannot be read as a pickle ({reason}); copy or download it again") from None
