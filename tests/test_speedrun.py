"""The race of the labs: `labs/speedrun.sh check` knows a log that keeps the rules from one that does not."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import config

SCRIPT = Path(__file__).parent.parent / "labs" / "speedrun.sh"
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
RESULT = dict(knn_top1=0.83, train_seconds=290.0)
BREACHES = {
    "k-NN 0.810, target 0.82": (dict(knn_top1=0.81), []),
    "301 s of training": (dict(train_seconds=301), []),
    "other data": ({}, ["evaluation.test_path=scenes:1000:seed=11"]),
    "weights from elsewhere": ({}, ["train.init_from=runs/other"]),
    "its seed is 1": ({}, ["train.seed=1"]),
}


def check(tmp_path, result=(), settings=()):
    """A log as the script copies it, with these numbers and settings -> what `check` says of it."""
    log = tmp_path / "laptop-seed-0"
    log.mkdir()
    cfg = config.load(None, "laptop", ["speed.device=cpu", "speed.threads=2", *settings])
    about = dict(threads=2, gpus=[], processes=1, git_commit="0123456789abc", git_diff="", cpu="a CPU")
    (log / "config.yaml").write_text(cfg.to_yaml())
    (log / "environment.json").write_text(json.dumps(about))
    (log / "result.json").write_text(json.dumps(RESULT | dict(result)))
    (log / "metrics.jsonl").write_text("")
    return subprocess.run(["bash", SCRIPT, "check", tmp_path], capture_output=True, text=True)


def test_a_log_that_keeps_the_rules(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| 012345678 | 1 | 0.830 (0.830-0.830) | 290 | a CPU |")


@pytest.mark.parametrize("said", BREACHES)
def test_a_broken_rule_is_named(said, tmp_path):
    done = check(tmp_path, *BREACHES[said])
    assert done.returncode == 1 and f"laptop-seed-0: {said}" in done.stderr, done


def test_what_is_no_log(tmp_path):
    done = subprocess.run(["bash", SCRIPT, "check", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "holds no run of a race" in done.stderr
