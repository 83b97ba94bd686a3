"""README is true: its files and settings exist, its results are those that were measured.

test_docs.py checks commands, links and line counts, here and in all other documents.
"""

import json
import re
from pathlib import Path

import pytest

import config
import train
from tools.report import METRICS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LOG = (ROOT / "LOG.md").read_text()
RESULTS = sorted((ROOT / "results").glob("*.json"))


def read_result(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def mean_and_range(statistics):
    return "{mean:.3f} ({min:.3f}-{max:.3f})".format(**statistics)


def section(title):
    """The text below a heading of README, up to the next one."""
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


# ---------------------------------------------------------------- files and settings


def test_files_exist():
    for name in re.findall(r"`((?:configs|tests|results|assets)/[\w./*]+)`", README):
        assert list(ROOT.glob(name.rstrip("/"))), name


@pytest.mark.parametrize("folder", [".", "evals", "curation", "tools", "kernels"])
def test_every_file_has_its_row(folder):
    """Its line count is checked by test_docs.py."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| \d+ \| .+ \|$", section("Read"), re.M)
    listed = {ROOT / name for name in rows}
    files = set((ROOT / folder).glob("*.py")) - {ROOT / folder / "__init__.py"}
    assert files == {path for path in listed if path.parent == ROOT / folder}


def test_settings_named_in_the_text_exist():
    cfg = config.load()
    sections = "|".join(vars(cfg))
    for name, key in re.findall(rf"\b({sections})\.(\w+)", README + LOG):
        is_file = key in ("py", "yaml", "pth")
        assert is_file or hasattr(getattr(cfg, name), key), f"{name}.{key}"


# ---------------------------------------------------------------- logged numbers


def test_the_table_of_logged_numbers_is_that_of_the_report():
    rows = {}
    for line in section("What the logged numbers mean").splitlines():
        if line.startswith("| `"):
            names, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[tuple(re.findall(r"`(\w+)`", names))] = tuple(cells)
    assert rows == METRICS


def test_every_logged_scalar_is_in_the_glossary(tmp_path):
    short_run = ("optim.epochs=0.5", "optim.warmup_epochs=0.25", "optim.freeze_last_layer_epochs=0",
                 "evaluation.eval_period_iterations=1", "evaluation.test_path=scenes:50:seed=2",
                 "ibot.separate_head=true")  # fmt: skip
    train.main(["--model", "debug", "--output-dir", str(tmp_path / "run"), *short_run])
    logged = set()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        logged.update(json.loads(line))
    # the schedules are named as in the config
    schedules = {"lr", "last_layer_lr", "backbone_lr", "weight_decay", "momentum", "teacher_temp"}
    explained = set().union(*METRICS)
    assert "loss" in logged
    assert logged - schedules - {"step"} <= explained


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.stem)
def test_results_are_quoted_as_measured(file):
    """A row that names a results file holds its numbers: `| ... | mean (min-max) | results/x.json |`."""
    summary = json.loads(file.read_text()).get("summary", {})
    rows = re.findall(rf"^\|.*`results/{file.name}`.*$", LOG, re.M)
    assert rows, f"LOG.md has no row for {file.name}"
    for row in rows:
        for name, *quoted in re.findall(r"(\w+) ([\d.]+) \(([\d.]+)-([\d.]+)\)", row):
            digits = len(quoted[0].partition(".")[2])
            measured = [f"{summary[name][key]:.{digits}f}" for key in ("mean", "min", "max")]
            assert quoted == measured, (row, summary[name])


def test_the_first_table_is_the_measured_one():
    summary = read_result("laptop")["summary"]
    knn = mean_and_range(summary["knn_top1"])
    knn_random = mean_and_range(summary["knn_random_init"])
    pixels = summary["knn_pixels"]["mean"]
    chance = summary["chance"]["mean"]
    assert f"| {knn} | {knn_random} | {pixels:.3f} | {chance:.3f} |" in README
    miou = mean_and_range(summary["fg_miou"])
    miou_random = mean_and_range(summary["fg_miou_random_init"])
    assert f"| {miou} | {miou_random} |" in README
    seconds = summary["train_seconds"]["min"]
    assert f"| {seconds:.0f} s |" in README


def test_curation_is_quoted_as_measured():
    tables = read_result("curation_truth")["tables"]
    for name, digits in (("blurred", 3), ("all", 4)):
        planted, recall, precision = tables["quality"][name].values()
        assert f"| {planted:,d} | {recall:.{digits}f} | {precision:.3f} |" in LOG
    assert "| {reached} | {recall:.3f} | {precision:.3f} |".format(**tables["content"]["dots"]) in LOG
    entropy = tables["domains"]["kinds of scenes"]
    assert "{before:.3f} before balance, {after:.3f} of the maximum".format(**entropy) in LOG


def test_the_value_of_curation_is_quoted_as_measured():
    for pile in ("curated_pile", "raw_pile"):
        assert mean_and_range(read_result(pile)["summary"]["knn_top1"]) in README


def test_the_speed_of_curation_is_quoted_as_measured():
    speed = read_result("curation_speed")
    scoring = speed["scoring, 500 x 375"]
    assert f"| {scoring['one pass, images/s']:.0f} images/s |" in LOG
    assert f"one by one: {scoring['naive, images/s']:.0f} images/s |" in LOG
    memory = list(speed["memory of a run"].values())
    assert f"| {memory[0]:.0f} and {memory[2]:.0f} MB |" in LOG
    hours, kmeans_pass = speed["500,000,000 images, hours of one core"].values()
    assert f"scoring {hours:.0f} hours, on 128 cores {hours / 128:.1f}" in README
    assert f"{kmeans_pass:.0f} hours for each pass" in README
