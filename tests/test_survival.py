"""Runs that are killed: by kill -9 at any moment, by a rank or a whole node that dies, by a scheduler.

Each must end as if nothing had happened: every step once in the log, and the numbers of an undisturbed run.
Importing torch takes longer than such a run, so most are forked from one process that has imported everything
(the `forkserver`); only those that need torchrun start afresh.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from forkserver import RUN_ENVIRONMENT, free_port, kill_all
from helpers import ROOT, TWO_RANKS, load_teacher, same_tensors, torchrun

import checkpoint

STEPS = 14  # of eight images, by one process or by two
SETTINGS = ["--model", "debug", "compute_precision.dtype=fp32",
            "train.dataset_path=scenes:60:seed=3", "train.log_every=1",
            f"train.OFFICIAL_EPOCH_LENGTH={STEPS}", "optim.epochs=1", "optim.warmup_epochs=0.2",
            "optim.freeze_last_layer_epochs=0.1", "teacher.warmup_teacher_temp_epochs=0.5",
            "student.drop_path_rate=0", "crops.local_crops_number=2", "dino.koleo_group=4",
            "evaluation.train_path=", "evaluation.test_path="]  # fmt: skip
linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")


def complete_rows(folder):
    """The log of a run that may be writing to it: the last line may be torn, or not there yet."""
    file = Path(folder) / "metrics.jsonl"
    if not file.exists():
        return []
    *lines, _torn = file.read_text().split("\n")
    return [json.loads(line) for line in lines]


def steps_of(rows):
    return [row["step"] for row in rows]


def last_step(folder):
    return max(steps_of(complete_rows(folder)), default=0)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def assert_undisturbed(folder, expected):
    """Every step once, in order, with the numbers of an undisturbed run; and result.json says it is done."""
    found = complete_rows(folder)
    assert steps_of(found) == steps_of(expected)
    for our_row, their_row in zip(found, expected):
        for name, value in their_row.items():
            if name.startswith(("loss", "grad")):
                assert abs(our_row[name] - value) / (abs(value) + 1e-9) < 1e-5, (their_row["step"], name)
    assert json.loads((folder / "result.json").read_text())["steps"] == expected[-1]["step"]


def steps_printed(text):
    """The steps that a run without a terminal prints, repeated ones included."""
    return [int(step) for step in re.findall(r"^step +(\d+)", text, re.M)]


def intact_step(folder):
    """The step of the newest intact checkpoint, on which its parts must agree; 0 without any."""
    path = checkpoint.newest_intact(folder / "checkpoints")
    if path is None:
        return 0
    state = {"step": 0}
    meta = checkpoint.load_checkpoint(path, state)
    assert state["step"] == meta["step"] == int(path.name.removeprefix("step_"))
    return state["step"]


@pytest.fixture(scope="module")
def expected(forkserver, tmp_path_factory):
    """The rows of an undisturbed run."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    forkserver.run(*SETTINGS, "--output-dir", folder, "train.checkpoint_every=0")
    return complete_rows(folder)


# ---------------------------------------------------------------- kill -9

# Once step k is in the log, the save of step k - 1 has begun, which ends that of step k - 2 first.
IN_FLIGHT = 2


def is_saving(folder):
    """Whether a checkpoint is half written. The manifest is its last file."""
    paths = [path for path in (folder / "checkpoints").glob("*step_*") if path.suffix != ".old"]
    return not all((path / "manifest.json").exists() for path in paths)


# While it does what it is killed, and within how many seconds from then.
PHASES = [("stepping", 0.25), ("saving", 0.1), ("starting", 0.6), ("stepping", 0.25), ("saving", 0.1)]


def wait_for_phase(phase, folder, step):
    """Until a run that goes on from `step` is there."""
    if phase != "starting":
        wait_for(lambda: last_step(folder) > step)
    if phase == "saving":
        wait_for(lambda: is_saving(folder))


@pytest.mark.parametrize("moments", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_loses_no_saved_step(moments, forkserver, tmp_path):
    """A run that saves every step, killed again and again: while it starts, steps, saves, prunes."""
    rng = random.Random(moments)
    length = f"optim.epochs={5 * moments / STEPS}"
    folder = tmp_path / "run"
    forkserver.run(*SETTINGS, "--output-dir", tmp_path / "whole", length, "train.checkpoint_every=0")
    resume = [*SETTINGS, "--output-dir", folder, length, "--resume"]
    saved = 0
    for i in range(moments):
        phase, longest = PHASES[i % 5]
        delay = rng.uniform(0, longest)
        step_before = last_step(folder)
        (child,) = forkserver.start(*resume, "train.checkpoint_every=1")
        wait_for_phase(phase, folder, step_before)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert forkserver.wait() == [-signal.SIGKILL], "the run was over before it could be killed"
        assert steps_printed(forkserver.output())[:1] in ([], [saved + 1]), "it did not go on where it could"
        logged = last_step(folder)
        saved = intact_step(folder)
        print(f"killed after {delay:.3f} s of {phase}: {logged=} {saved=}")
        assert saved >= logged - IN_FLIGHT
    forkserver.run(*resume, "train.checkpoint_every=0")
    assert steps_printed(forkserver.output())[0] == saved + 1
    assert_undisturbed(folder, complete_rows(tmp_path / "whole"))
    assert same_tensors(load_teacher(folder), load_teacher(tmp_path / "whole"))


# Executed before a run: it dies as it is about to write teacher.pth for the second time.
DIE_BEFORE_THE_LAST_WRITE = """
import signal
real = os.replace
teachers = []

def replace(old, new):
    if str(new).endswith("teacher.pth"):
        teachers.append(new)
    if len(teachers) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)

os.replace = replace
"""


def test_killed_before_the_last_teacher_is_written(forkserver, tmp_path):
    """The last checkpoint is there, so nothing is left to train; but the file is of an older step."""
    folder = tmp_path / "run"
    short_run = [*SETTINGS, "--output-dir", folder, f"optim.epochs={6 / STEPS}", "train.checkpoint_every=3"]
    forkserver.start(*short_run, first=DIE_BEFORE_THE_LAST_WRITE)
    assert forkserver.wait() == [-signal.SIGKILL]
    assert last_step(folder) == 6
    forkserver.run(*short_run, "--resume")
    teacher = load_teacher(folder)
    saved = {name: torch.zeros_like(value) for name, value in teacher.items()}
    checkpoint.load_checkpoint(folder / "checkpoints" / "step_00000006", {"teacher": saved})
    assert same_tensors(teacher, saved)


FILL_THE_DISK = """
import resource
real = train.train_step

def train_step(state, *args, **options):
    if state.step == 5:  # from now on no file may be larger than 1 MB
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    return real(state, *args, **options)

train.train_step = train_step
"""


def test_a_disk_that_fills_up_stops_a_run_with_a_sentence(forkserver, tmp_path):
    """The checkpoints before it are good: with room again, the run goes on from the last."""
    folder = tmp_path / "run"
    short_run = [*SETTINGS, "--output-dir", folder, f"optim.epochs={8 / STEPS}", "train.checkpoint_every=2"]
    forkserver.start(*short_run, first=FILL_THE_DISK)
    assert forkserver.wait() == [1]
    sentence = forkserver.output().splitlines()[-1]
    assert sentence.startswith("error: ")
    assert "could not be written" in sentence
    assert "make room" in sentence
    assert "File too large" in sentence
    assert intact_step(folder) in (2, 4)  # that of step 4 may have been on its way
    assert all(path.name.startswith("step_") for path in (folder / "checkpoints").iterdir())
    forkserver.run(*short_run, "--resume")
    assert steps_of(complete_rows(folder)) == list(range(1, 9))
    assert (folder / "result.json").exists()


# ---------------------------------------------------------------- signals

SIGNAL_AT_STEP_5 = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
real = train.train_step

def train_step(state, *args, **options):
    if state.step == 5:
        send()
    return real(state, *args, **options)

train.train_step = train_step
"""
CTRL_C = """
def send():
    signal.raise_signal(signal.SIGINT)
"""
CLOSED_TERMINAL = """
master, terminal = os.openpty()
os.login_tty(terminal)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def send():
    os.close(master)
"""


@pytest.mark.parametrize("how, code", [(CTRL_C, 130), (CLOSED_TERMINAL, 75)])
def test_ctrl_c_and_a_closed_terminal_save_first(how, code, expected, forkserver, tmp_path):
    """What the run would still print to the terminal must not stop it from saving."""
    folder = tmp_path / "run"
    forkserver.start(*SETTINGS, "--output-dir", folder, first=SIGNAL_AT_STEP_5 + how)
    assert forkserver.wait() == [code]
    assert intact_step(folder) == 6
    forkserver.run(*SETTINGS, "--output-dir", folder, "--resume")
    assert_undisturbed(folder, expected)


def test_a_second_ctrl_c_does_not_save(forkserver, tmp_path):
    twice = CTRL_C + "    signal.raise_signal(signal.SIGINT)"
    settings = [*SETTINGS, "--output-dir", tmp_path / "run", "train.checkpoint_every=0"]
    forkserver.start(*settings, first=SIGNAL_AT_STEP_5 + twice)
    assert forkserver.wait() == [-signal.SIGINT]
    assert intact_step(tmp_path / "run") == 0


# ---------------------------------------------------------------- two processes


def start_torchrun(launch, *argv, script=ROOT / "train.py", log):
    """torchrun in the background; it and its workers print to the file `log`."""
    command = [*torchrun(*launch), str(script), *SETTINGS]
    command += ["train.batch_size_per_gpu=4", "train.checkpoint_every=2", *map(str, argv)]
    with open(log, "a") as file:
        options = dict(stdout=file, stderr=file, start_new_session=True)
        return subprocess.Popen(command, env=RUN_ENVIRONMENT, **options)


def kill_tree(process):
    """SIGKILL an agent and all its descendants: its workers have sessions of their own."""
    pids = [process.pid]
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += map(int, file.read_text().split())
    kill_all(pids)
    process.wait()


@pytest.fixture
def started():
    """Processes that a failing test leaves behind are ended."""
    processes = []
    yield processes
    for process in processes:
        if process.poll() is None:
            kill_tree(process)


DYING_RANK = """
import os, config, train
real = train.train_step

def train_step(state, *args, **options):
    if state.step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(17)
    return real(state, *args, **options)

train.train_step = train_step
config.run(train.main)
"""


@linux
def test_a_rank_dies_and_the_run_goes_on(expected, started, tmp_path):
    """torchrun starts both ranks again; steps after the last checkpoint are taken, and logged, once more."""
    script = tmp_path / "dying.py"
    log = tmp_path / "log"
    script.write_text(DYING_RANK)
    options = [*TWO_RANKS, "--max-restarts=1"]
    argv = ["--output-dir", tmp_path / "run", "--resume"]
    started.append(start_torchrun(options, *argv, script=script, log=log))
    assert started[0].wait(120) == 0, log.read_text()[-3000:]
    assert "(exitcode: 17)" in log.read_text()
    steps = steps_printed(log.read_text())
    assert steps.count(1) == 1
    assert steps.count(7) <= 2
    assert_undisturbed(tmp_path / "run", expected)


@linux
def test_sigterm_to_torchrun_stops_both_ranks_at_one_step(expected, forkserver, started, tmp_path):
    """torchrun itself ends with 1, so the run folder has to say how far it came; one process goes on."""
    folder = tmp_path / "run"
    log = tmp_path / "log"
    started.append(start_torchrun(TWO_RANKS, "--output-dir", folder, "train.checkpoint_every=0", log=log))
    wait_for(lambda: last_step(folder) >= 3)
    started[0].terminate()
    assert started[0].wait(25) == 1
    printed = log.read_text()
    step = last_step(folder)
    assert 3 <= step < STEPS
    assert intact_step(folder) == step
    assert not (folder / "result.json").exists()
    assert printed.count("stopped at step") == 1
    assert f"stopped at step {step} of {STEPS}" in printed
    forkserver.run(*SETTINGS, "--output-dir", folder, "train.checkpoint_every=0", "--resume")
    assert steps_printed(forkserver.output())[0] == step + 1
    assert_undisturbed(folder, expected)


def is_listening(port):
    with socket.socket() as s:
        return s.connect_ex(("localhost", port)) == 0


@linux
def test_a_node_dies_comes_back_and_the_run_goes_on(expected, started, tmp_path):
    """Two nodes of one process each. The second is killed, agent and all, and started again."""
    folder = tmp_path / "run"
    port = free_port()
    quick = "keep_alive_interval=1,keep_alive_max_attempt=2"  # a dead node is missed within seconds
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}",
             f"--rdzv-conf={quick}", "--rdzv-id=1", "--local-addr=localhost", "--max-restarts=3"]  # fmt: skip

    def start(log):
        started.append(start_torchrun(nodes, "--output-dir", folder, "--resume", log=tmp_path / log))

    start("first")
    wait_for(lambda: is_listening(port))  # all meet at the first node
    start("second")
    wait_for(lambda: last_step(folder) >= 4)
    kill_tree(started[1])
    assert last_step(folder) < STEPS
    start("third")
    for node, log in ((started[0], "first"), (started[2], "third")):
        assert node.wait(120) == 0, (tmp_path / log).read_text()[-3000:]
    logs = [(tmp_path / log).read_text() for log in ("first", "second", "third")]
    assert steps_printed("".join(logs)).count(1) == 1, "it began anew"
    assert_undisturbed(folder, expected)


CLOCK_OF_RANK_0 = """
import itertools, types, checkpoint
minutes = itertools.count(0, 4 if os.environ["RANK"] == "0" else 1)
checkpoint.time = types.SimpleNamespace(monotonic=lambda: 60 * next(minutes))
"""


def test_two_ranks_save_by_one_clock(forkserver, tmp_path):
    """That of rank 0, wherever the other's stands: else one would save alone, and wait for ever."""
    argv = [*SETTINGS, "--output-dir", tmp_path / "run", "train.batch_size_per_gpu=4"]
    forkserver.run(*argv, "train.checkpoint_every=0", "train.keep_last=99", first=CLOCK_OF_RANK_0, ranks=2)
    assert len(checkpoint.step_folders(tmp_path / "run" / "checkpoints")) > 2


BAD_IMAGES_ON_RANK_1 = """
from decode import BadImage
from scenes import Scenes
real = Scenes.__getitem__

def getitem(self, i):
    if os.environ["RANK"] == "1":
        raise BadImage(f"image {i}", "only here")
    return real(self, i)

Scenes.__getitem__ = getitem
"""


def test_a_rank_that_sees_only_bad_images_leaves_nobody_waiting(forkserver, tmp_path):
    """A rank that waits in a collective for one that has given up notices that it is gone."""
    argv = [*SETTINGS, "--output-dir", tmp_path / "run", "train.batch_size_per_gpu=4"]
    forkserver.start(*argv, first=BAD_IMAGES_ON_RANK_1, ranks=2)
    assert forkserver.wait(limit=60) == [1, 1]
    printed = forkserver.output()
    assert "ten images in a row cannot be read" in printed
    assert "only here" in printed
