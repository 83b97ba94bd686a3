"""The run folder: what a run leaves behind, and the guard that only one run writes there.

    runs/NAME/  config.yaml       the resolved settings: `python train.py --config runs/NAME/config.yaml`
                environment.json  versions, hardware, git commit and diff, command
                metrics.jsonl     one flat JSON object per logged step
                result.json       the final numbers; they say that a run is done (torchrun turns 75 into 1)
                lock              who is writing here now
                checkpoints/, teacher.pth (checkpoint.py), pictures

Files are replaced in one act; a line that a crash tore is mended. Exit codes of train.py: 0 done; 1 an error;
70 no finite loss; 75 saved and stopped by a signal, run me again; 130 Ctrl-C.
"""

import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
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
    """The folder `path`, made or reopened. All ranks make one, for the signals; only rank 0 writes.

    An existing folder must hold the same settings, `speed` apart; with `resume`, differences are told.
    Raises UserError if the folder is in use, belongs to another run, or cannot be written.
    """

    def __init__(self, path, config_text, resume=False, facts=None):
        self.path, self.stop_requested = Path(from_first(str(path))), False
        self.facts = facts or {}  # for environment.json
        self.lock, self.handlers, problem = None, {}, None
        if rank() == 0:
            try:
                self.open(config_text, resume)
            except UserError as e:
                problem = str(e)
            except OSError as e:
                problem = f"the run folder {path} cannot be written ({e}): choose another train.output_dir"
        if problem := from_first(problem):
            self.close()
            raise UserError(problem)

    def open(self, config_text, resume):
        config, strangers = self.path / "config.yaml", self.path.glob("[!.]*")
        if not config.exists() and any(p.name != "lock" for p in strangers):
            raise UserError(f"{self.path} has files but no config.yaml, so is no run folder: choose another")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = take_lock(self.path)
        changed = "; ".join(differences(config, config_text)) if config.exists() else ""
        if config.exists() and not resume:
            other = f" with other settings ({changed})" if changed else ""
            raise UserError(f"{self.path} holds a run{other}: add --resume to go on, or choose another")
        if changed:
            print(f"note: the run goes on with other settings: {changed}", file=sys.stderr)
        replace(config, config_text)
        replace(self.path / "environment.json", json.dumps(environment() | self.facts, indent=1))
        (self.path / "checkpoints").mkdir(exist_ok=True)

    def write_config(self, text):
        """The settings have changed on the way (--max-minutes): config.yaml must say what was run."""
        if rank() == 0:
            replace(self.path / "config.yaml", text)

    def log(self, row):
        """Append one flat dict to metrics.jsonl."""
        if rank() > 0:
            return
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(as_json(row) + "\n")
        except OSError as e:
            raise UserError(
                f"no room for {self.path}/metrics.jsonl ({e}): make some, then --resume"
            ) from None

    def rewind(self, step):
        """Drop the rows of steps after `step`, which will come again, any torn line, and old results."""
        if rank() == 0:
            (self.path / "result.json").unlink(missing_ok=True)
            mend(self.path / "metrics.jsonl", step)
        mend(self.path / f"bad_images_rank{rank()}.jsonl", step)

    def result(self, numbers):
        """Write result.json: the run is done."""
        if rank() == 0:
            replace(self.path / "result.json", as_json(numbers, indent=1))

    def watch_signals(self):
        """From now on the signals that schedulers send only set `stop_requested` to their name."""
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):  # not SIGINT: Ctrl-C stays as it was
            if number := getattr(signal, name, None):
                self.handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.stop_requested = signal.Signals(number).name

    def close(self):
        """Give the signals back and release the lock. Its file stays: deleting it would race."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()


def take_lock(folder):
    """folder/lock, open and locked by the operating system: it ends with its process, so a dead run's file
    stops nobody. UserError if another process has it."""
    lock = (folder / "lock").open("a+", encoding="utf-8")
    try:
        if fcntl:  # lockf, not flock: data-loading workers don't inherit it, and NFS knows it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise UserError(f"{folder} is in use by {holder}: stop it, or choose another folder") from None
    except OSError as e:  # some network file systems have no locks
        print(f"note: no lock on {folder} ({e}): see that only one run writes there", file=sys.stderr)
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {platform.node()}\n")
    lock.flush()
    return lock


def mend(file, step):
    """Keep the whole lines of a .jsonl file up to `step`."""
    kept, torn = [], 0
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            kept += [line.decode() + "\n"] if json.loads(line).get("step", 0) <= step else []
        except (ValueError, AttributeError, TypeError):
            torn += 1
    if file.exists():
        replace(file, "".join(kept))
    if torn:
        print(f"note: {torn} torn line(s) removed from {file}", file=sys.stderr)


def differences(path, config_text):
    """["optim.epochs: 10 there, 20 now", ...] between a saved config and this one, `speed` apart."""
    try:
        configs = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(config_text)
        there, now = ({f"{s}.{k}": v for s in c for k, v in c[s].items()} for c in configs)
    except (yaml.YAMLError, ValueError, AttributeError, TypeError):
        return [f"{path} is unreadable"]
    keys = [k for k in {**there, **now} if there.get(k) != now.get(k) and not k.startswith("speed.")]
    return [f"{k}: {there.get(k)} there, {now.get(k)} now" for k in keys]


def as_json(row, indent=None):
    """A flat dict as text. Tensors of one number are fine; nan and inf become null (JSON has neither)."""
    row = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()}
    bad = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(row | bad, indent=indent)


@contextmanager
def in_one_act(path, mark=""):
    """`with in_one_act(path) as f`: a file that gets its name when it is complete and on the disk, or never.

    What a killed process left is overwritten by the next. Two at a time need a `mark` each.
    """
    partial = path.with_name(f".{path.name}{mark}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace(path, text):
    """Write a text in one act: a crash leaves the old one or the new one."""
    with in_one_act(path) as f:
        f.write(text.encode())


def environment():
    """Where and with what this run is made: a dict for environment.json."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": [sys.executable, *sys.argv],
        "system": platform.platform(), "python": platform.python_version(), "numpy": version("numpy"),
        "pillow": version("pillow"), "torch": torch.__version__, "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": cpu[1] if cpu else platform.processor(), "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "processes": world_size(),
        "git_commit": git("rev-parse", "HEAD").strip(), "git_diff": git("diff", "HEAD")[:200_000],
    }  # fmt: skip


def git(*command):
    """Output of git in the folder of this file; empty without git or outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *command]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
