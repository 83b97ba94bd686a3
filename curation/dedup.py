"""Duplicates: images with the same bytes, looks or features; and leaks, which resemble an evaluation image.

Resemblance makes chains: if A is like B and B like C, all three are one component, although A and C may
differ. Of a component the largest image stays; if an evaluation image is in it, no image of the source does.
"""

from itertools import combinations, pairwise

import numpy as np
import torch

from curation.embed import embed
from curation.manifest import REASONS
from curation.vectors import BLOCK, kmeans, nearest, to_float64
from distributed import all_reduce, rank, world_size

PARTITION = 1000  # rows, on average, among which near-duplicates are searched


def dedup(state):
    """By hashes; then, if there are features, by these."""
    state.apply("hashes", filter_hashes, state.cfg.dedup)
    embed(state)
    similar = state.cfg.similar
    if state.features is not None and min(similar.min_cosine, similar.leak_cosine) < 1:
        state.apply("similar", filter_features, similar)
        still_in = state.why[state.embedded] == 0
        state.features = state.features[still_in]
        state.embedded = state.embedded[still_in]


def keep_largest(state, rows, roots, reason):
    """Decide over components: the largest image stays, or none with an evaluation image in the component.

    rows (m,): numbers of images. roots (m,): their components, as `connected_components` gives them. reason
    (m,): indices of REASONS for those that go. -> the columns why and of
    """
    area = state.width[rows] * state.height[rows]
    in_source = rows < state.num_source
    # Component by component: evaluation images first, then the largest, the most bytes, the first.
    order = np.lexsort((rows, -state.bytes[rows], -area, in_source, roots))
    first = order[np.diff(roots[order], prepend=-1) > 0]
    best_of_root = np.empty(len(rows), np.int64)
    best_of_root[roots[first]] = first
    best = best_of_root[roots]
    leaks = rows[best] >= state.num_source
    dropped = in_source & (leaks | (best != np.arange(len(rows))))
    reason = np.where(leaks, REASONS.index("leak"), reason)
    why = np.zeros(state.num_images, np.uint8)
    why[rows[dropped]] = reason[dropped]
    of = state.of.copy()
    of[rows[dropped]] = rows[best[dropped]]
    return dict(why=why, of=of)


def connected_components(n, pairs):
    """Union-find: pairs of numbers below n -> (n,), for each number the smallest one of its component."""
    parent = list(range(n))

    def find_root(number):
        while parent[number] != number:
            parent[number] = parent[parent[number]]  # halves the path for later calls
            number = parent[number]
        return number

    for one, other in pairs:
        roots = find_root(one), find_root(other)
        parent[max(roots)] = min(roots)
    return np.array([find_root(number) for number in range(n)], np.int64)


# ---------------------------------------------------------------- by hashes


def filter_hashes(state):
    """Exact duplicates by SHA-256, near ones by pHash and dHash together -> the columns why and of."""
    rows = np.flatnonzero(state.why == 0)
    numbers = np.arange(len(rows))
    shas = state.sha[rows]
    _, first, inverse = np.unique(shas, return_index=True, return_inverse=True)
    same_bytes = first[inverse]  # (m,) the first image with these bytes
    both = np.stack([state.phash, state.dhash], 1)[rows]
    hashes, first_of_hash, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    same_hashes = first_of_hash[inverse.ravel()]
    pairs = []
    for first in (same_bytes, same_hashes):  # copies may be many: below, only distinct hashes are compared
        copies = np.flatnonzero(first != numbers)
        pairs.append(np.stack([copies, first[copies]], 1))
    phashes = hashes[:, 0].copy()
    dhashes = hashes[:, 1].copy()
    for one, other in ((phashes, dhashes), (dhashes, phashes)):
        for pair in hamming_pairs(one, state.cfg.dedup.radius):
            left, right = pair.T
            distance = np.bitwise_count(other[left] ^ other[right])
            alike = distance <= state.cfg.dedup.other_radius
            pairs.append(first_of_hash[pair[alike]])
    roots = connected_components(len(rows), np.concatenate(pairs).tolist())
    exact = REASONS.index("exact duplicate")
    near = REASONS.index("near duplicate")
    return keep_largest(state, rows, roots, np.where(same_bytes != numbers, exact, near))


def hamming_pairs(hashes, radius):
    """uint64 (n,) -> yields arrays (m, 2): the numbers of all pairs that differ in at most `radius` bits.

    Exact: of radius + 2 bands of bits, at least two hold no difference. So sort by each two bands, and
    compare every hash with those that follow for as long as both bands agree. With radius 6 two bands are 16
    bits, which spare all but one in 65,536 comparisons.
    """
    num_bands = radius + 2
    edges = [64 * k // num_bands for k in range(num_bands + 1)]
    bands = [np.uint64(2**high - 2**low) for low, high in pairwise(edges)]  # bits low to high - 1
    for one, other in combinations(bands, 2):
        mask = one | other
        order = np.argsort(hashes & mask, kind="stable")
        ranked = hashes[order]
        keys = ranked & mask
        places = np.arange(len(hashes))  # those whose key may be the same `lag` places further on
        for lag in range(1, len(hashes)):
            places = places[: np.searchsorted(places, len(hashes) - lag)]
            places = places[keys[places] == keys[places + lag]]
            if not len(places):
                break
            distance = np.bitwise_count(ranked[places] ^ ranked[places + lag])
            near = places[distance <= radius]
            yield np.stack([order[near], order[near + lag]], 1)


# ---------------------------------------------------------------- by features


def filter_features(state):
    similar = state.cfg.similar
    in_source = state.embedded < state.num_source
    roots = near_duplicate_groups(state.features, in_source, similar.min_cosine, similar.leak_cosine)
    reason = np.full(len(roots), REASONS.index("feature duplicate"))
    return keep_largest(state, state.embedded, roots, reason)


def near_duplicate_groups(x, side, within, across):
    """Group rows x (n, D) whose cosine is above `within`, or above `across` if they differ in side (n,) bool.

    -> (n,), for each row the first one of its group. Pairs are searched in k-means partitions of PARTITION
    rows on average (SemDeDup, Abbas et al. 2023). Each row is in the two nearest partitions, which finds most
    of the pairs that a border divides.
    """
    num_partitions = max(len(x) // PARTITION, 1)
    centroids, _ = kmeans(x, num_partitions)
    _, partitions = nearest(x, centroids, 2)  # (n, 2), or (n, 1) if there is only one
    per_row = partitions.shape[1]
    partitions = partitions.ravel()
    order = np.argsort(partitions, kind="stable") // per_row  # rows, partition by partition
    ends = np.cumsum(np.bincount(partitions))
    pairs = [np.empty((0, 2), np.int64)]
    for members in np.split(order, ends[:-1])[rank() :: world_size()]:
        bank = to_float64(x[members])
        for rows in np.split(members, range(BLOCK, len(members), BLOCK)):
            cosines = (to_float64(x[rows]) @ bank.T).cpu().numpy()
            differ = side[rows][:, None] != side[members]
            left, right = np.nonzero((cosines > within) | differ & (cosines > across))
            pairs.append(np.stack([rows[left], members[right]], 1))
    mine = connected_components(len(x), np.concatenate(pairs).tolist())
    roots_of_all = torch.zeros(world_size(), len(x), dtype=torch.int64)  # a row for each process
    roots_of_all[rank()] = torch.from_numpy(mine)
    links = []
    for roots in all_reduce(roots_of_all).tolist():
        links += [(row, root) for row, root in enumerate(roots) if row != root]
    return connected_components(len(x), links)
