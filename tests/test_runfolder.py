"""The run folder refuses what would spoil it, mends what a crash tore, and turns signals into a flag."""

import errno
import json
import math
import os
import shutil
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


def open_run(path, settings, resume=False, step=0):
    """A run folder of a run that has started."""
    run = RunFolder(path, settings, resume)
    run.start(step)
    return run


def test_what_it_leaves_behind(tmp_path):
    run = open_run(tmp_path / "runs" / "a", SETTINGS)
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
    open_run(tmp_path, SETTINGS).close()
    with pytest.raises(UserError, match="holds a run: add --resume"):
        RunFolder(tmp_path, SETTINGS)  # a second run would write over the first
    open_run(tmp_path, SETTINGS, resume=True).close()
    other = config.load(overrides=["optim.epochs=70", "speed.threads=3"]).to_yaml()
    with pytest.raises(UserError, match=r"optim.epochs: 100.0 there, 70.0 now\)"):
        RunFolder(tmp_path, other)
    assert (tmp_path / "config.yaml").read_text() == SETTINGS
    open_run(tmp_path, other, resume=True).close()
    assert "optim.epochs" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == other
    RunFolder(tmp_path, other.replace("threads: 3", "threads: 1"), resume=True).close()
    assert not capsys.readouterr().err  # only speed differs: nothing to tell


def test_ctrl_c_is_no_matter_of_the_workers(tmp_path):
    """They inherit the handler, and a second Ctrl-C must not kill one of them before the run itself."""
    run = open_run(tmp_path, SETTINGS)
    run.pid += 1  # as in a process that was forked
    run.on_signal(signal.SIGINT, None)
    assert not run.stop_requested
    run.close()


def test_earlier_settings_are_kept_when_a_run_goes_on(tmp_path):
    """Those that made the steps so far: a resume that went nowhere has made none."""
    settings = [config.load(overrides=[f"optim.epochs={epochs}"]).to_yaml() for epochs in (70, 80, 90)]
    open_run(tmp_path, settings[0]).close()
    environment = b"{}"  # of another machine
    (tmp_path / "environment.json").write_bytes(environment)
    RunFolder(tmp_path, settings[1], resume=True).close()  # the checkpoint does not fit: it never starts
    assert (tmp_path / "config.yaml").read_text() == settings[0]
    assert (tmp_path / "environment.json").read_bytes() == environment
    open_run(tmp_path, settings[1], resume=True, step=12).close()
    open_run(tmp_path, settings[2], resume=True, step=12).close()
    assert (tmp_path / "config.yaml").read_text() == settings[2]
    assert (tmp_path / "config.before-step_00000012.yaml").read_text() == settings[0]
    assert (tmp_path / "environment.before-step_00000012.json").read_bytes() == environment
    names = {path.name for path in tmp_path.iterdir()}
    open_run(tmp_path, settings[2], resume=True, step=12).close()
    assert {path.name for path in tmp_path.iterdir()} == names


def move(path):
    path.rename(path.with_name("elsewhere"))


def replace(path):
    """Another run takes the place."""
    shutil.rmtree(path)
    open_run(path, SETTINGS).close()


WRITES = {
    "log": lambda run: run.log({"step": 1}),
    "write_config": lambda run: run.write_config(SETTINGS),
    "write_result": lambda run: run.write_result({}),
}


@pytest.mark.parametrize("loss", [shutil.rmtree, move, replace])
@pytest.mark.parametrize("write", WRITES)
def test_a_folder_that_is_gone_is_noticed_and_not_made_again(write, loss, tmp_path):
    run = open_run(tmp_path / "run", SETTINGS)
    loss(run.path)
    left = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="run or its lock was deleted or moved while") as error:
        WRITES[write](run)
    assert "--resume" not in str(error.value)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == left
    run.close()


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="has files but no config.yaml"):
        RunFolder(tmp_path, SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["dino: [", "[" * 100_000, "- a", "words", "", "dino: [1]", "\xe9"])
def test_a_damaged_config_is_refused(content, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
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
    run = open_run(tmp_path, SETTINGS)
    for step in range(5):
        run.log({"step": step})
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    run = RunFolder(tmp_path, SETTINGS, resume=True)
    run.start(2)
    for step in (3, 4):
        run.log({"step": step})
    run.close()
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1, 2, 3, 4]
    assert "1 torn line" in capsys.readouterr().err


@pytest.fixture
def default_signals():
    """Nothing is ignored, as it is in a shell's background jobs; afterwards all is as before."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_set_a_flag(default_signals, tmp_path, capfd):
    before = signal.getsignal(signal.SIGTERM)
    run = RunFolder(tmp_path, SETTINGS)
    run.install_signal_handlers()
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT"):
        assert not run.stop_requested
        os.kill(os.getpid(), getattr(signal, name))
        assert run.stop_requested == name
        run.stop_requested = False
    assert "Ctrl-C again ends at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "the second would only be another flag"
    run.close()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signals_stay_ignored(default_signals, tmp_path):
    """Else a run under nohup would end with its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = RunFolder(tmp_path, SETTINGS)
    run.install_signal_handlers()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not run.stop_requested
    run.close()


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runfolder.fcntl, "lockf", lockf)
    RunFolder(tmp_path / "run", SETTINGS).close()
    assert "note: no lock on" in capsys.readouterr().err
