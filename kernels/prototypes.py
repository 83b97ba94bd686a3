"""The loss of masked patches over 65,536 to 131,072 prototypes, without ever writing a probability.

The idea. The target of a patch is p = softmax(t / tau + u), with t the teacher's logits and u one number for
each prototype, its *potential*. The loss needs p only inside sums over prototypes:

    loss = -sum_k p_k log softmax(s)_k = log sum_k exp(s_k) - sum_k exp(t_k + u_k) s_k / sum_k exp(t_k + u_k)

So one pass over both rows of logits, with a running maximum as in flash attention, gives the loss. A second
pass writes the gradient softmax(s) - p over the student's logits, which nobody needs any more. Plain PyTorch
writes p, log softmax(s), their product and the gradients of all three, in fp32.

Centering and Sinkhorn-Knopp share one kernel; only their potentials differ.
    centering         u = -centre / tau
    Sinkhorn-Knopp    Q_ik = exp(t_ik / tau + u_k + v_i): dividing columns by their sums changes u, dividing
                      rows changes v. Q (5,000 x 131,072 in fp32: 2.6 GB) is never written, and since adding a
                      constant to a whole row does not change its softmax, v is not needed at the end.

losses.py is the specification, and what runs on a CPU; `fused` chooses. No atomics: the same bits every time.
"""

from functools import partial
from typing import NamedTuple

import torch

from distributed import all_reduce
from kernels.attention import backend, jit, tl, triton

LOG2E = 1.4426950408889634
BLOCK = 4096  # prototypes that the kernels along a row read at a time
WARPS = 8  # of those kernels
BN, BK = 32, 128  # rows and prototypes that the kernel along columns reads at a time


class SoftTargets(NamedTuple):
    """Probabilities before they are written: p = softmax(logits / tau + potential), row by row."""

    logits: torch.Tensor  # (n, K) of the teacher, any floating type
    potential: torch.Tensor  # (K,) fp32
    tau: float

    def probabilities(self):
        """-> p (n, K), fp32: the specification."""
        return (self.logits.float() / self.tau + self.potential).softmax(-1)


def uses_kernels(logits):
    """Whether the kernels below run: the same switch and the same reasons as for attention."""
    dtype = torch.bfloat16 if logits.dtype == torch.float32 else logits.dtype  # fp32 logits are welcome here
    chosen, _ = backend(logits.device, dtype, 64)
    return chosen == "triton"


# ---------------------------------------------------------------- the kernels
# A row of logits is read BLOCK prototypes at a time; a lane beyond K counts as -inf, that is as exp(..) = 0.
# Everything is to base 2: a scale is log2(e) / temperature, and potentials (u, v) come times log2(e).


@jit
def load_logits(row_ptr, k, K, scale):
    """Logits k of a row, fp32, times scale; 0 beyond K."""
    return tl.load(row_ptr + k, mask=k < K, other=0.0).to(tl.float32) * scale


@jit
def running_sum(x, old_max, old_sum):
    """A block x joins a running sum of 2^x -> new maximum, new sum, 2^(x - new_max), 2^(old_max - new_max).

    Sums are kept divided by 2^maximum, so that nothing overflows.
    """
    new_max = tl.maximum(old_max, tl.max(x, 0))
    powers = tl.exp2(x - new_max)
    shrink = tl.exp2(old_max - new_max)
    return new_max, old_sum * shrink + tl.sum(powers, 0), powers, shrink


@jit
def ce_forward(student_ptr, teacher_ptr, potential_ptr, loss_ptr, student_lse_ptr, teacher_lse_ptr, K,
               stride_student, stride_teacher, scale_student, scale_teacher,
               BLOCK: tl.constexpr):  # fmt: skip
    """One row: loss = ln 2 (lse of s - sum(2^(t - lse of t) s)), in one pass over both rows of logits."""
    row = tl.program_id(0).to(tl.int64)
    student_max = -1e30
    teacher_max = -1e30
    student_sum = 0.0
    teacher_sum = 0.0
    dot = 0.0
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        s = load_logits(student_ptr + row * stride_student, k, K, scale_student)
        t = load_logits(teacher_ptr + row * stride_teacher, k, K, scale_teacher)
        t = tl.where(k < K, t + tl.load(potential_ptr + k, mask=k < K, other=0.0), float("-inf"))
        masked = tl.where(k < K, s, float("-inf"))
        student_max, student_sum, _, _ = running_sum(masked, student_max, student_sum)
        teacher_max, teacher_sum, powers, shrink = running_sum(t, teacher_max, teacher_sum)
        dot = dot * shrink + tl.sum(powers * s, 0)  # s is 0, not -inf, beyond K: 0 * inf would be NaN
    student_lse = student_max + tl.log2(student_sum)
    tl.store(student_lse_ptr + row, student_lse)
    tl.store(teacher_lse_ptr + row, teacher_max + tl.log2(teacher_sum))
    tl.store(loss_ptr + row, (student_lse - dot / teacher_sum) * 0.6931471805599453)  # ln 2


@jit
def ce_backward(student_ptr, teacher_ptr, potential_ptr, gradient_ptr, student_lse_ptr, teacher_lse_ptr, K,
                stride_student, stride_teacher, scale_student, scale_teacher, temp,
                BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK numbers of a row: student <- gradient (softmax(student) - p) / temp."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = load_logits(student_ptr + row * stride_student, k, K, scale_student)
    t = load_logits(teacher_ptr + row * stride_teacher, k, K, scale_teacher)
    t += tl.load(potential_ptr + k, mask=k < K, other=0.0)
    softmax = tl.exp2(s - tl.load(student_lse_ptr + row))
    p = tl.exp2(t - tl.load(teacher_lse_ptr + row))
    grad = (softmax - p) * tl.load(gradient_ptr + row) / temp
    tl.store(student_ptr + row * stride_student + k, grad.to(student_ptr.dtype.element_ty), mask=k < K)


# n changes with the masks: specialized, the kernel would be compiled again for 1 and for multiples of 16.
@partial(jit, do_not_specialize=["n"])
def reduce_columns(logits_ptr, u_ptr, v_ptr, result_ptr, n, K, stride, scale, LARGEST: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """BK prototypes, all rows: sum_i 2^(t_ik + u_k + v_i), or with LARGEST max_i t_ik. Sums are fp32."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.full([BK], float("-inf") if LARGEST else 0.0, tl.float32)
    u = tl.load(u_ptr + k, mask=k < K, other=0.0)
    for start in range(0, n, BN):
        rows = start + tl.arange(0, BN)
        inside = (rows < n)[:, None] & (k < K)[None, :]
        where = logits_ptr + rows.to(tl.int64)[:, None] * stride + k[None, :]
        t = tl.load(where, mask=inside, other=0.0).to(tl.float32) * scale
        if LARGEST:
            total = tl.maximum(total, tl.max(tl.where(inside, t, float("-inf")), 0))
        else:
            t = t + u[None, :] + tl.load(v_ptr + rows, mask=rows < n, other=0.0)[:, None]
            total += tl.sum(tl.where(inside, tl.exp2(t), 0.0), 0)
    tl.store(result_ptr + k, total, mask=k < K)


@jit
def normalize_rows(logits_ptr, u_ptr, v_ptr, K, stride, scale, BLOCK: tl.constexpr):
    """One row: v_i = -log2 sum_k 2^(t_ik + u_k), with which the row of Q sums to 1."""
    row = tl.program_id(0).to(tl.int64)
    row_max = -1e30
    row_sum = 0.0
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        t = load_logits(logits_ptr + row * stride, k, K, scale)
        t = tl.where(k < K, t + tl.load(u_ptr + k, mask=k < K, other=0.0), float("-inf"))
        row_max, row_sum, _, _ = running_sum(t, row_max, row_sum)
    tl.store(v_ptr + row, -(row_max + tl.log2(row_sum)))


# ---------------------------------------------------------------- the loss


class SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, potential, tau, temp):
        n, K = student.shape
        loss = student.new_empty(n, dtype=torch.float32)
        student_lse = torch.empty_like(loss)
        teacher_lse = torch.empty_like(loss)
        u = potential * LOG2E
        ctx.scalars = (K, student.stride(0), teacher.stride(0), LOG2E / temp, LOG2E / tau)
        if n:
            ce_forward[(n,)](student, teacher, u, loss, student_lse, teacher_lse, *ctx.scalars, BLOCK=BLOCK,
                             num_warps=WARPS)  # fmt: skip
        ctx.save_for_backward(student, teacher, u, student_lse, teacher_lse)
        ctx.temp = temp
        ctx.overwritten = False  # the student's logits, by their gradient
        return loss

    @staticmethod
    def backward(ctx, gradient):
        if ctx.overwritten:
            raise RuntimeError("the gradient has been written over the student's logits: no second backward")
        ctx.overwritten = True
        student, teacher, u, student_lse, teacher_lse = ctx.saved_tensors
        n, K = student.shape
        if n:
            grid = (n, triton.cdiv(K, BLOCK))
            ce_backward[grid](student, teacher, u, gradient.contiguous(), student_lse, teacher_lse,
                              *ctx.scalars, ctx.temp, BLOCK=BLOCK, num_warps=WARPS)  # fmt: skip
        return student, None, None, None, None


def soft_cross_entropy(student, targets, temp=0.1):
    """-sum_k p_k log softmax(z / temp)_k of each row, like losses.cross_entropy.

    student: logits z (n, K), any floating type, contiguous rows; targets: SoftTargets -> loss (n,), fp32.
    ValueError for shapes and strides that do not fit. The backward pass runs once: it overwrites `student`.
    """
    logits, potential, tau = targets
    shape = tuple(student.shape)
    if shape != logits.shape or shape[1:] != potential.shape:
        shapes = f"student {shape}, teacher {tuple(logits.shape)}, potential {tuple(potential.shape)}"
        raise ValueError(f"{shapes}: not (n, K), (n, K) and (K,)")
    check_contiguous_rows(student, "student")
    check_contiguous_rows(logits, "teacher")
    n, K = shape
    if n > 1 and student.stride(0) < K:
        raise ValueError("rows of the student's logits overlap, and each must hold its own gradient")
    return SoftCrossEntropy.apply(student, logits, potential, tau, temp)


def check_contiguous_rows(logits, whose):
    """ValueError unless the numbers of a row are adjacent in memory, where the kernels expect them."""
    if logits.ndim != 2 or logits.stride(1) != 1:
        layout = f"{tuple(logits.shape)} with strides {logits.stride()}"
        raise ValueError(f"logits of the {whose}, {layout}: not (n, K) with contiguous rows")


# ---------------------------------------------------------------- Sinkhorn-Knopp


def over_all_rows(logits, u, v, scale, largest):
    """reduce_columns over the rows of every rank -> (K,): maxima if `largest`, else sums."""
    n, K = logits.shape
    result = torch.full_like(u, float("-inf") if largest else 0.0)  # the contribution of a rank without rows
    if n:
        grid = (triton.cdiv(K, BK),)
        stride = logits.stride(0)
        reduce_columns[grid](logits, u, v, result, n, K, stride, scale, LARGEST=largest, BN=BN, BK=BK,
                             num_warps=4)  # fmt: skip
    return all_reduce(result, "max" if largest else "sum")


@torch.no_grad()
def sinkhorn_targets(logits, tau, iterations=3):
    """The targets of losses.sinkhorn_knopp, unwritten: logits (n, K) -> SoftTargets.

    n may differ between ranks. Reads the logits 2 * iterations times, and all-reduces one maximum and
    `iterations` sums of K numbers. ValueError if rows are not contiguous.
    """
    check_contiguous_rows(logits, "teacher")
    n, K = logits.shape
    scale = LOG2E / tau
    u = torch.zeros(K, device=logits.device)
    v = torch.zeros(n, device=logits.device)
    # Start from the maxima: only the exponent of a prototype's own largest logit is surely representable.
    u = -over_all_rows(logits, u, v, scale, largest=True)
    for iteration in range(iterations):
        u = u - torch.log2(over_all_rows(logits, u, v, scale, largest=False))
        if n and iteration < iterations - 1:  # the last division of the rows is the softmax of the loss
            stride = logits.stride(0)
            normalize_rows[(n,)](logits, u, v, K, stride, scale, BLOCK=BLOCK, num_warps=WARPS)
    return SoftTargets(logits, u / LOG2E, tau)
