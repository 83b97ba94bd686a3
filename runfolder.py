"""The run folder: what a run leaves behind, the guard that only one run writes there, and the console.

    runs/NAME/  config.yaml       the resolved settings: `python train.py --config runs/NAME/config.yaml`
                environment.json  versions, hardware, git commit and diff, command
                metrics.jsonl     one flat JSON object per logged step
                result.json       the final numbers; it exists when a run is done (torchrun turns 75 into 1)
                profile.txt, trace.json  where the time of a step goes, with --profile
                lock              the process that is writing here now
                checkpoints/, teacher.pth (checkpoint.py), pictures
                config.before-step_00001234.yaml, and such an environment: of the steps up to 1234, if a
                resumed run has gone on from there

Files are replaced atomically; a line that a crash tore is removed. Exit codes of train.py: 0 done; 1 an
error; 70 no finite loss; 75 saved and stopped by a signal, run me again; 130 saved and stopped by Ctrl-C.
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
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch.profiler import record_function
from tqdm import tqdm

from config import UserError, parse_json, parse_yaml
from distributed import all_reduce, broadcast_object, rank, world_size
from losses import collapse_warning

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None


class RunFolder:
    """The folder `path`, created or reopened. All ranks make one, for the signals; only rank 0 writes.

    An existing folder must hold the same settings, `speed` apart; with `resume`, differences are printed.
    Nothing in it changes before `start`: a checkpoint that does not fit is found out first. Raises UserError
    if the folder is in use, belongs to another run, or cannot be written.
    """

    def __init__(self, path, config_text, resume=False, facts=None):
        self.path = Path(broadcast_object(str(path)))
        self.config_text = config_text
        self.facts = facts or {}  # for environment.json
        self.changed = ""  # settings that differ from those in an existing folder
        self.stop_requested = False  # or the name of a signal
        self.handlers = {}
        self.pid = os.getpid()
        self.lock = None
        problem = None
        if rank() == 0:
            try:
                self.open(resume)
            except UserError as e:
                problem = str(e)
            except OSError as e:
                problem = f"the run folder {path} cannot be written ({e}): choose another train.output_dir"
        problem = broadcast_object(problem)
        if problem:
            self.close()
            raise UserError(problem)

    def open(self, resume):
        config = self.path / "config.yaml"
        if not config.exists() and any(p.name != "lock" for p in self.path.glob("[!.]*")):
            raise UserError(f"{self.path} has files but no config.yaml, so is no run folder: choose another")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = acquire_lock(self.path)
        if config.exists():
            self.changed = "; ".join(config_differences(config, self.config_text))
        if config.exists() and not resume:
            other = f" with other settings ({self.changed})" if self.changed else ""
            raise UserError(f"{self.path} holds a run{other}: add --resume to go on, or choose another")

    def start(self, step, trains=True):
        """The run goes on from `step`. Rows of later steps, torn lines and old results are dropped.

        If it trains, its settings are written, and the earlier ones kept under another name.
        """
        if rank() == 0 and trains:
            if self.changed:
                print(f"note: the run continues with other settings: {self.changed}", file=sys.stderr)
            facts = json.dumps(environment() | self.facts, indent=1)
            for name, text in {"config.yaml": self.config_text, "environment.json": facts}.items():
                file = self.path / name
                earlier = file.with_name(f"{file.stem}.before-step_{step:08d}{file.suffix}")
                if file.exists() and file.read_bytes() != text.encode() and not earlier.exists():
                    with atomic_open(earlier) as f:
                        f.write(file.read_bytes())
                atomic_write_text(file, text)
        if rank() == 0:
            (self.path / "checkpoints").mkdir(exist_ok=True)
            (self.path / "result.json").unlink(missing_ok=True)
            repair_jsonl(self.path / "metrics.jsonl", step)
        repair_jsonl(self.path / f"bad_images_rank{rank()}.jsonl", step)

    def check_exists(self):
        """Before rank 0 writes: UserError if the lock has gone, or the folder with it, or is another's."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.path / "lock")):
                return
        raise UserError(f"the run folder {self.path} or its lock was deleted or moved while it was in use: "
                        f"start again, or resume from where it is now")  # fmt: skip

    def write_config(self, text):
        """The settings have changed during the run (--max-minutes): config.yaml must hold those that ran."""
        if rank() == 0:
            self.check_exists()
            atomic_write_text(self.path / "config.yaml", text)

    def log(self, row):
        """Append one flat dict to metrics.jsonl."""
        if rank() > 0:
            return
        self.check_exists()
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(to_json(row) + "\n")
        except OSError as e:
            message = f"no room for {self.path}/metrics.jsonl ({e}): make some, then --resume"
            raise UserError(message) from None

    def write_result(self, numbers):
        """Write result.json: the run is done."""
        if rank() == 0:
            self.check_exists()
            atomic_write_text(self.path / "result.json", to_json(numbers, indent=1))

    def install_signal_handlers(self):
        """From now on a scheduler's signals, a closed terminal and Ctrl-C set `stop_requested` to their name.

        A second Ctrl-C ends the process at once. What nohup or a shell's `&` has set to be ignored stays so.
        """
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT"):
            number = getattr(signal, name, None)  # Windows lacks three of them
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if os.getpid() != self.pid:
            return  # a data-loading worker, which ends with the run
        self.stop_requested = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            if rank() == 0:  # print could be busy
                with suppress(OSError):
                    os.write(2, b"\nsaving and stopping after this step; Ctrl-C again ends at once\n")
        if self.stop_requested == "SIGHUP":
            silence_dead_terminal()

    def allow_ctrl_c(self):
        """All is saved: from now on Ctrl-C ends the process, as it did before."""
        if signal.SIGINT in self.handlers:
            signal.signal(signal.SIGINT, self.handlers[signal.SIGINT])

    def close(self):
        """Restore the signal handlers and release the lock. Its file stays: deleting it would race."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()


def silence_dead_terminal():
    """What is printed after the terminal has gone is dropped: it would be an OSError before the last save."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def acquire_lock(folder):
    """folder/lock, open and locked by the operating system until the process ends: no lock outlives its run.

    Raises UserError if another process has it.
    """
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
        print(f"note: no lock on {folder} ({e}): make sure that only one run writes there", file=sys.stderr)
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {platform.node()}\n")
    lock.flush()
    return lock


def repair_jsonl(file, step):
    """Keep the whole lines of a .jsonl file up to `step`."""
    if not file.exists():
        return
    kept = []
    torn = 0
    for line in file.read_bytes().splitlines():
        try:
            if parse_json(line).get("step", 0) <= step:
                kept.append(line.decode() + "\n")
        except (ValueError, AttributeError, TypeError):
            torn += 1
    atomic_write_text(file, "".join(kept))
    if torn:
        print(f"note: {torn} torn line(s) removed from {file}", file=sys.stderr)


def config_differences(path, config_text):
    """["optim.epochs: 10 there, 20 now", ...] between a saved config and this one, `speed` apart."""
    try:
        there = flat_settings(path.read_text(encoding="utf-8"))
    except (ValueError, AttributeError, TypeError):
        return [f"{path} is unreadable"]
    now = flat_settings(config_text)
    changed = []
    for key in there | now:
        if there.get(key) != now.get(key) and not key.startswith("speed."):
            changed.append(f"{key}: {there.get(key)} there, {now.get(key)} now")
    return changed


def flat_settings(text):
    """A config.yaml -> {"section.key": value}."""
    settings = {}
    for section, keys in parse_yaml(text).items():
        for key, value in keys.items():
            settings[f"{section}.{key}"] = value
    return settings


def to_json(row, indent=None):
    """A flat dict as text. Tensors of one number are fine; nan and inf become null (JSON has neither)."""
    plain = {}
    for key, value in row.items():
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        plain[key] = value
    return json.dumps(plain, indent=indent)


# ---------------------------------------------------------------- files, written atomically


@contextmanager
def atomic_open(path, mark=""):
    """`with atomic_open(path) as f`: a binary file that appears complete and on the disk, or not at all.

    The leftovers of a killed process are overwritten by the next. Two writers at a time need a `mark` each.
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


def atomic_write_text(path, text):
    """Replace a text file: a crash leaves the old one or the new one."""
    with atomic_open(path) as f:
        f.write(text.encode())


def environment():
    """Machine, versions, command and commit of this run: a dict for environment.json."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": [sys.executable, *sys.argv],
        "system": platform.platform(), "python": platform.python_version(), "numpy": version("numpy"),
        "pillow": version("pillow"), "torch": torch.__version__, "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": cpu[1] if cpu else platform.processor(), "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "processes": world_size(),
        "git_commit": run_git("rev-parse", "HEAD").strip(), "git_diff": run_git("diff", "HEAD")[:200_000],
    }  # fmt: skip


def run_git(*command):
    """Output of git in the folder of this file; empty without git or outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *command]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""


# ---------------------------------------------------------------- the console


class TrainLogger:
    """The progress of a run: a bar or lines, metrics.jsonl, bad images, skipped steps, collapse."""

    def __init__(self, run, cfg, state, steps, resumed, writer):
        self.run = run
        self.cfg = cfg
        self.steps = steps
        self.writer = writer
        self.images_per_step = cfg.train.batch_size_per_gpu * cfg.train.accumulate * world_size()
        # Seconds and images of training alone, bad images of all ranks: they go on where the run was left.
        self.seconds = resumed.get("seconds", 0)
        self.images = resumed.get("images", 0)
        self.num_bad_images = resumed.get("bad", 0)
        self.clock = time.monotonic()
        self.skipped_flags = []  # of the steps since they were last read, on the device
        self.skipped_in_a_row = 0
        self.collapsed_in_a_row = 0
        self.warned = False
        self.knn = None
        self.checkpoint_seconds = None  # for which the last save has held up the training, until logged
        terminal = sys.stderr.isatty()
        show_bar = rank() == 0 and terminal
        self.bar = tqdm(total=steps, initial=state.step, disable=not show_bar, dynamic_ncols=True)
        self.print_lines = rank() == 0 and not terminal

    def set_total(self, steps):
        self.steps = steps
        self.bar.total = steps

    def restart_clock(self):
        """After something that is no training: its time does not count."""
        self.clock = time.monotonic()

    def count_images(self, bad_images, num_bad, step):
        """Record this rank's unreadable images (`num_bad` on all ranks). UserError if there are too many."""
        if bad_images:
            with open(self.run.path / f"bad_images_rank{rank()}.jsonl", "a") as f:
                for path, reason in bad_images:
                    f.write(json.dumps(dict(step=step + 1, path=str(path), reason=reason)) + "\n")
        self.num_bad_images += num_bad
        self.images += self.images_per_step
        limit = self.cfg.train.max_bad_images
        if self.num_bad_images > limit * max(self.images, 1000):
            self.writer.wait()  # the checkpoint being saved is still good
            file = self.run.path / "bad_images_rank*.jsonl"
            raise UserError(f"{self.num_bad_images} of {self.images} images are unreadable, over "
                            f"train.max_bad_images ({limit:.2%}): mend or remove those in {file}, "
                            f"or raise the limit")  # fmt: skip

    def step_done(self, skipped):
        self.skipped_flags.append(skipped)
        self.bar.update()

    def log(self, metrics, schedules, state):
        """A line in metrics.jsonl, the numbers on the bar. Only here the host waits for the device."""
        self.check_skipped_steps(state)
        means = {}
        for name, value in metrics.items():
            means[name] = all_reduce(value.float().clone()).item() / world_size()
        self.add_time()
        rate = self.images / max(self.seconds, 1e-9)
        row = dict(step=state.step, **means, **schedules, images_per_second=round(rate, 1))
        if self.checkpoint_seconds is not None:
            row["checkpoint_seconds"] = round(self.checkpoint_seconds, 3)
            self.checkpoint_seconds = None
        if torch.cuda.is_available():
            row["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.run.log(row)
        shown = dict(
            loss=f"{row['loss']:.3f}",
            H=f"{row['entropy']:.2f}",
            Hm=f"{row['entropy_mean']:.2f}",
            rank=f"{row['rank']:.0f}",
            knn="-" if self.knn is None else f"{self.knn:.3f}",
            img_s=f"{rate:.0f}",
        )
        self.bar.set_postfix(shown)
        if self.print_lines:
            line = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {state.step:6d}  {line}", flush=True)
        self.warn_of_collapse(row)

    def add_time(self):
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now

    def log_knn(self, accuracy, step):
        """accuracy: None on the ranks that do not evaluate."""
        self.knn = accuracy
        if accuracy is not None:
            self.run.log(dict(step=step, knn_top1=accuracy))

    def warn_of_collapse(self, row):
        """Once, after three rows in a row: a moment is no collapse, and every run starts uniform."""
        warning = collapse_warning(row["entropy"], row["entropy_mean"])
        warming_up = row["step"] < max(50, 0.05 * self.steps)
        if warning and "uniform" in warning and warming_up:
            warning = None
        self.collapsed_in_a_row = self.collapsed_in_a_row + 1 if warning else 0
        if self.collapsed_in_a_row == 3 and not self.warned:
            self.warned = True
            self.run.log(dict(step=row["step"], warning=warning))
            if rank() == 0:
                tqdm.write(f"warning: step {row['step']}: {warning}", file=sys.stderr)

    def check_skipped_steps(self, state):
        """Log the images of skipped steps; exit with code 70 after too many in a row.

        In fp16 a few are normal: the loss scale finds its size.
        """
        flags = [bool(flag) for flag in self.skipped_flags]
        self.skipped_flags = []
        limit = self.cfg.train.max_nan + (20 if state.scaler.is_enabled() else 0)
        for step, skipped in enumerate(flags, state.step - len(flags)):
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            if skipped:
                first = self.images_per_step * step
                samples = [first, first + self.images_per_step - 1]
                self.run.log(dict(step=step + 1, skipped_samples=samples))
            if self.skipped_in_a_row > limit:
                if rank() == 0:
                    message = (f"error: no finite loss and gradient in {self.skipped_in_a_row} steps in "
                               f"a row (see metrics.jsonl): lower optim.base_lr, or take "
                               f"compute_precision.dtype=fp32")  # fmt: skip
                    print(message, file=sys.stderr)
                self.writer.wait()
                sys.exit(70)

    def close(self, state, trained):
        self.bar.close()
        if trained:
            if rank() == 0:
                self.run.check_exists()
            self.check_skipped_steps(state)
            self.add_time()

    def totals(self, state):
        """The part of result.json that every run has."""
        return dict(
            steps=state.step,
            train_seconds=round(self.seconds, 1),
            images_per_second=round(self.images / max(self.seconds, 1e-9), 1),
            bad_images=self.num_bad_images,
        )


def results_table(result):
    """result.json as the last lines on the console."""
    lines = []
    for title, *keys in RESULT_ROWS:
        if keys[0] in result:
            lines.append(f"{title:16s}" + "".join(f"{result[key]:>13.3f}" for key in keys))
    if lines:
        header = ("trained", "random init", "raw pixels", "chance")
        lines.insert(0, " " * 16 + "".join(f"{column:>13s}" for column in header))
    steps = "{steps} steps in {train_seconds:.0f} s, {images_per_second:.0f} images/s".format(**result)
    return "\n".join([*lines, steps])


RESULT_ROWS = (
    ("k-NN top-1", "knn_top1", "knn_random_init", "knn_pixels", "chance"),
    ("foreground mIoU", "fg_miou", "fg_miou_random_init"),
)


# ---------------------------------------------------------------- where a step goes: --profile

PROFILE = None  # the StepProfile that is measuring, if any


@contextmanager
def profile_section(name):
    """A named stretch of a step: in every trace, and in the table of --profile."""
    with record_function(name):
        begin = PROFILE.mark() if PROFILE else None
        yield
        if begin and PROFILE:
            PROFILE.sections.setdefault(name, []).append((begin, PROFILE.mark()))


class StepProfile:
    """`--profile`: a table of where a step goes (the mean of 5 steps), then a trace of 2 more, by operator.

    On a GPU the host runs ahead, so a clock on the host would show when work was ordered, not when it was
    done. Each section is marked in the GPU's own queue instead. "data wait" is then the time in which the GPU
    had nothing to do because the next batch was not there; "the rest" belongs to no section.
    """

    WARM_UP = 3  # steps
    TIMED = 5
    TRACED = 2

    def __init__(self, folder, device, enabled=True):
        self.folder = folder
        self.cuda = device.type == "cuda"
        self.enabled = enabled
        self.steps = 0
        self.sections = {}
        self.trace = None

    def mark(self):
        """Now; on a GPU, a mark in its queue."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin, end):
        return begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin)

    def begin(self):
        global PROFILE
        PROFILE = self
        self.sections = {}
        self.began = self.mark()

    def end(self):
        """-> mean milliseconds of each section over the TIMED steps, and of a whole step."""
        global PROFILE
        PROFILE = None
        ended = self.mark()
        if self.cuda:
            torch.cuda.synchronize()
        whole = self.milliseconds(self.began, ended) / self.TIMED
        means = {}
        for name, pairs in self.sections.items():
            means[name] = sum(self.milliseconds(*pair) for pair in pairs) / self.TIMED
        return means, whole

    def step_done(self):
        """Called after every step: after some of them something begins or ends."""
        if not self.enabled:
            return
        self.steps += 1
        if self.steps == self.WARM_UP:
            self.begin()
        elif self.steps == self.WARM_UP + self.TIMED:
            text = profile_table(*self.end())
            print(text)
            (self.folder / "profile.txt").write_text(text + "\n")
            self.trace = torch.profiler.profile()
            self.trace.start()
        elif self.steps == self.WARM_UP + self.TIMED + self.TRACED:
            self.trace.stop()
            self.trace.export_chrome_trace(str(self.folder / "trace.json"))
            print(f"wrote profile.txt and trace.json (for ui.perfetto.dev) to {self.folder}")

    def close(self):
        """The run has ended, perhaps too soon."""
        global PROFILE
        needed = self.WARM_UP + self.TIMED + self.TRACED
        if self.enabled and self.steps < needed:
            print(f"--profile needs {needed} steps, this run took {self.steps}")
            PROFILE = None
            if self.trace:
                self.trace.stop()


def profile_table(means, whole):
    """Mean milliseconds of the sections and of a step -> the lines of the table."""
    rows = dict(means)
    rows["the rest"] = whole - sum(means.values())
    lines = [f"{name:16s}{ms:12.1f} ms{ms / whole:8.1%}" for name, ms in rows.items()]
    return "\n".join(["where a step goes", *lines, f"{'a step':16s}{whole:12.1f} ms"])
