"""Lab 5, solved."""

import numpy as np


def precision_recall(truth, found, reason):
    planted = {name for name, why in truth.items() if why == reason}
    dropped = {name for name, why in found.items() if why == reason}
    both = len(planted & dropped)
    precision = both / len(dropped) if dropped else 1
    recall = both / len(planted) if planted else 1
    return precision, recall


def hamming_pairs(hashes, radius):
    # (n, n) numbers: memory grows with the square of n; that of the real one does not.
    distance = np.bitwise_count(hashes[:, None] ^ hashes)
    yield np.argwhere(np.triu(distance <= radius, 1))


def water_fill(sizes, total):
    quotas = np.zeros(len(sizes), int)
    wanted = min(total, sum(sizes))
    for served, group in enumerate(np.argsort(sizes)):
        quotas[group] = min(sizes[group], wanted // (len(sizes) - served))
        wanted -= quotas[group]
    return quotas
