"""The race: our kernels against what people use today, on one GPU, after they have proved to be right.

    python kernels/bench.py                      # correctness, a profiled step, the tables, the tile sweep
    python kernels/bench.py --only correct       # or step, attention, prototypes, tiles
    TRITON_INTERPRET=1 python kernels/bench.py   # dry: the same logic in miniature, without a GPU

Writes results/kernels_<gpu>.json after every row, and the tables beside it as markdown. Times are medians of
CUDA graphs of ten calls over rotating inputs, which do not fit the L2 cache together; providers take turns in
three rounds. A peer pays for the copies that its layout needs; a peer that fails is listed with its reason.
Compared are ratios within one run: best peer / ours. For "ours, with another ptxas", run it again with
TRITON_PTXAS_PATH and --out.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import config
import train
from kernels import attention as A
from kernels import prototypes as P
from losses import cross_entropy, sinkhorn_knopp
from optim import schedule
from runfolder import environment

ROOT = Path(__file__).parent.parent
DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
ROWS = {  # name: (groups, heads, width of a head), bf16
    "ViT-L multi-crop": ([(128, 261), (512, 54)], 16, 64),
    "ViT-L globals, 261": ([(128, 261)], 16, 64),
    "ViT-L locals, 54": ([(512, 54)], 16, 64),
    "ViT-L multi-crop, drop path .4": ([(77, 261), (307, 54)], 16, 64),
    "ViT-S multi-crop": ([(128, 261), (512, 54)], 6, 64),
    "ViT-g multi-crop": ([(128, 261), (512, 54)], 24, 64),
    "ViT-L 518 px, 1374": ([(16, 1374)], 16, 64),
    "ViT-L 518 px, 1374, batch 128": ([(128, 1374)], 16, 64),
    "512": ([(32, 512)], 16, 64), "1k": ([(16, 1024)], 16, 64), "4k": ([(4, 4096)], 16, 64),
    "1k, heads of 128": ([(16, 1024)], 16, 128),
}  # fmt: skip
LENGTHS = [*range(1, 18), 41, 54, 63, 64, 65, 129, 197, 201, 257, 261, 272, 273, 512, 1374]
TILES = {  # candidates of the sweep: (BM, BN, warps, stages)
    "fwd_loop": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ],
    "dq_loop": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (128, 64, 8, 2)],
    "dkdv_loop": [(64, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)],
}
if DRY:
    ROWS = {"dry": ([(1, 70), (2, 20)], 2, 32)}
    LENGTHS = [1, 54, 70]
    TILES = {"fwd_loop": [(64, 64, 4, 2)], "dq_loop": [(64, 32, 4, 2)], "dkdv_loop": [(32, 64, 4, 2)]}


# ---------------------------------------------------------------- the peers


def dense(backend, qkv, groups):
    """One dense call per group: the best case of every SDPA backend, which know no groups."""
    with sdpa_kernel(backend) if backend else nullcontext():
        outs = [
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
            for q, k, v in A.split(qkv, groups)
        ]
    return torch.cat(outs)


def offsets(groups):
    lengths = torch.cat([torch.full((count,), n) for count, n in groups])
    return F.pad(lengths.cumsum(0), (1, 0)).to(DEVICE, torch.int32), int(lengths.max())


def varlen(qkv, groups):
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = OFFSETS[str(groups)]
    return varlen_attn(*qkv.unbind(1), cu, cu, longest, longest)


def flash(qkv, groups):
    from flash_attn import flash_attn_varlen_qkvpacked_func

    cu, longest = OFFSETS[str(groups)]
    return flash_attn_varlen_qkvpacked_func(qkv, cu, longest)


def xformers(qkv, groups):
    from xformers.ops import fmha

    bias = fmha.BlockDiagonalMask.from_seqlens([n for count, n in groups for _ in range(count)])
    return fmha.memory_efficient_attention(*(x.unsqueeze(0) for x in qkv.unbind(1)), attn_bias=bias)[0]


def flex(qkv, groups):
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in qkv.unbind(1))
    return FLEX["call"](q, k, v, block_mask=FLEX[str(groups)])[0].transpose(0, 1)


def copy(qkv, groups):
    return qkv[:, 0] + 0  # not attention: a third of the bytes in, all of them out, as a floor


OFFSETS, FLEX = {}, {}
PEERS = {
    "ours": A.attention,
    "SDPA flash": partial(dense, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(dense, SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": partial(dense, SDPBackend.EFFICIENT_ATTENTION),
    "varlen_attn": varlen, "FlexAttention": flex, "xFormers": xformers, "flash-attn": flash, "copy": copy,
}  # fmt: skip
if DRY:
    PEERS = {"ours": A.attention, "SDPA": partial(dense, None), "copy": copy, "xFormers": xformers}


def prepare(groups):
    """What a peer may compute once per batch shape, outside of the clock."""
    OFFSETS[str(groups)] = offsets(groups)
    if not DRY:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        lengths = torch.cat([torch.full((count,), n) for count, n in groups])
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(DEVICE)
        T = len(document)
        FLEX.setdefault("call", torch.compile(flex_attention, dynamic=False))
        FLEX[str(groups)] = create_block_mask(
            lambda b, h, i, j: document[i] == document[j], None, None, T, T, DEVICE
        )


# ---------------------------------------------------------------- the clock


def clock(calls, repeat=20):
    """-> median seconds of one of `calls`, which take no arguments, and how: ten in a CUDA graph, or not."""
    if DRY:
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start, "dry"
    ten = [calls[i % len(calls)] for i in range(10)]
    for call in ten[:4]:
        call()
    torch.cuda.synchronize()
    graph, how = torch.cuda.CUDAGraph(), "graph"
    try:
        with torch.cuda.graph(graph):
            for call in ten:
                call()
        play = graph.replay
    except RuntimeError:  # some peers synchronise inside
        torch.cuda.synchronize()
        how, play = "eager", lambda: [call() for call in ten]
    seconds = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        play()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e4)
    return statistics.median(seconds), how


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


def inputs(groups, H, D, dtype=torch.float16 if DRY else torch.bfloat16, copies=1):
    torch.manual_seed(0)
    T = sum(count * n for count, n in groups)
    made = [torch.randn(T, 3, H, D, device=DEVICE).to(dtype).requires_grad_() for _ in range(copies)]
    return made, torch.randn(T, H, D, device=DEVICE).to(dtype)


def both(function, qkv, groups, dout):
    return torch.autograd.grad(function(qkv, groups), qkv, dout)[0]


# ---------------------------------------------------------------- the parts of the race


def correct(report):
    """Every length x type x head against float64, then twenty times the same bits."""
    worst = {}
    for dtype in (torch.float16,) if DRY else EPS:
        for D in (32, 64, 80, 96, 128):
            for n in LENGTHS if D == 64 else LENGTHS[-8:]:
                groups = [(2, n), (1, 54)]
                (qkv,), dout = inputs(groups, 3, D, dtype)
                out, grad = A.attention(qkv, groups), both(A.attention, qkv, groups, dout)
                exact = qkv.detach().double().requires_grad_()
                truth = A.reference(exact, groups)[0]
                (slope,) = torch.autograd.grad(truth, exact, dout.double())
                size = slope.abs().amax().item(), truth.abs().amax().item()
                error = ((grad.double() - slope).abs().max() / size[0]).item() / EPS[dtype]
                error = max(error, ((out.double() - truth).abs().max() / size[1]).item() / EPS[dtype])
                assert error < 8, f"wrong by {error:.1f} eps: {n} tokens, heads of {D}, {dtype}"
                worst[f"{str(dtype)[6:]} D={D}"] = max(error, worst.get(f"{str(dtype)[6:]} D={D}", 0))
                for _ in range(2 if DRY else 20):
                    assert torch.equal(out, A.attention(qkv, groups)), f"forward not deterministic at {n}"
                    assert torch.equal(grad, both(A.attention, qkv, groups, dout)), (
                        f"backward not deterministic at {n}"
                    )
    report("correct", worst_error_in_eps=worst, lengths=LENGTHS, repeats=20)


def step(report):
    """A profiled training step: our operators in every block, PyTorch's attention nowhere."""
    preset, size = (
        ("debug", ["train.batch_size_per_gpu=2"]) if DRY else ("vits14", ["train.batch_size_per_gpu=16"])
    )
    cfg = config.load(model=preset, overrides=[*size, "train.num_workers=0", "train.dataset_path=scenes:100"])
    t = train.Trainee(cfg, DEVICE)
    batch = [next(train.make_loader(cfg, train.open_source(cfg.train.dataset_path), DEVICE))]
    with torch.profiler.profile() as profile:
        train.train_step(t, batch, schedule(cfg, 0, 1), cfg)
    calls = {e.key: e.count for e in profile.key_averages()}
    ours = {k: n for k, n in calls.items() if "nanodino::" in k}
    depth = len(t.student.backbone.blocks)
    assert (
        ours.get("nanodino::attention_forward") == 2 * depth
        and ours.get("nanodino::attention_backward") == depth
    )
    assert not [
        k
        for k in calls
        if "scaled_dot_product" in k or "_flash_attention" in k or "_efficient_attention" in k
    ]
    report("step", model=preset, blocks=depth, calls=ours)


def race(report):
    """The table of attention."""
    for name, (groups, H, D) in ROWS.items():
        prepare(groups)
        clock_before = sm_clock()
        flop = sum(4 * count * n * n * D * H for count, n in groups)
        size = 6 * H * D * sum(count * n for count, n in groups)  # bytes of one qkv
        tensors, dout = inputs(groups, H, D, copies=max(2, min(8, int(2e8 / size) + 1)))
        exact, times, failed = None, {}, {}
        for turn in range(1 if DRY else 3):
            for peer, function in PEERS.items():
                if peer in failed:
                    continue
                try:
                    if turn == 0:
                        with torch.no_grad():
                            out = function(tensors[0], groups).float()
                        exact = out if exact is None else exact
                        if peer != "copy" and (off := (out - exact).abs().max().item()) > 0.05:
                            raise RuntimeError(f"differs from ours by {off:.3f}")
                    with torch.no_grad():
                        forward = clock([partial(function, x, groups) for x in tensors])
                    whole = clock([partial(both, function, x, groups, dout) for x in tensors])
                    times.setdefault(peer, []).append((forward[0], whole[0], forward[1]))
                except Exception as e:  # a peer that is not installed, or cannot do this shape
                    failed[peer] = f"{type(e).__name__}: {str(e).splitlines()[0][:90] if str(e) else ''}"
        spent = {p: [min(t[i] for t in ts) for i in (0, 1)] for p, ts in times.items()}
        used = {p: memory(partial(both, PEERS[p], tensors[0], groups, dout)) for p in spent}
        rivals = [p for p in spent if p not in ("ours", "copy")]
        ratios = [min(spent[p][i] for p in rivals) / spent["ours"][i] for i in (0, 1)] if rivals else None
        report("attention", row=name, groups=groups, heads=H, width=D, failed=failed,
               ratio_forward=ratios and ratios[0], ratio_both=ratios and ratios[1],
               forward_ms={p: 1e3 * s[0] for p, s in spent.items()},
               both_ms={p: 1e3 * s[1] for p, s in spent.items()},
               peak_mb={p: b / 2**20 for p, b in used.items()}, clock={p: t[0][2] for p, t in times.items()},
               sm_mhz=[clock_before, sm_clock()], **rates(flop, size / 3, spent["ours"]))  # fmt: skip


def rates(flop, tensor, seconds):
    """Ours beside the chip: TFLOP/s of the method, GB/s that must be moved, share of the floor of both.

    Forward reads q, k, v and writes the output, 4 tensors; backward moves 8 and does 2.5 times the work.
    """
    found, bandwidth = {}, 4.8e12 if not DRY and "H200" in torch.cuda.get_device_name() else 3.35e12
    for name, work, tensors, spent in (("forward", 1, 4, seconds[0]), ("both", 3.5, 12, seconds[1])):
        floor = max(work * flop / 989e12, tensors * tensor / bandwidth)
        found |= {
            f"tflops_{name}": work * flop / spent / 1e12,
            f"gb_per_s_{name}": tensors * tensor / spent / 1e9,
        }
        found[f"share_of_floor_{name}"] = floor / spent
    return found


def ibot(make_targets, loss, student, teacher):
    """Targets, loss and gradient of the masked patches -> the gradient."""
    z = student.detach().requires_grad_()
    value = loss(z * 1, make_targets(teacher)).mean()
    return torch.autograd.grad(value, z)[0]


def race_prototypes(report):
    """The iBOT loss and Sinkhorn-Knopp: plain, compiled, ours."""
    n, K = (7, 300) if DRY else (4915, 131072)
    student, teacher = (
        torch.randn(n, K, device=DEVICE).to(torch.float32 if DRY else torch.bfloat16) for _ in "ab"
    )
    teacher *= 0.2
    potential = torch.zeros(K, device=DEVICE)
    lazy = lambda z: P.SoftTargets(z, potential, 0.07)  # noqa: E731
    plain = lambda z: lazy(z).probabilities()  # noqa: E731
    compiled = (lambda f: f) if DRY else torch.compile
    losses = {"eager": partial(ibot, plain, cross_entropy), "ours": partial(ibot, lazy, P.soft_cross_entropy),
              "torch.compile": partial(ibot, compiled(plain), compiled(cross_entropy))}  # fmt: skip
    knopp = {"eager": partial(sinkhorn_knopp, tau=0.07), "ours": partial(P.sinkhorn_targets, tau=0.07),
             "torch.compile": compiled(partial(sinkhorn_knopp, tau=0.07))}  # fmt: skip
    for name, functions, given in (
        ("iBOT loss", losses, (student, teacher)),
        ("Sinkhorn-Knopp", knopp, (teacher,)),
    ):
        spent, used = {}, {}
        for peer, function in functions.items():
            call = partial(function, *given)
            spent[peer], used[peer] = clock([call], repeat=5)[0], memory(call)
        report("prototypes", row=name, rows=n, prototypes=K, ms={p: 1e3 * s for p, s in spent.items()},
               peak_mb={p: b / 2**20 for p, b in used.items()},
               ratio={p: spent[p] / spent["ours"] for p in spent if p != "ours"})  # fmt: skip


def sweep(report):
    """Other tiles for the loops, each proved right before it is timed."""
    groups, H, D = ([(1, 70)], 2, 32) if DRY else ([(16, 1374)], 16, 64)
    tensors, dout = inputs(groups, H, D, copies=2)
    key = (DRY or torch.cuda.get_device_capability() >= (9, 0)), False
    for place, name in enumerate(TILES):
        for tile in TILES[name]:
            shipped = A.TILES[key]
            A.TILES[key] = tuple(tile if i == place else t for i, t in enumerate(shipped))
            try:
                mine, other = (both(f, tensors[0], groups, dout) for f in (A.attention, partial(dense, None)))
                good = torch.allclose(mine.float(), other.float(), atol=0.03)
                with torch.no_grad():
                    forward, _ = clock([partial(A.attention, x, groups) for x in tensors])
                whole, _ = clock([partial(both, A.attention, x, groups, dout) for x in tensors])
                report("tiles", kernel=name, tile=tile, shipped=tile == shipped[place], right=good,
                       forward_ms=1e3 * forward, both_ms=1e3 * whole)  # fmt: skip
            except Exception as e:  # out of shared memory, for instance
                report("tiles", kernel=name, tile=tile, failed=str(e)[:90])
            finally:
                A.TILES[key] = shipped


# ---------------------------------------------------------------- the report


def sm_clock():
    """MHz of the multiprocessors: a row during which it moved by more than 3 % is not worth much."""
    if DRY:
        return 0
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True).stdout.split()[0])


def machine():
    """environment.json's facts, and those of the GPU."""
    facts = {k: v for k, v in environment().items() if k not in ("git_diff", "command")}
    ptxas = Path(
        os.environ.get("TRITON_PTXAS_PATH") or Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    )
    version = (
        subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout if ptxas.exists() else ""
    )
    facts.update(triton=triton.__version__, ptxas=(re.findall(r"V([\d.]+)", version) or ["unknown"])[0])
    if not DRY:
        wish = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,power.limit"
        facts["gpu_state"] = subprocess.run(
            ["nvidia-smi", wish, "--format=csv"], capture_output=True, text=True
        ).stdout
    return facts


def markdown(found):
    """The tables of README.md, from the rows of one run."""
    e, lines = found["environment"], []
    gpu = (e["gpus"] or ["no GPU"])[0]
    lines.append(f"{gpu}, torch {e['torch']}, triton {e['triton']}, ptxas {e['ptxas']}, ")
    lines[-1] += f"commit {e['git_commit'][:10]}\n"
    rows = [r for r in found["rows"] if r["part"] == "attention"]
    peers = sorted({p for r in rows for p in r["forward_ms"]}, key=list(PEERS).index) if rows else []
    if rows:
        lines += ["Forward / forward + backward, milliseconds.\n"]
        lines += ["| row | " + " | ".join(peers) + " | best peer / ours |", "|---" * (len(peers) + 2) + "|"]
    for r in rows:
        cells = [
            f"{r['forward_ms'][p]:.3f} / {r['both_ms'][p]:.3f}" if p in r["forward_ms"] else "-"
            for p in peers
        ]
        ratio = f"{r['ratio_forward']:.2f} / {r['ratio_both']:.2f}" if r["ratio_forward"] else "-"
        lines.append(f"| {r['row']} | " + " | ".join(cells) + f" | {ratio} |")
    rows = [r for r in found["rows"] if r["part"] == "prototypes"]
    if rows:
        lines += ["", "| loss | eager | torch.compile | ours | peak memory, eager / ours |", "|---" * 5 + "|"]
    for r in rows:
        cells = [f"{r['ms'][p]:.2f} ms" for p in ("eager", "torch.compile", "ours")]
        lines.append(
            f"| {r['row']} | "
            + " | ".join(cells)
            + f" | {r['peak_mb']['eager']:.0f} / {r['peak_mb']['ours']:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = dict(correct=correct, step=step, attention=race, prototypes=race_prototypes, tiles=sweep)
    parser.add_argument("--only", choices=parts, help="one part")
    parser.add_argument("--out", default="", help="the JSON file (default: results/kernels_GPU.json)")
    args = parser.parse_args(argv)
    if not DRY and not torch.cuda.is_available():
        raise config.UserError("PyTorch sees no GPU here: TRITON_INTERPRET=1 runs the logic in miniature")
    A.CHOICE, found = "triton", dict(environment=machine(), rows=[])
    gpu = "dry" if DRY else re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
    out = Path(args.out or ROOT / "results" / f"kernels_{gpu}.json")

    def report(part, **row):
        found["rows"].append(dict(part=part, **row))
        out.write_text(json.dumps(found, indent=1))
        print(json.dumps(found["rows"][-1]), flush=True)

    for name, part in parts.items():
        if args.only in (None, name):
            part(report)
    found["after"] = machine()
    out.write_text(json.dumps(found, indent=1))
    out.with_suffix(".md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    config.run(main)
