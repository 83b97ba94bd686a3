"""Runs that start at once: importing torch takes longer than they do, so they are forked from one process
that has imported everything."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Else torchrun keeps one store for all attempts: a second one finds the addresses of the first in it, and a
# node that comes back is never told where the others meet.
AGENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **AGENT}

# A line of JSON is an order: code to run first, the command line of a run, how many ranks, and their port.
NURSERY = """
import json, os, sys, torch
import config, train
torch.set_num_threads(1)  # a pool of threads would not survive the fork
for line in sys.stdin:
    first, argv, ranks, port = json.loads(line)
    children = []
    for rank in range(ranks):
        children += [os.fork()]
        if not children[-1]:
            os.dup2(2, 1)
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                                  MASTER_ADDR="localhost", MASTER_PORT=str(port))
            exec(first)
            config.run(lambda: train.main(argv))
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]), flush=True)
"""


def kill_all(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Nursery:
    """One process that has imported everything; `start` forks a run from it, `end` waits for its codes."""

    def __init__(self, log):
        self.log, self.file = log, open(log, "w")  # noqa: SIM115
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.file, text=True)
        self.parent = subprocess.Popen([sys.executable, "-c", NURSERY], env=ENVIRONMENT, **pipes)

    def start(self, *argv, first="", ranks=1):
        order = [first, [*map(str, argv)], ranks, free_port()]
        self.before = len(self.log.read_text())
        print(json.dumps(order), file=self.parent.stdin, flush=True)
        self.children = json.loads(self.parent.stdout.readline())
        return self.children

    def said(self):
        """What the last run has printed."""
        return self.log.read_text()[self.before :]

    def end(self, limit=90):
        patience = threading.Timer(limit, kill_all, [self.children])
        patience.start()
        codes = json.loads(self.parent.stdout.readline())
        patience.cancel()
        return codes

    def run(self, *argv, **how):
        self.start(*argv, **how)
        codes = self.end()
        assert not any(codes), self.said()[-2000:]

    def close(self):
        self.parent.communicate()
        self.file.close()


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
