"""Curation on plain arrays: pairs of hashes without misses, exact sums, k-means, quotas, linear heads."""

import numpy as np
import pytest
import torch

from curation import dedup, vectors
from curation.balance import hierarchical_sample, normalized_entropy, water_fill
from curation.content import fit_linear, held_out_scores
from curation.vectors import kmeans, nearest, unit_rows

# ---------------------------------------------------------------- pairs and representatives


def flip_bits(rng, center, count):
    bits = rng.choice(64, count, replace=False).astype(np.uint64)
    mask = np.bitwise_or.reduce(np.uint64(1) << bits)
    return center ^ mask


@pytest.mark.parametrize("radius", [0, 1, 3, 4, 7])
def test_hamming_pairs_are_those_of_brute_force(radius):
    rng = np.random.default_rng(radius)
    centers = rng.integers(0, 2**64, 60, dtype=np.uint64)
    hashes = []
    for center in centers:
        hashes += [flip_bits(rng, center, count) for count in rng.integers(1, 7, 12)]
    # The worst case: the differing bits are spread over the bands as evenly as possible.
    spread = 0
    for band in range(radius + 1):
        spread |= 1 << (64 * band // (radius + 2))
        hashes.append(centers[0] ^ np.uint64(spread))
    hashes = np.array([*hashes, *centers], np.uint64)
    found = set()
    for pairs in dedup.hamming_pairs(hashes, radius):
        found |= {tuple(sorted(pair)) for pair in pairs.tolist()}
    distance = np.bitwise_count(hashes[:, None] ^ hashes)
    first, second = np.nonzero(np.triu(distance <= radius, 1))
    assert found == set(zip(first, second))
    assert len(found) > 20 or radius == 0


def test_of_a_chain_every_second_is_kept():
    """Each is like the next one only: 0 takes 1, which then takes nobody, so 2 is kept, and takes 3."""
    chain = np.array([(1, 0), (1, 2), (3, 2), (3, 4)])
    assert dedup.find_representatives(6, chain).tolist() == [0, 0, 2, 2, 4, 5]
    assert dedup.find_representatives(6, chain[::-1]).tolist() == [0, 0, 2, 2, 4, 5]
    assert dedup.find_representatives(3, chain[:0]).tolist() == [0, 1, 2]


def test_evaluation_images_stay_whatever_they_resemble():
    """0 and 1 are fixed and alike; 2 is like 1 only, and 3 like 2 only: it is no leak."""
    pairs = np.array([(0, 1), (1, 2), (2, 3)])
    assert dedup.find_representatives(4, pairs, num_fixed=2).tolist() == [0, 1, 1, 3]


def test_what_goes_resembles_what_stays_and_nothing_that_stays_does():
    rng = np.random.default_rng(8)
    pairs = rng.integers(0, 300, (900, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    alike = np.zeros((300, 300), bool)
    alike[tuple(pairs.T)] = True
    alike |= alike.T
    expected = np.arange(300)
    kept = []
    for image in range(300):  # the definition, one image at a time
        similar = [other for other in kept if alike[image, other]]
        if similar:
            expected[image] = similar[0]
        else:
            kept.append(image)
    assert 50 < len(kept) < 250
    for _ in range(3):
        assert np.array_equal(dedup.find_representatives(300, pairs), expected)
        pairs = rng.permutation(pairs)


# ---------------------------------------------------------------- vectors


def clouds(rng, sizes, width=16, spread=0.15):
    """Unit vectors around len(sizes) random directions, half precision -> x (n, width), group (n,)."""
    centers = rng.normal(size=(len(sizes), width))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    group = np.repeat(np.arange(len(sizes)), sizes)
    noise = rng.normal(size=(len(group), width))
    x = centers[group] + noise * spread
    order = rng.permutation(len(group))
    return unit_rows(torch.from_numpy(x))[order], group[order]


def test_sums_of_half_precision_are_exact_in_any_order():
    x, _ = clouds(np.random.default_rng(0), [5000])
    rows = torch.from_numpy(x).double()
    once = rows.sum(0)
    again = rows[torch.randperm(len(x))].sum(0)
    assert torch.equal(once, again)
    in_integers = (rows * 2**24).long().sum(0)
    assert torch.equal((once * 2**24).long(), in_integers)
    assert not torch.equal(rows.float().sum(0).double(), once)  # float32 would not do


def test_kmeans_finds_the_clouds_and_nearest_is_brute_force():
    x, group = clouds(np.random.default_rng(1), [400] * 6)
    _, clusters = kmeans(x, 6)
    for number in range(6):
        sizes = np.bincount(clusters[group == number])
        assert sizes.max() > 0.97 * 400
    cosines, near = nearest(x[:50], x, 3)
    assert (near[:, 0] == np.arange(50)).all()
    rows = x.astype(np.float64)
    ascending = np.sort(rows[:50] @ rows.T, 1)
    assert np.allclose(cosines, ascending[:, :-4:-1])


def test_nearest_over_several_blocks(monkeypatch):
    x, _ = clouds(np.random.default_rng(1), [40] * 6)
    once, _ = nearest(x, x, 5)
    monkeypatch.setattr(vectors, "BANK", 37)
    monkeypatch.setattr(vectors, "BLOCK", 13)
    again, _ = nearest(x, x, 5)
    assert np.allclose(once, again)


def test_resampling_spreads_centroids_over_rare_groups():
    """A crowd of 4,000 and seven groups of 40: with resampling more centroids go to the rare ones."""
    rng = np.random.default_rng(2)
    x, group = clouds(rng, [4000, 40, 40, 40, 40, 40, 40, 40], spread=0.25)

    def num_inside_crowd(rounds):
        _, clusters = kmeans(x, 24, rounds=rounds)
        count = 0
        for cluster in np.unique(clusters):
            members = group[clusters == cluster]
            count += np.bincount(members).argmax() == 0
        return count

    assert num_inside_crowd(4) < num_inside_crowd(0)


@pytest.mark.skipif(vectors.faiss is None, reason="faiss is an extra")
def test_faiss_finds_nearly_the_same():
    x, _ = clouds(np.random.default_rng(3), [300] * 8)
    _, exact = nearest(x[:100], x, 4)
    search = vectors.faiss_search(x)
    _, found = search(x[:100], 4)
    shared = 0
    for ours, theirs in zip(exact, found.numpy()):
        shared += len(set(ours) & set(theirs))
    assert shared / exact.size > 0.9


def test_near_duplicates_of_features_are_found_and_others_are_not(monkeypatch):
    monkeypatch.setattr(dedup, "PARTITION", 100)
    rng = np.random.default_rng(4)
    x, _ = clouds(rng, [30] * 40, width=64, spread=1.0)
    noise = rng.normal(size=(100, 64)) * 0.01
    twins = x[:100].astype(np.float64) + noise
    both = np.concatenate([x, unit_rows(torch.from_numpy(twins))])
    numbers = np.arange(len(both))
    side = numbers < 0
    roots = dedup.near_duplicate_groups(both, side, 0.97, 2.0)
    assert (roots[-100:] == numbers[:100]).mean() >= 0.98  # a border of partitions may cost one
    assert (roots[:-100] == numbers[:-100]).all()
    side[-100:] = True  # of the evaluation set: a lower bar, for pairs across only
    roots = dedup.near_duplicate_groups(both, side, 2.0, 0.97)
    assert (roots[-100:] == numbers[:100]).mean() >= 0.98
    side[:] = True
    roots = dedup.near_duplicate_groups(both, side, 2.0, 0.97)
    assert (roots == numbers).all()


def test_features_of_a_slow_camera_do_not_merge():
    """Directions on a quarter of a circle, 0.5 degrees apart: 5 degrees mean every 10th or 11th."""
    angles = np.radians(np.arange(0, 90, 0.5))
    x = unit_rows(torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], 1)))
    roots = dedup.near_duplicate_groups(x, np.zeros(len(x), bool), np.cos(np.radians(5)), 2.0)
    kept = np.unique(roots)
    assert set(np.diff(kept)) <= {10, 11}
    assert (np.arange(len(x)) - roots < 11).all()


# ---------------------------------------------------------------- quotas


def test_water_filling():
    assert water_fill([5, 100, 1], 30).tolist() == [5, 24, 1]
    assert water_fill([5, 100, 1], 1000).tolist() == [5, 100, 1]
    assert water_fill([10, 10, 10], 11).sum() == 11


def test_a_hierarchical_sample_is_even_at_each_level():
    domain = np.repeat([0, 1, 2], [800, 150, 50])
    cluster = np.arange(1000) % 50 + 50 * domain
    order = np.random.default_rng(0).permutation(1000)
    taken = hierarchical_sample([domain, cluster], order, 150)
    assert len(set(taken)) == 150
    assert np.bincount(domain[taken]).tolist() == [50, 50, 50]
    of_domain_0 = taken[domain[taken] == 0]
    assert np.bincount(cluster[of_domain_0]).max() == 1
    assert normalized_entropy(domain[taken]) == pytest.approx(1)
    assert normalized_entropy(domain) < 0.7


# ---------------------------------------------------------------- linear heads


def test_linear_heads_are_scikit_learn_s():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(5)
    scales = rng.uniform(0.1, 5, 8)
    x = rng.normal(size=(300, 8)) * scales
    logits = x @ rng.normal(size=8) / 5
    y = (logits + rng.logistic(size=300) > 0.3).astype(float)
    mean = x.mean(0)
    std = x.std(0)
    standardised = (x - mean) / std
    weight, bias = fit_linear(x, y, logistic=True)
    theirs = linear_model.LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000)
    theirs.fit(standardised, y)
    assert np.allclose(weight * std, theirs.coef_[0], atol=1e-3)
    assert np.allclose(bias + mean @ weight, theirs.intercept_, atol=1e-3)
    weight, bias = fit_linear(x, y, logistic=False)
    theirs = linear_model.Ridge(alpha=10)
    theirs.fit(standardised, y)
    assert np.allclose(weight * std, theirs.coef_, atol=1e-4)


def test_scores_are_held_out():
    """Noise cannot be learned: a head that had seen its examples would seem to know them."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(60, 40))
    y = np.repeat([0.0, 1.0], 30)
    p = held_out_scores(x, y, logistic=True)
    accuracy = ((p > 0.5) == y).mean()
    assert 0.3 < accuracy < 0.7
    weight, bias = fit_linear(x, y, logistic=True)
    logits = x @ weight + bias
    assert ((logits > 0) == y).mean() > 0.8
