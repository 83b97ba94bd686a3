"""The linear probe: against autograd, scikit-learn and itself; kills; heads in files; crops; the command."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from config import UserError
from data import normalize
from eval_knn import knn_scores
from evals import linear as eval_linear
from evals.linear import (
    RATES,
    RandomCrops,
    accuracies,
    choose,
    columns,
    cosine,
    count_classes,
    fit,
    inputs,
    new_grid,
    plan,
    read_head,
    read_out,
    sgd_step,
    train,
    write_head,
)
from features import EvalImages
from model import SIZES, VisionTransformer
from scenes import Scenes
from sources import open_source

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(depth=5, seed=0):
    torch.manual_seed(seed)
    how = dict(patch_size=8, img_size=32, num_register_tokens=2, layerscale=1.0, init_std=0.1)
    m = VisionTransformer(32, depth, 2, **how).eval().requires_grad_(False)
    for p in m.parameters():
        if p.ndim > 1:
            p.normal_(std=0.1)  # the same numbers in every PyTorch: those of trunc_normal_ have changed
    return m


def blobs(n, d=12, classes=4, seed=0, spread=1.5):
    """Overlapping clouds: what a linear map can tell apart, up to a point."""
    g = torch.Generator().manual_seed(99)
    centres = torch.randn(classes, d, generator=g)
    g.manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    return centres[y] + spread * torch.randn(n, d, generator=g), y


PARTS = {"left": slice(0, 5), "all": slice(0, 12)}


def kept(x, y, batch_size, iterations):
    def stream(first):
        return ((x[rows], y[rows]) for _, rows in plan(len(x), batch_size, first, iterations))

    return stream


def trained(tmp_path, x, y, iterations=60, batch_size=32, parts=PARTS, stream=None):
    stream, grid = stream or kept(x, y, batch_size, iterations), new_grid(parts, 4)
    return train(grid, parts, stream, iterations, batch_size, tmp_path / "grid.pth", "job")


# ---- training


def test_a_step_is_that_of_autograd(tmp_path):
    """The last rate's probe, all steps, against nn.Linear, cross-entropy and torch.optim.SGD."""
    x, y = blobs(200)
    grid = trained(tmp_path, x, y)
    for kind, part in PARTS.items():
        for r in (0, 9, 12):
            probe = torch.nn.Linear(part.stop, 4)
            first = new_grid(PARTS, 4)[kind]
            probe.load_state_dict({"weight": first[0][r], "bias": first[1][r]})
            sgd = torch.optim.SGD(probe.parameters(), lr=1, momentum=0.9, weight_decay=0)
            for step, (batch, labels) in enumerate(kept(x, y, 32, 60)(0)):
                sgd.param_groups[0]["lr"] = 1.0
                sgd.zero_grad()
                F.cross_entropy(probe(batch[:, part]), labels).backward()
                sgd.param_groups[0]["lr"] = RATES[r] * 32 / 256 * cosine(step, 60)
                sgd.step()
            torch.testing.assert_close(grid[kind][0][r], probe.weight.detach(), atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(grid[kind][1][r], probe.bias.detach(), atol=2e-6, rtol=1e-5)


def test_a_grid_is_its_probes_alone(tmp_path, monkeypatch):
    x, y = blobs(200)
    grid = trained(tmp_path, x, y)
    for r in (3, 12):
        monkeypatch.setattr(eval_linear, "RATES", (RATES[r],))
        (tmp_path / "grid.pth").unlink()
        alone = trained(tmp_path, x, y, parts={"all": PARTS["all"]})["all"]
        for one, many in zip(alone, grid["all"]):
            torch.testing.assert_close(one[0], many[r], atol=1e-6, rtol=1e-6)


def test_the_start_and_the_schedule():
    weight, bias, *momenta = new_grid({"a": slice(0, 400)}, 50)["a"]
    assert weight.shape == (13, 50, 400) and not bias.any() and not any(m.any() for m in momenta)
    assert weight[0].std().item() == pytest.approx(0.01, rel=0.02) and torch.equal(weight[0], weight[12])
    assert cosine(0, 100) == 1 and cosine(50, 100) == pytest.approx(0.5)
    assert cosine(100, 100) == pytest.approx(0) and cosine(99, 100) < 1e-3
    assert len(RATES) == 13 and (RATES[0], RATES[-1]) == (1e-5, 0.1)


def test_an_epoch_shows_everything_once_in_an_order_of_its_own():
    batches = list(plan(20, 6, 0, 9))  # three batches to an epoch
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    epochs = [torch.cat([rows for e, rows in batches if e == k]).tolist() for k in range(3)]
    assert all(len(set(rows)) == 18 for rows in epochs) and epochs[0] != epochs[1] != epochs[2]
    again = list(plan(20, 6, 4, 9))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(batches[4:], again, strict=True))


class Killed(Exception):
    pass


def test_a_killed_job_ends_with_the_same_bits(tmp_path, monkeypatch):
    x, y = blobs(100)
    whole = trained(tmp_path, x, y, 30)
    (tmp_path / "grid.pth").unlink()
    monkeypatch.setattr(eval_linear, "SAVE_EVERY", -1)
    starts = []

    def until(last):
        def stream(first):
            starts.append(first)
            for step, batch in enumerate(kept(x, y, 32, 30)(first), first):
                if step == last:
                    raise Killed
                yield batch

        return stream

    for last in (7, 19):
        with pytest.raises(Killed):
            trained(tmp_path, x, y, 30, stream=until(last))
    again = trained(tmp_path, x, y, 30, stream=until(None))
    assert starts == [0, 7, 19]
    assert all(torch.equal(a, b) for kind in whole for a, b in zip(whole[kind], again[kind]))
    assert trained(tmp_path, x, y, 30, stream=until(0))["all"][0].equal(whole["all"][0])  # nothing left to do
    for other in ("its job", b"torn"):
        if isinstance(other, bytes):
            (tmp_path / "grid.pth").write_bytes(other)
        with pytest.raises(UserError, match="grid.pth is half a probe of other images"):
            train(new_grid(PARTS, 4), PARTS, until(None), 30, 32, tmp_path / "grid.pth", "another")


def test_choose_takes_the_first_of_the_best(capsys):
    x, y = torch.eye(4), torch.arange(4)
    weight, bias = torch.zeros(13, 4, 4), torch.zeros(13, 4)
    weight[5] = weight[8] = torch.eye(4)
    grid = {"a": [torch.zeros(13, 4, 4), bias], "b": [weight, bias], "c": [weight, bias]}
    whole = slice(0, 4)
    assert choose(grid, dict(a=whole, b=whole, c=whole), x, y) == ("b", 5)
    said = capsys.readouterr().out
    assert "best: b, rate 0.0005\n" in said and said.count("0.250") == 13 + 11 + 11
    weight[5] = weight[8] = 0
    weight[12] = torch.eye(4)
    assert choose(grid, dict(c=whole), x, y) == ("c", 12)
    assert "the highest: more --iterations may help" in capsys.readouterr().out


# ---- against scikit-learn, on the same features


@pytest.fixture(scope="module")
def sights():
    """What a small random network sees of 700 scenes: inputs (n, 5 D), labels; the last 300 are tests."""
    m = tiny()
    x, y, _ = read_out(m, EvalImages(Scenes(700, seed=3, size=32), 32))
    return m, x, y


def test_as_good_as_logistic_regression(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (q, truth) = blobs(600), blobs(4000, seed=1)
    grid = trained(tmp_path, x, y, iterations=600)
    ours = max(accuracies(q, truth, *grid["all"][:2]))
    best = max(linear_model.LogisticRegression(C=c).fit(x, y).score(q, truth) for c in (0.01, 0.1, 1, 10))
    assert 0.6 < best < 0.95 and ours >= best - 0.005
    first = max(accuracies(q, truth, *trained(tmp_path / "1", x, y, iterations=1)["all"][:2]))
    assert first < best - 0.05  # the bar can be missed


def test_as_good_as_logistic_regression_on_scenes(sights, tmp_path):
    """Features of a network, standardised (those of a random one differ too little for SGD to move)."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    m, x, y = sights
    x = (x - x[:400].mean(0)) / x[:400].std(0)
    part = {"4 blocks, CLS + mean": columns(m)["4 blocks, CLS + mean"]}
    grid = train(new_grid(part, 10), part, kept(x[:400], y[:400], 64, 800), 800, 64, tmp_path / "g.pth", "")
    ours = max(accuracies(x[400:], y[400:], *grid["4 blocks, CLS + mean"][:2]))
    models = [linear_model.LogisticRegression(C=c, max_iter=400) for c in (0.003, 0.03, 0.3)]
    best = max(model.fit(x[:400], y[:400]).score(x[400:], y[400:]) for model in models)
    assert best > 0.15 and ours >= best - 0.005


@pytest.mark.parametrize("k", [5, 20])
def test_knn_says_what_scikit_learn_says(sights, k):
    """The published vote in its words: cosine, neighbours weighted by exp(similarity / 0.07)."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    m, x, y = sights
    cls = F.normalize(x[:, columns(m)["1 block, CLS"]].double(), dim=-1)
    bank, queries = cls[:400], cls[400:]
    theirs = neighbors.KNeighborsClassifier(
        k, metric="euclidean", weights=lambda d: torch.from_numpy((1 - d**2 / 2) / 0.07).exp().numpy()
    ).fit(bank.numpy(), y[:400].numpy())
    ours = knn_scores(bank.float(), y[:400], queries.float(), 10, ks=(k,))[k]
    assert ours.argmax(-1).tolist() == theirs.predict(queries.numpy()).tolist()
    torch.testing.assert_close(
        ours.double(), torch.from_numpy(theirs.predict_proba(queries.numpy())), atol=1e-4, rtol=0
    )


# ---- what a probe sees, and Meta's heads


def test_inputs_are_the_last_four_blocks_in_order_then_the_mean():
    """By hand, with hooks: the output of each block, the final norm, and what lies where in it."""
    m, seen = tiny(), []
    hooks = [b.register_forward_hook(lambda block, args, out: seen.append(out)) for b in m.blocks]
    pixels = torch.stack([EvalImages(Scenes(3, 0, 32), 32)[i][0] for i in range(3)])
    x = inputs(m, pixels)
    blocks = [m.norm(out).view(3, 1 + 2 + 16, 32) for out in seen]
    expected = torch.cat([b[:, 0] for b in blocks[1:]] + [blocks[4][:, 3:].mean(1)], 1)
    torch.testing.assert_close(x, expected)
    seen.clear()
    short = tiny(depth=3)
    for hook in hooks:
        hook.remove()
    tokens = short(normalize(pixels))
    torch.testing.assert_close(inputs(short, pixels), torch.cat([tokens.cls, tokens.patches.mean(1)], 1))
    kinds = columns(m)
    assert list(kinds) == ["1 block, CLS", "1 block, CLS + mean", "4 blocks, CLS", "4 blocks, CLS + mean"]
    torch.testing.assert_close(x[:, kinds["1 block, CLS"]], blocks[4][:, 0])
    last = torch.cat([blocks[4][:, 0], blocks[4][:, 3:].mean(1)], 1)
    torch.testing.assert_close(x[:, kinds["1 block, CLS + mean"]], last)
    torch.testing.assert_close(x[:, kinds["4 blocks, CLS"]], expected[:, :128])
    assert list(columns(short)) == list(kinds)[:2]
    assert inputs(short, pixels)[:, columns(short)["1 block, CLS"]].equal(tokens.cls)


@pytest.mark.parametrize("size", ["vit_small", "vit_base", "vit_large", "vit_giant2"])
@pytest.mark.parametrize("layers", [1, 4])
def test_metas_heads_of_all_sizes(size, layers, tmp_path):
    """A head of the released shape sees the columns that Meta's code would give it."""
    with torch.device("meta"):
        m = VisionTransformer(**SIZES[size])
    m.state_dict = dict  # its numbers are nowhere
    D, file = m.embed_dim, tmp_path / f"{size}_linear_head.pth"
    torch.save({"weight": torch.randn(1000, (1 + layers) * D), "bias": torch.randn(1000)}, file)
    weight, bias, part, about = read_head(file, m)
    assert weight.shape == (1000, (1 + layers) * D) and bias.shape == (1000,) and about == {}
    assert (part.start, part.stop) == ((3 * D, 5 * D) if layers == 1 else (0, 5 * D))
    other = VisionTransformer(48, 4, 2)
    said = (
        rf"{(1 + layers) * D} numbers \(as for a width of {D}\), but a .*width 48.* gives 96 or 240: this is"
    )
    with pytest.raises(UserError, match=said):
        read_head(file, other)


def test_a_head_as_wide_as_another_input_is_not_taken_for_it(tmp_path):
    """Meta's head of 1 layer for B has 1536 columns: as many as S has in [CLS] of 4 blocks."""
    with torch.device("meta"):
        m = VisionTransformer(**SIZES["vit_small"])
    torch.save({"weight": torch.zeros(9, 1536), "bias": torch.zeros(9)}, tmp_path / "h.pth")
    with pytest.raises(UserError, match="as for a width of 768"):
        read_head(tmp_path / "h.pth", m)


def test_what_is_no_head(tmp_path):
    m, file = tiny(), tmp_path / "h.pth"
    with pytest.raises(UserError, match="there is no head at .*h.pth: train one first"):
        read_head(file, m)
    weight = torch.zeros(3, 64)
    for content in ({"weight": weight}, {"weight": weight, "bias": torch.zeros(4)}, m.state_dict()):
        torch.save(content, file)
        with pytest.raises(UserError, match=r"no head of weight \(C, d\) and bias \(C,\)"):
            read_head(file, m)
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match="h.pth is no file of plain tensors"):
        read_head(file, m)


def test_a_head_knows_its_input_and_its_backbone(tmp_path):
    m, file = tiny(), tmp_path / "h.pth"
    head = dict(weight=torch.randn(3, 32), bias=torch.randn(3))
    about = dict(
        input="1 block, CLS", backbone=eval_linear.identity(m), weights="runs/a", classes=list("abc")
    )
    write_head(file, head, about)
    weight, bias, part, read = read_head(file, m)
    assert weight.equal(head["weight"]) and bias.equal(head["bias"]) and read == about
    assert part == columns(m)["1 block, CLS"]
    assert set(torch.load(file, weights_only=True)) == {"weight", "bias"}  # bare, as Meta's
    with pytest.raises(UserError, match="belongs to other weights, runs/a"):
        read_head(file, tiny(seed=1))


# ---- crops on the fly


def test_crops_are_a_function_of_epoch_and_image():
    images = EvalImages(Scenes(5, 0, 64), 32, limit=3)
    crops = RandomCrops(images)
    a, label = crops[0, 2]
    assert a.shape == (3, 32, 32) and a.dtype == torch.uint8 and label == images[2][1]
    assert a.equal(RandomCrops(images)[0, 2][0]) and not a.equal(crops[1, 2][0])
    assert not a.equal(crops[0, 1][0])


def test_crops_are_the_published_ones(tmp_path):
    """Red left half, green right half, and a ramp downwards: how much a crop shows, and if it is mirrored."""
    picture = Image.new("RGB", (64, 64))
    picture.putdata([(255 * (x < 32), 255 * (x >= 32), 4 * y) for y in range(64) for x in range(64)])
    (tmp_path / "a").mkdir()
    picture.save(tmp_path / "a" / "0.png")
    crops = RandomCrops(EvalImages(open_source(f"folder:{tmp_path}"), 64))
    ramps, mirrored = [], []
    for epoch in range(150):
        x = crops[epoch, 0][0].float()
        ramps.append((x[2, -1].mean() - x[2, 0].mean()).item() / 252)  # how much of the height
        if x[0].mean() > 40 and x[1].mean() > 40:
            mirrored.append(x[0, :, 0].mean() < 128)
    assert min(ramps) < 0.4 and max(ramps) > 0.9 and 0.6 < sum(ramps) / 150 < 0.8
    assert 0.3 < sum(mirrored) / len(mirrored) < 0.7


def test_training_on_crops(tmp_path, monkeypatch):
    """Each batch is the backbone's view of the crops of that step; the held-out images are not among them."""
    monkeypatch.setattr(eval_linear, "RATES", RATES[-1:])
    m, bank = tiny(), EvalImages(Scenes(20, 0, 32), 32)
    seen = []
    monkeypatch.setattr(eval_linear, "sgd_step", lambda x, y, *_: seen.append((x, y)))
    monkeypatch.setattr(eval_linear, "columns", lambda b: {"1 block, CLS": slice(0, 160)})
    fit(m, bank, bank, tmp_path / "g.pth", 4, 9, augment=True)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[2:]
    assert len(seen) == 4
    for (x, y), (epoch, rows) in zip(seen, plan(18, 9, 0, 4)):
        crops = [RandomCrops(bank)[epoch, int(i)] for i in order[rows]]
        torch.testing.assert_close(x, inputs(m, torch.stack([c for c, _ in crops])))
        assert y.tolist() == [label for _, label in crops]


# ---- all of it


def test_fit_chooses_on_held_out_training_images(tmp_path, monkeypatch):
    """What is trained on, chosen on and reported are three sets, and a resumed fit is the same."""
    m, calls = tiny(), []
    bank, queries = EvalImages(Scenes(60, 1, 32), 32), EvalImages(Scenes(30, 2, 32), 32)
    x, y, numbers = read_out(m, bank)
    monkeypatch.setattr(eval_linear, "choose", lambda g, p, x, y: calls.append((x, y)) or choose(g, p, x, y))
    result = fit(m, bank, queries, tmp_path / "g.pth", 40, 16)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(calls[0][0], x[order[:6]]) and torch.equal(calls[0][1], y[order[:6]])
    q, truth, _ = read_out(m, queries)
    head, part = result["head"], columns(m)[result["input"]]
    right = ((q[:, part] @ head["weight"].T + head["bias"]).argmax(-1) == truth).float().mean().item()
    assert result["linear"] == right and result["rate"] in RATES and numbers.tolist() == list(range(60))
    again = fit(m, bank, queries, tmp_path / "g.pth", 40, 16)
    assert again.pop("head")["weight"].equal(result.pop("head")["weight"]) and again == result
    for backbone, iterations in ((tiny(seed=1), 40), (m, 41)):
        with pytest.raises(UserError, match="delete it"):
            fit(backbone, bank, queries, tmp_path / "g.pth", iterations, 16)


def test_the_bias_counts(tmp_path, monkeypatch):
    """Whatever the image, a probe with a large bias names its class; and that is reported."""
    m, scenes = tiny(), EvalImages(Scenes(30, 2, 32), 32)
    one = {"1 block, CLS": columns(m)["1 block, CLS"]}
    grid = new_grid(one, 10)
    grid["1 block, CLS"][1][:, 7] = 1e6
    monkeypatch.setattr(eval_linear, "columns", lambda backbone: one)
    monkeypatch.setattr(eval_linear, "train", lambda *_: grid)
    sevens = sum(scenes[i][1] == 7 for i in range(30)) / 30
    result = fit(m, scenes, scenes, tmp_path / "g.pth", 1, 8)
    assert 0 < sevens < 0.5 and result["linear"] == pytest.approx(sevens)


def test_what_has_no_label_or_no_pixels_is_left_out(tmp_path):
    """Numbers say which images the rows are of: crops are drawn from those."""
    lines = []
    for i, label in enumerate([0, None, 1, 0, None, 1]):
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps(dict(path=f"{i}.png") | (dict(label=label) if label is not None else {})))
    (tmp_path / "3.png").write_bytes(b"broken")
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    images = EvalImages(open_source(f"list:{tmp_path}/list.jsonl"), 32)
    x, y, numbers = read_out(tiny(), images, batch_size=2)
    assert y.tolist() == [0, 1, 1] and numbers.tolist() == [0, 2, 5] and x.shape == (3, 160)


def test_labels_that_cannot_be(tmp_path):
    """Too few, all the same, unknown to the training set, and numbers that are no class."""
    bank = EvalImages(Scenes(4, 0, 32), 32)
    ten = torch.arange(10)
    assert count_classes(bank, ten, ten) == 10
    for y, truth, said in (
        (ten, ten + 1, "there is a label 10, but the training images have 10 classes"),
        (torch.arange(9), ten, "9 training images of 9 classes: 10 of 2 are the least"),
        (torch.zeros(30).long(), ten, "30 training images of 1 classes"),
    ):
        with pytest.raises(UserError, match=said):
            count_classes(bank, y, truth)
    bank.dataset.classes = None  # labels are bare numbers, from .cls files
    assert count_classes(bank, ten, ten[:3]) == 10
    with pytest.raises(UserError, match="label 20, but the training images have 10 classes, 0 to 9"):
        count_classes(bank, ten, torch.tensor([20]))
    with pytest.raises(UserError, match="there is a label 7000000000: number the classes from 0 on"):
        count_classes(bank, torch.tensor([7_000_000_000, *range(10)]), ten)


@pytest.fixture
def colours(tmp_path):
    """Flat colours in folders by name, and weights: -> the start of a command line."""
    for kind, colour in (("blue", (30, 30, 180)), ("red", (180, 30, 30))):
        for split in ("train", "test"):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(12):
                picture = Image.new("RGB", (40, 30), tuple(c + 5 * i for c in colour))
                picture.save(tmp_path / split / kind / f"{i}.png")
    (tmp_path / "train" / "red" / "3.png").write_bytes(b"broken")
    Image.new("RGB", (33, 60), (35, 33, 210)).save(tmp_path / "new.png")
    (tmp_path / "bad.png").write_bytes(b"broken")
    (tmp_path / "config.yaml").write_text("train: {num_workers: 0}\n")
    torch.save({"teacher": tiny().state_dict(), "arch": {"num_heads": 2}}, tmp_path / "t.pth")
    return ["eval_linear.py", "--weights", str(tmp_path / "t.pth"), "--out", str(tmp_path / "out")]


def test_the_command(colours, tmp_path, monkeypatch, capsys):
    def say(*words):
        monkeypatch.setattr(sys, "argv", [*colours, *map(str, words)])
        eval_linear.main()
        return capsys.readouterr().out

    sets = ["--train", f"folder:{tmp_path}/train", "--test", f"folder:{tmp_path}/test", "--image-size", "32"]
    said = say(*sets, "--iterations", "150", "--batch-size", "16")
    assert "24 training images, 24 test images" in said and "left out:" in said and "red/3.png" in said
    table = {
        k: re.search(rf"{k} +([\d. ]+)\n", said)[1].split()
        for k in ("this backbone", "random initialisation", "chance")
    }
    assert table["this backbone"][0] == "1.000" and table["chance"] == ["0.500"]
    assert len(table["random initialisation"]) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["head.json", "head.pth"]
    about = json.loads((tmp_path / "out" / "head.json").read_text())
    assert about["classes"] == ["blue", "red"] and about["pixels"] == [32, 32] and about["linear"] == 1
    sizes, seen = [], eval_linear.inputs
    monkeypatch.setattr(eval_linear, "inputs", lambda b, x: sizes.append(x.shape[2]) or seen(b, x))
    said = say("--predict", tmp_path / "new.png", tmp_path / "bad.png")
    assert sizes == [32]  # as it was trained
    assert re.search(r"new.png: blue \d+\.\d%, red \d+\.\d%\n", said) and "left out: " in said
    head = tmp_path / "out" / "head.pth"
    assert "top-1 accuracy 1.000 on 24 images" in say("--head", head, "--test", f"folder:{tmp_path}/test")
    with pytest.raises(UserError, match="none of these images can be read"):
        say("--predict", tmp_path / "bad.png")
    torch.save({"weight": torch.zeros(7, 160), "bias": torch.eye(7)[3]}, tmp_path / "seven.pth")
    said = say("--head", tmp_path / "seven.pth", "--predict", tmp_path / "new.png", "--image-size", 32)
    assert "new.png: 3 31.2%, " in said  # a head without names tells numbers
    with pytest.raises(UserError, match="the head names 7 classes, the test images 2"):
        say("--head", tmp_path / "seven.pth", *sets)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x cannot be written"):
        say(*sets, "--out", tmp_path / "file" / "x")


def test_a_killed_command_goes_on(colours, tmp_path, monkeypatch, capsys):
    sets = ["--train", f"folder:{tmp_path}/train", "--test", f"folder:{tmp_path}/test", "--image-size", "32"]
    monkeypatch.setattr(eval_linear, "SAVE_EVERY", -1)
    monkeypatch.setattr(sys, "argv", [*colours, *sets, "--iterations", "30", "--no-baseline"])
    eval_linear.main()
    whole, steps = torch.load(tmp_path / "out" / "head.pth"), []

    def dying(x, y, state, rates):
        steps.append(1)
        if len(steps) == 4 * 20:
            raise KeyboardInterrupt
        sgd_step(x, y, state, rates)

    monkeypatch.setattr(eval_linear, "sgd_step", dying)
    (tmp_path / "out" / "head.pth").unlink()
    with pytest.raises(KeyboardInterrupt):
        eval_linear.main()
    assert (tmp_path / "out" / "grid.pth").exists() and not (tmp_path / "out" / "head.pth").exists()
    eval_linear.main()
    assert len(steps) == 4 * 20 + 4 * 11  # 19 steps were done
    again = torch.load(tmp_path / "out" / "head.pth")
    assert again["weight"].equal(whole["weight"]) and again["bias"].equal(whole["bias"])
    assert "random" not in capsys.readouterr().out
