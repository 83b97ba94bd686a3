"""Ours for labs/lab1_collapse.py."""

import math

import torch


def centred(logits, center, tau):
    # Dividing by a small tau after the subtraction is the sharpening: it stretches what the centre left.
    return ((logits - center) / tau).softmax(dim=-1)


def moved(center, mean, momentum):
    return momentum * center + (1 - momentum) * mean


def entropies(targets):
    # Mean of the entropies and entropy of the mean are far apart exactly when images get different answers.
    rows = torch.special.entr(targets).sum(dim=-1).mean()
    mean = torch.special.entr(targets.mean(dim=0)).sum()
    return rows / math.log(targets.shape[-1]), mean / math.log(targets.shape[-1])
