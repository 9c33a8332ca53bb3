"""Reading of golden fixtures: weights and inputs made from names, and how theirs were subsampled. No tests here."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

SHARED = Path(__file__).parents[2] / "shared" / "golden"
OWN = Path(__file__).parent / "fixtures"


def fill_tensor(name, shape, salt):
    """The value that the fixtures give a tensor: a function of its released name and shape."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    noise_source = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32)
    noise = noise_source.standard_normal(shape)
    one_dimensional = len(shape) == 1
    if name.endswith("running_mean"):
        value = 0.1 * noise
    elif name.endswith("running_var"):
        value = 0.75 + 0.5 * noise_source.uniform(size=shape)
    elif one_dimensional and shape[0] == 1 and name.endswith("gamma"):
        value = 0.5 + 0.25 * noise_source.uniform(size=shape)
    elif one_dimensional:
        value = 1.0 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
    else:
        value = noise / np.sqrt(max(1, int(np.prod(shape[1:]))))
    return np.asarray(value, dtype=np.float32)


def fill_state(shapes, salt):
    """{name: shape} -> a state dict."""
    return {name: torch.from_numpy(fill_tensor(name, tuple(shape), salt)) for name, shape in shapes.items()}


def fill_input(name, shape, salt, scale):
    """An input by its name, float32."""
    rng = np.random.RandomState((zlib.crc32(("input:" + name).encode()) + salt) % 2**32)
    return torch.from_numpy((scale * rng.standard_normal(shape)).astype(np.float32))


def load(folder, name):
    """(json, {array name: tensor}) of a fixture."""
    with np.load(folder / f"{name}.npz") as arrays:
        values = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return json.loads((folder / f"{name}.json").read_text()), values


def subsample(tensor):
    """As the fixtures keep pictures and maps."""
    step = max(1, tensor.shape[-1] // 16)
    return tensor[..., step // 2 :: step, step // 2 :: step]


def relative_error(ours, theirs):
    """Largest difference relative to the largest value."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
