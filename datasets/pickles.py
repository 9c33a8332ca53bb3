"""Loads the pickles of the original systems, Python 2 ones, too, without running code from them.

Captions are taken out of them in captions.py, file names and classes in layout.py.
"""

import codecs
import collections
import io
import math
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from miscc.errors import DataError


def _encode(text: str, encoding: str = "latin1", errors: str = "strict") -> bytes:
    """Protocol 2 stores bytes as a call of this. The codec is checked, because looking one up can import modules."""
    if str(encoding).lower().replace("-", "") not in ("latin1", "utf8", "ascii"):
        raise ValueError(f"codec {encoding!r}")
    return codecs.encode(text, encoding, errors)


def _bytes(data: bytes = b"") -> bytes:
    """`bytes`, of bytes alone: `bytes(n)` would allocate n bytes."""
    return b"" + data


def _bytearray(text: str = "", encoding: str = "latin1") -> bytearray:
    """As protocol 2 stores a bytearray."""
    return bytearray(_encode(text, encoding))


def _text(value: str = "") -> str:
    """`str`, of a text alone: of nested lists it could take very long."""
    return "" + value


# -- numpy's arrays --------------------------------------------------------------------------------------------------

# numpy trusts the state of a pickled dtype or array, and crashes, or reads other memory, where it is not as numpy wrote it.
# So both are stood for by classes that check it; they hold numbers, texts and objects, no records.


class _NdArray:
    """Stands for numpy.ndarray, which `_reconstruct` is given."""


class _Dtype:
    """Stands for numpy.dtype: the same arguments, and the state that numpy's pickles have.

    dtype: numpy's own, of one of the KINDS.
    """

    KINDS = "biufcSUO"

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        if not isinstance(name, str) or not re.fullmatch(r"[|<>=]?[?a-zA-Z][0-9]{0,9}", name):
            raise ValueError("a dtype that is no plain one")
        self.dtype = np.dtype(name)
        if self.dtype.kind not in self.KINDS or not self.dtype.itemsize:  # of no bytes any number would fit
            raise ValueError(f"dtype {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        """(version, byte order, ...): of a plain dtype the rest says nothing new."""
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError("a dtype of no byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose state is checked before numpy takes it."""

    def __setstate__(self, state: tuple) -> None:
        """(version, shape, dtype, whether in Fortran's order, data): bytes, or of objects a list of them."""
        *_, shape, dtype, is_fortran, data = state
        wanted = math.prod(_sizes(shape))
        if dtype.dtype.hasobject and isinstance(data, list):
            fits = len(data) == wanted
        else:
            data = _raw(data)
            fits = len(data) == wanted * dtype.dtype.itemsize and not dtype.dtype.hasobject
        if not fits:
            raise ValueError("an array with other data than its shape says")
        checked: Any = (1, shape, dtype.dtype, bool(is_fortran), data)
        super().__setstate__(checked)


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    if type(shape) is not tuple or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise ValueError("an array whose shape is none")
    return shape


def _raw(data: str | bytes) -> bytes:
    """The bytes of numbers; Python 2's come as a text."""
    return data.encode("latin-1") if isinstance(data, str) else _bytes(data)


def _reconstruct(kind: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array, which the pickle's state then fills. `shape` is ignored, as it could ask for any amount of memory."""
    return np.empty(0, "b").view(_Array)


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    """A number or text of the bytes of one."""
    (value,) = np.frombuffer(_raw(data), dtype.dtype)
    return value


def _frombuffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """An array as protocol 5 stores it."""
    return np.frombuffer(_raw(data), dtype.dtype).reshape(_sizes(shape), order="F" if order == "F" else "C")


# -- what may be named ---------------------------------------------------------------------------------------------

_BUILTINS = {c.__name__: c for c in (set, frozenset, list, dict, tuple, int, float, complex, bool)}
_BUILTINS |= {"unicode": _text, "str": _text, "bytes": _bytes, "bytearray": _bytearray, "long": int}
_ALLOWED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("numpy", "ndarray"): _NdArray,
    ("numpy", "dtype"): _Dtype,
}
for _module in ("builtins", "__builtin__"):
    _ALLOWED |= {(_module, _name): _value for _name, _value in _BUILTINS.items()}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED |= {
        (f"{_core}.multiarray", "_reconstruct"): _reconstruct,
        (f"{_core}.multiarray", "scalar"): _scalar,
        (f"{_core}.numeric", "_frombuffer"): _frombuffer,
    }


class _NotPlainError(Exception):
    """The pickle refers to something that is not plain data."""


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows no other names than those in _ALLOWED."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _NotPlainError(f"{module}.{name}") from None


# -- memory --------------------------------------------------------------------------------------------------------

# The unpickler allocates what a pickle declares before it reads on: nine bytes can ask for gigabytes. So the operations
# are checked first, with their lengths from pickletools: every count must fit the file, every memo index be below 2^24.
_MEMOS = {"PUT": rb"p[0-9]{1,7}\n", "LONG_BINPUT": rb"r[\x00-\xff]{3}\x00"}
_COUNT_BYTES = {-2: 1, -3: 4, -4: 4, -5: 8}  # bytes of an operation's count, by pickletools' constants


def _short_operations() -> re.Pattern[bytes]:
    """Matches up to 4,000 operations in a row that have no count; STOP is none of them."""
    by_length: dict[int, bytes] = {}
    lines = b""
    for one in pickletools.opcodes:
        code = re.escape(one.code.encode("latin-1"))
        length = one.arg.n if one.arg else 0
        if one.name in ("INST", "GLOBAL"):
            lines += b"|" + code + rb"[^\n]*\n[^\n]*\n"
        elif length == pickletools.UP_TO_NEWLINE and one.name not in _MEMOS:
            lines += b"|" + code + rb"[^\n]*\n"
        elif length >= 0 and one.name not in ("STOP", *_MEMOS):
            by_length[length] = by_length.get(length, b"") + code
    fixed = b"|".join(b"[%b][\\x00-\\xff]{%d}" % pair[::-1] for pair in sorted(by_length.items()))
    return re.compile(b"(?:%b%b|%b){0,4000}" % (fixed, lines, b"|".join(_MEMOS.values())))


_SHORT = _short_operations()
_COUNTED = {
    ord(one.code): _COUNT_BYTES[one.arg.n] for one in pickletools.opcodes if one.arg and one.arg.n in _COUNT_BYTES
}


def _check_memory(content: bytes) -> None:
    """Raises ValueError for a pickle that declares more than it holds, or whose end is missing."""
    position = 0
    while position < len(content) and content[position] != ord("."):
        matched = _SHORT.match(content, position)
        if matched and matched.end() > position:
            position = matched.end()
            continue

        # An operation with a count of the bytes that follow.
        code = content[position]
        if code not in _COUNTED:
            raise ValueError(f"damaged at byte {position}")
        start = position + 1 + _COUNTED[code]
        count = int.from_bytes(content[position + 1 : start], "little")
        if start + count > len(content):
            raise ValueError("it ends too early")
        position = start + count
    if position >= len(content):
        raise ValueError("it ends too early")


def load_legacy_pickle(path: str | Path) -> Any:
    """Load a pickle of plain containers, strings, numbers and numpy arrays; Python 2's strings are read as latin-1.

    Anything else is refused, so that a file from an unknown source cannot run code. Raises DataError, naming the file
    (and the class where there is one), when it is missing, damaged or holds anything else.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        _check_memory(content)
        return _PlainUnpickler(io.BytesIO(content), encoding="latin-1").load()

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
