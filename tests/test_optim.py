"""Schedules and parameter groups against the authors' (tests/golden); the moving average."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from model import DINOv2, init_weights
from optim import (
    apply_schedules,
    clip_gradients,
    compute_schedules,
    make_optimizer,
    param_group_multipliers,
    update_teacher,
)

GOLDEN = Path(__file__).parent / "golden"
LONG = ["teacher.momentum_teacher=0.994", "optim.epochs=500", "optim.weight_decay_end=0.2",
        "optim.base_lr=2e-4", "optim.warmup_epochs=80"]  # fmt: skip
RECIPES = {"vitl16_short": [], "vitl14": [*LONG, "train.batch_size_per_gpu=32"],
           "vitg14": [*LONG, "train.batch_size_per_gpu=12"]}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_schedules(name):
    f = np.load(GOLDEN / "g_schedules.npz")
    cfg, gpus = config.load(overrides=RECIPES[name]), int(f[f"{name}.assumed_gpus"])
    assert round(cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH) == f[f"{name}.total_iters"]
    ours = [compute_schedules(cfg, int(i), gpus) for i in f[f"{name}.idx"]]
    names = dict(
        lr="lr",
        wd="weight_decay",
        momentum="momentum",
        teacher_temp="teacher_temp",
        last_layer_lr="last_layer_lr",
    )
    for theirs, mine in names.items():
        np.testing.assert_allclose([o[mine] for o in ours], f[f"{name}.{theirs}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("ffn", ["mlp", "swiglufused"])
def test_multipliers(ffn):
    groups = json.loads((GOLDEN / "h_param_groups.json").read_text())
    for part in (f"backbone_unchunked_{ffn}", "dino_head"):
        for name, want in groups[part].items():
            lr, wd, rate = param_group_multipliers(name, 3, 0.9, 0.2)
            assert (lr, wd, rate == "last_layer_lr") == (
                pytest.approx(want["lr"]),
                want["wd"],
                want["last"],
            ), name


def small(*overrides):
    return config.load(model="debug", overrides=overrides)


def test_every_parameter_is_in_one_group_and_rates_are_set():
    cfg = small("student.layerscale=0.1", "optim.layerwise_decay=0.9")
    student = DINOv2(cfg)
    optimizer = make_optimizer(student, cfg)
    ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in student.parameters())
    apply_schedules(optimizer, dict(lr=1.0, last_layer_lr=0.0, backbone_lr=1.0, weight_decay=0.5))
    of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert of[id(student.dino_head.last_layer.weight_v)]["lr"] == 0
    assert (
        of[id(student.backbone.norm.weight)]["lr"] == 1
        and of[id(student.backbone.norm.weight)]["weight_decay"] == 0
    )
    assert of[id(student.backbone.pos_embed)]["weight_decay"] == 0.5
    assert of[id(student.backbone.patch_embed.proj.weight)]["lr"] == pytest.approx(
        0.9**5 * cfg.optim.patch_embed_lr_mult
    )


def test_frozen_prototype_lengths_stay_out_of_the_optimizer():
    cfg = small("dino.freeze_weight_g=true")
    student = DINOv2(cfg)
    held = {id(p) for g in make_optimizer(student, cfg).param_groups for p in g["params"]}
    assert id(student.dino_head.last_layer.weight_g) not in held


def test_teacher_moves_by_one_minus_m():
    cfg = small()
    student, teacher = DINOv2(cfg), DINOv2(cfg)
    init_weights(teacher, seed=1)
    before, no = [p.clone() for p in teacher.parameters()], torch.zeros(())
    update_teacher(teacher, student, 0.9, found_inf=1 - no)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), before, strict=True))
    update_teacher(teacher, student, 0.9, no)
    for t, old, s in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(t, 0.9 * old + 0.1 * s)
        assert t.grad is None and t.data_ptr() != s.data_ptr()
    now = [p.clone() for p in teacher.parameters()]
    update_teacher(teacher, student, 1.0, no)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), now, strict=True))


def test_clipping_is_per_module():
    cfg = small()
    student = DINOv2(cfg)
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    norms = clip_gradients(student, 3.0)
    assert set(norms) == {"grad_backbone", "grad_dino_head"}
    for module in student.children():
        total = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
        assert total.item() == pytest.approx(3.0, rel=1e-3)


def test_clip_grad_zero_is_no_clipping():
    student = DINOv2(small())
    for p in student.parameters():
        p.grad = torch.full_like(p, 9.0)
    clip_gradients(student, 0)
    assert all((p.grad == 9).all() for p in student.parameters())
