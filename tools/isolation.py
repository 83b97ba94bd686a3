"""Process isolation: each benchmark in a forked process of its own.

A crash, a hang or an illegal address costs one measurement, and none inherits the GPU memory of another. A
fork is ready at once, because nothing is imported again. In return the parent must never touch CUDA: a
process that has done so cannot fork.
"""

import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from typing import IO, NamedTuple

import torch

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch.cuda.is_available() without starting CUDA
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the dry runs, on a CPU
TOO_LATE = "stopped: it took too long"


class Outcome(NamedTuple):
    """How a function ended."""

    failure: str  # why it failed, in one line; "" if it did not
    seconds: float
    value: object  # what it returned, passed on as JSON


class Child(NamedTuple):
    """A function that is running in a process of its own."""

    pid: int
    answer: IO  # a temporary file for its return value, or for the reason why it failed
    began: float


def run_isolated(functions, parallel=1, limit=600, own_group=False):
    """Call each of {name: function} in a process of its own -> {name: Outcome}, in the order they end.

    parallel: how many run at the same time; limit: seconds for each of them. With own_group, a function is
    stopped together with all processes that it has started.
    """
    waiting = list(functions)
    running = {}
    outcomes = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                name = waiting.pop(0)
                running[name] = start_child(functions[name], own_group)
            for name, child in list(running.items()):
                outcome = poll_child(child, limit)
                if outcome is not None:
                    outcomes[name] = outcome
                    del running[name]
            time.sleep(0.02)
    finally:
        for child in running.values():  # Ctrl-C does not reach a child with a group of its own
            kill_child(child)
    return outcomes


def start_child(function, own_group):
    sys.stdout.flush()
    sys.stderr.flush()
    answer = tempfile.TemporaryFile()  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
        run_child(function, answer, own_group)
    return Child(pid, answer, time.monotonic())


def run_child(function, answer, own_group):
    """The whole life of a child; never returns."""
    exit_code = 1
    try:
        gc.freeze()  # each CUDA graph begins with a gc.collect(), which can skip all that was imported
        if own_group:
            os.setsid()
        if INTERPRETED:
            torch.set_num_threads(1)  # a pool of threads does not survive the fork
        answer.write(json.dumps(function()).encode())
        answer.flush()  # a full disk is a failure too
        exit_code = 0
    except BaseException as e:  # SystemExit too: a script may end that way
        traceback.print_exc()
        answer.write(describe_error(e).encode())
    finally:
        try:
            for stream in (answer, sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(exit_code)


def poll_child(child, limit):
    """None while the child runs, then its Outcome. A child that has run for more than `limit` s is killed."""
    seconds = time.monotonic() - child.began
    ended, status = os.waitpid(child.pid, os.WNOHANG)
    if not ended and seconds <= limit:
        return None
    if not ended:
        kill_child(child)
        return Outcome(TOO_LATE, seconds, None)
    kill_group(child)  # what it has left running
    with child.answer:
        child.answer.seek(0)
        answer = child.answer.read().decode(errors="replace")
    exit_code = os.waitstatus_to_exitcode(status)
    if exit_code == 0:
        return Outcome("", seconds, json.loads(answer))
    return Outcome(answer or f"ended with code {exit_code}, without a word", seconds, None)


def kill_child(child):
    """Kill a child that is still running, and the group that it leads."""
    if not kill_group(child):
        os.kill(child.pid, signal.SIGKILL)
    os.waitpid(child.pid, 0)
    child.answer.close()


def kill_group(child):
    """Kill all processes of the child's own group -> whether there is one."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def describe_error(error):
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    first_line = lines[0][:160] if lines else ""
    return f"{type(error).__name__}: {first_line}"
