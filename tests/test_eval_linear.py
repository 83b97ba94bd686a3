"""The linear probe: the grid against single probes and scikit-learn, Meta's heads, resuming, the command."""

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import eval_linear
from config import UserError
from data import normalize
from eval_knn import knn_scores
from eval_linear import RATES, inputs, kinds, read_head, train
from model import SIZES, VisionTransformer


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on two threads of a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(depth=4):
    torch.manual_seed(0)
    return VisionTransformer(
        16, depth, 2, patch_size=8, img_size=32, num_register_tokens=2, init_std=0.2
    ).eval()


def blobs(n=600, d=12, classes=5, seed=0):
    """Classes that overlap a little."""
    rng = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    y = torch.randint(0, classes, (n,), generator=rng)
    return centres[y] + torch.randn(n, d, generator=rng), y


def test_inputs_are_in_the_order_of_the_released_heads():
    """[CLS of the last 4 blocks ; mean patch of the last]; the 1-layer head sees the last 2 D of it."""
    m, x = tiny(depth=6), torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    found = inputs(m, x)
    with torch.no_grad():
        tokens = m.intermediate(normalize(x), range(6))
        last = m(normalize(x))
    for k in range(4):
        torch.testing.assert_close(found[:, 16 * k : 16 * (k + 1)], tokens[2 + k].cls)
    torch.testing.assert_close(found[:, kinds(m)["1 block, CLS"]], last.cls)
    torch.testing.assert_close(found[:, 64:], last.patches.mean(1))
    one = torch.cat([last.cls, last.patches.mean(1)], 1)
    torch.testing.assert_close(found[:, kinds(m)["1 block, CLS + mean"]], one)
    assert [inputs(m, x)[:, p].shape[1] for p in kinds(m).values()] == [16, 32, 64, 80]


def test_a_shallow_network_has_one_block_to_read():
    m = tiny(depth=2)
    assert inputs(m, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 32)
    assert list(kinds(m)) == ["1 block, CLS", "1 block, CLS + mean"]


@pytest.mark.parametrize("kind,r", [("a", 0), ("b", 9), ("b", 12)])
def test_the_grid_is_as_many_single_probes(kind, r, tmp_path):
    """Each equals a plain nn.Linear under torch's own SGD with the same batches and a cosine to zero."""
    x, y = blobs()
    columns, steps, batch = {"a": slice(0, 7), "b": slice(3, 12)}, 40, 64
    weight, bias = train(x, y, 5, columns, steps, batch, tmp_path, "job")[kind]
    start = eval_linear.new_grid(columns, 5, 13)[kind]
    one = torch.nn.Linear(weight.shape[-1], 5)
    one.weight.data, one.bias.data = start[0][r].clone(), start[1][r].clone()
    assert start[0].std().item() == pytest.approx(0.01, rel=0.5) and not start[1].any()
    optimizer = torch.optim.SGD(one.parameters(), lr=RATES[r] * batch / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    for step in range(steps):
        epoch, place = divmod(step, 600 // batch)
        order = torch.randperm(600, generator=torch.Generator().manual_seed(epoch))
        i = order[place * batch :][:batch]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(one(x[i][:, columns[kind]]), y[i]).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(weight[r], one.weight.data, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias[r], one.bias.data, rtol=1e-4, atol=1e-6)


def test_as_good_as_logistic_regression(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (q, truth) = blobs(2000), blobs(2000, seed=1)
    weight, bias = train(x, y, 5, {"a": slice(0, 12)}, 1500, 256, tmp_path, "job")["a"]
    ours = eval_linear.accuracies(q, truth, weight, bias).max().item()
    theirs = linear_model.LogisticRegression(max_iter=2000).fit(x.numpy(), y.numpy())
    theirs = theirs.score(q.numpy(), truth.numpy())
    assert 0.5 < theirs < 0.99 and ours >= theirs - 0.005


def test_knn_predicts_what_scikit_learn_predicts():
    neighbors = pytest.importorskip("sklearn.neighbors")
    (x, y), (q, _) = blobs(), blobs(300, seed=1)
    x, q = torch.nn.functional.normalize(x), torch.nn.functional.normalize(q)
    vote = lambda d: torch.exp(torch.from_numpy(1 - d) / 0.07).numpy()  # noqa: E731
    for k in (1, 10, 50):
        theirs = neighbors.KNeighborsClassifier(k, weights=vote, metric="cosine", algorithm="brute")
        theirs = theirs.fit(x.numpy(), y.numpy()).predict(q.numpy())
        assert knn_scores(x, y, q, 5, ks=(k,))[k].argmax(1).tolist() == theirs.tolist()


class Killed(BaseException):
    pass


def test_a_killed_grid_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    x, y = blobs()
    job = (x, y, 5, {"a": slice(0, 7), "b": slice(3, 12)}, 30, 64)
    whole = train(*job, tmp_path / "whole", "job")
    monkeypatch.setattr(eval_linear, "SAVE_EVERY", -1)  # after every step
    real, calls = eval_linear.sgd_step, iter(range(1000))

    def dying(*args):
        if next(calls) == 33:  # in the middle of a step
            raise Killed
        real(*args)

    monkeypatch.setattr(eval_linear, "sgd_step", dying)
    with pytest.raises(Killed):
        train(*job, tmp_path / "killed", "job")
    assert torch.load(tmp_path / "killed" / "grid.pth", weights_only=True)["step"] == 16
    again = train(*job, tmp_path / "killed", "job")
    assert all(torch.equal(a, b) for k in whole for a, b in zip(whole[k], again[k]))
    with pytest.raises(UserError, match="killed holds another probe, half trained: delete"):
        train(*job, tmp_path / "killed", "another job")


@pytest.mark.parametrize("size", ["vit_small", "vit_base", "vit_large", "vit_giant2"])
def test_metas_heads_are_told_by_their_width(size, tmp_path):
    D = SIZES[size]["embed_dim"]
    backbone = SimpleNamespace(embed_dim=D, blocks=range(SIZES[size]["depth"]))
    for width, part in ((2 * D, slice(3 * D, 5 * D)), (5 * D, slice(0, 5 * D))):
        torch.save({"weight": torch.zeros(1000, width), "bias": torch.zeros(1000)}, tmp_path / "h.pth")
        weight, bias, found, names = read_head(tmp_path / "h.pth", backbone)
        assert found == part and weight.shape == (1000, width) and names[999] == 999


def test_a_head_that_does_not_fit_is_one_sentence(tmp_path):
    file, m = tmp_path / "h.pth", tiny()
    other = "sees 33 numbers, a ViT of width 16.* gives 16, 32, 64, 80: wrong head"
    one_row = {"weight": torch.zeros(10, 32), "bias": torch.zeros(9)}
    for content, said in (
        ({"weight": torch.zeros(10, 33), "bias": torch.zeros(10)}, other),
        ({"weight": torch.zeros(10, 32)}, "no linear head"),
        ([1, 2], "no linear head"),
        (one_row, "no linear head"),
    ):
        torch.save(content, file)
        with pytest.raises(UserError, match=said) as e:
            read_head(file, m)
        assert "\n" not in str(e.value)
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match="no linear head"):
        read_head(file, m)
    with pytest.raises(UserError, match="does not exist: train a probe first"):
        read_head(tmp_path / "nothing.pth", m)


def test_labels_without_a_class(tmp_path):
    x, y = blobs(50)
    with pytest.raises(UserError, match="there is a label 4, but only 3 classes"):
        eval_linear.fit(
            (x, y), (x, y), {"1 block, CLS": slice(0, 12)}, ["a", "b", "c"], 2, 16, tmp_path, "job"
        )


def go(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["eval_linear.py", *map(str, argv)])
    eval_linear.main()
    return capsys.readouterr().out


def test_the_command_trains_keeps_and_predicts(tmp_path, monkeypatch, capsys):
    """On scenes, even a random network's tokens tell the kinds better than chance; its head reads back."""
    torch.save({"teacher": tiny().state_dict(), "arch": {"num_heads": 2}}, tmp_path / "t.pth")
    sets = ["--train", "scenes:300:seed=1", "--test", "scenes:100:seed=2", "--image-size", 32]
    argv = ["--weights", tmp_path / "t.pth", "--out", tmp_path / "probe"]
    said = go(monkeypatch, capsys, *argv, *sets, "--iterations", 200)
    found = float(re.search(r"linear \(.*\)  (0\.\d+)", said)[1])
    assert found > float(re.search(r"chance  (0\.\d+)", said)[1]) and "4 blocks, CLS + mean" in said
    again = go(monkeypatch, capsys, *argv, *sets, "--head", tmp_path / "probe" / "head.pth")
    assert float(re.search(r"top-1 accuracy (0\.\d+)", again)[1]) == found
    told = go(monkeypatch, capsys, *argv, "--image-size", 32, "--predict", "scenes:3:seed=2").splitlines()
    assert len(told) == 3 and all(re.match(r"scene \d: \w+ \d+%, \w+ \d+%, \w+ \d+%$", x) for x in told)
