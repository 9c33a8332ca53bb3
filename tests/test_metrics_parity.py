"""The same files and the same (random) weights through torch-fidelity and through ours: the same numbers to 1e-3."""

import pytest
import torch
from metrics_help import picture, write_pictures
from torch_fidelity import calculate_metrics

from eval.features.networks import load_network, random_inception_state
from eval.features.sources import open_source
from eval.features.statistics import StreamedStatistics, extract
from eval.FID import distance
from eval.IS import inception_score
from eval.KID import kernel_distance
from eval.metric import distance_name, score_name
from eval.precision_recall import precision_recall

COUNT = 16


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Two folders, a weight file, and what our network sees: {"real", "fake"} -> (statistics, features, logits)."""
    root = tmp_path_factory.mktemp("parity")
    folders = {
        "real": write_pictures(root / "real", COUNT),
        "fake": write_pictures(root / "fake", COUNT + 3, tone=60, first=100),
    }
    state = random_inception_state(seed=3)
    (common,), _ = load_network("random", seed=3).extract_features([picture(0)])
    blind = state["fc.weight"] - torch.outer(state["fc.weight"] @ common, common) / common.dot(common)
    state["fc.weight"] = blind * 30  # classes by what differs between pictures: else all are of one class, and IS is 1
    torch.save(state, root / "weights.pth")
    network = load_network("inception-tf", weights=root / "weights.pth")
    seen = {}
    for name, folder in folders.items():
        streamed, rows = StreamedStatistics(2048), []
        for features, logits in extract(open_source(folder), network, batch_size=10):
            streamed.update(features)
            rows.append((features, logits))
        features, logits = (torch.cat(parts) for parts in zip(*rows, strict=True))
        seen[name] = (streamed.result(), features, logits)
    return root, network, seen


@pytest.fixture(scope="module")
def reference(setting):
    root, _, _ = setting
    return calculate_metrics(
        input1=str(root / "fake"),
        input2=str(root / "real"),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(root / "weights.pth"),
        **{"fid": True, "kid": True, "isc": True, "prc": True, "cuda": False, "cache": False, "verbose": False},
        **{"kid_subsets": 5, "kid_subset_size": 12, "isc_splits": 3, "batch_size": 9, "save_cpu_ram": True},
    )


def test_fid_equals_torch_fidelitys(setting, reference):
    _, _, seen = setting
    expected = reference["frechet_inception_distance"]
    assert expected > 0.1
    assert distance(seen["real"][0], seen["fake"][0]) == pytest.approx(expected, rel=1e-3)


def test_kid_equals_torch_fidelitys(setting, reference):
    _, _, seen = setting
    mean, std = kernel_distance(seen["real"][1], seen["fake"][1], subsets=5, subset_size=12)
    assert mean == pytest.approx(reference["kernel_inception_distance_mean"], rel=1e-3)
    assert std == pytest.approx(reference["kernel_inception_distance_std"], rel=1e-2)


def test_inception_score_equals_torch_fidelitys(setting, reference):
    _, _, seen = setting
    mean, std = inception_score(seen["fake"][2], splits=3)
    assert reference["inception_score_mean"] > 1.1
    assert mean - 1 == pytest.approx(reference["inception_score_mean"] - 1, rel=1e-3)
    assert std == pytest.approx(reference["inception_score_std"], rel=1e-2)


def test_precision_and_recall_equal_torch_fidelitys(setting, reference):
    _, _, seen = setting
    assert precision_recall(seen["real"][1], seen["fake"][1]) == pytest.approx(
        (reference["precision"], reference["recall"]), abs=1e-6
    )


def test_numbers_of_unpublished_weights_are_not_called_fid(setting):
    _, network, _ = setting
    suffix = f"[inception-tf:{network.weights_hash[:8]}]"
    assert distance_name("FID", network) == f"FD{suffix}" and score_name(network) == f"IS{suffix}"
