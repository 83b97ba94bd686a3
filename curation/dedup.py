"""Duplicates: images with the same bytes, looks or features; and leaks, which resemble an evaluation image.

Images are judged one after the other, the best first: one that resembles an image already kept goes and names
it, any other is kept. So whatever goes resembles what stays, however many steps lie between the two ends of a
chain: of a slow pan every n-th frame is kept. Evaluation images come first, and all of them count as kept.
"""

from itertools import combinations, pairwise

import numpy as np
import torch

from curation.embed import embed
from curation.manifest import REASONS
from curation.vectors import BLOCK, kmeans, nearest, to_float64
from distributed import all_reduce, rank, world_size

PARTITION = 1000  # rows, on average, among which near-duplicates are searched
TOLD_GROUPS = 5  # of which the funnel says how large they are


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


def best_first(state, rows):
    """The order in which images are judged: numbers rows (m,) -> places in `rows` (m,).

    Evaluation images, then the largest, the most bytes, the first.
    """
    in_source = rows < state.num_source
    area = state.width[rows] * state.height[rows]
    return np.lexsort((rows, -state.bytes[rows], -area, in_source))


def find_representatives(n, pairs, num_fixed=0):
    """Which images are kept, and which of them each other one resembles.

    The n images are numbered best first. pairs (p, 2): numbers of two that are alike, in any order. The first
    num_fixed are kept whatever they resemble. -> (n,), for each image the best kept one that it is like;
    itself, if it is kept
    """
    better = pairs.min(1)
    order = np.argsort(better, kind="stable")
    better = better[order]
    worse = pairs.max(1)[order]
    starts = np.flatnonzero(np.diff(better, prepend=-1)).tolist()
    kept_of = np.arange(n)
    for start, end in pairwise([*starts, len(better)]):
        image = better[start]
        if kept_of[image] == image:  # no better image that is kept has claimed it
            alike = worse[start:end]
            alike = alike[(kept_of[alike] == alike) & (alike >= num_fixed)]
            kept_of[alike] = image
    return kept_of


def drop_duplicates(state, rows, kept_of, reason, means):
    """Each image but its representative goes; if that is an evaluation image, it has leaked.

    rows (m,): numbers of images, best first. kept_of (m,): as of `find_representatives`. reason: index of
    REASONS, or (m,) of them, for what is no leak. means: how they were found. -> the columns why, of, a note
    """
    in_source = rows < state.num_source
    resembled = rows[kept_of]
    leaks = resembled >= state.num_source
    dropped = in_source & (resembled != rows)
    reason = np.where(leaks, REASONS.index("leak"), reason)
    why = np.zeros(state.num_images, np.uint8)
    why[rows[dropped]] = reason[dropped]
    of = state.of.copy()
    of[rows[dropped]] = resembled[dropped]
    return dict(why=why, of=of, notes=describe_groups(resembled[dropped], means))


def describe_groups(resembled, means):
    """What each dropped image resembles (d,) -> how large the largest groups are, texts (1,) or (0,)."""
    _, counts = np.unique(resembled, return_counts=True)
    if not len(counts):
        return np.array([])
    sizes = np.sort(counts + 1)[::-1]  # with the image that they resemble
    largest = ", ".join(f"{size:,d}" for size in sizes[:TOLD_GROUPS])
    note = f"groups of duplicates by {means}: {len(sizes):,d}; the largest hold {largest} images"
    return np.array([note])


# ---------------------------------------------------------------- by hashes


def filter_hashes(state):
    """Exact duplicates by SHA-256, near ones by pHash and dHash together -> the columns why, of, a note."""
    rows = np.flatnonzero(state.why == 0)
    rows = rows[best_first(state, rows)]
    shas = state.sha[rows]
    _, first, inverse = np.unique(shas, return_index=True, return_inverse=True)
    same_bytes = first[inverse]  # (m,) the best image with these bytes
    both = np.stack([state.phash, state.dhash], 1)[rows]
    # Copies may be many: only distinct hashes are compared, and the best image of each stands for them.
    hashes, best, inverse = np.unique(both, axis=0, return_index=True, return_inverse=True)
    pairs = best[alike_hashes(hashes, state.cfg.dedup)]
    num_evaluation = np.count_nonzero(rows >= state.num_source)
    kept_of = find_representatives(len(rows), pairs, num_evaluation)
    kept_of = kept_of[best[inverse.ravel()]]
    exact = REASONS.index("exact duplicate")
    near = REASONS.index("near duplicate")
    reason = np.where(same_bytes != np.arange(len(rows)), exact, near)
    return drop_duplicates(state, rows, kept_of, reason, "hashes")


def alike_hashes(hashes, settings):
    """pHash and dHash, uint64 (h, 2) -> pairs that are near in one, and roughly in the other (p, 2)."""
    phashes = hashes[:, 0].copy()
    dhashes = hashes[:, 1].copy()
    pairs = [np.empty((0, 2), np.int64)]
    for one, other in ((phashes, dhashes), (dhashes, phashes)):
        for pair in hamming_pairs(one, settings.radius):
            left, right = pair.T
            distance = np.bitwise_count(other[left] ^ other[right])
            pairs.append(pair[distance <= settings.other_radius])
    return np.concatenate(pairs)


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
    """Those whose cosine is above `similar.min_cosine`, or leak_cosine -> the columns why and of, a note."""
    similar = state.cfg.similar
    in_source = state.embedded < state.num_source
    order = best_first(state, state.embedded)
    place = np.argsort(order)  # of each row among them, the best first
    pairs = near_duplicate_pairs(state.features, in_source, similar.min_cosine, similar.leak_cosine)
    num_evaluation = np.count_nonzero(~in_source)
    kept_of = find_representatives(len(order), place[pairs], num_evaluation)
    reason = REASONS.index("feature duplicate")
    return drop_duplicates(state, state.embedded[order], kept_of, reason, "features")


def near_duplicate_groups(x, side, within, across):
    """`near_duplicate_pairs`, the first rows being the best -> (n,), for each row the kept one it is like."""
    return find_representatives(len(x), near_duplicate_pairs(x, side, within, across))


def near_duplicate_pairs(x, side, within, across):
    """Pairs of rows x (n, D) whose cosine is above `within`, or `across` if they differ in side (n,) bool.

    -> (p, 2), the lower number first; some twice. They are searched in k-means partitions of PARTITION rows
    on average (SemDeDup, Abbas et al. 2023). Each row is in the two nearest partitions, which finds most of
    the pairs that a border divides.
    """
    num_partitions = max(len(x) // PARTITION, 1)
    centroids, _ = kmeans(x, num_partitions)
    _, partitions = nearest(x, centroids, 2)  # (n, 2), or (n, 1) if there is only one
    per_row = partitions.shape[1]
    partitions = partitions.ravel()
    order = np.argsort(partitions, kind="stable") // per_row  # rows, partition by partition, ascending in it
    ends = np.cumsum(np.bincount(partitions))
    pairs = [np.empty((0, 2), np.int64)]
    for members in np.split(order, ends[:-1])[rank() :: world_size()]:
        bank = to_float64(x[members])
        for rows in np.split(members, range(BLOCK, len(members), BLOCK)):
            cosines = (to_float64(x[rows]) @ bank.T).cpu().numpy()
            differ = side[rows][:, None] != side[members]
            alike = (cosines > within) | differ & (cosines > across)
            alike &= rows[:, None] < members
            left, right = np.nonzero(alike)
            pairs.append(np.stack([rows[left], members[right]], 1))
    return gather_pairs(np.concatenate(pairs))


def gather_pairs(mine):
    """The pairs (p, 2) that each process has found -> those of all processes, on each of them."""
    ends = torch.zeros(world_size(), dtype=torch.int64)
    ends[rank()] = len(mine)
    ends = all_reduce(ends).cumsum(0)
    everyones = torch.zeros(int(ends[-1]), 2, dtype=torch.int64)
    end = int(ends[rank()])
    everyones[end - len(mine) : end] = torch.from_numpy(mine)
    return all_reduce(everyones).numpy()
