"""The race: our kernels against what people use today, on one GPU, after they have proved to be right.

    python kernels/bench.py                      # correctness, a profiled step, the tables, the tile sweep
    python kernels/bench.py --only correct       # or step, attention, prototypes, tiles
    python kernels/bench.py --only attention --peers FlexAttention,xFormers,flash-attn
    TRITON_INTERPRET=1 python kernels/bench.py   # dry: the same logic in miniature, without a GPU

Appends each row to results/gpu/kernels.jsonl (a dry run: nowhere) and prints the tables at the end. Times are
medians of CUDA graphs of ten calls over rotating inputs, which do not fit the L2 cache together; providers
take turns in three rounds. A peer pays for the copies that its layout needs. Whoever races has been compared
with float64 before, output and gradient; who is wrong, or cannot do a shape, is listed with the reason. For
"ours, with another ptxas", run it again with TRITON_PTXAS_PATH and --out.

What is unusual here: every part, and every row of a table, is a forked process. A crash, a hang or an illegal
address costs one row, and the correctness of fourteen cases is compiled on all cores at once.
For that the parent must never touch CUDA itself. results/gpu.py calls the same parts within its budget.
"""

import argparse
import gc
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # "is there a GPU?" without starting CUDA
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import config  # noqa: E402
import distributed as dist  # noqa: E402
import train  # noqa: E402
from kernels import attention as A  # noqa: E402
from kernels import prototypes as P  # noqa: E402
from losses import cross_entropy, sinkhorn_knopp  # noqa: E402
from optim import compute_schedules  # noqa: E402
from runfolder import environment  # noqa: E402

ROOT = Path(__file__).parent.parent
DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
WRONG = 8  # eps: the largest error over the largest number; kernels that are right stay below 3
REPEATS = 1 if DRY else 20  # times the same bits
MULTI_CROP = {  # name: (groups of (sequences, tokens), heads, width of a head), bf16
    "ViT-L multi-crop": ([(128, 261), (512, 54)], 16, 64),
    "ViT-L globals, 261": ([(128, 261)], 16, 64),
    "ViT-L locals, 54": ([(512, 54)], 16, 64),
    "ViT-L multi-crop, drop path .4": ([(77, 261), (307, 54)], 16, 64),
    "ViT-S multi-crop": ([(128, 261), (512, 54)], 6, 64),
    "ViT-g multi-crop": ([(128, 261), (512, 54)], 24, 64),
}
LONG = {
    "ViT-L 518 px, 1374": ([(16, 1374)], 16, 64),
    "ViT-L 518 px, 1374, batch 128": ([(128, 1374)], 16, 64),
    "512": ([(32, 512)], 16, 64),
    "1k": ([(16, 1024)], 16, 64),
    "4k": ([(4, 4096)], 16, 64),
    "1k, heads of 128": ([(16, 1024)], 16, 128),
}
LENGTHS = {  # head width: the lengths that are checked, a process for each tuple
    64: [(*range(1, 18), 41, 54, 63, 64), (65, 129, 197, 201, 257, 261, 272), (273, 512, 1374)],
    **{D: [(197, 201, 257, 261, 272, 273, 512, 1374)] for D in (32, 80, 96, 128)},
}
TILES = {  # candidates of the sweep: (BM, BN, warps, stages)
    "fwd_loop": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
                 (128, 128, 8, 2)],
    "dq_loop": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (128, 64, 8, 2)],
    "dkdv_loop": [(64, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)],
}  # fmt: skip
if DRY:
    MULTI_CROP = {"ViT-L multi-crop": ([(1, 70), (2, 20)], 1, 32)}
    LONG = {name: ([(1, 30)], 1, 32) for name in ("ViT-L 518 px, 1374, batch 128", "1k")}
    LENGTHS = {64: [(54,)], 32: [(70,)]}
    TILES = {"fwd_loop": [(64, 64, 4, 2)], "dkdv_loop": [(64, 64, 4, 2)]}


# ---------------------------------------------------------------- processes


def forked(tasks, at_once=1, limit=600, leader=False):
    """Call each of {name: function} in a process of its own -> {name: (why it failed or "", seconds)}.

    `limit`: seconds of each. A `leader` is killed together with all that it has started.
    """
    waiting = list(tasks)
    running, ended = {}, {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            running[name] = (*start(tasks[name], leader), time.monotonic())
        for name, (pid, pipe, began) in list(running.items()):
            seconds = time.monotonic() - began
            reason = outcome(pid, pipe, seconds > limit)
            if reason is not None:
                ended[name] = reason, seconds
                del running[name]
        time.sleep(0.02)
    return ended


def start(task, leader):
    """-> pid, and the pipe through which the child says why it failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        be_child(task, write_end, leader)
    os.close(write_end)
    os.set_blocking(read_end, False)  # what the child has started may keep the other end open
    return pid, read_end


def be_child(task, pipe, leader):
    """Never returns."""
    code = 1
    try:
        gc.freeze()  # each CUDA graph begins with a gc.collect(): it need not look at all that was imported
        if leader:
            os.setsid()
        if DRY:
            torch.set_num_threads(1)  # a pool of threads does not survive the fork
        task()
        code = 0
    except BaseException as e:  # also SystemExit: a script may end so
        traceback.print_exc()
        os.write(pipe, said(e).encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def outcome(pid, pipe, late):
    """None while the child runs; then why it failed, or ""."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done and not late:
        return None
    try:
        os.killpg(pid, signal.SIGKILL)  # the child if it is late, and whatever it has left running
    except ProcessLookupError:
        if not done:
            os.kill(pid, signal.SIGKILL)
    if not done:
        os.waitpid(pid, 0)
        os.close(pipe)
        return "stopped: it took too long"
    try:
        reason = os.read(pipe, 4096).decode(errors="replace")
    except BlockingIOError:
        reason = ""
    os.close(pipe)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return ""
    return reason or f"ended with code {code}, without a word"


def said(error):
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def writer(path, aloud=True):
    """-> report(part, **row), which appends a line of JSON to `path` (None: nowhere) and prints it."""

    def report(part, **row):
        line = json.dumps(dict(part=part, **row))
        if aloud:
            print(line, flush=True)
        if path:
            with open(path, "a") as f:
                f.write(line + "\n")

    return report


# ---------------------------------------------------------------- the peers
# Each takes the groups, prepares what is made once per batch shape, and returns a function of qkv.


def ours(groups):
    return lambda qkv: A.attention(qkv, groups)


def dense(backend, groups):
    """One dense call per group: the best case of every SDPA backend, which know no groups."""
    sizes = [count * n for count, n in groups]

    def call(qkv):
        parts = qkv.split(sizes) if len(sizes) > 1 else [qkv]  # the gradient of a split is one copy
        outs = []
        with sdpa_kernel(backend):
            for part, (count, n) in zip(parts, groups):
                q, k, v = part.unflatten(0, (count, n)).permute(2, 0, 3, 1, 4).unbind()
                outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    return call


def offsets(groups):
    """-> where each sequence begins (int32, and the end), and the longest length."""
    lengths = torch.cat([torch.full((count,), n) for count, n in groups])
    return F.pad(lengths.cumsum(0), (1, 0)).to(DEVICE, torch.int32), int(lengths.max())


def varlen(groups):
    """FlashAttention, as PyTorch brings it. It takes strided q, k, v; the gradient pays for one copy."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = offsets(groups)
    return lambda qkv: varlen_attn(*qkv.unbind(1), cu, cu, longest, longest)


def flash(groups):
    from flash_attn import flash_attn_varlen_qkvpacked_func

    cu, longest = offsets(groups)
    return lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, cu, longest)


def xformers(groups):
    from xformers.ops import fmha

    bias = fmha.BlockDiagonalMask.from_seqlens([n for count, n in groups for _ in range(count)])

    def call(qkv):
        q, k, v = (x.unsqueeze(0) for x in qkv.unbind(1))
        return fmha.memory_efficient_attention(q, k, v, attn_bias=bias)[0]

    return call


def flex(groups):
    """FlexAttention, compiled. Its block mask is made from a mask of all tokens x all tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.cat([torch.full((count,), n) for count, n in groups])
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(DEVICE)
    T = len(document)
    needed = 10 * T * T  # bytes
    if needed > 0.8 * torch.cuda.mem_get_info()[0]:
        raise MemoryError(f"its block mask needs {needed / 1e9:.0f} GB while it is made")
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would run eagerly, under this name
    mask = create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, T, T, DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(qkv):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return call


PEERS = {
    "ours": ours,
    "SDPA flash": partial(dense, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(dense, SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": partial(dense, SDPBackend.EFFICIENT_ATTENTION),
    "varlen_attn": varlen,
}
if DRY:
    PEERS = {"ours": ours, "SDPA math": partial(dense, SDPBackend.MATH)}
ON_REQUEST = {"FlexAttention": flex, "xFormers": xformers, "flash-attn": flash}  # slow to start, or not there


def copies(qkv):
    """Not attention: plain copies of as many bytes as forward, and forward + backward, must move."""
    source = qkv.detach().flatten()
    target = torch.empty_like(source)
    size = len(source) // 3 * 2  # two tensors read and two written: q, k, v and the output are four
    forward = partial(target[:size].copy_, source[:size])

    def twice():  # backward moves eight more, so twelve in all: three read and three written, twice
        target.copy_(source)
        target.copy_(source)

    return forward, twice


# ---------------------------------------------------------------- the clock


def clock(calls, repeat=20):
    """-> median seconds of one of `calls`, which take no arguments, and how: ten in a CUDA graph, or not."""
    if DRY:
        begin = time.perf_counter()
        calls[0]()
        return time.perf_counter() - begin, "dry"
    ten = [calls[i % len(calls)] for i in range(10)]
    for call in ten[:4]:  # warm up
        call()
    play, how = captured(ten)
    first = played(play)
    repeat = min(repeat, max(3, int(0.2 / first)))  # a slow call needs fewer repeats
    return statistics.median(played(play) for _ in range(repeat)) / 10, how


def captured(calls):
    """-> a function that makes all the calls, and "graph"; or "eager", for who synchronises inside."""
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


def played(play):
    """Seconds by the GPU's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    play()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def memory(call):
    """Bytes above what stood there before."""
    if DRY:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def forward_only(function, qkv):
    with torch.no_grad():
        return function(qkv)


def both(function, qkv, dout):
    """Forward and backward -> the gradient of qkv."""
    return torch.autograd.grad(function(qkv), qkv, dout)[0]


# ---------------------------------------------------------------- right or wrong


def inputs(groups, H, D, dtype=torch.float16 if DRY else torch.bfloat16, number=1):
    """Random numbers, never zeros, which run faster -> [qkv, ...], and the gradient of the output."""
    torch.manual_seed(0)
    T = sum(count * n for count, n in groups)
    tensors = [torch.randn(T, 3, H, D, device=DEVICE).to(dtype).requires_grad_() for _ in range(number)]
    return tensors, torch.randn(T, H, D, device=DEVICE).to(dtype)


def truth(qkv, dout, groups):
    """Output and gradient by float64, as many sequences at a time as have maps of a gigabyte."""
    outs, grads = [], []
    start = 0
    for count, n in groups:
        at_once = max(1, 2**27 // (qkv.shape[2] * n * n))
        for pieces in torch.arange(count).split(at_once):
            stop = start + len(pieces) * n
            exact = qkv.detach()[start:stop].double().requires_grad_()
            out = A.reference(exact, [(len(pieces), n)])[0]
            (grad,) = torch.autograd.grad(out, exact, dout[start:stop].double())
            outs.append(out.detach().float())
            grads.append(grad.float())
            start = stop
    return torch.cat(outs), torch.cat(grads)


def error(got, exact, dtype):
    """The largest difference over the largest number, in eps; NaN if anything is NaN."""
    return ((got.float() - exact).abs().max() / exact.abs().max()).item() / EPS[dtype]


def poison(*like):
    """Fill memory with NaN and let go of it: who takes it next and leaves a hole shows it."""
    for x in like:
        torch.full_like(x, torch.nan)


def prove(function, qkv, dout, exact):
    """-> errors of output and gradient in eps; ValueError if one is too large, or NaN."""
    poison(dout, qkv)
    out = forward_only(function, qkv)
    poison(qkv)
    errors = error(out, exact[0], qkv.dtype), error(both(function, qkv, dout), exact[1], qkv.dtype)
    for what, by in zip(("output", "gradient"), errors):
        if not by < WRONG:
            raise ValueError(f"the {what} is wrong by {by:.1f} eps")
    return errors


def same_bits(function, qkv, dout):
    """Kernels without atomics give the same bits every time: this is what finds a race."""
    first = forward_only(function, qkv), both(function, qkv, dout)
    for _ in range(REPEATS):
        again = forward_only(function, qkv), both(function, qkv, dout)
        if not (torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])):
            raise ValueError("the same input gave other bits")


def case_name(dtype, D, lengths):
    return f"{str(dtype)[6:]}, heads of {D}, {lengths[0]} to {lengths[-1]} tokens"


def correct_attention(report, dtype, D, lengths):
    """One family of kernels against float64 at each length, then the same bits again and again."""
    began = time.monotonic()
    worst = 0.0
    for n in lengths:
        groups = [(2, n), (1, 54)]
        (qkv,), dout = inputs(groups, 1 if DRY else 3, D, dtype)
        try:
            worst = max(worst, *prove(ours(groups), qkv, dout, truth(qkv, dout, groups)))
            same_bits(ours(groups), qkv, dout)
        except Exception as e:
            raise RuntimeError(f"{n} tokens, heads of {D}, {str(dtype)[6:]}: {said(e)}") from e
    report("correct", row=case_name(dtype, D, lengths), worst_error_in_eps=worst, repeats=REPEATS,
           seconds=time.monotonic() - began)  # fmt: skip


def rising_logits(n, K, dtype):
    """(n, K) whose maximum grows from block to block, so that every running sum must be rescaled."""
    block = torch.arange(K, device=DEVICE) // P.BLOCK
    return (0.03 * block - 0.5 * torch.rand(n, K, device=DEVICE)).to(dtype)


def correct_losses(report):
    """The loss, its gradient and Sinkhorn-Knopp against float64, with the largest logit in the last block."""
    began = time.monotonic()
    n, K = (2, 3 * P.BLOCK) if DRY else (300, 131072)
    dtype, tau, temp = torch.float32 if DRY else torch.bfloat16, 0.07, 0.1
    torch.manual_seed(0)
    student, teacher = rising_logits(n, K, dtype), rising_logits(n, K, dtype)
    potential = 0.1 * torch.randn(K, device=DEVICE)
    weights = torch.rand(n, device=DEVICE)
    target = (teacher.double() / tau + potential).softmax(1)
    exact = -(target * (student.double() / temp).log_softmax(1)).sum(1)
    answer = (student.double() / temp).softmax(1)
    scale = weights.double()[:, None] / temp
    slope = scale * (answer - target)
    # Rounded once to the type of the logits; and exp2 of a number of 100 is itself right to 1e-5.
    allowed = EPS[dtype] * slope.abs() + 1e-4 * scale * (answer + target) + 1e-30
    found = []
    for _ in range(REPEATS):
        z = student.clone().requires_grad_()  # its memory will hold the gradient
        loss = P.soft_cross_entropy(z, P.SoftTargets(teacher, potential, tau), temp)
        found.append((loss.detach(), torch.autograd.grad(loss, z, weights)[0]))
    shares = P.sinkhorn_targets(teacher, tau).probabilities()
    errors = dict(
        loss=((found[0][0] - exact) / exact).abs().max().item() / 1e-4,
        gradient=((found[0][1] - slope).abs() / allowed).max().item(),
        sinkhorn=((shares - exact_sinkhorn(teacher, tau)).abs().max() / shares.max()).item() / 1e-3,
    )
    if not all(torch.equal(a, b) for again in found for a, b in zip(found[0], again)):
        raise ValueError("loss or gradient: the same input gave other bits")
    if not all(by < 1 for by in errors.values()):  # nor NaN
        raise ValueError(f"off by so many times what is allowed: {errors}")
    report("correct", row="losses", shares_of_allowed_error=errors, rows=n, prototypes=K, repeats=REPEATS,
           seconds=time.monotonic() - began)  # fmt: skip


def exact_sinkhorn(logits, tau, iterations=3):
    """losses.sinkhorn_knopp by logarithms, in float64."""
    z = logits.double() / tau
    for _ in range(iterations):
        z = z - z.logsumexp(0, keepdim=True)
        z = z - z.logsumexp(1, keepdim=True)
    return z.exp()


# ---------------------------------------------------------------- the parts
# Each takes report(part, **row). They fork, so they must be called before CUDA has started in this process.


def every_row(report, part, tasks, tolerant=False, **how):
    """Rows in processes of their own; those that fail become rows too. RuntimeError if any did, or all."""
    ended = forked(tasks, **how)
    failed = {name: reason for name, (reason, _) in ended.items() if reason}
    for name, reason in failed.items():
        report(part, row=name, failed=reason)
    if failed and (len(failed) == len(tasks) or not tolerant):
        raise RuntimeError(f"{len(failed)} of {len(tasks)} rows: " + "; ".join(failed.values()))


def correct(report):
    """Everything against float64, and the same bits again; families of kernels compile side by side."""
    A.CHOICE = "triton"
    dtypes = (torch.float16,) if DRY else (torch.bfloat16, torch.float16)
    tasks = {}
    for D, families in LENGTHS.items():
        for lengths, dtype in itertools.product(families, dtypes):
            case = dtype, D, lengths
            tasks[case_name(*case)] = partial(correct_attention, report, *case)
    tasks["losses"] = partial(correct_losses, report)
    every_row(report, "correct", tasks, at_once=min(8, os.cpu_count() or 1), limit=120)


def step(report):
    """A profiled training step: our operators in every block, PyTorch's attention nowhere."""
    A.CHOICE = "triton"
    preset, batch = ("debug", 2) if DRY else ("vits14", 16)
    settings = ["train.num_workers=0", "train.dataset_path=scenes:100", "speed.compile=off"]
    cfg = config.load(model=preset, overrides=[f"train.batch_size_per_gpu={batch}", *settings])
    device = dist.setup(cfg.speed.device)
    t = train.TrainState(cfg, device)
    loader = train.make_loader(cfg, train.open_source(cfg.train.dataset_path), device)
    with torch.profiler.profile() as profile:
        train.train_step(t, [next(loader)], compute_schedules(cfg, 0, 1), cfg)
    calls = {event.key: event.count for event in profile.key_averages()}
    depth = len(t.student.backbone.blocks)
    expected = {"nanodino::attention_forward": 2 * depth, "nanodino::attention_backward": depth}
    found = {name: calls.get(name, 0) for name in expected}
    others = [name for name in calls if re.search("scaled_dot_product|_(flash|efficient)_attention", name)]
    if found != expected or others:
        raise ValueError(f"a step of {depth} blocks calls {found}, and besides {others}")
    report("step", model=preset, blocks=depth, calls=found)


def attention(report, rows=None, peers=(), part="attention"):
    """The table of attention."""
    A.CHOICE = "triton"
    racers = PEERS | {name: ON_REQUEST[name] for name in peers}
    tasks = {name: partial(race, report, part, name, *shape, racers)
             for name, shape in (rows or MULTI_CROP | LONG).items()}  # fmt: skip
    every_row(report, part, tasks, limit=90)


def race(report, part, name, groups, H, D, racers):
    """A row of the table: first everybody is proved, then they take turns on the clock."""
    flop = sum(4 * count * n * n * D * H for count, n in groups)
    size = 2 * H * D * sum(count * n for count, n in groups)  # bytes of q, of k, of v, of the output
    tensors, dout = inputs(groups, H, D, number=max(2, min(8, int(2e8 / (3 * size)) + 1)))
    functions, errors, failed = proved(racers, tensors[0], dout, groups)
    calls = {"copy": tuple(zip(*map(copies, tensors)))}
    for peer, function in functions.items():
        forward = [partial(forward_only, function, x) for x in tensors]
        calls[peer] = forward, [partial(both, function, x, dout) for x in tensors]
    before = sm_clock()
    times, used, how = timed(calls, failed)
    ratios = [None, None]
    rivals = [peer for peer in times if peer not in ("ours", "copy")]
    if rivals and "ours" in times:
        ratios = [min(times[peer][i] for peer in rivals) / times["ours"][i] for i in (0, 1)]
    report(part, row=name, groups=groups, heads=H, width=D, errors_in_eps=errors, peers_failed=failed,
           ratio_forward=ratios[0], ratio_both=ratios[1],
           forward_ms={peer: 1e3 * t[0] for peer, t in times.items()},
           both_ms={peer: 1e3 * t[1] for peer, t in times.items()},
           peak_mb={peer: size / 2**20 for peer, size in used.items()}, clock=how,
           sm_mhz=[before, sm_clock()], **rates(flop, size, times.get("ours")))  # fmt: skip
    if "ours" in failed:
        raise RuntimeError(failed["ours"])


def proved(racers, qkv, dout, groups):
    """-> {peer: function} of those that are right here, {peer: errors}, {peer: why it is not}."""
    exact = truth(qkv, dout, groups)
    functions, errors, failed = {}, {}, {}
    for peer, prepare in racers.items():
        try:
            function = prepare(groups)
            errors[peer] = prove(function, qkv, dout, exact)
            functions[peer] = function
        except Exception as e:  # not installed, cannot do this shape, or wrong
            failed[peer] = said(e)
    return functions, errors, failed


def timed(calls, failed):
    """{peer: (forward calls, calls of both)} -> {peer: [seconds, seconds]}, {peer: bytes}, {peer: how}.

    The best of three rounds. Who fails drops out, into `failed`.
    """
    rounds, used, how = {}, {}, {}
    for _ in range(1 if DRY else 3):
        for peer, (forward, whole) in calls.items():
            if peer in failed:
                continue
            try:
                seconds, how[peer] = clock(forward)
                rounds.setdefault(peer, []).append((seconds, clock(whole)[0]))
                used[peer] = memory(whole[0])
            except Exception as e:
                failed[peer] = said(e)
    best = {peer: [min(column) for column in zip(*found)] for peer, found in rounds.items()}
    return {peer: best[peer] for peer in best if peer not in failed}, used, how


CEILINGS = {}  # flops and bytes per second of this card; results/gpu.py fills in what it has measured


def ceilings():
    """-> FLOP/s and bytes/s that this card can do: measured, or else its data sheet's."""
    fast_memory = not DRY and "H200" in torch.cuda.get_device_name()
    return CEILINGS.get("flops", 989e12), CEILINGS.get("bytes", 4.8e12 if fast_memory else 3.35e12)


def rates(flop, tensor, seconds):
    """Ours beside the chip: TFLOP/s of the method, GB/s that must be moved, share of the floor of both.

    Forward reads q, k, v and writes the output, 4 tensors; backward moves 8 and does 2.5 times the work.
    """
    found = {}
    flops, bandwidth = ceilings()
    for i, (name, work, tensors) in enumerate((("forward", 1, 4), ("both", 3.5, 12))):
        if seconds:
            floor = max(work * flop / flops, tensors * tensor / bandwidth)
            found[f"tflops_{name}"] = work * flop / seconds[i] / 1e12
            found[f"gb_per_s_{name}"] = tensors * tensor / seconds[i] / 1e9
            found[f"share_of_floor_{name}"] = floor / seconds[i]
    return found


def ibot(make_targets, loss, student, teacher):
    """Targets, loss and gradient of the masked patches -> the gradient.

    Ours writes it over the student's logits, so from the second call on they are small; that takes as long.
    """
    return torch.autograd.grad(loss(student, make_targets(teacher)).mean(), student)[0]


def lazy_targets(potential, logits):
    return P.SoftTargets(logits, potential, 0.07)


def plain_targets(potential, logits):
    return lazy_targets(potential, logits).probabilities()


def prototypes(report):
    """The iBOT loss and Sinkhorn-Knopp: plain, compiled, ours."""
    A.CHOICE = "triton"
    n, K = (7, 300) if DRY else (4915, 131072)
    dtype = torch.float32 if DRY else torch.bfloat16
    student = torch.randn(n, K, device=DEVICE).to(dtype).requires_grad_()
    teacher = (0.2 * torch.randn(n, K, device=DEVICE)).to(dtype)
    potential = 0.1 * torch.randn(K, device=DEVICE)
    lazy, plain = partial(lazy_targets, potential), partial(plain_targets, potential)
    compiled = (lambda function: function) if DRY else partial(torch.compile, dynamic=False)
    compare(report, "iBOT loss", dict(rows=n, prototypes=K), {
        "ours": partial(ibot, lazy, P.soft_cross_entropy, student.detach().clone().requires_grad_(), teacher),
        "eager": partial(ibot, plain, cross_entropy, student, teacher),
        "torch.compile": partial(ibot, compiled(plain), compiled(cross_entropy), student, teacher),
    })  # fmt: skip
    compare(report, "Sinkhorn-Knopp", dict(rows=n, prototypes=K), {
        "ours": partial(P.sinkhorn_targets, teacher, tau=0.07),
        "eager": partial(sinkhorn_knopp, teacher, tau=0.07),
        "torch.compile": partial(compiled(sinkhorn_knopp), teacher, tau=0.07),
    })  # fmt: skip


def compare(report, name, facts, functions):
    """A row of the table of losses: time and memory of each function."""
    spent, used, failed = {}, {}, {}
    for peer, function in functions.items():
        try:
            seconds = clock([function], repeat=5)[0]
            used[peer] = memory(function) / 2**20
            spent[peer] = seconds
        except Exception as e:
            failed[peer] = said(e)
    ratio = {peer: spent[peer] / spent["ours"] for peer in spent if peer != "ours" and "ours" in spent}
    report("prototypes", row=name, ms={peer: 1e3 * s for peer, s in spent.items()}, peak_mb=used,
           ratio=ratio, peers_failed=failed, **facts)  # fmt: skip


def tiles(report):
    """Other tiles for the loops, each proved right before it is timed."""
    A.CHOICE = "triton"
    tasks = {f"{kernel} {tile}": partial(try_tile, report, kernel, tile)
             for kernel, candidates in TILES.items() for tile in candidates}  # fmt: skip
    every_row(report, "tiles", tasks, tolerant=True, limit=60)  # some do not fit the chip


def try_tile(report, kernel, tile):
    """One candidate in the place of what is shipped. The process ends afterwards, and with it the change."""
    groups, H, D = ([(1, 70)], 1, 32) if DRY else ([(16, 1374)], 16, 64)
    place = ("fwd_loop", "dq_loop", "dkdv_loop").index(kernel)
    key = (DRY or torch.cuda.get_device_capability() >= (9, 0)), False
    shipped = A.TILES[key][place]
    A.TILES[key] = tuple(tile if i == place else other for i, other in enumerate(A.TILES[key]))
    tensors, dout = inputs(groups, H, D, number=2)
    function = ours(groups)
    errors = prove(function, tensors[0], dout, truth(tensors[0], dout, groups))
    forward, _ = clock([partial(forward_only, function, x) for x in tensors])
    whole, _ = clock([partial(both, function, x, dout) for x in tensors])
    report("tiles", row=f"{kernel} {tile}", kernel=kernel, tile=tile, shipped=tile == shipped,
           errors_in_eps=errors, forward_ms=1e3 * forward, both_ms=1e3 * whole)  # fmt: skip


# ---------------------------------------------------------------- the report


def nvidia_smi(*wish):
    """What nvidia-smi says, or nothing: CUDA is not touched."""
    try:
        return subprocess.run(["nvidia-smi", *wish], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def sm_clock():
    """MHz of the multiprocessors, 0 if unknown: a row during which it moved by 3 % is not worth much."""
    found = re.search(r"\d+", nvidia_smi("--query-gpu=clocks.sm", "--format=csv,noheader,nounits"))
    return int(found[0]) if found else 0


def machine(report, commit=""):
    """A row with environment.json's facts and those of the GPU; the rows after it were measured there."""
    facts = {key: value for key, value in environment().items() if key not in ("git_diff", "command")}
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    ptxas = os.environ.get("TRITON_PTXAS_PATH") or ptxas
    try:
        version = subprocess.run([ptxas, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        version = ""
    wish = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,power.limit"
    facts.update(triton=triton.__version__, ptxas=(re.findall(r"V([\d.]+)", version) or ["unknown"])[0],
                 gpu_state=nvidia_smi(wish, "--format=csv"), dry=DRY)  # fmt: skip
    facts["git_commit"] = commit or facts["git_commit"]
    report("machine", **facts)


def about(row):
    """A machine in one line."""
    gpu = row["gpus"][0] if row["gpus"] else "no GPU"
    commit = row["git_commit"][:10] or "unknown"
    return f"{gpu}, torch {row['torch']}, triton {row['triton']}, ptxas {row['ptxas']}, commit {commit}"


def markdown(rows):
    """The tables of README.md, from the rows of one machine."""
    tables = attention_table([row for row in rows if "forward_ms" in row and row["part"] != "tiles"])
    tables += loss_table([row for row in rows if row["part"] == "prototypes" and "ms" in row])
    return "\n".join(tables)


def attention_table(rows):
    if not rows:
        return []
    peers = list(dict.fromkeys(peer for row in rows for peer in row["forward_ms"]))
    lines = ["Forward / forward + backward, milliseconds. A dash: it cannot do this shape, or was wrong.", ""]
    lines.append("| row | " + " | ".join(peers) + " | best peer / ours |")
    lines.append("|---" + "|--:" * (len(peers) + 1) + "|")
    for row in rows:
        cells = ["-"] * len(peers)
        for i, peer in enumerate(peers):
            if peer in row["forward_ms"]:
                cells[i] = f"{row['forward_ms'][peer]:.3f} / {row['both_ms'][peer]:.3f}"
        ratio = f"{row['ratio_forward']:.2f} / {row['ratio_both']:.2f}" if row["ratio_forward"] else "-"
        lines.append(f"| {row['row']} | " + " | ".join(cells) + f" | {ratio} |")
    return [*lines, ""]


def loss_table(rows):
    if not rows:
        return []
    peers = "ours", "eager", "torch.compile"
    lines = ["Milliseconds, and peak memory above the logits.", ""]
    lines += ["| loss | " + " | ".join(peers) + " |", "|---" + "|--:" * len(peers) + "|"]
    for row in rows:
        cells = [f"{row['ms'][peer]:.2f}, {row['peak_mb'][peer]:.0f} MB" if peer in row["ms"] else "-"
                 for peer in peers]  # fmt: skip
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parts = dict(correct=correct, step=step, attention=attention, prototypes=prototypes, tiles=tiles)
    parser.add_argument("--only", choices=parts, help="one part")
    parser.add_argument("--peers", default="", help=f"more of them, with commas: {', '.join(ON_REQUEST)}")
    parser.add_argument("--out", default="", help="the JSON lines (default: results/gpu/kernels.jsonl)")
    args = parser.parse_args(argv)
    peers = [name for name in args.peers.split(",") if name]
    if strange := set(peers) - set(ON_REQUEST):
        raise config.UserError(f"there is no peer {strange.pop()}: take {', '.join(ON_REQUEST)}")
    if not DRY and "GPU" not in nvidia_smi("-L"):
        raise config.UserError("nvidia-smi sees no GPU here: TRITON_INTERPRET=1 runs the logic in miniature")
    out = args.out or (None if DRY else ROOT / "results" / "gpu" / "kernels.jsonl")
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    parts["attention"] = partial(attention, peers=peers)
    chosen = {name: partial(part, writer(out)) for name, part in parts.items() if args.only in (None, name)}
    ended = forked({"machine": partial(machine, writer(out))} | chosen, leader=True)
    if out:
        rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
        print("\n" + markdown(rows))
    failed = {name: reason for name, (reason, _) in ended.items() if reason}
    for name, reason in failed.items():
        print(f"{name} failed: {reason}")
    return int(bool(failed))


if __name__ == "__main__":
    config.run(main)
