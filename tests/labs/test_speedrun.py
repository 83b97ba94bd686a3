"""The race of the labs: `labs/speedrun.sh check` tells logs that keep the rules from those that do not."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import config

SCRIPT = Path(__file__).parents[2] / "labs" / "speedrun.sh"
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
RESULT = dict(knn_top1=0.83, train_seconds=290.0)
BREACHES = {
    "k-NN 0.810, target 0.82": (dict(knn_top1=0.81), []),
    "301 s of training": (dict(train_seconds=301), []),
    "other data": ({}, ["evaluation.test_path=scenes:1000:seed=11"]),
    "weights from elsewhere": ({}, ["train.init_from=runs/other"]),
    "its seed is 1": ({}, ["train.seed=1"]),  # whatever the folder says
}


def check(tmp_path, result=(), settings=(), seeds=(0, 1, 2)):
    """Run `check` on logs like those the script copies, with these numbers and settings -> its process."""
    environment = dict(threads=2, gpus=[], processes=1, git_commit="0123456789abc", git_diff="", cpu="a CPU")
    for seed in seeds:
        log = tmp_path / f"laptop-seed-{seed}"
        log.mkdir()
        own = ["speed.device=cpu", "speed.threads=2", f"train.seed={seed}", *settings]
        (log / "config.yaml").write_text(config.load(None, "laptop", own).to_yaml())
        (log / "environment.json").write_text(json.dumps(environment))
        (log / "result.json").write_text(json.dumps(RESULT | dict(result)))
        (log / "metrics.jsonl").write_text("")
    command = ["bash", SCRIPT, "check", tmp_path.name]  # a path relative to where the user is
    return subprocess.run(command, cwd=tmp_path.parent, capture_output=True, text=True)


def test_logs_that_keep_the_rules(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| 012345678 | 3 | 0.830 (0.830-0.830) | 290 | a CPU |")


@pytest.mark.parametrize("complaint", BREACHES)
def test_a_broken_rule_is_named(complaint, tmp_path):
    done = check(tmp_path, *BREACHES[complaint])
    assert done.returncode == 1
    assert f"laptop-seed-0: {complaint}" in done.stderr
    assert "no row for the table" in done.stderr
    assert not done.stdout


def test_one_good_seed_is_luck(tmp_path):
    done = check(tmp_path, seeds=[0])
    assert done.returncode == 1
    assert "the race takes three runs, with seeds 0, 1 and 2" in done.stderr


def test_a_folder_without_logs(tmp_path):
    done = subprocess.run(["bash", SCRIPT, "check", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "holds no run of a race" in done.stderr
