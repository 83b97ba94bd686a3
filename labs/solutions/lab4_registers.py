"""Lab 4, solved."""

import torch


def outliers(norms, arch):
    median = norms.median()
    distance = (norms - median).abs()
    mad = distance.median()  # does not grow before half of the tokens are odd
    limit = max(median + 10 * 1.4826 * mad, 2 * median)
    share = (norms > limit).float().mean()
    return share.item(), limit.item()


def attention_shares(maps, registers):
    first_patch = 1 + registers
    kinds = [slice(0, 1), slice(1, first_patch), slice(first_patch, None)]
    received = [maps[..., kind].sum(-1) for kind in kinds]  # by each kind: (B, H, T)
    received = torch.stack(received, -1)
    given = [received[:, :, kind].mean((0, 1, 2)) for kind in kinds]  # by each kind: (3,)
    return torch.stack(given)
