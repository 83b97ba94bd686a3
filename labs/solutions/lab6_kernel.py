"""Lab 6, solved."""

import torch

from kernels.attention import jit, tl


def softmax(scores):
    largest = scores.max(1, keepdim=True).values
    p = (scores - largest).exp()  # at most exp(0) = 1: nothing overflows, and the sum is at least 1
    return p / p.sum(1, keepdim=True)


def online_attention(q, k, v, block):
    m = torch.full((len(q),), -torch.inf)
    l = torch.zeros(len(q))
    o = torch.zeros_like(q)
    for keys, values in zip(k.split(block), v.split(block)):
        s = q @ keys.T
        new_m = torch.maximum(m, s.max(1).values)
        c = (m - new_m).exp()  # of the first block: exp(-inf) = 0
        p = (s - new_m[:, None]).exp()
        l = c * l + p.sum(1)
        o = c[:, None] * o + p @ values
        m = new_m
    return o / l[:, None]


@jit
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, n, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    columns = tl.arange(0, D)[None, :]
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    tile = rows[:, None] * D + columns
    inside = rows[:, None] < n
    q = tl.load(q_ptr + tile, mask=inside, other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, D], tl.float32)
    for first in range(0, n, BN):
        keys = first + tl.arange(0, BN)
        key_tile = keys[:, None] * D + columns
        keys_inside = keys[:, None] < n
        k = tl.load(k_ptr + key_tile, mask=keys_inside, other=0.0)
        v = tl.load(v_ptr + key_tile, mask=keys_inside, other=0.0)
        s = tl.dot(q, tl.trans(k))
        s = tl.where(keys[None, :] < n, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        c = tl.exp(m - new_m)
        p = tl.exp(s - new_m[:, None])
        l = c * l + tl.sum(p, 1)
        o = c[:, None] * o + tl.dot(p, v)
        m = new_m
    tl.store(out_ptr + tile, o / l[:, None], mask=inside)
