"""One process and two are the same run: sharding, resuming at another size, and what each rank holds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forkserver import RUN_ENVIRONMENT
from helpers import ROOT, TWO_RANKS, load_teacher, read_log, torchrun

STEPS = 20
SETTINGS = ["--model", "debug", "train.dataset_path=scenes:200:seed=3", "optim.epochs=1", "train.log_every=1",
            f"train.OFFICIAL_EPOCH_LENGTH={STEPS}", "optim.warmup_epochs=0.2",
            "optim.freeze_last_layer_epochs=0.1",
            "teacher.warmup_teacher_temp_epochs=0.5", "student.drop_path_rate=0", "evaluation.train_path=",
            "evaluation.test_path=", "dino.koleo_group=4", "crops.local_crops_number=2"]  # fmt: skip


@pytest.fixture(scope="module")
def forked(forkserver):
    return lambda processes, *arguments: forkserver.run(*arguments, ranks=processes)


def fresh(processes, *arguments):
    """Under torchrun, or alone: for what must see another environment, or compiles."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*start, str(ROOT / "train.py"), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **RUN_ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(start, processes, folder, *settings):
    """The global batch is 8 images, whatever the number of processes -> the rows of the log."""
    batch = f"train.batch_size_per_gpu={8 // processes}"
    start(processes, *SETTINGS, batch, "--output-dir", folder, *settings)
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r]


def difference(a, b):
    """Largest relative difference of any loss term or gradient norm in any step."""
    assert [r["step"] for r in a] == [r["step"] for r in b]
    keys = [k for k in a[0] if k.startswith(("loss", "grad"))]
    return max(abs(x[k] - y[k]) / (abs(x[k]) + 1e-9) for x, y in zip(a, b) for k in keys)


@pytest.fixture(scope="module", params=["sinkhorn_knopp", "centering"])
def alone(request, forked, tmp_path_factory):
    setting, folder = f"train.centering={request.param}", tmp_path_factory.mktemp("alone") / "run"
    return setting, run(forked, 1, folder, setting, "train.checkpoint_every=10", "train.keep_last=9"), folder


def test_two_processes_are_one(alone, forked, tmp_path):
    setting, expected, _ = alone
    found = run(forked, 2, tmp_path / "run", setting, "speed.checkpointing=selective")
    assert len(found) == STEPS and difference(expected, found) < 1e-5


def test_bf16_has_the_checkpoints_of_fp32(alone, forked, tmp_path):
    """Losses are near those of fp32; what is saved is fp32, and an fp32 run goes on from it."""
    setting, expected, folder = alone
    half = [setting, "train.checkpoint_every=10", "train.keep_last=9"]
    bf16 = run(forked, 1, tmp_path / "bf16", *half, "compute_precision.dtype=bf16")
    assert not any(row["skipped"] for row in bf16)
    assert 0 < max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(expected, bf16)) < 0.02
    files = [x / "teacher.pth" for x in (folder, tmp_path / "bf16")]
    fp32, half_trained = (torch.load(file, weights_only=True)["teacher"] for file in files)
    assert {k: v.dtype for k, v in half_trained.items()} == {k: v.dtype for k, v in fp32.items()}
    resumed = start_of(tmp_path / "bf16", tmp_path / "fp32", 10)
    again = run(forked, 1, resumed, *half, "--resume")
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(expected, again)) < 0.02


GRAPHS = """
import functools, sys, torch, config, distributed, train
from tools.bench import noise_batches
from kernels import attention
from torch._dynamo.utils import counters

def main():
    args, cfg = train.parse_args(argv)
    real = torch.compile
    torch.compile = functools.partial(real, backend="eager")
    attention.CHOICE = cfg.speed.kernels
    distributed.setup("cpu")
    t = train.TrainState(cfg)
    batches = noise_batches(cfg, torch.device("cpu"))
    for step in range(2):
        train.train_step(t, [next(batches)], train.compute_schedules(cfg, step), cfg)
    assert counters["stats"]["unique_graphs"] == 2, counters["stats"]
    assert not counters["graph_break"], counters["graph_break"]
    distributed.cleanup()

config.run(main)
sys.exit()  # instead of the run that would follow
"""


@pytest.mark.parametrize("ranks,checkpointing,kernels", [(1, "off", "triton"), (2, "selective", "pytorch")])
def test_compiled_blocks_are_two_graphs(forkserver, ranks, checkpointing, kernels, request):
    """One of the teacher and one of the student, whatever the depth, the step and the sharding; no breaks."""
    if kernels == "triton":
        request.getfixturevalue("interpreter")
    size = ["crops.global_crops_size=16", "crops.local_crops_size=8", "train.batch_size_per_gpu=1"]
    size += ["dino.koleo_group=0", "crops.local_crops_number=1"]
    settings = ["student.drop_path_rate=0.3", f"speed.checkpointing={checkpointing}"]
    settings += [f"speed.kernels={kernels}", "speed.compile=on"]
    forkserver.run(*SETTINGS, *size, *settings, "--output-dir", "unused", ranks=ranks, first=GRAPHS)


COLLECTIVES = """
import sys, torch, config, distributed as dist, losses, train

def steps(cfg, count=3):
    t = train.TrainState(cfg)
    loader = train.make_loader(cfg, train.open_source(cfg.train.dataset_path), "cpu", 0, dist.rank(), 2)
    rows = []
    for i in range(count):
        now = dict(train.compute_schedules(cfg, i + 5, 2), last_layer_lr=1e-3)
        metrics = train.train_step(t, [next(loader)], now, cfg)
        terms = [v for k, v in metrics.items() if k.startswith(("loss", "grad"))]
        rows += [dist.all_reduce(v.double().clone()) for v in terms]
    return torch.stack(rows)

def mute(only):
    real = dist.all_reduce
    return lambda x, op="sum": x if only(x, op) else real(x, op)

def whole_model(model, device, dtype):
    return model.to_empty(device=device)

MUTES = {
    "sinkhorn_knopp": {
        "largest logit": (losses, "all_reduce", mute(lambda x, op: op == "max")),
        "sums of prototypes": (losses, "all_reduce", mute(lambda x, op: op == "sum"))},
    "centering": {
        "mean logit": (losses, "all_reduce", mute(lambda x, op: True)),
        "gradients": (train.dist, "shard", whole_model)}}

def main():
    dist.setup("cpu")
    args, cfg = train.parse_args(argv)
    for centering, mutes in MUTES.items():
        cfg.train.centering = centering
        right = steps(cfg)
        assert torch.equal(right, steps(cfg)), "the comparison itself is exact"
        for name, (module, attribute, quiet) in mutes.items():
            real = getattr(module, attribute)
            setattr(module, attribute, quiet)
            found = (steps(cfg) / right - 1).abs().max().item()
            setattr(module, attribute, real)
            assert dist.all_reduce(torch.tensor(found), "max") > 1e-4, f"{name}: {found}"
    agreement(cfg)
    dist.cleanup()

def agreement(cfg):
    # One rank finds its loss infinite, with finite gradients: none may take the step.
    real = train.compute_losses
    def poisoned(*args):
        return {**real(*args), "loss_more": torch.tensor(torch.inf if dist.rank() else 0.0)}
    train.compute_losses = poisoned
    t = train.TrainState(cfg)
    loader = train.make_loader(cfg, train.open_source(cfg.train.dataset_path), "cpu", 0, dist.rank(), 2)
    before = [p.to_local().clone() for p in t.student.parameters()]
    metrics = train.train_step(t, [next(loader)], train.compute_schedules(cfg, 5, 2), cfg)
    assert metrics["skipped"] == 1
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, t.student.parameters()))

config.run(main)
sys.exit()  # instead of the run that would follow
"""


def test_a_missing_collective_is_noticed(forkserver):
    """Each of them in turn is left out; the numbers of three steps must then be others."""
    forkserver.run(*SETTINGS, "train.batch_size_per_gpu=4", "--output-dir", "unused", ranks=2, first=COLLECTIVES)


def start_of(folder, target, step):
    """A copy of a run as it was after `step`."""
    shutil.copytree(folder, target)
    for path in (target / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (target / "result.json").unlink()
    return target


def test_resume_at_another_size(forked, tmp_path):
    """1 -> 2 -> 1 goes on as if nothing had happened; 2 -> 2 to the last bit."""
    half = ["train.checkpoint_every=10", "train.keep_last=9"]
    whole = run(forked, 2, tmp_path / "two", *half)
    for processes in (1, 2):
        again = run(
            forked, processes, start_of(tmp_path / "two", tmp_path / f"to{processes}", 10), *half, "--resume"
        )
        assert difference(whole, again) < 1e-5
    weights = [torch.load(tmp_path / x / "teacher.pth", weights_only=True)["teacher"] for x in ("two", "to2")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert whole == again or [r["loss"] for r in whole] == [r["loss"] for r in again]


def test_one_grows_to_two(alone, forked, tmp_path):
    setting, expected, folder = alone
    half = [setting, "train.checkpoint_every=10", "train.keep_last=9", "--resume"]
    assert difference(expected, run(forked, 2, start_of(folder, tmp_path / "grown", 10), *half)) < 1e-5


SHARES = """
import sys, torch, config, distributed as dist, train
from optim import compute_schedules
from torch.distributed.tensor import DTensor

def main():
    dist.setup("cpu")
    args, cfg = train.parse_args(argv)
    t = train.TrainState(cfg)
    loader = train.make_loader(cfg, train.open_source(cfg.train.dataset_path), "cpu", 0, dist.rank(), 2)
    train.train_step(t, [next(loader)], compute_schedules(cfg, 0, 2), cfg)
    moments = [v for s in t.optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg")]
    held = dict(student=list(t.student.parameters()), teacher=list(t.teacher.parameters()), optimizer=moments,
                gradients=[p.grad for p in t.student.parameters()])
    for name, tensors in held.items():
        assert all(isinstance(x, DTensor) for x in tensors), name
        share = sum(x.to_local().numel() for x in tensors) / sum(x.numel() for x in tensors)
        assert share <= 0.55, (name, share)
    dist.cleanup()

config.run(main)
sys.exit()  # instead of the run that would follow
"""


def test_each_rank_holds_its_share(forkserver):
    forkserver.run(*SETTINGS, "train.batch_size_per_gpu=4", "--output-dir", "unused", ranks=2, first=SHARES)


slow = pytest.mark.slow


@pytest.mark.parametrize("dtype,epochs", [("bf16", 0.3), pytest.param("fp16", 0.6, marks=slow)])
def test_half_precision_shards_too(dtype, epochs, forked, tmp_path):
    """On two ranks, near the same run on one; in fp16 the first steps are spent on finding the loss scale."""
    rows = [
        run(forked, n, tmp_path / str(n), f"compute_precision.dtype={dtype}", f"optim.epochs={epochs}")
        for n in (1, 2)
    ]
    taken = 0 if dtype == "bf16" else 9  # steps from here on must be taken
    assert not any(r["skipped"] for half in rows for r in half[taken:])
    assert 0 < max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(*rows)) < 0.1


@pytest.mark.parametrize("setting", [pytest.param("full", marks=slow), "selective"])
def test_checkpointing_changes_no_bit(setting, forked, tmp_path):
    """Drop path draws again what it drew in the forward pass."""
    for name, extra in (("plain", []), ("saved", [f"speed.checkpointing={setting}"])):
        run(forked, 1, tmp_path / name, "student.drop_path_rate=0.3", "optim.epochs=0.3", *extra)
    weights = [
        torch.load(tmp_path / x / "teacher.pth", weights_only=True)["teacher"] for x in ("plain", "saved")
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.slow
def test_compiled_blocks_agree(tmp_path):
    plain = run(fresh, 1, tmp_path / "plain", "optim.epochs=0.2")
    for processes in (1, 2):  # alone, and inside of FSDP
        folder = tmp_path / str(processes)
        assert difference(plain, run(fresh, processes, folder, "optim.epochs=0.2", "speed.compile=on")) < 1e-4


@pytest.mark.slow
def test_kernels_under_fsdp(tmp_path, monkeypatch, interpreter):
    """The Triton operators, interpreted, in sharded and selectively checkpointed blocks."""
    size = ["crops.global_crops_size=16", "crops.local_crops_size=8", "crops.local_crops_number=2"]
    plain = run(fresh, 1, tmp_path / "plain", "optim.epochs=0.2", *size)
    monkeypatch.setenv("NANODINO_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ours = run(fresh, 2, tmp_path / "ours", "optim.epochs=0.2", "speed.checkpointing=selective", *size)
    assert json.loads((tmp_path / "ours" / "environment.json").read_text())["kernels"] == "triton"
    assert difference(plain, ours) < 1e-4


@pytest.mark.slow
def test_distillation_shards_too(forked, tmp_path):
    """The frozen teacher is sharded like the others; the student sees no masks on any rank."""
    run(forked, 1, tmp_path / "large", "optim.epochs=0.2")
    recipe = [f"train.distill_from={tmp_path / 'large'}", "ibot.mask_sample_probability=1",
              "ibot.mask_ratio_min_max=[1, 1]"]  # fmt: skip
    assert (
        difference(*(run(forked, n, tmp_path / str(n), *recipe, "optim.epochs=0.3") for n in (1, 2))) < 1e-5
    )
