"""Lab 5, solved: what fills its holes."""

import numpy as np


def precision_recall(truth, found, reason):
    planted = {name for name, why in truth.items() if why == reason}
    dropped = {name for name, why in found.items() if why == reason}
    both = len(planted & dropped)
    return both / len(dropped) if dropped else 1, both / len(planted) if planted else 1


def join(hashes, radius):
    apart = np.bitwise_count(
        hashes[:, None] ^ hashes
    )  # (n, n): memory grows with the square, the real one's does not
    yield np.argwhere(np.triu(apart <= radius, 1))


def fill(sizes, total):
    quota, wanted = np.zeros(len(sizes), int), min(total, sum(sizes))
    for served, i in enumerate(np.argsort(sizes)):
        quota[i] = min(sizes[i], wanted // (len(sizes) - served))
        wanted -= quota[i]
    return quota
