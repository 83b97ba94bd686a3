"""Schedules and parameter groups against the authors' (tests/golden); the moving average; clipping."""

import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, debug_config

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

LONG = ["teacher.momentum_teacher=0.994", "optim.epochs=500", "optim.weight_decay_end=0.2",
        "optim.base_lr=2e-4", "optim.warmup_epochs=80"]  # fmt: skip
RECIPES = {
    "vitl16_short": [],
    "vitl14": [*LONG, "train.batch_size_per_gpu=32"],
    "vitg14": [*LONG, "train.batch_size_per_gpu=12"],
}
THEIR_NAMES = {"weight_decay": "wd"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_schedules(recipe):
    golden = np.load(GOLDEN / "g_schedules.npz")
    cfg = config.load(overrides=RECIPES[recipe])
    gpus = int(golden[f"{recipe}.assumed_gpus"])
    assert round(cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH) == golden[f"{recipe}.total_iters"]
    ours = [compute_schedules(cfg, int(step), gpus) for step in golden[f"{recipe}.idx"]]
    for name in ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp"):
        theirs = golden[f"{recipe}.{THEIR_NAMES.get(name, name)}"]
        np.testing.assert_allclose([schedules[name] for schedules in ours], theirs, rtol=0, atol=1e-9)


PARAM_GROUPS = json.loads((GOLDEN / "h_param_groups.json").read_text())


@pytest.mark.parametrize("module", ["backbone_unchunked_mlp", "backbone_unchunked_swiglufused", "dino_head"])
def test_multipliers(module):
    for name, expected in PARAM_GROUPS[module].items():
        lr_mult, wd_mult, schedule = param_group_multipliers(name, 3, 0.9, 0.2)
        assert lr_mult == pytest.approx(expected["lr"]), name
        assert wd_mult == expected["wd"], name
        assert (schedule == "last_layer_lr") == expected["last"], name


def test_every_parameter_is_in_one_group_and_rates_are_set():
    cfg = debug_config("student.layerscale=0.1", "optim.layerwise_decay=0.9")
    student = DINOv2(cfg)
    optimizer = make_optimizer(student, cfg)
    group_of = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter not in group_of
            group_of[parameter] = group
    assert set(group_of) == set(student.parameters())
    apply_schedules(optimizer, dict(lr=1.0, last_layer_lr=0.0, backbone_lr=1.0, weight_decay=0.5))
    backbone = student.backbone
    assert group_of[student.dino_head.last_layer.weight_v]["lr"] == 0
    assert group_of[backbone.norm.weight]["lr"] == 1
    assert group_of[backbone.norm.weight]["weight_decay"] == 0
    assert group_of[backbone.pos_embed]["weight_decay"] == 0.5
    patch_embed_lr = 0.9**5 * cfg.optim.patch_embed_lr_mult
    assert group_of[backbone.patch_embed.proj.weight]["lr"] == pytest.approx(patch_embed_lr)


def test_frozen_prototype_lengths_stay_out_of_the_optimizer():
    cfg = debug_config("dino.freeze_weight_g=true")
    student = DINOv2(cfg)
    held = set()
    for group in make_optimizer(student, cfg).param_groups:
        held.update(group["params"])
    assert student.dino_head.last_layer.weight_g not in held


def same_parameters(module, values):
    return all(torch.equal(*pair) for pair in zip(module.parameters(), values, strict=True))


def test_teacher_moves_by_one_minus_m():
    cfg = debug_config()
    student = DINOv2(cfg)
    teacher = DINOv2(cfg)
    init_weights(teacher, seed=1)
    fine = torch.zeros(())
    before = [parameter.clone() for parameter in teacher.parameters()]
    update_teacher(teacher, student, 0.9, found_inf=1 - fine)
    assert same_parameters(teacher, before)
    update_teacher(teacher, student, 0.9, found_inf=fine)
    for moved, old, target in zip(teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(moved, 0.9 * old + 0.1 * target)
        assert moved.grad is None
        assert moved.data_ptr() != target.data_ptr()
    before = [parameter.clone() for parameter in teacher.parameters()]
    update_teacher(teacher, student, 1.0, found_inf=fine)
    assert same_parameters(teacher, before)


def student_with_gradients(value):
    student = DINOv2(debug_config())
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return student


def test_clipping_is_per_module():
    student = student_with_gradients(1.0)
    norms = clip_gradients(student, 3.0)
    assert set(norms) == {"grad_backbone", "grad_dino_head"}
    for module in student.children():
        total = torch.stack([parameter.grad.norm() for parameter in module.parameters()]).norm()
        assert total.item() == pytest.approx(3.0, rel=1e-3)


def test_clip_grad_zero_is_no_clipping():
    student = student_with_gradients(9.0)
    clip_gradients(student, 0)
    assert all((parameter.grad == 9).all() for parameter in student.parameters())
