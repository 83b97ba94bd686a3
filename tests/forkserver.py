"""Runs that start at once: importing torch takes longer than they do, so they are forked from one process
that has imported everything."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

from helpers import child_environment

# Else torchrun keeps one store for all attempts: a second one finds the addresses of the first in it, and a
# node that comes back is never told where the others meet.
RUN_ENVIRONMENT = child_environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

# One line of JSON per run: code to execute first, its command line, the number of ranks, and their port.
SERVER = """
import json, os, sys, torch
import config, train
torch.set_num_threads(1)  # a pool of threads would not survive the fork
for line in sys.stdin:
    first, argv, ranks, port = json.loads(line)
    children = []
    for rank in range(ranks):
        children.append(os.fork())
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


class ForkServer:
    """One process that has imported everything: `start` forks a run from it, `wait` has its exit codes."""

    def __init__(self, log):
        self.log = log
        self.log_file = open(log, "w")  # noqa: SIM115
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log_file, text=True)
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=RUN_ENVIRONMENT, **pipes)

    def start(self, *argv, first="", ranks=1):
        """Fork `ranks` processes that execute `first` and then train.py with `argv` -> their pids."""
        request = [first, [*map(str, argv)], ranks, free_port()]
        self.log_size_before = len(self.log.read_text())
        print(json.dumps(request), file=self.server.stdin, flush=True)
        self.children = json.loads(self.server.stdout.readline())
        return self.children

    def output(self):
        """Everything that the last run has printed."""
        return self.log.read_text()[self.log_size_before :]

    def wait(self, limit=90):
        """The exit codes of the last run; after `limit` seconds it is killed."""
        timer = threading.Timer(limit, kill_all, [self.children])
        timer.start()
        codes = json.loads(self.server.stdout.readline())
        timer.cancel()
        return codes

    def run(self, *argv, first="", ranks=1):
        """A run that must succeed."""
        self.start(*argv, first=first, ranks=ranks)
        codes = self.wait()
        assert not any(codes), self.output()[-2000:]

    def close(self):
        self.server.communicate()
        self.log_file.close()


def kill_all(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
