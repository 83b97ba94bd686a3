"""Lab 6, solved: what fills its holes."""

import torch

from kernels.attention import jit, tl


def softmax(s):
    e = (s - s.max(1, keepdim=True).values).exp()  # the largest is exp(0) = 1: nothing overflows, l >= 1
    return e / e.sum(1, keepdim=True)


def online(q, k, v, block):
    m, l, o = torch.full((len(q),), -torch.inf), torch.zeros(len(q)), torch.zeros_like(q)
    for keys, values in zip(k.split(block), v.split(block)):
        s = q @ keys.T
        grown = torch.maximum(m, s.max(1).values)
        shrink, p = (m - grown).exp(), (s - grown[:, None]).exp()  # the first shrink is exp(-inf) = 0
        m, l, o = grown, l * shrink + p.sum(1), o * shrink[:, None] + p @ values
    return o / l[:, None]


@jit
def attend(q, k, v, out, n, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    mine = rows[:, None] * D + d[None, :]
    x = tl.load(q + mine, mask=rows[:, None] < n, other=0.0)
    m, l = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, D], tl.float32)
    for first in range(0, n, BN):
        j = first + tl.arange(0, BN)
        theirs = j[:, None] * D + d[None, :]
        y = tl.load(k + theirs, mask=j[:, None] < n, other=0.0)
        z = tl.load(v + theirs, mask=j[:, None] < n, other=0.0)
        s = tl.where(j[None, :] < n, tl.dot(x, tl.trans(y)), float("-inf"))
        grown = tl.maximum(m, tl.max(s, 1))
        shrink, p = tl.exp(m - grown), tl.exp(s - grown[:, None])
        m, l, o = grown, l * shrink + tl.sum(p, 1), o * shrink[:, None] + tl.dot(p, z)
    tl.store(out + mine, o / l[:, None], mask=rows[:, None] < n)
