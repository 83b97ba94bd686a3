"""The nearest neighbours of images: what the command prints, and its two pictures."""

import sys

import numpy as np
import pytest
import torch
from helpers import check_printed_predictions, make_color_sets, tiny_backbone
from PIL import Image

from config import UserError
from eval_knn import calibration
from evals import neighbours
from evals.neighbours import compare_networks, nearest_images, reliability_plot
from features import EvalImages
from scenes import Scenes
from sources import open_source


def test_bars_are_as_high_as_the_accuracy():
    """Coloured pixels as high as the accuracy of a bin; nothing in an empty one."""
    share = torch.tensor([0.95] * 8 + [0.55] * 8)
    right = torch.tensor([True] * 8 + [False, True] * 4)
    error, bins = calibration(share, right)
    plot = np.array(reliability_plot(error, bins).convert("RGB")).astype(int)
    columns = [plot[34:394, round(62 + (b + 0.2) * 36)] for b in range(10)]  # beside the number over the bar
    heights = [int((column[:, 2] - column[:, 0] > 20).sum()) for column in columns]
    assert heights[9] == pytest.approx(360, abs=8)
    assert heights[5] == pytest.approx(180, abs=8)
    assert heights[2] == 0


def test_frames_tell_right_from_wrong():
    """As many pixels are green as frames of right neighbours have, and the others' are red."""
    bank = EvalImages(Scenes(60, seed=1, size=32), 32)
    queries = EvalImages(Scenes(30, seed=2, size=32), 32)
    backbone = tiny_backbone()
    sheet = np.array(compare_networks({"a": backbone}, bank, queries))
    first = [[queries[i][1] for i in range(30)].index(label) for label in range(10)]
    nearest = nearest_images(backbone, bank, queries.subset(first), 5)
    right = sum(bank[j][1] == label for label, row in enumerate(nearest.tolist()) for j in row)
    frame = 70**2 - 64**2  # pixels
    assert (sheet == neighbours.GREEN).all(-1).sum() == right * frame
    assert (sheet == neighbours.RED).all(-1).sum() == (50 - right) * frame
    assert 0 < right < 50


def test_nothing_to_compare(tmp_path):
    """Queries without a label, or that can't be read."""
    bank = EvalImages(Scenes(6, seed=1, size=32), 32)
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "torn.png").write_bytes(b"no image")
    queries = EvalImages(open_source(f"folder:{tmp_path}"), 32)
    with pytest.raises(UserError, match="no query is readable"):
        compare_networks({"a": tiny_backbone()}, bank, queries)


def test_a_number_of_neighbours(monkeypatch):
    for k in ("0", "-1", "1.5", "nan"):
        monkeypatch.setattr(sys, "argv", ["neighbours.py", "scenes:2", "--k", k])
        with pytest.raises(SystemExit):
            neighbours.main()


def test_the_command_prints_and_draws(tmp_path, monkeypatch, capsys):
    args, photos = make_color_sets(tmp_path)
    argv = ["neighbours.py", *args, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, *photos])
    neighbours.main()
    said = capsys.readouterr().out
    check_printed_predictions(said)
    assert "neighbours.png" in said and "reliability.png" in said
    with Image.open(tmp_path / "out" / "neighbours.png") as rows:
        assert rows.width > 5 * 96
    with Image.open(tmp_path / "out" / "reliability.png") as plot:
        assert plot.width > 360
    monkeypatch.setattr(sys, "argv", [*argv, photos[1]])
    with pytest.raises(UserError, match="none of these images can be read"):
        neighbours.main()
