"""Our kernels against what people use today, on one GPU, after they have proved to be right.

    python -m tools.bench_kernels                   # correctness, a profiled step, the tables, the tile sweep
    python -m tools.bench_kernels --only correct    # or step, attention, prototypes, tiles
    python -m tools.bench_kernels --only attention --peers FlexAttention,xFormers,flash-attn
    TRITON_INTERPRET=1 python -m tools.bench_kernels    # dry: the same logic in miniature, without a GPU

Appends each row to results/gpu/kernels.jsonl (a dry run: nowhere) and prints the tables at the end. Times are
medians of CUDA graphs of ten calls over rotating inputs, which do not fit the L2 cache together; providers
take turns in three rounds. A peer pays for the copies that its layout needs. Before it is timed, each is
compared with float64, output and gradient; one that is wrong, or cannot do a shape, is listed with the
reason. For "ours, with another ptxas", run it again with TRITON_PTXAS_PATH and --out.

Every part is a process of its own (isolation.py), and so is every row, those of the losses apart: so the
correctness of fourteen cases is compiled on all cores at once. results/gpu.py calls the same parts within its
budget.
"""

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import config
import distributed as dist
import train
from kernels import attention, prototypes
from losses import cross_entropy, sinkhorn_knopp
from optim import compute_schedules
from runfolder import environment
from tools.isolation import INTERPRETED as DRY
from tools.isolation import describe_error, run_isolated

ROOT = Path(__file__).parents[1]
DEVICE = "cpu" if DRY else "cuda"
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
MAX_ERROR = 8  # eps: the largest error over the largest number; kernels that are right stay below 3
REPEATS = 1 if DRY else 20  # times the same bits


class AttentionCase(NamedTuple):
    """A shape of attention, in bf16."""

    groups: list[tuple[int, int]]  # (sequences, tokens of each)
    heads: int
    width: int  # of a head


MULTI_CROP = {
    "ViT-L multi-crop": AttentionCase([(128, 261), (512, 54)], 16, 64),
    "ViT-L globals, 261": AttentionCase([(128, 261)], 16, 64),
    "ViT-L locals, 54": AttentionCase([(512, 54)], 16, 64),
    "ViT-L multi-crop, drop path .4": AttentionCase([(77, 261), (307, 54)], 16, 64),
    "ViT-S multi-crop": AttentionCase([(128, 261), (512, 54)], 6, 64),
    "ViT-g multi-crop": AttentionCase([(128, 261), (512, 54)], 24, 64),
}
LONG = {
    "ViT-L 518 px, 1374": AttentionCase([(16, 1374)], 16, 64),
    "ViT-L 518 px, 1374, batch 128": AttentionCase([(128, 1374)], 16, 64),
    "512": AttentionCase([(32, 512)], 16, 64),
    "1k": AttentionCase([(16, 1024)], 16, 64),
    "4k": AttentionCase([(4, 4096)], 16, 64),
    "1k, heads of 128": AttentionCase([(16, 1024)], 16, 128),
}
LENGTHS = {  # width of a head: the lengths that are checked, a process for each tuple
    64: [(*range(1, 18), 41, 54, 63, 64), (65, 129, 197, 201, 257, 261, 272), (273, 512, 1374)],
    **{D: [(197, 201, 257, 261, 272, 273, 512, 1374)] for D in (32, 80, 96, 128)},
}
LOOP_KERNELS = ("fwd_loop", "dq_loop", "dkdv_loop")  # in the order of attention.TILES
CANDIDATE_TILES = {  # of the sweep: (BM, BN, warps, stages)
    "fwd_loop": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
                 (128, 128, 8, 2)],
    "dq_loop": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (128, 64, 8, 2)],
    "dkdv_loop": [(64, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)],
}  # fmt: skip
if DRY:
    MULTI_CROP = {"ViT-L multi-crop": AttentionCase([(1, 70), (2, 20)], 1, 32)}
    LONG = {name: AttentionCase([(1, 30)], 1, 32) for name in ("ViT-L 518 px, 1374, batch 128", "1k")}
    LENGTHS = {64: [(54,)], 32: [(70,)]}
    CANDIDATE_TILES = {"fwd_loop": [(64, 64, 4, 2)], "dkdv_loop": [(64, 64, 4, 2)]}


def row_writer(path, aloud=True):
    """-> write_row(part, **row), which appends a line of JSON to `path` (None: nowhere) and prints it."""

    def write_row(part, **row):
        line = json.dumps(dict(part=part, **row))
        if aloud:
            print(line, flush=True)
        if path:
            with open(path, "a") as f:
                f.write(line + "\n")

    return write_row


def read_rows(path):
    """The rows of such a file, none without it; a line torn when its part was stopped is left out."""
    rows = []
    lines = Path(path).read_bytes().splitlines() if Path(path).is_file() else ()
    for line in lines:
        with suppress(ValueError, TypeError):
            rows.append({"part": "", **config.parse_json(line)})
    return rows


# ---------------------------------------------------------------- the peers
# Each takes the groups, prepares what is made once per batch shape, and returns a function of qkv.


def prepare_ours(groups):
    return lambda qkv: attention.attention(qkv, groups)


def prepare_sdpa(backend, groups):
    """One dense call per group: the best case of every SDPA backend, which know no groups."""
    sizes = [count * length for count, length in groups]

    def call(qkv):
        parts = qkv.split(sizes) if len(sizes) > 1 else [qkv]  # the gradient of a split is one copy
        outs = []
        with sdpa_kernel(backend):
            for part, group in zip(parts, groups):
                q, k, v = part.unflatten(0, group).permute(2, 0, 3, 1, 4).unbind()
                outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return call


def sequence_lengths(groups):
    """-> the length of each sequence, int64 (sequences,)."""
    return torch.cat([torch.full((count,), length) for count, length in groups])


def sequence_offsets(groups):
    """-> where each sequence begins (int32, and the end), and the longest length."""
    lengths = sequence_lengths(groups)
    return F.pad(lengths.cumsum(0), (1, 0)).to(DEVICE, torch.int32), int(lengths.max())


def prepare_varlen(groups):
    """FlashAttention, as PyTorch brings it. It takes strided q, k, v; the gradient pays for one copy."""
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = sequence_offsets(groups)
    return lambda qkv: varlen_attn(*qkv.unbind(1), offsets, offsets, longest, longest)


def prepare_flash_attn(groups):
    from flash_attn import flash_attn_varlen_qkvpacked_func

    offsets, longest = sequence_offsets(groups)
    return lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, offsets, longest)


def prepare_xformers(groups):
    from xformers.ops import fmha

    bias = fmha.BlockDiagonalMask.from_seqlens(sequence_lengths(groups).tolist())

    def call(qkv):
        q, k, v = (x.unsqueeze(0) for x in qkv.unbind(1))
        return fmha.memory_efficient_attention(q, k, v, attn_bias=bias)[0]

    return call


def prepare_flex(groups):
    """FlexAttention, compiled. Its block mask is made from a mask of all tokens x all tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = sequence_lengths(groups)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(DEVICE)  # of each token
    T = len(sequence)
    needed = 10 * T * T  # bytes
    if needed > 0.8 * torch.cuda.mem_get_info()[0]:
        raise MemoryError(f"its block mask needs {needed / 1e9:.0f} GB while it is made")
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would run eagerly, under this name
    mask = create_block_mask(lambda b, h, i, j: sequence[i] == sequence[j], None, None, T, T, DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(qkv):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return call


PEERS = {
    "ours": prepare_ours,
    "SDPA flash": partial(prepare_sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(prepare_sdpa, SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": partial(prepare_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "varlen_attn": prepare_varlen,
}
if DRY:
    PEERS = {"ours": prepare_ours, "SDPA math": partial(prepare_sdpa, SDPBackend.MATH)}
PEERS_ON_REQUEST = {  # slow to start, or not there
    "FlexAttention": prepare_flex,
    "xFormers": prepare_xformers,
    "flash-attn": prepare_flash_attn,
}


def prepare_copies(qkv):
    """Not attention: plain copies of as many bytes as forward, and forward + backward, must move."""
    source = qkv.detach().flatten()
    target = torch.empty_like(source)
    size = len(source) // 3 * 2  # two tensors read and two written: q, k, v and the output are four
    forward = partial(target[:size].copy_, source[:size])

    def both():  # backward moves eight more, so twelve in all: three read and three written, twice
        target.copy_(source)
        target.copy_(source)

    return forward, both


# ---------------------------------------------------------------- the clock


def time_calls(calls, repeat=20):
    """-> median seconds of one of `calls`, which take no arguments, and how: ten in a CUDA graph, or not."""
    if DRY:
        begin = time.perf_counter()
        calls[0]()
        return time.perf_counter() - begin, "dry"
    ten = [calls[i % len(calls)] for i in range(10)]
    for call in ten[:4]:  # warm up
        call()
    replay, how = capture_graph(ten)
    first = gpu_seconds(replay)
    repeat = min(repeat, max(3, int(0.2 / first)))  # a slow call needs fewer repeats
    return statistics.median(gpu_seconds(replay) for _ in range(repeat)) / 10, how


def capture_graph(calls):
    """-> a function that makes all the calls, and "graph"; or "eager", if one synchronises inside."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return lambda: [call() for call in calls], "eager"


def gpu_seconds(call):
    """How long it takes by the GPU's own clock."""
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_memory(call):
    """Bytes at the peak of a call, above what was allocated before."""
    if DRY:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run_forward(function, qkv):
    with torch.no_grad():
        return function(qkv)


def run_both(function, qkv, dout):
    """Forward and backward -> the gradient of qkv."""
    return torch.autograd.grad(function(qkv), qkv, dout)[0]


# ---------------------------------------------------------------- right or wrong


def random_inputs(groups, H, D, dtype=torch.float16 if DRY else torch.bfloat16, number=1):
    """Random numbers, never zeros, which run faster -> [qkv, ...], and the gradient of the output."""
    torch.manual_seed(0)
    T = sum(count * length for count, length in groups)
    tensors = [torch.randn(T, 3, H, D, device=DEVICE).to(dtype).requires_grad_() for _ in range(number)]
    return tensors, torch.randn(T, H, D, device=DEVICE).to(dtype)


def exact_attention(qkv, dout, groups):
    """Output and gradient by float64, as many sequences at a time as have maps of a gigabyte."""
    outs = []
    grads = []
    start = 0
    for count, length in groups:
        at_once = max(1, 2**27 // (qkv.shape[2] * length * length))
        for sequences in torch.arange(count).split(at_once):
            stop = start + len(sequences) * length
            exact = qkv.detach()[start:stop].double().requires_grad_()
            out = attention.reference(exact, [(len(sequences), length)])[0]
            (grad,) = torch.autograd.grad(out, exact, dout[start:stop].double())
            outs.append(out.detach().float())
            grads.append(grad.float())
            start = stop
    return torch.cat(outs), torch.cat(grads)


def error_in_eps(found, exact, dtype):
    """The largest difference over the largest number, in eps; NaN if anything is NaN."""
    return ((found.float() - exact).abs().max() / exact.abs().max()).item() / EPS[dtype]


def poison_memory(*like):
    """Fill memory with NaN and free it: a kernel that takes it next and leaves a hole shows it."""
    for x in like:
        torch.full_like(x, torch.nan)


def check_attention(function, qkv, dout, exact):
    """-> errors of output and gradient in eps; ValueError if one is too large, or NaN."""
    poison_memory(dout, qkv)
    out = run_forward(function, qkv)
    poison_memory(qkv)
    grad = run_both(function, qkv, dout)
    errors = (error_in_eps(out, exact[0], qkv.dtype), error_in_eps(grad, exact[1], qkv.dtype))
    for name, error in zip(("output", "gradient"), errors):
        if not error < MAX_ERROR:
            raise ValueError(f"the {name} is wrong by {error:.1f} eps")
    return errors


def check_determinism(function, qkv, dout):
    """Kernels without atomics give the same bits every time: this is what finds a race."""
    out = run_forward(function, qkv)
    grad = run_both(function, qkv, dout)
    for _ in range(REPEATS):
        same_out = torch.equal(out, run_forward(function, qkv))
        same_grad = torch.equal(grad, run_both(function, qkv, dout))
        if not (same_out and same_grad):
            raise ValueError("the same input gave other bits")


def describe_case(dtype, D, lengths):
    return f"{describe_dtype(dtype)}, heads of {D}, {lengths[0]} to {lengths[-1]} tokens"


def describe_dtype(dtype):
    return str(dtype).removeprefix("torch.")


def check_attention_case(write_row, dtype, D, lengths):
    """One family of kernels against float64 at each length, then the same bits again and again."""
    began = time.monotonic()
    worst = 0.0
    for length in lengths:
        groups = [(2, length), (1, 54)]
        (qkv,), dout = random_inputs(groups, 1 if DRY else 3, D, dtype)
        function = prepare_ours(groups)
        try:
            errors = check_attention(function, qkv, dout, exact_attention(qkv, dout, groups))
            check_determinism(function, qkv, dout)
        except Exception as e:
            case = f"{length} tokens, heads of {D}, {describe_dtype(dtype)}"
            raise RuntimeError(f"{case}: {describe_error(e)}") from e
        worst = max(worst, *errors)
    write_row("correct", row=describe_case(dtype, D, lengths), worst_error_in_eps=worst, repeats=REPEATS,
              seconds=time.monotonic() - began)  # fmt: skip


def rising_logits(n, K, dtype):
    """(n, K) whose maximum grows from block to block, so that every running sum must be rescaled."""
    block = torch.arange(K, device=DEVICE) // prototypes.BLOCK
    return (0.03 * block - 0.5 * torch.rand(n, K, device=DEVICE)).to(dtype)


def check_losses(write_row):
    """The loss, its gradient and Sinkhorn-Knopp against float64, with the largest logit in the last block."""
    began = time.monotonic()
    n, K = (2, 3 * prototypes.BLOCK) if DRY else (300, 131072)
    dtype = torch.float32 if DRY else torch.bfloat16
    tau = 0.07
    temp = 0.1
    torch.manual_seed(0)
    student = rising_logits(n, K, dtype)
    teacher = rising_logits(n, K, dtype)
    potential = 0.1 * torch.randn(K, device=DEVICE)
    weights = torch.rand(n, device=DEVICE)

    def our_loss():
        """-> loss, gradient."""
        logits = student.clone().requires_grad_()  # its memory will hold the gradient
        loss = prototypes.soft_cross_entropy(logits, prototypes.SoftTargets(teacher, potential, tau), temp)
        return loss.detach(), torch.autograd.grad(loss, logits, weights)[0]

    target = (teacher.double() / tau + potential).softmax(1)
    exact_loss = -(target * (student.double() / temp).log_softmax(1)).sum(1)
    probabilities = (student.double() / temp).softmax(1)
    scale = weights.double()[:, None] / temp
    exact_grad = scale * (probabilities - target)
    # Rounded once to the type of the logits; and exp2 of a number of 100 is itself right to 1e-5.
    allowed = EPS[dtype] * exact_grad.abs() + 1e-4 * scale * (probabilities + target) + 1e-30
    loss, grad = our_loss()
    sinkhorn = prototypes.sinkhorn_targets(teacher, tau).probabilities()
    exact_sinkhorn = sinkhorn_in_float64(teacher, tau)
    errors = dict(
        loss=((loss - exact_loss) / exact_loss).abs().max().item() / 1e-4,
        gradient=((grad - exact_grad).abs() / allowed).max().item(),
        sinkhorn=((sinkhorn - exact_sinkhorn).abs().max() / sinkhorn.max()).item() / 1e-3,
    )
    for _ in range(REPEATS - 1):
        again = our_loss()
        if not (torch.equal(loss, again[0]) and torch.equal(grad, again[1])):
            raise ValueError("loss or gradient: the same input gave other bits")
    if not all(error < 1 for error in errors.values()):  # nor NaN
        raise ValueError(f"off by so many times what is allowed: {errors}")
    write_row("correct", row="losses", shares_of_allowed_error=errors, rows=n, prototypes=K, repeats=REPEATS,
              seconds=time.monotonic() - began)  # fmt: skip


def sinkhorn_in_float64(logits, tau, iterations=3):
    """losses.sinkhorn_knopp by logarithms, in float64."""
    z = logits.double() / tau
    for _ in range(iterations):
        z = z - z.logsumexp(0, keepdim=True)
        z = z - z.logsumexp(1, keepdim=True)
    return z.exp()


# ---------------------------------------------------------------- the parts
# Each takes write_row(part, **row). They fork, so they must be called before this process touches CUDA.


def run_rows(write_row, part, rows, tolerant=False, **options):
    """{name: function} in processes of their own; those that fail become rows too.

    options: of run_isolated. RuntimeError if any row has failed; if `tolerant`, only if all have.
    """
    outcomes = run_isolated(rows, **options)
    failures = {name: outcome.failure for name, outcome in outcomes.items() if outcome.failure}
    for name, failure in failures.items():
        write_row(part, row=name, failed=failure)
    if failures and (len(failures) == len(rows) or not tolerant):
        raise RuntimeError(f"{len(failures)} of {len(rows)} rows: " + "; ".join(failures.values()))


def run_correct(write_row):
    """Everything against float64, and the same bits again; families of kernels compile side by side."""
    attention.CHOICE = "triton"
    dtypes = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)
    rows = {}
    for D, families in LENGTHS.items():
        for lengths, dtype in itertools.product(families, dtypes):
            check = partial(check_attention_case, write_row, dtype, D, lengths)
            rows[describe_case(dtype, D, lengths)] = check
    rows["losses"] = partial(check_losses, write_row)
    run_rows(write_row, "correct", rows, parallel=min(8, os.cpu_count() or 1), limit=120)


def run_step(write_row):
    """A profiled training step: our operators in every block, PyTorch's attention nowhere."""
    attention.CHOICE = "triton"
    preset, batch = ("debug", 2) if DRY else ("vits14", 16)
    settings = ["train.num_workers=0", "train.dataset_path=scenes:100", "speed.compile=off"]
    cfg = config.load(model=preset, overrides=[f"train.batch_size_per_gpu={batch}", *settings])
    device = dist.setup(cfg.speed.device)
    state = train.TrainState(cfg, device)
    loader = train.make_loader(cfg, train.open_dataset(cfg.train.dataset_path, cfg.data), device)
    with torch.profiler.profile() as profile:
        train.train_step(state, [next(loader)], compute_schedules(cfg, 0, 1), cfg)
    calls = {event.key: event.count for event in profile.key_averages()}
    depth = len(state.student.backbone.blocks)
    expected = {"nanodino::attention_forward": 2 * depth, "nanodino::attention_backward": depth}
    found = {name: calls.get(name, 0) for name in expected}
    others = [name for name in calls if re.search("scaled_dot_product|_(flash|efficient)_attention", name)]
    if found != expected or others:
        raise ValueError(f"a step of {depth} blocks calls {found}, and besides {others}")
    write_row("step", model=preset, blocks=depth, calls=found)


def run_attention(write_row, cases=None, peers=(), part="attention"):
    """The table of attention."""
    attention.CHOICE = "triton"
    competitors = PEERS | {name: PEERS_ON_REQUEST[name] for name in peers}
    rows = {}
    for name, case in (cases or MULTI_CROP | LONG).items():
        rows[name] = partial(compare_attention, write_row, part, name, case, competitors)
    run_rows(write_row, part, rows, limit=90)


def compare_attention(write_row, part, name, case, competitors):
    """A row of the table: first everybody is checked, then they take turns on the clock."""
    groups, H, D = case
    flop = sum(4 * count * n * n * D * H for count, n in groups)
    size = 2 * H * D * sum(count * n for count, n in groups)  # bytes of q, of k, of v, of the output
    tensors, dout = random_inputs(groups, H, D, number=max(2, min(8, int(2e8 / (3 * size)) + 1)))
    functions, errors, failed = check_peers(competitors, tensors[0], dout, groups)
    calls = {"copy": tuple(zip(*map(prepare_copies, tensors)))}
    for peer, function in functions.items():
        forward = [partial(run_forward, function, x) for x in tensors]
        both = [partial(run_both, function, x, dout) for x in tensors]
        calls[peer] = (forward, both)
    clock_before = sm_clock()
    times, memory, how = time_peers(calls, failed)
    rivals = [peer for peer in times if peer not in ("ours", "copy")]
    ratio_forward = ratio_both = None
    if rivals and "ours" in times:
        ratio_forward = min(times[peer][0] for peer in rivals) / times["ours"][0]
        ratio_both = min(times[peer][1] for peer in rivals) / times["ours"][1]
    write_row(part, row=name, groups=groups, heads=H, width=D, errors_in_eps=errors, peers_failed=failed,
              ratio_forward=ratio_forward, ratio_both=ratio_both,
              forward_ms={peer: 1e3 * forward for peer, (forward, _) in times.items()},
              both_ms={peer: 1e3 * both for peer, (_, both) in times.items()},
              peak_mb={peer: used / 2**20 for peer, used in memory.items()}, clock=how,
              sm_mhz=[clock_before, sm_clock()], **achieved_rates(flop, size, times.get("ours")))  # fmt: skip
    if "ours" in failed:
        raise RuntimeError(failed["ours"])


def check_peers(competitors, qkv, dout, groups):
    """-> {peer: function} of those that are right here, {peer: errors}, {peer: why it is not}."""
    exact = exact_attention(qkv, dout, groups)
    functions = {}
    errors = {}
    failed = {}
    for peer, prepare in competitors.items():
        try:
            function = prepare(groups)
            errors[peer] = check_attention(function, qkv, dout, exact)
            functions[peer] = function
        except Exception as e:  # not installed, cannot do this shape, or wrong
            failed[peer] = describe_error(e)
    return functions, errors, failed


def time_peers(calls, failed):
    """{peer: (forward calls, calls of both)} -> {peer: [seconds, seconds]}, {peer: bytes}, {peer: how}.

    The best of three rounds. A peer that fails is left out, and added to `failed`.
    """
    best = {}
    memory = {}
    how = {}
    for _ in range(1 if DRY else 3):
        for peer, (forward, both) in calls.items():
            if peer in failed:
                continue
            try:
                forward_seconds, how[peer] = time_calls(forward)
                both_seconds, _ = time_calls(both)
                memory[peer] = peak_memory(both[0])
            except Exception as e:
                failed[peer] = describe_error(e)
                continue
            earlier = best.get(peer, [math.inf, math.inf])
            best[peer] = [min(earlier[0], forward_seconds), min(earlier[1], both_seconds)]
    return {peer: times for peer, times in best.items() if peer not in failed}, memory, how


MEASURED_LIMITS = {}  # "flops" and "bytes" per second of this card; results/gpu.py fills them in


def hardware_limits():
    """-> FLOP/s and bytes/s that this card can do: measured, or else its data sheet's."""
    fast_memory = not DRY and "H200" in torch.cuda.get_device_name()
    data_sheet = dict(flops=989e12, bytes=4.8e12 if fast_memory else 3.35e12)
    limits = data_sheet | MEASURED_LIMITS
    return limits["flops"], limits["bytes"]


def achieved_rates(flop, size, seconds):
    """Ours beside the chip: TFLOP/s of the method, GB/s that must be moved, share of the floor of both.

    flop: of forward; size: bytes of one tensor; seconds: of forward, and of forward + backward, or None.
    Forward reads q, k, v and writes the output, 4 tensors; backward moves 8 and does 2.5 times the work.
    """
    if seconds is None:
        return {}
    max_flops, max_bandwidth = hardware_limits()
    rates = {}
    for name, work, moved, spent in (("forward", flop, 4 * size, seconds[0]),
                                     ("both", 3.5 * flop, 12 * size, seconds[1])):  # fmt: skip
        rates[f"tflops_{name}"] = work / spent / 1e12
        rates[f"gb_per_s_{name}"] = moved / spent / 1e9
        rates[f"share_of_floor_{name}"] = max(work / max_flops, moved / max_bandwidth) / spent
    return rates


def ibot_gradient(make_targets, loss, student, teacher):
    """Targets, loss and gradient of the masked patches -> the gradient.

    Ours writes it over the student's logits, so from the second call on they are small; that takes as long.
    """
    return torch.autograd.grad(loss(student, make_targets(teacher)).mean(), student)[0]


def soft_targets(potential, logits):
    return prototypes.SoftTargets(logits, potential, 0.07)


def written_targets(potential, logits):
    return soft_targets(potential, logits).probabilities()


def run_prototypes(write_row):
    """The iBOT loss and Sinkhorn-Knopp: plain, compiled, ours."""
    attention.CHOICE = "triton"
    n, K = (7, 300) if DRY else (4915, 131072)
    dtype = torch.float32 if DRY else torch.bfloat16
    student = torch.randn(n, K, device=DEVICE).to(dtype).requires_grad_()
    teacher = (0.2 * torch.randn(n, K, device=DEVICE)).to(dtype)
    potential = 0.1 * torch.randn(K, device=DEVICE)
    overwritten = student.detach().clone().requires_grad_()
    soft = partial(soft_targets, potential)
    written = partial(written_targets, potential)
    compiled = (lambda function: function) if DRY else partial(torch.compile, dynamic=False)
    compare_losses(write_row, "iBOT loss", dict(rows=n, prototypes=K), {
        "ours": partial(ibot_gradient, soft, prototypes.soft_cross_entropy, overwritten, teacher),
        "eager": partial(ibot_gradient, written, cross_entropy, student, teacher),
        "torch.compile": partial(ibot_gradient, compiled(written), compiled(cross_entropy), student, teacher),
    })  # fmt: skip
    compare_losses(write_row, "Sinkhorn-Knopp", dict(rows=n, prototypes=K), {
        "ours": partial(prototypes.sinkhorn_targets, teacher, tau=0.07),
        "eager": partial(sinkhorn_knopp, teacher, tau=0.07),
        "torch.compile": partial(compiled(sinkhorn_knopp), teacher, tau=0.07),
    })  # fmt: skip


def compare_losses(write_row, name, facts, functions):
    """A row of the table of losses: time and memory of each function."""
    seconds = {}
    memory = {}
    failed = {}
    for peer, function in functions.items():
        try:
            spent, _ = time_calls([function], repeat=5)
            memory[peer] = peak_memory(function) / 2**20
            seconds[peer] = spent
        except Exception as e:
            failed[peer] = describe_error(e)
    ratios = {}
    if "ours" in seconds:
        ratios = {peer: spent / seconds["ours"] for peer, spent in seconds.items() if peer != "ours"}
    write_row("prototypes", row=name, ms={peer: 1e3 * spent for peer, spent in seconds.items()},
              peak_mb=memory, ratio=ratios, peers_failed=failed, **facts)  # fmt: skip


def run_tiles(write_row):
    """Other tiles for the loops, each checked before it is timed."""
    attention.CHOICE = "triton"
    rows = {}
    for kernel, tiles in CANDIDATE_TILES.items():
        for tile in tiles:
            rows[f"{kernel} {tile}"] = partial(measure_tile, write_row, kernel, tile)
    run_rows(write_row, "tiles", rows, tolerant=True, limit=60)  # some do not fit the chip


def measure_tile(write_row, kernel, tile):
    """One candidate in the place of what is shipped. The process ends afterwards, and with it the change."""
    groups, H, D = ([(1, 70)], 1, 32) if DRY else ([(16, 1374)], 16, 64)
    has_registers = DRY or torch.cuda.get_device_capability() >= (9, 0)
    shipped = attention.TILES[has_registers, False]
    position = LOOP_KERNELS.index(kernel)
    attention.TILES[has_registers, False] = (*shipped[:position], tile, *shipped[position + 1 :])
    tensors, dout = random_inputs(groups, H, D, number=2)
    function = prepare_ours(groups)
    errors = check_attention(function, tensors[0], dout, exact_attention(tensors[0], dout, groups))
    forward, _ = time_calls([partial(run_forward, function, x) for x in tensors])
    both, _ = time_calls([partial(run_both, function, x, dout) for x in tensors])
    write_row("tiles", row=f"{kernel} {tile}", kernel=kernel, tile=tile, shipped=tile == shipped[position],
              errors_in_eps=errors, forward_ms=1e3 * forward, both_ms=1e3 * both)  # fmt: skip


# ---------------------------------------------------------------- the machine


def command_output(*command):
    """What a command prints, or nothing if it is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def sm_clock():
    """MHz of the multiprocessors, 0 if unknown: a row during which it moved by 3 % is not worth much."""
    printed = command_output("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
    number = re.search(r"\d+", printed)
    return int(number[0]) if number else 0


def write_machine(write_row, commit=""):
    """A row with environment.json's facts and those of the GPU; the rows after it were measured there."""
    facts = environment()
    for key in ("git_diff", "command"):
        del facts[key]
    shipped_ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptxas = os.environ.get("TRITON_PTXAS_PATH", shipped_ptxas)
    ptxas_version = re.search(r"V([\d.]+)", command_output(ptxas, "--version"))
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,power.limit"
    facts["triton"] = triton.__version__
    facts["ptxas"] = ptxas_version[1] if ptxas_version else "unknown"
    facts["gpu_state"] = command_output("nvidia-smi", query, "--format=csv")
    facts["dry"] = DRY
    if commit:
        facts["git_commit"] = commit
    write_row("machine", **facts)


def machine_line(row):
    """A machine in one line."""
    gpu = row["gpus"][0] if row["gpus"] else "no GPU"
    commit = row["git_commit"][:10] or "unknown"
    return f"{gpu}, torch {row['torch']}, triton {row['triton']}, ptxas {row['ptxas']}, commit {commit}"


# ---------------------------------------------------------------- the tables


def kernel_tables(rows):
    """The tables of README.md, from the rows of one machine."""
    tables = attention_table([row for row in rows if "forward_ms" in row and row["part"] != "tiles"])
    tables += loss_table([row for row in rows if row["part"] == "prototypes" and "ms" in row])
    return "\n".join(tables)


def attention_table(rows):
    if not rows:
        return []
    peers = list(dict.fromkeys(itertools.chain.from_iterable(row["forward_ms"] for row in rows)))
    lines = ["Forward / forward + backward, milliseconds. A dash: it cannot do this shape, or was wrong.", ""]
    lines.append("| row | " + " | ".join(peers) + " | best peer / ours |")
    lines.append("|---" + "|--:" * (len(peers) + 1) + "|")
    for row in rows:
        cells = [row["row"]]
        for peer in peers:
            if peer in row["forward_ms"]:
                cells.append(f"{row['forward_ms'][peer]:.3f} / {row['both_ms'][peer]:.3f}")
            else:
                cells.append("-")
        if row["ratio_forward"]:
            cells.append(f"{row['ratio_forward']:.2f} / {row['ratio_both']:.2f}")
        else:
            cells.append("-")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def loss_table(rows):
    if not rows:
        return []
    peers = ("ours", "eager", "torch.compile")
    lines = ["Milliseconds, and peak memory above the logits.", ""]
    lines += ["| loss | " + " | ".join(peers) + " |", "|---" + "|--:" * len(peers) + "|"]
    for row in rows:
        cells = [row["row"]]
        for peer in peers:
            if peer in row["ms"]:
                cells.append(f"{row['ms'][peer]:.2f}, {row['peak_mb'][peer]:.0f} MB")
            else:
                cells.append("-")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main(argv=None):
    parts = dict(correct=run_correct, step=run_step, attention=run_attention, prototypes=run_prototypes,
                 tiles=run_tiles)  # fmt: skip
    parser = argparse.ArgumentParser(
        "python -m tools.bench_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=parts, help="one part")
    parser.add_argument("--peers", default="", help=f"more of them: {', '.join(PEERS_ON_REQUEST)}")
    parser.add_argument("--out", default="", help="the JSON lines (default: results/gpu/kernels.jsonl)")
    args = parser.parse_args(argv)
    peers = [name for name in args.peers.split(",") if name]
    unknown = set(peers) - set(PEERS_ON_REQUEST)
    if unknown:
        raise config.UserError(f"there is no peer {unknown.pop()}: take {', '.join(PEERS_ON_REQUEST)}")
    if not DRY and "GPU" not in command_output("nvidia-smi", "-L"):
        raise config.UserError("nvidia-smi sees no GPU here: TRITON_INTERPRET=1 runs the logic in miniature")
    out = args.out
    if not out and not DRY:
        out = ROOT / "results" / "gpu" / "kernels.jsonl"
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    parts["attention"] = partial(run_attention, peers=peers)
    chosen = {"machine": partial(write_machine, row_writer(out))}
    for name, part in parts.items():
        if args.only in (None, name):
            chosen[name] = partial(part, row_writer(out))
    outcomes = run_isolated(chosen, own_group=True)
    if out:
        print("\n" + kernel_tables(read_rows(out)))
    failures = {name: outcome.failure for name, outcome in outcomes.items() if outcome.failure}
    for name, failure in failures.items():
        print(f"{name} failed: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    config.run(main)
