"""Vectors: unit rows in half precision, their nearest neighbours, and spherical k-means.

Rows may be memory-mapped; everything is computed from blocks of rows, in float64, on the GPU if there is one.

Several processes (torchrun) share the work and get the same result to the last bit. Each block is computed by
one process, whatever their number, and sums are exact: numbers of half precision up to 1 are multiples of
2**-24, of which float64 adds 2**29 without rounding, in any order.
"""

import numpy as np
import torch
import torch.nn.functional as F

from distributed import all_reduce, rank, world_size

try:
    import faiss  # optional: approximate neighbours in large banks
except ImportError:
    faiss = None

BLOCK = 1024  # rows that are compared with ...
BANK = 16_384  # ... this many rows of the bank at a time
ITERATIONS = 20  # of k-means
SAMPLE = 20_000  # rows among which the first centroids are drawn
FAISS_FROM = 1_000_000  # vectors in a bank from which faiss takes over, where it is installed


def unit_rows(x):
    """Tensor (n, D) -> float16 array of the same rows with length 1."""
    return F.normalize(x, dim=1).half().cpu().numpy()


def to_float64(x):
    """Rows of features -> float64 tensor, on the GPU if there is one."""
    x = torch.from_numpy(np.array(x))  # a copy: what is memory-mapped is read-only
    return x.to("cuda" if torch.cuda.is_available() else "cpu").double()


def my_blocks(n):
    """The blocks of n rows that this process works on: slices."""
    return [slice(start, start + BLOCK) for start in range(rank() * BLOCK, n, world_size() * BLOCK)]


# ---------------------------------------------------------------- nearest neighbours


def nearest(queries, bank, k=1):
    """The k rows of bank (m, D) nearest to each query (n, D) -> cosines and numbers (n, k), nearest first."""
    k = min(k, len(bank))
    cosines = torch.zeros(len(queries), k, dtype=torch.float64)
    numbers = torch.zeros(len(queries), k, dtype=torch.int64)
    search = faiss_search(bank) if faiss and len(bank) >= FAISS_FROM else exact_search(bank)
    for block in my_blocks(len(queries)):
        cosines[block], numbers[block] = search(queries[block], k)
    cosines = all_reduce(cosines)
    numbers = all_reduce(numbers)
    return cosines.numpy(), numbers.numpy()


def exact_search(bank):
    """-> search(queries, k) -> cosines, numbers."""

    def search(queries, k):
        rows = to_float64(queries)
        cosines = rows.new_zeros(len(queries), 0)
        numbers = torch.zeros_like(cosines, dtype=torch.int64)
        for start in range(0, len(bank), BANK):
            part = to_float64(bank[start : start + BANK])
            found = (rows @ part.T).topk(min(k, len(part)))
            cosines = torch.cat([cosines, found.values], 1)
            numbers = torch.cat([numbers, found.indices + start], 1)
            cosines, best = cosines.topk(min(k, cosines.shape[1]))
            numbers = numbers.gather(1, best)
        return cosines.cpu(), numbers.cpu()

    return search


def faiss_search(bank):
    """The same, approximately: an inverted file of 4 sqrt(m) lists, of which 32 are searched."""
    kind = f"IVF{int(4 * len(bank) ** 0.5)},Flat"
    index = faiss.index_factory(bank.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    step = max(len(bank) // 500_000, 1)
    index.train(np.asarray(bank[::step], np.float32))
    for start in range(0, len(bank), BANK):
        index.add(np.asarray(bank[start : start + BANK], np.float32))
    index.nprobe = 32

    def search(queries, k):
        cosines, numbers = index.search(np.asarray(queries, np.float32), k)
        return torch.from_numpy(cosines), torch.from_numpy(numbers)

    return search


# ---------------------------------------------------------------- k-means


def kmeans(x, k, seed=0, rounds=0):
    """Spherical k-means of unit rows x (n, D) float16 -> centroids (k, D) float16, cluster of each row (n,).

    A round of resampling repeats it on some rows only: of each cluster those nearest to the centroid, at most
    half as many as a mean cluster has. So crowds weigh less, and centroids spread over the kinds of images,
    not over how frequent they are (Vo et al., 2024).
    """
    used = np.ones(len(x), bool)
    for turn in range(rounds + 1):
        centroids = kmeans_pp_init(x, np.flatnonzero(used), k, seed + turn)
        for _ in range(ITERATIONS):
            cosines, clusters = (columns[:, 0] for columns in nearest(x, centroids))
            previous = centroids
            centroids = cluster_means(x, clusters, used, previous)
            if np.array_equal(previous, centroids):
                break
        order = np.lexsort((-cosines, clusters))
        sizes = np.bincount(clusters, minlength=k)
        starts = np.cumsum(sizes) - sizes
        place = np.arange(len(x)) - np.repeat(starts, sizes)  # of each row in its cluster, the nearest first
        half_a_cluster = max(len(x) // (2 * k), 1)
        used[order] = place < half_a_cluster
    return centroids, nearest(x, centroids)[1][:, 0]


def kmeans_pp_init(x, numbers, k, seed):
    """k-means++ on a sample of the rows `numbers`: a row is drawn by its distance from those before it."""
    step = max(len(numbers) // max(SAMPLE, 4 * k), 1)
    sample = x[numbers[::step]]
    rows = to_float64(sample)
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(sample)))]
    distances = 1 - rows @ rows[chosen[0]]  # of each row to the nearest centroid so far
    while len(chosen) < k:
        total = distances.clamp_(min=0).cumsum(0)
        drawn = int(torch.searchsorted(total, rng.random() * float(total[-1])))
        chosen.append(min(drawn, len(rows) - 1))
        distances = torch.minimum(distances, 1 - rows @ rows[chosen[-1]])
    return np.asarray(sample[chosen])


def cluster_means(x, clusters, used, previous):
    """New centroids from the rows in use; one without rows stays. The sums are exact: see the top."""
    sums = torch.zeros(len(previous), x.shape[1] + 1, dtype=torch.float64)
    for block in my_blocks(len(x)):
        numbers = block.start + np.flatnonzero(used[block])
        rows = to_float64(x[numbers]).cpu()
        rows = F.pad(rows, (0, 1), value=1.0)  # a column of ones counts them
        sums.index_add_(0, torch.from_numpy(clusters[numbers]), rows)
    sums = all_reduce(sums)
    counts = sums[:, -1:].numpy()
    return np.where(counts > 0, unit_rows(sums[:, :-1]), previous)
