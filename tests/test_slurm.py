"""configs/slurm.sbatch, with stand-ins for Slurm: told to stop, it requeues itself; then it finishes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, read_log

SRUN = '#!/bin/bash\nshift 3\nexec {python} -m torch.distributed.run "$@"\n'  # --cpus-per-task N torchrun
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "requeued $2"; fi\n'
SETTINGS = [
    "--model",
    "debug",
    "compute_precision.dtype=fp32",
    "train.batch_size_per_gpu=4",
    "evaluation.train_path=",
    "optim.epochs=12",
]


@pytest.fixture
def sbatch(tmp_path):
    """Starts the script as Slurm would, on one "node" with two "GPUs" -> the process."""
    stand_ins = dict(srun=SRUN.format(python=sys.executable), scontrol=SCONTROL, squeue="echo RUNNING\n")
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = dict(
        os.environ,
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="localhost",
        SLURM_NNODES="1",
        SLURM_GPUS_ON_NODE="2",
        SLURM_CPUS_PER_TASK="2",
        NANODINO_PORT=str(29500 + os.getpid() % 400),
        NANODINO_OUT=str(tmp_path / "run"),
        OMP_NUM_THREADS="1",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def start(*more):
        command = ["bash", "configs/slurm.sbatch", *SETTINGS, *more]
        return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    return start


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_requeues_itself_and_finishes(sbatch, tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    job = sbatch()
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGTERM)  # Slurm signals the tasks: torchrun
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, out + err
    assert "requeued 7" in out
    assert not (tmp_path / "run" / "result.json").exists()
    job = sbatch()
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, out + err
    assert "done: " in out
    assert "requeued" not in out
    steps = [row["step"] for row in read_log(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 49)), "no gap, no duplicate"


@pytest.mark.slow
def test_a_job_that_cannot_start_is_not_requeued(sbatch):
    job = sbatch("train.dataset_path=folder:/nowhere")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "requeued" not in out
    assert "not requeued" in err
    assert "/nowhere" in err
