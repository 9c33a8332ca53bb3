"""Legacy pickles: what is read, and what is refused."""

import collections
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from dataset_samples import python2_pickle

from datasets.pickles import load_legacy_pickle
from miscc.errors import DataError

ROOT = Path(__file__).parents[1]


def written(tmp_path, content: bytes):
    path = tmp_path / "some.pickle"
    path.write_bytes(content)
    return path


def test_python2_protocol_0(tmp_path):
    # python2 -c "pickle.dump(['001.A/caf\xe9', u'b\u9ce5', 3, 2.5, None, True, (1, 2)], f)", memo numbers left out
    content = b"(lS'001.A/caf\\xe9'\naVb\\u9ce5\naI3\naF2.5\naNaI01\na(I1\nI2\nta."
    assert load_legacy_pickle(written(tmp_path, content)) == ["001.A/caf\xe9", "b\u9ce5", 3, 2.5, None, True, (1, 2)]


def test_python2_protocol_2(tmp_path):
    value = {"names": ["\xe9t\xe9", "x" * 300], "one": 1, "minus": -5}
    assert load_legacy_pickle(written(tmp_path, python2_pickle(value))) == value


def test_python2_long_and_set(tmp_path):
    content = b"(lp0\nL12345678901234567890L\nac__builtin__\nset\n((lI1\natRa."
    assert load_legacy_pickle(written(tmp_path, content)) == [12345678901234567890, {1}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_numpy_of_either_age(tmp_path, protocol, core):
    value = [np.arange(6).reshape(2, 3), np.float32(2.5), np.asfortranarray(np.arange(6).reshape(2, 3))]
    content = pickle.dumps(value, protocol=protocol)
    if protocol < 4:  # later protocols prefix names with their length
        content = content.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", core)
    array, scalar, other = load_legacy_pickle(written(tmp_path, content))
    assert array.tolist() == other.tolist() == [[0, 1, 2], [3, 4, 5]] and scalar == 2.5


@pytest.mark.parametrize(
    "value",
    [
        np.array([1.5, -2.0], dtype=">f8"), np.array([b"red", b"blue"]), np.array(["rot", "grün"]), np.array([True, False]),
        np.array([["a", None], [3, [4]]], dtype=object), np.zeros((0, 3), np.int64), np.array(7), np.array([1 + 2j]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_every_kind(tmp_path, value, protocol):
    found = load_legacy_pickle(written(tmp_path, pickle.dumps(value, protocol=protocol)))
    assert (
        found.tolist() == value.tolist()
        and found.shape == value.shape
        and found.dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
    )


class _Dtype:
    """Pickled as a numpy dtype of any name and state."""

    def __init__(self, name, state=None):
        self.name, self.state = name, state

    def __reduce__(self):
        return (np.dtype, (self.name, False, True), *([self.state] if self.state is not None else []))


class _Array:
    """Pickled as a numpy array of any state."""

    def __init__(self, shape, dtype, data, is_fortran=False):
        self.state = (1, shape, dtype, is_fortran, data)

    def __reduce__(self):
        return (*np.zeros(1).__reduce__()[:2], self.state)


RECORD = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 63)  # the state of a dtype with a field of objects


@pytest.mark.parametrize(
    "value",
    [
        _Array((3,), _Dtype("O"), [1]),  # numpy would read beyond the list: a crash
        _Array((3,), _Dtype("O"), b"x" * 24),  # and take numbers for addresses here
        _Array((2,), _Dtype("V8", RECORD), b"x" * 16),
        _Array((4,), _Dtype("i8"), b"x" * 8),
        _Array((-1,), _Dtype("i8"), b""),
        _Array((1 << 62, 1 << 62), _Dtype("i8"), b""),
        _Array([1], _Dtype("i8"), b"x" * 8),
        _Array((1,), _Dtype("i8", (3, "sideways", None, None, None, -1, -1, 0)), b"x" * 8),
        _Array((1,), None, b"x" * 8),
        _Array((1 << 39,), _Dtype("S"), b""),  # of no bytes each: any number of them would fit
        _Dtype([("a", "O")]),
        _Dtype("V8"),
        _Dtype("M8[ns]"),
    ],
)
def test_arrays_that_would_crash_numpy_are_refused(tmp_path, value):
    """In a process of its own: without the checks it dies of a segmentation fault (the fuzzer's seed 8)."""
    path = written(tmp_path, pickle.dumps(value, protocol=2))
    code = f"from datasets.pickles import load_legacy_pickle; load_legacy_pickle({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be read as a pickle" in done.stderr.splitlines()[-1]


def test_plain_containers(tmp_path):
    value = [collections.OrderedDict(a=1), collections.defaultdict(list, b=[2]), b"bytes", frozenset([3]), 1 + 2j]
    assert load_legacy_pickle(written(tmp_path, pickle.dumps(value, protocol=2))) == value


class _Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_would_write_a_file_is_refused(tmp_path, protocol):
    target = tmp_path / "written"
    attacks = {"open": _Evil(open, str(target), "w"), "system": _Evil(os.system, f"touch {target}")}
    for name, attack in attacks.items():
        path = written(tmp_path, pickle.dumps(["harmless", attack], protocol=protocol))
        with pytest.raises(DataError, match=f"some.pickle: holds .*{name}"):
            load_legacy_pickle(path)
        assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"c__builtin__\ngetattr\n.",
        b"cbuiltins\n__import__\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x0dlist.__init__\x93.",  # a dotted name
        b"ccopy_reg\n_reconstructor\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"c_codecs\nencode\n(Vabc\nVzlib_codec\ntR.",  # a codec may import modules
        b"(S'x'\nios\nsystem\n.",  # the INST opcode
        b"\x80\x02\x82\x01.",  # an extension code
        b"P1\n.",  # a persistent id
    ],
)
def test_other_doors_are_shut(tmp_path, content):
    with pytest.raises(DataError, match="some.pickle"):
        load_legacy_pickle(written(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"not a pickle", python2_pickle(["a", "b"])[:-3], b"\x80\x63]."])
def test_damaged_pickles_are_named(tmp_path, content):
    with pytest.raises(DataError, match="some.pickle: cannot be read as a pickle"):
        load_legacy_pickle(written(tmp_path, content))


def test_a_missing_pickle_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_legacy_pickle(tmp_path / "none.pickle")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x10.",  # a memo of 285 million places
        b"]p400000000\n.",
        b"\x80\x05\x96\xff\xff\xff\xff\x01\0\0\0.",  # a bytearray of 8 GB
        b"\x80\x04\x8e\xff\xff\xff\xff\x01\0\0\0.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x02\x8b\xff\xff\xff\x7fa.",
        b"cbuiltins\nbytearray\n(I4000000000\ntR.",
        b"cbuiltins\nbytes\n(I4000000000\ntR.",
        b"cnumpy\nndarray\n((I4000000000\nttR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'V2000000000'\ntRtR.",
    ],
)
def test_a_few_bytes_take_no_gigabytes(tmp_path, content):
    path = written(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="some.pickle: cannot be read as a pickle"):
            load_legacy_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_every_operation_is_walked_by_its_length(tmp_path):
    """A walk that lost its place would refuse these: every protocol, long texts, more than 256 memo numbers."""
    value = {
        "texts": ["x" * 300, "é" * 70_000, *map(str, range(400))],
        "numbers": [*range(-3, 70_000, 999), 2**70, 1.5],
    }
    value |= {"bytes": b"..(r" * 100, "array": np.arange(5), "none": None, "flags": (True, False), "set": {1, 2}}
    for protocol in range(6):
        loaded = load_legacy_pickle(written(tmp_path, pickle.dumps(value, protocol=protocol)))
        assert loaded.pop("array").tolist() == [0, 1, 2, 3, 4]
        assert loaded == {name: content for name, content in value.items() if name != "array"}
