"""The run folder: what a run leaves behind, and the guard that only one run writes there.

    runs/NAME/  config.yaml       the resolved settings: `python train.py --config runs/NAME/config.yaml`
                environment.json  versions, hardware, git commit and diff, command
                metrics.jsonl     one flat JSON object per logged step
                result.json       the final numbers
                lock              who is writing here now
                checkpoints/, teacher.pth (checkpoint.py), pictures

Exit codes of train.py: 0 done; 1 a mistake its user can mend; 70 internal error, or no finite loss; 75
stopped by a signal after a checkpoint, run me again. (torchrun itself returns 1 after SIGTERM: a finished run
is one that has a result.json.) What is unusual: files are replaced in one act, and a line that a crash tore
is mended. All ranks make a RunFolder, for the signals; only rank 0 writes.
"""

import json
import math
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from config import UserError
from distributed import from_first, rank, world_size

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None


class RunFolder:
    """Makes or reopens the folder `path`. Raises UserError if it belongs to another run, or cannot be
    written.

    Without `resume`, an existing folder must hold the same settings (`speed` apart); with it, differences are
    told.
    """

    def __init__(self, path, config_text, resume=False):
        self.path, self.stop_requested = Path(from_first(str(path))), False
        self.lock, self.metrics, self.handlers = None, None, {}
        problem = None
        if rank() == 0:
            try:
                self.open(config_text, resume)
            except OSError as e:
                problem = f"the run folder {path} cannot be written ({e}): choose another train.output_dir"
            except UserError as e:
                problem = str(e)
        problem = from_first(problem)
        if problem:
            self.close()
            raise UserError(problem)

    def open(self, config_text, resume):
        strangers = self.path.is_dir() and not (self.path / "config.yaml").exists()
        if strangers and any(p.name != "lock" and not p.name.startswith(".") for p in self.path.iterdir()):
            raise UserError(
                f"{self.path} has files but no config.yaml, so it is no run folder: choose another"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.take_lock()
        changed = differences(self.path / "config.yaml", config_text)
        if changed and not resume:
            raise UserError(f"{self.path} holds a run with other settings ({'; '.join(changed)}): "
                            f"add --resume to go on with yours, or choose another folder")  # fmt: skip
        if changed:
            print(f"note: the run goes on with other settings: {'; '.join(changed)}", file=sys.stderr)
        (self.path / "checkpoints").mkdir(exist_ok=True)
        replace(self.path / "config.yaml", config_text)
        replace(self.path / "environment.json", json.dumps(environment(), indent=1))
        self.metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def take_lock(self):
        """A lock of the operating system, which ends with its process however that dies; the pid is for
        people.

        So a file left by a dead run stops nobody, not even if its pid now belongs to another program. (lockf,
        not flock: data-loading workers don't inherit it, and NFS knows it.)
        """
        self.lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115
        try:
            if fcntl:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "another process"
            raise UserError(f"{self.path} is in use by {holder}: stop it, or choose another folder") from None
        self.lock.truncate(0)
        self.lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self.lock.flush()

    def log(self, row):
        """Append one flat dict, flushed; one-element tensors are fine, nan and inf become null (JSON has
        neither)."""
        if self.metrics:
            self.metrics.write(json.dumps({k: plain(v) for k, v in row.items()}) + "\n")
            self.metrics.flush()

    def rewind(self, step):
        """After a restore at `step`: drop the rows of later steps, which will come again, and what a crash
        tore."""
        if not self.metrics:
            return
        self.metrics.close()
        kept, torn = [], 0
        for line in (self.path / "metrics.jsonl").read_bytes().splitlines():
            try:
                row = json.loads(line)
                kept += [line.decode() + "\n"] if row.get("step", 0) <= step else []
            except (ValueError, AttributeError, TypeError):
                torn += 1
        replace(self.path / "metrics.jsonl", "".join(kept))
        if torn:
            print(f"note: {torn} torn line(s) removed from {self.path / 'metrics.jsonl'}", file=sys.stderr)
        self.metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def result(self, numbers):
        """Write result.json; that it exists means that the run is done."""
        if rank() == 0:
            numbers = {k: plain(v) for k, v in numbers.items()}
            replace(self.path / "result.json", json.dumps(numbers, indent=1))

    def watch_signals(self):
        """From now on SIGTERM, SIGUSR1 and SIGUSR2 (schedulers send them) only set `stop_requested` to their
        name.

        The loop asks distributed.agree(folder.stop_requested) after each step. Ctrl-C stays
        KeyboardInterrupt.
        """
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
            if number := getattr(signal, name, None):
                self.handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.stop_requested = signal.Signals(number).name

    def close(self):
        """Release the lock, close the files, give the signals back. The lock file stays: deleting it would
        race."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for file in filter(None, (self.metrics, self.lock)):
            file.close()
        self.handlers, self.metrics, self.lock = {}, None, None


def differences(path, config_text):
    """["optim.epochs: 10 there, 20 now", ...] between a saved config and this one; `speed` may differ
    freely."""
    if not path.exists():
        return []
    try:
        there, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(config_text)
        there, now = ({f"{s}.{k}": v for s, keys in c.items() for k, v in keys.items()} for c in (there, now))
    except (yaml.YAMLError, ValueError, AttributeError):
        return [f"{path} is unreadable"]
    keys = [k for k in {**there, **now} if there.get(k) != now.get(k) and not k.startswith("speed.")]
    return [f"{k}: {there.get(k)} there, {now.get(k)} now" for k in keys]


def plain(value):
    """A value as JSON can hold it."""
    if hasattr(value, "tolist"):  # tensors, numpy numbers
        value = value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(path, text):
    """Write a file in one act: a crash leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def environment():
    """Where and with what this run is made: a dict for environment.json."""
    import numpy
    import PIL

    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "cwd": os.getcwd(),
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "numpy": numpy.__version__, "pillow": PIL.__version__, "system": platform.platform(),
        "cpu": cpu[1] if cpu else platform.processor(), "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "processes": world_size(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git_commit": git("rev-parse", "HEAD").strip(), "git_diff": git("diff", "HEAD")[:200_000],
    }  # fmt: skip


def git(*command):
    """Output of git in the folder of this file; empty without git or outside a repository."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *command], cwd=here, capture_output=True, timeout=20)
        return done.stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
