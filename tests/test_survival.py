"""Runs that are killed: by kill -9 at any moment, by a rank or a whole node that dies, by a scheduler.

Each of them must end as if nothing had happened: every step once in the log, and the numbers of a run that
nobody disturbed. Importing torch takes longer than such a run, so most are forked from one process that has
imported everything (the `forkserver`); only what needs torchrun starts afresh.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forkserver import RUN_ENVIRONMENT, free_port, kill_all
from helpers import ROOT, TWO_RANKS, load_teacher

import checkpoint

STEPS = 14  # of eight images, by one process or by two
SETTINGS = ["--model", "debug", "train.dataset_path=scenes:60:seed=3", "train.log_every=1",
            f"train.OFFICIAL_EPOCH_LENGTH={STEPS}", "optim.epochs=1", "optim.warmup_epochs=0.2",
            "optim.freeze_last_layer_epochs=0.1", "teacher.warmup_teacher_temp_epochs=0.5",
            "student.drop_path_rate=0", "crops.local_crops_number=2", "dino.koleo_group=4",
            "evaluation.train_path=", "evaluation.test_path="]  # fmt: skip
linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")


def rows(folder):
    """The whole lines of metrics.jsonl; the last one may be torn, or not there yet."""
    file = Path(folder) / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def last_step(folder):
    return max((r["step"] for r in rows(folder)), default=0)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def weights(folder):
    return torch.load(Path(folder) / "teacher.pth", weights_only=True)["teacher"]


def different(a, b):
    """The names of the tensors that are not the same, bit by bit."""
    return [k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])]


def assert_undisturbed(folder, expected):
    """Every step once, in order, with the numbers of a run that nobody disturbed; and it says it is done."""
    found = rows(folder)
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    keys = [k for k in expected[0] if k.startswith(("loss", "grad"))]
    worst = max(abs(a[k] - b[k]) / (abs(a[k]) + 1e-9) for a, b in zip(expected, found) for k in keys)
    assert worst < 1e-5, worst
    assert json.loads((folder / "result.json").read_text())["steps"] == expected[-1]["step"]


def steps_told(text):
    """The steps that a run without a terminal prints, repeated ones included."""
    return [int(step) for step in re.findall(r"^step +(\d+)", text, re.M)]


def intact(folder):
    """The step of the newest checkpoint, seen from outside: every part is whole and agrees; 0 without any."""
    path = checkpoint.newest_intact(folder / "checkpoints")
    if path is None:
        return 0
    meta = checkpoint.load_checkpoint(path, state := {"step": 0})
    assert state["step"] == meta["step"] == int(path.name[5:])
    return state["step"]


@pytest.fixture(scope="module")
def expected(forkserver, tmp_path_factory):
    """The rows of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("expected") / "run"
    forkserver.run(*SETTINGS, "--output-dir", folder, "train.checkpoint_every=0")
    return rows(folder)


# ---- kill -9 ---------------------------------------------------------------------------------------------

# What is logged of step k says that the save of step k - 1 has begun, which ends that of step k - 2 first.
IN_FLIGHT = 2


def saving(folder):
    """Is a checkpoint half written? The manifest is its last file."""
    there = [p for p in (folder / "checkpoints").glob("*step_*") if p.suffix != ".old"]
    return any(not (p / "manifest.json").exists() for p in there)


@pytest.mark.parametrize("moments", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_loses_no_saved_step(moments, forkserver, tmp_path):
    """A run that saves every step, killed again and again: while it starts, steps, saves, prunes."""
    draw, length, folder = random.Random(moments), f"optim.epochs={5 * moments / STEPS}", tmp_path / "run"
    forkserver.run(*SETTINGS, "--output-dir", tmp_path / "whole", length, "train.checkpoint_every=0")
    saved = 0
    for i in range(moments):
        before, when = last_step(folder), ("stepping", "saving", "starting", "stepping", "saving")[i % 5]
        moment = draw.uniform(0, dict(starting=0.6, stepping=0.25, saving=0.1)[when])
        child = forkserver.start(
            *SETTINGS, "--output-dir", folder, length, "train.checkpoint_every=1", "--resume"
        )[0]
        if when != "starting":
            wait_for(lambda before=before: last_step(folder) > before)
        if when == "saving":
            wait_for(lambda: saving(folder))
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        assert forkserver.wait() == [-signal.SIGKILL], "the run was over before it could be killed"
        assert steps_told(forkserver.output())[:1] in ([], [saved + 1]), "it did not go on where it could"
        logged, saved = last_step(folder), intact(folder)
        print(f"killed after {moment:.3f} s of {when}: {logged=} {saved=}")
        assert saved >= logged - IN_FLIGHT
    forkserver.run(*SETTINGS, "--output-dir", folder, length, "train.checkpoint_every=0", "--resume")
    assert steps_told(forkserver.output())[0] == saved + 1
    assert_undisturbed(folder, rows(tmp_path / "whole"))
    assert not different(weights(folder), weights(tmp_path / "whole"))


LAST_WRITE = """
import signal
plain, calls = os.replace, []

def replace(old, new):
    calls.append(str(new))
    if sum(x.endswith("teacher.pth") for x in calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(old, new)

os.replace = replace
"""


def test_killed_before_the_last_teacher_is_written(forkserver, tmp_path):
    """The last checkpoint is there, so nothing is left to train; but the file is of an older step."""
    folder, short = tmp_path / "run", [f"optim.epochs={6 / STEPS}", "train.checkpoint_every=3"]
    forkserver.start(*SETTINGS, "--output-dir", folder, *short, first=LAST_WRITE)
    assert forkserver.wait() == [-signal.SIGKILL] and last_step(folder) == 6
    forkserver.run(*SETTINGS, "--output-dir", folder, *short, "--resume")
    found = weights(folder)
    saved = {k: torch.zeros_like(v) for k, v in found.items()}
    checkpoint.load_checkpoint(folder / "checkpoints" / "step_00000006", {"teacher": saved})
    assert not different(found, saved)


FULL = """
import resource
plain = train.train_step

def train_step(state, *args, **options):
    if state.step == 5:  # from now on no file may be larger than 1 MB
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    return plain(state, *args, **options)

train.train_step = train_step
"""


def test_a_disk_that_fills_up_stops_a_run_with_a_sentence(forkserver, tmp_path):
    """The checkpoints before it are good: with room again, the run goes on from the last."""
    folder, short = tmp_path / "run", [f"optim.epochs={8 / STEPS}", "train.checkpoint_every=2"]
    forkserver.start(*SETTINGS, "--output-dir", folder, *short, first=FULL)
    assert forkserver.wait() == [1]
    last = forkserver.output().splitlines()[-1]
    assert last.startswith("error: ") and "could not be written" in last and "make room" in last
    assert intact(folder) in (2, 4)  # that of step 4 may have been on its way
    assert all(p.name.startswith("step_") for p in (folder / "checkpoints").iterdir())
    forkserver.run(*SETTINGS, "--output-dir", folder, *short, "--resume")
    assert [r["step"] for r in rows(folder)] == list(range(1, 9)) and (folder / "result.json").exists()


# ---- two processes ---------------------------------------------------------------------------------------

PAIR = ["--standalone", "--nproc-per-node=2"]


def torchrun(how, *argv, script=ROOT / "train.py", log):
    """torchrun in the background; what it and its workers say goes to the file `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(script), *SETTINGS]
    command += ["train.batch_size_per_gpu=4", "train.checkpoint_every=2", *map(str, argv)]
    with open(log, "a") as file:
        return subprocess.Popen(command, env=RUN_ENVIRONMENT, stdout=file, stderr=file, start_new_session=True)


def kill_tree(process):
    """SIGKILL an agent and all that descends from it: its workers have sessions of their own."""
    doomed = [process.pid]
    for pid in doomed:
        files = Path(f"/proc/{pid}/task").glob("*/children")
        doomed += [int(child) for file in files for child in file.read_text().split()]
    kill_all(doomed)
    process.wait()


@pytest.fixture
def started():
    """Processes that a failing test leaves behind are ended."""
    processes = []
    yield processes
    for process in processes:
        if process.poll() is None:
            kill_tree(process)


DYING = """
import os, config, train
plain = train.train_step

def train_step(state, *args, **options):
    if state.step == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(17)
    return plain(state, *args, **options)

train.train_step = train_step
config.run(train.main)
"""


@linux
def test_a_rank_dies_and_the_run_goes_on(expected, started, tmp_path):
    """torchrun starts both ranks again; steps after the last checkpoint are taken, and logged, once more."""
    script, log = tmp_path / "dying.py", tmp_path / "log"
    script.write_text(DYING)
    how = [*PAIR, "--max-restarts=1"]
    started.append(torchrun(how, "--output-dir", tmp_path / "run", "--resume", script=script, log=log))
    assert started[0].wait(120) == 0, log.read_text()[-3000:]
    told = steps_told(log.read_text())
    assert "(exitcode: 17)" in log.read_text() and told.count(1) == 1 and told.count(7) <= 2
    assert_undisturbed(tmp_path / "run", expected)


@linux
def test_sigterm_to_torchrun_stops_both_ranks_at_one_step(expected, forkserver, started, tmp_path):
    """torchrun itself ends with 1, so the run folder has to say how far it came; one process goes on."""
    folder, log = tmp_path / "run", tmp_path / "log"
    started.append(torchrun(PAIR, "--output-dir", folder, "train.checkpoint_every=0", log=log))
    wait_for(lambda: last_step(folder) >= 3)
    started[0].terminate()
    assert started[0].wait(25) == 1
    said, step = log.read_text(), last_step(folder)
    assert said.count("stopped at step") == 1 and f"stopped at step {step} of {STEPS}" in said
    assert 3 <= step < STEPS and intact(folder) == step and not (folder / "result.json").exists()
    forkserver.run(*SETTINGS, "--output-dir", folder, "train.checkpoint_every=0", "--resume")
    assert steps_told(forkserver.output())[0] == step + 1
    assert_undisturbed(folder, expected)


def listening(port):
    with socket.socket() as s:
        return s.connect_ex(("localhost", port)) == 0


@linux
def test_a_node_dies_comes_back_and_the_run_goes_on(expected, started, tmp_path):
    """Two nodes of one process each. The second is killed, agent and all, and started again."""
    folder, port = tmp_path / "run", free_port()
    quick = "keep_alive_interval=1,keep_alive_max_attempt=2"  # a dead node is missed within seconds
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}",
             f"--rdzv-conf={quick}", "--rdzv-id=1", "--local-addr=localhost", "--max-restarts=3"]  # fmt: skip

    def start(log):
        started.append(torchrun(nodes, "--output-dir", folder, "--resume", log=tmp_path / log))

    start("first")
    wait_for(lambda: listening(port))  # all meet at the first node
    start("second")
    wait_for(lambda: last_step(folder) >= 4)
    kill_tree(started[1])
    assert last_step(folder) < STEPS
    start("third")
    for node, log in ((started[0], "first"), (started[2], "third")):
        assert node.wait(120) == 0, (tmp_path / log).read_text()[-3000:]
    logs = "".join((tmp_path / log).read_text() for log in ("first", "second", "third"))
    assert steps_told(logs).count(1) == 1, "it began anew"
    assert_undisturbed(folder, expected)


BLIND = """
from sources import BadImage
from scenes import Scenes
plain = Scenes.__getitem__

def read(self, i):
    if os.environ["RANK"] == "1":
        raise BadImage(f"image {i}", "only here")
    return plain(self, i)

Scenes.__getitem__ = read
"""


def test_a_rank_that_sees_only_bad_images_leaves_nobody_waiting(forkserver, tmp_path):
    """A rank that waits in a collective for one that has given up notices that it is gone."""
    forkserver.start(
        *SETTINGS, "--output-dir", tmp_path / "run", "train.batch_size_per_gpu=4", first=BLIND, ranks=2
    )
    assert forkserver.wait(limit=60) == [1, 1]
    said = forkserver.output()
    assert "ten images in a row cannot be read" in said and "only here" in said
