"""The losses against the authors' (tests/golden), on one process and on two, and at the edges.

The edges are those where other implementations break.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from test_model import close

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

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    f = np.load(GOLDEN / f"{name}.npz")
    return {k: torch.from_numpy(f[k]) for k in f.files if f[k].dtype.kind != "U"}


def test_centering_over_three_steps_uses_the_centre_of_the_step_before():
    f, centering = load("a_dino_loss"), Centering(32)
    for i in range(3):
        close(centering.center + 1, f[f"center_used_{i}"] + 1)
        probs = centering.targets(f[f"teacher_logits_natural_{i}"], 0.05)
        close(probs.unflatten(0, (2, 4)).flip(0).flatten(0, 1), f[f"centering_teacher_probs_swapped_{i}"])
        centering.update()
    close(centering.center, f["center_after_3_updates"])


def test_sinkhorn_iterations():
    f = load("a_dino_loss")
    for n in (1, 2, 3, 10):
        close(sinkhorn_knopp(f["teacher_logits_natural_0"], 0.05, n), f[f"sinkhorn_{n}it_natural_0"])


@pytest.mark.parametrize("mode", ["centering", "sinkhorn"])
def test_dino_loss_and_gradient(mode):
    f = load("a_dino_loss")
    targets = (
        f[f"{mode}_teacher_probs_swapped_2"].unflatten(0, (2, 4)).flip(0)
    )  # back to natural order: we swap inside
    g, local = (f[k].clone().requires_grad_() for k in ("student_global_logits", "student_local_logits"))
    l_local, l_global = dino_loss(g.unflatten(0, (2, 4)), local.unflatten(0, (3, 4)), targets)
    close(l_local, f[f"{mode}_local_scaled"])
    close(l_global, f[f"{mode}_global_scaled"])
    (l_local + l_global).backward()
    close(l_local + l_global, f[f"{mode}_dino_total"])
    close(g.grad, f[f"{mode}_grad_student_global"])
    close(local.grad, f[f"{mode}_grad_student_local"])


@pytest.mark.parametrize("mode", ["centering", "sinkhorn"])
def test_ibot_loss_and_gradient(mode):
    f = load("b_ibot_loss")
    centering = Centering(24)
    for i in range(2):
        close(centering.center + 1, f[f"center_used_{i}"].view(1, -1) + 1)
        probs = centering.targets(f[f"teacher_masked_logits_{i}"], 0.06)
        close(probs, f[f"centering_probs_{i}"].view_as(probs))
        centering.update()
    close(centering.center, f["center_after_2_updates"].view(1, -1))
    targets = probs if mode == "centering" else sinkhorn_knopp(f["teacher_masked_logits_1"], 0.06)
    close(targets, f[f"{mode}_probs"].view_as(targets))
    z = f["student_masked_logits"].clone().requires_grad_()
    loss = ibot_loss(z, targets, f["masks_weight"], images=8)
    loss.backward()
    close(loss, f[f"{mode}_loss_as_in_total"].squeeze())
    close(z.grad, f[f"{mode}_grad_student"])


def two_ranks(rank, port, folder):
    import os

    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    f, out = load("b2_sinkhorn_two_ranks"), {}
    out["cls"] = sinkhorn_knopp(f[f"cls_logits_r{rank}"], 0.05)
    out["patch"] = sinkhorn_knopp(f[f"patch_logits_r{rank}"], 0.05)
    out["empty"] = sinkhorn_knopp(f["patch_logits_r0"] if rank else f["patch_logits_r0"][:0], 0.05)
    for name in ("cls", "patch"):
        centering = Centering(16)
        centering.targets(f[f"{name}_logits_r{rank}"], 0.05)
        centering.update()
        out[f"{name}_center"] = centering.center
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    mp.spawn(two_ranks, (29511 + torch.randint(1000, ()).item(), str(tmp_path)), nprocs=2)
    f, (a, b) = load("b2_sinkhorn_two_ranks"), (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    for rank, out in enumerate((a, b)):
        close(out["cls"], f[f"cls_sk_r{rank}"])
        close(out["patch"], f[f"patch_sk_r{rank}"])
        close(out["cls_center"], f[f"dino_center_r{rank}"])
    # The iBOT centre is ours: every masked patch weighs the same, wherever it is (the authors average the
    # ranks' means).
    mean = torch.cat([f["patch_logits_r0"], f["patch_logits_r1"]]).mean(0, keepdim=True)
    close(a["patch_center"], 0.1 * mean)
    assert torch.equal(a["patch_center"], b["patch_center"])
    close(
        b["empty"], sinkhorn_knopp(f["patch_logits_r0"], 0.05)
    )  # a rank without masked patches takes part all the same


def test_koleo_and_gradient():
    f = load("c_koleo")
    x = f["x"].clone().requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    close(loss, f["loss"])
    close(x.grad, f["grad"])
    close(0.1 * (koleo_loss(f["x"][:6]) + koleo_loss(f["x"][6:])), f["two_crop_weighted"])
    close(koleo_loss(f["x_dup"]), f["loss_dup"])
    close(
        koleo_loss(f["x"], group=6) * 2, koleo_loss(f["x"][:6]) + koleo_loss(f["x"][6:])
    )  # groups never meet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["duplicate", "one", "none", "equal", "zero"])
def test_koleo_stays_finite(case, dtype):
    x = torch.randn(8, 16)
    x = {
        "duplicate": torch.cat([x, x[:1]]),
        "one": x[:1],
        "none": x[:0],
        "equal": x[:1].repeat(8, 1),
        "zero": 0 * x,
    }[case]
    x = x.to(dtype).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(x.grad).all()


def test_koleo_tells_near_neighbours_apart():
    """Nearly equal features: the matrix form of the distance rounds most of them to zero, gradients too."""
    x = (torch.randn(1, 384) + 1e-4 * torch.randn(32, 384)).requires_grad_()
    koleo_loss(x).backward()
    assert (x.grad.norm(dim=1) > 0).all() and koleo_loss(x) < 12


def test_losses_are_fp32_whatever_comes_in():
    z, t = torch.randn(4, 64).half() * 50, torch.softmax(torch.randn(4, 64), -1)
    assert cross_entropy(z, t).dtype == torch.float32 and sinkhorn_knopp(z, 0.01).dtype == torch.float32
    assert Centering(64).targets(z, 0.04).dtype == torch.float32


def test_sinkhorn_survives_huge_logits():
    q = sinkhorn_knopp(torch.randn(16, 8) * 30, 0.04)  # exp(z / tau) would be exp(2000)
    sums = q.sum(1)
    assert torch.isfinite(q).all() and (((sums - 1).abs() < 1e-5) | (sums == 0)).all() and sums.any()
    far = torch.tensor(
        [[0.9, 0.0], [0.0, -0.9]]
    )  # row 2 lies 90 tau below the largest logit, but leads in no column
    close(sinkhorn_knopp(far, 0.02).sum(1), torch.ones(2))


def test_sinkhorn_balances():
    """Rows sum to one at any time, columns come closer to n / K with every iteration."""
    z = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 0.2
    uneven = [(sinkhorn_knopp(z, 0.05, n).sum(0) / 32 - 1).abs().max().item() for n in (1, 3, 10, 100)]
    assert uneven == sorted(uneven, reverse=True) and uneven[-1] < 0.01
    close(sinkhorn_knopp(z, 0.05).sum(1), torch.ones(512))


def test_centre_stays_without_rows_and_in_a_lost_step():
    c = Centering(4)
    c.center += 1
    c.update()
    assert (c.center == 1).all()
    c.targets(torch.full((3, 4), torch.nan), 0.1)
    c.update(lost=torch.ones(()))
    c.update()  # and what was collected is forgotten
    assert (c.center == 1).all()


def test_uniform_student_sits_at_ln_k():
    """The table every user should know: 2 global and 8 local crops, K = 4096, no opinion in the student."""
    K, B = 4096, 3
    targets = torch.softmax(torch.randn(2, B, K), -1)
    local, across = dino_loss(torch.zeros(2, B, K), torch.zeros(8, B, K), targets)
    assert local.item() == pytest.approx(7.394, abs=1e-3) and across.item() == pytest.approx(0.924, abs=1e-3)
    # half of 2B = 6 crops masked, 5 patches each: the term is half of ln K
    ibot = ibot_loss(torch.zeros(15, K), targets.flatten(0, 1)[:1].expand(15, K), torch.full((15,), 0.2), 6)
    assert ibot.item() == pytest.approx(math.log(K) / 2, rel=1e-5)


def test_without_local_crops_it_is_a_plain_mean():
    g, t = torch.randn(2, 3, 8), torch.softmax(torch.randn(2, 3, 8), -1)
    local, across = dino_loss(g, None, t)
    assert local == 0
    close(across, (cross_entropy(g[0], t[1]).mean() + cross_entropy(g[1], t[0]).mean()) / 2)


def test_instruments_and_collapse():
    K, feats = 64, torch.randn(256, 32)
    one_hot = torch.zeros(256, K)
    one_hot[:, 3] = 1
    uniform = torch.full((256, K), 1 / K)
    spread = torch.eye(K).repeat(4, 1)
    for targets, H, Hm, words in (
        (one_hot, 0, 0, "one-hot"),
        (uniform, 1, 1, "uniform"),
        (spread, 0, 1, None),
    ):
        d = collapse_metrics(targets, torch.zeros(256, K), feats)
        assert d["entropy"] == pytest.approx(H, abs=1e-5) and d["entropy_mean"] == pytest.approx(Hm, abs=1e-5)
        assert d["kl"].item() == pytest.approx(math.log(K) * (1 - H), abs=1e-4)
        said = collapse_warning(d["entropy"].item(), d["entropy_mean"].item())
        assert said is None if words is None else words in said
    assert 25 < d["rank"] <= 32
    line = torch.randn(256, 1) * torch.randn(1, 32)
    assert collapse_metrics(uniform, torch.zeros(256, K), line)["rank"] == pytest.approx(1, abs=0.01)
