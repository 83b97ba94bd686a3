"""tools/plan.py against what PyTorch counts in a real step."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import config
import train
from config import UserError
from optim import compute_schedules
from tools import plan

SMALL = ["train.dataset_path=scenes:40", "train.batch_size_per_gpu=4", "dino.head_n_prototypes=512",
         "ibot.head_n_prototypes=300", "student.drop_path_rate=0",
         "compute_precision.dtype=fp32"]  # fmt: skip


def real_step(*settings):
    """A configuration, its Workload with the real number of masked patches, a TrainState and a batch."""
    cfg = config.load(model="debug", overrides=[*SMALL, *settings])
    dataset = train.open_dataset(cfg.train.dataset_path, cfg.data)
    batch = next(train.make_loader(cfg, dataset, "cpu"))
    workload = plan.Workload(cfg)
    masked = len(batch["mask_indices"])
    assert 0.8 < masked / workload.M <= 1.05  # the estimate: counts are rounded down
    workload.M = masked
    return cfg, workload, train.TrainState(cfg), batch


@pytest.mark.parametrize("settings,tolerance", [
    ([], 1e-4), (["ibot.separate_head=true"], 1e-4), (["student.ffn_layer=swiglu"], 1e-4),
    (["student.arch=vit_small", "crops.local_crops_number=3"], 1e-4), (["student.drop_path_rate=0.5"], 1e-2),
])  # fmt: skip
def test_flops_are_what_a_step_does(settings, tolerance):
    cfg, workload, state, batch = real_step(*settings)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        train.train_step(state, [batch], compute_schedules(cfg, 0), cfg)
    planned = sum(plan.step_flops(workload).values())
    assert counted.get_total_flops() == pytest.approx(planned, rel=tolerance)


@pytest.mark.parametrize("settings", [[], ["student.ffn_layer=swiglu"], ["student.drop_path_rate=0.5"]])
def test_bytes_are_what_a_step_keeps(settings):
    cfg, workload, state, batch = real_step("student.arch=vit_small", *settings)
    weights = {p.data_ptr() for p in state.student.parameters()}
    kept = {}
    alive = []

    def keep(x):
        alive.append(x)  # or its address would be given away again
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        state.student.backbone.forward_crops([batch["globals"], batch["locals"]], [batch["masks"], None])
    assert 0.95 < sum(kept.values()) / plan.activation_bytes(workload, False, "off") < 1.15


def num_bytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def test_states_are_what_the_optimizer_holds():
    cfg, workload, state, batch = real_step()
    train.train_step(state, [batch], compute_schedules(cfg, 0), cfg)
    moments = []
    for parameter_state in state.optimizer.state.values():
        moments += [parameter_state["exp_avg"], parameter_state["exp_avg_sq"]]
    memory = plan.memory_bytes(workload, cfg, 1, half=False)
    assert memory["student, fp32 shard"] == num_bytes(state.student.parameters())
    assert memory["AdamW"] == num_bytes(moments)
    assert memory["gradients"] == num_bytes(p.grad for p in state.student.parameters())
    assert plan.memory_bytes(workload, cfg, 8, half=False)["AdamW"] == memory["AdamW"] / 8


def test_the_plan_of_a_preset(capsys):
    plan.main(["--model", "vitg14", "gpus=256"])
    printed = capsys.readouterr().out
    assert "1,234,925,184 parameters" in printed
    assert "3,072 images per step" in printed and "GPU-hours" in printed
    assert "will not fit" not in printed
    plan.main(["--model", "vitg14", "train.batch_size_per_gpu=64", "memory=24"])
    assert "warning: this will not fit" in capsys.readouterr().out


def test_checkpointing_saves_activations():
    def planned_activations(overrides):
        lines = plan.plan_run(config.load(model="vitg14", overrides=overrides), 8, 0.4, 989, 80)
        (line,) = [line for line in lines if "activations" in line]
        return float(line.split()[-1])

    assert planned_activations(["speed.checkpointing=full"]) < 0.2 * planned_activations([])


@pytest.mark.parametrize("wrong", ["gpus=none", "gpus=0", "gpus=1.5", "mfu=-1", "mfu=nan", "memory=inf",
                                   f"gpus=1{'0' * 400}"])  # fmt: skip
def test_bad_numbers_are_one_sentence(wrong):
    with pytest.raises(UserError, match="must be a (number above 0|whole number, 1 or more)"):
        plan.main(["--model", "vits14", wrong])
