"""The collectives: no-ops when alone, and what they promise between two processes."""

import subprocess

import pytest
import torch
from helpers import TWO_RANKS, child_environment, torchrun

import distributed
from config import UserError


def test_alone_everything_is_a_no_op():
    assert distributed.setup("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert distributed.rank() == 0
    assert distributed.world_size() == 1
    tensor = torch.ones(3)
    assert distributed.all_reduce(tensor) is tensor
    assert distributed.all_reduce(tensor, "max").sum() == 3
    assert distributed.all_reduce_ints(3, True, False) == [3, 1, 0]
    assert distributed.broadcast_object("x") == "x"
    distributed.cleanup()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence():
    assert distributed.setup("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="speed.device"):
        distributed.setup("cuda")


ON_EACH_RANK = """
import os, signal, sys, time, torch, config, distributed, runfolder

def main():
    distributed.setup("cpu")
    rank = distributed.rank()
    assert distributed.world_size() == 2
    assert distributed.all_reduce(torch.tensor([1.0 + rank])).item() == 3
    assert distributed.all_reduce(torch.tensor([1.0 + rank]), "max").item() == 2
    assert distributed.all_reduce_ints(2, rank == 1, False) == [4, 1, 0]
    assert distributed.broadcast_object(f"rank {rank}") == "rank 0"
    # names chosen on each rank may differ: rank 0's counts
    run = runfolder.RunFolder(f"{sys.argv[1]}/run{rank}", config.Config().to_yaml())
    assert run.path.name == "run0"
    run.install_signal_handlers()
    run.log({"step": rank})
    if rank == 1:  # one rank is told to stop, all know
        os.kill(os.getpid(), signal.SIGTERM)
    assert distributed.all_reduce_ints(bool(run.stop_requested)) == [1]
    run.close()
    try:
        runfolder.RunFolder(sys.argv[1], "")  # has a stranger in it: all ranks refuse, none waits
        return 70
    except config.UserError:
        distributed.cleanup()
        return 0

config.run(main)
"""


def test_two_processes(tmp_path):
    (tmp_path / "two.py").write_text(ON_EACH_RANK)
    command = [*torchrun(*TWO_RANKS), str(tmp_path / "two.py"), str(tmp_path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run1").exists()
    assert (tmp_path / "run0" / "metrics.jsonl").read_text() == '{"step": 0}\n'
