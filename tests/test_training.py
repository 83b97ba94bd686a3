"""Whole runs on tiny settings: determinism, resume, signals, results, and clear answers to bad input."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    TINY_RUN,
    TWO_RANKS,
    child_environment,
    load_teacher,
    logged_losses,
    read_log,
    run_tiny,
    same_tensors,
    torchrun,
    write_noise_images,
)

import checkpoint
import config
import data
import eval_knn
import optim
import runfolder
import train
from config import UserError


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A finished run: its folder and the rows of its log."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return folder, run_tiny(folder)


def assert_same_run(reference, folder, rows):
    """Every logged loss and every weight is the same, bit for bit."""
    reference_folder, reference_rows = reference
    assert logged_losses(rows) == logged_losses(reference_rows)
    assert same_tensors(load_teacher(folder), load_teacher(reference_folder))


# ---------------------------------------------------------------- determinism and resume


def test_same_seed_same_bits_another_seed_not(reference, tmp_path):
    _, rows = reference
    assert len(logged_losses(rows)) == 10
    assert_same_run(reference, tmp_path / "again", run_tiny(tmp_path / "again"))
    assert logged_losses(run_tiny(tmp_path / "other", "train.seed=1")) != logged_losses(rows)


def test_stop_and_resume_is_bit_identical(reference, tmp_path, monkeypatch):
    """Stopped at step 4, in the middle of an epoch of 60 images; crops, masks, drop path go on."""
    real = train.train_step

    def step_then_stop(state, *args, **options):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(state, *args, **options)

    monkeypatch.setattr(train, "train_step", step_then_stop)
    assert train.main([*TINY_RUN, "--output-dir", str(tmp_path / "run")]) == 75
    monkeypatch.setattr(train, "train_step", real)
    assert_same_run(reference, tmp_path / "run", run_tiny(tmp_path / "run", "--resume"))


def stop_clock(monkeypatch, minutes):
    """Each look at the clock by checkpoint.py is so many minutes after the one before."""
    clock = itertools.count(0, 60 * minutes)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def test_a_run_saves_by_time_and_logs_what_it_costs(reference, tmp_path, monkeypatch):
    """Nothing else changes: the numbers are those of a run that saves at its end."""
    settings = ["train.checkpoint_minutes=15", "train.checkpoint_every=0", "train.keep_last=99"]
    checkpoints = tmp_path / "run" / "checkpoints"
    rows = run_tiny(tmp_path / "run", *settings)
    assert [path.name for path in checkpoint.step_folders(checkpoints)] == ["step_00000010"]
    assert not any("checkpoint_seconds" in row for row in rows)
    shutil.rmtree(tmp_path / "run")
    stop_clock(monkeypatch, minutes=4)
    rows = run_tiny(tmp_path / "run", *settings)
    saved = [int(path.name.removeprefix("step_")) for path in checkpoint.step_folders(checkpoints)]
    assert len(saved) > 2
    costs = [row["step"] for row in rows if row.get("checkpoint_seconds", 0) > 0]
    assert costs == [step + 1 for step in reversed(saved[1:])]
    assert_same_run(reference, tmp_path / "run", rows)
    shutil.rmtree(checkpoints / "step_00000010")
    assert_same_run(reference, tmp_path / "run", run_tiny(tmp_path / "run", *settings, "--resume"))


V1 = ["ibot.mask_sample_probability=0", "ibot.separate_head=true", "dino.koleo_loss_weight=0",
      "student.layerscale=0", "dino.freeze_weight_g=true", "train.centering=centering"]  # fmt: skip


@pytest.mark.parametrize("recipe", [["train.centering=centering"], ["train.centering=sinkhorn_knopp"], V1])
def test_resume_from_a_checkpoint_that_is_older_than_the_log(recipe, tmp_path):
    """A run killed after its last checkpoint repeats those steps, and logs each of them once."""
    settings = [*recipe, "train.checkpoint_every=4", "train.keep_last=5"]
    whole = tmp_path / "whole", run_tiny(tmp_path / "whole", *settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    assert_same_run(whole, tmp_path / "run", run_tiny(tmp_path / "run", *settings, "--resume"))


def test_resuming_a_finished_run_only_evaluates_it(reference, tmp_path):
    folder, rows = reference
    shutil.copytree(folder, tmp_path / "run")
    assert run_tiny(tmp_path / "run", "--resume") == rows
    assert result_of(tmp_path / "run") == result_of(folder)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_the_teacher_of_a_finished_run_is_written_again(damage, reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run")
    file = tmp_path / "run" / "teacher.pth"
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] + (b"" if damage == "truncated" else b"?" + content[half + 1 :]))
    if damage == "missing":
        file.unlink()
    run_tiny(tmp_path / "run", "--resume")
    assert file.read_bytes() == content


def test_a_refused_resume_changes_nothing(reference, tmp_path):
    """--model was forgotten, say."""
    shutil.copytree(reference[0], tmp_path / "run")
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="of another architecture"):
        run_tiny(tmp_path / "run", "student.num_register_tokens=2", "--resume")
    del files[tmp_path / "run" / "lock"]  # it names the process
    assert all(path.read_bytes() == content for path, content in files.items())


@pytest.fixture
def handlers():
    """Ctrl-C as in a terminal (a background job ignores it); all handlers are put back afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, stops", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_ctrl_c_ends_the_last_evaluation(handlers, tmp_path, monkeypatch, number, stops):
    """All is saved by then; a scheduler's signal lets it finish."""

    def final_results(evaluator, teacher):
        signal.raise_signal(number)
        return {}

    monkeypatch.setattr(train.KNNEvaluator, "final_results", final_results)
    with pytest.raises(KeyboardInterrupt) if stops else contextlib.nullcontext():
        run_tiny(tmp_path / "run")
    assert (tmp_path / "run" / "result.json").exists() != stops
    assert (tmp_path / "run" / "teacher.pth").exists()


def test_a_finished_run_keeps_the_settings_that_made_it(reference, tmp_path):
    """--resume with others trains no step: they must not stand beside its result."""
    shutil.copytree(reference[0], tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    run_tiny(tmp_path / "run", "optim.base_lr=9", "--resume")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").glob("*.before-*"))


def test_a_run_whose_folder_is_deleted_stops(tmp_path, monkeypatch):
    """At the next write, without making it again, and without the advice to resume what is gone."""
    real = train.train_step

    def step_then_delete(state, *args, **options):
        if state.step == 3:
            shutil.rmtree(tmp_path / "run")
        assert state.step < 4, "it should have stopped"
        return real(state, *args, **options)

    monkeypatch.setattr(train, "train_step", step_then_delete)
    with pytest.raises(UserError, match="run or its lock was deleted or moved") as error:
        run_tiny(tmp_path / "run")
    assert "--resume" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(reference):
    with pytest.raises(UserError, match="holds a run: add --resume"):
        run_tiny(reference[0])


def test_workers_change_nothing(reference, tmp_path):
    _, rows = reference
    assert logged_losses(run_tiny(tmp_path / "run", "train.num_workers=2")) == logged_losses(rows)


# ---------------------------------------------------------------- results


def test_results_and_baselines(tmp_path, capsys):
    sets = ["evaluation.train_path=scenes:80:seed=1", "evaluation.test_path=scenes:600:seed=2"]
    rows = run_tiny(tmp_path / "run", *sets, "evaluation.eval_period_iterations=5")
    result = result_of(tmp_path / "run")
    shares = ["knn_top1", "knn_pixels", "knn_random_init", "chance", "fg_miou", "fg_miou_random_init"]
    assert all(0 <= result[name] <= 1 for name in shares)
    assert {"train_seconds", "images_per_second"} <= result.keys()
    assert [row["step"] for row in rows if "knn_top1" in row] == [5]
    table = capsys.readouterr().out.splitlines()[-4:]
    assert "raw pixels" in table[0]
    assert table[1].startswith("k-NN top-1")
    assert table[3].startswith("10 steps in")


def test_eval_knn_reads_a_run_folder(reference, monkeypatch, capsys):
    sets = ["--train", "scenes:60:seed=1", "--test", "scenes:30:seed=2"]
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", "--weights", str(reference[0]), *sets])
    eval_knn.main()
    heading, columns, *table = capsys.readouterr().out.splitlines()
    assert "60 images in the bank, 30 queries" in heading
    assert "k=20" in columns
    for line, name in zip(table, ["this backbone", "random initialisation", "raw pixels", "chance"]):
        assert line[:22].strip() == name
        assert all(0 <= float(accuracy) <= 1 for accuracy in line[22:].split())


def test_second_run_takes_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [*TINY_RUN, "optim.epochs=0.2", "optim.freeze_last_layer_epochs=0", "optim.warmup_epochs=0.1"]
    train.main(args)
    train.main(args)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"debug", "debug-2"}


# ---------------------------------------------------------------- --max-minutes


def test_max_minutes_cuts_off_what_cannot_fit(tmp_path, capsys):
    run_tiny(tmp_path / "run", "--max-minutes", 1e-9)
    assert result_of(tmp_path / "run")["steps"] == 1
    assert "the time is up: cut off at step 1 of 10" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()


def test_max_minutes_lets_the_schedules_end(tmp_path, monkeypatch, capsys):
    """Of 6,000 steps of a second each, a minute's anneal to their end; config.yaml says how many."""
    clock = Clock(monkeypatch)
    real = train.train_step

    def step_of_a_second(*args, **options):
        clock.seconds += 1
        return real(*args, **options)

    monkeypatch.setattr(train, "train_step", step_of_a_second)
    spans = ["optim.epochs=60", "optim.warmup_epochs=6", "train.OFFICIAL_EPOCH_LENGTH=100"]
    rows = run_tiny(tmp_path / "run", "--max-minutes", 1, *spans, "train.batch_size_per_gpu=2")
    steps = result_of(tmp_path / "run")["steps"]
    cfg = config.load(tmp_path / "run" / "config.yaml")
    assert 55 <= steps <= 60
    assert steps == optim.total_steps(cfg)
    assert cfg.optim.warmup_epochs == pytest.approx(0.1 * cfg.optim.epochs)
    rates = [row["lr"] for row in rows]
    assert len(rates) == steps
    assert rates[-1] < 0.01 * max(rates)
    assert f"{steps} steps fit into the time" in capsys.readouterr().err


class Clock:
    """The time as optim.py sees it, which only a test moves on."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr(optim, "time", SimpleNamespace(monotonic=lambda: self.seconds))


PACES = {  # seconds of each step
    "steady": lambda step: 1.0,
    "slower": lambda step: 2.0 if step > 50 else 1.0,
    "faster": lambda step: 2.0 if step < 100 else 1.0,
}


@pytest.mark.parametrize("pace", PACES)
def test_a_deadline_follows_the_pace(pace, monkeypatch):
    """The run ends within its time, and uses nearly all of it."""
    clock = Clock(monkeypatch)
    cfg = config.load(model="debug", overrides=["optim.epochs=500"])
    step = 10
    deadline = optim.Deadline(cfg, 300 / 60, step)
    while step < optim.total_steps(cfg) and not deadline.passed(step):
        clock.seconds += PACES[pace](step)
        step += 1
        deadline.refit(step, "cpu")
    assert step == optim.total_steps(cfg)
    assert 270 < clock.seconds <= 300


def test_a_deadline_that_is_far_away_changes_nothing():
    cfg = config.load(model="debug")
    before = cfg.to_yaml()
    deadline = optim.Deadline(cfg, 1e6, 0)
    assert not any(deadline.refit(step, "cpu") for step in range(1, 100))
    assert cfg.to_yaml() == before


@pytest.mark.parametrize("minutes", ["-1", "nan", "inf"])
def test_impossible_minutes_are_refused(minutes, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--max-minutes", minutes])
    assert f"--max-minutes: '{minutes}' must be a number, 0 or more" in capsys.readouterr().err


# ---------------------------------------------------------------- bad images, poison, collapse


def test_bad_images_are_listed_and_too_many_stop_the_run(tmp_path):
    some = write_noise_images(tmp_path / "some", 30, bad=1)
    run_tiny(tmp_path / "run", f"train.dataset_path=folder:{some}")
    assert "bad0.png" in (tmp_path / "run" / "bad_images_rank0.jsonl").read_text()
    assert result_of(tmp_path / "run")["bad_images"] > 0
    many = write_noise_images(tmp_path / "many", 10, bad=6)
    with pytest.raises(UserError, match="max_bad_images"):
        run_tiny(tmp_path / "run2", f"train.dataset_path=folder:{many}", "train.max_bad_images=0.002")


def test_collapse_is_named(tmp_path):
    """Targets without sharpening: the teacher ends without an opinion, and the run says so, once."""
    length = ["optim.epochs=6", "train.log_every=2", "crops.local_crops_number=0"]
    blunt = ["train.centering=centering", "teacher.teacher_temp=10", "teacher.warmup_teacher_temp=10"]
    rows = run_tiny(tmp_path / "run", *length, *blunt)
    (warning,) = [row["warning"] for row in rows if "warning" in row]
    assert "uniform" in warning


def test_skipped_steps_are_named_and_stop_the_run(tmp_path, monkeypatch):
    real = train.make_loader

    def poisoned(*args):
        for i, batch in enumerate(real(*args)):
            batch["globals"][0, 0, 0, 0] = float("nan") if i >= 3 else 0
            yield batch

    monkeypatch.setattr(train, "make_loader", poisoned)
    with pytest.raises(SystemExit) as error:
        run_tiny(tmp_path / "run", "train.max_nan=2")
    assert error.value.code == 70
    skipped = [row["skipped_samples"] for row in read_log(tmp_path / "run") if "skipped_samples" in row]
    assert skipped == [[24, 31], [32, 39], [40, 47]]


# ---------------------------------------------------------------- the loop


def test_profile_tells_where_a_step_goes(tmp_path, capsys):
    sets = ["evaluation.train_path=", "evaluation.test_path="]
    argv = ["--model", "debug", "--profile", *sets, "--output-dir", str(tmp_path / "run")]
    assert train.main(argv) == 0
    text = (tmp_path / "run" / "profile.txt").read_text()
    assert text in capsys.readouterr().out
    milliseconds = {}
    for line in text.splitlines()[1:]:
        milliseconds[line[:16].strip()] = float(line[16:].split()[0])
    sections = {"data wait", "teacher forward", "student forward", "losses", "backward", "optimizer", "EMA"}
    assert set(milliseconds) == sections | {"checkpoint", "the rest", "a step"}
    assert sum(milliseconds.values()) == pytest.approx(2 * milliseconds["a step"], rel=0.01)
    assert milliseconds["backward"] > 0
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert sections <= {event.get("name") for event in events}
    assert runfolder.PROFILE is None


def test_a_run_that_is_too_short_for_a_profile_says_so(tmp_path, capsys):
    run_tiny(tmp_path / "run", "--profile", "optim.epochs=0.9", "optim.freeze_last_layer_epochs=0.1")
    printed = capsys.readouterr().out
    assert "where a step goes" in printed
    assert "--profile needs 10 steps, this run took 9" in printed
    assert runfolder.PROFILE is None
    assert not (tmp_path / "run" / "trace.json").exists()


def test_seconds_between_logged_steps_count_too(tmp_path, monkeypatch):
    """Logged only at its first step, and stopped after five: all of its time counts."""
    calls = itertools.count()
    real = train.train_step

    def slow_step(*args, **options):
        time.sleep(0.3)
        return real(*args, **options)

    monkeypatch.setattr(train.dist, "all_reduce_ints", lambda *flags: [0, 0, next(calls) == 5, 0, 0])
    monkeypatch.setattr(train, "train_step", slow_step)
    run_tiny(tmp_path / "run", "train.log_every=1000")
    assert result_of(tmp_path / "run")["steps"] == 5
    assert result_of(tmp_path / "run")["train_seconds"] >= 1.5


def test_a_stop_at_a_saved_step_saves_it_once(tmp_path, monkeypatch):
    saved_steps = []
    real = checkpoint.CheckpointWriter.start

    def start(self, folder, step, *args, **options):
        saved_steps.append(step)
        real(self, folder, step, *args, **options)

    # A stop is requested as soon as a save has started; what the run itself writes there is ignored.
    stop_requested = property(lambda run: saved_steps, lambda run, value: None)
    monkeypatch.setattr(checkpoint.CheckpointWriter, "start", start)
    monkeypatch.setattr(train.RunFolder, "stop_requested", stop_requested, raising=False)
    assert train.main([*TINY_RUN, "--output-dir", str(tmp_path / "run"), "train.checkpoint_every=4"]) == 75
    assert saved_steps == [4]
    assert checkpoint.newest_intact(tmp_path / "run" / "checkpoints").name == "step_00000004"


def test_an_image_that_is_read_too_early_does_no_harm(tmp_path, monkeypatch):
    """The loop reads one batch ahead; after the last step there is nobody to be bothered by what is in it."""
    real = data.MultiCropDataset.__getitem__

    def getitem(self, step_and_micro):
        if step_and_micro[0] == 10:
            raise OSError("the disk is gone")
        return real(self, step_and_micro)

    monkeypatch.setattr(data.MultiCropDataset, "__getitem__", getitem)
    assert run_tiny(tmp_path / "run")[-1]["step"] == 10
    with pytest.raises(UserError, match="the disk is gone"):
        run_tiny(tmp_path / "longer", "optim.epochs=1.1")


# ---------------------------------------------------------------- mistakes are one sentence


# An error of a command, and what the sentence must say.
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of ...")
WORKER = UserError("reading images stopped: RuntimeError: DefaultCPUAllocator: can't allocate memory")
ERRORS = {
    "a full disk": (
        OSError(errno.ENOSPC, "No space left on device", "x/result.json"),
        "result.json': make room",
    ),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded: make room"),
    "a long name": (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "'aaa': check that path"),
    "a CPU": (CPU, "not enough memory for another 8 bytes: take less"),
    "a GPU": (GPU, "not enough memory for another 2.50 GiB: take less"),
    "Python": (MemoryError(), "not enough memory: take less"),
    "a worker": (WORKER, "not enough memory: take less"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_user_can_mend_is_one_sentence(name, capsys):
    error, words = ERRORS[name]

    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        config.run(main, "take less")
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), OSError("no errno")])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        config.run(main)


def test_a_disk_that_is_full_for_torch_is_a_sentence(capsys):
    """Its zip writer ends with an error of its own, about the place in the file that it did not reach."""

    def main():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    with pytest.raises(SystemExit):
        config.run(main)
    assert "No space left on device: make room" in capsys.readouterr().err


# Each asks for more memory than there are addresses.
TOO_LARGE = ["train.batch_size_per_gpu=1e15", "crops.local_crops_number=1e15", "dino.head_n_prototypes=1e15",
             "dino.head_hidden_dim=1e12", "student.num_register_tokens=1e15"]  # fmt: skip


@pytest.mark.parametrize("setting", TOO_LARGE)
def test_too_little_memory_is_one_sentence_with_a_remedy(setting, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        config.run(lambda: run_tiny(tmp_path / "run", setting), train.IF_OUT_OF_MEMORY)
    assert error.value.code == 1
    printed = capsys.readouterr().err
    assert "not enough memory" in printed
    assert "lower train.batch_size_per_gpu" in printed


PATHS = ["--output-dir", "--config", "--init-from", "train.distill_from", "train.dataset_path"]


@pytest.mark.parametrize("name", PATHS)
def test_a_name_that_is_too_long_is_one_sentence(name, tmp_path, capsys):
    path = f"{tmp_path}/{'x' * 300}"
    argument = [name, path]
    if not name.startswith("--"):
        argument = [f"{name}={'folder:' if name == 'train.dataset_path' else ''}{path}"]
    with pytest.raises(SystemExit) as error:
        config.run(lambda: run_tiny(tmp_path / "run", *argument))
    assert error.value.code == 1
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("error: ")
    assert "xxx" in printed


BAD_SETTINGS = {  # and what the sentence must name
    "optim.base_lt=1": "optim.base_lr",
    "optim.epochs=many": "optim.epochs",
    "train.dataset_path=folder:/nowhere/at/all": "/nowhere/at/all",
    "train.dataset_path=ftp://x": "ftp",
    "crops.global_crops_size=33": "patch",
    "student.arch=vit_enormous": "vit_enormous",
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_settings_are_one_sentence(setting, tmp_path):
    with pytest.raises(UserError) as error:
        run_tiny(tmp_path / "run", setting)
    assert BAD_SETTINGS[setting] in str(error.value)
    assert "\n" not in str(error.value)


def test_checkpoint_of_another_architecture(reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run")
    saved_config = tmp_path / "run" / "config.yaml"
    text = saved_config.read_text()
    saved_config.write_text(text.replace("num_register_tokens: 4", "num_register_tokens: 2"))
    with pytest.raises(UserError, match="register"):
        run_tiny(tmp_path / "run", "student.num_register_tokens=2", "--resume")


# ---------------------------------------------------------------- as a command


def start_process(*command):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=child_environment(), **pipes)


def test_from_the_shell_errors_have_no_traceback(tmp_path):
    command = [sys.executable, "train.py", "--model", "vitz14", "--output-dir", str(tmp_path / "x")]
    process = start_process(*command)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_sigterm_leaves_a_checkpoint_and_code_75(tmp_path):
    endless = [*TINY_RUN, "optim.epochs=1000", "--output-dir", str(tmp_path / "run")]
    process = start_process(sys.executable, "train.py", *endless)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=25)
    assert process.returncode == 75, err
    assert "--resume" in out
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_torchrun_with_two_processes_trains(tmp_path):
    """Two ranks, one run folder, one log; the sum of both is the global batch."""
    settings = ["student.drop_path_rate=0", "train.batch_size_per_gpu=4"]
    argv = [*TINY_RUN, *settings, "--output-dir", str(tmp_path / "two")]
    process = start_process(*torchrun(*TWO_RANKS), "train.py", *argv)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    one = logged_losses(run_tiny(tmp_path / "one", "student.drop_path_rate=0", "dino.koleo_group=4"))
    two = logged_losses(read_log(tmp_path / "two"))
    for (our_step, our_loss, _), (their_step, their_loss, _) in zip(two, one, strict=True):
        assert our_step == their_step
        assert our_loss == pytest.approx(their_loss, abs=1e-5)
