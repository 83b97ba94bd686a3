"""Lab 6: flash attention, from a row of softmax to a Triton kernel, on a CPU.

    python labs/lab6_kernel.py               # three holes: softmax, online_attention, attention_kernel
    python labs/lab6_kernel.py --solution    # ours

The kernel runs in Triton's interpreter, tile by tile, in NumPy. That is slow, but it needs no GPU, and every
byte that the kernel loads or stores is counted. Expect five checks and a table of bytes.
"""

import os
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # before the imports below: Triton reads it when it is imported

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from workbench import max_error, print_table, run_lab

from kernels import attention as real
from kernels.attention import jit, reference, tl, triton

D = 64  # numbers per head
BLOCK = 64  # rows of a tile
LENGTHS = {54: "local crop", 261: "global crop", 1374: "518 pixels"}  # tokens, with patches of 14 pixels


def softmax(scores):
    """Scores s (n, m) fp32 -> p (n, m): p_ij = exp(s_ij - m_i) / sum_j exp(s_ij - m_i), m_i = max_j s_ij."""
    raise NotImplementedError("hole 1 in softmax(): subtract each row's maximum, exp, divide by its sum")


def online_attention(q, k, v, block):
    """softmax(q k') v, `block` keys at a time, never all scores at once: q, k, v (n, D) fp32 -> (n, D).

    Each row keeps m, its largest score so far (-inf at first), l = sum exp(s - m) and o = sum exp(s - m) v.
    Scores s (n, block) change them: m' = max(m, max_j s), and with c = exp(m - m') and p = exp(s - m')
    l' = c l + sum_j p, o' = c o + p v.
    """
    raise NotImplementedError("hole 2 in online_attention(): shrink l and o by c and add; return o / l")


@jit
def attention_kernel(q_ptr, k_ptr, v_ptr, out_ptr, n, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """One program makes BM rows of out: those of the tl.program_id(0)-th tile. Pointers are to (n, D) fp32.

    A tile is tl.load(q_ptr + rows[:, None] * D + tl.arange(0, D)[None, :], mask=rows[:, None] < n, other=0.0)
    with rows = first + tl.arange(0, BM). The rest is online_attention() with tl.dot(q, tl.trans(k)),
    tl.max(s, 1), tl.sum, tl.maximum, tl.exp, tl.full, tl.zeros and tl.store; a key beyond n gets the score
    float("-inf"), by tl.where.
    """
    raise NotImplementedError("hole 3 in attention_kernel(): a tile of queries stays, keys and values pass")


def obvious_attention(q, k, v):
    """Attention as one writes it first: the whole matrix, and exp of whatever is there."""
    p = (q @ k.T).exp()
    return p / p.sum(1, keepdim=True) @ v


# ---------------------------------------------------------------- bytes, counted


class Traffic(TorchDispatchMode):
    """Counts the bytes that PyTorch's operators read and write: the inputs and the output of each."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view:
            self.bytes += sum(x.nbytes for x in (*args, out) if torch.is_tensor(x))
        return out


def traffic(function, *inputs):
    with Traffic() as counter:
        function(*inputs)
    return counter.bytes


def launch(q, k, v):
    """Run your kernel for every tile -> out (n, D), and the bytes that its loads and stores touch."""
    from triton.runtime.interpreter import InterpreterBuilder, InterpreterError

    moved = []

    def count(operation, mask):
        plain = getattr(InterpreterBuilder, operation)

        def counted(self, *operands):
            moved.append(4 * int(operands[mask].data.sum()))
            return plain(self, *operands)

        return patch.object(InterpreterBuilder, operation, counted)

    out = torch.empty(q.shape)
    inputs = [x.contiguous() for x in (q, k, v)]
    grid = (triton.cdiv(len(q), BLOCK),)
    with count("create_masked_load", mask=1), count("create_masked_store", mask=2):
        try:
            attention_kernel[grid](*inputs, out, len(q), D=D, BM=BLOCK, BN=BLOCK)
        except InterpreterError as e:
            raise e.__cause__ from None
    return out, sum(moved)


# ---------------------------------------------------------------- checks


def check_softmax(checker, q, k, v, truth):
    """Your first two functions, with scores so large that exp overflows."""
    scores = q @ k.T
    print(f"{len(q)} tokens, scores up to {scores.max():.0f}; in fp32 exp(89) is infinite")
    naive = max_error(obvious_attention(q, k, v), truth)
    checker.check("softmax: error", max_error(softmax(scores) @ v, truth), naive, high=1e-3, instant=True)
    blocks = zip(k.split(BLOCK), v.split(BLOCK))
    added_up = sum(softmax(q @ keys.T) @ values for keys, values in blocks)  # each block's own softmax
    errors = [max_error(out, truth) for out in (online_attention(q, k, v, BLOCK), added_up)]
    checker.check("online: error", *errors, high=1e-3, instant=True)


def check_kernel(checker, packed, loud, truth):
    """Your kernel against float64, with large scores; then against ours. packed, loud (n, 3, 1, D)."""
    q, k, v = loud[:, :, 0].unbind(1)
    errors = [max_error(out, truth) for out in (launch(q, k, v)[0], obvious_attention(q, k, v))]
    checker.check("kernel: error", *errors, high=1e-3, instant=True)
    q, k, v = packed[:, :, 0].unbind(1)
    with patch.object(real, "CHOICE", "triton"):
        ours = real.attention(packed, [(1, len(packed))], 1)[:, 0]
    padding = (0, 0, 0, -len(q) % BLOCK)
    zero_keys = obvious_attention(q, F.pad(k, padding), F.pad(v, padding))  # zeros taken for keys
    errors = [max_error(out, ours) for out in (launch(q, k, v)[0], zero_keys)]
    checker.check("kernel: distance to ours", *errors, high=1e-4, instant=True)


def main(checker, args):
    n = 80 if args.short else 261
    rng = torch.Generator().manual_seed(args.seed)
    packed = torch.randn(n, 3, 1, D, generator=rng)
    packed[:, 0] *= D**-0.5  # q
    loud = packed.clone()
    loud[:, 0] *= 30  # scores of 30 and more
    truth = reference(loud.double(), [(1, n)], 1)[0][:, 0]
    check_softmax(checker, *loud[:, :, 0].unbind(1), truth)
    if not triton:
        print("The kernel is left out: Triton is not installed here (it exists for Linux).")
        return
    check_kernel(checker, packed, loud, truth)

    results = {}
    for n in [54] if args.short else LENGTHS:
        q, k, v = torch.randn(3, n, D, generator=rng)
        obvious = traffic(obvious_attention, q, k, v) / 1e3
        online = traffic(online_attention, q, k, v, BLOCK) / 1e3
        kernel = launch(q, k, v)[1] / 1e3
        columns = {"obvious, KB": obvious, "online, KB": online, "kernel, KB": kernel}
        results[f"{n} ({LENGTHS[n]})"] = columns
    checker.check("bytes: obvious over kernel", obvious / kernel, obvious / online, low=2)
    print_table("tokens", results)


if __name__ == "__main__":
    run_lab(main, __doc__, ["softmax", "online_attention", "attention_kernel"], globals())
