"""tools/bench.py: the plain ways compute what the shipped ones compute, and a row that fails costs only
itself, as tools/isolation.py promises."""

import json
import os
import resource
import time
from functools import partial
from typing import NamedTuple

import pytest
import torch

import config
import model
import train
from config import UserError
from kernels import attention
from optim import compute_schedules
from tools import bench, plan
from tools.isolation import run_isolated

SMALL = ["train.batch_size_per_gpu=4", "crops.global_crops_size=16", "crops.local_crops_size=8",
         "crops.local_crops_number=2", "dino.head_n_prototypes=40", "train.num_workers=0",
         "compute_precision.dtype=fp32"]  # fmt: skip
ROW = dict(part="presets", model="debug", off=[], settings=SMALL, steps=1, tflops=0.0)
NO_DROP_PATH = "student.drop_path_rate=0"


class Step(NamedTuple):
    """One real training step."""

    metrics: dict
    gradients: dict
    groups: list  # of every call of attention
    targets: list  # the types of what the iBOT loss was given
    stream: torch.dtype  # of what flows from the first block to the second
    compiled: bool


def take_step(off, *settings):
    """One step without the optimisations in `off`."""
    cfg = config.load(model="debug", overrides=[*SMALL, *settings])
    groups = []
    targets = []
    stream = []
    real_loss = train.ibot_loss

    def spy_on_attention(qkv, groups_of_call, *rest):
        groups.append(groups_of_call)
        return attention.attention(qkv, groups_of_call, *rest)

    def spy_on_loss(student, targets_of_call, *rest):
        targets.append(type(targets_of_call))
        return real_loss(student, targets_of_call, *rest)

    with pytest.MonkeyPatch.context() as patch, bench.disabled(off, cfg):
        patch.setattr(model, "attention", spy_on_attention)
        patch.setattr(train, "ibot_loss", spy_on_loss)
        torch.manual_seed(0)
        state = train.TrainState(cfg)
        batch = next(bench.noise_batches(cfg, torch.device("cpu")))
        block = state.student.backbone.blocks[0]
        compiled = hasattr(block.forward, "_torchdynamo_orig_callable")
        block.register_forward_hook(lambda block, given, out: stream.append(out.dtype))
        torch.manual_seed(1)  # drop path
        metrics = train.train_step(state, [batch], compute_schedules(cfg, 0), cfg)
    gradients = {name: p.grad for name, p in state.student.named_parameters()}
    return Step(metrics, gradients, groups, targets, stream[-1], compiled)


def same_numbers(ours, plain):
    for a, b in ((ours.metrics, plain.metrics), (ours.gradients, plain.gradients)):
        assert a.keys() == b.keys()
        for name in a:
            if a[name] is None:
                assert b[name] is None, name
            else:
                torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_without_packing(centering):
    settings = (f"train.centering={centering}", NO_DROP_PATH)
    packed = take_step([], *settings)
    apart = take_step(["packing"], *settings)
    same_numbers(packed, apart)
    assert {len(groups) for groups in packed.groups} == {1, 2}
    assert {len(groups) for groups in apart.groups} == {1}


@pytest.mark.parametrize("rate", [0, 0.3, 0.6])
def test_without_the_batch_subset(rate):
    """The same draws drop the same images, so even with drop path every number is the same."""
    subset = take_step([], f"student.drop_path_rate={rate}")
    masked = take_step(["drop-path subset"], f"student.drop_path_rate={rate}")
    same_numbers(subset, masked)
    if rate == 0:
        assert count_tokens(subset) == count_tokens(masked)
    else:
        assert count_tokens(subset) < count_tokens(masked)


def count_tokens(step):
    """That attention has seen."""
    total = 0
    for groups in step.groups:
        total += sum(b * length for b, length in groups)
    return total


def test_drop_path_by_mask_keeps_the_expectation():
    x = torch.zeros(6 * 3 + 4 * 2, 5)
    y = bench.drop_path_by_mask(x, [(6, 3), (4, 2)], lambda x, groups: x + 1, 0.5)
    assert y.mean() == 1
    assert sorted(y.unique().tolist()) == [0, 2]
    assert all(len(image.unique()) == 1 for image in y[:18].view(6, 15))  # an image is dropped as a whole


def test_without_kernels(monkeypatch, interpreter):
    """Triton's interpreter beside PyTorch; without the fused losses attention stays with Triton."""
    monkeypatch.setattr(attention, "CHOICE", "triton")
    settings = (NO_DROP_PATH, "crops.local_crops_number=0", "train.batch_size_per_gpu=1")
    calls = []
    real_forward = attention.attention_forward

    def counted(*given):
        calls.append(given)
        return real_forward(*given)

    monkeypatch.setattr(attention, "attention_forward", counted)
    ours = take_step([], *settings)
    count = len(calls)
    assert count > 0
    for off in ("fused losses", "kernels"):
        plain = take_step([off], *settings)
        same_numbers(ours, plain)
        assert len(calls) == 2 * count  # the last has added none
        assert ours.targets == [train.SoftTargets] and plain.targets == [torch.Tensor]


def test_without_the_16_bit_stream():
    for off, stream in ([], torch.bfloat16), (["16-bit stream"], torch.float32):
        assert take_step(off, "compute_precision.dtype=bf16").stream == stream
        assert take_step(off).stream == torch.float32


def test_without_all_six():
    ours = take_step([], NO_DROP_PATH)
    plain = take_step(bench.OPTIMIZATIONS, NO_DROP_PATH, "speed.compile=on")
    same_numbers(ours, plain)
    assert not plain.compiled


@pytest.mark.parametrize("settings", [[], ["ibot.mask_sample_probability=0"], ["crops.local_crops_number=0"]])
def test_noise_keeps_the_contract_of_the_loader(settings):
    cfg = config.load(model="debug", overrides=[*SMALL, *settings])
    real_batches = train.make_loader(cfg, train.open_dataset("scenes:20", cfg.data), "cpu")
    for real, noise, _ in zip(real_batches, bench.noise_batches(cfg, torch.device("cpu")), range(2)):
        assert real.keys() == noise.keys()
        for key in real:
            if torch.is_tensor(real[key]):
                assert (real[key].shape, real[key].dtype) == (noise[key].shape, noise[key].dtype), key
            else:
                assert real[key] == noise[key], key
        if not settings:
            for key in ("masks", "mask_indices", "mask_weights", "samples"):
                assert torch.equal(real[key], noise[key]), key


def test_the_arithmetic_of_a_row():
    cfg = config.load(model="debug", overrides=[*SMALL, "train.accumulate=2"])
    state = train.TrainState(cfg)
    flops = 2 * sum(plan.step_flops(plan.Workload(cfg)).values())
    times = [bench.StepTime(*seconds) for seconds in ((9, 99), (1, 3), (0, 1), (1, 5))]  # the first: warm-up
    row = bench.summarize_row(state, cfg, times, [(5.0, 0.0), (4.0, 1.0)], 3, tflops=1e-6)
    assert row["step_ms"] == 2000 and row["images_per_second"] == 4 and row["first_step_s"] == 99
    assert (row["fastest_ms"], row["slowest_ms"]) == (1000, 4000)
    assert row["mfu"] == pytest.approx(flops / 2 / 1e6)
    assert "failed" not in row and row["skipped"] == 1
    assert bench.summarize_row(state, cfg, times, [(5.0, 0.0)], 3, 0)["mfu"] is None
    nan_row = bench.summarize_row(state, cfg, times, [(float("nan"), 1.0)], 3, 0)
    assert nan_row["failed"] == "a loss is not finite"
    waits = bench.summarize_waits(cfg, times[1:])
    assert waits["wait_share"] == 2 / 9 and waits["images_per_second"] == pytest.approx(24 / 9)


def test_peaks():
    bf16 = torch.bfloat16
    assert bench.peak_tflops("NVIDIA H200", bf16) == bench.peak_tflops("NVIDIA H100 80GB HBM3", bf16) == 989
    assert bench.peak_tflops("NVIDIA H100 PCIe", bf16) == 756
    assert bench.peak_tflops("NVIDIA H200", torch.float32) == bench.peak_tflops("Something new", bf16) == 0


def test_dry_run(tmp_path, capsys, monkeypatch):
    """All of it in miniature; a row out of memory says so and the next one is measured; --resume mends it."""
    out = tmp_path / "bench.json"
    command = ["--out", str(out), "--steps", "1", "tflops=1", *SMALL]
    too_large = [list(bench.OPTIMIZATIONS), ["packing"]]
    real_step = bench.train_step

    def hungry_step(*given):
        if model.VisionTransformer.forward_crops is bench.forward_crops_separately:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_step(*given)

    monkeypatch.setattr(bench, "train_step", hungry_step)
    bench.main(command)
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert "say nothing about a GPU" in printed and len(rows) == 1 + 8 + 1
    assert [row["off"] for row in rows if "failed" in row] == too_large
    assert "| debug, without packing | out of memory | - |" in printed
    assert "| debug, without compile |" in printed
    for row in rows:
        if "failed" not in row:
            assert len(row["losses"]) == bench.WARM_UP + 1 and row["mfu"] > 0
    assert out.with_suffix(".md").read_text() in printed and rows[-1]["wait_share"] > 0

    measured = []

    def count_rows(row):
        measured.append(row["off"])
        return dict(images_per_second=1.0)

    monkeypatch.setattr(bench, "measure_row", count_rows)
    bench.main([*command, "--resume"])
    assert measured == too_large and len(json.loads(out.read_text())["rows"]) == 10


def test_no_time_no_row(capsys):
    bench.main(["--minutes", "0", "--only", "data", "--ablate", "laptop"])
    assert "| laptop | not measured: out of time | - | - |" in capsys.readouterr().out


def test_a_row_in_its_own_process(monkeypatch, capfd):
    """Its numbers come back; a crash and lateness are reasons, not the end."""
    assert len(bench.measure_isolated(ROW, 120)["losses"]) == bench.WARM_UP + 1

    def crash(row):
        time.sleep(30 if row["model"] == "slow" else 0)
        1 / 0  # noqa: B018

    monkeypatch.setattr(bench, "measure_row", crash)
    assert bench.measure_isolated(ROW, 120) == dict(failed="ZeroDivisionError: division by zero")
    assert "in crash" in capfd.readouterr().err, "the traceback is shown"
    slow = ROW | dict(model="slow")
    assert bench.measure_isolated(slow, 0.1) == dict(failed="not measured: out of time")


def test_isolated_functions_run_side_by_side(tmp_path):
    """Each waits for the other: together they end at once, one after the other never."""

    def meet(mine, other):
        (tmp_path / mine).touch()
        while not (tmp_path / other).exists():
            time.sleep(0.01)
        return mine

    functions = {"a": partial(meet, "a", "b"), "b": partial(meet, "b", "a")}
    outcomes = run_isolated(functions, parallel=2, limit=60)
    assert {name: outcome.value for name, outcome in outcomes.items()} == {"a": "a", "b": "b"}
    (tmp_path / "b").unlink()
    assert run_isolated({"a": functions["a"]}, limit=0.3)["a"].failure == "stopped: it took too long"


def test_a_full_disk_costs_one_function():
    def fill(number):
        if number == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # as a full disk: nothing can be written
        return number

    outcomes = run_isolated({number: partial(fill, number) for number in range(2)})
    assert outcomes[0].failure == "ended with code 1, without a word"
    assert outcomes[1].value == 1


def test_what_an_isolated_function_starts_ends_with_it(tmp_path):
    """Whether it ends or is stopped."""

    def start_another(seconds):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "pid").write_text(str(pid))
        time.sleep(seconds)

    for seconds in (0, 60):
        run_isolated({"one": partial(start_another, seconds)}, limit=1, own_group=True)
        assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid):
    """Whether a process ends within seconds (a zombie, with nobody to collect it, has ended)."""
    for _ in range(500):
        try:
            with open(f"/proc/{pid}/stat") as f:
                if f.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("wrong", [["tflops=many"], ["tflops=nan"], ["optim.base_ir=1"]])
def test_mistakes_are_one_sentence(wrong):
    with pytest.raises(UserError):
        bench.main(wrong)


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--minutes", "nan"]])
def test_numbers_out_of_range_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        bench.main(wrong)
    assert f"argument {wrong[0]}: '{wrong[1]}' must be a" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "3", "[" * 9999, "{}", '{"environment": [], "rows": 1}', "{"])
def test_another_file_is_not_resumed(text, tmp_path):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(UserError, match="bench.json was not written by this bench"):
        bench.rows_measured_before(tmp_path / "bench.json", {})
