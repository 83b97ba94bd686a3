"""kernels/prototypes.py in Triton's interpreter, against losses.py, which it must equal."""

import pytest
import torch

pytest.importorskip("triton")
import torch.distributed as dist
import torch.multiprocessing as mp

import config
import losses
import train
from kernels import attention, prototypes
from kernels.prototypes import SoftTargets, sinkhorn_targets, soft_cross_entropy
from losses import Centering, cross_entropy, ibot_loss, sinkhorn_knopp
from optim import schedule

SIZES = [(1, 1), (3, 16), (7, 130), (5, 4096), (4, 4097), (33, 300), (0, 64)]


def logits(n, K, dtype=torch.float32, size=1.0, seed=0):
    torch.manual_seed(seed)
    return (size * torch.randn(2, n, K)).to(dtype)


def close(a, b, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("n,K", SIZES)
@pytest.mark.parametrize("size", [0.3, 6.0])
def test_loss_and_gradient(n, K, size):
    """Also where the largest logit comes last, first, and where exp(z / tau) would be infinite."""
    (student, teacher), potential = logits(n, K, size=size), torch.randn(K)
    student[:, -1] += 3
    targets, weight = SoftTargets(teacher, potential, 0.05), torch.rand(n)
    plain = student.clone().requires_grad_()
    expected = cross_entropy(plain, targets.probabilities())
    (expected * weight).sum().backward()
    ours = student.clone().requires_grad_()
    found = soft_cross_entropy(ours * 1.0, targets)
    (found * weight).sum().backward()
    # Logits of 6 / 0.05 = 120 are themselves known to 120 eps only.
    close(found, expected, rtol=1e-5 if size < 1 else 5e-5, atol=1e-5)
    close(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)
    twice = soft_cross_entropy(student * 1.0, targets)
    assert torch.equal(found, twice)


def test_gradient_is_written_over_the_logits_once():
    student, teacher = logits(3, 50)
    own = student.requires_grad_() * 1.0
    before = own.detach().clone()
    loss = soft_cross_entropy(own, SoftTargets(teacher, torch.zeros(50), 0.05)).sum()
    loss.backward(retain_graph=True)
    assert (
        own.data_ptr() and torch.equal(own.detach(), student.grad) and not torch.equal(own.detach(), before)
    )
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


@pytest.mark.parametrize("n,K", [x for x in SIZES if x[0]])
@pytest.mark.parametrize("tau", [0.04, 0.07])
def test_sinkhorn(n, K, tau):
    """Cosine-like logits, as a head with unit prototypes gives them, and larger ones, shifted."""
    for z, rtol in (torch.tanh(logits(n, K)[0]), 1e-4), (logits(n, K, size=3)[0] + 50, 2e-3):
        for iterations in (1, 3):  # 50 / tau is known to 1e-4, and so is what comes of it
            found = sinkhorn_targets(z, tau, iterations).probabilities()
            close(found, sinkhorn_knopp(z, tau, iterations), rtol=rtol)


def test_through_the_loss(monkeypatch):
    """sinkhorn_knopp, Centering and ibot_loss, lazy and not: one switch, the same numbers."""
    (student, teacher), weights = logits(9, 200), torch.rand(9)
    center = Centering(200)
    center.targets(logits(4, 200)[0], 0.05)
    center.update()
    for make in (
        lambda lazy: sinkhorn_knopp(teacher, 0.05, lazy=lazy),
        lambda lazy: center.targets(teacher, 0.05, lazy),
    ):
        results = []
        for lazy in (False, True):
            z = student.clone().requires_grad_()
            loss = ibot_loss(z * 1.0, make(lazy), weights, 6)
            loss.backward()
            results.append((loss.detach(), z.grad))
        close(*(r[0] for r in results))
        close(*(r[1] for r in results), atol=1e-7)
    center.update()
    close(center.count + 0.0, 0.0)


def test_bf16(bf16):
    """The bound: one rounding of the gradient to bf16; the loss is computed in fp32 from the same logits."""
    student, teacher = logits(5, 300, torch.bfloat16)
    potential, own = torch.randn(300), student.clone().requires_grad_()
    expected = cross_entropy(student.float(), SoftTargets(teacher, potential, 0.05).probabilities())
    plain = student.float().requires_grad_()
    cross_entropy(plain, SoftTargets(teacher, potential, 0.05).probabilities()).sum().backward()
    found = soft_cross_entropy(own * 1.0, SoftTargets(teacher, potential, 0.05))
    found.sum().backward()
    close(found, expected)
    close(own.grad.float(), plain.grad, rtol=2**-8, atol=1e-6)
    close(sinkhorn_targets(teacher, 0.05).probabilities(), sinkhorn_knopp(teacher, 0.05), rtol=1e-4)


def two_ranks(rank, port, folder):
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    whole = logits(10, 70)[0]
    parts = whole[:7], whole[7:]
    calls, plain = [], dist.all_reduce
    dist.all_reduce = lambda x, *rest: (calls.append(x.numel()), plain(x, *rest))
    out = [sinkhorn_targets(parts[rank], 0.05).probabilities()]
    assert calls == [70] * 4, "one maximum and three sums of K numbers"
    out.append(sinkhorn_targets(whole if rank else whole[:0], 0.05).probabilities())  # a rank without rows
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    mp.spawn(two_ranks, (29511 + torch.randint(1000, ()).item(), str(tmp_path)), nprocs=2)
    (a, _), (b, alone) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    whole = sinkhorn_knopp(logits(10, 70)[0], 0.05)
    close(torch.cat([a, b]), whole, rtol=1e-4)
    close(alone, whole, rtol=1e-4)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_whole_step_is_the_same(centering, monkeypatch):
    """train_step with the kernels (attention and prototypes) and without: same losses, same gradients."""
    size = ["crops.global_crops_size=16", "crops.local_crops_size=8", "train.batch_size_per_gpu=2"]
    size += ["train.dataset_path=scenes:50", f"train.centering={centering}", "ibot.separate_head=true"]
    cfg, norms = config.load(model="debug", overrides=size), []
    for choice in ("pytorch", "triton"):
        monkeypatch.setattr(attention, "CHOICE", choice)
        torch.manual_seed(0)
        t = train.Trainee(cfg)
        loader = train.make_loader(cfg, train.open_source(cfg.train.dataset_path), "cpu")
        spent = [train.train_step(t, [next(loader)], schedule(cfg, 100, 1), cfg) for _ in range(2)]
        norms.append({k: torch.stack([s[k] for s in spent]) for k in spent[0]})
    assert set(norms[0]) >= {"loss_ibot", "loss_dino_global"} and norms[0]["loss_ibot"].min() > 0
    for k in norms[0]:
        close(norms[1][k], norms[0][k], rtol=1e-4, atol=1e-6)


def test_shapes_that_do_not_fit():
    student, teacher = logits(3, 50)
    with pytest.raises(ValueError, match="contiguous rows"):
        soft_cross_entropy(student.t(), SoftTargets(teacher.t(), torch.zeros(3), 0.05))
    assert losses.SoftTargets is prototypes.SoftTargets


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setattr(attention, "CHOICE", "triton")
