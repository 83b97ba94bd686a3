"""configs/slurm.sbatch, with stand-ins for Slurm: told to stop, it requeues itself; then it finishes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRUN = '#!/bin/bash\nshift 3\nexec {python} -m torch.distributed.run "$@"\n'  # --cpus-per-task N torchrun
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "requeued $2"; fi\n'
SETTINGS = ["--model", "debug", "train.batch_size_per_gpu=4", "evaluation.train_path=", "optim.epochs=12"]


@pytest.fixture
def sbatch(tmp_path):
    """Starts the script as Slurm would, on one "node" with two "GPUs" -> the process."""
    stand_ins = dict(srun=SRUN.format(python=sys.executable), scontrol=SCONTROL, squeue="echo RUNNING\n")
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = dict(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="localhost", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2",
                 SLURM_CPUS_PER_TASK="2", NANODINO_PORT=str(29500 + os.getpid() % 400), OMP_NUM_THREADS="1",
                 NANODINO_OUT=str(tmp_path / "run"), PATH=f"{tmp_path}:{os.environ['PATH']}")  # fmt: skip
    how = dict(
        cwd=ROOT, env={**os.environ, **slurm}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return lambda *more: subprocess.Popen(["bash", "configs/slurm.sbatch", *SETTINGS, *more], **how)


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_requeues_itself_and_finishes(sbatch, tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    job, deadline = sbatch(), time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGTERM)  # Slurm signals the tasks: torchrun
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0 and "requeued 7" in out, out + err
    assert not (tmp_path / "run" / "result.json").exists()
    job = sbatch()
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0 and "done: " in out and "requeued" not in out, out + err
    steps = [r["step"] for r in map(json.loads, log.read_text().splitlines()) if "loss" in r]
    assert steps == list(range(1, 49)), "no gap, no duplicate"


@pytest.mark.slow
def test_a_job_that_cannot_start_is_not_requeued(sbatch):
    job = sbatch("train.dataset_path=folder:/nowhere")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1 and "requeued" not in out and "not requeued" in err and "/nowhere" in err
