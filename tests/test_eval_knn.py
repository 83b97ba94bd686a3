"""Weighted k-NN against the authors' (tests/golden), and the command."""

import sys

import pytest
import torch
from helpers import assert_close, check_printed_predictions, load_golden, make_color_sets

import eval_knn
from config import UserError
from eval_knn import calibration, knn_accuracy, knn_predict, knn_scores, majority_accuracy

KS = (5, 10, 20, 100)
BANK = torch.eye(4).repeat(3, 1)  # three times each of four directions,
LABELS = torch.arange(4).repeat(3)  # a class each


def test_votes_are_the_authors():
    golden = load_golden("j_knn")
    labels = golden["train_labels"].long()
    scores = knn_scores(golden["train_features"], labels, golden["test_features"], 10, ks=KS, chunk=7)
    for k in KS:
        assert_close(scores[k], golden[f"scores_k{k}"])


def test_accuracy_and_small_banks():
    found = knn_accuracy(BANK, LABELS, torch.eye(4), torch.arange(4), ks=(1, 3, 200))
    assert found == {1: 1.0, 3: 1.0, 12: 1.0}
    assert majority_accuracy(torch.tensor([0, 0, 0, 1])) == pytest.approx(0.75)


def test_votes_sum_to_one_and_name_the_voters():
    predicted, share, neighbours = knn_predict(BANK, LABELS, 5 * torch.eye(4), k=3)
    assert predicted.tolist() == [0, 1, 2, 3]
    assert LABELS[neighbours].tolist() == [[label] * 3 for label in range(4)]
    torch.testing.assert_close(share, torch.ones(4))
    _, share, _ = knn_predict(BANK, LABELS, torch.ones(1, 4), k=12)  # as near to all
    torch.testing.assert_close(share, torch.tensor([0.25]))


def test_calibration_against_a_loop():
    torch.manual_seed(0)
    share = torch.rand(500)
    right = torch.rand(500) < share**2
    error, table = calibration(share, right, bins=5)
    expected = 0
    for i, (mean_share, accuracy, count) in enumerate(table):
        in_bin = [case for case in range(500) if i / 5 <= share[case] < (i + 1) / 5]
        assert count == len(in_bin)
        assert mean_share == pytest.approx(share[in_bin].mean().item(), abs=1e-6)
        assert accuracy == pytest.approx(right[in_bin].float().mean().item())
        expected += count / 500 * abs(mean_share - accuracy)
    assert error == pytest.approx(expected, abs=1e-6)
    assert error > 0.1


def test_calibration_of_the_honest_and_of_the_liar():
    right_half_of_the_time = torch.arange(100) % 2 == 0
    error, _ = calibration(torch.full((100,), 0.5), right_half_of_the_time)
    assert error == pytest.approx(0)
    error, table = calibration(torch.ones(100), right_half_of_the_time)
    assert error == pytest.approx(0.5)
    assert table[-1] == (1.0, 0.5, 100)  # 1.0 lies in the last bin, not behind it


def test_predict_names_class_and_share(tmp_path, monkeypatch, capsys):
    """Even a random network tells flat colours apart; an unreadable image is left out and named."""
    args, photos = make_color_sets(tmp_path)
    argv = ["eval_knn.py", *args, "--predict"]
    monkeypatch.setattr(sys, "argv", [*argv, *photos])
    eval_knn.main()
    check_printed_predictions(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", [*argv, photos[1]])
    with pytest.raises(UserError, match="none of these images can be read"):
        eval_knn.main()
