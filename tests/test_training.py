"""Whole runs on tiny settings: determinism, resume, signals, results, and what train.py says to bad input."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import checkpoint
import config
import data
import eval_knn
import optim
import runfolder
import train
from config import UserError

ROOT = Path(__file__).parent.parent
TINY = ["--model", "debug", "train.dataset_path=scenes:60:seed=3", "train.batch_size_per_gpu=8",
        "train.OFFICIAL_EPOCH_LENGTH=10", "optim.epochs=1", "optim.warmup_epochs=0.2", "train.log_every=1",
        "teacher.warmup_teacher_temp_epochs=0.5", "student.drop_path_rate=0.3", "evaluation.train_path=",
        "evaluation.test_path="]  # fmt: skip


def go(folder, *extra):
    train.main([*TINY, "--output-dir", str(folder), *map(str, extra)])
    return rows(folder)


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(metrics):
    return [(r["step"], r["loss"], r["grad_backbone"]) for r in metrics if "loss" in r]


def weights(folder):
    return torch.load(Path(folder) / "teacher.pth", weights_only=True)["teacher"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    return folder, go(folder)


def test_same_seed_same_bits_another_seed_not(reference, tmp_path):
    folder, metrics = reference
    assert losses(go(tmp_path / "again")) == losses(metrics) and same(
        weights(folder), weights(tmp_path / "again")
    )
    assert losses(go(tmp_path / "other", "train.seed=1")) != losses(metrics)
    assert len(losses(metrics)) == 10


def test_stop_and_resume_is_bit_identical(reference, tmp_path, monkeypatch):
    """Stopped at step 4, in the middle of an epoch of 60 images; crops, masks, drop path go on."""
    folder, metrics = reference
    real = train.train_step

    def step_then_stop(t, *args, **kw):
        if t.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(t, *args, **kw)

    monkeypatch.setattr(train, "train_step", step_then_stop)
    assert train.main([*TINY, "--output-dir", str(tmp_path / "run")]) == 75
    monkeypatch.setattr(train, "train_step", real)
    resumed = go(tmp_path / "run", "--resume")
    assert losses(resumed) == losses(metrics)
    assert same(weights(folder), weights(tmp_path / "run"))


V1 = ["ibot.mask_sample_probability=0", "ibot.separate_head=true", "dino.koleo_loss_weight=0",
      "student.layerscale=0", "dino.freeze_weight_g=true", "train.centering=centering"]  # fmt: skip


@pytest.mark.parametrize("recipe", [["train.centering=centering"], ["train.centering=sinkhorn_knopp"], V1])
def test_resume_from_a_checkpoint_that_is_older_than_the_log(recipe, tmp_path):
    """A run killed after its last checkpoint repeats those steps, and logs each of them once."""
    extra = *recipe, "train.checkpoint_every=4", "train.keep_last=5"
    whole = go(tmp_path / "whole", *extra)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    assert losses(go(tmp_path / "run", *extra, "--resume")) == losses(whole)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_resuming_a_finished_run_only_evaluates_it(reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run")
    assert go(tmp_path / "run", "--resume") == reference[1]
    before, after = (json.loads((f / "result.json").read_text()) for f in (reference[0], tmp_path / "run"))
    assert before == after


def test_a_run_is_not_written_over(reference):
    with pytest.raises(UserError, match="holds a run: add --resume"):
        go(reference[0])


def test_workers_change_nothing(reference, tmp_path):
    assert losses(go(tmp_path / "workers", "train.num_workers=2")) == losses(reference[1])


def test_results_and_baselines(tmp_path, capsys):
    go(tmp_path / "run", "evaluation.train_path=scenes:80:seed=1", "evaluation.test_path=scenes:600:seed=2",
       "evaluation.eval_period_iterations=5")  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    wanted = {"knn_top1", "knn_pixels", "knn_random_init", "chance", "fg_miou", "fg_miou_random_init",
              "train_seconds", "images_per_second"}  # fmt: skip
    assert wanted <= result.keys() and all(
        0 <= result[k] <= 1 for k in wanted if "seconds" not in k and "images" not in k
    )
    assert [r["step"] for r in rows(tmp_path / "run") if "knn_top1" in r] == [5]
    tail = capsys.readouterr().out.splitlines()[-4:]
    assert "raw pixels" in tail[0] and tail[1].startswith("k-NN top-1") and tail[3].startswith("10 steps in")


def test_max_minutes_cuts_off_what_cannot_fit(tmp_path, capsys):
    go(tmp_path / "run", "--max-minutes", 1e-9)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 1
    assert "the time is up: cut off at step 1 of 10" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()


def test_max_minutes_lets_the_schedules_end(tmp_path, monkeypatch, capsys):
    """Of 6,000 steps of a second each, a minute's anneal to their end; config.yaml says how many."""
    real, clock = train.train_step, [0.0]

    def step_of_a_second(*args, **options):
        clock[0] += 1
        return real(*args, **options)

    monkeypatch.setattr(train, "train_step", step_of_a_second)
    monkeypatch.setattr(optim, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    spans = ["optim.epochs=60", "optim.warmup_epochs=6", "train.OFFICIAL_EPOCH_LENGTH=100"]
    metrics = go(tmp_path / "run", "--max-minutes", 1, *spans, "train.batch_size_per_gpu=2")
    steps = json.loads((tmp_path / "run" / "result.json").read_text())["steps"]
    cfg = config.load(tmp_path / "run" / "config.yaml")
    assert steps == optim.total_steps(cfg) and 55 <= steps <= 60
    assert cfg.optim.warmup_epochs == pytest.approx(0.1 * cfg.optim.epochs)
    rates = [row["lr"] for row in metrics]
    assert len(rates) == steps and rates[-1] < 0.01 * max(rates)
    assert f"{steps} steps fit into the time" in capsys.readouterr().err


def test_a_deadline_follows_the_pace(monkeypatch):
    """Steps that become slower, or faster: the run ends within its time, and uses nearly all of it."""
    for pace in (lambda step: 1.0, lambda step: 1.0 + (step > 50), lambda step: 1.0 + (step < 100)):
        cfg, clock, step = config.load(model="debug", overrides=["optim.epochs=500"]), [0.0], 10
        monkeypatch.setattr(optim, "time", SimpleNamespace(monotonic=lambda clock=clock: clock[0]))
        deadline = optim.Deadline(cfg, 300 / 60, step)
        while step < optim.total_steps(cfg) and not deadline.passed(step):
            step, clock[0] = step + 1, clock[0] + pace(step)
            deadline.refit(step, "cpu")
        assert step == optim.total_steps(cfg) and 270 < clock[0] <= 300, clock[0]
    with pytest.raises(UserError, match="--max-minutes is -1"):
        train.parse_args(["--max-minutes", "-1"])
    roomy = config.load(model="debug")
    before = roomy.to_yaml()
    deadline = optim.Deadline(roomy, 1e6, 0)
    assert not any(deadline.refit(step, "cpu") for step in range(1, 100)) and roomy.to_yaml() == before


def test_eval_knn_reads_a_run_folder(reference, monkeypatch, capsys):
    sets = ["--train", "scenes:60:seed=1", "--test", "scenes:30:seed=2"]
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", "--weights", str(reference[0]), *sets])
    eval_knn.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("60 images in the bank, 30 queries") and "k=20" in lines[1]
    names = ["this backbone", "random initialisation", "raw pixels", "chance"]
    assert [line[:22].strip() for line in lines[2:6]] == names
    assert all(0 <= float(x) <= 1 for line in lines[2:6] for x in line[22:].split())


def test_second_run_takes_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [*TINY, "optim.epochs=0.2", "optim.freeze_last_layer_epochs=0", "optim.warmup_epochs=0.1"]
    train.main(args), train.main(args)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"debug", "debug-2"}


def folder_of_images(path, good, bad):
    path.mkdir()
    for i in range(good):
        Image.effect_noise((48, 48), 60 + i).convert("RGB").save(path / f"{i}.png")
    for i in range(bad):
        (path / f"bad{i}.png").write_bytes(b"\x89PNG not really")
    return path


def test_bad_images_are_listed_and_too_many_stop_the_run(tmp_path):
    some = folder_of_images(tmp_path / "some", 30, 1)
    go(tmp_path / "run", f"train.dataset_path=folder:{some}")
    listed = (tmp_path / "run" / "bad_images_rank0.jsonl").read_text()
    assert (
        "bad0.png" in listed and json.loads((tmp_path / "run" / "result.json").read_text())["bad_images"] > 0
    )
    many = folder_of_images(tmp_path / "many", 10, 6)
    with pytest.raises(UserError, match="max_bad_images"):
        go(tmp_path / "run2", f"train.dataset_path=folder:{many}", "train.max_bad_images=0.002")


def test_collapse_is_named(tmp_path):
    """Targets without sharpening: the teacher ends without an opinion, and the run says so, once."""
    go(tmp_path / "run", "optim.epochs=6", "train.log_every=2", "crops.local_crops_number=0",
       "train.centering=centering", "teacher.teacher_temp=10", "teacher.warmup_teacher_temp=10")  # fmt: skip
    warnings = [r["warning"] for r in rows(tmp_path / "run") if "warning" in r]
    assert len(warnings) == 1 and "uniform" in warnings[0]


def test_skipped_steps_are_named_and_stop_the_run(tmp_path, monkeypatch):
    real = train.make_loader

    def poisoned(*args):
        for i, batch in enumerate(real(*args)):
            batch["globals"][0, 0, 0, 0] = float("nan") if i >= 3 else 0
            yield batch

    monkeypatch.setattr(train, "make_loader", poisoned)
    with pytest.raises(SystemExit) as e:
        go(tmp_path / "run", "train.max_nan=2")
    assert e.value.code == 70
    named = [r["skipped_samples"] for r in rows(tmp_path / "run") if "skipped_samples" in r]
    assert named == [[24, 31], [32, 39], [40, 47]]


def test_profile_tells_where_a_step_goes(tmp_path, capsys):
    assert train.main(["--model", "debug", "--profile", "evaluation.train_path=", "evaluation.test_path=",
                       "--output-dir", str(tmp_path / "run")]) == 0  # fmt: skip
    text = (tmp_path / "run" / "profile.txt").read_text()
    assert text in capsys.readouterr().out
    rows = {line[:16].strip(): float(line[16:].split()[0]) for line in text.splitlines()[1:]}
    parts = {"data wait", "teacher forward", "student forward", "losses", "backward", "optimizer", "EMA"}
    assert set(rows) == parts | {"checkpoint", "the rest", "a step"}
    assert sum(rows.values()) == pytest.approx(2 * rows["a step"], rel=0.01) and rows["backward"] > 0
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert parts <= {e.get("name") for e in events} and runfolder.PROFILE is None


def test_a_run_that_is_too_short_for_a_profile_says_so(tmp_path, capsys):
    go(tmp_path / "run", "--profile", "optim.epochs=0.9", "optim.freeze_last_layer_epochs=0.1")
    said = capsys.readouterr().out
    assert "where a step goes" in said and "--profile needs 10 steps, this run took 9" in said
    assert runfolder.PROFILE is None and not (tmp_path / "run" / "trace.json").exists()


def test_seconds_count_between_looks_too(tmp_path, monkeypatch):
    """Looked at only at its first step, and stopped after five: all of its time counts."""
    calls, real = itertools.count(), train.train_step

    def slow_step(*args, **options):
        time.sleep(0.3)
        return real(*args, **options)

    monkeypatch.setattr(train.dist, "all_reduce_ints", lambda *flags: [0, 0, next(calls) == 5, 0])
    monkeypatch.setattr(train, "train_step", slow_step)
    go(tmp_path / "run", "train.log_every=1000")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 5 and result["train_seconds"] >= 1.5


def test_a_stop_at_a_saved_step_saves_it_once(tmp_path, monkeypatch):
    started, real = [], train.checkpoint.CheckpointWriter.start

    def start(self, folder, step, *args, **kw):
        started.append(step)
        real(self, folder, step, *args, **kw)

    monkeypatch.setattr(train.checkpoint.CheckpointWriter, "start", start)
    monkeypatch.setattr(train.RunFolder, "stop_requested", property(lambda run: started, lambda run, _: None),
                        raising=False)  # fmt: skip
    assert train.main([*TINY, "--output-dir", str(tmp_path / "run"), "train.checkpoint_every=4"]) == 75
    assert started == [4] and checkpoint.newest_intact(tmp_path / "run" / "checkpoints").name == "step_00000004"


def test_an_image_that_is_read_too_early_does_no_harm(tmp_path, monkeypatch):
    """The loop reads one batch ahead; after the last step there is nobody to be bothered by what is in it."""
    real = data.MultiCropDataset.__getitem__

    def item(self, where):
        if where[0] == 10:
            raise OSError("the disk is gone")
        return real(self, where)

    monkeypatch.setattr(data.MultiCropDataset, "__getitem__", item)
    assert go(tmp_path / "run")[-1]["step"] == 10
    with pytest.raises(UserError, match="the disk is gone"):
        go(tmp_path / "longer", "optim.epochs=1.1")


def test_a_disk_without_room_is_one_sentence(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/result.json")

    with pytest.raises(SystemExit) as e:
        config.run(main)
    assert e.value.code == 1 and "result.json" in capsys.readouterr().err


BAD = {
    "optim.base_lt=1": "optim.base_lr",
    "optim.epochs=many": "optim.epochs",
    "train.dataset_path=folder:/nowhere/at/all": "/nowhere/at/all",
    "train.dataset_path=ftp://x": "ftp",
    "crops.global_crops_size=33": "patch",
    "student.arch=vit_enormous": "vit_enormous",
}


@pytest.mark.parametrize("setting", BAD)
def test_bad_settings_are_one_sentence(setting, tmp_path):
    with pytest.raises(UserError) as e:
        go(tmp_path / "run", setting)
    assert BAD[setting] in str(e.value) and "\n" not in str(e.value)


def test_checkpoint_of_another_architecture(reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(
        text.replace("num_register_tokens: 4", "num_register_tokens: 2")
    )
    with pytest.raises(UserError, match="register"):
        go(tmp_path / "run", "student.num_register_tokens=2", "--resume")


def command(*args, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, env=env, **pipes)


def test_from_the_shell_errors_have_no_traceback(tmp_path):
    p = command("train.py", "--model", "vitz14", "--output-dir", str(tmp_path / "x"))
    out, err = p.communicate(timeout=60)
    assert (
        p.returncode == 1
        and err.startswith("error: ")
        and "Traceback" not in err
        and len(err.splitlines()) == 1
    )


def test_sigterm_leaves_a_checkpoint_and_code_75(tmp_path):
    p = command("train.py", *TINY, "optim.epochs=1000", "--output-dir", str(tmp_path / "run"))
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=25)
    assert p.returncode == 75 and "--resume" in out, err
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_torchrun_with_two_processes_trains(tmp_path):
    """Two ranks, one run folder, one log; the sum of both is the global batch."""
    args = [
        *TINY,
        "student.drop_path_rate=0",
        "train.batch_size_per_gpu=4",
        "--output-dir",
        str(tmp_path / "two"),
    ]
    p = command("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "train.py", *args)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err[-2000:]
    go(tmp_path / "one", "student.drop_path_rate=0", "dino.koleo_group=4")
    for a, b in zip(losses(rows(tmp_path / "two")), losses(rows(tmp_path / "one")), strict=True):
        assert a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-5)
