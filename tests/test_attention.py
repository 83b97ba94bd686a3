"""The Triton kernels in Triton's interpreter, on the CPU, against the definition in float64.

An error is judged against the size of what was added up: the same formulas with absolute values, times the
precision of the type. A fixed tolerance is too strict where large numbers cancel, and too loose elsewhere.
What an interpreter cannot show (registers, tensor cores) is in compile_gate.py; what needs a GPU, in
kernels/bench.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import UserError
from kernels import attention as A
from kernels.attention import attention, attention_backward, attention_forward, chunks, plan, reference, sdpa

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning", "ignore:.*Overriding a:UserWarning"
)
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-21}


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setattr(A, "CHOICE", "triton")


def truth(qkv, dout, groups, scale):
    """-> {name: (exact result, how much was added up)} in float64, from autograd and from absolute values."""
    x, g, start, found = qkv.double().requires_grad_(), dout.double(), 0, {}
    out, maps = reference(x, groups, scale)
    (grad,) = torch.autograd.grad(out, x, g)
    x, sums, maxima = x.detach(), torch.zeros_like(grad), torch.zeros_like(out)
    for (count, n), p in zip(groups, maps):
        if count * n == 0:
            continue
        rows = slice(start, start + count * n)
        q, k, v = x[rows].unflatten(0, (count, n)).permute(2, 0, 3, 1, 4).abs()
        do = g[rows].unflatten(0, (count, n)).transpose(1, 2).abs()
        # An error of eps in the scores, of size |q||k|, moves p by that times p.
        blur = p.detach() * (1 + scale * (q @ k.transpose(-2, -1)))
        ds = blur * (do @ v.transpose(-2, -1) + (do * (p.detach() @ v)).sum(-1, keepdim=True))
        dq, dk, dv = scale * ds @ k, scale * ds.transpose(-2, -1) @ q, blur.transpose(-2, -1) @ do
        maxima[rows] = (blur @ v).transpose(1, 2).flatten(0, 1)
        sums[rows] = torch.stack([dq, dk, dv]).permute(1, 3, 0, 2, 4).flatten(0, 1)
        start += count * n
    found["out"] = out.detach(), maxima
    found["grad"] = grad, sums
    return found


def run(qkv, dout, groups, scale, module=A):
    """Both kernels with outputs that were full of NaN, inside memory that is full of NaN."""
    T, _, H, D = qkv.shape

    def poisoned(shape, dtype):
        guard = torch.full((64 + int(torch.tensor(shape).prod()) + 64,), float("nan"), dtype=dtype)
        return guard, guard[64:-64].view(shape)

    (around_out, out), (around_lse, lse) = poisoned((T, H, D), qkv.dtype), poisoned((H, T), torch.float32)
    (around_grad, grad), (around_delta, delta) = (
        poisoned((T, 3, H, D), qkv.dtype),
        poisoned((H, T), torch.float32),
    )
    numbers = scale * 1.4426950408889634, *qkv.stride()[:3]
    module.launch(slice(0, 1), (qkv, out, lse), qkv, groups, numbers)
    backward = qkv, out, lse, delta, dout, grad
    module.launch(slice(1, None), backward, qkv, groups, (*numbers, *dout.stride()[:2], scale))
    for guard in (around_out, around_lse, around_grad, around_delta):
        assert guard[:64].isnan().all() and guard[-64:].isnan().all(), "written outside of the tensor"
    return dict(out=out, grad=grad)


def check(qkv, dout, groups, scale=None, module=A):
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    found, eps = run(qkv, dout, groups, scale, module), EPS[qkv.dtype]
    for name, (exact, size) in truth(qkv, dout, groups, scale).items():
        error = (found[name].double() - exact).abs()
        assert found[name].isfinite().all(), f"{name} is not finite"
        assert (error <= 6 * eps * size + 1e-7).all(), (
            f"{name}: {(error / (eps * size + 1e-30)).max():.1f} eps"
        )


def tensors(groups, H, D, dtype=torch.float16, amplitude=1.0, seed=0, padding=0):
    """qkv and dout, N(0, amplitude); `padding` numbers of NaN between heads, and rows of NaN around."""
    torch.manual_seed(seed)
    T = sum(count * n for count, n in groups)
    wide = torch.full((T + 4, 3, H, D + padding), float("nan"), dtype=dtype)
    qkv = wide[2 : 2 + T, :, :, :D]
    qkv.copy_(amplitude * torch.randn(T, 3, H, D))
    return qkv, torch.randn(T, H, D).to(dtype)


LENGTHS = [1, 2, 15, 16, 17, 54, 63, 64, 65, 80, 128, 129, 197, 201, 257, 261, 272, 273, 321]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length(n, arch, monkeypatch):
    monkeypatch.setattr(A, "plan", lambda n, D, _: plan(n, D, arch))
    check(*tensors([(1, n)], 1, 64), [(1, n)])


@pytest.mark.parametrize("D", [32, 80, 96, 128])
def test_other_heads(D):
    for groups in ([(1, 54)], [(1, 130)]):
        check(*tensors(groups, 2, D, padding=8), groups)


def test_the_multicrop_batch():
    groups = [(1, 261), (2, 54), (2, 0), (1, 1)]
    check(*tensors(groups, 5, 64, torch.float32, padding=16), groups)  # 5 heads: the second program has one
    check(*tensors(groups[1:], 2, 64, torch.float16), groups[1:], scale=0.3)


def test_bf16(bf16):
    for groups in ([(2, 54)], [(1, 261)], [(1, 300)]):
        check(*tensors(groups, 2, 64, torch.bfloat16), groups)


@pytest.mark.slow
def test_high_resolution():  # 518 pixels: 1,369 patches, [CLS], four registers
    check(*tensors([(1, 1374)], 1, 64), [(1, 1374)])


def test_beyond_two_to_the_31():
    """The second sequence starts 2.2e9 numbers into the tensor, as at ViT-g with half a million tokens."""
    groups, stride = [(1, 16), (1, 4)], 140_000_000
    qkv = torch.empty(19 * stride + 200, dtype=torch.float16).as_strided((20, 3, 1, 32), (stride, 64, 32, 1))
    qkv.copy_(torch.randn(20, 3, 1, 32))  # of the 5 GB only these pages are ever touched
    check(qkv, torch.randn(20, 1, 32).half(), groups)


def far_below_zero(n, D=64, dtype=torch.float16):
    """All logits near -120 x 1.5: exp2(0 - lse) of a padded key is infinite, and infinity times 0 is NaN."""
    torch.manual_seed(0)
    qkv = torch.randn(n, 3, 1, D) * 0.1
    qkv[:, 0] += 5
    qkv[:, 1] -= 180 * D**0.5 / (5 * D)
    return qkv.to(dtype), torch.randn(n, 1, D).to(dtype)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("n", [1, 17, 54, 70, 261, 290])
def test_logits_far_below_zero(n, arch, monkeypatch):
    monkeypatch.setattr(A, "plan", lambda n, D, _: plan(n, D, arch))
    check(*far_below_zero(n), [(1, n)])


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
        A.plan, before = (lambda n, D, _: plan(n, D, arch)), A.plan
        try:
            check(*tensors(groups, H, D, torch.float16, amplitude, seed, padding), groups)
        finally:
            A.plan = before

    return holds


def test_properties():
    property_test(12)()


@pytest.mark.slow
def test_many_properties():
    property_test(150)()


MUTANTS = {  # what a hurried author forgets: (as it is, as it would be)
    "no key mask in the backward": ("if last:\n        p =", "if False:\n        p ="),
    "no key mask in the forward": ('float("-inf")) if last else s', 'float("-inf")) if False else s'),
    "the sum does not shrink": ("l * shrink + tl.sum(p, 1)", "l + tl.sum(p, 1)"),
    "the output does not shrink": ("o * shrink[:, None])", "o)"),
    "no scale in dq": ("dq * scale, first, BM", "dq, first, BM"),
    "no scale in dk": ("dk * scale, first, BN", "dk, first, BN"),
    "no delta": ("- delta[None, :])", ")"),
    "lse to base e": ("m + tl.log2(l)", "m + tl.log(l)"),
    "wrong head": ("lse + h * T + t", "lse + t"),
    "third chunk misplaced": ("ds_tile(q, k2, v2, do, z, d, C0 + C1,", "ds_tile(q, k2, v2, do, z, d, C0,"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_die(name, tmp_path):
    right, wrong = MUTANTS[name]
    source = (ROOT / "kernels" / "attention.py").read_text()
    assert right in source
    source = source.replace(right, wrong).replace("nanodino::", "mutant::").replace('"nanodino"', '"mutant"')
    (tmp_path / "mutant.py").write_text(source)
    spec = importlib.util.spec_from_file_location("mutant", tmp_path / "mutant.py")
    mutant = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(mutant)
        with pytest.raises(AssertionError):
            for arch in (80, 90):
                mutant.plan, plain = (lambda n, D, _, a=arch, f=mutant.plan: f(n, D, a)), mutant.plan
                for groups in ([(1, 261)], [(2, 54)], [(1, 300)]):
                    check(*tensors(groups, 2, 64), groups, module=mutant)
                    check(*far_below_zero(groups[0][1]), [(1, groups[0][1])], module=mutant)
                mutant.plan = plain
    finally:
        for op in ("attention_forward", "attention_backward"):
            torch._library.custom_ops.OPDEFS.pop(f"mutant::{op}", None)


def test_chunks_hold_every_length_and_only_the_last_is_partial():
    for n in range(65, 273):
        parts = [c for c in chunks(n) if c]
        assert sum(parts) >= n > sum(parts[:-1]) and len(parts) in (2, 3)
    assert chunks(261) == (128, 128, 16)


# ---------------------------------------------------------------- as an operator of PyTorch

GROUPS = [(2, 17), (3, 5)]


def packed(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return torch.randn(49, 3, 2, 32, dtype=dtype, **options)


def test_opcheck():
    flat = [number for group in GROUPS for number in group]
    torch.library.opcheck(attention_forward, (packed(requires_grad=True), flat, 0.2))
    out, lse = attention_forward(packed(), flat, 0.2)
    torch.library.opcheck(attention_backward, (torch.ones_like(out), packed(), out, lse, flat, 0.2))


def gradient(function, qkv, weight):
    qkv = qkv.detach().requires_grad_()
    (function(qkv) * weight).sum().backward()
    return qkv.grad


def test_paths_agree():
    """Kernels, PyTorch's and the definition; twice the same bits; compiled as eager; an expanded gradient."""
    x, w = packed(), torch.randn(49, 2, 32)
    ours = attention(x, GROUPS)
    torch.testing.assert_close(ours, sdpa(x, GROUPS), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(ours, reference(x, GROUPS)[0], atol=2e-6, rtol=1e-5)
    assert all(torch.allclose(m.sum(-1), torch.ones(())) for m in reference(x, GROUPS)[1])
    grad = gradient(lambda q: attention(q, GROUPS), x, w)
    torch.testing.assert_close(grad, gradient(lambda q: sdpa(q, GROUPS), x, w), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours, attention(x, GROUPS))
    assert torch.equal(grad, gradient(lambda q: attention(q, GROUPS), x, w))
    compiled = torch.compile(lambda q: attention(q, GROUPS), fullgraph=True, backend="aot_eager")
    assert torch.equal(grad, gradient(compiled, x, w))
    expanded = gradient(lambda q: attention(q, GROUPS), x, torch.ones(()))
    torch.testing.assert_close(
        expanded, gradient(lambda q: sdpa(q, GROUPS), x, torch.ones(())), atol=1e-5, rtol=1e-5
    )


def test_gradcheck_of_the_definition():
    x = torch.randn(7, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: sdpa(q, [(1, 4), (1, 3)]), x)
    assert torch.autograd.gradcheck(lambda q: reference(q, [(1, 4), (1, 3)], 0.7)[0], x)


def test_selective_checkpointing_saves_the_output(monkeypatch):
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    calls, plain = [], A.launch
    monkeypatch.setattr(A, "launch", lambda wanted, *rest: (calls.append(wanted.start), plain(wanted, *rest)))
    op = torch.ops.nanodino.attention_forward.default

    def policy(_, name, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if name == op else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q):
        return attention(q * 1.0, GROUPS).sin()

    x, w = packed(), torch.randn(49, 2, 32)
    plain_grad = gradient(block, x, w)
    assert calls == [0, 1]
    full = gradient(lambda q: checkpoint(block, q, use_reentrant=False), x, w)
    assert calls == [0, 1, 0, 0, 1]
    how = dict(use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    selective = gradient(lambda q: checkpoint(block, q, **how), x, w)
    assert calls == [0, 1, 0, 0, 1, 0, 1]
    assert torch.equal(plain_grad, full) and torch.equal(plain_grad, selective)


def test_autocast_takes_its_own_type(bf16):
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert attention(packed(), GROUPS).dtype == dtype


def test_the_choice(monkeypatch):
    cpu, half = torch.device("cpu"), torch.float16
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


def test_what_does_not_fit():
    for bad in ((packed(), [(1, 48)]), (packed().transpose(2, 3), GROUPS), (packed()[:, :2], GROUPS)):
        with pytest.raises(ValueError, match="last stride 1"):
            attention(*bad)
    with pytest.raises(ValueError, match="scale > 0"):
        attention(packed(), GROUPS, scale=-1.0)


# ---------------------------------------------------------------- machine code


def gate(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "compile_gate.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("arch", ["80", "90", pytest.param("100", marks=pytest.mark.slow)])
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
def test_the_bench_runs_dry(tmp_path):
    environment = dict(os.environ, TRITON_INTERPRET="1")
    command = [sys.executable, str(ROOT / "kernels" / "bench.py"), "--out", str(tmp_path / "dry.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "dry.json").read_text())["rows"]
    assert {r["part"] for r in rows} == {"correct", "step", "attention", "prototypes", "tiles"}
    race = next(r for r in rows if r["part"] == "attention")
    assert set(race["forward_ms"]) >= {"ours", "SDPA"} and "xFormers" in {
        **race["failed"],
        **race["forward_ms"],
    }
    assert all(r["right"] for r in rows if r["part"] == "tiles")
    assert "| best peer / ours |" in (tmp_path / "dry.md").read_text()
