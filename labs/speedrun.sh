#!/usr/bin/env bash
# The race: the best k-NN in a given time. The rules, and the table of those who ran, are in labs/speedrun.md.
#
#   labs/speedrun.sh                          laptop: scenes, two cores, 300 s of training, three seeds
#   labs/speedrun.sh optim.base_lr=6e-3       the same with settings of your own, or with your own code
#   labs/speedrun.sh gpu DATA                 CIFAR-10 (DATA/train, DATA/test), one GPU, 600 s
#   labs/speedrun.sh check results/race/NAME  does this log keep the rules? (the others end with it)
#
# SEEDS="0" runs one seed, to try. Each run's result.json, environment.json, config.yaml and metrics.jsonl are
# copied to results/race/NAME (RACE=NAME, or the date), and the row for the table is printed. Ends with 1 if a
# seed lies below the target, takes too long, or does not keep the rules.
set -euo pipefail
there=${2:-}
if [ -d "$there" ]; then there=$(cd "$there" && pwd); fi # as seen from where you are
cd "$(dirname "$0")/.."

# check FOLDER: every seed in it against the rules of its race -> the row, or what is wrong
check() {
    python - "$1" <<'PYTHON'
import json
import sys
from pathlib import Path

import yaml

RACES = {"laptop": (0.82, 300), "gpu": (0.556, 600)}  # k-NN at least, seconds of training at most
SCENES = "scenes:3000:seed=11", "scenes:1000:seed=12"
FILES = "result.json", "environment.json", "config.yaml", "metrics.jsonl"


def look(run):
    """A folder of logs -> its race, the rules that it breaks, its numbers, and where it ran."""
    result, about = (json.loads((run / name).read_text()) for name in FILES[:2])
    cfg, (race, seed) = yaml.safe_load((run / "config.yaml").read_text()), run.name.split("-seed-")
    (target, limit), train = RACES[race], cfg["train"]
    sources = cfg["evaluation"]["train_path"], cfg["evaluation"]["test_path"]
    words, threads = train["dataset_path"].split(":"), about["threads"] + train["num_workers"]
    if race == "laptop":
        fair = sources == SCENES and words[0] == "scenes" and not {"seed=11", "seed=12"} & set(words)
        machine = threads <= 2 and (cfg["speed"]["device"] == "cpu" or not about["gpus"])
    else:
        fair = [Path(x).name for x in sources] == ["train", "test"] and train["dataset_path"] == sources[0]
        machine = cfg["speed"]["device"] == "cuda" and about["processes"] == 1
    rules = {
        f"k-NN {result['knn_top1']:.3f}, target {target}": result["knn_top1"] >= target,
        f"{result['train_seconds']:.0f} s of training, at most {limit}": result["train_seconds"] <= limit,
        "other data than the race's": fair,
        "other hardware than the race's": machine,
        "weights from elsewhere": not (train["init_from"] or train["distill_from"]),
        f"its seed is {train['seed']}": str(train["seed"]) == seed,
    }
    broken = [f"{run.name}: {text}" for text, kept in rules.items() if not kept]
    return race, broken, result["knn_top1"], result["train_seconds"], about


out = Path(sys.argv[1])
runs = sorted(x for race in RACES for x in out.glob(f"{race}-seed-*"))
if not runs:
    sys.exit(f"error: {out} holds no run of a race: it must have folders laptop-seed-0 or gpu-seed-0")
try:
    races, broken, scores, seconds, about = zip(*map(look, runs))
except (OSError, ValueError, KeyError, TypeError) as e:
    sys.exit(f"error: {out} is no log of a race ({e!r}): copy {', '.join(FILES)} of each run")
commit = about[0]["git_commit"][:9] + ("+" if about[0]["git_diff"] else "")
spread = f"{sum(scores) / len(scores):.3f} ({min(scores):.3f}-{max(scores):.3f})"
machine = about[0]["cpu"] if races[0] == "laptop" else about[0]["gpus"][0]
broken = sum(broken, [])
if [run.name for run in runs] != [f"{races[0]}-seed-{seed}" for seed in range(3)]:
    broken.append("three runs are wanted, of seeds 0, 1 and 2")
if broken:
    sys.exit(f"error: k-NN {spread}, but no row for the table: " + "; ".join(broken))
print(f"| {commit} | {len(runs)} | {spread} | {max(seconds):.0f} | {machine} | {out} | what you changed |")
PYTHON
}

need() { [ -n "$1" ] || { echo "error: $2" >&2; exit 1; }; }

if [ "${1:-}" = check ]; then
    need "$there" "which log? labs/speedrun.sh check results/race/NAME"
    check "$there"
    exit
fi
race=laptop model=laptop fixed=(evaluation.train_path=scenes:3000:seed=11
    evaluation.test_path=scenes:1000:seed=12 speed.device=cpu speed.threads=2)
if [ "${1:-}" = gpu ]; then
    need "$there" "where is CIFAR-10? labs/speedrun.sh gpu DATA, with DATA/train and DATA/test"
    race=gpu model=cifar10_gpu fixed=(--max-minutes 9.9 "train.dataset_path=folder:$there/train" "evaluation.train_path=folder:$there/train"
        "evaluation.test_path=folder:$there/test" speed.device=cuda)
    shift 2
fi
name=${RACE:-$(date +%Y-%m-%d-%H%M%S)}
for seed in ${SEEDS:-0 1 2}; do
    run=runs/race/$name/$race-seed-$seed log=results/race/$name/$race-seed-$seed
    python train.py --model "$model" --output-dir "$run" "$@" "train.seed=$seed" "${fixed[@]}"
    mkdir -p "$log"
    cp "$run"/{result,environment}.json "$run/config.yaml" "$run/metrics.jsonl" "$log/"
done
check "results/race/$name"
