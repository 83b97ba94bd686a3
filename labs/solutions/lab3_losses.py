"""Ours for labs/lab3_losses.py."""

import numpy as np
import torch
import torch.nn.functional as F


def koleo(features, group=0):
    x = F.normalize(features.float(), dim=-1)
    # Which neighbour is nearest needs no gradient, and nobody is his own neighbour: the diagonal goes out.
    nearest = (x @ x.T).detach().fill_diagonal_(-2).argmax(dim=1)
    distance = (x - x[nearest] + 1e-8).norm(dim=-1)
    return -torch.log(distance + 1e-8).mean()


def scattered(rng, n, wanted, cap):
    mask = np.zeros(n * n, dtype=bool)
    mask[rng.sample(range(n * n), wanted)] = True
    return mask.reshape(n, n)
