"""Several runs of one command with different seeds -> one committed file of numbers, and a table to read.

    python results/collect.py results/laptop.json runs/laptop runs/laptop-2 runs/laptop-3

Writes every run's result.json with its seed, command, hardware and versions; prints mean, min and max of each
number.
"""

import json
import sys
from pathlib import Path

import yaml


def main(out, folders):
    runs = []
    for folder in map(Path, folders):
        environment = json.loads((folder / "environment.json").read_text())
        seed = yaml.safe_load((folder / "config.yaml").read_text())["train"]["seed"]
        keep = ("cpu", "cpu_cores", "threads", "gpus", "python", "torch", "numpy", "pillow", "git_commit")
        about = dict(
            command=" ".join(["python", *environment["command"][1:]]), **{k: environment[k] for k in keep}
        )
        runs.append(dict(seed=seed, **about, result=json.loads((folder / "result.json").read_text())))
    numbers = {k: [r["result"][k] for r in runs] for k in runs[0]["result"]}
    summary = {k: dict(mean=sum(v) / len(v), min=min(v), max=max(v)) for k, v in numbers.items()}
    Path(out).write_text(json.dumps(dict(summary=summary, runs=runs), indent=1) + "\n")
    print(f"{out}: {len(runs)} runs, seeds {[r['seed'] for r in runs]}")
    for name, s in summary.items():
        print(f"{name:22s} mean {s['mean']:10.3f}   min {s['min']:10.3f}   max {s['max']:10.3f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
