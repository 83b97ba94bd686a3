"""Block masks: bit-exact with the published generator, exact counts, strata over the global batch.

golden/masks.npz holds numbers computed with the authors' code (facebookresearch/dinov2, commit b8931f7).
"""

import random

import numpy as np
import pytest
import torch
from helpers import GOLDEN

import config
from data import sample_block_mask, sample_masks

PUBLISHED = np.load(GOLDEN / "masks.npz")
GRIDS = {"g16": 16, "g14": 14, "g37": 37, "g4": 4}  # patches per side


def published(grid, name):
    return PUBLISHED[f"{grid}_{name}"]


def mask_config(*overrides):
    return config.load(overrides=["student.patch_size=14", "crops.local_crops_size=98", *overrides])


def masked_patches(cfg, step, crops):
    """How many patches of each of the global crops of a step are masked: (crops,)."""
    return sample_masks(cfg, step, range(crops), crops)["masks"].sum(1)


@pytest.mark.parametrize("grid", GRIDS)
def test_generator_is_bit_exact(grid):
    """The same stream of Python's random gives the published masks, before they are completed."""
    rng = random.Random(1234)
    largest_block = float(published(grid, "max_num_patches"))
    requested = published(grid, "seq_requested")
    expected = published(grid, "seq_masks_seed1234")
    for count, mask in zip(requested, expected, strict=True):
        ours = sample_block_mask(rng, GRIDS[grid], int(count), largest_block)
        assert np.array_equal(ours, mask)


@pytest.mark.parametrize("grid", ["g16", "g4"])
def test_generator_statistics(grid):
    """Counts and the map of masking frequency agree with 1000 draws of the published generator."""
    side = GRIDS[grid]
    draws = 300
    largest_block = float(published(grid, "max_num_patches"))
    for k, wanted in enumerate(published(grid, "requested")):
        masks = []
        for i in range(draws):
            rng = random.Random(7 * k + 1000 * i)
            masks.append(sample_block_mask(rng, side, int(wanted), largest_block))
        counts = np.sum(masks, axis=(1, 2))
        standard_error = published(grid, "count_std")[k] * (1 / draws + 1 / 1000) ** 0.5
        assert abs(counts.mean() - published(grid, "count_mean")[k]) < 4 * standard_error + 0.02
        assert counts.max() <= wanted
        share_exact = (counts == wanted).mean()
        assert abs(share_exact - published(grid, "frac_exact")[k]) < 0.1
        difference = np.mean(masks, axis=0) - published(grid, "mean_map")[k]
        assert np.abs(difference).max() < 0.16


def test_strata_are_exact():
    """Of 2G crops exactly half are masked; the k-th sparsest has a ratio from the k-th slice of .1-.5."""
    crops = 64
    edges = np.linspace(0.1, 0.5, crops // 2 + 1)
    for step in range(3):
        counts = masked_patches(mask_config(), step, crops).sort().values.tolist()
        assert counts[: crops // 2] == [0] * (crops // 2)
        for k, count in enumerate(counts[crops // 2 :]):
            assert int(256 * edges[k]) <= count <= 256 * edges[k + 1]


def test_total_agrees_with_published_collate():
    """32 crops of 256 patches: as many masked in all as in 200 batches of the published collate."""
    cfg = mask_config()
    theirs = PUBLISHED["collate_n_masked"]
    ours = [int(masked_patches(cfg, step, 32).sum()) for step in range(20)]
    assert abs(np.mean(ours) - theirs.mean()) < 3  # ours are completed: up to .1 x 16 patches more
    assert min(ours) >= theirs.min() - 5
    assert max(ours) <= theirs.max() + 10


def test_place_decides_and_steps_differ():
    cfg = mask_config()
    whole = sample_masks(cfg, 5, range(16), 16)["masks"]
    parts = [sample_masks(cfg, 5, [i], 16)["masks"] for i in range(16)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, sample_masks(cfg, 6, range(16), 16)["masks"])
    masked_crops = {tuple(masked_patches(cfg, step, 16).bool().tolist()) for step in range(8)}
    assert len(masked_crops) > 4  # another half of the crops is masked at each step


def test_indices_and_weights():
    """The flat indices list the masked patches in order, and the weights of each masked crop sum to one."""
    batch = sample_masks(mask_config(), 0, range(8), 8)
    masks = batch["masks"]
    assert torch.equal(batch["mask_indices"], masks.flatten().nonzero()[:, 0])
    crop = batch["mask_indices"] // masks.shape[1]
    sums = torch.zeros(8).index_add_(0, crop, batch["mask_weights"])
    torch.testing.assert_close(sums, masks.any(1).float())
    assert batch["mask_indices"].dtype == torch.int64
    assert batch["mask_weights"].dtype == torch.float32


@pytest.mark.parametrize("patch", [8, 16])
def test_tiny_grids(patch):
    """4 x 4 and 2 x 2 patches: blocks may not fit, the completed count is right all the same."""
    sizes = ["crops.global_crops_size=32", "crops.local_crops_size=32"]
    cfg = mask_config(f"student.patch_size={patch}", *sizes)
    patches = (32 // patch) ** 2
    edges = np.linspace(0.1, 0.5, 5)
    for step in range(20):
        counts = masked_patches(cfg, step, 8).sort().values[4:]
        for k, count in enumerate(counts.tolist()):
            assert int(patches * edges[k]) <= count <= patches * edges[k + 1]


def test_never_and_always():
    never = sample_masks(mask_config("ibot.mask_sample_probability=0"), 0, range(4), 4)
    assert never["masks"] is None
    assert len(never["mask_indices"]) == len(never["mask_weights"]) == 0
    assert masked_patches(mask_config("ibot.mask_sample_probability=1"), 0, 4).bool().all()
