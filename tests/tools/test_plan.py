"""plan.py against what PyTorch counts in a real step."""

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
         "ibot.head_n_prototypes=300", "student.drop_path_rate=0"]  # fmt: skip


def real(*settings):
    """A configuration, its Shape with the real number of masked patches, a TrainState and a batch."""
    cfg = config.load(model="debug", overrides=[*SMALL, *settings])
    source = train.open_source(cfg.train.dataset_path)
    batch, shape = next(train.make_loader(cfg, source, "cpu")), plan.Shape(cfg)
    assert 0.8 < len(batch["mask_indices"]) / shape.M <= 1.05  # the estimate: counts are rounded down
    shape.M = len(batch["mask_indices"])
    return cfg, shape, train.TrainState(cfg), batch


@pytest.mark.parametrize("settings,tolerance", [
    ([], 1e-4), (["ibot.separate_head=true"], 1e-4), (["student.ffn_layer=swiglu"], 1e-4),
    (["student.arch=vit_small", "crops.local_crops_number=3"], 1e-4), (["student.drop_path_rate=0.5"], 1e-2),
])  # fmt: skip
def test_flops_are_what_a_step_does(settings, tolerance):
    cfg, shape, t, batch = real(*settings)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        train.train_step(t, [batch], compute_schedules(cfg, 0), cfg)
    assert counted.get_total_flops() == pytest.approx(sum(plan.flops(shape).values()), rel=tolerance)


@pytest.mark.parametrize("settings", [[], ["student.ffn_layer=swiglu"], ["student.drop_path_rate=0.5"]])
def test_bytes_are_what_a_step_keeps(settings):
    cfg, shape, t, batch = real("student.arch=vit_small", *settings)
    weights, kept, alive = {p.data_ptr() for p in t.student.parameters()}, {}, []

    def keep(x):
        alive.append(x)  # or its address would be given away again
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        t.student.backbone.forward_crops([batch["globals"], batch["locals"]], [batch["masks"], None])
    assert 0.95 < sum(kept.values()) / plan.activations(shape, False, "off") < 1.15


def test_states_are_what_the_optimizer_holds():
    cfg, shape, t, batch = real()
    train.train_step(t, [batch], compute_schedules(cfg, 0), cfg)
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)  # noqa: E731
    moments = [v for s in t.optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")]
    parts = plan.memory(shape, cfg, 1, half=False)
    assert parts["student, fp32 shard"] == size(t.student.parameters()) and parts["AdamW"] == size(moments)
    assert parts["gradients"] == size(p.grad for p in t.student.parameters())
    assert plan.memory(shape, cfg, 8, half=False)["AdamW"] == parts["AdamW"] / 8


def test_it_speaks(capsys):
    plan.main(["--model", "vitg14", "gpus=256"])
    said = capsys.readouterr().out
    assert "1,234,925,184 parameters" in said and "3,072 images per step" in said and "GPU-hours" in said
    assert "will not fit" not in said
    plan.main(["--model", "vitg14", "train.batch_size_per_gpu=64", "memory=24"])
    assert "warning: this will not fit" in capsys.readouterr().out
    less = plan.plan(config.load(model="vitg14", overrides=["speed.checkpointing=full"]), 8, 0.4, 989, 80)
    more = plan.plan(config.load(model="vitg14"), 8, 0.4, 989, 80)
    activations = [
        float(line.split()[-1]) for lines in (less, more) for line in lines if "activations" in line
    ]
    assert activations[0] < 0.2 * activations[1]


@pytest.mark.parametrize("wrong", ["gpus=none", "gpus=0", "mfu=-1", "memory=inf"])
def test_bad_numbers_are_one_sentence(wrong):
    with pytest.raises(UserError, match="must be a number above 0"):
        plan.main(["--model", "vits14", wrong])
