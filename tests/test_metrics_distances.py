"""FID, KID, IS, precision and recall against values worked out by hand and other formulas for the same thing."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from metrics_help import tiny_network, write_pictures

from eval.features.sources import open_source
from eval.features.statistics import Statistics, collect_features, save_statistics, statistics_of_features
from eval.FID import bootstrap_interval, distance, extrapolated_distance, fid, frechet_distance
from eval.IS import InceptionScore, inception_score
from eval.KID import KernelDistance, kernel_distance, squared_discrepancy
from eval.metric import ScoringBatch
from eval.precision_recall import PrecisionRecall, precision_recall
from eval.protocol.protocols import Protocol
from eval.scripts import score_images
from miscc.errors import DataError


def random_rows(count, size, seed, scale=1.0):
    return np.random.default_rng(seed).normal(size=(count, size)) @ np.diag(np.linspace(0.1, scale, size))


def test_frechet_distance_by_hand():
    # 3² + 4² + (1 − 3)² + (2 − 4)²
    value = frechet_distance(np.zeros(2), np.diag([1.0, 4.0]), np.array([3.0, 4.0]), np.diag([9.0, 16.0]))
    assert math.isclose(value, 33, rel_tol=1e-12)


def test_frechet_distance_of_rank_one_covariances_by_hand():
    a, b = np.array([1.0, 2.0, 2.0]), np.array([4.0, 0.0, 3.0])
    # |a|² + |b|² − 2 |a·b| = 9 + 25 − 20, where sqrtm has nothing to hold on to
    value = frechet_distance(np.zeros(3), np.outer(a, a), np.zeros(3), np.outer(b, b))
    assert math.isclose(value, 14, rel_tol=1e-7)
    assert abs(frechet_distance(a, np.outer(a, a), a, np.outer(a, a))) < 1e-6


def test_frechet_distance_is_that_of_sqrtm_where_this_works():
    first, second = random_rows(200, 40, 0), random_rows(300, 40, 1, scale=2) + 0.3
    moments = [(rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (first, second)]
    (mean1, covariance1), (mean2, covariance2) = moments
    root = scipy.linalg.sqrtm(covariance1 @ covariance2)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(covariance1 + covariance2 - 2 * root.real)
    value = frechet_distance(mean1, covariance1, mean2, covariance2)
    assert math.isclose(value, expected, rel_tol=1e-9)
    assert math.isclose(frechet_distance(mean2, covariance2, mean1, covariance1), value, rel_tol=1e-9)


def test_frechet_distance_holds_with_fewer_images_than_features():
    first, second = random_rows(20, 64, 2), random_rows(30, 64, 3)
    centred = [(rows - rows.mean(axis=0)) / math.sqrt(len(rows) - 1) for rows in (first, second)]
    trace_of_root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum() - 2 * trace_of_root
    expected += (centred[0] ** 2).sum() + (centred[1] ** 2).sum()
    value = distance(*(statistics_of_features(torch.from_numpy(rows)) for rows in (first, second)))
    assert math.isclose(value, expected, rel_tol=1e-6)


def test_extrapolation_takes_the_bias_of_few_images_away():
    """Both sets are drawn from one distribution: the true distance is 0, and only the extrapolated one says so."""
    size = 30
    rows = torch.from_numpy(np.random.default_rng(4).normal(size=(1200, size)))
    truth = Statistics(np.zeros(size), np.eye(size), 10**9)
    plain = distance(truth, statistics_of_features(rows))
    limit, points = extrapolated_distance(truth, rows)
    sizes, values = zip(*points, strict=True)
    assert len(points) == 15 and sizes[0] == 600 and sizes[-1] == 1200
    assert math.isclose(values[-1], plain, rel_tol=1e-9)
    assert 0.2 < plain < 0.8 and abs(limit) < plain / 4
    assert extrapolated_distance(truth, rows)[0] == limit  # drawn by a seed


def test_a_bootstrap_interval_moves_with_the_value_it_is_laid_around():
    """Resampling raises every distance; what it raises is taken off, so the value lies inside, not below."""
    truth = statistics_of_features(torch.from_numpy(random_rows(500, 20, 0)))
    rows = torch.from_numpy(random_rows(30, 20, 1))
    value = distance(truth, statistics_of_features(rows))
    (low, high), std = bootstrap_interval(truth, rows, value, rounds=20)
    assert low < value < high and low < (low + high) / 2 < high
    (moved_low, moved_high), same = bootstrap_interval(truth, rows, value + 7, rounds=20)
    assert (moved_low, moved_high) == pytest.approx((low + 7, high + 7)) and same == std

    # Two rounds differ by d: their 2.5th and 97.5th percentile by 0.95·d, and d/√2 is their deviation as a sample.
    (low, high), std = bootstrap_interval(truth, rows, value, rounds=2)
    assert std == pytest.approx((high - low) / 0.95 / math.sqrt(2))


def test_bootstrap_interval_lies_around_the_value_and_narrows_with_more_images():
    truth = Statistics(np.zeros(5), np.eye(5), 10**9)
    rows = torch.from_numpy(np.random.default_rng(5).normal(size=(1600, 5)) + 0.5)
    widths = []
    for count in (100, 1600):
        value = distance(truth, statistics_of_features(rows[:count]))
        (low, high), std = bootstrap_interval(truth, rows[:count], value, rounds=60)
        assert low < value < high and 2 * std < high - low < 6 * std
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 6.5  # about √16


def test_fid_of_folders_warns_of_too_few_images_and_counts_them(tmp_path):
    real, fake = write_pictures(tmp_path / "real", 9), write_pictures(tmp_path / "fake", 5, tone=90)
    (fake / "000.png").write_bytes(b"broken")
    network = tiny_network()
    (score,) = fid(real, fake, network, skip_broken=True)
    features = [
        collect_features(open_source(real), network),
        collect_features(open_source(fake).subset([1, 2, 3, 4]), network),
    ]
    assert math.isclose(score.value, distance(*map(statistics_of_features, features)), rel_tol=1e-4)
    assert score.protocol["num_real"] == 9 and score.protocol["num_fake"] == 4
    assert score.protocol["skipped_fake_names"] == ["000.png"] and score.protocol["skipped_real"] == 0
    assert score.protocol["weights_hash"] == network.weights_hash and score.protocol["resize"] == "bilinear"
    assert [("4 images for 6 features" in w, "1 broken" in w) for w in score.warnings] == [(True, False), (False, True)]
    (same,) = fid(real, real, network)
    assert abs(same.value) < 1e-3 and not same.warnings
    with pytest.raises(DataError, match=r"000\.png"):
        fid(real, fake, network)


def test_fid_against_statistics_equals_fid_against_the_images(tmp_path):
    real, fake = write_pictures(tmp_path / "real", 8), write_pictures(tmp_path / "fake", 8, tone=90)
    network = tiny_network()
    expected = fid(real, fake, network)[0].value
    statistics = statistics_of_features(collect_features(open_source(real), network))
    save_statistics(tmp_path / "own.npz", Statistics(statistics.mean, statistics.covariance, 8, network.protocol()))
    np.savez(tmp_path / "foreign.npz", mu=statistics.mean, sigma=statistics.covariance)
    (own,), (foreign,) = (fid(tmp_path / f"{name}.npz", fake, network) for name in ("own", "foreign"))
    assert math.isclose(own.value, expected, rel_tol=1e-6) and math.isclose(foreign.value, expected, rel_tol=1e-6)
    assert not own.warnings and "does not say with which network" in foreign.warnings[0]
    value, limit = fid(real, fake, network, extrapolate=True, bootstrap=20)
    assert math.isclose(value.value, expected, rel_tol=1e-4) and value.interval[0] < expected < value.interval[1]
    assert limit.name.startswith("FD∞[tiny") and limit.details["points"][-1][0] == 8
    with pytest.raises(DataError, match="need the generated images"):
        fid(real, tmp_path / "own.npz", network, extrapolate=True)
    with pytest.raises(DataError, match="too few rounds"):
        fid(real, fake, network, bootstrap=3)


def test_kernel_distance_by_hand():
    first, second = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    # k(0, 1) + k(2, 3) − 2 · mean of k(0, 2), k(0, 3), k(1, 2), k(1, 3) under (xy + 1)³
    assert squared_discrepancy(first, second) == pytest.approx(1 + 343 - 2 * (1 + 1 + 27 + 64) / 4, abs=1e-9)
    assert squared_discrepancy(first, second, degree=1) == pytest.approx(1 + 7 - 2 * (1 + 1 + 3 + 4) / 4, abs=1e-9)
    wide = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    assert squared_discrepancy(wide, wide) == pytest.approx(2 * 27 - 2 * (216 + 27 + 27 + 8) / 4, abs=1e-9)


def test_kernel_distance_of_the_same_distribution_is_zero_on_average():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, 8))).float()
    same, spread = kernel_distance(rows[:2000], rows[2000:], subsets=40, subset_size=200)
    apart, _ = kernel_distance(rows[:2000], rows[2000:] + 0.5, subsets=40, subset_size=200)
    assert abs(same) < 0.05 < 0.5 < apart and 0 < spread < 0.2


def test_kid_of_few_images_takes_smaller_subsets_and_says_so(tmp_path):
    real, fake = write_pictures(tmp_path / "real", 9), write_pictures(tmp_path / "fake", 5, tone=90)
    few = Protocol("few", "", kid_subsets=7)
    (score,) = score_images(KernelDistance, fake, real, network=tiny_network(), protocol=few)
    assert score.name.startswith("KD[tiny") and score.value > 0
    assert score.protocol["subset_size"] == 5 and score.protocol["subsets"] == 7
    assert "subsets of 5 instead of 1000" in score.warnings[0]
    with pytest.raises(DataError, match="single image"):
        score_images(KernelDistance, write_pictures(tmp_path / "one", 1), real, network=tiny_network())


def test_inception_score_by_hand():
    sure = torch.eye(4).repeat(5, 1) * 1000  # four classes, equally often, each time for certain
    assert inception_score(sure, splits=1) == (pytest.approx(4, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert inception_score(sure[:1].repeat(8, 1), splits=2)[0] == pytest.approx(1, abs=1e-12)
    two = torch.tensor([[0.0, 0.0], [0.0, -1000.0]])  # (½, ½) and (1, 0); together (¾, ¼)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert inception_score(two, splits=1)[0] == pytest.approx(math.exp((first + math.log(1 / 0.75)) / 2), abs=1e-9)


def test_inception_score_deals_images_to_splits_by_the_seed():
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(23, 5)) * 3)
    mean, std = inception_score(logits, splits=4)
    order = np.random.RandomState(2020).permutation(23)
    p = logits.softmax(dim=1).numpy()[order]
    parts = [p[0:5], p[5:11], p[11:17], p[17:23]]
    values = [math.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()) for part in parts]
    assert mean == pytest.approx(np.mean(values), abs=1e-9) and std == pytest.approx(np.std(values), abs=1e-9)
    assert inception_score(logits, splits=4, seed=1)[0] != mean
    with pytest.raises(DataError, match="--splits 24"):
        inception_score(logits, splits=24)


def test_inception_score_in_batches_equals_that_at_once_and_holds_no_logits():
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(500, 6)) * 2)
    streamed, rows = InceptionScore(500, splits=10), torch.arange(500)
    for part, indices in zip(logits.split(33), rows.split(33), strict=True):
        streamed.update(ScoringBatch(indices=indices.tolist(), logits=part))
    assert streamed.probabilities.shape == (10, 6) and streamed.negative_entropies.shape == (10,)
    values = streamed.values()
    assert (values.mean(), values.std()) == pytest.approx(inception_score(logits, splits=10), abs=1e-12)
    short = InceptionScore(501)
    short.update(ScoringBatch(indices=range(500), logits=logits))
    with pytest.raises(ValueError, match="500 of 501"):
        short.values()


def test_inception_score_of_a_folder(tmp_path):
    folder, network = write_pictures(tmp_path / "set", 12), tiny_network()
    (folder / "003.png").write_bytes(b"broken")
    options = {"network": network, "protocol": Protocol("two", "", splits=2), "skip_broken": True, "batch_size": 5}
    (score,) = score_images(InceptionScore, folder, **options)
    left = open_source(folder).subset([i for i in range(12) if i != 3])
    logits = collect_features(left, network) @ network.classifier.weight.T
    assert (score.value, score.std) == pytest.approx(inception_score(logits, splits=2), rel=1e-4)
    assert score.protocol["num_images"] == 11 and score.protocol["skipped_names"] == ["003.png"]
    assert score.name == f"IS[{network.label}]" and "the papers have 30,000 in 10" in score.warnings[0]


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [10.0]])  # reach 1, 1, 9
    fake = torch.tensor([[1.5], [5.0], [6.0]])  # reach 3.5, 1, 1
    assert precision_recall(real, fake, neighbourhood=1) == pytest.approx((1, 2 / 3))
    fake[2] = 30  # reach 3.5, 3.5, 25: 30 is out of all real reach, and 10 within the reach of 30
    assert precision_recall(real, fake, neighbourhood=1) == pytest.approx((2 / 3, 1))


def test_precision_and_recall_of_folders(tmp_path):
    real, fake = write_pictures(tmp_path / "real", 6), write_pictures(tmp_path / "fake", 5, tone=150)
    same = score_images(PrecisionRecall, real, real, network=tiny_network())
    assert [score.value for score in same] == [1, 1] and [s.name.split("[")[0] for s in same] == ["precision", "recall"]
    apart = score_images(PrecisionRecall, fake, real, network=tiny_network())
    assert apart[0].value < 0.5 and "depend on both numbers" in apart[0].warnings[0]
    with pytest.raises(DataError, match="3 images; 3 neighbours need 4"):
        score_images(PrecisionRecall, write_pictures(tmp_path / "few", 3), real, network=tiny_network())


def test_a_single_generated_image_is_refused_by_its_folder(tmp_path):
    real, fake = write_pictures(tmp_path / "real", 3), write_pictures(tmp_path / "fake", 1)
    with pytest.raises(DataError, match="fake: holds a single image; FID needs two or more"):
        fid(real, fake, tiny_network())
    with pytest.raises(DataError, match="fake: holds a single image"):
        fid(fake, real, tiny_network())
