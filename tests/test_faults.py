"""docs/faults.md keeps its word: it lists every fault, and the tests it names exist.

Beside it, faults that belong to no single file: a damaged, full or littered disk under a whole run, poison,
explosion, collapse, and images that no decoder complains about.
"""

import ast
import hashlib
import io
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    debug_config,
    fake_png,
    load_teacher,
    logged_losses,
    random_batch,
    run_tiny,
    same_tensors,
    take_steps,
    write_noise_images,
)
from PIL import Image

import checkpoint
import data
import decode
import distributed
import sources
import train
from config import UserError
from model import compute_dtype
from optim import compute_schedules

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------- the document

TEXT = (ROOT / "docs" / "faults.md").read_text()


class Fault(NamedTuple):
    """A row of its table."""

    number: str
    cause: str
    answer: str
    tests: str


def faults():
    rows = []
    for line in re.findall(r"^\| \d.*", TEXT, re.M):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        rows.append(Fault(*cells))
    return rows


def test_all_faults_are_listed_once():
    assert sorted(int(fault.number) for fault in faults()) == list(range(1, 45))
    assert all(all(fault) for fault in faults())


def test_its_command_parses():
    command = re.search(r"^```\n(.*?)^```", TEXT, re.S | re.M)[1].replace("\\\n", " ").split()
    args, cfg = train.parse_args(command[command.index("train.py") + 1 :])
    assert "torchrun" in command
    assert args.resume
    assert args.output_dir
    assert cfg.train.checkpoint_every


def functions_in(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.number)
def test_a_fault_has_tests_that_exist_or_a_reason(fault):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", fault.tests)
    assert named or re.search("comes with|does not apply", fault.tests), "neither a test nor a reason"
    assert len(named) == fault.tests.count("::")
    for file, name in named:
        assert name in functions_in(file), f"{file} has no {name}"


# ---------------------------------------------------------------- the disk

# Five steps, a checkpoint after the second and the fourth, and at the end.
SHORT = ("optim.epochs=0.5", "optim.freeze_last_layer_epochs=0", "crops.local_crops_number=2",
         "train.checkpoint_every=2", "train.keep_last=5")  # fmt: skip


def flip_a_bit(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def steps_saved(folder):
    """The last digit of the step of each checkpoint, newest first."""
    return [path.name[-1] for path in checkpoint.step_folders(folder / "checkpoints")]


def test_a_run_goes_on_from_the_newest_intact_checkpoint(tmp_path, capsys):
    """One is cut short, one has a flipped bit: both are passed over, told, and replaced."""
    folder = tmp_path / "run"
    expected = run_tiny(folder, *SHORT)
    before = load_teacher(folder)
    newest = folder / "checkpoints" / "step_00000005" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-100])
    second = folder / "checkpoints" / "step_00000004" / "__0_0.distcp"
    second.write_bytes(flip_a_bit(second.read_bytes(), 999))
    (folder / "teacher.pth").unlink()
    rows = run_tiny(folder, *SHORT, "--resume")
    warnings = capsys.readouterr().err
    assert "step_00000005: __0_0.distcp has" in warnings
    assert "step_00000004: __0_0.distcp has changed" in warnings
    assert logged_losses(rows) == logged_losses(expected)
    assert same_tensors(load_teacher(folder), before)
    assert steps_saved(folder) == ["5", "4", "2"]
    assert checkpoint.newest_intact(folder / "checkpoints").name == "step_00000005"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    def fill_up(run, step, trains):
        (run.path / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(train.RunFolder, "start", fill_up)
    with pytest.raises(UserError, match="metrics.jsonl.*No space left"):
        run_tiny(tmp_path / "run", *SHORT)


def test_what_killed_saves_leave_behind_is_swept(tmp_path):
    """A checkpoint of a large model is many gigabytes: half of one must not stay for good."""
    folder = tmp_path / "run" / "checkpoints"
    run_tiny(tmp_path / "run", *SHORT, "optim.epochs=0.3")
    for name in (".step_00000001.old", ".step_00000002.partial"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(bytes(1000))
    run_tiny(tmp_path / "run", *SHORT, "--resume")
    assert sorted(path.name[-1] for path in folder.iterdir()) == ["2", "3", "4", "5"]


# ---------------------------------------------------------------- the mathematics


def test_a_poisoned_run_leaves_finite_checkpoints(tmp_path, monkeypatch):
    real = train.make_loader

    def poisoned(*args):
        for i, batch in enumerate(real(*args)):
            if i >= 3:
                batch["globals"][0, 0, 0, 0] = math.inf
            yield batch

    monkeypatch.setattr(train, "make_loader", poisoned)
    with pytest.raises(SystemExit):
        run_tiny(tmp_path / "run", *SHORT, "train.max_nan=3", "optim.epochs=1")
    assert {"2", "4"} <= set(steps_saved(tmp_path / "run"))  # 4: after the first poisoned step
    state = {"teacher": load_teacher(tmp_path / "run"), "student": load_teacher(tmp_path / "run")}
    for path in checkpoint.step_folders(tmp_path / "run" / "checkpoints"):
        checkpoint.load_checkpoint(path, state)
        for tensors in state.values():
            assert all(torch.isfinite(value).all() for value in tensors.values())


@pytest.mark.parametrize("factor, skipped", [(1e6, 0), (1e30, 1)])
def test_an_exploding_gradient_is_clipped_or_the_step_skipped(factor, skipped, monkeypatch):
    """Its norm is logged as it was before clipping; where the norm itself overflows, nothing moves."""
    cfg = debug_config()
    state, calm = take_steps(cfg)
    before = {name: value.clone() for name, value in state.student.state_dict().items()}
    real = train.compute_losses
    exploding = lambda *args: {name: term * factor for name, term in real(*args).items()}  # noqa: E731
    monkeypatch.setattr(train, "compute_losses", exploding)
    metrics = train.train_step(state, [random_batch(cfg)], compute_schedules(cfg, 150), cfg)
    after = state.student.state_dict()
    assert metrics["skipped"] == skipped
    assert all(torch.isfinite(value).all() for value in after.values())
    assert same_tensors(before, after) == bool(skipped)
    if not skipped:
        assert metrics["grad_backbone"] > 1000 * calm["grad_backbone"]
        norms = [parameter.grad.norm() for parameter in state.student.backbone.parameters()]
        assert torch.stack(norms).norm().item() == pytest.approx(cfg.optim.clip_grad, rel=1e-3)


def test_one_prototype_for_everything_is_named(tmp_path, monkeypatch):
    real = train.teacher_targets

    def one_hot(*args):
        targets = real(*args)
        for probs in (targets.globals, targets.patches):
            probs.zero_()
            probs[..., 3] = 1
        return targets

    monkeypatch.setattr(train, "teacher_targets", one_hot)
    (warning,) = [row["warning"] for row in run_tiny(tmp_path / "run", *SHORT) if "warning" in row]
    assert "one-hot" in warning


class Turing:
    """A GPU without bf16: PyTorch says yes when asked in general, since it can emulate it, slowly."""

    @staticmethod
    def is_bf16_supported(including_emulation=True):
        return including_emulation


def test_auto_takes_no_emulated_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", Turing.is_bf16_supported)
    assert compute_dtype("auto", "cuda") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert compute_dtype("auto", "cuda") == torch.bfloat16
    for abilities in ({}, {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda abilities=abilities: abilities)
        assert compute_dtype("auto", "cpu") == torch.float32
        assert compute_dtype("bf16", "cpu") == torch.bfloat16
    for ability in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda ability=ability: {ability: True})
        assert compute_dtype("auto", "cpu") == torch.bfloat16
        assert compute_dtype("fp32", "cpu") == torch.float32


@pytest.mark.parametrize("abilities, dtype", [({}, "float32"), ({"amx_bf16": True}, "bfloat16")])
def test_the_start_line_says_whether_the_processor_has_bf16(abilities, dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    run_tiny(tmp_path / "run", *SHORT, "compute_precision.dtype=auto")
    said = capsys.readouterr().out
    assert f"on 1 x cpu in {dtype}" in said
    assert ("this processor has no bf16" in said) == (dtype == "float32")


def test_restarts_that_torchrun_would_spoil_are_told(monkeypatch, capsys):
    """Without that variable its attempts share one store, see docs/faults.md."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    distributed.setup("cpu")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    distributed.setup("cpu")
    assert not capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    distributed.setup("cpu")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err


# ---------------------------------------------------------------- images


def test_a_zeroed_stretch_decodes_and_only_a_checksum_shows_it(tmp_path):
    """As docs/faults.md says: only somebody who has noted the SHA-256 can see this."""
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    good = file.getvalue()
    middle = len(good) // 2
    bad = good[:middle] + bytes(200) + good[middle + 200 :]
    assert decode.decode_image(bad, "bad").size == (96, 96)
    assert hashlib.sha256(bad).digest() != hashlib.sha256(good).digest()


def peak_memory():
    """The largest memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_costs_no_memory():
    """144 million pixels would be 432 MB."""
    bomb = fake_png(12000, 12000, (b"IDAT", zlib.compress(bytes(12000 * 3 + 1) * 2000, 9)))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = peak_memory()
    with pytest.raises(decode.BadImage, match="12000 x 12000"):
        decode.decode_image(bomb, "bomb")
    assert peak_memory() - before < 100
    Path("/proc/self/clear_refs").write_text("5")
    pixels = np.ones(432_000_000, np.uint8)  # the control: such a peak would be seen
    assert peak_memory() - before > 300
    assert pixels[-1] == 1


def test_one_class_is_a_run_with_a_perfect_score(tmp_path):
    """Neither an error nor a division by zero: chance is then 1, and the table says so."""
    (tmp_path / "images").mkdir()
    write_noise_images(tmp_path / "images" / "only", 12)
    source = f"folder:{tmp_path / 'images'}"
    paths = [f"{key}={source}" for key in ("train.dataset_path", "evaluation.train_path")]
    length = ["optim.epochs=0.3", "optim.warmup_epochs=0.1", "optim.freeze_last_layer_epochs=0"]
    run_tiny(tmp_path / "run", *paths, *length)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["knn_top1"] == result["chance"] == 1


def test_more_ranks_than_images(tmp_path):
    """Every rank gets a full batch of the one image there is, each crop another."""
    source = sources.open_source(f"folder:{write_noise_images(tmp_path / 'images', 1)}")
    loaders = [data.make_loader(debug_config(), source, "cpu", 0, rank, 4) for rank in range(4)]
    batches = [next(loader) for loader in loaders]
    assert [batch["samples"][0].item() for batch in batches] == [0, 8, 16, 24]
    assert not torch.equal(batches[0]["globals"], batches[3]["globals"])
