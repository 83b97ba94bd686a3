"""The loss of masked patches over 65,536 to 131,072 prototypes, without ever writing a probability.

The idea. The target of a patch is p = softmax(t / tau + u), with t the teacher's logits and one number u per
prototype, its *potential*; and the loss needs p only inside sums over prototypes:

    loss = -sum_k p_k log softmax(s)_k = log sum_k exp(s_k) - sum_k exp(t_k + u_k) s_k / sum_k exp(t_k + u_k)

so one pass over both rows of logits, with a running maximum as in flash attention, gives the loss, and a
second one writes the gradient softmax(s) - p over the student's logits, which nobody needs any more. Plain
PyTorch writes p, log softmax(s), their product and the gradients of all three, in fp32.

What is unusual here: centering and Sinkhorn-Knopp are the same kernel, with different potentials.
    centering         u = -centre / tau
    Sinkhorn-Knopp    Q_ik = exp(t_ik / tau + u_k + v_i): dividing columns by their sums changes u, dividing
                      rows changes v. Q (5,000 x 131,072 in fp32: 2.6 GB) is never written, and since a
                      softmax is blind to what a whole row shares, v is not needed at the end.

losses.py is the specification and the path of the CPU; `fused` chooses. No atomics: the same bits every time.
"""

from functools import partial
from typing import NamedTuple

import torch

from distributed import all_reduce
from kernels.attention import backend, jit, tl, triton

LOG2E = 1.4426950408889634


class SoftTargets(NamedTuple):
    """What probabilities are made of: p = softmax(logits / tau + potential), row by row."""

    logits: torch.Tensor  # (n, K) of the teacher, any floating type
    potential: torch.Tensor  # (K,) fp32
    tau: float

    def probabilities(self):
        """(n, K) fp32: the specification."""
        return (self.logits.float() / self.tau + self.potential).softmax(-1)


def fused(logits):
    """Whether the kernels below run, by the same switch and for the same reasons as attention's."""
    dtype = torch.bfloat16 if logits.dtype == torch.float32 else logits.dtype  # fp32 logits are welcome here
    return backend(logits.device, dtype, 64)[0] == "triton"


# ---------------------------------------------------------------- the kernels
# Rows of logits are read BLOCK prototypes at a time; a lane beyond K counts as -inf, that is as exp(..) = 0.
# Everything is to base 2: c = log2(e) / temperature, potentials times log2(e).


@jit
def scan(x, m, l):
    """Numbers join a running sum of 2^x: -> the new maximum, the sum rescaled, and 2^(x - maximum)."""
    grown = tl.maximum(m, tl.max(x, 0))
    e = tl.exp2(x - grown)
    shrink = tl.exp2(m - grown)
    return grown, l * shrink + tl.sum(e, 0), e, shrink


@jit
def ce_forward(student, teacher, potential, loss, lse_s, lse_t, K, stride_s, stride_t, cs, ct,
               BLOCK: tl.constexpr):  # fmt: skip
    """One row: loss = ln 2 (lse_s - sum(2^(t - lse_t) s)), in one pass over both."""
    i = tl.program_id(0).to(tl.int64)
    ms, mt, ls, lt, dot = -1e30, -1e30, 0.0, 0.0, 0.0
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        s = tl.load(student + i * stride_s + k, mask=k < K, other=0.0).to(tl.float32) * cs
        t = tl.load(teacher + i * stride_t + k, mask=k < K, other=0.0).to(tl.float32) * ct
        t = tl.where(k < K, t + tl.load(potential + k, mask=k < K, other=0.0), float("-inf"))
        ms, ls, _, _ = scan(tl.where(k < K, s, float("-inf")), ms, ls)
        mt, lt, e, shrink = scan(t, mt, lt)
        dot = dot * shrink + tl.sum(e * s, 0)  # s is 0, not -inf, beyond K: 0 * inf would be NaN
    zs = ms + tl.log2(ls)
    tl.store(lse_s + i, zs)
    tl.store(lse_t + i, mt + tl.log2(lt))
    tl.store(loss + i, (zs - dot / lt) * 0.6931471805599453)


@jit
def ce_backward(student, teacher, potential, gradient, lse_s, lse_t, K, stride_s, stride_t, cs, ct, temp,
                BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK numbers of a row: student <- gradient (softmax(student) - p) / temp."""
    i, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(student + i * stride_s + k, mask=k < K, other=0.0).to(tl.float32) * cs
    t = tl.load(teacher + i * stride_t + k, mask=k < K, other=0.0).to(tl.float32) * ct
    t += tl.load(potential + k, mask=k < K, other=0.0)
    g = (tl.exp2(s - tl.load(lse_s + i)) - tl.exp2(t - tl.load(lse_t + i))) * tl.load(gradient + i) / temp
    tl.store(student + i * stride_s + k, g.to(student.dtype.element_ty), mask=k < K)


# n changes with the masks: specialized, the kernel would be compiled anew for 1 and for multiples of 16.
@partial(jit, do_not_specialize=["n"])
def columns(logits, u, v, out, n, K, stride, c, LARGEST: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """BK prototypes, all rows: sum_i 2^(t_ik + u_k + v_i), or with LARGEST max_i t_ik. Sums in fp32."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    total = tl.full([BK], float("-inf") if LARGEST else 0.0, tl.float32)
    u = tl.load(u + k, mask=k < K, other=0.0)
    for first in range(0, n, BN):
        i = first + tl.arange(0, BN)
        inside = (i < n)[:, None] & (k < K)[None, :]
        where = logits + i.to(tl.int64)[:, None] * stride + k[None, :]
        t = tl.load(where, mask=inside, other=0.0).to(tl.float32) * c
        if LARGEST:
            total = tl.maximum(total, tl.max(tl.where(inside, t, float("-inf")), 0))
        else:
            t = t + u[None, :] + tl.load(v + i, mask=i < n, other=0.0)[:, None]
            total += tl.sum(tl.where(inside, tl.exp2(t), 0.0), 0)
    tl.store(out + k, total, mask=k < K)


@jit
def rows(logits, u, v, K, stride, c, BLOCK: tl.constexpr):
    """One row: v_i = -log2 sum_k 2^(t_ik + u_k)."""
    i = tl.program_id(0).to(tl.int64)
    m, l = -1e30, 0.0
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        t = tl.load(logits + i * stride + k, mask=k < K, other=0.0).to(tl.float32) * c
        t = tl.where(k < K, t + tl.load(u + k, mask=k < K, other=0.0), float("-inf"))
        m, l, _, _ = scan(t, m, l)
    tl.store(v + i, -(m + tl.log2(l)))


BLOCK, WARPS = 4096, 8  # of the kernels along a row
BN, BK = 32, 128  # of the kernel along columns


# ---------------------------------------------------------------- what PyTorch sees


class SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, potential, tau, temp):
        (n, K), fresh = student.shape, lambda: student.new_empty(student.shape[0], dtype=torch.float32)
        loss, lse_s, lse_t, u = fresh(), fresh(), fresh(), potential * LOG2E
        ctx.numbers = K, student.stride(0), teacher.stride(0), LOG2E / temp, LOG2E / tau
        if n:
            ce_forward[(n,)](student, teacher, u, loss, lse_s, lse_t, *ctx.numbers, BLOCK=BLOCK,
                             num_warps=WARPS)  # fmt: skip
        ctx.save_for_backward(student, teacher, u, lse_s, lse_t)
        ctx.temp, ctx.spent = temp, False
        return loss

    @staticmethod
    def backward(ctx, gradient):
        if ctx.spent:
            raise RuntimeError("the gradient has been written over the student's logits: no second backward")
        ctx.spent, (student, teacher, u, lse_s, lse_t) = True, ctx.saved_tensors
        if len(student):
            grid = len(student), triton.cdiv(ctx.numbers[0], BLOCK)
            ce_backward[grid](student, teacher, u, gradient.contiguous(), lse_s, lse_t, *ctx.numbers,
                              ctx.temp, BLOCK=BLOCK, num_warps=WARPS)  # fmt: skip
        return student, None, None, None, None


def soft_cross_entropy(student, targets, temp=0.1):
    """-sum_k p_k log softmax(z / temp)_k of each row, as losses.cross_entropy: (n, K), SoftTargets -> (n,).

    The loss is fp32. The backward pass may run once: it overwrites `student`, whose rows must be contiguous.
    """
    logits, potential, tau = targets
    shape = tuple(student.shape)
    if shape != logits.shape or shape[1:] != potential.shape:
        shapes = f"student {shape}, teacher {tuple(logits.shape)}, potential {tuple(potential.shape)}"
        raise ValueError(f"{shapes}: not (n, K), (n, K) and (K,)")
    demand_rows(student, "student")
    demand_rows(logits, "teacher")
    if len(student) > 1 and student.stride(0) < shape[1]:
        raise ValueError("rows of the student's logits overlap, and each is to hold its gradient")
    return SoftCrossEntropy.apply(student, logits, potential, tau, temp)


def demand_rows(logits, whose):
    """ValueError unless the numbers of a row lie side by side, which is where the kernels look for them."""
    if logits.ndim != 2 or logits.stride(1) != 1:
        layout = f"{tuple(logits.shape)} with strides {logits.stride()}"
        raise ValueError(f"logits of the {whose}, {layout}: not (n, K) with contiguous rows")


@torch.no_grad()
def sinkhorn_targets(logits, tau, iterations=3):
    """losses.sinkhorn_knopp's targets, unwritten: logits (n, K), n may differ between ranks -> SoftTargets.

    Reads the logits 2 * iterations times, and all-reduces one maximum and `iterations` sums of K numbers.
    """
    demand_rows(logits, "teacher")
    n, K = logits.shape
    c = LOG2E / tau
    u = torch.zeros(K, device=logits.device)
    v = torch.zeros(n, device=logits.device)
    out = torch.empty(K, device=logits.device)

    def over_rows(largest):
        out.fill_(float("-inf") if largest else 0.0)  # what a rank without rows contributes
        if n:
            columns[(triton.cdiv(K, BK),)](logits, u, v, out, n, K, logits.stride(0), c, LARGEST=largest,
                                           BN=BN, BK=BK, num_warps=4)  # fmt: skip
        return all_reduce(out, "max" if largest else "sum")

    u = -over_rows(True)  # only the exponent of a prototype's own maximum is surely representable
    for turn in range(iterations):
        u = u - torch.log2(over_rows(False))
        if n and turn < iterations - 1:  # the last division of the rows is the softmax of the loss
            rows[(n,)](logits, u, v, K, logits.stride(0), c, BLOCK=BLOCK, num_warps=WARPS)
    return SoftTargets(logits, u / LOG2E, tau)
