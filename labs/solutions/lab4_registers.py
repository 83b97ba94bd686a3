"""Lab 4, solved: what fills its holes."""

import torch


def outliers(norms, arch):
    median = norms.median()
    mad = (norms - median).abs().median()  # half of the tokens would have to be odd before this grows
    limit = max(median + 10 * 1.4826 * mad, 2 * median)
    return (norms > limit).float().mean().item(), limit.item()


def who_looks(maps, r):
    kinds = (slice(0, 1), slice(1, 1 + r), slice(1 + r, None))
    given = torch.stack([maps[..., kind].sum(-1) for kind in kinds], -1)  # (B, H, T, 3)
    return torch.stack([given[:, :, kind].mean((0, 1, 2)) for kind in kinds])
