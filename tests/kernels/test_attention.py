"""The Triton kernels, on a GPU or in Triton's interpreter on the CPU, against the definition in float64.

An error is measured against the size of the terms that were added up: the same formulas with absolute values,
times the precision of the type. A fixed tolerance is too strict where large numbers cancel, and too loose
elsewhere. compile_gate.py checks what an interpreter cannot show (registers, tensor cores);
tools/bench_kernels.py has timings and other people's kernels.
"""

import importlib.util
import json
import math
import mmap
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("triton")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import UserError
from kernels import attention as A
from kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    chunk_sizes,
    pytorch_attention,
    reference,
)

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning", "ignore:.*Overriding a:UserWarning"
)
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-21}
ON_CPU = DEVICE == "cpu"
EXACT = torch.float32 if ON_CPU else torch.float16  # on a GPU the kernels are for 16 bit
CLOSE = dict(atol=1e-5, rtol=1e-5) if ON_CPU else dict(atol=4e-3, rtol=4e-3)
needs_interpreter = pytest.mark.skipif(not ON_CPU, reason="a mutant reads and writes where a GPU would fault")


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setattr(A, "CHOICE", "triton")


@contextmanager
def planned_for(arch, module=A):
    """The kernels and tiles of sm_`arch`, whatever chip this is."""
    plain = module.architecture
    module.architecture = lambda device: arch
    try:
        yield
    finally:
        module.architecture = plain


def truth(qkv, dout, groups, scale):
    """-> {name: (exact result, size of its terms)} in float64, from autograd and from absolute values."""
    exact = qkv.double().requires_grad_()
    exact_dout = dout.double()
    out, maps = reference(exact, groups, scale)
    (grad,) = torch.autograd.grad(out, exact, exact_dout)
    exact = exact.detach()
    grad_size = torch.zeros_like(grad)
    out_size = torch.zeros_like(out)
    lse = out.new_zeros(out.shape[1], out.shape[0])  # (H, T)
    lse_size = torch.zeros_like(lse)
    start = 0
    for (count, n), p in zip(groups, maps):
        if count * n == 0:
            continue
        rows = slice(start, start + count * n)
        start += count * n
        q, k, v = exact[rows].unflatten(0, (count, n)).permute(2, 0, 3, 1, 4)
        logits = scale * (q @ k.transpose(-2, -1))
        # The kernels' lse is to base 2.
        lse[:, rows] = logits.logsumexp(-1).transpose(0, 1).flatten(1) / math.log(2)
        p = p.detach()
        q, k, v = q.abs(), k.abs(), v.abs()
        do = exact_dout[rows].unflatten(0, (count, n)).transpose(1, 2).abs()
        # An error of eps in the scores, of size |q||k|, moves p by that times p.
        blur = p * (1 + scale * (q @ k.transpose(-2, -1)))
        ds = blur * (do @ v.transpose(-2, -1) + (do * (p @ v)).sum(-1, keepdim=True))
        dq = scale * ds @ k
        dk = scale * ds.transpose(-2, -1) @ q
        dv = blur.transpose(-2, -1) @ do
        grad_size[rows] = torch.stack([dq, dk, dv]).permute(1, 3, 0, 2, 4).flatten(0, 1)
        out_size[rows] = (blur @ v).transpose(1, 2).flatten(0, 1)
        lse_size[:, rows] = blur.sum(-1).transpose(0, 1).flatten(1)
    return dict(out=(out.detach(), out_size), lse=(lse.detach(), lse_size), grad=(grad, grad_size))


def poisoned(shape, dtype):
    """A tensor full of NaN inside memory full of NaN -> (the memory, the tensor)."""
    guard = torch.full((64 + math.prod(shape) + 64,), float("nan"), dtype=dtype, device=DEVICE)
    return guard, guard[64:-64].view(shape)


def run(qkv, dout, groups, scale, module=A):
    """Both kernels with outputs that were full of NaN, inside memory that is full of NaN."""
    T, _, H, D = qkv.shape
    around_out, out = poisoned((T, H, D), qkv.dtype)
    around_lse, lse = poisoned((H, T), torch.float32)
    around_grad, grad = poisoned((T, 3, H, D), qkv.dtype)
    around_delta, delta = poisoned((H, T), torch.float32)
    scalars = (scale / math.log(2), *qkv.stride()[:3])
    module.launch("forward", (qkv, out, lse), qkv, groups, scalars)
    scalars += (*dout.stride()[:2], scale)
    module.launch("backward", (qkv, out, lse, delta, dout, grad), qkv, groups, scalars)
    for guard in (around_out, around_lse, around_grad, around_delta):
        assert guard[:64].isnan().all() and guard[-64:].isnan().all(), "written outside of the tensor"
    return dict(out=out, lse=lse, grad=grad)


def compare(found, dtype, exact):
    """Each of `found` within a few roundings of `exact`, which comes from `truth`."""
    for name, result in found.items():
        value, size = exact[name]
        eps = EPS[torch.float32 if name == "lse" else dtype]  # lse is fp32 whatever the input
        error = (result.double() - value).abs()
        assert result.isfinite().all(), f"{name} is not finite"
        worst = (error / (eps * size + 1e-30)).max() if error.numel() else 0
        assert (error <= 6 * eps * size + 1e-7).all(), f"{name}: {worst:.1f} eps"


def check(qkv, dout, groups, scale=None, module=A):
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    compare(run(qkv, dout, groups, scale, module), qkv.dtype, truth(qkv, dout, groups, scale))


def tensors(groups, H, D, dtype=torch.float16, amplitude=1.0, seed=0, padding=0):
    """qkv and dout, N(0, amplitude); `padding` numbers of NaN between heads, and rows of NaN around."""
    torch.manual_seed(seed)
    T = sum(count * n for count, n in groups)
    wide = torch.full((T + 4, 3, H, D + padding), float("nan"), dtype=dtype, device=DEVICE)
    qkv = wide[2 : 2 + T, :, :, :D]
    qkv.copy_(amplitude * torch.randn(T, 3, H, D))
    return qkv, torch.randn(T, H, D).to(DEVICE, dtype)


def check_length(n, arch, module=A, **options):
    with planned_for(arch, module):
        check(*tensors([(1, n)], 1, 64, **options), [(1, n)], module=module)


# Whole tiles, one row more and one less; tails of 1, 5, 9 and 16 rows; multiples of every block.
LENGTHS = [1, 2, 15, 16, 17, 54, 63, 64, 65, 69, 80, 128, 129, 197, 201, 256, 257, 261, 273, 321, 384]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length(n, arch):
    check_length(n, arch)


def test_512_tokens():
    check_length(512, 90)


@pytest.mark.parametrize("D", [32, 80, 96, 128])
def test_other_heads(D):
    for groups in ([(1, 54)], [(1, 130)]):
        check(*tensors(groups, 2, D, padding=8), groups)


def test_the_multicrop_batch():
    groups = [(1, 261), (2, 54), (2, 0), (1, 1)]
    check(*tensors(groups, 2, 64, EXACT, padding=16), groups)
    groups = groups[1:]
    check(*tensors(groups, 5, 64, torch.float16), groups, scale=0.3)  # 5 heads: the second program has one


def test_bf16(bf16):
    for groups in ([(2, 54)], [(1, 261)], [(1, 300)]):
        check(*tensors(groups, 2, 64, torch.bfloat16), groups)


@pytest.mark.slow
def test_high_resolution():  # 518 pixels: 1,369 patches, [CLS], four registers
    check(*tensors([(1, 1374)], 1, 64), [(1, 1374)])


STRIDE = 11_100_000  # numbers between two tokens: those from 194 on start beyond 2**31


@cache
def far_apart():
    """qkv of 260 tokens, STRIDE numbers apart: 5.8 GB, of which only the pages with tokens are ever touched.

    On the CPU 8.6 GB lie before it, where an offset that wraps around at 32 bits finds zeros and not the end.
    """
    shape, strides = (260, 3, 1, 32), (STRIDE, 64, 32, 1)
    size = 260 * STRIDE
    if not ON_CPU:
        return torch.empty(size, dtype=torch.float16, device=DEVICE).as_strided(shape, strides)
    on_demand = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (2**32 + size), flags=on_demand)
    return torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, strides, 2**32)


def check_beyond_two_to_the_31(groups, arch, module=A):
    """The last sequence starts 2.2e9 numbers into the tensor, as at ViT-g with half a million tokens."""
    torch.manual_seed(0)
    qkv = far_apart().copy_(torch.randn(260, 3, 1, 32))
    dout = torch.randn(260, 1, 32).to(DEVICE, torch.float16)
    with planned_for(arch, module):
        check(qkv, dout, groups, module=module)


BEYOND = {"tile": ([(13, 20)], 90), "keep": ([(4, 65)], 90), "loop": ([(4, 65)], 80)}


@pytest.mark.parametrize("family", BEYOND)
def test_beyond_two_to_the_31(family):
    check_beyond_two_to_the_31(*BEYOND[family])


def test_a_sequence_of_more_than_two_to_the_31_numbers():
    """The kernels count in 32 bits inside a sequence; both directions refuse what does not fit."""
    qkv = far_apart()
    groups = [(1, 200), (1, 60)]
    with pytest.raises(ValueError, match="sequences of up to 200: within a sequence"):
        attention(qkv, groups)
    qkv = tensors([(1, 2)], 1, 32)[0].requires_grad_()
    dout = far_apart()[::130, 0]  # 2 tokens, 1.4e9 numbers apart
    with pytest.raises(ValueError, match="size x stride must stay below"):
        attention(qkv, [(1, 2)]).backward(dout)


def far_below_zero(n, D=64, dtype=torch.float16):
    """All logits near -120 x 1.5: exp2(0 - lse) of a padded key is infinite, and infinity times 0 is NaN."""
    torch.manual_seed(0)
    qkv = torch.randn(n, 3, 1, D) * 0.1
    qkv[:, 0] += 5
    qkv[:, 1] -= 180 * D**0.5 / (5 * D)
    return qkv.to(DEVICE, dtype), torch.randn(n, 1, D).to(DEVICE, dtype)


def check_far_below_zero(n, arch, module=A):
    with planned_for(arch, module):
        check(*far_below_zero(n), [(1, n)], module=module)


FAR = [(n, 80) for n in (1, 17, 54, 201, 326)] + [(n, 90) for n in (1, 17, 54, 70, 197, 201, 261, 273, 326)]


@pytest.mark.parametrize("n, arch", FAR)
def test_logits_far_below_zero(n, arch):
    check_far_below_zero(n, arch)


def check_strides(module=A):
    """Through the public function: a qkv with gaps between heads and tokens, a dout with other gaps."""
    groups = [(1, 20), (1, 66)]
    qkv, _ = tensors(groups, 2, 32, padding=8)
    dout, _ = tensors(groups, 2, 32, padding=24, seed=1)
    dout = dout[:, 0]
    exact = truth(qkv, dout, groups, 32**-0.5)
    leaf = qkv.requires_grad_()
    out = module.attention(leaf, groups)
    (grad,) = torch.autograd.grad(out, leaf, dout)
    compare(dict(out=out.detach(), grad=grad), qkv.dtype, exact)


def test_strides_are_respected():
    check_strides()


def property_test(examples):
    sizes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 70)), min_size=1, max_size=4)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(sizes, st.integers(1, 3), st.sampled_from([32, 64, 80]), st.sampled_from([0.1, 1.0, 8.0]),
           st.sampled_from([0, 8]), st.sampled_from([80, 90]), st.integers(0, 9))  # fmt: skip
    @example([(1, 1)], 1, 64, 1.0, 0, 90, 0)
    @example([(2, 64)], 1, 64, 1.0, 8, 90, 0)
    @example([(1, 65), (1, 64)], 2, 64, 8.0, 0, 90, 0)
    @example([(1, 65)], 1, 64, 8.0, 0, 80, 0)
    def holds(groups, H, D, amplitude, padding, arch, seed):
        with planned_for(arch):
            check(*tensors(groups, H, D, torch.float16, amplitude, seed, padding), groups)

    return holds


def test_properties():
    property_test(12)()


@pytest.mark.slow
def test_many_properties():
    property_test(150)()


# ---------------------------------------------------------------- tests of the tests


def at(n, arch):
    return partial(check_length, n, arch)


def far(n, arch):
    return partial(check_far_below_zero, n, arch)


CAST = ".to(tl.float16).to(tl.float32)"  # rounded as for the product with v
MUTANTS = {  # the mistake: (who must notice, in which function, as it is, as it would be)
    "no key mask in the backward": (far(54, 90), "ds_tile", "if LAST:", "if False:"),
    "no key mask in the forward": (at(54, 90), "score_tile", "if LAST:", "if False:"),
    "the sum does not shrink": (at(129, 80), "fwd_step", "row_sum * shrink +", "row_sum +"),
    "the output does not shrink": (at(129, 80), "fwd_step", "acc * shrink[:, None])", "acc)"),
    "no scale in dq": (at(65, 90), "dq_keep", "dq * scale", "dq"),
    "no scale in dk": (at(65, 90), "dkdv_keys", "dk * scale", "dk"),
    "no delta": (at(65, 90), "dkdv_tile", "- delta[None, :])", ")"),
    "lse to base e": (at(65, 90), "fwd_keep", "row_max + tl.log2(row_sum)", "row_max + tl.log(row_sum)"),
    "wrong head": (check_strides, "fwd_keep", "lse_ptr + head * T + token", "lse_ptr + token"),
    "third chunk misplaced": (far(201, 90), "dq_keep", "delta, C0 + C1,", "delta, C0,"),
    "sum after the cast, tile": (at(54, 90), "fwd_tile", "tl.sum(p, 1)", f"tl.sum(p{CAST}, 1)"),
    "sum after the cast, keep": (at(201, 90), "fwd_keep", "tl.sum(p1, 1)", f"tl.sum(p1{CAST}, 1)"),
    "sum after the cast, loop": (at(129, 80), "fwd_step", "tl.sum(p, 1)", f"tl.sum(p{CAST}, 1)"),
    "forward blocks overlap": (at(384, 90), "fwd_loop", "block * BM", "block * (BM - 1)"),
    "dq blocks overlap": (at(128, 80), "dq_loop", "tl.program_id(0) * BM", "tl.program_id(0) * (BM - 1)"),
    "dk blocks overlap": (at(128, 90), "dkdv_loop", "tl.program_id(0) * BN", "tl.program_id(0) * (BN - 1)"),
    "tail queries dropped": (at(69, 90), "dkdv_keys",
                             "dk, dv = dkdv_step(q_ptr, do_ptr, lse_ptr, delta_ptr, whole,",
                             "dkdv_step(q_ptr, do_ptr, lse_ptr, delta_ptr, whole,"),
    "tail queries from the start": (at(69, 90), "dkdv_keys", "delta_ptr, whole,", "delta_ptr, 0,"),
    "tail queries one row early": (at(69, 90), "dkdv_keys", "delta_ptr, whole,", "delta_ptr, whole - 1,"),
    "tail queries twice": (at(69, 90), "dkdv_keys", "range(0, whole, BM)", "range(0, length, BM)"),
    "tail keys dropped": (at(69, 90), "dkdv_loop", "    else:\n", "    elif length < 0:\n"),
    "tail keys one row late": (at(69, 90), "dkdv_loop", "start, TAIL, length,", "start + 1, TAIL, length,"),
    "a whole tile cut short": (at(69, 90), "dkdv_loop", "start + BN <= length", "start + BN < BN"),
    "lse and delta of another tile": (at(128, 90), "dkdv_step", "and_delta(lse_ptr, delta_ptr, start,",
                                      "and_delta(lse_ptr, delta_ptr, 0,"),
    "lse and delta of another tail": (at(69, 90), "dkdv_step", "and_delta(lse_ptr, delta_ptr, start,",
                                      "and_delta(lse_ptr, delta_ptr, start - ROWS // 16,"),
    "lse and delta exchanged": (at(65, 90), "load_lse_and_delta", "== 0, lse_ptr, delta_ptr)",
                                "== 1, lse_ptr, delta_ptr)"),
    "forward forgets the strides": (check_strides, "attention_forward", "*qkv.stride()[:3]",
                                    "3 * H * D, H * D, D"),
    "backward forgets the strides": (check_strides, "attention_backward", "*qkv.stride()[:3]",
                                     "*dqkv.stride()[:3]"),
    "backward forgets those of dout": (check_strides, "attention_backward", "*dout.stride()[:2]",
                                       "*out.stride()[:2]"),
}  # fmt: skip
FAMILIES = dict(tile=("fwd_tile", "bwd_tile"), keep=("fwd_keep", "dq_keep"),
                loop=("fwd_loop", "dq_loop", "dkdv_loop"))  # fmt: skip
for family, kernels in FAMILIES.items():
    notices = partial(check_beyond_two_to_the_31, *BEYOND[family])
    MUTANTS |= {f"32 bits in {kernel}": (notices, kernel, ".to(tl.int64)", "") for kernel in kernels}


def plant(function, right, wrong):
    """kernels/attention.py with `wrong` for `right` in one function."""
    source = (ROOT / "kernels" / "attention.py").read_text()
    start = source.index(f"def {function}(")
    end = source.find("\n\n\n", start)
    body = source[start:end]
    assert right in body, f"{function} no longer says {right!r}: adapt this mutant"
    return source[:start] + body.replace(right, wrong) + source[end:]


@needs_interpreter
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, tmp_path, monkeypatch):
    check, *change = MUTANTS[name]
    library = f"mutant{list(MUTANTS).index(name)}"  # of PyTorch operators
    source = plant(*change).replace("nanodino::", f"{library}::").replace('"nanodino"', f'"{library}"')
    (tmp_path / "mutant.py").write_text(source)
    spec = importlib.util.spec_from_file_location("mutant", tmp_path / "mutant.py")
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(mutant, "CHOICE", "triton")
    with pytest.raises(AssertionError):
        check(module=mutant)


def test_chunks_hold_every_length_and_only_the_last_is_partial():
    for n in range(65, 273):
        sizes = [size for size in chunk_sizes(n) if size]
        assert sum(sizes) >= n > sum(sizes[:-1]) and len(sizes) in (2, 3)
    assert chunk_sizes(261) == (128, 128, 16)


# ---------------------------------------------------------------- as an operator of PyTorch

GROUPS = [(2, 17), (3, 5)]


def packed(dtype=EXACT, **options):
    torch.manual_seed(0)
    return torch.randn(49, 3, 2, 32).to(DEVICE, dtype).requires_grad_(options.get("requires_grad", False))


def weights():
    torch.manual_seed(1)
    return torch.randn(49, 2, 32).to(DEVICE, EXACT)


def test_opcheck():
    flat = [number for group in GROUPS for number in group]
    torch.library.opcheck(attention_forward, (packed(requires_grad=True), flat, 0.2))
    out, lse = attention_forward(packed(), flat, 0.2)
    torch.library.opcheck(attention_backward, (torch.ones_like(out), packed(), out, lse, flat, 0.2))


def gradient(function, qkv, weight):
    qkv = qkv.detach().requires_grad_()
    (function(qkv) * weight).sum().backward()
    return qkv.grad


def ours(qkv):
    return attention(qkv, GROUPS)


def pytorchs(qkv):
    return pytorch_attention(qkv, GROUPS)


def test_paths_agree():
    """Kernels, PyTorch's and the definition; twice the same bits; compiled as eager; an expanded gradient."""
    x = packed()
    w = weights()
    out = ours(x)
    torch.testing.assert_close(out, pytorchs(x), **CLOSE)
    torch.testing.assert_close(out, reference(x, GROUPS)[0], **CLOSE)
    for each in reference(x.float(), GROUPS)[1]:
        torch.testing.assert_close(each.sum(-1), torch.ones_like(each[..., 0]))
    grad = gradient(ours, x, w)
    torch.testing.assert_close(grad, gradient(pytorchs, x, w), **CLOSE)
    assert torch.equal(out, ours(x))
    assert torch.equal(grad, gradient(ours, x, w))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(grad, gradient(compiled, x, w))
    one = torch.ones((), device=DEVICE, dtype=EXACT)
    torch.testing.assert_close(gradient(ours, x, one), gradient(pytorchs, x, one), **CLOSE)


def test_gradcheck_of_the_definition():
    x = torch.randn(7, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: pytorch_attention(q, [(1, 4), (1, 3)]), x)
    assert torch.autograd.gradcheck(lambda q: reference(q, [(1, 4), (1, 3)], 0.7)[0], x)


@pytest.mark.skipif(not ON_CPU, reason="a GPU in 16 bit has the kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pytorchs_own_way_in_16_bit(dtype):
    """Short sequences as two products, long ones in fp32: the definition, within a few roundings."""
    groups = [(3, 21), (2, 69), (1, A.LONGEST_ON_CPU + 1)]
    torch.manual_seed(0)
    x = torch.randn(sum(count * length for count, length in groups), 3, 2, 32)
    x[:, 0] *= 3  # scores of a trained network are larger than those of noise
    weight = torch.randn(len(x), 2, 32)
    rounded = x.to(dtype).requires_grad_()
    exact = rounded.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype):  # as in training
        out = pytorch_attention(rounded, groups)
    expected = reference(exact, groups)[0]
    assert out.dtype == dtype
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for found, wanted in ((out, expected), (rounded.grad, exact.grad)):
        error = (found - wanted).norm() / wanted.norm()
        assert error < 4 * EPS[dtype], error


def test_selective_checkpointing_saves_the_output(monkeypatch):
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    calls = []
    plain = A.launch

    def counting_launch(direction, *rest):
        calls.append(direction)
        plain(direction, *rest)

    monkeypatch.setattr(A, "launch", counting_launch)
    op = torch.ops.nanodino.attention_forward.default

    def policy(_, name, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if name == op else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q):
        return attention(q * 1.0, GROUPS).sin()

    x = packed()
    w = weights()
    plain_grad = gradient(block, x, w)
    assert calls == ["forward", "backward"]
    calls.clear()
    full = gradient(lambda q: checkpoint(block, q, use_reentrant=False), x, w)
    assert calls == ["forward", "forward", "backward"]
    calls.clear()
    how = dict(use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    selective = gradient(lambda q: checkpoint(block, q, **how), x, w)
    assert calls == ["forward", "backward"]
    assert torch.equal(plain_grad, full) and torch.equal(plain_grad, selective)


def test_autocast_takes_its_own_type(bf16):
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(DEVICE, dtype):
            assert attention(packed(), GROUPS).dtype == dtype


def test_the_choice(monkeypatch):
    cpu = torch.device("cpu")
    half = torch.float16
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert A.backend(cpu, half, 64)[0] == "triton"
    with pytest.raises(UserError, match="wider than 128"):
        A.backend(cpu, half, 256)
    monkeypatch.setattr(A, "CHOICE", "auto")
    assert A.backend(cpu, half, 64) == ("pytorch", "Triton is only interpreted")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert A.backend(cpu, half, 64) == ("pytorch", "the tensors are on the cpu")
    monkeypatch.setattr(A, "CHOICE", "triton")
    with pytest.raises(UserError, match="on the cpu"):
        A.backend(cpu, half, 64)
    monkeypatch.setattr(A, "triton", None)
    with pytest.raises(UserError, match="not installed"):
        A.backend(cpu, half, 64)


def test_the_choice_is_no_part_of_a_compiled_graph(monkeypatch):
    """On a GPU it queries the capability, which a graph may not; here, the environment stands in for that."""
    asked = []

    class Environment:
        def get(self, name):
            asked.append(name)
            torch._dynamo.graph_break()
            return "1"

    monkeypatch.setattr(A, "os", SimpleNamespace(environ=Environment()))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(packed()), ours(packed())) and asked


def test_what_does_not_fit():
    for bad in ((packed(), [(1, 48)]), (packed().transpose(2, 3), GROUPS), (packed()[:, :2], GROUPS)):
        with pytest.raises(ValueError, match="last stride 1"):
            attention(*bad)
    with pytest.raises(ValueError, match="scale > 0"):
        attention(packed(), GROUPS, scale=-1.0)


# ---------------------------------------------------------------- machine code


def gate(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "kernels" / "compile_gate.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "100")] + ["90"]
)
def test_the_gate(arch):
    done = gate(arch)
    assert done.returncode == 0 and done.stdout.endswith("0 failed\n"), done.stdout + done.stderr


def test_the_gate_refuses_bad_kernels():
    done = gate("planted")
    assert done.returncode == 1 and done.stdout.endswith("4 failed\n"), done.stdout + done.stderr
    for reason in (
        "register spills",
        "KB of shared memory",
        "transpose of a computed tile",
        "no tensor-core",
    ):
        assert reason in done.stdout


@pytest.mark.slow
def test_the_bench_runs_dry(tmp_path, interpreter):
    environment = dict(os.environ, TRITON_INTERPRET="1")
    out = tmp_path / "dry.jsonl"
    command = [sys.executable, "-m", "tools.bench_kernels", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    parts = {row["part"] for row in rows}
    assert parts == {"machine", "correct", "step", "attention", "prototypes", "tiles"}
    assert not [row for row in rows if "failed" in row]
    assert "| best peer / ours |" in done.stdout
