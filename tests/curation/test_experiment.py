"""results/curation.py in small: the experiments behind the tables of README and LOG."""

import json
import re
import sys

import pytest

from results import curation as experiment


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["curation.py", *arguments])
    experiment.main()


def test_planted_truth_in_small(tmp_path, monkeypatch, capsys):
    """The experiment of the README on 100 images: whatever may be found, is found; and the score can fall."""
    file = tmp_path / "result.json"
    run_main(monkeypatch, "truth", str(tmp_path), "--images", "100", "--json", str(file))
    tables = json.loads(file.read_text())["tables"]
    assert tables["quality"]["all"]["recall"] == 1 and tables["leaks"]["all"]["precision"] == 1
    copies = {name: row for name, row in tables["duplicates"].items() if "recall" in row}
    assert len(copies) >= 4
    for name, row in copies.items():
        if name.split(",")[0] in experiment.COPIES:
            assert row["recall"] == 1
    planted = experiment.plant_pile(tmp_path / "1-100", 1, 100, {}, 1)
    nothing = [dict(path=line["path"], why="kept", keep=True, sha256=line["path"]) for line in planted]
    tables, _ = experiment.score(planted, nothing, {})
    assert tables["quality"]["all"]["recall"] == tables["leaks"]["exact"]["recall"] == 0


def test_near_in_small(monkeypatch, capsys):
    """No copy is missed within 6 bits of eight scenes, some within none, and no two scenes are alike."""
    run_main(monkeypatch, "near", "--images", "8")
    missed = {}
    for line in capsys.readouterr().out.splitlines():
        if "radius" in line:
            assert line.endswith("false pairs 0")
            radius = line.split("  ")[1]
            missed[radius] = sum(int(count) for count in re.findall(r"missed (\d+)", line))
    assert missed["radius 6"] == 0 < missed["radius 0"]


def test_speed_in_small(monkeypatch, capsys):
    pytest.importorskip("imagehash")
    small = ["--files", "4", "--hashes", "20000", "--vectors", "2000", "--centroids", "10"]
    run_main(monkeypatch, "speed", "--parts", "scoring,drift,join,vectors", *small)
    printed = capsys.readouterr().out
    assert "ratio" in printed and "found of the twins 1" in printed and "recall of its 1 % 1" in printed


def test_memory_in_small(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, "speed", "--parts", "memory", "--pile", "20", "--work", str(tmp_path))
    found = re.search(r"20 images, MB (\S+)", capsys.readouterr().out)
    assert 50 < float(found[1]) < 2000
