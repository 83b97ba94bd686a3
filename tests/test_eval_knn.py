"""Weighted k-NN against the authors' (tests/golden), and the command."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import close

import eval_knn
from config import UserError
from eval_knn import calibration, knn_accuracy, knn_predict, knn_scores, majority_accuracy
from model import VisionTransformer

GOLDEN = Path(__file__).parent / "golden"


def test_votes_are_the_authors():
    f = np.load(GOLDEN / "j_knn.npz")
    names = {k: torch.from_numpy(f[k]) for k in f.files if f[k].dtype.kind != "U"}
    train_x, train_y = names["train_features"], names["train_labels"].long()
    scores = knn_scores(train_x, train_y, names["test_features"], 10, ks=(5, 10, 20, 100), chunk=7)
    for k in (5, 10, 20, 100):
        close(scores[k], names[f"scores_k{k}"])


def test_accuracy_and_small_banks():
    x, y = torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)
    assert knn_accuracy(x, y, torch.eye(4), torch.arange(4), ks=(1, 3, 200)) == {1: 1.0, 3: 1.0, 12: 1.0}
    assert majority_accuracy(torch.tensor([0, 0, 0, 1])) == pytest.approx(0.75)


def test_votes_sum_to_one_and_name_the_voters():
    x, y = torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)
    predicted, share, near = knn_predict(x, y, 5 * torch.eye(4), k=3)
    assert predicted.tolist() == [0, 1, 2, 3] and y[near].tolist() == [[c] * 3 for c in range(4)]
    torch.testing.assert_close(share, torch.ones(4))
    _, share, _ = knn_predict(x, y, torch.ones(1, 4), k=12)  # as near to all
    torch.testing.assert_close(share, torch.tensor([0.25]))


def test_calibration_against_a_loop():
    torch.manual_seed(0)
    share = torch.rand(500)
    right = torch.rand(500) < share**2
    error, table = calibration(share, right, bins=5)
    expected = 0
    for b, (mean, hit, count) in enumerate(table):
        cases = [i for i in range(500) if b / 5 <= share[i] < (b + 1) / 5]
        assert count == len(cases)
        assert mean == pytest.approx(share[cases].mean().item(), abs=1e-6)
        assert hit == pytest.approx(right[cases].float().mean().item())
        expected += count / 500 * abs(mean - hit)
    assert error == pytest.approx(expected, abs=1e-6) and error > 0.1


def test_calibration_of_the_honest_and_of_the_liar():
    sure, half = torch.ones(100), torch.full((100,), 0.5)
    heads = torch.arange(100) % 2 == 0
    assert calibration(half, heads)[0] == pytest.approx(0) and calibration(sure, heads)[0] == pytest.approx(
        0.5
    )
    assert calibration(sure, heads)[1][-1] == (1.0, 0.5, 100)  # 1.0 lies in the last bin, not behind it


def make_color_sets(folder):
    """Images of two flat colours, a network that tells them apart, and two photos, one of them broken.

    -> the arguments that name network and sets, and the paths of the photos.
    """
    for kind, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        for split in ("train", "test"):
            (folder / split / kind).mkdir(parents=True)
            for i in range(6):
                shade = tuple(channel + 4 * i for channel in color)
                Image.new("RGB", (40, 30), shade).save(folder / split / kind / f"{i}.png")
    (folder / "train" / "red" / "0.png").write_bytes(b"broken")
    Image.new("RGB", (33, 60), (35, 33, 210)).save(folder / "new.png")
    (folder / "bad.png").write_bytes(b"broken")
    torch.manual_seed(0)
    model = VisionTransformer(32, 2, 2, patch_size=8, img_size=32, layerscale=1.0).requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(std=0.1)  # the same numbers in every PyTorch: those of trunc_normal_ have changed
    model.cls_token.zero_()  # so [CLS] is only what it sees
    torch.save({"teacher": model.state_dict(), "arch": {"num_heads": 2}}, folder / "t.pth")
    sets = ["--train", f"folder:{folder}/train", "--test", f"folder:{folder}/test", "--image-size", "32"]
    photos = [str(folder / "new.png"), str(folder / "bad.png")]
    return ["--weights", str(folder / "t.pth"), *sets, "--k", "4"], photos


def check_printed_predictions(said):
    assert "left out: " in said and "bad.png" in said
    assert re.search(r"new.png: blue, \d+% of the votes \(right in \d+% of \d+ queries", said)
    assert re.search(r"expected calibration error on 12 queries: 0\.\d{3}", said)


def test_predict_names_class_and_share(tmp_path, monkeypatch, capsys):
    """Flat colours are told apart even by a random network; what cannot be read is left out and named."""
    args, photos = make_color_sets(tmp_path)
    argv = ["eval_knn.py", *args, "--predict"]
    monkeypatch.setattr(sys, "argv", [*argv, *photos])
    eval_knn.main()
    check_printed_predictions(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", [*argv, photos[1]])
    with pytest.raises(UserError, match="none of these images can be read"):
        eval_knn.main()
