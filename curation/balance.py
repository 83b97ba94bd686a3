"""Balance: an equal share for each domain, or the neighbours of a set of seed images."""

import numpy as np

from curation.embed import embed_examples
from curation.manifest import REASONS
from curation.settings import levels_of
from curation.vectors import kmeans, nearest
from sources import open_source


def balance(state):
    settings = state.cfg.balance
    if settings.seeds:
        state.apply("retrieval", filter_retrieval, settings, [settings.seeds])
    if settings.target:
        state.apply("balance", filter_clusters, settings)


def filter_retrieval(state):
    """Of the kept images, all but the k nearest of each seed -> the column why and a note."""
    k = state.cfg.balance.k
    kept = state.kept()
    uri = state.cfg.balance.seeds
    seeds, readable = embed_examples(state.embedder, open_source(uri), uri)
    _, near = nearest(seeds, state.features[np.isin(state.embedded, kept)], k)
    retrieved = np.unique(near)
    why = np.zeros(state.num_images, np.uint8)
    why[np.delete(kept, retrieved)] = REASONS.index("not retrieved")
    note = f"the {k} nearest of each of {len(seeds)} seed images ({np.sum(~readable)} more are unreadable): "
    note += f"{len(retrieved)} of {len(kept)} images"
    return dict(why=why, notes=np.array([note]))


def filter_clusters(state):
    """Of the kept images, all but `target`, spread evenly -> the columns why, cluster, domain and a note."""
    settings = state.cfg.balance
    kept = state.kept()
    x = state.features[np.isin(state.embedded, kept)]
    levels = hierarchical_kmeans(x, levels_of(state.cfg), settings)
    order = np.argsort(state.sha[kept], kind="stable")  # by hash: as good as a draw
    taken = hierarchical_sample(levels, order, settings.target)
    columns = {name: np.full(state.num_images, -1) for name in ("cluster", "domain")}
    columns["domain"][kept] = levels[0]
    columns["cluster"][kept] = levels[-1]
    why = np.zeros(state.num_images, np.uint8)
    why[np.delete(kept, taken)] = REASONS.index("over quota")
    before = normalized_entropy(levels[0])
    after = normalized_entropy(levels[0][taken])
    note = f"{len(kept)} images to {len(taken)}; entropy of the domains {before:.3f} before, "
    note += f"{after:.3f} after"
    return dict(why=why, **columns, notes=np.array([note]))


def hierarchical_kmeans(x, numbers, settings):
    """k-means of rows x (n, D), then of the centroids ... -> [clusters (n,) of a level], coarsest first.

    numbers: of clusters, finest level first.
    """
    levels = []
    points = x
    for k in numbers:
        points, clusters = kmeans(points, min(k, len(points)), settings.seed, settings.rounds)
        if levels:
            clusters = clusters[levels[0]]  # of the rows, not of the centroids
        levels.insert(0, clusters)
    return levels


def hierarchical_sample(levels, order, total):
    """An equal share of each domain, within it of each cluster, down to the finest (Vo et al., 2024).

    levels: clusters (n,) of each level, coarsest first. order: numbers (n,), of which the first in a finest
    cluster are taken. -> the `total` numbers taken
    """
    groups = [(order, total)]
    for clusters in levels:
        finer = []
        for members, amount in groups:
            present, sizes = np.unique(clusters[members], return_counts=True)
            for cluster, quota in zip(present, water_fill(sizes, amount)):
                finer.append((members[clusters[members] == cluster], quota))
        groups = finer
    return np.concatenate([members[:amount] for members, amount in groups])


def water_fill(sizes, total):
    """How much to take of groups of these sizes (k,): min(size, water level), `total` in all -> (k,)."""
    quotas = np.zeros(len(sizes), np.int64)
    left = min(int(total), int(np.sum(sizes)))
    for turn, group in enumerate(np.argsort(sizes, kind="stable")):  # what a small one lacks, others give
        quotas[group] = min(sizes[group], left // (len(sizes) - turn))
        left -= quotas[group]
    return quotas


def normalized_entropy(labels):
    """Entropy of the frequencies of labels over the largest possible: 1 = all are equal, 0 = only one."""
    _, counts = np.unique(labels, return_counts=True)
    if len(counts) < 2:
        return 0.0
    p = counts / len(labels)
    return float(-(p * np.log(p)).sum() / np.log(len(p)))
