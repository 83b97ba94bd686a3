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

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import png_header
from test_train_step import random_batch, small, take_steps
from test_training import folder_of_images, go, losses, same, weights

import checkpoint
import data
import distributed
import sources
import train
from config import UserError
from optim import compute_schedules

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "faults.md").read_text()
TABLE = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| \d.*", TEXT, re.M)]


# ---- the document ----------------------------------------------------------------------------------------


def test_all_faults_are_listed_once():
    assert sorted(int(row[0]) for row in TABLE) == list(range(1, 33))
    assert all(len(row) == 4 and all(row) for row in TABLE)


def test_its_command_parses():
    command = re.search(r"^```\n(.*?)^```", TEXT, re.S | re.M)[1].replace("\\\n", " ").split()
    args, cfg = train.parse_args(command[command.index("train.py") + 1 :])
    assert args.resume and args.output_dir and cfg.train.checkpoint_every and "torchrun" in command


def functions(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_a_fault_has_tests_that_exist_or_a_reason(row):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[3])
    assert named or re.search("comes with|does not apply", row[3]), "neither a test nor a reason"
    assert len(named) == row[3].count("::")
    for file, name in named:
        assert name in functions(file), f"{file} has no {name}"


# ---- the disk --------------------------------------------------------------------------------------------

# Five steps, a checkpoint after the second and the fourth, and at the end.
SHORT = ("optim.epochs=0.5", "optim.freeze_last_layer_epochs=0", "crops.local_crops_number=2",
         "train.checkpoint_every=2", "train.keep_last=5")  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_goes_on_from_the_newest_intact_checkpoint(tmp_path, capsys):
    """One is cut short, one has a flipped bit: both are passed over, told, and replaced."""
    folder = tmp_path / "run"
    expected, before = go(folder, *SHORT), weights(folder)
    for step, damage in ((5, lambda x: x[:-100]), (4, lambda x: x[:999] + bytes([x[999] ^ 1]) + x[1000:])):
        file = folder / "checkpoints" / f"step_{step:08d}" / "__0_0.distcp"
        file.write_bytes(damage(file.read_bytes()))
    (folder / "teacher.pth").unlink()
    found = go(folder, *SHORT, "--resume")
    said = capsys.readouterr().err
    assert "step_00000005: __0_0.distcp has" in said and "step_00000004: __0_0.distcp has changed" in said
    assert losses(found) == losses(expected) and same(weights(folder), before)
    assert [p.name[-1] for p in checkpoint.step_folders(folder / "checkpoints")] == ["5", "4", "2"]
    assert checkpoint.newest_intact(folder / "checkpoints").name == "step_00000005"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    def fill_up(run, step):
        (run.path / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(train.RunFolder, "truncate_log", fill_up)
    with pytest.raises(UserError, match="metrics.jsonl.*No space left"):
        go(tmp_path / "run", *SHORT)


def test_what_killed_saves_leave_behind_is_swept(tmp_path):
    """A checkpoint of a large model is many gigabytes: half of one must not stay for good."""
    folder = tmp_path / "run" / "checkpoints"
    go(tmp_path / "run", *SHORT, "optim.epochs=0.3")
    for name in (".step_00000001.old", ".step_00000002.partial"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_bytes(bytes(1000))
    go(tmp_path / "run", *SHORT, "--resume")
    assert sorted(p.name[-1] for p in folder.iterdir()) == ["2", "3", "4", "5"]


# ---- the mathematics -------------------------------------------------------------------------------------


def test_a_poisoned_run_leaves_finite_checkpoints(tmp_path, monkeypatch):
    real = train.make_loader

    def poisoned(*args):
        for i, batch in enumerate(real(*args)):
            if i >= 3:
                batch["globals"][0, 0, 0, 0] = math.inf
            yield batch

    monkeypatch.setattr(train, "make_loader", poisoned)
    with pytest.raises(SystemExit):
        go(tmp_path / "run", *SHORT, "train.max_nan=3", "optim.epochs=1")
    found, paths = weights(tmp_path / "run"), checkpoint.step_folders(tmp_path / "run" / "checkpoints")
    assert {"2", "4"} <= {p.name[-1] for p in paths}  # 4: after the first poisoned step
    for path in paths:
        state = {"teacher": found, "student": {k: v.clone() for k, v in found.items()}}
        checkpoint.load_checkpoint(path, state)
        assert all(torch.isfinite(v).all() for part in state.values() for v in part.values())


@pytest.mark.parametrize("factor, skipped", [(1e6, 0), (1e30, 1)])
def test_an_exploding_gradient_is_clipped_or_the_step_skipped(factor, skipped, monkeypatch):
    """Its norm is logged as it was before; where the norm itself overflows, nothing moves."""
    cfg, real = small(), train.compute_losses
    t, calm = take_steps(cfg)
    before = {k: v.clone() for k, v in t.student.state_dict().items()}
    monkeypatch.setattr(train, "compute_losses", lambda *a: {k: v * factor for k, v in real(*a).items()})
    metrics = train.train_step(t, [random_batch(cfg)], compute_schedules(cfg, 150), cfg)
    after = t.student.state_dict()
    assert metrics["skipped"] == skipped and all(torch.isfinite(v).all() for v in after.values())
    assert same(before, after) == bool(skipped)
    gradient = torch.stack([p.grad.norm() for p in t.student.backbone.parameters()]).norm()
    if not skipped:
        assert metrics["grad_backbone"] > 1000 * calm["grad_backbone"]
        assert gradient.item() == pytest.approx(cfg.optim.clip_grad, rel=1e-3)


def test_one_prototype_for_everything_is_named(tmp_path, monkeypatch):
    real = train.teacher_targets

    def one_hot(*args):
        targets = real(*args)
        for x in (targets.globals, targets.patches):
            x.zero_()[..., 3] = 1
        return targets

    monkeypatch.setattr(train, "teacher_targets", one_hot)
    said = [r["warning"] for r in go(tmp_path / "run", *SHORT) if "warning" in r]
    assert len(said) == 1 and "one-hot" in said[0]


class Turing:
    """A GPU without bf16: PyTorch says yes when asked in general, since it can emulate it, slowly."""

    @staticmethod
    def is_bf16_supported(including_emulation=True):
        return including_emulation


def test_auto_takes_no_emulated_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", Turing.is_bf16_supported)
    assert train.compute_dtype(small(), torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    assert train.compute_dtype(small(), torch.device("cuda")) == torch.bfloat16
    assert train.compute_dtype(small(), torch.device("cpu")) == torch.float32


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


# ---- images ----------------------------------------------------------------------------------------------


def test_a_zeroed_stretch_decodes_and_only_a_checksum_shows_it(tmp_path):
    """As docs/faults.md says: nobody can see this but who has noted the SHA-256."""
    file, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    good = file.getvalue()
    middle = len(good) // 2
    bad = good[:middle] + bytes(200) + good[middle + 200 :]
    assert sources.decode_image(bad, "bad").size == (96, 96)
    assert hashlib.sha256(bad).digest() != hashlib.sha256(good).digest()


def peak():
    """The largest memory of this process so far, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_costs_no_memory():
    """144 million pixels would be 432 MB."""
    bomb = png_header(12000, 12000, (b"IDAT", zlib.compress(bytes(12000 * 3 + 1) * 2000, 9)))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = peak()
    with pytest.raises(sources.BadImage, match="12000 x 12000"):
        sources.decode_image(bomb, "bomb")
    assert peak() - before < 100
    Path("/proc/self/clear_refs").write_text("5")
    kept = np.ones(432_000_000, np.uint8)  # what is measured can be seen
    assert peak() - before > 300 and kept[-1] == 1


def test_one_class_is_a_run_with_a_perfect_score(tmp_path):
    """Neither an error nor a division by zero: chance is then 1, and the table says so."""
    (tmp_path / "images").mkdir()
    source = f"folder:{folder_of_images(tmp_path / 'images' / 'only', 12, 0).parent}"
    go(tmp_path / "run", f"train.dataset_path={source}", "optim.epochs=0.3", "optim.warmup_epochs=0.1",
       "optim.freeze_last_layer_epochs=0", f"evaluation.train_path={source}",
       f"evaluation.test_path={source}")  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["knn_top1"] == result["chance"] == 1


def test_more_ranks_than_images(tmp_path):
    """Every rank gets a full batch of the one image there is, each crop another."""
    source = sources.open_source(f"folder:{folder_of_images(tmp_path / 'images', 1, 0)}")
    batches = [next(data.make_loader(small(), source, "cpu", 0, rank, 4)) for rank in range(4)]
    assert [b["samples"][0].item() for b in batches] == [0, 8, 16, 24]
    assert not torch.equal(batches[0]["globals"], batches[3]["globals"])
