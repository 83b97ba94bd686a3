"""Lab 6: flash attention, from a row of softmax to a Triton kernel, on a CPU.

    python labs/lab6_kernel.py               # three holes: softmax, online, attend
    python labs/lab6_kernel.py --solution    # ours

What is unusual here: the kernel runs in Triton's interpreter, tile by tile, in NumPy: slow, but without a
GPU, and each byte that it loads or stores is counted. Expect five checks and a table of bytes.
"""

import os
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, so it stands before that

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from workbench import run, table

from kernels import attention as kernels
from kernels.attention import jit, reference, tl, triton

D, BLOCK = 64, 64  # numbers per head, rows of a tile
LENGTHS = {54: "local crop", 261: "global crop", 1374: "518 pixels"}  # tokens, with patches of 14 pixels


def softmax(s):
    """Scores (n, m) fp32 -> p (n, m): p_ij = exp(s_ij - m_i) / sum_j exp(s_ij - m_i), m_i = max_j s_ij."""
    raise NotImplementedError(
        "hole 1 in softmax(): subtract each row's maximum, exp, divide by the row's sum"
    )


def online(q, k, v, block):
    """softmax(q k') v, `block` keys at a time, never all scores at once: q, k, v (n, D) fp32 -> (n, D).

    Each row keeps m, its largest score so far (-inf at first), l = sum exp(s - m) and o = sum exp(s - m) v.
    Scores s (n, block) change them: m' = max(m, max_j s), and with c = exp(m - m') and p = exp(s - m')
    l' = c l + sum_j p, o' = c o + p v.
    """
    raise NotImplementedError("hole 2 in online(): block by block, shrink l and o by c and add; return o / l")


@jit
def attend(q, k, v, out, n, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One program makes BM rows of out: the tl.program_id(0)-th ones. All four are pointers to (n, D) fp32.

    A tile is tl.load(q + rows[:, None] * D + tl.arange(0, D)[None, :], mask=rows[:, None] < n, other=0.0),
    rows = first + tl.arange(0, BM). Then it is online(), with tl.dot(q, tl.trans(k)), tl.max(s, 1), tl.sum,
    tl.maximum, tl.exp, tl.full, tl.zeros, tl.store; a key beyond n counts as float("-inf"), by tl.where.
    """
    raise NotImplementedError("hole 3 in attend(): a tile of queries stays, tiles of BN keys and values pass")


def obvious(q, k, v):
    """Attention as one writes it first: the whole matrix, and exp of whatever is there."""
    p = (q @ k.T).exp()
    return p / p.sum(1, keepdim=True) @ v


class Traffic(TorchDispatchMode):
    bytes = 0  # that PyTorch's operators read and write: each its inputs and its output

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.bytes += 0 if op.is_view else sum(x.nbytes for x in (*args, out) if torch.is_tensor(x))
        return out


def launch(q, k, v):
    """Run attend() for every tile -> out (n, D), and the bytes that its loads and stores have touched."""
    from triton.runtime.interpreter import InterpreterBuilder, InterpreterError

    def counted(name, mask):
        plain = getattr(InterpreterBuilder, name)
        count = lambda self, *x: moved.append(4 * int(x[mask].data.sum())) or plain(self, *x)  # noqa: E731
        return patch.object(InterpreterBuilder, name, count)

    (q, k, v), out, moved = (x.contiguous() for x in (q, k, v)), torch.empty(q.shape), []
    with counted("create_masked_load", 1), counted("create_masked_store", 2):
        try:
            attend[(triton.cdiv(len(q), BLOCK),)](q, k, v, out, len(q), D=D, BM=BLOCK, BN=BLOCK)
        except InterpreterError as e:
            raise e.__cause__ from None
    return out, sum(moved)


def main(desk, seed, short):
    n, rng = 80 if short else 261, torch.Generator().manual_seed(seed)
    soft = torch.randn(n, 3, 1, D, generator=rng) * torch.tensor([D**-0.5, 1, 1]).view(3, 1, 1)
    loud = soft * torch.tensor([30, 1, 1]).view(3, 1, 1)  # scores of 30 and more: exp overflows
    (q, k, v), Q, groups = soft[:, :, 0].unbind(1), loud[:, 0, 0], [(1, n)]
    truth = reference(loud.double(), groups, 1)[0][:, 0]
    error = lambda out, truth: (out - truth).abs().max().item()  # noqa: E731
    naive = error(obvious(Q, k, v), truth)
    print(f"{n} tokens, scores up to {(Q @ k.T).max():.0f}; in fp32 exp(89) is infinite")
    desk.check("softmax: error", error(softmax(Q @ k.T) @ v, truth), naive, high=1e-3, instant=True)
    added = error(sum(softmax(Q @ x.T) @ y for x, y in zip(k.split(BLOCK), v.split(BLOCK))), truth)
    desk.check("online: error", error(online(Q, k, v, BLOCK), truth), added, high=1e-3, instant=True)
    if not triton:
        return print("The kernel is left out: Triton is not installed here (it exists for Linux).")
    desk.check("kernel: error", error(launch(Q, k, v)[0], truth), naive, high=1e-3, instant=True)
    with patch.object(kernels, "CHOICE", "triton"):
        ours = kernels.attention(soft, groups, 1)[:, 0]
    zeros = error(obvious(q, *(torch.nn.functional.pad(x, (0, 0, 0, -n % BLOCK)) for x in (k, v))), ours)
    desk.check("kernel: distance to ours", error(launch(q, k, v)[0], ours), zeros, high=1e-4, instant=True)
    rows = [["tokens", "obvious, KB", "online, KB", "kernel, KB"]]
    for n in [54] if short else LENGTHS:
        x = torch.randn(3, n, D, generator=rng)
        with Traffic() as a:
            obvious(*x)
        with Traffic() as b:
            online(*x, BLOCK)
        a, b, c = (y / 1e3 for y in (a.bytes, b.bytes, launch(*x)[1]))
        rows.append([f"{n} ({LENGTHS[n]})", a, b, c])
    desk.check("bytes: obvious over kernel", a / c, a / b, low=2)  # control: obvious over online
    table(*rows)


if __name__ == "__main__":
    run(main, __doc__, ["softmax", "online", "attend"], globals())
