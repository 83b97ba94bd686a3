"""The linear probe: against autograd, scikit-learn and itself; kills; heads in files; crops; the command."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_backbone, write_flat_images
from PIL import Image

from config import UserError
from data import normalize
from eval_knn import knn_scores
from evals import linear
from evals.dense import weights_digest
from evals.linear import (
    LEARNING_RATES,
    RandomCrops,
    backbone_fingerprint,
    cosine_decay,
    fit_and_test,
    init_probes,
    input_slices,
    labelled_features,
    probe_accuracies,
    probe_features,
    read_linear_head,
    resume_probes,
    select_probe,
    sgd_step,
    shuffled_batches,
    train_probes,
    write_linear_head,
)
from features import EvalImages, open_backbone
from model import SIZES, VisionTransformer
from scenes import Scenes
from sources import open_source

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(depth=5, seed=0):
    torch.manual_seed(seed)
    options = dict(patch_size=8, img_size=32, num_register_tokens=2, layerscale=1.0, init_std=0.1)
    backbone = VisionTransformer(32, depth, 2, **options).eval().requires_grad_(False)
    for p in backbone.parameters():
        if p.ndim > 1:
            p.normal_(std=0.1)  # the same numbers in every PyTorch: those of trunc_normal_ have changed
    return backbone


def blobs(n, d=12, classes=4, seed=0, spread=1.5):
    """Overlapping clouds: what a linear map can tell apart, up to a point."""
    generator = torch.Generator().manual_seed(99)
    centres = torch.randn(classes, d, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, d, generator=generator), labels


SLICES = {"left": slice(0, 5), "all": slice(0, 12)}


def stored_batches(features, labels, batch_size, iterations):
    def batches_from(first):
        for _, rows in shuffled_batches(len(features), batch_size, first, iterations):
            yield features[rows], labels[rows]

    return batches_from


def trained(tmp_path, features, labels, iterations=60, batch_size=32, slices=SLICES, batches_from=None):
    if batches_from is None:
        batches_from = stored_batches(features, labels, batch_size, iterations)
    file = tmp_path / "grid.pth"
    return train_probes(init_probes(slices, 4), slices, batches_from, iterations, batch_size, file, "job")


# ---- training


def test_a_step_is_that_of_autograd(tmp_path):
    """Some rates' probes, all steps, against nn.Linear, cross-entropy and torch.optim.SGD."""
    features, labels = blobs(200)
    probes = trained(tmp_path, features, labels)
    for name, columns in SLICES.items():
        for r in (0, 9, 12):
            probe = torch.nn.Linear(columns.stop, 4)
            weight, bias, *_ = init_probes(SLICES, 4)[name]
            probe.load_state_dict({"weight": weight[r], "bias": bias[r]})
            sgd = torch.optim.SGD(probe.parameters(), lr=1, momentum=0.9, weight_decay=0)
            for step, (batch, batch_labels) in enumerate(stored_batches(features, labels, 32, 60)(0)):
                sgd.zero_grad()
                F.cross_entropy(probe(batch[:, columns]), batch_labels).backward()
                sgd.param_groups[0]["lr"] = LEARNING_RATES[r] * 32 / 256 * cosine_decay(step, 60)
                sgd.step()
            weight, bias, *_ = probes[name]
            torch.testing.assert_close(weight[r], probe.weight.detach(), atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(bias[r], probe.bias.detach(), atol=2e-6, rtol=1e-5)


def test_a_grid_is_its_probes_alone(tmp_path, monkeypatch):
    features, labels = blobs(200)
    probes = trained(tmp_path, features, labels)
    for r in (3, 12):
        monkeypatch.setattr(linear, "LEARNING_RATES", (LEARNING_RATES[r],))
        (tmp_path / "grid.pth").unlink()
        alone = trained(tmp_path, features, labels, slices={"all": SLICES["all"]})
        for one, many in zip(alone["all"], probes["all"]):
            torch.testing.assert_close(one[0], many[r], atol=1e-6, rtol=1e-6)


def test_the_start_and_the_schedule():
    weight, bias, weight_momentum, bias_momentum = init_probes({"a": slice(0, 400)}, 50)["a"]
    assert weight.shape == (13, 50, 400)
    assert weight[0].std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(weight[0], weight[12])
    assert not bias.any() and not weight_momentum.any() and not bias_momentum.any()
    assert cosine_decay(0, 100) == 1
    assert cosine_decay(50, 100) == pytest.approx(0.5)
    assert cosine_decay(99, 100) < 1e-3
    assert cosine_decay(100, 100) == pytest.approx(0)
    assert len(LEARNING_RATES) == 13
    assert LEARNING_RATES[0] == 1e-5 and LEARNING_RATES[-1] == 0.1


def test_an_epoch_shows_everything_once_in_an_order_of_its_own():
    batches = list(shuffled_batches(20, 6, 0, 9))  # three batches to an epoch
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    orders = []
    for start in (0, 3, 6):
        order = torch.cat([rows for _, rows in batches[start : start + 3]]).tolist()
        assert len(set(order)) == 18
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    resumed = list(shuffled_batches(20, 6, 4, 9))
    for (_, rows), (_, resumed_rows) in zip(batches[4:], resumed, strict=True):
        assert torch.equal(rows, resumed_rows)


class Killed(Exception):
    pass


def test_a_killed_job_ends_with_the_same_bits(tmp_path, monkeypatch):
    features, labels = blobs(100)
    whole = trained(tmp_path, features, labels, 30)
    file = tmp_path / "grid.pth"
    file.unlink()
    monkeypatch.setattr(linear, "SAVE_EVERY", -1)
    starts = []

    def killed_at(last):
        def batches_from(first):
            starts.append(first)
            for step, batch in enumerate(stored_batches(features, labels, 32, 30)(first), first):
                if step == last:
                    raise Killed
                yield batch

        return batches_from

    for last in (7, 19):
        with pytest.raises(Killed):
            trained(tmp_path, features, labels, 30, batches_from=killed_at(last))
    again = trained(tmp_path, features, labels, 30, batches_from=killed_at(None))
    assert starts == [0, 7, 19]
    for name in whole:
        assert all(torch.equal(x, y) for x, y in zip(whole[name], again[name]))
    finished = trained(tmp_path, features, labels, 30, batches_from=killed_at(0))  # nothing left to do
    assert finished["all"][0].equal(whole["all"][0])
    for content in (file.read_bytes(), b"torn"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="grid.pth holds a half-trained probe of other images"):
            train_probes(init_probes(SLICES, 4), SLICES, killed_at(None), 30, 32, file, "another job")


def test_the_first_of_the_best_is_selected(capsys):
    features = torch.eye(4)
    labels = torch.arange(4)
    whole = slice(0, 4)
    weight = torch.zeros(13, 4, 4)
    bias = torch.zeros(13, 4)
    weight[5] = torch.eye(4)
    weight[8] = torch.eye(4)
    probes = {"a": [torch.zeros(13, 4, 4), bias], "b": [weight, bias], "c": [weight, bias]}
    assert select_probe(probes, dict(a=whole, b=whole, c=whole), features, labels) == ("b", 5)
    printed = capsys.readouterr().out
    assert "best: b, rate 0.0005\n" in printed
    assert printed.count("0.250") == 13 + 11 + 11
    weight.zero_()
    weight[12] = torch.eye(4)
    assert select_probe(probes, dict(c=whole), features, labels) == ("c", 12)
    assert "the highest: more --iterations may help" in capsys.readouterr().out


# ---- against scikit-learn, on the same features


@pytest.fixture(scope="module")
def scene_features():
    """A small random network, and its features (700, 5 D) and labels of scenes; the last 300 are tests."""
    backbone = tiny()
    features, labels, _ = labelled_features(backbone, EvalImages(Scenes(700, seed=3, size=32), 32))
    return backbone, features, labels


def best_accuracy(features, labels, probes):
    weight, bias, *_ = probes
    return max(probe_accuracies(features, labels, weight, bias))


def test_as_good_as_logistic_regression(tmp_path):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(600)
    test_features, test_labels = blobs(4000, seed=1)
    probes = trained(tmp_path, features, labels, iterations=600)
    ours = best_accuracy(test_features, test_labels, probes["all"])
    models = [linear_model.LogisticRegression(C=c).fit(features, labels) for c in (0.01, 0.1, 1, 10)]
    theirs = max(model.score(test_features, test_labels) for model in models)
    assert 0.6 < theirs < 0.95
    assert ours >= theirs - 0.005
    barely = trained(tmp_path / "1", features, labels, iterations=1)
    assert best_accuracy(test_features, test_labels, barely["all"]) < theirs - 0.05  # the bar can be missed


def test_as_good_as_logistic_regression_on_scenes(scene_features, tmp_path):
    """Features of a network, standardised (those of a random one differ too little for SGD to move)."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    backbone, features, labels = scene_features
    features = (features - features[:400].mean(0)) / features[:400].std(0)
    train_labels = labels[:400]
    test_labels = labels[400:]
    name = "4 blocks, CLS + mean"
    slices = {name: input_slices(backbone)[name]}
    batches_from = stored_batches(features[:400], train_labels, 64, 800)
    probes = train_probes(init_probes(slices, 10), slices, batches_from, 800, 64, tmp_path / "g.pth", "")
    ours = best_accuracy(features[400:], test_labels, probes[name])
    models = [linear_model.LogisticRegression(C=c, max_iter=400) for c in (0.003, 0.03, 0.3)]
    theirs = max(m.fit(features[:400], train_labels).score(features[400:], test_labels) for m in models)
    assert theirs > 0.15
    assert ours >= theirs - 0.005


@pytest.mark.parametrize("k", [5, 20])
def test_knn_agrees_with_scikit_learn(scene_features, k):
    """The published vote in its words: cosine, neighbours weighted by exp(similarity / 0.07)."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    backbone, features, labels = scene_features
    cls = F.normalize(features[:, input_slices(backbone)["1 block, CLS"]].double(), dim=-1)
    bank = cls[:400]
    queries = cls[400:]

    def vote_weights(distance):  # between unit vectors
        similarity = torch.from_numpy(1 - distance**2 / 2)
        return (similarity / 0.07).exp().numpy()

    knn = neighbors.KNeighborsClassifier(k, metric="euclidean", weights=vote_weights)
    knn.fit(bank.numpy(), labels[:400].numpy())
    ours = knn_scores(bank.float(), labels[:400], queries.float(), 10, ks=(k,))[k]
    assert ours.argmax(-1).tolist() == knn.predict(queries.numpy()).tolist()
    theirs = torch.from_numpy(knn.predict_proba(queries.numpy()))
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)


# ---- the features that a probe reads, and Meta's heads


def test_features_are_the_last_four_blocks_in_order_then_the_mean():
    """By hand, with hooks: the output of each block, the final norm, and what lies where in it."""
    backbone = tiny()
    outputs = []
    hooks = []
    for block in backbone.blocks:
        hooks.append(block.register_forward_hook(lambda block, args, output: outputs.append(output)))
    scenes = EvalImages(Scenes(3, 0, 32), 32)
    pixels = torch.stack([scenes[i][0] for i in range(3)])
    features = probe_features(backbone, pixels)
    for hook in hooks:
        hook.remove()
    blocks = [backbone.norm(output).view(3, 1 + 2 + 16, 32) for output in outputs]
    cls = [block[:, 0] for block in blocks]
    mean_patch = blocks[4][:, 3:].mean(1)
    torch.testing.assert_close(features, torch.cat([*cls[1:], mean_patch], 1))
    slices = input_slices(backbone)
    names = ["1 block, CLS", "1 block, CLS + mean", "4 blocks, CLS", "4 blocks, CLS + mean"]
    assert list(slices) == names
    expected = (cls[4], torch.cat([cls[4], mean_patch], 1), torch.cat(cls[1:], 1), features)
    for name, part in zip(names, expected):
        torch.testing.assert_close(features[:, slices[name]], part)


def test_features_of_a_short_network_are_its_last_block():
    backbone = tiny(depth=3)
    scenes = EvalImages(Scenes(3, 0, 32), 32)
    pixels = torch.stack([scenes[i][0] for i in range(3)])
    tokens = backbone(normalize(pixels))
    features = probe_features(backbone, pixels)
    torch.testing.assert_close(features, torch.cat([tokens.cls, tokens.patches.mean(1)], 1))
    slices = input_slices(backbone)
    assert list(slices) == ["1 block, CLS", "1 block, CLS + mean"]
    assert features[:, slices["1 block, CLS"]].equal(tokens.cls)
    assert features[:, slices["1 block, CLS + mean"]].equal(features)


def weightless(size):
    """A backbone of that size whose tensors exist nowhere."""
    with torch.device("meta"):
        backbone = VisionTransformer(**SIZES[size])
    backbone.state_dict = dict
    return backbone


@pytest.mark.parametrize("size", ["vit_small", "vit_base", "vit_large", "vit_giant2"])
@pytest.mark.parametrize("layers", [1, 4])
def test_metas_heads_of_all_sizes(size, layers, tmp_path):
    """A head of the released shape reads the columns that Meta's code would give it."""
    backbone = weightless(size)
    D = backbone.embed_dim
    width = (1 + layers) * D
    file = tmp_path / f"{size}_linear_head.pth"
    torch.save({"weight": torch.randn(1000, width), "bias": torch.randn(1000)}, file)
    weight, bias, columns, about = read_linear_head(file, backbone)
    assert weight.shape == (1000, width) and bias.shape == (1000,)
    assert about == {}
    first = 3 * D if layers == 1 else 0
    assert (columns.start, columns.stop) == (first, 5 * D)
    message = rf"{width} inputs \(as from a width of {D}\), but a .*width 48.* gives 96 or 240: it belongs"
    with pytest.raises(UserError, match=message):
        read_linear_head(file, VisionTransformer(48, 4, 2))


def test_a_head_belongs_to_its_weights_at_any_dtype(tmp_path):
    """Trained in bf16 on one machine, a head is used in fp32 on another; but not with other weights."""
    backbone = tiny_backbone()
    keys = set()
    for change in (0, 1e-3):
        backbone.pos_embed.data += change
        torch.save({"teacher": backbone.state_dict(), "arch": {"num_heads": 2}}, tmp_path / "w.pth")
        opened = [open_backbone(tmp_path / "w.pth", dtype=dtype)[0] for dtype in ("fp32", "bf16", "fp16")]
        assert opened[1].norm.weight.dtype == torch.bfloat16
        keys |= {(backbone_fingerprint(each), weights_digest(each)) for each in opened}
    assert len(keys) == 2


def test_a_head_as_wide_as_another_input_is_not_taken_for_it(tmp_path):
    """Meta's head of 1 layer for B has 1536 columns: as many as S has in [CLS] of 4 blocks."""
    torch.save({"weight": torch.zeros(9, 1536), "bias": torch.zeros(9)}, tmp_path / "h.pth")
    with pytest.raises(UserError, match="as from a width of 768"):
        read_linear_head(tmp_path / "h.pth", weightless("vit_small"))


def test_files_that_are_not_heads(tmp_path):
    backbone = tiny()
    file = tmp_path / "h.pth"
    with pytest.raises(UserError, match="there is no head at .*h.pth: train one first"):
        read_linear_head(file, backbone)
    weight = torch.zeros(3, 64)
    for content in ({"weight": weight}, {"weight": weight, "bias": torch.zeros(4)}, backbone.state_dict()):
        torch.save(content, file)
        with pytest.raises(UserError, match=r"not a head of weight \(C, d\) and bias \(C,\)"):
            read_linear_head(file, backbone)
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match="h.pth is not a file of plain tensors"):
        read_linear_head(file, backbone)


def test_a_head_knows_its_input_and_its_backbone(tmp_path):
    backbone = tiny()
    file = tmp_path / "h.pth"
    head = dict(weight=torch.randn(3, 32), bias=torch.randn(3))
    about = dict(input="1 block, CLS", weights="runs/a", classes=list("abc"))
    about["backbone"] = backbone_fingerprint(backbone)
    write_linear_head(file, head, about)
    weight, bias, columns, read_about = read_linear_head(file, backbone)
    assert weight.equal(head["weight"]) and bias.equal(head["bias"])
    assert read_about == about
    assert columns == input_slices(backbone)["1 block, CLS"]
    assert set(torch.load(file, weights_only=True)) == {"weight", "bias"}  # bare, as Meta's
    with pytest.raises(UserError, match="belongs to other weights, runs/a"):
        read_linear_head(file, tiny(seed=1))


@pytest.mark.parametrize("text", [
    "[]", "3", "{", "[" * 9999, '{"input": ["1 block, CLS"]}', '{"classes": ["a", "b"]}',
    '{"classes": [1, 2, 3]}', '{"classes": 3}', '{"pixels": 32}', '{"pixels": [32, "32"]}',
    '{"pixels": [0, 0]}', '{"pixels": [32]}'], ids=lambda text: text[:30])  # fmt: skip
def test_a_json_file_of_another_kind_beside_a_head(text, tmp_path):
    torch.save(dict(weight=torch.zeros(3, 64), bias=torch.zeros(3)), tmp_path / "h.pth")
    (tmp_path / "h.json").write_text(text)
    with pytest.raises(UserError, match="h.json does not describe a head of 3 classes: delete it"):
        read_linear_head(tmp_path / "h.pth", tiny())


@pytest.mark.parametrize("content", [[1], dict(grid=1), 3])
def test_a_half_trained_probe_of_another_kind(content, tmp_path):
    torch.save(content, tmp_path / "grid.pth")
    with pytest.raises(UserError, match="grid.pth holds a half-trained probe of other images"):
        resume_probes(dict(a=[torch.zeros(1)]), tmp_path / "grid.pth", "job")


# ---- crops on the fly


def test_crops_are_a_function_of_epoch_and_image():
    images = EvalImages(Scenes(5, 0, 64), 32, limit=3)
    crops = RandomCrops(images)
    crop, label = crops[0, 2]
    assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8
    assert label == images[2][1]
    assert crop.equal(RandomCrops(images)[0, 2][0])
    assert not crop.equal(crops[1, 2][0])
    assert not crop.equal(crops[0, 1][0])


def test_crops_are_the_published_ones(tmp_path):
    """Red left half, green right half, and a ramp downwards: how much a crop shows, and if it is mirrored."""
    x = torch.arange(64).expand(64, 64)
    picture = torch.stack([255 * (x < 32), 255 * (x >= 32), 4 * x.T], dim=-1)
    (tmp_path / "a").mkdir()
    Image.fromarray(picture.to(torch.uint8).numpy()).save(tmp_path / "a" / "0.png")
    crops = RandomCrops(EvalImages(open_source(f"folder:{tmp_path}"), 64))
    heights = []
    mirrored = []
    for epoch in range(150):
        red, green, ramp = crops[epoch, 0][0].float()
        heights.append((ramp[-1].mean() - ramp[0].mean()).item() / 252)  # 1: all of the image
        if red.mean() > 40 and green.mean() > 40:
            mirrored.append(red[:, 0].mean() < 128)
    assert min(heights) < 0.4 and max(heights) > 0.9
    assert 0.6 < sum(heights) / 150 < 0.8
    assert 0.3 < sum(mirrored) / len(mirrored) < 0.7


def test_training_on_crops(tmp_path, monkeypatch):
    """Each batch is the backbone's view of the crops of that step; the held-out images are not among them."""
    monkeypatch.setattr(linear, "LEARNING_RATES", LEARNING_RATES[-1:])
    backbone = tiny()
    bank = EvalImages(Scenes(20, 0, 32), 32)
    steps = []
    monkeypatch.setattr(linear, "sgd_step", lambda features, labels, *_: steps.append((features, labels)))
    monkeypatch.setattr(linear, "input_slices", lambda backbone: {"1 block, CLS": slice(0, 160)})
    fit_and_test(backbone, bank, bank, tmp_path / "g.pth", 4, 9, augment=True)
    training = torch.randperm(20, generator=torch.Generator().manual_seed(0))[2:]
    assert len(steps) == 4
    for (features, labels), (epoch, rows) in zip(steps, shuffled_batches(18, 9, 0, 4)):
        crops = [RandomCrops(bank)[epoch, int(i)] for i in training[rows]]
        pixels = torch.stack([crop for crop, _ in crops])
        torch.testing.assert_close(features, probe_features(backbone, pixels))
        assert labels.tolist() == [label for _, label in crops]


# ---- all of it


def test_the_probe_is_chosen_on_held_out_training_images(tmp_path, monkeypatch):
    """The images to train on, to choose on and to report are three sets; a resumed job gives the same."""
    backbone = tiny()
    bank = EvalImages(Scenes(60, 1, 32), 32)
    queries = EvalImages(Scenes(30, 2, 32), 32)
    features, labels, numbers = labelled_features(backbone, bank)
    assert numbers.tolist() == list(range(60))
    calls = []

    def recorded(probes, slices, features, labels):
        calls.append((features, labels))
        return select_probe(probes, slices, features, labels)

    monkeypatch.setattr(linear, "select_probe", recorded)
    result = fit_and_test(backbone, bank, queries, tmp_path / "g.pth", 40, 16)
    held_out = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:6]
    assert torch.equal(calls[0][0], features[held_out])
    assert torch.equal(calls[0][1], labels[held_out])
    test_features, test_labels, _ = labelled_features(backbone, queries)
    head = result["head"]
    columns = input_slices(backbone)[result["input"]]
    predicted = (test_features[:, columns] @ head["weight"].T + head["bias"]).argmax(-1)
    assert result["linear"] == (predicted == test_labels).float().mean().item()
    assert result["rate"] in LEARNING_RATES
    again = fit_and_test(backbone, bank, queries, tmp_path / "g.pth", 40, 16)
    assert again.pop("head")["weight"].equal(result.pop("head")["weight"])
    for found, known in zip(again.pop("answers"), result.pop("answers")):
        assert found.equal(known)
    assert again == result
    for other, iterations in ((tiny(seed=1), 40), (backbone, 41)):
        with pytest.raises(UserError, match="delete it"):
            fit_and_test(other, bank, queries, tmp_path / "g.pth", iterations, 16)


def test_the_bias_counts(tmp_path, monkeypatch):
    """Whatever the image, a probe with a large bias names its class; and that is reported."""
    backbone = tiny()
    scenes = EvalImages(Scenes(30, 2, 32), 32)
    slices = {"1 block, CLS": input_slices(backbone)["1 block, CLS"]}
    probes = init_probes(slices, 10)
    _, bias, *_ = probes["1 block, CLS"]
    bias[:, 7] = 1e6
    monkeypatch.setattr(linear, "input_slices", lambda backbone: slices)
    monkeypatch.setattr(linear, "train_probes", lambda *_: probes)
    sevens = sum(scenes[i][1] == 7 for i in range(30)) / 30
    result = fit_and_test(backbone, scenes, scenes, tmp_path / "g.pth", 1, 8)
    assert 0 < sevens < 0.5
    assert result["linear"] == pytest.approx(sevens)


def test_images_without_label_or_pixels_are_left_out(tmp_path):
    """Numbers say which images the rows are of: crops are drawn from those."""
    lines = []
    for i, label in enumerate([0, None, 1, 0, None, 1]):
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        entry = dict(path=f"{i}.png")
        if label is not None:
            entry["label"] = label
        lines.append(json.dumps(entry))
    (tmp_path / "3.png").write_bytes(b"broken")
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    images = EvalImages(open_source(f"list:{tmp_path}/list.jsonl"), 32)
    features, labels, numbers = labelled_features(tiny(), images, batch_size=2)
    assert features.shape == (3, 160)
    assert labels.tolist() == [0, 1, 1]
    assert numbers.tolist() == [0, 2, 5]


@pytest.mark.parametrize("kinds, count", [(["a", "b"], 4), (["a"], 12)], ids=["too few", "one class"])
def test_labels_that_do_not_allow_a_probe(tmp_path, kinds, count):
    for kind in kinds:
        write_flat_images(tmp_path / kind, count)
    bank = EvalImages(open_source(f"folder:{tmp_path}"), 32)
    with pytest.raises(UserError, match=f"{count * len(kinds)} training images of {len(kinds)} classes"):
        fit_and_test(tiny(), bank, bank, tmp_path / "grid.pth", 10, 4)


@pytest.fixture
def colours(tmp_path):
    """Flat colours in folders by name, and weights: -> the start of a command line."""
    for name, colour in (("blue", (30, 30, 180)), ("red", (180, 30, 30))):
        for split in ("train", "test"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                brighter = tuple(channel + 5 * i + (split == "test") for channel in colour)
                Image.new("RGB", (40, 30), brighter).save(folder / f"{i}.png")
    (tmp_path / "train" / "red" / "3.png").write_bytes(b"broken")
    Image.new("RGB", (33, 60), (35, 33, 210)).save(tmp_path / "new.png")
    (tmp_path / "bad.png").write_bytes(b"broken")
    (tmp_path / "config.yaml").write_text("train: {num_workers: 0}\n")
    torch.save({"teacher": tiny().state_dict(), "arch": {"num_heads": 2}}, tmp_path / "t.pth")
    return ["linear.py", "--weights", str(tmp_path / "t.pth"), "--out", str(tmp_path / "out")]


@pytest.fixture
def command(colours, monkeypatch, capsys):
    """A function: further words of the command line -> what it prints."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", [*colours, *map(str, words)])
        linear.main()
        return capsys.readouterr().out

    return run


def colour_sets(tmp_path):
    return ["--train", f"folder:{tmp_path}/train", "--test", f"folder:{tmp_path}/test", "--image-size", "32"]


def table_row(printed, name):
    return re.search(rf"{name} +([\d. ]+)\n", printed)[1].split()


def test_the_command_trains_and_predicts(command, tmp_path, monkeypatch):
    printed = command(*colour_sets(tmp_path), "--iterations", "150", "--batch-size", "16")
    assert "24 training images, 24 test images" in printed
    assert "left out:" in printed and "red/3.png" in printed
    assert table_row(printed, "this backbone")[0] == "1.000"
    assert len(table_row(printed, "random initialisation")) == 2
    assert table_row(printed, "chance") == ["0.500"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["head.json", "head.pth"]
    about = json.loads((tmp_path / "out" / "head.json").read_text())
    assert about["classes"] == ["blue", "red"]
    assert about["pixels"] == [32, 32]
    assert about["linear"] == 1
    sizes = []

    def recorded(backbone, pixels):
        sizes.append(pixels.shape[2])
        return probe_features(backbone, pixels)

    monkeypatch.setattr(linear, "probe_features", recorded)
    printed = command("--predict", tmp_path / "new.png", tmp_path / "bad.png")
    assert sizes == [32]  # as it was trained
    assert re.search(r"new.png: blue \d+\.\d%, red \d+\.\d%\n", printed)
    assert "left out: " in printed
    printed = command("--head", tmp_path / "out" / "head.pth", "--test", f"folder:{tmp_path}/test")
    assert "top-1 accuracy 1.000 on 24 images" in printed
    with pytest.raises(UserError, match="none of these images can be read"):
        command("--predict", tmp_path / "bad.png")


def test_the_command_splits_one_folder(command, tmp_path):
    printed = command("--train", f"folder:{tmp_path}/test", "--split", "0.5", "--image-size", "32",
                      "--iterations", "5", "--no-baseline")  # fmt: skip
    assert "12 training images, 12 test images, 32 pixels out of 32" in printed
    with pytest.raises(UserError, match="24 of 24 test images are training images too"):
        command("--train", f"folder:{tmp_path}/test", "--test", f"folder:{tmp_path}/test")


def test_a_head_finds_its_classes_by_name(command, tmp_path):
    command(*colour_sets(tmp_path), "--iterations", "150", "--batch-size", "16", "--no-baseline")
    (tmp_path / "some").mkdir()
    (tmp_path / "test" / "red").rename(tmp_path / "some" / "red")
    head = ["--head", tmp_path / "out" / "head.pth"]
    assert "1.000 on 12 images" in command(*head, "--test", f"folder:{tmp_path}/some")
    with pytest.raises(UserError, match="train holds the images that the head was trained on"):
        command(*head, "--test", f"folder:{tmp_path}/train")
    (tmp_path / "some" / "red").rename(tmp_path / "some" / "rouge")
    with pytest.raises(UserError, match="some has classes that are unknown .rouge"):
        command(*head, "--test", f"folder:{tmp_path}/some")


def test_the_command_with_a_foreign_head(command, tmp_path):
    head = tmp_path / "seven.pth"
    torch.save({"weight": torch.zeros(7, 160), "bias": torch.eye(7)[3]}, head)
    printed = command("--head", head, "--predict", tmp_path / "new.png", "--image-size", 32)
    assert "new.png: 3 31.2%, " in printed  # it has no names: its classes are numbers
    with pytest.raises(UserError, match="the head has 7 classes, the test images 2"):
        command("--head", head, *colour_sets(tmp_path))


def test_the_command_where_nothing_can_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x cannot be written"):
        command(*colour_sets(tmp_path), "--out", tmp_path / "file" / "x")


@pytest.mark.parametrize("words", [["--iterations", "0"], ["--batch-size", "-1"], ["--iterations", "nan"]])
def test_numbers_out_of_range_are_refused(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["linear.py", *words])
    with pytest.raises(SystemExit):
        linear.main()


def test_a_killed_command_resumes(command, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "SAVE_EVERY", -1)
    out = tmp_path / "out"
    words = [*colour_sets(tmp_path), "--iterations", "30", "--no-baseline"]
    assert "random" not in command(*words)
    whole = torch.load(out / "head.pth")
    steps = []

    def dying(features, labels, probes, rates):
        steps.append(1)
        if len(steps) == 4 * 20:
            raise KeyboardInterrupt
        sgd_step(features, labels, probes, rates)

    monkeypatch.setattr(linear, "sgd_step", dying)
    (out / "head.pth").unlink()
    with pytest.raises(KeyboardInterrupt):
        command(*words)
    assert (out / "grid.pth").exists() and not (out / "head.pth").exists()
    assert "random" not in command(*words)
    assert len(steps) == 4 * 20 + 4 * 11  # 19 steps were done
    again = torch.load(out / "head.pth")
    assert again["weight"].equal(whole["weight"]) and again["bias"].equal(whole["bias"])
