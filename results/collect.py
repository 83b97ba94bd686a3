"""Several runs of one command with different seeds -> one committed file of numbers, and a table to read.

    python results/collect.py results/laptop.json runs/laptop runs/laptop-2 runs/laptop-3

Writes every run's result.json with its seed, command, hardware and versions; prints mean, min and max of each
number.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import config  # noqa: E402

FACTS = ("cpu", "cpu_cores", "threads", "gpus", "python", "torch", "numpy", "pillow", "git_commit")


def read_run(folder):
    """The seed of a run, how it was made, and its result, {name: number}. Raises UserError."""
    try:
        environment = config.parse_json((folder / "environment.json").read_bytes())
        arguments = environment["command"][1:]
        seed = config.load(folder / "config.yaml").train.seed
        run = dict(seed=seed, command=" ".join(["python", *arguments]))
        for name in FACTS:
            run[name] = environment[name]
        result = config.parse_json((folder / "result.json").read_bytes())
        run["result"] = {name: number + 0 for name, number in result.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise config.UserError(f"{folder} is not the folder of a finished run: {e!r}") from None
    return run


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("out", help="the file of numbers")
    parser.add_argument("folders", nargs="+", type=Path, help="the run folders")
    args = parser.parse_args()
    out = args.out
    runs = [read_run(folder) for folder in args.folders]
    summary = {}
    for name in runs[0]["result"]:
        values = [run["result"].get(name) for run in runs]
        if None in values:
            raise config.UserError(f"{name} is missing in a result: collect runs of one command")
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
    config.run(main)
