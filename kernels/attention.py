"""Flash attention for the lengths of DINOv2: softmax(q k' scale) v without ever writing the matrix q k'.

The idea. A row of softmax needs all its scores, but not at once: keep the largest score m seen so far, the
sum l of exp(score - m), and the weighted sum of values; when m grows, shrink the other two. So a tile of
queries walks over tiles of keys, and the N x N matrix lives only in registers, one tile at a time:

          keys ->                                     memory moved, per head:   N x N matrix   this file
     q  +-----+-----+-----+   the tile in hand          scores written, read       4 N^2            0
     |  |  #  |  .  |  .  |   # scores -> exp -> @ v     q, k, v, out              8 N D         8 N D  bytes
     v  +-----+-----+-----+

The backward pass computes the tiles again, from q, k and the logarithm of each row's sum (`lse`, 4 bytes).

What is unusual here: multi-crop batches are short, 54 and 261 tokens, where the published kernels, made for
thousands, waste half of their tiles. Sequences of one group have equal length, so there is no mask, no
padding and no scheduler; and three families of kernels share the work:
    up to 64 tokens   one tile holds a whole sequence: every number is read once, nothing is looped
    up to 272         two of the tensors stay on the chip (in pieces of 16..128 rows), the others stream past
    beyond            the classic loop: one tile stays, the others stream past
Everything is read from the packed (T, 3, H, D) that the qkv layer writes, and the gradient is written so too.
No atomics: each number has one writer, so the same input gives the same bits.

    attention(qkv, [(128, 261), (512, 54)]) -> (T, H, D)
    python kernels/bench.py        # on a GPU: correctness, then the table of README.md
"""

import math
import os
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import UserError

try:
    import triton
    import triton.language as tl
except ImportError:  # e.g. macOS, where nothing below calls a kernel
    triton, tl = None, type("tl", (), dict(constexpr=None))
jit = triton.jit if triton else lambda kernel, **options: kernel
# Kernels that the host starts. By default Triton compiles again when one of their whole numbers becomes 1 or
# a multiple of 16. These four gain nothing by it, and a new shape of batch would wait for the compiler.
launched = partial(jit, do_not_specialize=("n", "H", "T", "first_token"))
SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# ---------------------------------------------------------------- 1. the specification


def split(qkv, groups):
    """Group by group the views q, k, v of the packed tensor, each (count, H, length, D)."""
    start = 0
    for count, length in groups:
        part = qkv[start : start + count * length].unflatten(0, (count, length))
        yield part.permute(2, 0, 3, 1, 4).unbind()
        start += count * length


def reference(qkv, groups, scale=None):
    """What attention means -> out (T, H, D), and a map (count, H, length, length) per group."""
    scale, maps, outs = qkv.shape[-1] ** -0.5 if scale is None else scale, [], []
    for q, k, v in split(qkv, groups):
        maps.append((q @ k.transpose(-2, -1) * scale).softmax(-1))
        outs.append((maps[-1] @ v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs), maps


def sdpa(qkv, groups, scale=None):
    """The same by PyTorch's own kernels: for CPUs, fp32, and wherever Triton is not."""
    outs = []
    # Without cuDNN, whose backward has given NaN on Hopper (pytorch issue 196678).
    with sdpa_kernel(SDPA) if qkv.is_cuda else nullcontext():
        for q, k, v in split(qkv, groups):
            outs.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


# ---------------------------------------------------------------- 2. the kernels
# Legend: T tokens, H heads, D numbers per head, DP = D padded to a power of two, n tokens of this sequence,
# `c` = scale * log2(e): exp(scale s - m) = exp2(c s - m'), one multiply-add and one instruction of the chip.
# Programs: (block, head, sequence). Scores, sums and accumulators are fp32; factors of a product 16 bit.


@jit
def tile(base, first, rows: tl.constexpr, stride, n, D: tl.constexpr, DP: tl.constexpr):
    """Rows first .. first + rows of an (n, D) matrix -> (rows, DP); zero outside."""
    r, d = first + tl.arange(0, rows), tl.arange(0, DP)
    return tl.load(
        base + r[:, None] * stride + d[None, :], mask=(r[:, None] < n) & (d[None, :] < D), other=0.0
    )


@jit
def put(base, x, first, rows: tl.constexpr, stride, n, D: tl.constexpr, DP: tl.constexpr):
    r, d = first + tl.arange(0, rows), tl.arange(0, DP)
    where = base + r[:, None] * stride + d[None, :]
    tl.store(where, x.to(base.dtype.element_ty), mask=(r[:, None] < n) & (d[None, :] < D))


@jit
def row(base, first, rows: tl.constexpr, n, other):
    """Numbers first .. first + rows of a vector of n, `other` beyond: lse = +inf makes exp2(s - lse) zero."""
    r = first + tl.arange(0, rows)
    return tl.load(base + r, mask=r < n, other=other)


@jit
def scores(q, k, first, n, last: tl.constexpr):
    """q k' of a tile, keys first.. ; keys beyond n count as -inf. Only a sequence's last tile has any."""
    s = tl.dot(q, tl.trans(k))
    return tl.where(first + tl.arange(0, k.shape[0])[None, :] < n, s, float("-inf")) if last else s


@launched
def fwd_tile(qkv, out, lse, n, H, T, c, st, s3, sh, first_token,
             D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Whole sequences of up to N tokens; HEADS heads in turn, the next one being fetched."""
    t = first_token + tl.program_id(1).to(tl.int64) * n
    h0 = tl.program_id(0) * HEADS
    for h in tl.range(h0, tl.minimum(h0 + HEADS, H), num_stages=2):
        q = qkv + t * st + h * sh
        s = scores(tile(q, 0, N, st, n, D, DP), tile(q + s3, 0, N, st, n, D, DP), 0, n, True) * c
        m = tl.max(s, 1)
        p = tl.exp2(s - m[:, None])
        l = tl.sum(p, 1)
        v = tile(q + 2 * s3, 0, N, st, n, D, DP)
        o = tl.dot(p.to(v.dtype), v) / l[:, None]
        put(out + t * (H * D) + h * D, o, 0, N, H * D, n, D, DP)
        r = tl.arange(0, N)
        tl.store(lse + h * T + t + r, m + tl.log2(l), mask=r < n)


@launched
def fwd_keep(qkv, out, lse, n, H, T, c, st, s3, sh, first_token, D: tl.constexpr, DP: tl.constexpr,
             C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """All keys and values stay, in two or three chunks; queries stream past, BM at a time."""
    h, t = tl.program_id(1), first_token + tl.program_id(2).to(tl.int64) * n
    q0 = qkv + t * st + h * sh
    k0, v0 = tile(q0 + s3, 0, C0, st, n, D, DP), tile(q0 + 2 * s3, 0, C0, st, n, D, DP)
    k1, v1 = tile(q0 + s3, C0, C1, st, n, D, DP), tile(q0 + 2 * s3, C0, C1, st, n, D, DP)
    if C2:
        k2, v2 = tile(q0 + s3, C0 + C1, C2, st, n, D, DP), tile(q0 + 2 * s3, C0 + C1, C2, st, n, D, DP)
    for first in range(0, n, BM):
        q = tile(q0, first, BM, st, n, D, DP)
        a0, a1 = scores(q, k0, 0, n, False), scores(q, k1, C0, n, C2 == 0)
        m = tl.maximum(tl.max(a0, 1), tl.max(a1, 1))
        if C2:
            a2 = scores(q, k2, C0 + C1, n, True)
            m = tl.maximum(m, tl.max(a2, 1))
        m = m * c
        p0 = tl.exp2(a0 * c - m[:, None])
        l, o = tl.sum(p0, 1), tl.dot(p0.to(v0.dtype), v0)
        p1 = tl.exp2(a1 * c - m[:, None])
        l, o = l + tl.sum(p1, 1), tl.dot(p1.to(v1.dtype), v1, o)
        if C2:
            p2 = tl.exp2(a2 * c - m[:, None])
            l, o = l + tl.sum(p2, 1), tl.dot(p2.to(v2.dtype), v2, o)
        put(out + t * (H * D) + h * D, o / l[:, None], first, BM, H * D, n, D, DP)
        r = first + tl.arange(0, BM)
        tl.store(lse + h * T + t + r, m + tl.log2(l), mask=r < n)


@jit
def fwd_step(q, k0, v0, first, st, n, c, m, l, o, last: tl.constexpr,
             BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """One tile of keys joins the running softmax (m, l, o)."""
    s = scores(q, tile(k0, first, BN, st, n, D, DP), first, n, last)
    grown = tl.maximum(m, tl.max(s, 1) * c)
    p, shrink = tl.exp2(s * c - grown[:, None]), tl.exp2(m - grown)
    v = tile(v0, first, BN, st, n, D, DP)
    return grown, l * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, o * shrink[:, None])


@launched
def fwd_loop(qkv, out, lse, n, H, T, c, st, s3, sh, first_token,
             D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A tile of queries stays; keys and values stream past."""
    block, h, t = tl.program_id(0), tl.program_id(1), first_token + tl.program_id(2).to(tl.int64) * n
    q0, first = qkv + t * st + h * sh, block * BM
    q = tile(q0, first, BM, st, n, D, DP)
    m, l = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    o, whole = tl.zeros([BM, DP], tl.float32), n // BN * BN
    for j in range(0, whole, BN):
        m, l, o = fwd_step(q, q0 + s3, q0 + 2 * s3, j, st, n, c, m, l, o, False, BN, D, DP)
    if whole < n:
        m, l, o = fwd_step(q, q0 + s3, q0 + 2 * s3, whole, st, n, c, m, l, o, True, BN, D, DP)
    put(out + t * (H * D) + h * D, o / l[:, None], first, BM, H * D, n, D, DP)
    r = first + tl.arange(0, BM)
    tl.store(lse + h * T + t + r, m + tl.log2(l), mask=r < n)


# Backward, with P the softmax, dO the gradient of the output: dV = P' dO, dP = dO V', dS = P (dP - delta),
# delta = rowsum(O dO), dQ = scale dS K, dK = scale dS' Q. For dK and dV the transposed tiles are computed
# from transposed *inputs*: Triton before 3.7.1 can get the transpose of a computed tile wrong on Hopper.


@jit
def ds_tile(q, k, v, do, lse, delta, first, n, c, last: tl.constexpr):
    """dS of queries x keys, 16 bit. Keys beyond n get 0: their exp2(0 - lse) may be infinite."""
    p = tl.exp2(tl.dot(q, tl.trans(k)) * c - lse[:, None])
    if last:
        p = tl.where(first + tl.arange(0, k.shape[0])[None, :] < n, p, 0.0)
    return (p * (tl.dot(do, tl.trans(v)) - delta[:, None])).to(q.dtype)


@jit
def dkdv_tile(q, k, v, do, lse, delta, c, dk, dv):
    """Adds a tile of queries to dK and dV. Queries beyond n add nothing: their q and dO are zero."""
    p = tl.exp2(tl.dot(k, tl.trans(q)) * c - lse[None, :])  # keys x queries
    dv = tl.dot(p.to(do.dtype), do, dv)
    ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk), dv


@launched
def bwd_tile(qkv, out, lse, delta, dout, dqkv, n, H, T, c, st, s3, sh, sdt, sdh, scale, first_token,
             D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """All three gradients of up to N tokens from tensors that are read once; delta stays in registers."""
    h, t = tl.program_id(1), first_token + tl.program_id(2).to(tl.int64) * n
    q0, g0 = qkv + t * st + h * sh, dqkv + t * (3 * H * D) + h * D
    q, k, v = (
        tile(q0, 0, N, st, n, D, DP),
        tile(q0 + s3, 0, N, st, n, D, DP),
        tile(q0 + 2 * s3, 0, N, st, n, D, DP),
    )
    do, o = (
        tile(dout + t * sdt + h * sdh, 0, N, sdt, n, D, DP),
        tile(out + t * (H * D) + h * D, 0, N, H * D, n, D, DP),
    )
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = row(lse + h * T + t, 0, N, n, float("inf"))
    zero = tl.zeros([N, DP], tl.float32)
    dk, dv = dkdv_tile(q, k, v, do, lse, delta, c, zero, zero)
    dq = tl.dot(ds_tile(q, k, v, do, lse, delta, 0, n, c, True), k)
    put(g0, dq * scale, 0, N, 3 * H * D, n, D, DP)
    put(g0 + H * D, dk * scale, 0, N, 3 * H * D, n, D, DP)
    put(g0 + 2 * H * D, dv, 0, N, 3 * H * D, n, D, DP)


@launched
def dq_keep(qkv, out, lse, delta, dout, dqkv, n, H, T, c, st, s3, sh, sdt, sdh, scale, first_token,
            D: tl.constexpr, DP: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
            BM: tl.constexpr):  # fmt: skip
    """dQ, with keys and values on the chip as in fwd_keep; writes delta for dkdv_loop on its way."""
    h, t = tl.program_id(1), first_token + tl.program_id(2).to(tl.int64) * n
    q0, rows = qkv + t * st + h * sh, h * T + t
    k0, v0 = tile(q0 + s3, 0, C0, st, n, D, DP), tile(q0 + 2 * s3, 0, C0, st, n, D, DP)
    k1, v1 = tile(q0 + s3, C0, C1, st, n, D, DP), tile(q0 + 2 * s3, C0, C1, st, n, D, DP)
    if C2:
        k2, v2 = tile(q0 + s3, C0 + C1, C2, st, n, D, DP), tile(q0 + 2 * s3, C0 + C1, C2, st, n, D, DP)
    for first in range(0, n, BM):
        q, do = tile(q0, first, BM, st, n, D, DP), tile(dout + t * sdt + h * sdh, first, BM, sdt, n, D, DP)
        o = tile(out + t * (H * D) + h * D, first, BM, H * D, n, D, DP)
        d, r = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), first + tl.arange(0, BM)
        tl.store(delta + rows + r, d, mask=r < n)
        z = row(lse + rows, first, BM, n, float("inf"))
        dq = tl.dot(ds_tile(q, k0, v0, do, z, d, 0, n, c, False), k0)
        dq = tl.dot(ds_tile(q, k1, v1, do, z, d, C0, n, c, C2 == 0), k1, dq)
        if C2:
            dq = tl.dot(ds_tile(q, k2, v2, do, z, d, C0 + C1, n, c, True), k2, dq)
        put(dqkv + t * (3 * H * D) + h * D, dq * scale, first, BM, 3 * H * D, n, D, DP)


@launched
def dq_loop(qkv, out, lse, delta, dout, dqkv, n, H, T, c, st, s3, sh, sdt, sdh, scale, first_token,
            D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """dQ of a tile of queries, keys and values streaming past; writes delta."""
    h, t = tl.program_id(1), first_token + tl.program_id(2).to(tl.int64) * n
    q0, rows, first = qkv + t * st + h * sh, h * T + t, tl.program_id(0) * BM
    q, do = tile(q0, first, BM, st, n, D, DP), tile(dout + t * sdt + h * sdh, first, BM, sdt, n, D, DP)
    o = tile(out + t * (H * D) + h * D, first, BM, H * D, n, D, DP)
    d, r = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1), first + tl.arange(0, BM)
    tl.store(delta + rows + r, d, mask=r < n)
    z, dq, whole = row(lse + rows, first, BM, n, float("inf")), tl.zeros([BM, DP], tl.float32), n // BN * BN
    for j in range(0, whole, BN):
        k, v = tile(q0 + s3, j, BN, st, n, D, DP), tile(q0 + 2 * s3, j, BN, st, n, D, DP)
        dq = tl.dot(ds_tile(q, k, v, do, z, d, j, n, c, False), k, dq)
    if whole < n:
        k, v = tile(q0 + s3, whole, BN, st, n, D, DP), tile(q0 + 2 * s3, whole, BN, st, n, D, DP)
        dq = tl.dot(ds_tile(q, k, v, do, z, d, whole, n, c, True), k, dq)
    put(dqkv + t * (3 * H * D) + h * D, dq * scale, first, BM, 3 * H * D, n, D, DP)


@jit
def lse_and_delta(lse, delta, first, rows: tl.constexpr, n):
    """Both numbers of queries first .. first + rows, zero beyond n, by one load.

    128 threads would fetch 64 numbers more than once, an older Triton many times; 2 x 64 they fetch once.
    """
    r = first + tl.arange(0, rows)[:, None]
    base = tl.where(tl.arange(0, 2) == 0, lse, delta)[None, :]
    return tl.split(tl.load(base + r, mask=r < n, other=0.0))


@jit
def dkdv_step(q0, do0, lse, delta, first, rows: tl.constexpr, n, c, st, sdt, k, v, dk, dv,
              D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Queries first .. first + rows join the gradients (dk, dv) of a tile of keys."""
    q = tile(q0, first, rows, st, n, D, DP)
    do = tile(do0, first, rows, sdt, n, D, DP)
    z, d = lse_and_delta(lse, delta, first, rows, n)
    return dkdv_tile(q, k, v, do, z, d, c, dk, dv)


@jit
def dkdv_keys(q0, do0, lse, delta, g0, first, keys: tl.constexpr, n, H, c, st, s3, sdt, scale,
              D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """dK and dV of keys first .. first + keys; all queries stream past, the tail first, then BM at a time."""
    k = tile(q0 + s3, first, keys, st, n, D, DP)
    v = tile(q0 + 2 * s3, first, keys, st, n, D, DP)
    dk = tl.zeros([keys, DP], tl.float32)
    dv = tl.zeros([keys, DP], tl.float32)
    end = n
    if TAIL:  # before the loop: after it, ptxas would let the loop's products wait for each other (C7515)
        end = n // BM * BM
        dk, dv = dkdv_step(q0, do0, lse, delta, end, TAIL, n, c, st, sdt, k, v, dk, dv, D, DP)
    for j in range(0, end, BM):
        dk, dv = dkdv_step(q0, do0, lse, delta, j, BM, n, c, st, sdt, k, v, dk, dv, D, DP)
    put(g0 + H * D, dk * scale, first, keys, 3 * H * D, n, D, DP)
    put(g0 + 2 * H * D, dv, first, keys, 3 * H * D, n, D, DP)


@launched
def dkdv_loop(qkv, out, lse, delta, dout, dqkv, n, H, T, c, st, s3, sh, sdt, sdh, scale, first_token,
              D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              TAIL: tl.constexpr):  # fmt: skip
    """dK and dV of a tile of BN keys; the last tile of a sequence is TAIL wide where that is enough."""
    h = tl.program_id(1)
    t = first_token + tl.program_id(2).to(tl.int64) * n
    q0 = qkv + t * st + h * sh
    do0 = dout + t * sdt + h * sdh
    z0 = lse + h * T + t
    d0 = delta + h * T + t
    g0 = dqkv + t * (3 * H * D) + h * D
    first = tl.program_id(0) * BN
    if TAIL == 0 or first + BN <= n:
        dkdv_keys(q0, do0, z0, d0, g0, first, BN, n, H, c, st, s3, sdt, scale, D, DP, BM, TAIL)
    else:
        dkdv_keys(q0, do0, z0, d0, g0, first, TAIL, n, H, c, st, s3, sdt, scale, D, DP, BM, TAIL)


# ---------------------------------------------------------------- 3. which kernel, which tile


CHUNKS = (  # rows of the two or three pieces in which fwd_keep and dq_keep hold a sequence; none spills
    (64, 16, 0),
    (64, 32, 0),
    (64, 64, 0),
    (128, 16, 0),
    (128, 64, 0),
    (128, 64, 16),
    (128, 64, 64),  # (128, 128, 0) would spill
    (128, 128, 16),
)


def chunks(n):
    """The smallest of CHUNKS that holds n tokens, 65..272; all chunks but the last are full."""
    return next(parts for parts in CHUNKS if n <= sum(parts))


TILES = {  # (sm_90 or later, D > 64): (BM, BN, warps, stages) of fwd_loop, dq_loop and dkdv_loop; none spills
    (True, False): ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    (True, True): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (False, False): ((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    (False, True): ((128, 32, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
}


def plan(n, D, arch):
    """-> [forward, *backward] for n tokens on sm_`arch`: (kernel, blocks, its constants, warps, stages)."""
    roomy = arch >= 90  # an sm_80 has no registers for the whole-sequence kernels
    wide = D > 64
    kernels = []
    for kernel, (BM, BN, warps, stages) in zip((fwd_loop, dq_loop, dkdv_loop), TILES[roomy, wide]):
        constants = dict(BM=BM, BN=BN)
        size = BM
        if kernel is dkdv_loop:  # the largest: 5 tokens of 261 = 4 x 64 + 5 are not worth a tile of 64
            short = n > BN and 0 < n % max(BM, BN) <= 16
            constants["TAIL"] = 16 if short and not wide else 0
            size = BN
        kernels.append((kernel, -(-n // size), constants, warps, stages))
    if n <= 64:
        kernels[0] = fwd_tile, None, dict(N=64, HEADS=4), 4, 2
        if roomy:
            kernels[1:] = [(bwd_tile, 1, dict(N=64), 4, 1)]
    elif n <= 272 and roomy and not wide:
        keep = dict(zip(("C0", "C1", "C2"), chunks(n)), BM=64)
        kernels[:2] = (fwd_keep, 1, keep, 4, 1), (dq_keep, 1, keep, 4, 1)
    return kernels


def check_offsets(tensors, groups):
    """ValueError if an offset inside a sequence needs more than 32 bits; only its start is counted in 64."""
    longest = max((n for count, n in groups if count), default=0)
    for x in tensors:
        steps = list(zip(x.shape, x.stride()))
        if x.dim() > 2:  # (T, ...), of which a program sees one sequence; the others are (H, T)
            steps[0] = longest, x.stride(0)
        if any(size * stride >= 2**31 for size, stride in steps):
            raise ValueError(f"{tuple(x.shape)} of strides {x.stride()} and sequences of up to {longest}: "
                             "within a sequence, size x stride must stay below 2**31")  # fmt: skip


def launch(wanted, tensors, qkv, groups, numbers):
    """Run the `wanted` kernels of the plan over every group. `numbers` are the last arguments but one."""
    check_offsets(tensors, groups)
    T, _, H, D = qkv.shape
    major, minor = torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (9, 0)
    first = 0
    for count, n in groups:
        kernels = plan(n, D, 10 * major + minor)[wanted] if count * n else ()
        for kernel, blocks, constants, warps, stages in kernels:
            grid = (-(-H // constants["HEADS"]), count) if blocks is None else (blocks, H, count)
            kernel[grid](*tensors, n, H, T, *numbers, first, D=D, DP=triton.next_power_of_2(max(D, 16)),
                         **constants, num_warps=warps, num_stages=stages)  # fmt: skip
        first += count * n


# ---------------------------------------------------------------- 4. two operators for PyTorch
# Opaque to torch.compile, which leaves them as they are. Selective activation checkpointing finds the forward
# as torch.ops.nanodino.attention_forward, and FSDP2 needs nothing, since there are no parameters.


@torch.library.custom_op("nanodino::attention_forward", mutates_args=())
def attention_forward(qkv: torch.Tensor, groups: list[int],
                      scale: float) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """qkv (T, 3, H, D), groups [count, length, ...] -> out (T, H, D), and lse (H, T) fp32 to base 2."""
    T, _, H, D = qkv.shape
    out, lse = qkv.new_empty(T, H, D), qkv.new_empty(H, T, dtype=torch.float32)
    numbers = scale * math.log2(math.e), *qkv.stride()[:3]
    launch(slice(0, 1), (qkv, out, lse), qkv, list(zip(groups[::2], groups[1::2])), numbers)
    return out, lse


@torch.library.custom_op("nanodino::attention_backward", mutates_args=())
def attention_backward(dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
                       groups: list[int], scale: float) -> torch.Tensor:  # fmt: skip
    """-> the gradient of qkv, (T, 3, H, D) contiguous."""
    dqkv, delta = torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(lse)
    dout = dout if dout.stride(2) == 1 else dout.contiguous()  # an expanded gradient, as sum() makes it
    numbers = scale * math.log2(math.e), *qkv.stride()[:3], *dout.stride()[:2], scale
    tensors, groups = (qkv, out, lse, delta, dout, dqkv), list(zip(groups[::2], groups[1::2]))
    launch(slice(1, None), tensors, qkv, groups, numbers)
    return dqkv


@attention_forward.register_fake
def _(qkv, groups, scale):
    return qkv.new_empty(qkv[:, 0].shape), qkv.new_empty(qkv.shape[2], qkv.shape[0], dtype=torch.float32)


@attention_backward.register_fake
def _(dout, qkv, out, lse, groups, scale):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output)
    ctx.groups, ctx.scale = inputs[1:]
    ctx.mark_non_differentiable(output[1]), ctx.set_materialize_grads(False)


def backward(ctx, dout, _):
    if dout is None:
        return None, None, None
    return attention_backward(dout, *ctx.saved_tensors, ctx.groups, ctx.scale), None, None


attention_forward.register_autograd(backward, setup_context=setup_context)
AUTOCAST, LIBRARY = ("cpu", "cuda"), torch.library.Library("nanodino", "FRAGMENT")


def autocast(device, qkv, groups, scale):
    """Under autocast the op takes autocast's own type, be it bf16 or fp16."""
    with torch.autocast(device, enabled=False):
        return attention_forward(qkv.to(torch.get_autocast_dtype(device)), groups, scale)


for device in AUTOCAST:
    LIBRARY.impl("attention_forward", partial(autocast, device), f"Autocast{device.upper()}")

# ---------------------------------------------------------------- 5. the one door

CHOICE = os.environ.get("NANODINO_KERNELS", "auto")  # auto, triton, pytorch; speed.kernels sets it


@torch.compiler.assume_constant_result  # a question to the GPU would break the graph of a compiled block
def backend(device, dtype, D):
    """-> (backend, why): the only place that chooses. A kernel that fails fails the run, never silently."""
    interpreted, hinder = os.environ.get("TRITON_INTERPRET") == "1", None
    if not triton:
        hinder = "Triton is not installed"
    elif D > 128:
        hinder = f"heads of {D} are wider than 128"
    elif device.type != "cuda" and not interpreted:
        hinder = f"the tensors are on the {device.type}"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        hinder = "the GPU is older than sm_80"
    elif dtype not in (torch.float16, torch.bfloat16) and not interpreted:
        hinder = f"the numbers are {str(dtype)[6:]}, and the kernels are for 16 bit"
    if CHOICE == "triton":
        if hinder:
            raise UserError(f"speed.kernels is triton, but {hinder}: choose auto or pytorch")
        return "triton", "as asked"
    if CHOICE == "pytorch" or hinder or interpreted:
        return "pytorch", "as asked" if CHOICE == "pytorch" else hinder or "Triton is only interpreted"
    return "triton", "16-bit numbers on a GPU"


def attention(qkv, groups, scale=None):
    """softmax(q k' scale) v inside each sequence. Dao et al. 2022, "FlashAttention".

    qkv (T, 3, H, D), any strides but the last 1; groups [(count, length), ...] with sum(count * length) = T;
    scale > 0, default D ** -0.5 -> (T, H, D). ValueError for what does not fit.
    """
    (T, three, _, D), scale, device = qkv.shape, qkv.shape[-1] ** -0.5 if scale is None else scale, qkv.device
    if three != 3 or qkv.stride(3) != 1 or sum(count * n for count, n in groups) != T or scale <= 0:
        raise ValueError(f"qkv {tuple(qkv.shape)} of strides {qkv.stride()}, groups {groups}, scale {scale}: "
                         "not (T, 3, H, D), T = sum of count * length, last stride 1, scale > 0")  # fmt: skip
    cast = device.type in AUTOCAST and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if cast else qkv.dtype
    if backend(device, dtype, D)[0] == "pytorch":
        return sdpa(qkv, groups, scale)
    return attention_forward(qkv, [number for group in groups for number in group], scale)[0]
