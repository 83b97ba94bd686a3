"""The losses against the authors' (tests/golden), on one process and on two, and at the edges.

The edges are those where other implementations break.
"""

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_close, load_golden

from losses import (
    Centering,
    collapse_metrics,
    collapse_warning,
    cross_entropy,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
)

# ---------------------------------------------------------------- against the authors


def test_centering_over_three_steps_uses_the_centre_of_the_step_before():
    golden = load_golden("a_dino_loss")
    centering = Centering(32)
    for i in range(3):
        assert_close(centering.center + 1, golden[f"center_used_{i}"] + 1)
        probs = centering.targets(golden[f"teacher_logits_natural_{i}"], 0.05)
        swapped = probs.unflatten(0, (2, 4)).flip(0).flatten(0, 1)
        assert_close(swapped, golden[f"centering_teacher_probs_swapped_{i}"])
        centering.update()
    assert_close(centering.center, golden["center_after_3_updates"])


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_sinkhorn_iterations(iterations):
    golden = load_golden("a_dino_loss")
    probs = sinkhorn_knopp(golden["teacher_logits_natural_0"], 0.05, iterations)
    assert_close(probs, golden[f"sinkhorn_{iterations}it_natural_0"])


@pytest.mark.parametrize("mode", ["centering", "sinkhorn"])
def test_dino_loss_and_gradient(mode):
    golden = load_golden("a_dino_loss")
    swapped = golden[f"{mode}_teacher_probs_swapped_2"].unflatten(0, (2, 4))
    targets = swapped.flip(0)  # back to natural order: dino_loss swaps by itself
    global_logits = golden["student_global_logits"].clone().requires_grad_()
    local_logits = golden["student_local_logits"].clone().requires_grad_()
    local_term, global_term = dino_loss(
        global_logits.unflatten(0, (2, 4)), local_logits.unflatten(0, (3, 4)), targets
    )
    assert_close(local_term, golden[f"{mode}_local_scaled"])
    assert_close(global_term, golden[f"{mode}_global_scaled"])
    loss = local_term + global_term
    loss.backward()
    assert_close(loss, golden[f"{mode}_dino_total"])
    assert_close(global_logits.grad, golden[f"{mode}_grad_student_global"])
    assert_close(local_logits.grad, golden[f"{mode}_grad_student_local"])


@pytest.mark.parametrize("mode", ["centering", "sinkhorn"])
def test_ibot_loss_and_gradient(mode):
    golden = load_golden("b_ibot_loss")
    centering = Centering(24)
    for i in range(2):
        assert_close(centering.center + 1, golden[f"center_used_{i}"].view(1, -1) + 1)
        targets = centering.targets(golden[f"teacher_masked_logits_{i}"], 0.06)
        assert_close(targets, golden[f"centering_probs_{i}"].view_as(targets))
        centering.update()
    assert_close(centering.center, golden["center_after_2_updates"].view(1, -1))
    if mode == "sinkhorn":
        targets = sinkhorn_knopp(golden["teacher_masked_logits_1"], 0.06)
    assert_close(targets, golden[f"{mode}_probs"].view_as(targets))
    logits = golden["student_masked_logits"].clone().requires_grad_()
    loss = ibot_loss(logits, targets, golden["masks_weight"], images=8)
    loss.backward()
    assert_close(loss, golden[f"{mode}_loss_as_in_total"].squeeze())
    assert_close(logits.grad, golden[f"{mode}_grad_student"])


def targets_of_one_rank(rank, port, folder):
    """A process of test_two_ranks: saves its targets and centres as folder/RANK.pt."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    golden = load_golden("b2_sinkhorn_two_ranks")
    found = {}
    found["cls"] = sinkhorn_knopp(golden[f"cls_logits_r{rank}"], 0.05)
    found["patch"] = sinkhorn_knopp(golden[f"patch_logits_r{rank}"], 0.05)
    rows = golden["patch_logits_r0"]
    if rank == 0:
        rows = rows[:0]
    found["empty"] = sinkhorn_knopp(rows, 0.05)
    for name in ("cls", "patch"):
        centering = Centering(16)
        centering.targets(golden[f"{name}_logits_r{rank}"], 0.05)
        centering.update()
        found[f"{name}_center"] = centering.center
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    port = 29511 + torch.randint(1000, ()).item()
    mp.spawn(targets_of_one_rank, (port, str(tmp_path)), nprocs=2)
    golden = load_golden("b2_sinkhorn_two_ranks")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for rank, found in enumerate(ranks):
        assert_close(found["cls"], golden[f"cls_sk_r{rank}"])
        assert_close(found["patch"], golden[f"patch_sk_r{rank}"])
        assert_close(found["cls_center"], golden[f"dino_center_r{rank}"])
    # The iBOT centre is ours: every masked patch weighs the same, wherever it is (the authors average the
    # ranks' means).
    mean = torch.cat([golden["patch_logits_r0"], golden["patch_logits_r1"]]).mean(0, keepdim=True)
    assert_close(ranks[0]["patch_center"], 0.1 * mean)
    assert torch.equal(ranks[0]["patch_center"], ranks[1]["patch_center"])
    # A rank without masked patches takes part all the same.
    assert_close(ranks[1]["empty"], sinkhorn_knopp(golden["patch_logits_r0"], 0.05))


def test_koleo_and_gradient():
    golden = load_golden("c_koleo")
    features = golden["x"].clone().requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert_close(loss, golden["loss"])
    assert_close(features.grad, golden["grad"])
    assert_close(koleo_loss(golden["x_dup"]), golden["loss_dup"])
    two_crops = koleo_loss(golden["x"][:6]) + koleo_loss(golden["x"][6:])
    assert_close(0.1 * two_crops, golden["two_crop_weighted"])
    assert_close(koleo_loss(golden["x"], group=6) * 2, two_crops)  # groups never meet


# ---------------------------------------------------------------- the edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["duplicate", "one", "none", "equal", "zero"])
def test_koleo_stays_finite(case, dtype):
    x = torch.randn(8, 16)
    cases = {
        "duplicate": torch.cat([x, x[:1]]),
        "one": x[:1],
        "none": x[:0],
        "equal": x[:1].repeat(8, 1),
        "zero": 0 * x,
    }
    features = cases[case].to(dtype).requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_koleo_tells_near_neighbours_apart():
    """Nearly equal features: the matrix form of the distance rounds most of them to zero, gradients too."""
    features = (torch.randn(1, 384) + 1e-4 * torch.randn(32, 384)).requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert (features.grad.norm(dim=1) > 0).all()
    assert loss < 12


def test_losses_are_fp32_whatever_comes_in():
    logits = torch.randn(4, 64).half() * 50
    targets = torch.softmax(torch.randn(4, 64), -1)
    assert cross_entropy(logits, targets).dtype == torch.float32
    assert sinkhorn_knopp(logits, 0.01).dtype == torch.float32
    assert Centering(64).targets(logits, 0.04).dtype == torch.float32


def test_sinkhorn_survives_huge_logits():
    probs = sinkhorn_knopp(torch.randn(16, 8) * 30, 0.04)  # exp(z / tau) would be exp(2000)
    assert torch.isfinite(probs).all()
    sums = probs.sum(1)
    summing_to_one = (sums - 1).abs() < 1e-5
    assert (summing_to_one | (sums == 0)).all()
    assert sums.any()
    # Row 2 lies 90 tau below the largest logit, but leads in no column.
    far = torch.tensor([[0.9, 0.0], [0.0, -0.9]])
    assert_close(sinkhorn_knopp(far, 0.02).sum(1), torch.ones(2))


def test_sinkhorn_balances():
    """Rows sum to one at any time, columns come closer to n / K with every iteration."""
    logits = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    imbalance = []
    for iterations in (1, 3, 10, 100):
        columns = sinkhorn_knopp(logits, 0.05, iterations).sum(0)
        imbalance.append((columns / 32 - 1).abs().max().item())
    assert imbalance == sorted(imbalance, reverse=True)
    assert imbalance[-1] < 0.01
    assert_close(sinkhorn_knopp(logits, 0.05).sum(1), torch.ones(512))


def test_centre_stays_without_rows_and_in_a_skipped_step():
    centering = Centering(4)
    centering.center += 1
    centering.update()
    assert (centering.center == 1).all()
    centering.targets(torch.full((3, 4), torch.nan), 0.1)
    centering.update(found_inf=torch.ones(()))
    centering.update()  # and the sums collected so far are forgotten
    assert (centering.center == 1).all()


def test_uniform_student_sits_at_ln_k():
    """The table every user should know: 2 global and 8 local crops, K = 4096, no opinion in the student."""
    K = 4096
    B = 3
    targets = torch.softmax(torch.randn(2, B, K), -1)
    local_term, global_term = dino_loss(torch.zeros(2, B, K), torch.zeros(8, B, K), targets)
    assert local_term.item() == pytest.approx(7.394, abs=1e-3)
    assert global_term.item() == pytest.approx(0.924, abs=1e-3)
    # Half of 2B = 6 crops masked, 5 patches each: the term is half of ln K.
    patch_targets = targets[0, :1].expand(15, K)
    ibot = ibot_loss(torch.zeros(15, K), patch_targets, torch.full((15,), 0.2), 6)
    assert ibot.item() == pytest.approx(math.log(K) / 2, rel=1e-5)


def test_without_local_crops_it_is_a_plain_mean():
    logits = torch.randn(2, 3, 8)
    targets = torch.softmax(torch.randn(2, 3, 8), -1)
    local_term, global_term = dino_loss(logits, None, targets)
    assert local_term == 0
    one_way = cross_entropy(logits[0], targets[1]).mean()
    other_way = cross_entropy(logits[1], targets[0]).mean()
    assert_close(global_term, (one_way + other_way) / 2)


# ---------------------------------------------------------------- metrics of collapse

K = 64
ONE_HOT = torch.eye(K)[3].repeat(256, 1)
UNIFORM = torch.full((256, K), 1 / K)
SPREAD = torch.eye(K).repeat(4, 1)
COLLAPSES = [(ONE_HOT, 0, 0, "one-hot"), (UNIFORM, 1, 1, "uniform"), (SPREAD, 0, 1, None)]


@pytest.mark.parametrize("targets, entropy, entropy_mean, words", COLLAPSES)
def test_instruments_and_collapse(targets, entropy, entropy_mean, words):
    metrics = collapse_metrics(targets, torch.zeros(256, K), torch.randn(256, 32))
    assert metrics["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert metrics["entropy_mean"] == pytest.approx(entropy_mean, abs=1e-5)
    assert metrics["kl"].item() == pytest.approx(math.log(K) * (1 - entropy), abs=1e-4)
    assert 25 < metrics["rank"] <= 32
    warning = collapse_warning(metrics["entropy"].item(), metrics["entropy_mean"].item())
    if words is None:
        assert warning is None
    else:
        assert words in warning


def test_rank_of_features_on_a_line():
    line = torch.randn(256, 1) * torch.randn(1, 32)
    assert collapse_metrics(UNIFORM, torch.zeros(256, K), line)["rank"] == pytest.approx(1, abs=0.01)
