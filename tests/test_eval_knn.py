"""Weighted k-NN against the authors' (tests/golden), and the command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import close

from eval_knn import chance, knn_accuracy, knn_scores

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
    assert chance(torch.tensor([0, 0, 0, 1])) == pytest.approx(0.75)
