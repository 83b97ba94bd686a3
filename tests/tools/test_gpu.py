"""results/gpu.py without a GPU: every part runs in miniature, a bad one costs only itself, and the documents
hold what it would write now."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, hindrance

from config import UserError
from kernels import prototypes
from tools import bench_kernels as kernel_bench

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "results"))

import gpu  # noqa: E402

ONLY_ON_A_GPU = {"ViT-L/14, peak memory / plan.py's"}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """One whole run -> what it printed, and the folder that it left."""
    if hindrance() or not INTERPRETED:
        pytest.skip(hindrance() or "on a GPU kernels are compiled, and this run is for the interpreter")
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, ROOT / "results" / "gpu.py", "--out", out, "--commit", "0123456789ab"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    log = (out / "gpu.log").read_text()
    assert done.returncode == 0, done.stdout + log[-3000:]
    return done.stdout, out


def test_every_part_runs(dry_run):
    printed, out = dry_run
    rows = gpu.read([out / "gpu.jsonl"])
    assert {row["part"] for row in rows if row.get("finished")} == {"machine", *gpu.all_parts(None)}
    assert not [row for row in rows if "failed" in row]
    assert {path.name for path in out.iterdir()} == {"gpu.jsonl", "gpu.log", "gpu.tar.gz"}
    assert rows[0]["git_commit"] == "0123456789ab" and rows[0]["dry"]


def test_the_table_comes_last_and_is_short(dry_run):
    printed, _ = dry_run
    table = printed[printed.index("| what |") :]
    assert len(table) < 10_000 and table.rstrip().endswith("its numbers mean nothing.")
    for what in gpu.PREDICTIONS:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {what} |")]
        assert ("not measured" in line) == (what in ONLY_ON_A_GPU), line


def test_predictions_cover_the_parts():
    """Every part has a prediction, every prediction a part, and every measure is one of them."""
    parts = [p.where.partition("/")[0] for p in gpu.PREDICTIONS.values()]
    assert set(parts) == set(gpu.all_parts(None)), "a new measure needs a prediction, before it is measured"
    assert gpu.predictions() == gpu.PREDICTIONS


def hang(report):
    report("hang", before=1)
    time.sleep(60)


def raises(report):
    raise ValueError("broken\nsecond line")


def dies(report):
    os._exit(3)


def works(report):
    report("works", number=7)


def test_a_bad_part_costs_only_itself(tmp_path, capfd):
    parts = {"raises": gpu.Part(raises, 1, 20), "hang": gpu.Part(hang, 1, 0.5), "dies": gpu.Part(dies, 1, 20),
             "works": gpu.Part(works, 1, 20), "long": gpu.Part(works, 50, 60)}  # fmt: skip
    rows, log = tmp_path / "rows", tmp_path / "log"
    remarks = gpu.run_parts(parts, rows, log, time.monotonic() + 30)
    assert remarks == {"raises": "ValueError: broken", "hang": "stopped: it took too long",
                       "dies": "ended with code 3, without a word", "long": "out of time"}  # fmt: skip
    found = gpu.read([rows])
    assert [row["part"] for row in found if "failed" in row] == ["raises", "hang", "dies"]
    assert [row["number"] for row in found if "number" in row] == [7]
    assert "second line" in log.read_text()
    left = gpu.wanted(parts, [], [], found)
    assert list(left) == ["raises", "hang", "dies", "long"], "what is finished is not run again"
    assert "long: not measured: out of time" in gpu.summary(found, remarks)
    assert "broken" not in capfd.readouterr().err


def test_parts_are_chosen_by_their_first_words():
    parts = gpu.all_parts(None)
    assert list(gpu.wanted(parts, ["step"], ["step off"], [])) == ["step on", "step published"]
    assert "without compile" not in gpu.wanted(parts, [], ["without"], [])
    with pytest.raises(UserError, match="there is no part stepp"):
        gpu.wanted(parts, ["stepp"], [], [])


def test_the_documents_hold_what_it_would_write():
    files = sorted((ROOT / "results" / "gpu").glob("*.jsonl"))
    for path, text in gpu.documents(files).items():
        assert path.read_text() == text, f"{path.name}: run python results/gpu.py --write results/gpu/*.jsonl"


def test_measured_numbers_come_into_the_documents(dry_run, tmp_path):
    """The rows of the dry run, as if a card had made them."""
    rows = [json.loads(line) for line in (dry_run[1] / "gpu.jsonl").read_text().splitlines()]
    with pytest.raises(UserError, match="dry run"):
        gpu.documents([dry_run[1] / "gpu.jsonl"])
    with pytest.raises(UserError, match="there is no"):
        gpu.documents([tmp_path / "nothing.jsonl"])
    rows[0] |= dict(gpus=["NVIDIA H100 80GB HBM3"], dry=False)
    for row in rows:
        if row["part"] == "step on" and "images_per_second" in row:
            row.update(images_per_second=412.4, peak_gb=43.4, mfu=0.48)
        if row["part"] == "memory vitg14":
            row.update(failed="out of memory")
    file = tmp_path / "h100.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    texts = gpu.documents([file])
    readme, log, kernels = (texts[ROOT / name] for name in ("README.md", "LOG.md", "kernels/README.md"))
    card = f"NVIDIA H100 80GB HBM3, torch {torch.__version__}, triton {rows[0]['triton']}"
    assert all(card in text and "commit 0123456789" in text for text in (readme, log, kernels))
    assert "| H100 | debug | 2 | 412 | 48% | 43 |" in readme
    assert readme.count("| H100 |") == 4 and "How fast a GPU really trains is not measured" not in readme
    assert "| ViT-L/16 step, images/s | 365 | 412 | 405 |  |" in log
    assert kernels.count("| ViT-L multi-crop |") == 1 and "| iBOT loss |" in kernels


def test_who_is_wrong_does_not_race():
    """A NaN, a hole in the output, and a wrong gradient are all noticed; the right one passes."""
    groups = [(1, 5), (2, 3)]
    (qkv,), dout = kernel_bench.inputs(groups, 2, 16)
    right = kernel_bench.dense(torch.nn.attention.SDPBackend.MATH, groups)

    def with_nan(qkv):
        return right(qkv) * torch.tensor([1.0, torch.nan]).half()[:, None]

    def with_a_hole(qkv):
        return right(qkv) * (torch.arange(11) < 10)[:, None, None]

    def without_keys_gradient(qkv):
        q, k, v = qkv.unbind(1)
        return right(torch.stack([q, k.detach(), v], 1))

    racers = dict(right=right, nan=with_nan, hole=with_a_hole, gradient=without_keys_gradient)
    racers = {name: lambda groups, function=function: function for name, function in racers.items()}
    racers["absent"] = kernel_bench.flash
    functions, errors, failed = kernel_bench.proved(racers, qkv, dout, groups)
    assert list(functions) == ["right"] and max(errors["right"]) < 2
    assert failed.keys() == {"nan", "hole", "gradient", "absent"}
    assert "output is wrong by nan" in failed["nan"] and "gradient" in failed["gradient"]


def test_losses_are_tried_where_it_is_hard():
    """The maximum of every row grows from block to block."""
    logits = kernel_bench.rising_logits(4, 3 * prototypes.BLOCK, torch.float32)
    largest = logits.view(4, 3, -1).amax(2)
    assert (largest.diff(dim=1) > 0).all()


def test_rates_use_the_measured_ceilings(monkeypatch):
    monkeypatch.setattr(kernel_bench, "CEILINGS", {})
    machine = dict(gpus=["NVIDIA H100"], part="machine")
    gpu.use_ceilings([dict(tflops=700, tb_per_s=3.0, machine=machine)])
    assert kernel_bench.ceilings() == (700e12, 3e12)
    found = kernel_bench.rates(flop=70e9, tensor=1e6, seconds=(2e-4, 7e-4))
    assert found["share_of_floor_forward"] == pytest.approx(0.5) and found["tflops_both"] == pytest.approx(
        350
    )
