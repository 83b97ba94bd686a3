"""The linear heads for classes and depth: published shapes and formulas, data, windows, the command."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import config
from config import UserError
from decode import BadImage
from evals import dense
from evals.dense import (
    DenseFeatures,
    RawPixels,
    build_head,
    class_ious,
    dense_loss,
    depth_from_logits,
    head_blocks,
    head_logits,
    parse_settings,
    predict_sliding,
    read_dense_head,
    resolve_settings,
    score_head,
    train_dense_head,
    upsample_logits,
)
from evals.pairs import Pairs, read_depth, read_mask, read_plane
from model import Tokens, VisionTransformer
from scenes import CLASSES

WIDTH_AND_DEPTH = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}


def make_settings(task, *words):
    settings = parse_settings(["--task", task, *map(str, words)])
    resolve_settings(settings, config.load(model="debug"))
    return settings


def scene_settings(task, *words):
    sets = ["--train", "scenes:40:seed=1:size=32", "--test", "scenes:20:seed=2:size=32"]
    return make_settings(task, *sets, "--size", 32, *words)


def tiny(depth=4):
    torch.manual_seed(0)
    m = VisionTransformer(24, depth, 2, patch_size=8, img_size=32, num_register_tokens=2, init_std=0.1)
    return m.eval().requires_grad_(False)


class Stub(torch.nn.Module):
    """A backbone whose tokens are `tokens(B, N, D)`."""

    def __init__(self, width=2, depth=4, patch=8, tokens=None):
        super().__init__()
        self.patch_size = patch
        self.num_register_tokens = 0
        self.tokens = tokens
        self.norm = torch.nn.LayerNorm(width)
        self.arch = dict(embed_dim=width, depth=depth, patch_size=patch)
        self.arch |= dict(num_register_tokens=0, ffn_layer="mlp")

    def intermediate(self, images, layers, norm=True):
        B, _, H, W = images.shape
        N = (H // self.patch_size) * (W // self.patch_size)
        patches = self.tokens(B, N, self.arch["embed_dim"])
        return [Tokens(patches.mean(1), patches[:, :0], patches)] * len(layers)


# ---------------------------------------------------------------- heads, formulas, scores


def test_blocks_are_the_published_ones():
    assert head_blocks(12, "depth", 4) == [2, 5, 8, 11]
    assert head_blocks(24, "depth", 4) == [4, 11, 17, 23]
    assert head_blocks(40, "depth", 4) == [9, 19, 29, 39]
    assert head_blocks(4, "depth", 4) == [0, 1, 2, 3]
    assert head_blocks(12, "seg", 4) == [8, 9, 10, 11]
    assert head_blocks(24, "depth", 1) == [23]
    with pytest.raises(UserError, match="only 2 blocks"):
        head_blocks(2, "seg", 4)


def released(task, width, outputs):
    """The tensors of a released head, as DINOv2 names them."""
    tensors = {
        f"decode_head.conv_{task}.weight": torch.randn(outputs, width, 1, 1),
        f"decode_head.conv_{task}.bias": torch.randn(outputs),
    }
    if task == "seg":
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"decode_head.bn.{name}"] = torch.rand(width) + 0.5
    return tensors


def published_head(task, tensors, x):
    """The released head on features (T, width), in its own words."""
    if task == "seg":
        bn = {name.removeprefix("decode_head.bn."): tensor for name, tensor in tensors.items()}
        x = (x - bn["running_mean"]) / (bn["running_var"] + 1e-5).sqrt() * bn["weight"] + bn["bias"]
    weight = tensors[f"decode_head.conv_{task}.weight"]
    bias = tensors[f"decode_head.conv_{task}.bias"]
    return F.conv2d(x.T[None, :, :, None], weight, bias)[0, :, :, 0].T


@pytest.mark.parametrize("size", WIDTH_AND_DEPTH)
@pytest.mark.parametrize("layers", [1, 4])
def test_released_heads_load(size, layers, tmp_path):
    width, depth = WIDTH_AND_DEPTH[size]
    backbone = Stub(width, depth, 14)
    for task, inputs, outputs in (("seg", width * layers, 150), ("depth", 2 * width * layers, 256)):
        tensors = released(task, inputs, outputs)
        file = {"state_dict": tensors, "meta": {"epoch": 3}} if task == "depth" else tensors
        torch.save(file, tmp_path / "h.pth")
        settings = parse_settings(["--task", task])
        head, settings.layers, about = read_dense_head(tmp_path / "h.pth", settings, backbone)
        assert settings.layers == layers and about == {}
        assert DenseFeatures(backbone, settings).width == inputs
        x = torch.randn(5, inputs)
        expected = published_head(task, tensors, x)
        torch.testing.assert_close(head_logits(head, x), expected, atol=1e-3, rtol=1e-4)


def test_a_wrong_head_is_reported_with_both_widths(tmp_path):
    path = tmp_path / "h.pth"
    settings = parse_settings(["--task", "seg"])
    torch.save(released("seg", 768, 21), path)
    with pytest.raises(UserError, match="of width 768, but this ViT of width 384.* has 384, or 1536"):
        read_dense_head(path, settings, Stub(384, 12, 14))
    torch.save(released("depth", 768, 256), path)
    with pytest.raises(UserError, match="not a linear head for --task seg"):
        read_dense_head(path, settings, Stub(768, 12, 14))
    tensors = released("seg", 768, 21)
    torch.save(tensors | {"decode_head.bn.weight": torch.ones(7)}, path)
    with pytest.raises(UserError, match=r"bn.weight is \[7\] there, not \[768\]"):
        read_dense_head(path, settings, Stub(768, 12, 14))
    torch.save(tensors | {"decode_head.extra": torch.ones(7)}, path)
    with pytest.raises(UserError, match=r"decode_head.extra is \[7\] there, not None"):
        read_dense_head(path, settings, Stub(768, 12, 14))
    path.write_text("<html>")
    for missing in (path, tmp_path / "none.pth"):
        with pytest.raises(UserError, match=missing.name):
            read_dense_head(missing, settings, Stub(768, 12, 14))


def test_depth_is_the_formula():
    logits = torch.randn(2, 7, 3, 4)
    expected = torch.zeros(2, 3, 4)
    for b, y, x in np.ndindex(2, 3, 4):
        weights = [max(float(logits[b, k, y, x]), 0) + 0.1 for k in range(7)]
        expected[b, y, x] = sum(w * (2 + 8 * k / 6) for k, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(depth_from_logits(logits, 2.0, 10.0), expected)


def test_the_linear_map_may_come_before_the_enlargement():
    settings = make_settings("depth", "--depth-range", 1, 9)
    head = build_head("depth", 6, 256)
    conv = head["decode_head"]["conv_depth"]
    grid = torch.randn(2, 6, 3, 5)  # features of 3 x 5 patches
    published = depth_from_logits(conv(F.interpolate(grid, scale_factor=4, mode="bilinear")), 1.0, 9.0)
    tokens = grid.flatten(2).transpose(1, 2)
    logits = head_logits(head, tokens.flatten(0, 1)).unflatten(0, (2, 15))
    ours = upsample_logits(logits, settings, 12, 20, 4)
    torch.testing.assert_close(ours[:, 0], published)


def test_cross_entropy_without_void():
    logits = torch.randn(50, 5)
    labels = torch.randint(-1, 5, (50,))
    probs = logits.double().softmax(1).numpy()
    known = [i for i in range(50) if labels[i] >= 0]
    expected = -np.mean([np.log(probs[i, labels[i]]) for i in known])
    assert dense_loss(logits, labels, "seg").item() == pytest.approx(expected, rel=1e-5)
    nothing = dense_loss(logits.requires_grad_(), torch.full((50,), -1), "seg")
    nothing.backward()
    assert nothing == 0
    assert logits.grad.abs().sum() == 0


def test_log_error_without_void():
    predicted = torch.rand(50, 1) + 0.5
    truth = torch.rand(50) + 0.5
    truth[::3] = 0
    known = [i for i in range(50) if truth[i] > 0]
    log_ratio = np.array([np.log(float(predicted[i])) - np.log(float(truth[i])) for i in known])
    expected = np.sqrt((log_ratio**2).mean() - 0.85 * log_ratio.mean() ** 2)
    assert dense_loss(predicted, truth, "depth").item() == pytest.approx(expected, rel=1e-4)
    changed = predicted.clone()
    changed[::3] = 99.0
    assert dense_loss(changed, truth, "depth") == dense_loss(predicted, truth, "depth")


def replay(predictions):
    """Instead of `predict_sliding`: one prediction after the other."""
    rest = iter(predictions)
    return lambda features, head, image: next(rest)


def test_miou_is_that_of_plain_numpy(monkeypatch):
    settings = scene_settings("seg")
    pairs = Pairs(settings.test, settings)
    C = 11
    logits = [torch.randn(C, 32, 32) for _ in range(20)]
    monkeypatch.setattr(dense, "predict_sliding", replay(logits))
    result = score_head(DenseFeatures(tiny(), settings), None, pairs)
    truth = np.stack([pairs[i][1].numpy() for i in range(20)])
    predicted = np.stack([x.argmax(0).numpy() for x in logits])
    ious = []
    present = np.unique(truth)
    for c in present:
        intersection = (truth == c) & (predicted == c)
        union = (truth == c) | (predicted == c)
        ious.append(intersection.sum() / union.sum())
    assert result["mIoU"] == pytest.approx(np.mean(ious))
    found = np.array(result["classes"])
    assert found[~np.isnan(found)] == pytest.approx(ious)


def test_rmse_and_delta1_are_those_of_plain_numpy(monkeypatch):
    settings = scene_settings("depth")
    pairs = Pairs(settings.test, settings)
    depths = [torch.rand(1, 32, 32) * 9 + 1 for _ in range(20)]
    monkeypatch.setattr(dense, "predict_sliding", replay(depths))
    result = score_head(DenseFeatures(tiny(), settings), None, pairs)
    predicted = np.stack([x[0].numpy() for x in depths])
    truth = np.stack([pairs[i][1].numpy() for i in range(20)])
    rmse = np.sqrt(((predicted - truth) ** 2).mean((1, 2))).mean()
    delta1 = (np.maximum(predicted / truth, truth / predicted) < 1.25).mean()
    assert result["RMSE"] == pytest.approx(rmse, rel=1e-5)
    assert result["delta1"] == pytest.approx(delta1, rel=1e-5)


def test_iou_leaves_out_absent_classes():
    ious = class_ious(torch.tensor([[3, 1, 0, 0], [2, 4, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert ious[:2].tolist() == pytest.approx([3 / 6, 4 / 8])
    assert ious[2:].isnan().all()  # neither the one that is never predicted, nor the one that is


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_one_window_is_the_whole_image(task):
    settings = scene_settings(task, "--window", 64)
    features = DenseFeatures(tiny(), settings)
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    head = build_head(task, features.width, 11 if task == "seg" else 256).eval()
    logits = head_logits(head, features.extract(image[None])[0].float())[None]
    whole = upsample_logits(logits, settings, 48, 64, 8)[0]
    torch.testing.assert_close(predict_sliding(features, head, image), whole)
    settings.window = 32
    in_parts = predict_sliding(features, head, image)
    assert in_parts.shape == whole.shape and not torch.allclose(in_parts, whole)


@pytest.mark.parametrize("size", [(64, 64), (32, 200), (72, 40), (8, 8)])
def test_windows_cover_everything_without_a_seam(size):
    settings = scene_settings("seg", "--window", 37)  # not a multiple of the patch
    features = DenseFeatures(Stub(2, tokens=lambda *shape: torch.full(shape, 0.5)), settings)
    head = build_head("seg", 2, 11).eval()
    logits = predict_sliding(features, head, torch.zeros(3, *size, dtype=torch.uint8))
    torch.testing.assert_close(logits, logits[:, :1, :1].expand(11, *size))
    assert logits.isfinite().all()


# ---------------------------------------------------------------- masks and depth in files


def write_pairs(folder, n, sizes=((48, 32),), random_labels=False):
    """Images of two colours whose halves are the classes 0 and 1, a void border above -> the URI."""
    rng = np.random.default_rng(n)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        W, H = sizes[i % len(sizes)]
        mask = np.zeros((H, W), np.uint8)
        mask[:, W // 2 :] = 1
        if i % 2 == 0:
            mask = 1 - mask
        colors = np.where(mask[..., None] == 1, (200, 60, 40), (30, 90, 180))
        colors = colors + rng.integers(0, 30, (H, W, 3))
        Image.fromarray(colors.astype(np.uint8)).save(folder / "images" / f"{i}.png")
        if random_labels:
            mask = rng.integers(0, 2, (H, W)).astype(np.uint8)
        mask[:3] = 7
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return f"pairs:{folder}/images:{folder}/masks"


def mask_settings(uri, *words):
    few = ["--classes", 2, "--ignore", 7, "--size", 32, "--iterations", 50, "--batch-size", 4]
    return make_settings("seg", "--train", uri, "--test", uri, *few, *words)


def train_and_score(settings, backbone, path):
    features = DenseFeatures(backbone, settings)
    head = train_dense_head(features, Pairs(settings.train, settings), path)
    return score_head(features, head, Pairs(settings.test, settings))


def test_an_oracle_is_perfect_and_random_labels_are_not(tmp_path):
    oracle = RawPixels(Stub(patch=4).arch)
    good = write_pairs(tmp_path / "good", 8, sizes=[(48, 32), (32, 32), (32, 50)])  # mixed in one batch
    assert train_and_score(mask_settings(good), oracle, tmp_path / "a.pth")["mIoU"] > 0.9
    random = write_pairs(tmp_path / "random", 8, random_labels=True)
    assert train_and_score(mask_settings(random), oracle, tmp_path / "b.pth")["mIoU"] < 0.55
    noise = Stub(8, patch=4, tokens=lambda *shape: torch.randn(shape))
    assert train_and_score(mask_settings(good), noise, tmp_path / "c.pth")["mIoU"] < 0.55


def test_depth_learns_what_can_be_seen(tmp_path):
    """Half of each image is 2 m away, half 6 m, as its colour shows."""
    write_pairs(tmp_path, 6)
    (tmp_path / "depth").mkdir()
    millimetres = np.zeros(256, np.uint16)  # by class; void is unknown
    millimetres[:2] = (2000, 6000)
    for i in range(6):
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{i}.png"))
        Image.fromarray(millimetres[mask]).save(tmp_path / "depth" / f"{i}.png")
    uri = f"pairs:{tmp_path}/images:{tmp_path}/depth"
    words = ["--train", uri, "--test", uri, "--size", 32, "--iterations", 100, "--batch-size", 4]
    settings = make_settings("depth", *words)
    assert Pairs(uri, settings)[0][1].unique().tolist() == [0, 2, 6]
    backbone = RawPixels(Stub(patch=4).arch)
    result = train_and_score(settings, backbone, tmp_path / "h.pth")
    assert result["RMSE"] < 0.8
    assert result["delta1"] > 0.9
    head, _, _ = read_dense_head(tmp_path / "h.pth", settings, backbone)  # the statistics are folded into it
    again = score_head(DenseFeatures(backbone, settings), head, Pairs(uri, settings))
    assert again == pytest.approx(result, abs=1e-5)


def test_depth_files(tmp_path):
    words = ["--train", "pairs:a:b", "--test", "pairs:a:b", "--depth-range", 0.5, 80]
    settings = make_settings("depth", *words)
    plane = np.array([[0, 1500, 65535], [499, 500, 14464]], np.uint16)
    Image.fromarray(plane).save(tmp_path / "d.png")
    expected = [[0, 1.5, 65.535], [0, 0.5, 14.464]]
    np.testing.assert_allclose(read_depth(tmp_path / "d.png", settings).numpy(), expected, rtol=1e-6)
    settings.depth_scale = 256.0
    assert read_depth(tmp_path / "d.png", settings)[0, 1] == 1500 / 256
    np.save(tmp_path / "d.npy", np.array([[np.nan, 2.5], [np.inf, 81.0]]))
    assert read_depth(tmp_path / "d.npy", settings).tolist() == [[0, 2.5], [0, 0]]
    Image.new("L", (3, 2), 9).save(tmp_path / "eight.png")
    with pytest.raises(BadImage, match="8 bits"):
        read_depth(tmp_path / "eight.png", settings)
    np.save(tmp_path / "far.npy", np.full((2, 2), 900.0))
    with pytest.raises(BadImage, match="no depth in 0.5 to 80 m"):
        read_depth(tmp_path / "far.npy", settings)


def test_masks_with_void_and_palette(tmp_path):
    words = ["--train", "pairs:a:b", "--test", "pairs:a:b", "--classes", 3, "--ignore", 0]
    settings = make_settings("seg", *words)
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), "P")
    palette = np.zeros((256, 3), int)
    palette[:, 0] = np.arange(256)
    palette[:, 2] = 255 - np.arange(256)
    image.putpalette(palette.flatten().tolist())
    image.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", settings).tolist() == [[-1, 0], [1, 2]]
    settings.ignore = 255
    message = r"value 3, on 25.00% of the pixels, is neither a class \(0 to 2\) nor void \(255\): set"
    with pytest.raises(BadImage, match=message):
        read_mask(tmp_path / "m.png", settings)
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.tif")
    with pytest.raises(BadImage, match="not one number per pixel"):
        read_mask(tmp_path / "cmyk.tif", settings)


def test_bad_pairs_are_left_out_and_named(tmp_path):
    uri = write_pairs(tmp_path, 40)
    (tmp_path / "masks" / "3.png").unlink()
    (tmp_path / "images" / "4.png").write_bytes(b"no image")
    (tmp_path / "masks" / "5.png").write_bytes(b"no image")
    Image.new("L", (20, 30)).save(tmp_path / "masks" / "6.png")
    pairs = Pairs(uri, mask_settings(uri))
    good = [i for i in range(40) if pairs[i] is not None]
    assert len(good) == 36
    reasons = "\n".join(pairs.bad.values())
    assert "3.png: there is no mask or depth of that name" in reasons
    assert "images/4.png" in reasons
    assert "masks/5.png" in reasons
    assert "6.png: 20 x 30 pixels, but its image has 48 x 32" in reasons
    features = DenseFeatures(RawPixels(Stub().arch), pairs.settings)
    images = 0
    for step in range(10):
        images += sum(len(tokens) for tokens, _ in features.batch(pairs, step))
    assert images == 40


@pytest.mark.parametrize("words, message", [
    (["--train", "pairs:a:b"], "do not belong together"),
    (["--train", "pairs:a:b", "--test", "pairs:a:b"], "how many classes"),
    (["--depth-range", "5", "2"], "the smaller one first"),
])  # fmt: skip
def test_wrong_settings(words, message):
    with pytest.raises(UserError, match=message):
        make_settings("seg", *words)


@pytest.mark.parametrize("about", [[1], "x", dict(depth_range=[1]), dict(size="big"), dict(iterations=[]),
                                   dict(names=["one"]), dict(ignore=None), dict(window=-5)])  # fmt: skip
def test_a_head_with_settings_of_another_kind(about, tmp_path):
    path = tmp_path / "h.pth"
    torch.save(dict(state_dict=released("seg", 24, 3), about=about, step=5), path)
    with pytest.raises(UserError, match="h.pth is not a linear head for --task seg"):
        read_dense_head(path, parse_settings(["--task", "seg"]), Stub(24, 12, 14))


def test_a_head_of_nan(tmp_path):
    tensors = released("seg", 24, 3)
    tensors["decode_head.bn.weight"] = torch.full((24,), float("nan"))
    torch.save(tensors, tmp_path / "h.pth")
    with pytest.raises(UserError, match="h.pth: decode_head.bn.weight holds NaN"):
        read_dense_head(tmp_path / "h.pth", parse_settings(["--task", "seg"]), Stub(24, 12, 14))


def test_a_pipe_is_no_head_and_no_mask(tmp_path):
    """To open one would wait for ever."""
    os.mkfifo(tmp_path / "h.pth")
    os.mkfifo(tmp_path / "h.npy")
    settings = parse_settings(["--task", "seg"])
    with pytest.raises(UserError, match="h.pth is not a linear head .*no regular file"):
        read_dense_head(tmp_path / "h.pth", settings, Stub(24, 12, 14))
    with pytest.raises(BadImage, match="h.npy: .*no regular file"):
        read_plane(tmp_path / "h.npy")


@pytest.mark.parametrize("words", [
    "--size -3", "--window 1.5", "--batch-size 0", "--iterations -1", "--classes 40000", "--depth-scale nan",
    "--lr nan", "--seed -1", "--depth-range 0 1"])  # fmt: skip
def test_numbers_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        make_settings("seg", *words.split())
    assert f"argument {words.split()[0]}: " in capsys.readouterr().err


def test_wrong_data(tmp_path):
    uri = write_pairs(tmp_path, 5)
    settings = mask_settings(uri)
    messages = {
        f"folder:{tmp_path}": "has no masks or depth",
        f"pairs:{tmp_path}": "has no masks or depth",
        f"pairs:{tmp_path}/no:{tmp_path}/masks": "No such file",
        f"pairs:{tmp_path}/images:{tmp_path}/no": "no images and no .npy",
    }
    for source, message in messages.items():
        with pytest.raises(UserError, match=message):
            Pairs(source, settings)
    settings.ignore = 255  # now 7 is not a label: not the fault of one file
    pairs = Pairs(uri, settings)
    with pytest.raises(UserError, match="4 pairs of .* cannot be used, the last: .*value 7"):
        [pairs[i] for i in range(5)]


# ---------------------------------------------------------------- training, and the command


def test_features_are_cached_while_there_is_room(monkeypatch):
    monkeypatch.setattr(dense, "TOKEN_CACHE_BYTES", 10_000)
    settings = scene_settings("seg", "--batch-size", 8)
    features = DenseFeatures(tiny(), settings)
    pairs = Pairs(settings.train, settings)
    [first] = features.batch(pairs, 0)  # all of one size
    assert 0 < len(features.cache) < 8
    [again] = features.batch(pairs, 0)  # some from the cache, some computed again
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    cached = 0
    for tokens, truth in features.cache.values():
        cached += tokens.nbytes + truth.nbytes
    assert cached <= 10_000


def same_weights(head, expected):
    return all(torch.equal(x, expected[name]) for name, x in head.state_dict().items())


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_a_killed_training_resumes(task, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "SAVE_EVERY", 4)
    settings = scene_settings(task, "--iterations", 10, "--batch-size", 4)
    features = DenseFeatures(tiny(), settings)
    pairs = Pairs(settings.train, settings)
    whole = train_dense_head(features, pairs, tmp_path / "whole.pth").state_dict()

    def killed_at_6(features, pairs, step, batch=DenseFeatures.batch):
        if step == 6:
            raise KeyboardInterrupt
        return batch(features, pairs, step)

    path = tmp_path / "h.pth"
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(DenseFeatures, "batch", killed_at_6)
        train_dense_head(features, pairs, path)
    with pytest.raises(UserError, match="half trained"):
        read_dense_head(path, settings, tiny())
    assert same_weights(train_dense_head(features, pairs, path), whole)
    assert list(tmp_path.glob(".*")) == []
    assert same_weights(train_dense_head(features, None, path), whole)  # finished: it needs no images
    settings.lr = 0.5
    with pytest.raises(UserError, match="was trained with lr 0.0, not 0.5"):
        train_dense_head(features, pairs, path)
    path.write_bytes(b"?")
    with pytest.raises(UserError, match="not written by this script"):
        train_dense_head(features, pairs, path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(dict(teacher=tiny().state_dict(), arch=tiny().arch), path)
    return str(path)


def table_row(printed, name):
    return printed.split(name)[1].split("\n")[0].split()


@pytest.mark.parametrize("task, layers", [("seg", 4), ("depth", 1)])
def test_the_command(task, layers, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--task", task, "--weights", weights]
    few = ["--train", "scenes:12:seed=1:size=32", "--test", "scenes:6:seed=2:size=32", "--size", "32"]
    dense.main([*words, *few, "--iterations", "6", "--batch-size", "4", "--layers", str(layers)])
    trained = capsys.readouterr().out
    assert all(name in trained for name in ("this backbone", "raw pixels", "random initialisation"))
    Image.effect_noise((90, 50), 60).convert("RGB").save("photo.jpg")
    dense.main([*words, "--predict", "photo.jpg", "--out", "new/picture.png"])
    predicted = capsys.readouterr().out
    picture = Image.open("new/picture.png")
    values = Image.open("new/picture_values.png")
    assert picture.mode == "RGB"
    assert picture.size == values.size == (90, 50)
    values = np.asarray(values)
    if task == "seg":
        assert values.max() < 11
        assert any(name in predicted for name in ["background", *CLASSES])
    else:
        assert values.dtype == np.uint16
        assert values.min() >= 1 and values.max() <= 10_000
    dense.main([*words, *few, "--head", f"runs/dense_{task}/head.pth"])
    scored = capsys.readouterr().out
    assert table_row(scored, "this head") == table_row(trained, "this backbone")  # read from its file


def test_the_same_pairs_on_both_sides_are_refused(weights, tmp_path):
    uri = write_pairs(tmp_path, 6)
    for train, test in ((uri, uri), ("scenes:12:seed=1:size=32", "scenes:6:seed=1:size=32")):
        with pytest.raises(UserError, match="6 of 6 test images are training images too"):
            dense.main(["--task", "seg", "--weights", weights, "--train", train, "--test", test,
                        "--classes", "2", "--ignore", "7", "--size", "32"])  # fmt: skip


def test_the_command_on_bad_images_and_foreign_heads(weights, tmp_path):
    Image.new("RGB", (1, 20_000)).save(tmp_path / "thin.png")
    (tmp_path / "bad.png").write_bytes(b"?")
    torch.save(released("seg", 24, 3), tmp_path / "head.pth")
    words = ["--task", "seg", "--weights", weights, "--head", str(tmp_path / "head.pth")]
    messages = {"thin.png": "cut it up", "bad.png": "no known format", "none.png": "none.png"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            dense.main([*words, "--predict", str(tmp_path / name)])
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    words += ["--predict", str(tmp_path / "good.png")]
    with pytest.raises(UserError, match="name a .png"):
        dense.main([*words, "--out", str(tmp_path / "x.words")])
    about = dict(backbone="0123456789abcdef", iterations=5)
    torch.save(dict(state_dict=released("seg", 24, 3), about=about, step=5), tmp_path / "head.pth")
    with pytest.raises(UserError, match="trained on weights other than"):
        dense.main(words)
