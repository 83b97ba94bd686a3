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
from tools import bench_kernels

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "results"))

import gpu  # noqa: E402

ONLY_ON_A_GPU = {"ViT-L/14, peak memory / tools/plan.py's"}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """One whole run -> what it printed, and the folder that it left."""
    if hindrance() or not INTERPRETED:
        pytest.skip(hindrance() or "on a GPU kernels are compiled, and this run is for the interpreter")
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, ROOT / "results" / "gpu.py", "--out", out, "--commit", "0123456789ab"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    log = (out / "gpu.log").read_text()
    assert finished.returncode == 0, finished.stdout + log[-3000:]
    return finished.stdout, out


def test_every_part_runs(dry_run):
    _, out = dry_run
    rows = gpu.read_rows([out / "gpu.jsonl"])
    assert {row["part"] for row in rows if row.get("finished")} == {"machine", *gpu.all_parts(None)}
    assert not [row for row in rows if "failed" in row]
    assert {path.name for path in out.iterdir()} == {"gpu.jsonl", "gpu.log", "gpu.tar.gz"}
    assert rows[0]["git_commit"] == "0123456789ab" and rows[0]["dry"]


def test_the_table_comes_last_and_is_short(dry_run):
    printed, _ = dry_run
    table = printed[printed.index("| what |") :]
    assert len(table) < 10_000 and table.rstrip().endswith("its numbers mean nothing.")
    for name in gpu.PREDICTIONS:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        assert ("not measured" in line) == (name in ONLY_ON_A_GPU), line


def test_predictions_cover_the_parts():
    """Every part has a prediction, every prediction a part, and every optimisation is one of them."""
    parts = [prediction.where.partition("/")[0] for prediction in gpu.PREDICTIONS.values()]
    assert set(parts) == set(gpu.all_parts(None)), "a new part needs a prediction, before it is measured"
    assert gpu.current_predictions() == gpu.PREDICTIONS


def hang(write_row):
    write_row("hang", before=1)
    time.sleep(60)


def raises(write_row):
    raise ValueError("broken\nsecond line")


def dies(write_row):
    os._exit(3)


def works(write_row):
    write_row("works", number=7)


def test_a_bad_part_costs_only_itself(tmp_path, capfd):
    parts = {"raises": gpu.Part(raises, 1, 20), "hang": gpu.Part(hang, 1, 0.5), "dies": gpu.Part(dies, 1, 20),
             "works": gpu.Part(works, 1, 20), "long": gpu.Part(works, 50, 60)}  # fmt: skip
    rows = tmp_path / "rows"
    log = tmp_path / "log"
    missing = gpu.run_parts(parts, rows, log, time.monotonic() + 30)
    assert missing == {"raises": "ValueError: broken", "hang": "stopped: it took too long",
                       "dies": "ended with code 3, without a word", "long": "out of time"}  # fmt: skip
    found = gpu.read_rows([rows])
    assert [row["part"] for row in found if "failed" in row] == ["raises", "hang", "dies"]
    assert [row["number"] for row in found if "number" in row] == [7]
    assert "second line" in log.read_text()
    left = gpu.select_parts(parts, [], [], found)
    assert list(left) == ["raises", "hang", "dies", "long"], "what is finished is not run again"
    assert "long: not measured: out of time" in gpu.summary(found, missing)
    assert "broken" not in capfd.readouterr().err


def test_parts_are_chosen_by_their_first_words():
    parts = gpu.all_parts(None)
    assert list(gpu.select_parts(parts, ["step"], ["step off"], [])) == ["step on", "step published"]
    assert "without compile" not in gpu.select_parts(parts, [], ["without"], [])
    with pytest.raises(UserError, match="there is no part stepp"):
        gpu.select_parts(parts, ["stepp"], [], [])


def test_the_documents_hold_what_it_would_write():
    files = sorted((ROOT / "results" / "gpu").glob("*.jsonl"))
    for path, text in gpu.updated_documents(files).items():
        assert path.read_text() == text, f"{path.name}: run python results/gpu.py --write results/gpu/*.jsonl"


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    file = tmp_path / "gpu.jsonl"
    file.write_text('{"part": "a"}\n[1]\n3\n"gpus"\n' + "[" * 9999 + '\n{"gpus": []}\n{"part": "b"}\n{"pa')
    machine = dict(part="", gpus=[])
    rows = [dict(part="a", machine={}), machine | dict(machine=machine), dict(part="b", machine=machine)]
    assert gpu.read_rows([tmp_path / "none.jsonl", file]) == rows


def test_measured_numbers_come_into_the_documents(dry_run, tmp_path):
    """The rows of the dry run, as if a card had made them."""
    rows = [json.loads(line) for line in (dry_run[1] / "gpu.jsonl").read_text().splitlines()]
    with pytest.raises(UserError, match="dry run"):
        gpu.updated_documents([dry_run[1] / "gpu.jsonl"])
    with pytest.raises(UserError, match="there is no"):
        gpu.updated_documents([tmp_path / "nothing.jsonl"])
    rows[0] |= dict(gpus=["NVIDIA H100 80GB HBM3"], dry=False)
    for row in rows:
        if row["part"] == "step on" and "images_per_second" in row:
            row.update(images_per_second=412.4, peak_gb=43.4, mfu=0.48)
        if row["part"] == "memory vitg14":
            row.update(failed="out of memory")
    file = tmp_path / "h100.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    texts = gpu.updated_documents([file])
    readme = texts[ROOT / "README.md"]
    log = texts[ROOT / "LOG.md"]
    kernels = texts[ROOT / "kernels" / "README.md"]
    card = f"NVIDIA H100 80GB HBM3, torch {torch.__version__}, triton {rows[0]['triton']}"
    for text in (readme, log, kernels):
        assert card in text and "commit 0123456789" in text
    assert "| H100 | debug | 2 | 412 | 48% | 43 |" in readme
    assert readme.count("| H100 |") == 4 and "How fast a GPU really trains is not measured" not in readme
    assert "| ViT-L/16 step, images/s | 365 | 412 | 405 |  |" in log
    assert kernels.count("| ViT-L multi-crop |") == 1 and "| iBOT loss |" in kernels


def test_a_wrong_peer_is_not_timed():
    """A NaN, a hole in the output, and a wrong gradient are all noticed; the right one passes."""
    groups = [(1, 5), (2, 3)]
    (qkv,), dout = bench_kernels.random_inputs(groups, 2, 16)
    right = bench_kernels.prepare_sdpa(torch.nn.attention.SDPBackend.MATH, groups)

    def with_nan(qkv):
        return right(qkv) * torch.tensor([1.0, torch.nan]).half()[:, None]

    def with_a_hole(qkv):
        return right(qkv) * (torch.arange(11) < 10)[:, None, None]

    def without_keys_gradient(qkv):
        q, k, v = qkv.unbind(1)
        return right(torch.stack([q, k.detach(), v], 1))

    competitors = dict(right=right, nan=with_nan, hole=with_a_hole, gradient=without_keys_gradient)
    competitors = {name: lambda groups, peer=peer: peer for name, peer in competitors.items()}
    competitors["absent"] = bench_kernels.prepare_flash_attn
    functions, errors, failed = bench_kernels.check_peers(competitors, qkv, dout, groups)
    assert list(functions) == ["right"] and max(errors["right"]) < 2
    assert failed.keys() == {"nan", "hole", "gradient", "absent"}
    assert "output is wrong by nan" in failed["nan"] and "gradient" in failed["gradient"]


def test_losses_are_tried_where_it_is_hard():
    """The maximum of every row grows from block to block."""
    logits = bench_kernels.rising_logits(4, 3 * prototypes.BLOCK, torch.float32)
    largest = logits.view(4, 3, -1).amax(2)
    assert (largest.diff(dim=1) > 0).all()


def test_rates_use_the_measured_limits(monkeypatch):
    monkeypatch.setattr(bench_kernels, "MEASURED_LIMITS", {})
    machine = dict(gpus=["NVIDIA H100"], part="machine")
    gpu.use_measured_limits([dict(tflops=700, tb_per_s=3.0, machine=machine)])
    assert bench_kernels.hardware_limits() == (700e12, 3e12)
    rates = bench_kernels.achieved_rates(flop=70e9, size=1e6, seconds=(2e-4, 7e-4))
    assert rates["share_of_floor_forward"] == pytest.approx(0.5)
    assert rates["tflops_both"] == pytest.approx(350)
