"""One whole step through train.train_step against the authors' (tests/golden); what a step must not do."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import GOLDEN, assert_close, debug_config, random_batch, take_steps
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import config
import train
from kernels import attention
from model import SIZES
from optim import compute_schedules

BATCH_NAMES = {
    "globals": "collated_global_crops",
    "locals": "collated_local_crops",
    "masks": "collated_masks",
    "mask_indices": "mask_indices_list",
    "mask_weights": "masks_weight",
}


def golden_step(name, monkeypatch, tmp_path):
    """The golden numbers; a TrainState with the golden weights; the batch and config of the authors' step."""
    monkeypatch.setitem(SIZES, "vit_small", dict(embed_dim=48, depth=2, num_heads=3))
    golden = np.load(GOLDEN / f"k_step_{name}.npz")
    path = tmp_path / "published.yaml"
    path.write_text(str(golden["cfg"]).replace("vit_tiny_golden", "vit_small"))
    exact = ["optim.clip_grad=1e9", "train.batch_size_per_gpu=4", "compute_precision.dtype=fp32"]
    cfg = config.load(file=path, overrides=exact)
    state = train.TrainState(cfg)
    student = {}
    teacher = {}
    for key in golden.files:
        if key.startswith("student."):
            parameter = key.removeprefix("student.")
            student[parameter] = torch.from_numpy(golden[key])
            teacher[parameter] = student[parameter]
            difference = f"teacher_minus_student.{parameter}"
            if difference in golden.files:
                teacher[parameter] = student[parameter] + torch.from_numpy(golden[difference]).float()
    state.student.load_state_dict(student, strict=True)
    state.teacher.load_state_dict(teacher, strict=True)
    batch = {ours: torch.from_numpy(golden[theirs]) for ours, theirs in BATCH_NAMES.items()}
    return golden, state, batch, cfg


@pytest.mark.parametrize("name", ["centering_shared_head", "sinkhorn_separate_heads"])
def test_a_whole_step(name, monkeypatch, tmp_path):
    golden, state, batch, cfg = golden_step(name, monkeypatch, tmp_path)
    schedules = dict(compute_schedules(cfg, 0), teacher_temp=float(golden["teacher_temp"]))
    metrics = train.train_step(state, [batch], schedules, cfg)
    assert_close(metrics["loss"], golden["loss.total"])
    assert_close(metrics["loss_dino_local"], golden["loss.dino_local_crops_loss"])
    assert_close(metrics["loss_dino_global"], golden["loss.dino_global_crops_loss"])
    assert_close(metrics["loss_ibot"], 2 * golden["loss.ibot_loss"])  # the authors log half of what they
    assert_close(metrics["loss_koleo"], 2 * golden["loss.koleo_loss"])  # optimise of both of these
    for parameter, value in state.student.named_parameters():
        assert_close(value.grad.norm(), golden[f"gradnorm.{parameter}"])
        if f"grad.{parameter}" in golden.files:
            assert_close(value.grad, golden[f"grad.{parameter}"])
    for key in golden.files:
        if key.startswith("total_gradnorm."):
            assert_close(metrics["grad_" + key.removeprefix("total_gradnorm.")], golden[key])


# ---------------------------------------------------------------- invariants of every step

VARIANTS = [
    [],
    ["ibot.separate_head=true"],
    ["train.centering=centering"],
    ["crops.local_crops_number=0"],
    ["student.drop_path_rate=0.4"],
    ["student.num_register_tokens=0"],
    ["student.ffn_layer=swiglu"],
]


@pytest.mark.parametrize("overrides", VARIANTS)
def test_logged_terms_sum_to_the_loss_and_everything_learns(overrides):
    cfg = debug_config(*overrides)
    batch = random_batch(cfg)
    if not cfg.crops.local_crops_number:
        batch["locals"] = None
    state, metrics = take_steps(cfg, batch=[batch])
    terms = sum(value for name, value in metrics.items() if name.startswith("loss_"))
    assert terms.item() == pytest.approx(metrics["loss"].item(), rel=1e-6)
    assert metrics["skipped"] == 0
    for name, parameter in state.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in state.teacher.parameters())


def test_teacher_is_a_copy_that_moves():
    cfg = debug_config()
    torch.manual_seed(0)
    state = train.TrainState(cfg)
    pairs = list(zip(state.student.parameters(), state.teacher.parameters(), strict=True))
    for student, teacher in pairs:
        assert torch.equal(student, teacher)
        assert student.data_ptr() != teacher.data_ptr()
    before = [teacher.clone() for _, teacher in pairs]
    schedules = compute_schedules(cfg, 150)
    train.train_step(state, [random_batch(cfg)], schedules, cfg)
    momentum = schedules["momentum"]
    for (student, teacher), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(teacher, momentum * old + (1 - momentum) * student.detach())


def copy_of_everything(state):
    """All that a step may move: weights, teacher, centre, moments of the optimizer."""
    tensors = [*state.student.state_dict().values(), *state.teacher.state_dict().values()]
    tensors.append(state.dino_center.center)
    for moments in state.optimizer.state.values():
        tensors += moments.values()
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
def test_a_step_that_is_not_finite_moves_nothing(bad, mode):
    cfg = debug_config(f"train.centering={mode}")
    state, _ = take_steps(cfg)
    before = copy_of_everything(state)
    schedules = compute_schedules(cfg, 150)
    batch = random_batch(cfg)
    batch["globals"][3, 0, 0, 0] = bad
    assert train.train_step(state, [batch], schedules, cfg)["skipped"] == 1
    for old, new in zip(before, copy_of_everything(state), strict=True):
        assert torch.equal(old, new)
    assert train.train_step(state, [random_batch(cfg)], schedules, cfg)["skipped"] == 0


def test_accumulation_moves_teacher_and_centre_once():
    cfg = debug_config("train.centering=centering")
    batches = [random_batch(cfg, seed=1), random_batch(cfg, seed=2)]
    state, _ = take_steps(cfg, batch=batches)
    torch.manual_seed(0)
    fresh = train.TrainState(cfg)
    logits = []
    with torch.no_grad():
        for batch in batches:
            cls = fresh.teacher.backbone(batch["globals"]).cls
            logits.append(fresh.teacher.heads(cls, torch.zeros(0, 96))[0])
    assert_close(state.dino_center.center, 0.1 * torch.cat(logits).mean(0, keepdim=True))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_losses_in_fp32(dtype):
    _, half = take_steps(debug_config(f"compute_precision.dtype={dtype}"))
    _, full = take_steps(debug_config("compute_precision.dtype=fp32"))
    assert half["loss"].dtype == torch.float32
    assert half["loss"].item() == pytest.approx(full["loss"].item(), rel=0.02)


DINO_V1 = ["ibot.mask_sample_probability=0", "dino.koleo_loss_weight=0", "student.layerscale=0",
           "student.num_register_tokens=0", "dino.freeze_weight_g=true",
           "train.centering=centering"]  # fmt: skip


def test_dinov1_needs_no_masks():
    cfg = debug_config(*DINO_V1)
    no_indices = torch.zeros(0, dtype=torch.long)
    batch = dict(random_batch(cfg), masks=None, mask_indices=no_indices, mask_weights=torch.zeros(0))
    state, metrics = take_steps(cfg, batch=[batch])
    terms = {name for name in metrics if name.startswith("loss_")}
    assert terms == {"loss_dino_local", "loss_dino_global"}
    assert (state.student.dino_head.last_layer.weight_g == 1).all()


# ---------------------------------------------------------------- the host never waits for the device


class NoSynchronisation(TorchDispatchMode):
    """Fails when the host asks the device for a number, or for a shape that depends on numbers."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket.__name__ not in self.FORBIDDEN, op
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
def test_the_host_runs_ahead_of_the_device(mode):
    cfg = debug_config(f"train.centering={mode}", "student.drop_path_rate=0.2")
    state, _ = take_steps(cfg)
    batch = random_batch(cfg)
    with NoSynchronisation():
        metrics = train.train_step(state, [batch], compute_schedules(cfg, 1), cfg)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronisation():
        metrics["loss"].item()


def pretend_gpu(patch):
    """Answers that a GPU would give, for tensors that have a shape, a type and a device, but no numbers."""
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(train.prototypes, "fused", lambda logits: False)  # Triton would ask where the numbers are
    patch.setattr(train, "init_weights", lambda *_: None)
    patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))

    def shard(model, device, dtype):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                on_device = torch.empty(parameter.shape, device=device)
                trainable = parameter.requires_grad
                module._parameters[name] = torch.nn.Parameter(on_device, requires_grad=trainable)
        return model

    patch.setattr(train.dist, "shard", shard)


@pytest.mark.skipif(not torch.version.cuda, reason="this PyTorch knows no GPUs")
@pytest.mark.parametrize("choice, compiled", [("auto", "auto"), ("pytorch", "off")])
@pytest.mark.parametrize("mode", ["centering", "sinkhorn_knopp"])
def test_a_step_on_a_pretended_gpu(mode, choice, compiled, monkeypatch):
    """Every tensor is on the GPU, tokens are bf16, and no number is asked for; all but the backward pass."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(attention, "CHOICE", choice)
    cfg = debug_config(f"train.centering={mode}", "student.drop_path_rate=0.2", f"speed.compile={compiled}",
                       "compute_precision.dtype=auto")  # fmt: skip
    batch = random_batch(cfg)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
        for name, value in batch.items():
            if torch.is_tensor(value):
                batch[name] = fake_mode.from_tensor(value).cuda()
        state = train.TrainState(cfg, "cuda")

        def backward(loss):
            assert loss.is_cuda
            for parameter in state.student.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        dtypes = []
        final_norm = state.student.backbone.norm
        final_norm.register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
        metrics = train.train_step(state, [batch], compute_schedules(cfg, 1), cfg, log_diagnostics=True)
    assert state.dtype == torch.bfloat16
    assert dtypes == [torch.bfloat16]
    assert all(value.is_cuda for value in metrics.values())
    assert all(value.dtype == torch.float32 for value in metrics.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu():
    cfg = debug_config("student.drop_path_rate=0.2")
    state = train.TrainState(cfg, "cuda")
    loader = train.make_loader(
        cfg, train.open_dataset(cfg.train.dataset_path, cfg.data), torch.device("cuda")
    )
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        train.train_step(state, [next(loader)], compute_schedules(cfg, step), cfg)
    torch.cuda.set_sync_debug_mode("default")
