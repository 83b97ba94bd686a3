#!/usr/bin/env bash
# The race: the best k-NN in a given time. The rules, and the table of those who ran, are in labs/speedrun.md.
#
#   labs/speedrun.sh                          laptop: scenes, two cores, 300 s of training, three seeds
#   labs/speedrun.sh optim.base_lr=6e-3       the same with settings of your own, or with your own code
#   labs/speedrun.sh gpu DATA                 CIFAR-10 (DATA/train, DATA/test), one GPU, 600 s
#   labs/speedrun.sh check results/race/NAME  does this log keep the rules? (the others end with it)
#
# SEEDS="0" runs one seed, to try. Each run's result.json, environment.json, config.yaml and metrics.jsonl are
# copied to results/race/NAME (RACE=NAME, or the date), and the row for the table is printed. Exits with 1 if a
# seed is below the target, takes too long, or breaks the rules.
set -euo pipefail
argument=${2:-}
if [ -d "$argument" ]; then argument=$(cd "$argument" && pwd); fi # relative to where you are
cd "$(dirname "$0")/.."

# check FOLDER: holds every seed in it to the rules of its race -> the row, or what is wrong
check() {
    python - "$1" <<'PYTHON'
import json
import sys
from pathlib import Path
from typing import NamedTuple

import yaml


class Race(NamedTuple):
    target: float  # k-NN at least
    limit: int  # seconds of training at most


class Run(NamedTuple):
    race: str
    seed: str
    result: dict
    environment: dict
    cfg: dict


RACES = {"laptop": Race(0.82, 300), "gpu": Race(0.551, 600)}
TRAIN_SCENES = "scenes:3000:seed=11"
TEST_SCENES = "scenes:1000:seed=12"
FILES = ("result.json", "environment.json", "config.yaml", "metrics.jsonl")


def read_run(folder):
    race, seed = folder.name.split("-seed-")
    result = json.loads((folder / "result.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    return Run(race, seed, result, environment, cfg)


def uses_data_of_race(run):
    trained_on = run.cfg["train"]["dataset_path"]
    train_path = run.cfg["evaluation"]["train_path"]
    test_path = run.cfg["evaluation"]["test_path"]
    if run.race == "gpu":
        names = (Path(train_path).name, Path(test_path).name)
        return names == ("train", "test") and trained_on == train_path
    kind, *options = trained_on.split(":")
    if kind != "scenes" or "seed=11" in options or "seed=12" in options:
        return False
    return (train_path, test_path) == (TRAIN_SCENES, TEST_SCENES)


def uses_hardware_of_race(run):
    device = run.cfg["speed"]["device"]
    if run.race == "gpu":
        return device == "cuda" and run.environment["processes"] == 1
    threads = run.environment["threads"] + run.cfg["train"]["num_workers"]
    return threads <= 2 and (device == "cpu" or not run.environment["gpus"])


def broken_rules(run):
    race = RACES[run.race]
    knn = run.result["knn_top1"]
    seconds = run.result["train_seconds"]
    train = run.cfg["train"]
    rules = {
        f"k-NN {knn:.3f}, target {race.target}": knn >= race.target,
        f"{seconds:.0f} s of training, at most {race.limit}": seconds <= race.limit,
        "other data than the race's": uses_data_of_race(run),
        "other hardware than the race's": uses_hardware_of_race(run),
        "weights from elsewhere": not train["init_from"] and not train["distill_from"],
        f"its seed is {train['seed']}": str(train["seed"]) == run.seed,
    }
    return [f"{run.race}-seed-{run.seed}: {rule}" for rule, kept in rules.items() if not kept]


out = Path(sys.argv[1])
folders = []
for race in RACES:
    folders += sorted(out.glob(f"{race}-seed-*"))
if not folders:
    sys.exit(f"error: {out} holds no run of a race: it must have folders laptop-seed-0 or gpu-seed-0")
try:
    runs = [read_run(folder) for folder in folders]
    broken = [rule for run in runs for rule in broken_rules(run)]
    scores = [run.result["knn_top1"] for run in runs]
    slowest = max(run.result["train_seconds"] for run in runs)
    environment = runs[0].environment
    commit = environment["git_commit"][:9] + ("+" if environment["git_diff"] else "")
    machine = environment["cpu"] if runs[0].race == "laptop" else environment["gpus"][0]
except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
    sys.exit(f"error: {out} is no log of a race ({e!r}): copy {', '.join(FILES)} of each run")
if [folder.name for folder in folders] != [f"{runs[0].race}-seed-{seed}" for seed in range(3)]:
    broken.append("the race takes three runs, with seeds 0, 1 and 2")
knn = f"{sum(scores) / len(scores):.3f} ({min(scores):.3f}-{max(scores):.3f})"
if broken:
    sys.exit(f"error: k-NN {knn}, but no row for the table: " + "; ".join(broken))
print(f"| {commit} | {len(runs)} | {knn} | {slowest:.0f} | {machine} | {out} | what you changed |")
PYTHON
}

need() { [ -n "$1" ] || { echo "error: $2" >&2; exit 1; }; }

if [ "${1:-}" = check ]; then
    need "$argument" "which log? labs/speedrun.sh check results/race/NAME"
    check "$argument"
    exit
fi
if [ "${1:-}" = gpu ]; then
    need "$argument" "where is CIFAR-10? labs/speedrun.sh gpu DATA, with DATA/train and DATA/test"
    race=gpu
    model=cifar10_gpu
    fixed=(--max-minutes 9.9 "train.dataset_path=folder:$argument/train"
        "evaluation.train_path=folder:$argument/train" "evaluation.test_path=folder:$argument/test"
        speed.device=cuda)
    shift 2
else
    race=laptop
    model=laptop
    fixed=(evaluation.train_path=scenes:3000:seed=11 evaluation.test_path=scenes:1000:seed=12
        speed.device=cpu speed.threads=2)
fi
name=${RACE:-$(date +%Y-%m-%d-%H%M%S)}
for seed in ${SEEDS:-0 1 2}; do
    run=runs/race/$name/$race-seed-$seed
    log=results/race/$name/$race-seed-$seed
    python train.py --model "$model" --output-dir "$run" "$@" "train.seed=$seed" "${fixed[@]}"
    mkdir -p "$log"
    cp "$run"/{result,environment}.json "$run/config.yaml" "$run/metrics.jsonl" "$log/"
done
check "results/race/$name"
