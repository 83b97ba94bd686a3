"""One whole step through train.train_step against the authors' (tests/golden); what a step must not do."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import close
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import config
import train
from kernels import attention
from model import SIZES
from optim import compute_schedules

GOLDEN = Path(__file__).parent / "golden"


def golden_step(name, monkeypatch, tmp_path):
    """A TrainState with the golden weights, the golden batch, and the config that the authors' code ran with."""
    monkeypatch.setitem(SIZES, "vit_small", dict(embed_dim=48, depth=2, num_heads=3))
    f = np.load(GOLDEN / f"k_step_{name}.npz")
    path = tmp_path / "published.yaml"
    path.write_text(str(f["cfg"]).replace("vit_tiny_golden", "vit_small"))
    cfg = config.load(file=path, overrides=["optim.clip_grad=1e9", "train.batch_size_per_gpu=4"])
    t = train.TrainState(cfg)
    student = {
        k.removeprefix("student."): torch.from_numpy(f[k]) for k in f.files if k.startswith("student.")
    }
    delta = {
        k.removeprefix("teacher_minus_student."): torch.from_numpy(f[k]).float()
        for k in f.files
        if "teacher_minus" in k
    }
    assert set(student) == set(t.student.state_dict())
    t.student.load_state_dict(student, strict=True)
    t.teacher.load_state_dict({k: v + delta[k] if k in delta else v for k, v in student.items()}, strict=True)
    names = dict(globals="collated_global_crops", locals="collated_local_crops", masks="collated_masks",
                 mask_indices="mask_indices_list", mask_weights="masks_weight")  # fmt: skip
    batch = {ours: torch.from_numpy(f[theirs]) for ours, theirs in names.items()}
    return t, batch, cfg, f


@pytest.mark.parametrize("name", ["centering_shared_head", "sinkhorn_separate_heads"])
def test_a_whole_step(name, monkeypatch, tmp_path):
    t, batch, cfg, f = golden_step(name, monkeypatch, tmp_path)
    now = dict(compute_schedules(cfg, 0), teacher_temp=float(f["teacher_temp"]))
    metrics = train.train_step(t, [batch], now, cfg)
    close(metrics["loss"], f["loss.total"])
    close(metrics["loss_dino_local"], f["loss.dino_local_crops_loss"])
    close(metrics["loss_dino_global"], f["loss.dino_global_crops_loss"])
    close(metrics["loss_ibot"], 2 * f["loss.ibot_loss"])  # the authors log half of what they optimise ...
    close(metrics["loss_koleo"], 2 * f["loss.koleo_loss"])  # ... of both of these
    checked = 0
    for parameter, value in t.student.named_parameters():
        if f"gradnorm.{parameter}" in f.files:
            close(value.grad.norm(), f[f"gradnorm.{parameter}"])
            checked += 1
        if f"grad.{parameter}" in f.files:
            close(value.grad, f[f"grad.{parameter}"])
    assert checked == len(list(t.student.parameters()))
    for key in f.files:
        if key.startswith("total_gradnorm."):
            close(metrics["grad_" + key.removeprefix("total_gradnorm.")], f[key])


def small(*overrides):
    return config.load(model="debug", overrides=["student.drop_path_rate=0", *overrides])


def random_batch(cfg, B=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    S, s, L, N = (cfg.crops.global_crops_size, cfg.crops.local_crops_size, cfg.crops.local_crops_number,
                  (cfg.crops.global_crops_size // cfg.student.patch_size) ** 2)  # fmt: skip
    masks = torch.zeros(2 * B, N, dtype=torch.bool)
    masks[::2, : N // 4] = True
    weights = torch.full((int(masks.sum()),), 1 / (N // 4))
    return dict(globals=torch.randn(2 * B, 3, S, S, generator=g),
                locals=torch.randn(L * B, 3, s, s, generator=g), masks=masks,
                mask_indices=masks.flatten().nonzero().flatten(), mask_weights=weights)  # fmt: skip


def take_steps(cfg, n=1, batch=None):
    torch.manual_seed(0)
    t = train.TrainState(cfg)
    for i in range(n):
        metrics = train.train_step(
            t, batch or [random_batch(cfg, seed=i)], compute_schedules(cfg, 150), cfg, log_diagnostics=True
        )
    return t, metrics


VARIANTS = [[], ["ibot.separate_head=true"], ["train.centering=centering"], ["crops.local_crops_number=0"],
            ["student.drop_path_rate=0.4"], ["student.num_register_tokens=0"],
            ["student.ffn_layer=swiglu"]]  # fmt: skip


@pytest.mark.parametrize("overrides", VARIANTS)
def test_logged_terms_sum_to_the_loss_and_everything_learns(overrides):
    cfg = small(*overrides)
    batch = random_batch(cfg)
    if not cfg.crops.local_crops_number:
        batch["locals"] = None
    t, m = take_steps(cfg, batch=[batch])
    assert sum(v for k, v in m.items() if k.startswith("loss_")).item() == pytest.approx(
        m["loss"].item(), rel=1e-6
    )
    without = [n for n, p in t.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without and m["skipped"] == 0
    assert all(p.grad is None for p in t.teacher.parameters())


def test_teacher_is_a_copy_that_moves():
    cfg = small()
    torch.manual_seed(0)
    t = train.TrainState(cfg)
    pairs = list(zip(t.student.parameters(), t.teacher.parameters(), strict=True))
    assert all(torch.equal(s, w) and s.data_ptr() != w.data_ptr() for s, w in pairs)
    before = [w.clone() for _, w in pairs]
    now = compute_schedules(cfg, 150)
    train.train_step(t, [random_batch(cfg)], now, cfg)
    for (s, w), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(w, now["momentum"] * old + (1 - now["momentum"]) * s.detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
def test_a_step_that_is_not_finite_moves_nothing(bad, mode):
    cfg = small(f"train.centering={mode}")
    t, _ = take_steps(cfg)

    def everything():
        moments = [x for state in t.optimizer.state.values() for x in state.values()]
        return [
            *t.student.state_dict().values(),
            *t.teacher.state_dict().values(),
            t.dino_center.center,
            *moments,
        ]

    before = [v.clone() for v in everything()]
    batch = random_batch(cfg)
    batch["globals"][3, 0, 0, 0] = bad
    assert train.train_step(t, [batch], compute_schedules(cfg, 150), cfg)["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert train.train_step(t, [random_batch(cfg)], compute_schedules(cfg, 150), cfg)["skipped"] == 0


class NoQuestions(TorchDispatchMode):
    """Fails when the host asks the device for a number, or for a shape that depends on numbers."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket.__name__ not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
        ), op
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
def test_the_host_runs_ahead_of_the_device(mode):
    cfg = small(f"train.centering={mode}", "student.drop_path_rate=0.2")
    t, _ = take_steps(cfg)
    batch = random_batch(cfg)
    with NoQuestions():
        metrics = train.train_step(t, [batch], compute_schedules(cfg, 1), cfg)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoQuestions():
        metrics["loss"].item()


def on_a_pretended_gpu(patch):
    """Answers that a GPU would give, for tensors that have a shape, a type and a device, but no numbers."""
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(train.prototypes, "uses_kernels", lambda logits: False)  # Triton would ask where the numbers are
    patch.setattr(train, "init_weights", lambda *_: None)
    patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def shard(model, device, dtype):
        for module in model.modules():
            for name, p in module._parameters.items():
                made = torch.empty(p.shape, device=device)
                module._parameters[name] = torch.nn.Parameter(made, requires_grad=p.requires_grad)
        return model

    patch.setattr(train.dist, "shard", shard)


@pytest.mark.skipif(not torch.version.cuda, reason="this PyTorch knows no GPUs")
@pytest.mark.parametrize("choice, compiled", [("auto", "auto"), ("pytorch", "off")])
@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
def test_a_step_on_a_pretended_gpu(mode, choice, compiled, monkeypatch):
    """Every tensor is on the GPU, tokens are bf16, and no number is asked for; all but the backward pass."""
    on_a_pretended_gpu(monkeypatch)
    monkeypatch.setattr(attention, "CHOICE", choice)
    cfg = small(f"train.centering={mode}", "student.drop_path_rate=0.2", f"speed.compile={compiled}")
    host = random_batch(cfg)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True) as pretend:
        batch = {k: pretend.from_tensor(v).cuda() if torch.is_tensor(v) else v for k, v in host.items()}
        t = train.TrainState(cfg, "cuda")

        def backward(loss):
            assert loss.is_cuda
            for p in t.student.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        seen = []
        t.student.backbone.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        metrics = train.train_step(t, [batch], compute_schedules(cfg, 1), cfg, log_diagnostics=True)
    assert t.dtype == torch.bfloat16 and [x.dtype for x in seen] == [torch.bfloat16]
    assert all(x.is_cuda and x.dtype == torch.float32 for x in metrics.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    cfg = small("student.drop_path_rate=0.2")
    t = train.TrainState(cfg, "cuda")
    loader = train.make_loader(cfg, train.open_source(cfg.train.dataset_path), torch.device("cuda"))
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        train.train_step(t, [next(loader)], compute_schedules(cfg, step), cfg)
    torch.cuda.set_sync_debug_mode("default")


def test_accumulation_moves_teacher_and_centre_once():
    cfg = small("train.centering=centering")
    one, two = random_batch(cfg, seed=1), random_batch(cfg, seed=2)
    t, _ = take_steps(cfg, batch=[one, two])
    torch.manual_seed(0)
    single = train.TrainState(cfg)
    with torch.no_grad():
        logits = [
            single.teacher.heads(single.teacher.backbone(b["globals"]).cls, torch.zeros(0, 96))[0]
            for b in (one, two)
        ]
    close(t.dino_center.center, 0.1 * torch.cat(logits).mean(0, keepdim=True))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_losses_in_fp32(dtype):
    t, m = take_steps(small(f"compute_precision.dtype={dtype}"))
    _, full = take_steps(small("compute_precision.dtype=fp32"))
    assert m["loss"].dtype == torch.float32 and m["loss"].item() == pytest.approx(
        full["loss"].item(), rel=0.02
    )


def test_dinov1_needs_no_masks():
    cfg = small("ibot.mask_sample_probability=0", "dino.koleo_loss_weight=0", "student.layerscale=0",
                 "student.num_register_tokens=0", "dino.freeze_weight_g=true",
                 "train.centering=centering")  # fmt: skip
    batch = dict(
        random_batch(cfg),
        masks=None,
        mask_indices=torch.zeros(0, dtype=torch.long),
        mask_weights=torch.zeros(0),
    )
    t, m = take_steps(cfg, batch=[batch])
    assert {k for k in m if k.startswith("loss_")} == {"loss_dino_local", "loss_dino_global"}
    assert (t.student.dino_head.last_layer.weight_g == 1).all()
