"""bench.py: the plain ways compute what the shipped ones compute, and a row that fails costs only itself."""

import json

import pytest
import torch

import config
import model
import train
from config import UserError
from kernels import attention
from optim import compute_schedules
from tools import bench, plan

SMALL = ["train.batch_size_per_gpu=4", "crops.global_crops_size=16", "crops.local_crops_size=8",
         "crops.local_crops_number=2", "dino.head_n_prototypes=40", "train.num_workers=0"]  # fmt: skip
ROW = dict(part="presets", model="debug", off=[], settings=SMALL, steps=1, tflops=0.0)


def step(off, *settings):
    """One real step -> (metrics, gradients), and what attention and the iBOT loss were given."""
    cfg, seen = config.load(model="debug", overrides=[*SMALL, *settings]), dict(groups=[], targets=[])

    def spy(qkv, groups, *rest):
        seen["groups"].append(groups)
        return attention.attention(qkv, groups, *rest)

    def look(block, given, out):
        seen["stream"] = out.dtype

    def eye(student, targets, *rest):
        seen["targets"].append(type(targets))
        return losses(student, targets, *rest)

    losses = train.ibot_loss
    with pytest.MonkeyPatch.context() as patch, bench.without(off, cfg):
        patch.setattr(model, "attention", spy)
        patch.setattr(train, "ibot_loss", eye)
        torch.manual_seed(0)
        t, batch = train.TrainState(cfg), next(bench.noise(cfg, torch.device("cpu")))
        seen["compiled"] = hasattr(t.student.backbone.blocks[0].forward, "_torchdynamo_orig_callable")
        t.student.backbone.blocks[0].register_forward_hook(look)
        torch.manual_seed(1)  # drop path
        metrics = train.train_step(t, [batch], compute_schedules(cfg, 0), cfg)
    return metrics, {name: p.grad for name, p in t.student.named_parameters()}, seen


def same(a, b):
    for mine, other in zip(a[:2], b[:2]):
        assert mine.keys() == other.keys()
        for name in mine:
            if mine[name] is None:
                assert other[name] is None, name
            else:
                torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_without_packing(centering):
    settings = f"train.centering={centering}", "student.drop_path_rate=0"
    packed, apart = step([], *settings), step(["packing"], *settings)
    same(packed, apart)
    assert {len(g) for g in packed[2]["groups"]} == {1, 2} and {len(g) for g in apart[2]["groups"]} == {1}


@pytest.mark.parametrize("rate", [0, 0.3, 0.6])
def test_without_the_batch_subset(rate):
    """The same draws drop the same images, so even with drop path every number is the same."""
    subset = step([], f"student.drop_path_rate={rate}")
    masked = step(["drop-path subset"], f"student.drop_path_rate={rate}")
    same(subset, masked)
    computed = [sum(b * n for groups in seen["groups"] for b, n in groups) for *_, seen in (subset, masked)]
    assert computed[0] == computed[1] if rate == 0 else computed[0] < computed[1]


def test_drop_path_by_mask_keeps_the_expectation():
    x, groups = torch.zeros(6 * 3 + 4 * 2, 5), [(6, 3), (4, 2)]
    y = bench.drop_path_by_mask(x, groups, lambda x, groups: x + 1, 0.5)
    assert y.mean() == 1 and sorted(y.unique().tolist()) == [0, 2]
    assert all(len(image.unique()) == 1 for image in y[:18].view(6, 15))  # an image is dropped as a whole


def test_without_kernels(monkeypatch, interpreter):
    """Triton's interpreter beside PyTorch; without the fused losses attention stays with Triton."""
    monkeypatch.setattr(attention, "CHOICE", "triton")
    settings = "student.drop_path_rate=0", "crops.local_crops_number=0", "train.batch_size_per_gpu=1"
    used, real = [], attention.attention_forward
    monkeypatch.setattr(attention, "attention_forward", lambda *x: used.append(1) or real(*x))
    on, count = step([], *settings), len(used)
    for off, expected in (("fused losses", 2 * count), ("kernels", 2 * count)):  # the last adds none
        plain = step([off], *settings)
        same(on, plain)
        assert len(used) == expected > 0
        assert on[2]["targets"] == [train.SoftTargets] and plain[2]["targets"] == [torch.Tensor]


def test_without_the_16_bit_stream():
    for off, stream in ([], torch.bfloat16), (["16-bit stream"], torch.float32):
        assert step(off, "compute_precision.dtype=bf16")[2]["stream"] == stream
        assert step(off)[2]["stream"] == torch.float32


def test_without_all_six():
    rate = "student.drop_path_rate=0"
    on, plain = step([], rate), step(list(bench.MEASURES), rate, "speed.compile=on")
    same(on, plain)
    assert not plain[2]["compiled"]


@pytest.mark.parametrize("settings", [[], ["ibot.mask_sample_probability=0"], ["crops.local_crops_number=0"]])
def test_noise_keeps_the_contract_of_the_loader(settings):
    cfg = config.load(model="debug", overrides=[*SMALL, *settings])
    real = train.make_loader(cfg, train.open_source("scenes:20"), "cpu")
    for a, b, _ in zip(real, bench.noise(cfg, torch.device("cpu")), range(2)):
        assert a.keys() == b.keys()
        for key in a:
            if torch.is_tensor(a[key]):
                assert (a[key].shape, a[key].dtype) == (b[key].shape, b[key].dtype), key
            else:
                assert a[key] == b[key], key
        if not settings:
            assert all(torch.equal(a[k], b[k]) for k in ("masks", "mask_indices", "mask_weights", "samples"))


def test_the_arithmetic_of_a_row():
    cfg = config.load(model="debug", overrides=[*SMALL, "train.accumulate=2"])
    t, flop = train.TrainState(cfg), 2 * sum(plan.flops(plan.Shape(cfg)).values())
    times = [(9, 99), (1, 3), (0, 1), (1, 5)]  # waited, in all: one of warm-up, three timed
    found = bench.report(t, cfg, times, [(5.0, 0.0), (4.0, 1.0)], 3, tflops=1e-6)
    assert found["step_ms"] == 2000 and found["images_per_second"] == 4 and found["first_step_s"] == 99
    assert (found["fastest_ms"], found["slowest_ms"]) == (1000, 4000)
    assert found["mfu"] == pytest.approx(flop / 2 / 1e6) and "failed" not in found and found["skipped"] == 1
    assert bench.report(t, cfg, times, [(5.0, 0.0)], 3, 0)["mfu"] is None
    assert bench.report(t, cfg, times, [(float("nan"), 1.0)], 3, 0)["failed"] == "a loss is not finite"
    wait = bench.data_wait(cfg, times[1:])
    assert wait["wait_share"] == 2 / 9 and wait["images_per_second"] == pytest.approx(24 / 9)


def test_peaks():
    bf16 = torch.bfloat16
    assert bench.peak_tflops("NVIDIA H200", bf16) == bench.peak_tflops("NVIDIA H100 80GB HBM3", bf16) == 989
    assert bench.peak_tflops("NVIDIA H100 PCIe", bf16) == 756
    assert bench.peak_tflops("NVIDIA H200", torch.float32) == bench.peak_tflops("Something new", bf16) == 0


def test_dry_run(tmp_path, capsys, monkeypatch):
    """All of it in miniature; a row out of memory says so and the next one is measured; --resume mends it."""
    out, real, counted = tmp_path / "bench.json", bench.train_step, []

    def hungry(*given):
        if tight and model.VisionTransformer.forward_crops is bench.one_size_at_a_time:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    tight = True
    monkeypatch.setattr(bench, "train_step", hungry)
    bench.main(["--out", str(out), "--steps", "1", "tflops=1", *SMALL])
    said, rows = capsys.readouterr().out, json.loads(out.read_text())["rows"]
    assert "say nothing about a GPU" in said and len(rows) == 1 + 8 + 1
    assert [r["off"] for r in rows if "failed" in r] == [list(bench.MEASURES), ["packing"]]
    assert "| debug, without packing | out of memory | - |" in said and "| debug, without compile |" in said
    assert all(len(r["losses"]) == bench.WARM_UP + 1 and r["mfu"] > 0 for r in rows if "failed" not in r)
    assert out.with_suffix(".md").read_text() in said and rows[-1]["wait_share"] > 0

    tight = False
    monkeypatch.setattr(
        bench, "measure", lambda row: counted.append(row["off"]) or dict(images_per_second=1.0)
    )
    bench.main(["--out", str(out), "--steps", "1", "tflops=1", *SMALL, "--resume"])
    assert counted == [list(bench.MEASURES), ["packing"]] and len(json.loads(out.read_text())["rows"]) == 10


def test_no_time_no_row(capsys):
    bench.main(["--minutes", "0", "--only", "data", "--ablate", "laptop"])
    assert "| laptop | not measured: out of time | - | - |" in capsys.readouterr().out


def test_a_row_in_its_own_process(tmp_path, monkeypatch):
    """Its numbers come back; a crash and lateness are reasons, not the end."""
    assert len(bench.isolated(ROW, 120)["losses"]) == bench.WARM_UP + 1
    script = tmp_path / "crash.py"
    script.write_text("import time, sys; time.sleep(30 * ('slow' in sys.argv[2])); 1 / 0")
    monkeypatch.setattr(bench, "__file__", str(script))
    assert bench.isolated(ROW, 120) == dict(failed="exit code 1: ZeroDivisionError: division by zero")
    assert bench.isolated(ROW | dict(model="slow"), 0.1) == dict(failed="not measured: out of time")


@pytest.mark.parametrize("wrong", [["tflops=many"], ["--steps", "0"], ["optim.base_ir=1"]])
def test_mistakes_are_one_sentence(wrong):
    with pytest.raises(UserError):
        bench.main(wrong)
