"""Where a training step goes: `python train.py --profile` times its parts, and writes a trace.

    where a step goes
    data wait             12.3 ms    4.1%
    teacher forward       40.1 ms   13.4%     ...

What is unusual: on a GPU the host runs ahead, so a clock on the host would show when work was ordered, not
when it was done. Each part is marked in the GPU's own queue instead. "data wait" is then the time in which
the GPU had nothing to do because the next batch was not there, and "the rest" what belongs to no part.

Expect profile.txt (this table: the mean of five steps) and trace.json (two more steps, operator by operator,
for ui.perfetto.dev) in the run folder. The run goes on afterwards.
"""

import time

import torch

WARM, TIMED, TRACED = 3, 5, 2  # steps


class Profile:
    """Listens to the parts of train.py's steps through the dict `parts`, empty when nobody listens."""

    def __init__(self, parts, folder, device):
        self.parts, self.folder, self.cuda = parts, folder, device.type == "cuda"
        self.steps, self.trace = 0, None

    def moment(self):
        """Now; on a GPU, a mark in its queue."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin, end):
        return begin.elapsed_time(end) if self.cuda else 1e3 * (end - begin)

    def step_done(self):
        """Called after every step: after some of them something begins or ends."""
        self.steps += 1
        if self.steps == WARM:
            self.parts.update(moment=self.moment, times={}, began=self.moment())
        elif self.steps == WARM + TIMED:
            text = self.table(self.moment())
            self.parts.clear()
            print(text)
            (self.folder / "profile.txt").write_text(text + "\n")
            self.trace = torch.profiler.profile()
            self.trace.start()
        elif self.steps == WARM + TIMED + TRACED:
            self.trace.stop()
            self.trace.export_chrome_trace(str(self.folder / "trace.json"))
            print(f"wrote profile.txt and trace.json to {self.folder}")

    def close(self):
        """The run has ended, perhaps too soon."""
        if self.steps < WARM + TIMED + TRACED:
            print(f"--profile needs {WARM + TIMED + TRACED} steps, this run took {self.steps}")
            self.parts.clear()
            if self.trace:
                self.trace.stop()

    def means(self, ended):
        """-> mean milliseconds of each part of the TIMED steps, and of a whole step."""
        if self.cuda:
            torch.cuda.synchronize()
        whole = self.milliseconds(self.parts["began"], ended) / TIMED
        rows = {name: sum(self.milliseconds(*pair) for pair in pairs) / TIMED
                for name, pairs in self.parts["times"].items()}  # fmt: skip
        return rows, whole

    def table(self, ended):
        """-> the lines of the table, mean milliseconds and shares of a step."""
        rows, whole = self.means(ended)
        rows["the rest"] = whole - sum(rows.values())
        lines = [f"{name:16s}{ms:12.1f} ms{ms / whole:8.1%}" for name, ms in rows.items()]
        return "\n".join(["where a step goes", *lines, f"{'a step':16s}{whole:12.1f} ms"])
