"""Several runs of one command with different seeds -> one committed file of numbers, and a table to read.

    python results/collect.py results/laptop.json runs/laptop runs/laptop-2 runs/laptop-3

Writes every run's result.json with its seed, command, hardware and versions; prints mean, min and max of each
number.
"""

import json
import sys
from pathlib import Path

import yaml

FACTS = ("cpu", "cpu_cores", "threads", "gpus", "python", "torch", "numpy", "pillow", "git_commit")


def read_json(path):
    return json.loads(path.read_text())


def read_run(folder):
    """The seed of a run, how it was made, and its result."""
    environment = read_json(folder / "environment.json")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    arguments = environment["command"][1:]
    run = dict(seed=settings["train"]["seed"], command=" ".join(["python", *arguments]))
    for name in FACTS:
        run[name] = environment[name]
    run["result"] = read_json(folder / "result.json")
    return run


def main(out, folders):
    runs = [read_run(Path(folder)) for folder in folders]
    summary = {}
    for name in runs[0]["result"]:
        values = [run["result"][name] for run in runs]
        mean = sum(values) / len(values)
        summary[name] = dict(mean=mean, min=min(values), max=max(values))
    text = json.dumps(dict(summary=summary, runs=runs), indent=1)
    Path(out).write_text(text + "\n")
    seeds = [run["seed"] for run in runs]
    print(f"{out}: {len(runs)} runs, seeds {seeds}")
    for name, numbers in summary.items():
        columns = [f"{key} {value:10.3f}" for key, value in numbers.items()]
        print(f"{name:22s} " + "   ".join(columns))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
