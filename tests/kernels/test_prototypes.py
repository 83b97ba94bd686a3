"""kernels/prototypes.py must equal losses.py: on the GPU, or in Triton's interpreter.

The second half runs the same checks on mutants, copies of the file with one plausible mistake, which must all
be caught. Their blocks are small, since the interpreter is slow on each; one test uses the real sizes.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import torch.distributed as dist
import torch.multiprocessing as mp
import triton
from conftest import DEVICE

import config
import losses
import train
from kernels import attention, prototypes
from kernels.prototypes import LOG2E, SoftTargets, sinkhorn_targets, soft_cross_entropy
from losses import Centering, cross_entropy, ibot_loss, sinkhorn_knopp
from optim import compute_schedules

SIZES = [(1, 1), (3, 16), (7, 130), (33, 300), (0, 64), (2, 4096), (2, 4097)]
NAN = float("nan")


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setattr(attention, "CHOICE", "triton")


def normal(*shape):
    """The same numbers on every device."""
    return torch.randn(shape).to(DEVICE)


def logits(n, K, dtype=torch.float32, size=1.0, seed=0):
    torch.manual_seed(seed)
    return (size * normal(2, n, K)).to(dtype)


def close(a, b, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("n,K", SIZES)
@pytest.mark.parametrize("size", [0.3, 6.0])
def test_loss_and_gradient(n, K, size):
    """Also where the largest logit comes last, and where exp(z / tau) would be infinite."""
    student, teacher = logits(n, K, size=size)
    potential = normal(K)
    student[:, -1] += 3
    targets = SoftTargets(teacher, potential, 0.05)
    weight = normal(n).abs()
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
    loss = soft_cross_entropy(own, SoftTargets(teacher, normal(50), 0.05)).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(own.detach(), student.grad)
    assert not torch.equal(own.detach(), before)
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


@pytest.mark.parametrize("n,K", [x for x in SIZES if 0 < x[0] * x[1] < 4000] + [(1, 4097)])
@pytest.mark.parametrize("tau", [0.04, 0.07])
def test_sinkhorn(n, K, tau):
    """Cosine-like logits, as a head with unit prototypes gives them, and larger ones, shifted."""
    cosines = torch.tanh(logits(n, K)[0])
    shifted = logits(n, K, size=3)[0] + 50  # fp32 knows 50 / tau to 1e-4, and everything computed from it
    for z, rtol in ((cosines, 1e-4), (shifted, 2e-3)):
        for iterations in (1, 3):
            found = sinkhorn_targets(z, tau, iterations).probabilities()
            close(found, sinkhorn_knopp(z, tau, iterations), rtol=rtol)


def test_through_the_loss():
    """sinkhorn_knopp, Centering and ibot_loss, fused and not: one switch, the same numbers."""
    student, teacher = logits(9, 200)
    weights = normal(9).abs()
    center = Centering(200).to(DEVICE)
    center.targets(logits(4, 200)[0], 0.05)
    center.update()
    for make_targets in (sinkhorn_knopp, center.targets):
        found = []
        grads = []
        for fused in (False, True):
            z = student.clone().requires_grad_()
            loss = ibot_loss(z * 1.0, make_targets(teacher, 0.05, fused=fused), weights, 6)
            loss.backward()
            found.append(loss.detach())
            grads.append(z.grad)
        close(*found)
        close(*grads, rtol=1e-4, atol=1e-7)
    center.update()
    close(center.count + 0.0, 0.0)


def test_bf16(bf16):
    """The bound: one rounding of the gradient to bf16; the loss is computed in fp32 from the same logits."""
    student, teacher = logits(5, 300, torch.bfloat16)
    targets = SoftTargets(teacher, normal(300), 0.05)
    own = student.clone().requires_grad_()
    plain = student.float().requires_grad_()
    expected = cross_entropy(plain, targets.probabilities())
    expected.sum().backward()
    found = soft_cross_entropy(own * 1.0, targets)
    found.sum().backward()
    close(found, expected)
    close(own.grad.float(), plain.grad, rtol=2**-8, atol=1e-6)
    close(sinkhorn_targets(teacher, 0.05).probabilities(), sinkhorn_knopp(teacher, 0.05), rtol=1e-4)


def far_below_zero():
    """A rank without rows must not report 0 as its largest logit: exp((z - 0) / tau) would be 0."""
    return logits(10, 70)[0] - 20


def two_ranks(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    whole = far_below_zero()
    part = whole[7:] if rank else whole[:7]
    all_or_none = whole if rank else whole[:0]  # a rank without rows
    sizes = []
    plain = dist.all_reduce

    def counting_all_reduce(tensor, *rest):
        sizes.append(tensor.numel())
        return plain(tensor, *rest)

    dist.all_reduce = counting_all_reduce
    shared = sinkhorn_targets(part, 0.05).probabilities()
    assert sizes == [70] * 4, "one maximum and three sums of K numbers"
    alone = sinkhorn_targets(all_or_none, 0.05).probabilities()
    torch.save((shared, alone), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path, kernels):
    mp.spawn(two_ranks, (29511 + torch.randint(1000, ()).item(), str(tmp_path)), nprocs=2)
    first, _ = torch.load(tmp_path / "0.pt")
    second, alone = torch.load(tmp_path / "1.pt")
    whole = sinkhorn_knopp(far_below_zero(), 0.05)
    close(torch.cat([first, second]), whole, rtol=1e-3)
    close(alone, whole, rtol=1e-3)


@pytest.mark.parametrize("centering, local_crops", [("centering", 0), ("sinkhorn_knopp", 1)])
def test_a_whole_step_is_the_same(centering, local_crops, monkeypatch, one_thread):
    """train_step with the kernels (attention and prototypes) and without: same losses, same gradients."""
    dtype = "fp32" if DEVICE == "cpu" else "auto"  # the interpreter cuts off what bf16 would round
    cfg = config.load(model="debug", overrides=[
        f"compute_precision.dtype={dtype}",
        f"train.centering={centering}", f"crops.local_crops_number={local_crops}", "speed.compile=off",
        "crops.global_crops_size=16", "crops.local_crops_size=8", "train.batch_size_per_gpu=1",
        "train.dataset_path=scenes:50", "ibot.separate_head=true", "ibot.mask_sample_probability=1",
        "ibot.mask_ratio_min_max=[0.5, 0.5]"])  # fmt: skip
    found = []
    for choice in ("pytorch", "triton"):
        monkeypatch.setattr(attention, "CHOICE", choice)
        torch.manual_seed(0)
        t = train.TrainState(cfg, DEVICE)
        batch = next(train.make_loader(cfg, train.open_dataset(cfg.train.dataset_path, cfg.data), DEVICE))
        found.append(train.train_step(t, [batch], compute_schedules(cfg, 100, 1), cfg))
    plain, ours = found
    assert plain["loss_ibot"] > 0 and plain["loss_dino_global"] > 0
    rtol, atol = (1e-4, 1e-6) if t.dtype == torch.float32 else (0.03, 0.03)  # a GPU computes in 16 bit
    for name in plain:
        close(ours[name], plain[name], rtol=rtol, atol=atol)


def test_shapes_that_do_not_fit():
    """Each of them would be read, or written, in the wrong place."""
    student, teacher = logits(3, 50)
    potential = normal(50)
    for s, t, u, complaint in (
        (student.t(), teacher.t(), potential[:3], "student.*contiguous rows"),
        (student, teacher.t().contiguous().t(), potential, "teacher.*contiguous rows"),
        (student[None], teacher[None], potential, r"not \(n, K\)"),
        (student, teacher[:2], potential, r"not \(n, K\)"),
        (student, teacher, potential[:49], r"potential \(49,\): not"),
        (student[:1].expand(3, 50), teacher, potential, "rows .* overlap"),
    ):
        with pytest.raises(ValueError, match=complaint):
            soft_cross_entropy(s, SoftTargets(t, u, 0.05))
    with pytest.raises(ValueError, match="teacher.*contiguous rows"):
        sinkhorn_targets(teacher.t(), 0.05)
    assert losses.SoftTargets is prototypes.SoftTargets


# ---------------------------------------------------------------- checks that catch any mistake
# `module` is kernels/prototypes.py, or a mutant of it. Everything is compared with float64, in memory that is
# full of NaN around the rows, and with different strides for student and teacher.


def guarded(x, extra):
    """-> memory of NaN, and in it a copy of x (n, K) whose rows are `extra` numbers apart."""
    around = torch.full((len(x) + 2, x.shape[1] + extra), NAN, device=DEVICE)
    inside = around[1:-1, : x.shape[1]]
    inside.copy_(x)
    return around, inside


def nothing_outside(around, inside):
    assert inside.isfinite().all(), "not finite"
    assert around.isnan().sum() == around.numel() - inside.numel(), "written outside"


def hills(n, K, block, step):
    """Rows whose largest number grows by `step` from block to block, and rows where it falls.

    All far below 0, which is what a lane beyond K holds, and so far that 2^z is 0.
    """
    slope = step * (torch.arange(K, device=DEVICE) // block)
    rising = torch.arange(n, device=DEVICE)[:, None] % 2 == 0
    return normal(n, K) - 16 + torch.where(rising, slope, -slope)


def check_loss(module, student, teacher, tau=0.05, temp=0.125):
    potential = normal(student.shape[1])
    weights = torch.stack([normal(len(student)).abs(), student.new_full((len(student),), NAN)], 1)[:, 0]
    z = student.double().requires_grad_()
    p = (teacher.double() / tau + potential).softmax(-1)
    expected = -(p * (z / temp).log_softmax(-1)).sum(-1)
    (expected_grad,) = torch.autograd.grad(expected, z, weights.double())
    student.requires_grad_()
    found = module.soft_cross_entropy(student, SoftTargets(teacher, potential, tau), temp)
    (grad,) = torch.autograd.grad(found, student, weights.to(found.dtype))
    # Numbers of 26 / 0.05 to base 2 are known to 5e-5, p to as much of itself, and weight / temp is up to 20.
    close(found.double(), expected.detach(), rtol=1e-4, atol=1e-3)
    close(grad.double(), expected_grad, rtol=1e-3, atol=2e-3)


def check_sums(module, t, tau=0.05):
    """`reduce_columns` and `normalize_rows`, with a realistic u: each column's largest number is about 0."""
    n, K = t.shape
    scale = LOG2E / tau
    stride = t.stride(0)
    x = t.double() * scale
    u = (normal(K) - x.amax(0)).float()
    v = normal(n)
    for largest in (True, False):
        around, out = guarded(torch.zeros(1, K), 300)
        grid = (triton.cdiv(K, module.BK),)
        constants = dict(LARGEST=largest, BN=module.BN, BK=module.BK)
        module.reduce_columns[grid](t, u, v, out, n, K, stride, scale, **constants)
        expected = x.amax(0) if largest else torch.exp2(x + u + v[:, None]).sum(0)
        close(out[0].double(), expected, rtol=1e-3, atol=1e-6)
        nothing_outside(around, out)
    around, out = guarded(torch.zeros(1, n), 300)
    module.normalize_rows[(n,)](t, u, out, K, stride, scale, BLOCK=module.BLOCK)
    close(out[0].double(), -torch.exp2(x + u).sum(1).log2(), rtol=1e-4, atol=1e-3)
    nothing_outside(around, out)


def check_sinkhorn(module, t, tau=0.07):
    for iterations in (1, 3):
        log_probs = t.double() / tau
        for _ in range(iterations):
            log_probs = log_probs.log_softmax(0).log_softmax(1)
        found = module.sinkhorn_targets(t, tau, iterations).probabilities()
        close(found.double(), log_probs.exp(), rtol=1e-3, atol=1e-6)


def check(module, n=5, K=40):
    """No mistake survives this. The last of the three blocks holds BLOCK // 2 numbers or fewer."""
    torch.manual_seed(0)
    for step in (0.1, 5.0):
        around, student = guarded(hills(n, K, module.BLOCK, step), 3)
        beside, teacher = guarded(hills(n, K, module.BLOCK, step), 8)
        check_loss(module, student, teacher)
        nothing_outside(around, student)
        nothing_outside(beside, teacher)
        check_sums(module, teacher)
    for shift in (-20, 20):
        check_sinkhorn(module, guarded(normal(n, K) + shift, 8)[1])


def check_far(module, n=3, K=8):
    """The third row starts 2.2e9 numbers into the tensor, as row 16,480 does with 131,072 prototypes.

    32 bits would wrap that to as many *before* its start, which is our memory too. Without a GPU, only a few
    pages of the 8.6 GB are ever touched.
    """
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 10e9:
        pytest.skip("needs 9 GB of free memory on the GPU")
    torch.manual_seed(0)
    stride = 1_080_000_000
    memory = torch.empty(2**31 + 2 * stride + 4 * K, dtype=torch.float16, device=DEVICE)
    student, teacher = (memory.as_strided((n, K), (stride, 1), 2**31 + j * 2 * K) for j in range(2))
    student.copy_(normal(n, K))
    teacher.copy_(normal(n, K))
    check_loss(module, student, teacher)
    check_sums(module, teacher)
    check_sinkhorn(module, teacher)


@pytest.fixture
def small_blocks(monkeypatch):
    for name, size in SMALL.items():
        monkeypatch.setattr(prototypes, name, size)


SMALL = dict(BLOCK=16, BN=2, BK=16)


def test_small_blocks(small_blocks):
    check(prototypes)


def test_three_blocks():
    """Of the real size, and a logit that grows from block to block."""
    n, K = 2, 2 * prototypes.BLOCK + 5
    torch.manual_seed(0)
    student, teacher = (hills(n, K, prototypes.BLOCK, 0.1) for _ in range(2))
    check_loss(prototypes, student, teacher)
    check_sums(prototypes, teacher)


def test_beyond_two_to_the_31(small_blocks):
    check_far(prototypes)


BLOCKS = "range(0, K, BLOCK)"
FIRST_BLOCK = "range(0, BLOCK, BLOCK)"
WHOLE_BLOCKS = "range(0, K // BLOCK * BLOCK, BLOCK)"
ROW = "tl.program_id(0).to(tl.int64)"
SHORT_ROW = "tl.program_id(0)"
MUTANTS = {  # a plausible mistake: (where, as it is, as it would be)
    "sum not rescaled": ("running_sum", "old_sum * shrink", "old_sum"),
    "maximum of this block only": ("running_sum", "tl.maximum(old_max, tl.max(x, 0))", "tl.max(x, 0)"),
    "rescaled the wrong way": ("running_sum", "tl.exp2(old_max - new_max)", "tl.exp2(new_max - old_max)"),
    "dot not rescaled": ("ce_forward", "dot * shrink", "dot"),
    "dot not divided": ("ce_forward", "dot / teacher_sum", "dot"),
    "dot multiplied with -inf": ("ce_forward", "dot * shrink + tl.sum(powers * s, 0)",
                                 "dot * shrink + tl.sum(powers * masked, 0)"),
    "maximum starts at 0": ("ce_forward", "student_max = -1e30\n    teacher_max = -1e30",
                            "student_max = 0.0\n    teacher_max = 0.0"),
    "loss: first block only": ("ce_forward", BLOCKS, FIRST_BLOCK),
    "loss: without the last block": ("ce_forward", BLOCKS, WHOLE_BLOCKS),
    "loss: 32-bit rows": ("ce_forward", ROW, SHORT_ROW),
    "loss: teacher by the student's stride": ("ce_forward", "row * stride_teacher", "row * stride_student"),
    "loss: student by the teacher's stride": ("ce_forward", "row * stride_student", "row * stride_teacher"),
    "loss: without the potential": ("ce_forward", "t + tl.load(potential_ptr + k, mask=k < K, other=0.0)",
                                    "t"),
    "loss: student with tau": ("ce_forward", "K, scale_student)", "K, scale_teacher)"),
    "loss: teacher with temp": ("ce_forward", "K, scale_teacher)", "K, scale_student)"),
    "loss: student beyond K": ("ce_forward", 'tl.where(k < K, s, float("-inf"))', "s"),
    "loss: teacher beyond K": ("ce_forward", 'other=0.0), float("-inf"))', "other=0.0), 0.0)"),
    "loss to base 2": ("ce_forward", " * 0.6931471805599453", ""),
    "lse to base e, student": ("ce_forward", "tl.log2(student_sum)", "tl.log(student_sum)"),
    "lse to base e, teacher": ("ce_forward", "tl.log2(teacher_sum)", "tl.log(teacher_sum)"),
    "lse of the teacher without its maximum": ("ce_forward", "teacher_max + tl.log2", "tl.log2"),
    "gradient: 32-bit rows": ("ce_backward", ROW, SHORT_ROW),
    "gradient: first block only": ("ce_backward", "tl.program_id(1) * BLOCK + ", ""),
    "gradient: teacher by the student's stride": ("ce_backward", "row * stride_teacher",
                                                  "row * stride_student"),
    "gradient: written by the teacher's stride": ("ce_backward", "store(student_ptr + row * stride_student",
                                                  "store(student_ptr + row * stride_teacher"),
    "gradient: without the potential": ("ce_backward", "t += ", "_ = "),
    "gradient: student with tau": ("ce_backward", "K, scale_student)", "K, scale_teacher)"),
    "gradient: teacher with temp": ("ce_backward", "K, scale_teacher)", "K, scale_student)"),
    "gradient: not divided by temp": ("ce_backward", "+ row) / temp", "+ row)"),
    "gradient: of the first row": ("ce_backward", "gradient_ptr + row", "gradient_ptr"),
    "gradient: not weighted": ("ce_backward", " * tl.load(gradient_ptr + row)", ""),
    "gradient: lse of the student twice": ("ce_backward", "teacher_lse_ptr + row", "student_lse_ptr + row"),
    "gradient: written beyond K": ("ce_backward", ".element_ty), mask=k < K)", ".element_ty))"),
    "gradient: an expanded one as if it were not": ("SoftCrossEntropy", "gradient.contiguous()", "gradient"),
    "temp and tau swapped": ("SoftCrossEntropy", "LOG2E / temp, LOG2E / tau", "LOG2E / tau, LOG2E / temp"),
    "potential to base e": ("SoftCrossEntropy", "potential * LOG2E", "potential * 1.0"),
    "gradient: grid without the last block": ("SoftCrossEntropy", "triton.cdiv(K, BLOCK)", "K // BLOCK"),
    "columns: first rows only": ("reduce_columns", "range(0, n, BN)", "range(0, BN, BN)"),
    "columns: without the last rows": ("reduce_columns", "range(0, n, BN)", "range(0, n // BN * BN, BN)"),
    "columns: 32-bit rows": ("reduce_columns", "rows.to(tl.int64)", "rows"),
    "columns: largest ignored": ("reduce_columns", "if LARGEST:", "if False:"),
    "columns: largest of the last rows": ("reduce_columns", "tl.maximum(total, tl", "tl.minimum(3e38, tl"),
    "columns: largest beyond n": ("reduce_columns", 'tl.where(inside, t, float("-inf"))', "t"),
    "columns: sum beyond n": ("reduce_columns", "tl.where(inside, tl.exp2(t), 0.0)", "tl.exp2(t)"),
    "columns: without u": ("reduce_columns", "t + u[None, :]", "t"),
    "columns: without v": ("reduce_columns", " + tl.load(v_ptr + rows, mask=rows < n, other=0.0)[:, None]",
                           ""),
    "columns: without tau": ("reduce_columns", ".to(tl.float32) * scale", ".to(tl.float32)"),
    "columns: written beyond K": ("reduce_columns", "total, mask=k < K)", "total)"),
    "rows: first block only": ("normalize_rows", BLOCKS, FIRST_BLOCK),
    "rows: without the last block": ("normalize_rows", BLOCKS, WHOLE_BLOCKS),
    "rows: 32-bit rows": ("normalize_rows", ROW, SHORT_ROW),
    "rows: without u": ("normalize_rows", "t + tl.load(u_ptr + k, mask=k < K, other=0.0)", "t"),
    "rows: beyond K": ("normalize_rows", 'other=0.0), float("-inf"))', "other=0.0), 0.0)"),
    "rows: the wrong sign": ("normalize_rows", "-(row_max + tl.log2(row_sum))", "row_max + tl.log2(row_sum)"),
    "rows: to base e": ("normalize_rows", "tl.log2(row_sum)", "tl.log(row_sum)"),
    "sinkhorn: without the maximum": ("sinkhorn_targets", "u = -over_all_rows(", "over_all_rows("),
    "sinkhorn: u not subtracted from": ("sinkhorn_targets", "u = u - torch.log2", "u = -torch.log2"),
    "sinkhorn: one turn of the rows missing": ("sinkhorn_targets", "iteration < iterations - 1",
                                               "iteration < iterations - 2"),
    "sinkhorn: potential to base 2": ("sinkhorn_targets", "u / LOG2E", "u"),
    "sinkhorn: grid without the last block": ("over_all_rows", "triton.cdiv(K, BK)", "K // BK"),
    "sinkhorn: rows as if they were packed": ("sinkhorn_targets", "v, K, stride", "v, K, K"),
}  # fmt: skip


def mutant(name, folder):
    """A module: kernels/prototypes.py with one mistake, and small blocks."""
    where, right, wrong = MUTANTS[name]
    source = Path(prototypes.__file__).read_text()
    part = re.search(rf"^(def|class) {where}\(.*?(\n\n\n|\Z)", source, re.M | re.S)[0]
    assert part.count(right) == 1, f"{where} has no, or more than one, {right}"
    path = folder / "mutant.py"
    path.write_text(source.replace(part, part.replace(right, wrong)))
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(SMALL)
    return module


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, tmp_path):
    module = mutant(name, tmp_path)
    with pytest.raises(AssertionError):
        check(module)
        check_far(module)
