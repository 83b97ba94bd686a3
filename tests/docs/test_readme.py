"""The README is true: its files and settings exist, its counts and results hold. test_docs.py checks commands
and links, here and in all other documents."""

import json
import re
from pathlib import Path

import pytest

import config
import train

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LOG = (ROOT / "LOG.md").read_text()


def test_files_exist():
    for name in re.findall(r"`((?:configs|tests|results|assets)/[\w./*]+)`", README):
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_line_counts():
    counted = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M)
    top = {name for name, _ in counted if "/" not in name}
    assert top == {p.name for p in ROOT.glob("*.py")}, "every top-level file has its row"
    for name, lines in counted:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), (
            f"{name} has other than {lines} lines"
        )


def test_reading_closure():
    """What `python train.py` executes fits an afternoon."""
    core = [len((ROOT / f"{f}.py").read_text().splitlines()) for f in ("model", "losses", "data", "train")]
    assert sum(core) <= 1600
    widest = max((len(line), p.name) for p in ROOT.glob("*.py") for line in p.read_text().splitlines())
    assert widest[0] <= 110, widest


def test_every_logged_scalar_is_in_the_glossary(tmp_path):
    glossary = set(
        re.findall(r"`(\w+)`", README.split("## What the logged numbers mean")[1].split("\n## ")[0])
    )
    train.main(["--model", "debug", "--output-dir", str(tmp_path / "run"), "optim.epochs=0.5",
                "optim.warmup_epochs=0.25", "optim.freeze_last_layer_epochs=0",
                "evaluation.eval_period_iterations=1",
                "evaluation.test_path=scenes:50:seed=2", "ibot.separate_head=true"])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {k for row in rows for k in row}
    # the schedules, named as in the config
    rates = {"lr", "last_layer_lr", "backbone_lr", "weight_decay", "momentum", "teacher_temp"}
    assert logged - rates - {"step"} <= glossary


def test_settings_named_in_the_text_exist():
    cfg = config.load()
    sections = "|".join(vars(cfg))
    for section, key in re.findall(rf"\b({sections})\.(\w+)", README + LOG):
        assert hasattr(getattr(cfg, section), key) or key in ("py", "yaml", "pth"), f"{section}.{key}"


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.stem)
def test_results_are_quoted_as_measured(file):
    """A row that names a results file holds its numbers: `| ... | mean (min-max) | results/x.json |`."""
    summary = json.loads(file.read_text()).get("summary", {})
    rows = [line for line in LOG.splitlines() if f"`results/{file.name}`" in line and line.startswith("|")]
    assert rows, f"LOG.md has no row for {file.name}"
    for row in rows:
        for name, mean, low, high in re.findall(r"(\w+) ([\d.]+) \(([\d.]+)-([\d.]+)\)", row):
            s = summary[name]
            digits = len(mean.partition(".")[2])
            assert [f"{s[k]:.{digits}f}" for k in ("mean", "min", "max")] == [mean, low, high], (row, s)


def test_the_first_table_is_the_measured_one():
    s = json.loads((ROOT / "results" / "laptop.json").read_text())["summary"]
    spread = lambda k: "{mean:.3f} ({min:.3f}-{max:.3f})".format(**s[k])  # noqa: E731
    mean = lambda k: f"{s[k]['mean']:.3f}"  # noqa: E731
    cells = [spread("knn_top1"), spread("knn_random_init"), mean("knn_pixels"), mean("chance")]
    assert f"| {' | '.join(cells)} |" in README
    assert f"| {spread('fg_miou')} | {spread('fg_miou_random_init')} |" in README
    assert f"| {s['train_seconds']['min']:.0f} s |" in README


def test_curation_is_quoted_as_measured():
    truth, speed = (
        json.loads((ROOT / "results" / f"curation_{x}.json").read_text()) for x in ("truth", "speed")
    )
    quality, content, kinds = (truth["tables"][x] for x in ("quality", "content", "domains"))
    for name, digits in ("blurred", 3), ("all", 4):
        planted, recall, precision = quality[name].values()
        assert f"| {planted:,d} | {recall:.{digits}f} | {precision:.3f} |" in LOG
    dots, even = content["dots"], kinds["kinds of scenes"]
    assert f"| {dots['reached']} | {dots['recall']:.3f} | {dots['precision']:.3f} |" in LOG
    assert f"{even['before']:.3f} before balance, {even['after']:.3f} of the maximum" in LOG
    rate, memory = speed["scoring, 500 x 375"], list(speed["memory of a run"].values())
    assert f"| {rate['one pass, images/s']:.0f} images/s |" in LOG
    assert f"one by one: {rate['naive, images/s']:.0f} images/s |" in LOG
    assert f"| {memory[0]:.0f} and {memory[2]:.0f} MB |" in LOG
    for pile in "curated", "raw":
        knn = json.loads((ROOT / "results" / f"{pile}_pile.json").read_text())["summary"]["knn_top1"]
        assert "{mean:.3f} ({min:.3f}-{max:.3f})".format(**knn) in README
    scoring, one_pass = speed["500,000,000 images, hours of one core"].values()
    assert f"scoring {scoring:.0f} hours, on 128 cores {scoring / 128:.1f}" in README
    assert f"{one_pass:.0f} hours for each pass" in README
