"""Block masks: bit-exact with the published generator, exact counts, strata over the global batch.

golden/masks.npz holds numbers computed with the authors' code (facebookresearch/dinov2, commit b8931f7).
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from data import sample_block_mask, sample_masks

GOLDEN = np.load(Path(__file__).parent / "golden" / "masks.npz")
GRIDS = {"g16": 16, "g14": 14, "g37": 37, "g4": 4}


def settings(*overrides):
    return config.load(overrides=["student.patch_size=14", "crops.local_crops_size=98", *overrides])


@pytest.mark.parametrize("grid", GRIDS)
def test_generator_is_bit_exact(grid):
    """The same stream of Python's random gives the published masks, before they are completed."""
    rng, cap = random.Random(1234), float(GOLDEN[f"{grid}_max_num_patches"])
    requested, expected = GOLDEN[f"{grid}_seq_requested"], GOLDEN[f"{grid}_seq_masks_seed1234"]
    for wanted, mask in zip(requested, expected, strict=True):
        assert np.array_equal(sample_block_mask(rng, GRIDS[grid], int(wanted), cap), mask)


@pytest.mark.parametrize("grid", ["g16", "g4"])
def test_generator_statistics(grid):
    """Counts and the map of masking frequency agree with 1000 draws of the published generator."""
    n, cap, draws = GRIDS[grid], float(GOLDEN[f"{grid}_max_num_patches"]), 300
    for k, wanted in enumerate(GOLDEN[f"{grid}_requested"]):
        masks = np.stack(
            [sample_block_mask(random.Random(7 * k + 1000 * i), n, int(wanted), cap) for i in range(draws)]
        )
        counts = masks.sum((1, 2))
        error = 4 * GOLDEN[f"{grid}_count_std"][k] * (1 / draws + 1 / 1000) ** 0.5 + 0.02
        assert abs(counts.mean() - GOLDEN[f"{grid}_count_mean"][k]) < error
        assert counts.max() <= wanted
        assert abs((counts == wanted).mean() - GOLDEN[f"{grid}_frac_exact"][k]) < 0.1
        assert np.abs(masks.mean(0) - GOLDEN[f"{grid}_mean_map"][k]).max() < 0.16


def test_strata_are_exact():
    """Of 2G crops exactly half are masked; the k-th sparsest has a ratio from the k-th slice of .1-.5."""
    cfg, crops = settings(), 64
    for step in range(3):
        counts = sample_masks(cfg, step, range(crops), crops)["masks"].sum(1).sort().values.tolist()
        edges = np.linspace(0.1, 0.5, crops // 2 + 1)
        assert counts[: crops // 2] == [0] * (crops // 2)
        for k, count in enumerate(counts[crops // 2 :]):
            assert int(256 * edges[k]) <= count <= 256 * edges[k + 1]


def test_total_agrees_with_published_collate():
    """32 crops of 256 patches: as many masked in all as in 200 batches of the published collate."""
    cfg, published = settings(), GOLDEN["collate_n_masked"]
    totals = [int(sample_masks(cfg, step, range(32), 32)["masks"].sum()) for step in range(20)]
    assert abs(np.mean(totals) - published.mean()) < 3  # ours are completed: up to .1 x 16 patches more
    assert published.min() - 5 <= min(totals) and max(totals) <= published.max() + 10


def test_place_decides_and_steps_differ():
    cfg = settings()
    whole = sample_masks(cfg, 5, range(16), 16)["masks"]
    parts = torch.cat([sample_masks(cfg, 5, [i], 16)["masks"] for i in range(16)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, sample_masks(cfg, 6, range(16), 16)["masks"])
    masked = [tuple((sample_masks(cfg, s, range(16), 16)["masks"].sum(1) > 0).tolist()) for s in range(8)]
    assert len(set(masked)) > 4  # another half of the crops is masked at each step


def test_indices_and_weights():
    """The flat indices list the masked patches in order, and the weights of each masked crop sum to one."""
    out = sample_masks(settings(), 0, range(8), 8)
    masks = out["masks"]
    assert torch.equal(out["mask_indices"], masks.flatten().nonzero()[:, 0])
    crop = out["mask_indices"] // masks.shape[1]
    sums = torch.zeros(8).index_add_(0, crop, out["mask_weights"])
    torch.testing.assert_close(sums, (masks.sum(1) > 0).float())
    assert out["mask_indices"].dtype == torch.int64 and out["mask_weights"].dtype == torch.float32


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_tiny_grids(patch):
    """4 x 4, 2 x 2 and even 1 x 1 patches: blocks may not fit, the completed count is right all the same."""
    cfg = settings(f"student.patch_size={patch}", "crops.global_crops_size=32", "crops.local_crops_size=32")
    n = (32 // patch) ** 2
    for step in range(20):
        counts = sample_masks(cfg, step, range(8), 8)["masks"].sum(1).sort().values[4:]
        edges = np.linspace(0.1, 0.5, 5)
        for k, count in enumerate(counts.tolist()):
            assert int(n * edges[k]) <= count <= n * edges[k + 1]


def test_never_and_always():
    none = sample_masks(settings("ibot.mask_sample_probability=0"), 0, range(4), 4)
    assert none["masks"] is None and len(none["mask_indices"]) == len(none["mask_weights"]) == 0
    every = sample_masks(settings("ibot.mask_sample_probability=1"), 0, range(4), 4)
    assert (every["masks"].sum(1) > 0).all()
