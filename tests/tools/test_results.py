"""The scripts of results/: --help starts nothing, wrong numbers and folders are one sentence."""

import json
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

import config
from config import UserError
from results import ceiling, collect, curation, peers, vitg_cpu

SCRIPTS = [*sorted((ROOT / "results").glob("*.py")), ROOT / "tools" / "bench_input.py"]
RESULT = dict(knn_top1=0.5, chance=0.1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_printed_and_nothing_starts(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("main, words", [
    (ceiling.main, "0"), (ceiling.main, "many"), (vitg_cpu.main, "-1"), (vitg_cpu.main, "--task none"),
    (curation.main, "truth work --images 0"), (curation.main, "speed --pile 10,x"),
    (curation.main, "near --images x"), (collect.main, "out.json"), (peers.main, "")])  # fmt: skip
def test_wrong_numbers_are_refused(main, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2


def test_an_unknown_part_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["curation.py", "speed", "--parts", "join,none"])
    with pytest.raises(UserError, match="--parts join,none: choose from "):
        curation.main()


def make_run(folder, result):
    """The folder of a finished run, as far as collect.py reads it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config.load(model="debug").to_yaml())
    facts = dict.fromkeys(collect.FACTS, "known") | dict(command=["python", "train.py"])
    (folder / "environment.json").write_text(json.dumps(facts))
    (folder / "result.json").write_text(json.dumps(result))
    return str(folder)


def run_collect(monkeypatch, out, *folders):
    monkeypatch.setattr(sys, "argv", ["collect.py", str(out), *folders])
    collect.main()


def test_results_are_collected(tmp_path, monkeypatch, capsys):
    folders = [make_run(tmp_path / "a", RESULT), make_run(tmp_path / "b", RESULT | dict(knn_top1=0.7))]
    run_collect(monkeypatch, tmp_path / "out.json", *folders)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["summary"]["knn_top1"] == pytest.approx(dict(mean=0.6, min=0.5, max=0.7))
    assert found["runs"][0]["command"] == "python train.py" and found["runs"][1]["seed"] == 0
    assert "2 runs, seeds [0, 0]" in capsys.readouterr().out


@pytest.mark.parametrize("result", [[1], dict(knn_top1="x"), dict(knn_top1=None), 3])
def test_a_result_of_another_kind_is_named(result, tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a", result)
    with pytest.raises(UserError, match=f"{folder} is not the folder of a finished run"):
        run_collect(monkeypatch, tmp_path / "out.json", folder)
    assert not (tmp_path / "out.json").exists()


def test_results_of_other_commands_do_not_mix(tmp_path, monkeypatch):
    folders = [make_run(tmp_path / "a", RESULT), make_run(tmp_path / "b", dict(chance=0.1))]
    with pytest.raises(UserError, match="knn_top1 is missing in a result"):
        run_collect(monkeypatch, tmp_path / "out.json", *folders)


# ---- beside the peers


def test_peers_need_a_clone_of_the_authors_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--authors", str(tmp_path)])
    with pytest.raises(UserError, match="is no clone of facebookresearch/dinov2: --help says how"):
        peers.main()


def test_the_stand_in_attends_within_each_sequence(monkeypatch):
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)  # so that monkeypatch restores them
    peers.install_xformers_stand_in()
    ops = sys.modules["xformers.ops"]
    long = torch.randn(2, 5, 3, 8)  # (sequences, tokens, heads, head dim)
    short = torch.randn(4, 3, 3, 8)
    row = torch.cat([long.flatten(0, 1), short.flatten(0, 1)])[None]
    mask = ops.fmha.BlockDiagonalMask.from_seqlens([5, 5, 3, 3, 3, 3])
    mask._batch_sizes = [2, 4]
    parts = mask.split(ops.memory_efficient_attention(row, row, row, attn_bias=mask))
    for part, x in zip(parts, (long, short), strict=True):
        heads_first = x.transpose(1, 2)
        expected = F.scaled_dot_product_attention(heads_first, heads_first, heads_first).transpose(1, 2)
        torch.testing.assert_close(part, expected)


def test_ratios_to_ours_are_medians_over_rounds():
    def measured(seconds):
        return dict(seconds=seconds, peak_gib=seconds)

    rounds = []
    for ours, theirs in ((1.0, 2.0), (2.0, 3.0), (1.0, 4.0)):
        rounds.append(
            {("step", "nanodino, fp32"): measured(ours), ("step", "lightly, fp32"): measured(theirs)}
        )
    row = peers.summarize(rounds)["step: lightly, fp32"]
    assert row == dict(seconds=3.0, peak_gib=4.0, ratio=2.0, lowest=1.5, highest=4.0)
