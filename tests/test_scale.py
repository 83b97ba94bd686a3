"""One process and two are the same run: sharding, resuming at another size, and what each rank holds."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, child_environment, load_teacher, read_log, same_tensors, torchrun

slow = pytest.mark.slow
STEPS = 20
SETTINGS = ["--model", "debug", "compute_precision.dtype=fp32",
            "train.dataset_path=scenes:200:seed=3", "optim.epochs=1", "train.log_every=1",
            f"train.OFFICIAL_EPOCH_LENGTH={STEPS}", "optim.warmup_epochs=0.2",
            "optim.freeze_last_layer_epochs=0.1", "teacher.warmup_teacher_temp_epochs=0.5",
            "student.drop_path_rate=0", "crops.local_crops_number=2", "dino.koleo_group=4",
            "evaluation.train_path=", "evaluation.test_path="]  # fmt: skip


HALFWAY = ["train.checkpoint_every=10", "train.keep_last=9"]


@pytest.fixture(scope="module")
def forked(forkserver):
    """Starts a run on that many processes."""
    return lambda processes, *arguments: forkserver.run(*arguments, ranks=processes)


def fresh(processes, *arguments):
    """The same under torchrun, or alone: for runs that compile, or need another environment."""
    start = [sys.executable]
    if processes > 1:
        start = torchrun("--standalone", f"--nproc-per-node={processes}")
    command = [*start, str(ROOT / "train.py"), *map(str, arguments)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(start, processes, folder, *settings):
    """The global batch is 8 images, whatever the number of processes -> the rows of the log."""
    batch = f"train.batch_size_per_gpu={8 // processes}"
    start(processes, *SETTINGS, batch, "--output-dir", folder, *settings)
    return [row for row in read_log(folder) if "loss" in row]


def difference(ours, theirs):
    """Largest relative difference of any loss term or gradient norm in any step."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    largest = 0.0
    for our_row, their_row in zip(ours, theirs):
        for name, value in our_row.items():
            if name.startswith(("loss", "grad")):
                largest = max(largest, abs(value - their_row[name]) / (abs(value) + 1e-9))
    return largest


def loss_difference(ours, theirs):
    """Largest relative difference of the loss in any step."""
    return max(abs(our_row["loss"] / their_row["loss"] - 1) for our_row, their_row in zip(ours, theirs))


@pytest.fixture(scope="module", params=["sinkhorn_knopp", "centering"])
def alone(request, forked, tmp_path_factory):
    """A run on one process: its setting, the rows of its log, its folder."""
    setting = f"train.centering={request.param}"
    folder = tmp_path_factory.mktemp("alone") / "run"
    return setting, run(forked, 1, folder, setting, *HALFWAY), folder


def saved_types(folder):
    return {name: value.dtype for name, value in load_teacher(folder).items()}


def test_two_processes_are_one(alone, forked, tmp_path):
    setting, expected, _ = alone
    rows = run(forked, 2, tmp_path / "run", setting, "speed.checkpointing=selective")
    assert len(rows) == STEPS
    assert difference(expected, rows) < 1e-5


def test_bf16_has_the_checkpoints_of_fp32(alone, forked, tmp_path):
    """Losses are near those of fp32; what is saved is fp32, and an fp32 run goes on from it."""
    setting, expected, folder = alone
    bf16 = run(forked, 1, tmp_path / "bf16", setting, *HALFWAY, "compute_precision.dtype=bf16")
    assert not any(row["skipped"] for row in bf16)
    assert 0 < loss_difference(expected, bf16) < 0.02
    assert saved_types(tmp_path / "bf16") == saved_types(folder)
    resumed = copy_as_of(tmp_path / "bf16", tmp_path / "fp32", 10)
    again = run(forked, 1, resumed, setting, *HALFWAY, "--resume")
    assert loss_difference(expected, again) < 0.02


# Executed in place of a run, on each rank, with its command line as `argv`.
COUNT_GRAPHS = """
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
    state = train.TrainState(cfg)
    batches = noise_batches(cfg, torch.device("cpu"))
    for step in range(2):
        train.train_step(state, [next(batches)], train.compute_schedules(cfg, step), cfg)
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
    argv = [*SETTINGS, *size, *settings, "--output-dir", "unused"]
    forkserver.run(*argv, ranks=ranks, first=COUNT_GRAPHS)


# Leaves out one collective after the other: the numbers of three steps must then be others.
MUTE_COLLECTIVES = """
import sys, torch, config, distributed as dist, losses, train

def batches_of_this_rank(cfg):
    source = train.open_dataset(cfg.train.dataset_path, cfg.data)
    return train.make_loader(cfg, source, "cpu", 0, dist.rank(), 2)

def numbers_of_three_steps(cfg):
    state = train.TrainState(cfg)
    batches = batches_of_this_rank(cfg)
    numbers = []
    for step in range(5, 8):
        schedules = dict(train.compute_schedules(cfg, step, 2), last_layer_lr=1e-3)
        metrics = train.train_step(state, [next(batches)], schedules, cfg)
        for name, value in metrics.items():
            if name.startswith(("loss", "grad")):
                numbers.append(dist.all_reduce(value.double().clone()))
    return torch.stack(numbers)

def mute(*ops):
    real = dist.all_reduce
    return lambda x, op="sum": x if op in ops else real(x, op)

def whole_model(model, device, dtype):
    return model.to_empty(device=device)

MUTES = {
    "sinkhorn_knopp": {
        "largest logit": (losses, "all_reduce", mute("max")),
        "sums of prototypes": (losses, "all_reduce", mute("sum"))},
    "centering": {
        "mean logit": (losses, "all_reduce", mute("sum", "max")),
        "gradients": (train.dist, "shard", whole_model)}}

def main():
    dist.setup("cpu")
    args, cfg = train.parse_args(argv)
    for centering, mutes in MUTES.items():
        cfg.train.centering = centering
        expected = numbers_of_three_steps(cfg)
        assert torch.equal(expected, numbers_of_three_steps(cfg)), "the comparison itself is exact"
        for name, (module, attribute, muted) in mutes.items():
            real = getattr(module, attribute)
            setattr(module, attribute, muted)
            found = (numbers_of_three_steps(cfg) / expected - 1).abs().max().item()
            setattr(module, attribute, real)
            assert dist.all_reduce(torch.tensor(found), "max") > 1e-4, f"{name}: {found}"
    check_agreement(cfg)
    dist.cleanup()

def check_agreement(cfg):
    # One rank finds its loss infinite, with finite gradients: none may take the step.
    real = train.compute_losses
    def poisoned(*args):
        return {**real(*args), "loss_more": torch.tensor(torch.inf if dist.rank() else 0.0)}
    train.compute_losses = poisoned
    state = train.TrainState(cfg)
    batch = next(batches_of_this_rank(cfg))
    before = [p.to_local().clone() for p in state.student.parameters()]
    metrics = train.train_step(state, [batch], train.compute_schedules(cfg, 5, 2), cfg)
    assert metrics["skipped"] == 1
    for old, parameter in zip(before, state.student.parameters()):
        assert torch.equal(old, parameter.to_local())

config.run(main)
sys.exit()  # instead of the run that would follow
"""


def test_a_missing_collective_is_noticed(forkserver):
    argv = [*SETTINGS, "train.batch_size_per_gpu=4", "--output-dir", "unused"]
    forkserver.run(*argv, ranks=2, first=MUTE_COLLECTIVES)


def copy_as_of(folder, target, step):
    """A copy of a run as it was after `step`."""
    shutil.copytree(folder, target)
    for path in (target / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    (target / "result.json").unlink()
    return target


def test_resume_at_another_size(forked, tmp_path):
    """1 -> 2 -> 1 goes on as if nothing had happened; 2 -> 2 to the last bit."""
    whole = run(forked, 2, tmp_path / "two", *HALFWAY)
    for processes in (1, 2):
        folder = copy_as_of(tmp_path / "two", tmp_path / f"to{processes}", 10)
        again = run(forked, processes, folder, *HALFWAY, "--resume")
        assert difference(whole, again) < 1e-5
    assert same_tensors(load_teacher(tmp_path / "two"), load_teacher(tmp_path / "to2"))
    assert [row["loss"] for row in whole] == [row["loss"] for row in again]


def test_one_grows_to_two(alone, forked, tmp_path):
    setting, expected, folder = alone
    grown = copy_as_of(folder, tmp_path / "grown", 10)
    rows = run(forked, 2, grown, setting, *HALFWAY, "--resume")
    assert difference(expected, rows) < 1e-5


CHECK_SHARES = """
import sys, torch, config, distributed as dist, train
from optim import compute_schedules
from torch.distributed.tensor import DTensor

def main():
    dist.setup("cpu")
    args, cfg = train.parse_args(argv)
    state = train.TrainState(cfg)
    source = train.open_dataset(cfg.train.dataset_path, cfg.data)
    loader = train.make_loader(cfg, source, "cpu", 0, dist.rank(), 2)
    train.train_step(state, [next(loader)], compute_schedules(cfg, 0, 2), cfg)
    held = {
        "student": list(state.student.parameters()),
        "teacher": list(state.teacher.parameters()),
        "gradients": [parameter.grad for parameter in state.student.parameters()],
        "first moments": [moments["exp_avg"] for moments in state.optimizer.state.values()],
        "second moments": [moments["exp_avg_sq"] for moments in state.optimizer.state.values()],
    }
    for name, tensors in held.items():
        assert all(isinstance(tensor, DTensor) for tensor in tensors), name
        ours = sum(tensor.to_local().numel() for tensor in tensors)
        share = ours / sum(tensor.numel() for tensor in tensors)
        assert share <= 0.55, (name, share)
    dist.cleanup()

config.run(main)
sys.exit()  # instead of the run that would follow
"""


def test_each_rank_holds_its_share(forkserver):
    argv = [*SETTINGS, "train.batch_size_per_gpu=4", "--output-dir", "unused"]
    forkserver.run(*argv, ranks=2, first=CHECK_SHARES)


@pytest.mark.parametrize("dtype,epochs", [("bf16", 0.3), pytest.param("fp16", 0.6, marks=slow)])
def test_half_precision_shards_too(dtype, epochs, forked, tmp_path):
    """On two ranks, near the same run on one; in fp16 the first steps are spent on finding the loss scale."""
    settings = [f"compute_precision.dtype={dtype}", f"optim.epochs={epochs}"]
    one = run(forked, 1, tmp_path / "one", *settings)
    two = run(forked, 2, tmp_path / "two", *settings)
    settled = 9 if dtype == "fp16" else 0  # steps from here on must be taken
    assert not any(row["skipped"] for row in one[settled:] + two[settled:])
    assert 0 < loss_difference(one, two) < 0.1


@pytest.mark.parametrize("setting", [pytest.param("full", marks=slow), "selective"])
def test_checkpointing_changes_no_bit(setting, forked, tmp_path):
    """Drop path draws again what it drew in the forward pass."""
    six_steps = ["student.drop_path_rate=0.3", "optim.epochs=0.3"]
    run(forked, 1, tmp_path / "plain", *six_steps)
    run(forked, 1, tmp_path / "saved", *six_steps, f"speed.checkpointing={setting}")
    assert same_tensors(load_teacher(tmp_path / "plain"), load_teacher(tmp_path / "saved"))


@slow
def test_compiled_blocks_agree(tmp_path):
    plain = run(fresh, 1, tmp_path / "plain", "optim.epochs=0.2")
    for processes in (1, 2):  # alone, and inside FSDP
        settings = ["optim.epochs=0.2", "speed.compile=on"]
        compiled = run(fresh, processes, tmp_path / str(processes), *settings)
        assert difference(plain, compiled) < 1e-4


@slow
def test_kernels_under_fsdp(tmp_path, monkeypatch, interpreter):
    """The Triton operators, interpreted, in sharded and selectively checkpointed blocks."""
    size = ["crops.global_crops_size=16", "crops.local_crops_size=8", "crops.local_crops_number=2"]
    plain = run(fresh, 1, tmp_path / "plain", "optim.epochs=0.2", *size)
    monkeypatch.setenv("NANODINO_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ours = run(fresh, 2, tmp_path / "ours", "optim.epochs=0.2", "speed.checkpointing=selective", *size)
    assert json.loads((tmp_path / "ours" / "environment.json").read_text())["kernels"] == "triton"
    assert difference(plain, ours) < 1e-4


@slow
def test_distillation_shards_too(forked, tmp_path):
    """The frozen teacher is sharded like the others; the student sees no masks on any rank."""
    run(forked, 1, tmp_path / "large", "optim.epochs=0.2")
    recipe = [f"train.distill_from={tmp_path / 'large'}", "ibot.mask_sample_probability=1",
              "ibot.mask_ratio_min_max=[1, 1]", "optim.epochs=0.3"]  # fmt: skip
    one = run(forked, 1, tmp_path / "one", *recipe)
    two = run(forked, 2, tmp_path / "two", *recipe)
    assert difference(one, two) < 1e-5
