"""Flash attention for the sequence lengths of DINOv2: softmax(q k' scale) v without writing the matrix q k'.

The idea. A row of softmax needs all its scores, but not at once: keep the largest score m seen so far, the
sum l of exp(score - m), and the weighted sum of values; when m grows, shrink the other two. So a tile of
queries walks over tiles of keys, and the N x N matrix lives only in registers, one tile at a time:

          keys ->                                     memory moved, per head:   N x N matrix   this file
     q  +-----+-----+-----+   the current tile          scores written, read       4 N^2            0
     |  |  #  |  .  |  .  |   # scores -> exp -> @ v     q, k, v, out              8 N D         8 N D  bytes
     v  +-----+-----+-----+

The backward pass recomputes the tiles from q, k and the logarithm of each row's sum (`lse`, 4 bytes a row).

Multi-crop batches are short: 54 and 261 tokens. Published kernels are built for thousands and waste half of
their tiles on them. All sequences of a group have the same length, so there is no mask, no padding and no
scheduler, and three families of kernels share the work:
    up to 64 tokens   one tile holds a whole sequence: every number is read once, and there is no loop
    up to 272         two of the tensors stay on the chip (in chunks of 16..128 rows), the others stream past
    beyond            the classic loop: one tile stays, the others stream past
Input is the packed (T, 3, H, D) tensor that the qkv layer writes, and its gradient has the same layout.
No atomics: every number has one writer, so the same input gives the same bits.

    attention(qkv, [(128, 261), (512, 54)]) -> (T, H, D)
    python -m tools.bench_kernels      # on a GPU: correctness, then the table of kernels/README.md
"""

import math
import os
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import UserError

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # e.g. macOS, where no kernel below is ever called
    triton = None
    tl = SimpleNamespace(constexpr=None)

    def jit(kernel, **options):
        return kernel


# For kernels that the host launches. By default Triton recompiles when an integer argument becomes 1 or a
# multiple of 16. These four gain nothing by it, and each new shape of a batch would wait for the compiler.
launched = partial(jit, do_not_specialize=("length", "H", "T", "first_token"))
LONGEST_ON_CPU = 512  # tokens: up to here a CPU writes the matrix of scores out, in 16 bit
# Without cuDNN, whose backward has returned NaN on Hopper (pytorch issue 196678).
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# ---------------------------------------------------------------- 1. the specification


def split_groups(qkv, groups):
    """Yield the views q, k, v of the packed tensor for each group, each of shape (count, H, length, D)."""
    start = 0
    for count, length in groups:
        end = start + count * length
        sequences = qkv[start:end].unflatten(0, (count, length))  # (count, length, 3, H, D)
        yield sequences.permute(2, 0, 3, 1, 4).unbind()
        start = end


def reference(qkv, groups, scale=None):
    """Attention by definition -> out (T, H, D), and for each group a map (count, H, length, length)."""
    if scale is None:
        scale = qkv.shape[-1] ** -0.5
    maps = []
    outputs = []
    for q, k, v in split_groups(qkv, groups):
        probs = (q @ k.transpose(-2, -1) * scale).softmax(-1)
        maps.append(probs)
        outputs.append((probs @ v).transpose(1, 2).flatten(0, 1))  # (count * length, H, D)
    return torch.cat(outputs), maps


def pytorch_attention(qkv, groups, scale=None):
    """The same with PyTorch's own operators -> out (T, H, D): for CPUs, fp32, and machines without Triton."""
    if scale is None:
        scale = qkv.shape[-1] ** -0.5
    outputs = []
    with sdpa_kernel(SDPA_BACKENDS) if qkv.is_cuda else nullcontext():
        for q, k, v in split_groups(qkv, groups):
            if qkv.is_cuda or qkv.dtype not in (torch.bfloat16, torch.float16):
                out = F.scaled_dot_product_attention(q, k, v, scale=scale)
            elif q.shape[2] <= LONGEST_ON_CPU:
                # Two plain products: PyTorch's flash kernel for CPUs takes six times as long in 16 bit, most
                # of it in the backward pass.
                out = (q * scale @ k.transpose(-2, -1)).softmax(-1) @ v
            else:
                with torch.autocast("cpu", enabled=False):
                    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1).to(qkv.dtype))  # (count * length, H, D)
    return torch.cat(outputs)


# ---------------------------------------------------------------- 2. the kernels
# T tokens of the batch, H heads, D numbers per head, DP = D padded to a power of two, BM, BN rows of a tile.
# `token` is where this program's sequence of `length` tokens starts, `start` where a tile starts within it.
# scale_log2 = scale * log2(e): exp(scale s - m) = exp2(scale_log2 s - m'), one multiply-add and one
# instruction of the chip; so row_max and lse are to base 2.
# Programs: (block, head, sequence). Scores, sums and accumulators are fp32; factors of a product have 16 bit.


@jit
def load_tile(base, start, ROWS: tl.constexpr, stride, length, D: tl.constexpr, DP: tl.constexpr):
    """Rows start .. start + ROWS of a (length, D) matrix -> (ROWS, DP), zero outside."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    where = base + rows[:, None] * stride + columns[None, :]
    return tl.load(where, mask=inside, other=0.0)


@jit
def store_tile(base, tile, start, ROWS: tl.constexpr, stride, length, D: tl.constexpr, DP: tl.constexpr):
    """Write a tile (ROWS, DP) to rows start .. start + ROWS of a (length, D) matrix, in its type."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    where = base + rows[:, None] * stride + columns[None, :]
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    tl.store(where, tile.to(base.dtype.element_ty), mask=inside)


@jit
def load_vector(base, start, ROWS: tl.constexpr, length, other):
    """Numbers start .. start + ROWS of a vector, `other` beyond length. An lse of +inf: exp2(s - lse) = 0."""
    rows = start + tl.arange(0, ROWS)
    return tl.load(base + rows, mask=rows < length, other=other)


@jit
def score_tile(q, k, start, length, LAST: tl.constexpr):
    """q k' for the keys from start on. Keys beyond length, which only the LAST tile can have, score -inf."""
    scores = tl.dot(q, tl.trans(k))
    if LAST:
        keys = start + tl.arange(0, k.shape[0])[None, :]
        scores = tl.where(keys < length, scores, float("-inf"))
    return scores


@launched
def fwd_tile(qkv_ptr, out_ptr, lse_ptr, length, H, T, scale_log2, stride_token, stride_qkv, stride_head,
             first_token, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
             HEADS: tl.constexpr):  # fmt: skip
    """Whole sequences of up to N tokens. A program does HEADS heads in turn and prefetches the next one."""
    token = first_token + tl.program_id(1).to(tl.int64) * length
    first_head = tl.program_id(0) * HEADS
    for head in tl.range(first_head, tl.minimum(first_head + HEADS, H), num_stages=2):
        q_ptr = qkv_ptr + token * stride_token + head * stride_head
        q = load_tile(q_ptr, 0, N, stride_token, length, D, DP)
        k = load_tile(q_ptr + stride_qkv, 0, N, stride_token, length, D, DP)
        scores = score_tile(q, k, 0, length, True) * scale_log2
        row_max = tl.max(scores, 1)
        p = tl.exp2(scores - row_max[:, None])
        row_sum = tl.sum(p, 1)
        v = load_tile(q_ptr + 2 * stride_qkv, 0, N, stride_token, length, D, DP)
        out = tl.dot(p.to(v.dtype), v) / row_sum[:, None]
        store_tile(out_ptr + token * (H * D) + head * D, out, 0, N, H * D, length, D, DP)
        rows = tl.arange(0, N)
        tl.store(lse_ptr + head * T + token + rows, row_max + tl.log2(row_sum), mask=rows < length)


@launched
def fwd_keep(qkv_ptr, out_ptr, lse_ptr, length, H, T, scale_log2, stride_token, stride_qkv, stride_head,
             first_token, D: tl.constexpr, DP: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
             C2: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """All keys and values stay, in chunks of C0, C1 and maybe C2 rows; queries stream past, BM at a time."""
    head = tl.program_id(1)
    token = first_token + tl.program_id(2).to(tl.int64) * length
    q_ptr = qkv_ptr + token * stride_token + head * stride_head
    k_ptr = q_ptr + stride_qkv
    v_ptr = q_ptr + 2 * stride_qkv
    k0 = load_tile(k_ptr, 0, C0, stride_token, length, D, DP)
    v0 = load_tile(v_ptr, 0, C0, stride_token, length, D, DP)
    k1 = load_tile(k_ptr, C0, C1, stride_token, length, D, DP)
    v1 = load_tile(v_ptr, C0, C1, stride_token, length, D, DP)
    if C2:
        k2 = load_tile(k_ptr, C0 + C1, C2, stride_token, length, D, DP)
        v2 = load_tile(v_ptr, C0 + C1, C2, stride_token, length, D, DP)
    for start in range(0, length, BM):
        q = load_tile(q_ptr, start, BM, stride_token, length, D, DP)
        scores0 = score_tile(q, k0, 0, length, False)
        scores1 = score_tile(q, k1, C0, length, C2 == 0)
        row_max = tl.maximum(tl.max(scores0, 1), tl.max(scores1, 1))
        if C2:
            scores2 = score_tile(q, k2, C0 + C1, length, True)
            row_max = tl.maximum(row_max, tl.max(scores2, 1))
        row_max = row_max * scale_log2
        p0 = tl.exp2(scores0 * scale_log2 - row_max[:, None])
        row_sum = tl.sum(p0, 1)
        acc = tl.dot(p0.to(v0.dtype), v0)
        p1 = tl.exp2(scores1 * scale_log2 - row_max[:, None])
        row_sum = row_sum + tl.sum(p1, 1)
        acc = tl.dot(p1.to(v1.dtype), v1, acc)
        if C2:
            p2 = tl.exp2(scores2 * scale_log2 - row_max[:, None])
            row_sum = row_sum + tl.sum(p2, 1)
            acc = tl.dot(p2.to(v2.dtype), v2, acc)
        out = acc / row_sum[:, None]
        store_tile(out_ptr + token * (H * D) + head * D, out, start, BM, H * D, length, D, DP)
        rows = start + tl.arange(0, BM)
        tl.store(lse_ptr + head * T + token + rows, row_max + tl.log2(row_sum), mask=rows < length)


@jit
def fwd_step(q, k_ptr, v_ptr, start, stride, length, scale_log2, row_max, row_sum, acc, LAST: tl.constexpr,
             BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """One tile of keys joins the running softmax -> the new (row_max, row_sum, acc)."""
    k = load_tile(k_ptr, start, BN, stride, length, D, DP)
    scores = score_tile(q, k, start, length, LAST)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    v = load_tile(v_ptr, start, BN, stride, length, D, DP)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    return new_max, row_sum, acc


@launched
def fwd_loop(qkv_ptr, out_ptr, lse_ptr, length, H, T, scale_log2, stride_token, stride_qkv, stride_head,
             first_token, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A tile of queries stays; keys and values stream past."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    token = first_token + tl.program_id(2).to(tl.int64) * length
    q_ptr = qkv_ptr + token * stride_token + head * stride_head
    k_ptr = q_ptr + stride_qkv
    v_ptr = q_ptr + 2 * stride_qkv
    start = block * BM
    q = load_tile(q_ptr, start, BM, stride_token, length, D, DP)
    row_max = tl.full([BM], float("-inf"), tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    whole = length // BN * BN  # keys in whole tiles
    for key in range(0, whole, BN):
        row_max, row_sum, acc = fwd_step(q, k_ptr, v_ptr, key, stride_token, length, scale_log2,
                                         row_max, row_sum, acc, False, BN, D, DP)  # fmt: skip
    if whole < length:
        row_max, row_sum, acc = fwd_step(q, k_ptr, v_ptr, whole, stride_token, length, scale_log2,
                                         row_max, row_sum, acc, True, BN, D, DP)  # fmt: skip
    out = acc / row_sum[:, None]
    store_tile(out_ptr + token * (H * D) + head * D, out, start, BM, H * D, length, D, DP)
    rows = start + tl.arange(0, BM)
    tl.store(lse_ptr + head * T + token + rows, row_max + tl.log2(row_sum), mask=rows < length)


# Backward, with P the softmax and dO the gradient of the output: dV = P' dO, dP = dO V', dS = P (dP - delta),
# delta = rowsum(O dO), dQ = scale dS K, dK = scale dS' Q. For dK and dV the transposed tiles are computed
# from transposed *inputs*: Triton before 3.7.1 can get the transpose of a computed tile wrong on Hopper.


@jit
def ds_tile(q, k, v, do, lse, delta, start, length, scale_log2, LAST: tl.constexpr):
    """dS (queries, keys) in 16 bits. Keys beyond length get 0: their exp2(0 - lse) may be infinite."""
    p = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
    if LAST:
        keys = start + tl.arange(0, k.shape[0])[None, :]
        p = tl.where(keys < length, p, 0.0)
    dp = tl.dot(do, tl.trans(v))
    return (p * (dp - delta[:, None])).to(q.dtype)


@jit
def dkdv_tile(q, k, v, do, lse, delta, scale_log2, dk, dv):
    """Add a tile of queries to dK and dV. Queries beyond length add nothing: their q and dO are zero."""
    p = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])  # (keys, queries)
    dv = tl.dot(p.to(do.dtype), do, dv)
    dp = tl.dot(v, tl.trans(do))
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@launched
def bwd_tile(qkv_ptr, out_ptr, lse_ptr, delta_ptr, dout_ptr, dqkv_ptr, length, H, T, scale_log2,
             stride_token, stride_qkv, stride_head, stride_dout_token, stride_dout_head, scale, first_token,
             D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """All three gradients of up to N tokens; every tensor is read once, and delta stays in registers."""
    head = tl.program_id(1)
    token = first_token + tl.program_id(2).to(tl.int64) * length
    q_ptr = qkv_ptr + token * stride_token + head * stride_head
    dq_ptr = dqkv_ptr + token * (3 * H * D) + head * D
    q = load_tile(q_ptr, 0, N, stride_token, length, D, DP)
    k = load_tile(q_ptr + stride_qkv, 0, N, stride_token, length, D, DP)
    v = load_tile(q_ptr + 2 * stride_qkv, 0, N, stride_token, length, D, DP)
    do_ptr = dout_ptr + token * stride_dout_token + head * stride_dout_head
    do = load_tile(do_ptr, 0, N, stride_dout_token, length, D, DP)
    out = load_tile(out_ptr + token * (H * D) + head * D, 0, N, H * D, length, D, DP)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    lse = load_vector(lse_ptr + head * T + token, 0, N, length, float("inf"))
    zero = tl.zeros([N, DP], tl.float32)
    dk, dv = dkdv_tile(q, k, v, do, lse, delta, scale_log2, zero, zero)
    dq = tl.dot(ds_tile(q, k, v, do, lse, delta, 0, length, scale_log2, True), k)
    store_tile(dq_ptr, dq * scale, 0, N, 3 * H * D, length, D, DP)
    store_tile(dq_ptr + H * D, dk * scale, 0, N, 3 * H * D, length, D, DP)
    store_tile(dq_ptr + 2 * H * D, dv, 0, N, 3 * H * D, length, D, DP)


@launched
def dq_keep(qkv_ptr, out_ptr, lse_ptr, delta_ptr, dout_ptr, dqkv_ptr, length, H, T, scale_log2,
            stride_token, stride_qkv, stride_head, stride_dout_token, stride_dout_head, scale, first_token,
            D: tl.constexpr, DP: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
            BM: tl.constexpr):  # fmt: skip
    """dQ, with keys and values on the chip as in fwd_keep; also writes delta, for dkdv_loop."""
    head = tl.program_id(1)
    token = first_token + tl.program_id(2).to(tl.int64) * length
    q_ptr = qkv_ptr + token * stride_token + head * stride_head
    k_ptr = q_ptr + stride_qkv
    v_ptr = q_ptr + 2 * stride_qkv
    first_row = head * T + token  # in lse and delta
    k0 = load_tile(k_ptr, 0, C0, stride_token, length, D, DP)
    v0 = load_tile(v_ptr, 0, C0, stride_token, length, D, DP)
    k1 = load_tile(k_ptr, C0, C1, stride_token, length, D, DP)
    v1 = load_tile(v_ptr, C0, C1, stride_token, length, D, DP)
    if C2:
        k2 = load_tile(k_ptr, C0 + C1, C2, stride_token, length, D, DP)
        v2 = load_tile(v_ptr, C0 + C1, C2, stride_token, length, D, DP)
    for start in range(0, length, BM):
        q = load_tile(q_ptr, start, BM, stride_token, length, D, DP)
        do_ptr = dout_ptr + token * stride_dout_token + head * stride_dout_head
        do = load_tile(do_ptr, start, BM, stride_dout_token, length, D, DP)
        out = load_tile(out_ptr + token * (H * D) + head * D, start, BM, H * D, length, D, DP)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
        rows = start + tl.arange(0, BM)
        tl.store(delta_ptr + first_row + rows, delta, mask=rows < length)
        lse = load_vector(lse_ptr + first_row, start, BM, length, float("inf"))
        ds0 = ds_tile(q, k0, v0, do, lse, delta, 0, length, scale_log2, False)
        dq = tl.dot(ds0, k0)
        ds1 = ds_tile(q, k1, v1, do, lse, delta, C0, length, scale_log2, C2 == 0)
        dq = tl.dot(ds1, k1, dq)
        if C2:
            ds2 = ds_tile(q, k2, v2, do, lse, delta, C0 + C1, length, scale_log2, True)
            dq = tl.dot(ds2, k2, dq)
        dq_ptr = dqkv_ptr + token * (3 * H * D) + head * D
        store_tile(dq_ptr, dq * scale, start, BM, 3 * H * D, length, D, DP)


@launched
def dq_loop(qkv_ptr, out_ptr, lse_ptr, delta_ptr, dout_ptr, dqkv_ptr, length, H, T, scale_log2,
            stride_token, stride_qkv, stride_head, stride_dout_token, stride_dout_head, scale, first_token,
            D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """dQ of a tile of queries while keys and values stream past; also writes delta, for dkdv_loop."""
    head = tl.program_id(1)
    token = first_token + tl.program_id(2).to(tl.int64) * length
    q_ptr = qkv_ptr + token * stride_token + head * stride_head
    k_ptr = q_ptr + stride_qkv
    v_ptr = q_ptr + 2 * stride_qkv
    first_row = head * T + token  # in lse and delta
    start = tl.program_id(0) * BM
    q = load_tile(q_ptr, start, BM, stride_token, length, D, DP)
    do_ptr = dout_ptr + token * stride_dout_token + head * stride_dout_head
    do = load_tile(do_ptr, start, BM, stride_dout_token, length, D, DP)
    out = load_tile(out_ptr + token * (H * D) + head * D, start, BM, H * D, length, D, DP)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    rows = start + tl.arange(0, BM)
    tl.store(delta_ptr + first_row + rows, delta, mask=rows < length)
    lse = load_vector(lse_ptr + first_row, start, BM, length, float("inf"))
    dq = tl.zeros([BM, DP], tl.float32)
    whole = length // BN * BN  # keys in whole tiles
    for key in range(0, whole, BN):
        k = load_tile(k_ptr, key, BN, stride_token, length, D, DP)
        v = load_tile(v_ptr, key, BN, stride_token, length, D, DP)
        dq = tl.dot(ds_tile(q, k, v, do, lse, delta, key, length, scale_log2, False), k, dq)
    if whole < length:
        k = load_tile(k_ptr, whole, BN, stride_token, length, D, DP)
        v = load_tile(v_ptr, whole, BN, stride_token, length, D, DP)
        dq = tl.dot(ds_tile(q, k, v, do, lse, delta, whole, length, scale_log2, True), k, dq)
    dq_ptr = dqkv_ptr + token * (3 * H * D) + head * D
    store_tile(dq_ptr, dq * scale, start, BM, 3 * H * D, length, D, DP)


@jit
def load_lse_and_delta(lse_ptr, delta_ptr, start, ROWS: tl.constexpr, length):
    """Both numbers of queries start .. start + ROWS, zero beyond length, in one load.

    128 threads would fetch 64 numbers more than once (an older Triton: many times); 2 x 64 they fetch once.
    """
    rows = start + tl.arange(0, ROWS)[:, None]
    base = tl.where(tl.arange(0, 2) == 0, lse_ptr, delta_ptr)[None, :]
    return tl.split(tl.load(base + rows, mask=rows < length, other=0.0))


@jit
def dkdv_step(q_ptr, do_ptr, lse_ptr, delta_ptr, start, ROWS: tl.constexpr, length, scale_log2, stride,
              stride_do, k, v, dk, dv, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Queries start .. start + ROWS join the gradients (dk, dv) of a tile of keys."""
    q = load_tile(q_ptr, start, ROWS, stride, length, D, DP)
    do = load_tile(do_ptr, start, ROWS, stride_do, length, D, DP)
    lse, delta = load_lse_and_delta(lse_ptr, delta_ptr, start, ROWS, length)
    return dkdv_tile(q, k, v, do, lse, delta, scale_log2, dk, dv)


@jit
def dkdv_keys(q_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, start, KEYS: tl.constexpr, length, H, scale_log2,
              stride, stride_qkv, stride_do, scale, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
              TAIL: tl.constexpr):  # fmt: skip
    """dK and dV of keys start .. start + KEYS. All queries stream past, the tail first, then BM at a time."""
    k = load_tile(q_ptr + stride_qkv, start, KEYS, stride, length, D, DP)
    v = load_tile(q_ptr + 2 * stride_qkv, start, KEYS, stride, length, D, DP)
    dk = tl.zeros([KEYS, DP], tl.float32)
    dv = tl.zeros([KEYS, DP], tl.float32)
    whole = length
    if TAIL:  # before the loop: after it, ptxas would make the loop's products wait for each other (C7515)
        whole = length // BM * BM
        dk, dv = dkdv_step(q_ptr, do_ptr, lse_ptr, delta_ptr, whole, TAIL, length, scale_log2, stride,
                           stride_do, k, v, dk, dv, D, DP)  # fmt: skip
    for query in range(0, whole, BM):
        dk, dv = dkdv_step(q_ptr, do_ptr, lse_ptr, delta_ptr, query, BM, length, scale_log2, stride,
                           stride_do, k, v, dk, dv, D, DP)  # fmt: skip
    store_tile(dq_ptr + H * D, dk * scale, start, KEYS, 3 * H * D, length, D, DP)
    store_tile(dq_ptr + 2 * H * D, dv, start, KEYS, 3 * H * D, length, D, DP)


@launched
def dkdv_loop(qkv_ptr, out_ptr, lse_ptr, delta_ptr, dout_ptr, dqkv_ptr, length, H, T, scale_log2,
              stride_token, stride_qkv, stride_head, stride_dout_token, stride_dout_head, scale, first_token,
              D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              TAIL: tl.constexpr):  # fmt: skip
    """dK and dV of a tile of BN keys; the last tile of a sequence is TAIL wide where that is enough."""
    head = tl.program_id(1)
    token = first_token + tl.program_id(2).to(tl.int64) * length
    q_ptr = qkv_ptr + token * stride_token + head * stride_head
    do_ptr = dout_ptr + token * stride_dout_token + head * stride_dout_head
    lse_ptr = lse_ptr + head * T + token
    delta_ptr = delta_ptr + head * T + token
    dq_ptr = dqkv_ptr + token * (3 * H * D) + head * D
    start = tl.program_id(0) * BN
    if TAIL == 0 or start + BN <= length:
        dkdv_keys(q_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, start, BN, length, H, scale_log2,
                  stride_token, stride_qkv, stride_dout_token, scale, D, DP, BM, TAIL)  # fmt: skip
    else:
        dkdv_keys(q_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, start, TAIL, length, H, scale_log2,
                  stride_token, stride_qkv, stride_dout_token, scale, D, DP, BM, TAIL)  # fmt: skip


# ---------------------------------------------------------------- 3. which kernel, which tile

CHUNK_SIZES = (  # (C0, C1, C2): rows of the chunks in which fwd_keep and dq_keep hold a sequence; none spills
    (64, 16, 0),
    (64, 32, 0),
    (64, 64, 0),
    (128, 16, 0),
    (128, 64, 0),
    (128, 64, 16),
    (128, 64, 64),  # (128, 128, 0) would spill
    (128, 128, 16),
)
LOOP_KERNELS = (fwd_loop, dq_loop, dkdv_loop)
TILES = {  # (sm_90 or later, D > 64): (BM, BN, warps, stages) of each of LOOP_KERNELS; none spills
    (True, False): ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    (True, True): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (False, False): ((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    (False, True): ((128, 32, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
}


class KernelConfig(NamedTuple):
    """A kernel and everything that its compilation and its grid depend on."""

    kernel: object
    blocks: int  # programs for each head of each sequence
    constants: dict  # constexpr arguments, D and DP excepted
    num_warps: int
    num_stages: int

    def grid(self, H, count):
        """Programs for `count` sequences: (blocks, heads, sequences). fwd_tile does several heads in each."""
        if self.kernel is fwd_tile:
            return triton.cdiv(H, self.constants["HEADS"]), count
        return self.blocks, H, count


class KernelPlan(NamedTuple):
    forward: list[KernelConfig]
    backward: list[KernelConfig]


def chunk_sizes(length):
    """(C0, C1, C2), the smallest that hold 65..272 tokens; all chunks but the last are full."""
    return next(sizes for sizes in CHUNK_SIZES if length <= sum(sizes))


def loop_configs(length, has_registers, wide):
    """-> [KernelConfig] of fwd_loop, dq_loop and dkdv_loop, which work for every length."""
    configs = []
    for kernel, (BM, BN, num_warps, num_stages) in zip(LOOP_KERNELS, TILES[has_registers, wide]):
        constants = dict(BM=BM, BN=BN)
        rows = BM  # of the tile that stays
        if kernel is dkdv_loop:  # the most work: the last 5 of 261 = 4 x 64 + 5 tokens don't get a tile of 64
            short_tail = length > BN and 0 < length % max(BM, BN) <= 16
            constants["TAIL"] = 16 if short_tail and not wide else 0
            rows = BN
        configs.append(KernelConfig(kernel, triton.cdiv(length, rows), constants, num_warps, num_stages))
    return configs


def choose_kernels(length, D, arch):
    """-> the KernelPlan for sequences of `length` tokens and heads of D numbers on an sm_`arch`."""
    has_registers = arch >= 90  # an sm_80 has too few for the backward of a tile and for kept chunks
    wide = D > 64
    fwd, dq, dkdv = loop_configs(length, has_registers, wide)
    if length <= 64:
        fwd = KernelConfig(fwd_tile, 1, dict(N=64, HEADS=4), num_warps=4, num_stages=2)
        if has_registers:
            bwd = KernelConfig(bwd_tile, 1, dict(N=64), num_warps=4, num_stages=1)
            return KernelPlan([fwd], [bwd])
    elif length <= 272 and has_registers and not wide:
        C0, C1, C2 = chunk_sizes(length)
        constants = dict(C0=C0, C1=C1, C2=C2, BM=64)
        fwd = KernelConfig(fwd_keep, 1, constants, num_warps=4, num_stages=1)
        dq = KernelConfig(dq_keep, 1, constants, num_warps=4, num_stages=1)
    return KernelPlan([fwd], [dq, dkdv])


def architecture(device):
    """90 for an sm_90, and so on. The interpreter on a CPU stands in for an sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_offsets(tensors, groups):
    """ValueError if an offset within a sequence needs more than 32 bits; only its start is counted in 64."""
    longest = max((length for count, length in groups if count), default=0)
    for tensor in tensors:
        shape = tuple(tensor.shape)
        strides = tensor.stride()
        if tensor.dim() > 2:  # (T, ...), where a program sees one sequence; the other tensors are (H, T)
            sizes = (longest, *shape[1:])
        else:
            sizes = shape
        if any(size * stride >= 2**31 for size, stride in zip(sizes, strides)):
            raise ValueError(f"a tensor {shape} with strides {strides} and sequences of up to {longest}: "
                             "within a sequence, size x stride must stay below 2**31")  # fmt: skip


def launch(direction, tensors, qkv, groups, scalars):
    """Run the "forward" or the "backward" kernels on every group [(count, length), ...].

    Their arguments: `tensors`, then length, H and T, then `scalars` (factors and strides), then first_token.
    """
    check_offsets(tensors, groups)
    T, _, H, D = qkv.shape
    arch = architecture(qkv.device)
    DP = triton.next_power_of_2(max(D, 16))
    first_token = 0
    for count, length in groups:
        if count * length == 0:
            continue
        for config in getattr(choose_kernels(length, D, arch), direction):
            run = config.kernel[config.grid(H, count)]
            run(*tensors, length, H, T, *scalars, first_token, D=D, DP=DP, **config.constants,
                num_warps=config.num_warps, num_stages=config.num_stages)  # fmt: skip
        first_token += count * length


# ---------------------------------------------------------------- 4. two operators for PyTorch
# Opaque to torch.compile, which calls them as they are. Selective activation checkpointing finds the forward
# as torch.ops.nanodino.attention_forward. FSDP2 needs no support here, since there are no parameters.


def pairs(groups):
    """[count, length, count, length, ...], as an operator takes them -> [(count, length), ...]."""
    return list(zip(groups[::2], groups[1::2]))


@torch.library.custom_op("nanodino::attention_forward", mutates_args=())
def attention_forward(qkv: torch.Tensor, groups: list[int],
                      scale: float) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """qkv (T, 3, H, D), groups [count, length, ...] -> out (T, H, D), and lse (H, T), fp32, to base 2."""
    T, _, H, D = qkv.shape
    out = qkv.new_empty(T, H, D)
    lse = qkv.new_empty(H, T, dtype=torch.float32)
    scalars = (scale * math.log2(math.e), *qkv.stride()[:3])
    launch("forward", (qkv, out, lse), qkv, pairs(groups), scalars)
    return out, lse


@torch.library.custom_op("nanodino::attention_backward", mutates_args=())
def attention_backward(dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
                       groups: list[int], scale: float) -> torch.Tensor:  # fmt: skip
    """dout (T, H, D), the inputs and outputs of the forward -> gradient of qkv, (T, 3, H, D) contiguous."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    delta = torch.empty_like(lse)
    if dout.stride(2) != 1:  # an expanded gradient, as sum() makes it
        dout = dout.contiguous()
    scalars = (scale * math.log2(math.e), *qkv.stride()[:3], *dout.stride()[:2], scale)
    launch("backward", (qkv, out, lse, delta, dout, dqkv), qkv, pairs(groups), scalars)
    return dqkv


@attention_forward.register_fake
def _(qkv, groups, scale):
    T, _, H, D = qkv.shape
    return qkv.new_empty(T, H, D), qkv.new_empty(H, T, dtype=torch.float32)


@attention_backward.register_fake
def _(dout, qkv, out, lse, groups, scale):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def setup_context(ctx, inputs, output):
    qkv, groups, scale = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.groups = groups
    ctx.scale = scale
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def backward(ctx, dout, _):
    if dout is None:
        return None, None, None
    qkv, out, lse = ctx.saved_tensors
    return attention_backward(dout, qkv, out, lse, ctx.groups, ctx.scale), None, None


attention_forward.register_autograd(backward, setup_context=setup_context)
AUTOCAST_DEVICES = ("cpu", "cuda")
LIBRARY = torch.library.Library("nanodino", "FRAGMENT")


def autocast(device_type, qkv, groups, scale):
    """Under autocast the operator runs in autocast's own type, bf16 or fp16."""
    with torch.autocast(device_type, enabled=False):
        return attention_forward(qkv.to(torch.get_autocast_dtype(device_type)), groups, scale)


for device_type in AUTOCAST_DEVICES:
    LIBRARY.impl("attention_forward", partial(autocast, device_type), f"Autocast{device_type.upper()}")

# ---------------------------------------------------------------- 5. the entry point

CHOICE = os.environ.get("NANODINO_KERNELS", "auto")  # auto, triton, pytorch; speed.kernels sets it


def obstacle(device, dtype, D, interpreted):
    """Why the Triton kernels cannot run on these tensors, or None if they can."""
    if not triton:
        return "Triton is not installed"
    if D > 128:
        return f"heads of {D} are wider than 128"
    if device.type != "cuda" and not interpreted:
        return f"the tensors are on the {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than sm_80"
    if dtype not in (torch.float16, torch.bfloat16) and not interpreted:
        return f"the numbers are {str(dtype).removeprefix('torch.')}, and the kernels are for 16 bit"
    return None


@torch.compiler.assume_constant_result  # a query to the GPU would break the graph of a compiled block
def backend(device, dtype, D):
    """-> (backend, why), "triton" or "pytorch": the only place that chooses.

    There is no silent fallback: a kernel that fails fails the run. UserError if CHOICE is "triton" and the
    kernels cannot run here.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = obstacle(device, dtype, D, interpreted)
    if CHOICE == "triton":
        if reason:
            raise UserError(f"speed.kernels is triton, but {reason}: choose auto or pytorch")
        return "triton", "as asked"
    if CHOICE == "pytorch":
        return "pytorch", "as asked"
    if reason:
        return "pytorch", reason
    if interpreted:
        return "pytorch", "Triton is only interpreted"
    return "triton", "16-bit numbers on a GPU"


def attention(qkv, groups, scale=None):
    """softmax(q k' scale) v within each sequence (Dao et al. 2022, FlashAttention).

    qkv (T, 3, H, D), any strides but the last 1; groups [(count, length), ...] in the order of the tokens,
    sum(count * length) = T; scale > 0, default D ** -0.5 -> out (T, H, D). ValueError for what does not fit.
    """
    T, three, _, D = qkv.shape
    if scale is None:
        scale = D**-0.5
    tokens = sum(count * length for count, length in groups)
    if three != 3 or qkv.stride(3) != 1 or tokens != T or scale <= 0:
        raise ValueError(f"qkv {tuple(qkv.shape)} of strides {qkv.stride()}, groups {groups}, scale {scale}: "
                         "not (T, 3, H, D), T = sum of count * length, last stride 1, scale > 0")  # fmt: skip
    dtype = qkv.dtype
    device = qkv.device
    if device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    chosen, _ = backend(device, dtype, D)
    if chosen == "pytorch":
        return pytorch_attention(qkv, groups, scale)
    flat = []
    for count, length in groups:
        flat += [count, length]
    out, _ = attention_forward(qkv, flat, scale)
    return out
