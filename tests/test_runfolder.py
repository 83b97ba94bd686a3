"""The run folder refuses what would spoil it, mends what a crash tore, and turns signals into a flag."""

import errno
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import child_environment, read_log

import config
import runfolder
from config import UserError
from runfolder import RunFolder

SETTINGS = config.Config().to_yaml()


def test_what_it_leaves_behind(tmp_path):
    run = RunFolder(tmp_path / "runs" / "a", SETTINGS)
    run.log({"step": 0, "loss": torch.tensor(1.5), "lr": np.float32(0.5), "entropy": math.nan})
    run.write_result({"knn": 0.5, "bad": math.inf})
    assert (run.path / "config.yaml").read_text() == SETTINGS
    assert (run.path / "checkpoints").is_dir()
    assert read_log(run.path) == [{"step": 0, "loss": 1.5, "lr": 0.5, "entropy": None}]
    assert json.loads((run.path / "result.json").read_text()) == {"knn": 0.5, "bad": None}
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["processes"] == 1
    assert environment["threads"] >= 1
    assert environment["cpu"]
    assert environment["command"]
    assert {"git_commit", "git_diff"} <= environment.keys()
    run.close()
    assert not list(run.path.glob(".*.partial"))


def test_another_config_is_refused_and_the_difference_named(tmp_path, capsys):
    RunFolder(tmp_path, SETTINGS).close()
    with pytest.raises(UserError, match="holds a run: add --resume"):
        RunFolder(tmp_path, SETTINGS)  # a second run would write over the first
    RunFolder(tmp_path, SETTINGS, resume=True).close()
    other = config.load(overrides=["optim.epochs=70", "speed.threads=3"]).to_yaml()
    with pytest.raises(UserError, match=r"optim.epochs: 100.0 there, 70.0 now\)"):
        RunFolder(tmp_path, other)
    assert (tmp_path / "config.yaml").read_text() == SETTINGS
    RunFolder(tmp_path, other, resume=True).close()
    assert "optim.epochs" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == other
    RunFolder(tmp_path, other.replace("threads: 3", "threads: 1"), resume=True).close()
    assert not capsys.readouterr().err  # only speed differs: nothing to tell


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="has files but no config.yaml"):
        RunFolder(tmp_path, SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("dino: [")
    with pytest.raises(UserError, match="unreadable"):
        RunFolder(tmp_path, SETTINGS)


@pytest.mark.parametrize("inside", ["", "runs/a"])
def test_an_unwritable_folder_is_one_sentence(inside, tmp_path):
    (tmp_path / "file").write_text("")  # chmod would not stop root
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / inside, SETTINGS)


HOLD = """
import sys, runfolder
run = runfolder.RunFolder(sys.argv[1], "a: {b: 1}")
print("held", flush=True)
sys.stdin.read()
"""


def hold(path):
    """A process that has the lock of a run folder."""
    command = [sys.executable, "-c", HOLD, str(path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = subprocess.Popen(command, env=child_environment(), **pipes)
    assert child.stdout.readline() == b"held\n"
    return child


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    child = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=f"in use by pid {child.pid} on "):
            RunFolder(tmp_path, "a: {b: 1}")
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert f"pid {child.pid}" in (tmp_path / "lock").read_text()  # stale: its owner could not tidy up
    RunFolder(tmp_path, "a: {b: 1}", resume=True).close()
    (tmp_path / "lock").write_text("pid 1 on elsewhere\n")  # a living pid, but not a holder
    RunFolder(tmp_path, "a: {b: 1}", resume=True).close()


def test_a_torn_line_is_mended_and_later_rows_dropped(tmp_path, capsys):
    run = RunFolder(tmp_path, SETTINGS)
    for step in range(5):
        run.log({"step": step})
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    run = RunFolder(tmp_path, SETTINGS, resume=True)
    run.truncate_log(2)
    for step in (3, 4):
        run.log({"step": step})
    run.close()
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1, 2, 3, 4]
    assert "1 torn line" in capsys.readouterr().err


def test_signals_set_a_flag_and_ctrl_c_does_not(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    run = RunFolder(tmp_path, SETTINGS)
    run.install_signal_handlers()
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        assert not run.stop_requested
        os.kill(os.getpid(), getattr(signal, name))
        assert run.stop_requested == name
        run.stop_requested = False
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    run.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runfolder.fcntl, "lockf", lockf)
    RunFolder(tmp_path / "run", SETTINGS).close()
    assert "note: no lock on" in capsys.readouterr().err
