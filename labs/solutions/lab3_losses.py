"""Lab 3, solved."""

import numpy as np
import torch
import torch.nn.functional as F


def koleo(features, group=0):
    x = F.normalize(features.float(), dim=-1)
    # The choice of the nearest needs no gradient; the diagonal goes out, as nobody is their own neighbour.
    nearest = (x @ x.T).detach().fill_diagonal_(-2).argmax(dim=1)
    distance = (x - x[nearest] + 1e-8).norm(dim=-1)
    return -torch.log(distance + 1e-8).mean()


def scattered_mask(rng, side, count, largest_block):
    mask = np.zeros(side * side, dtype=bool)
    mask[rng.sample(range(side * side), count)] = True
    return mask.reshape(side, side)
