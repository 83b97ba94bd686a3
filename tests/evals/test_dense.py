"""The linear heads for classes and depth: published shapes and formulas, data, windows, the command."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import config
from config import UserError
from evals import dense as eval_dense
from evals.dense import (
    Features,
    Pairs,
    Pixels,
    answer,
    apply,
    arguments,
    block_ids,
    iou,
    loss,
    main,
    metres,
    new_head,
    read_head,
    read_truth,
    score,
    see,
    settle,
    train_head,
)
from model import Tokens, VisionTransformer
from scenes import CLASSES
from sources import BadImage

WIDTHS = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}


def a_job(task, *words, outputs=0, about=None):
    job = arguments(["--task", task, *map(str, words)])
    settle(job, config.load(model="debug"), about, outputs)
    return job


def scenes_job(task, *words):
    sets = ["--train", "scenes:40:seed=1:size=32", "--test", "scenes:20:seed=2:size=32"]
    return a_job(task, *sets, "--size", 32, *words)


def tiny(depth=4):
    torch.manual_seed(0)
    m = VisionTransformer(24, depth, 2, patch_size=8, img_size=32, num_register_tokens=2, init_std=0.1)
    return m.eval().requires_grad_(False)


class Stub(torch.nn.Module):
    """A backbone whose tokens are `tokens(images)`."""

    def __init__(self, width=2, depth=4, patch=8, tokens=None):
        super().__init__()
        self.patch_size, self.tokens = patch, tokens
        arch = dict(embed_dim=width, depth=depth, patch_size=patch)
        self.arch = arch | dict(num_register_tokens=0, ffn_layer="mlp")

    def intermediate(self, images, layers, norm=True):
        B, _, h, w = images.shape
        x = self.tokens(B, h // self.patch_size * (w // self.patch_size), self.arch["embed_dim"])
        return [Tokens(x.mean(1), x[:, :0], x)] * len(layers)


# ---------------------------------------------------------------- heads, formulas, scores


def test_blocks_are_the_published_ones():
    assert block_ids(12, "depth", 4) == [2, 5, 8, 11] and block_ids(24, "depth", 4) == [4, 11, 17, 23]
    assert block_ids(40, "depth", 4) == [9, 19, 29, 39] and block_ids(4, "depth", 4) == [0, 1, 2, 3]
    assert block_ids(12, "seg", 4) == [8, 9, 10, 11] and block_ids(24, "depth", 1) == [23]
    with pytest.raises(UserError, match="only 2 blocks"):
        block_ids(2, "seg", 4)


def released(task, width, outputs):
    """A file of the released layout, as dinov2-facts gives it."""
    tensors = {f"decode_head.conv_{task}.weight": torch.randn(outputs, width, 1, 1),
               f"decode_head.conv_{task}.bias": torch.randn(outputs)}  # fmt: skip
    if task == "seg":
        norm = {k: torch.rand(width) + 0.5 for k in ("weight", "bias", "running_mean", "running_var")}
        tensors |= {f"decode_head.bn.{k}": v for k, v in norm.items()}
    return tensors


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("layers", [1, 4])
def test_released_heads_load(size, layers, tmp_path):
    width, depth = WIDTHS[size]
    backbone = Stub(width, depth, 14)
    for task, K, outputs in (("seg", width * layers, 150), ("depth", 2 * width * layers, 256)):
        tensors = released(task, K, outputs)
        file = {"state_dict": tensors, "meta": {"epoch": 3}} if task == "depth" else tensors
        torch.save(file, tmp_path / "h.pth")
        job = arguments(["--task", task])
        head, about = read_head(tmp_path / "h.pth", job, backbone)
        assert job.layers == layers and about == {} and Features(backbone, job).width == K
        x, name = torch.randn(5, K), f"decode_head.conv_{task}"
        y = x
        if task == "seg":
            n = {k.split(".")[-1]: v for k, v in tensors.items() if ".bn." in k}
            y = (x - n["running_mean"]) / (n["running_var"] + 1e-5).sqrt() * n["weight"] + n["bias"]
        conv = F.conv2d(y.T[None, :, :, None], tensors[name + ".weight"], tensors[name + ".bias"])
        torch.testing.assert_close(apply(head, x), conv[0, :, :, 0].T, atol=1e-3, rtol=1e-4)


def test_a_wrong_head_is_told_with_both_widths(tmp_path):
    path, job = tmp_path / "h.pth", arguments(["--task", "seg"])
    torch.save(released("seg", 768, 21), path)
    with pytest.raises(UserError, match="of width 768, but this ViT of width 384.* has 384, or 1536"):
        read_head(path, job, Stub(384, 12, 14))
    torch.save(released("depth", 768, 256), path)
    with pytest.raises(UserError, match="no linear head for --task seg"):
        read_head(path, job, Stub(768, 12, 14))
    tensors = released("seg", 768, 21)
    torch.save(tensors | {"decode_head.bn.weight": torch.ones(7)}, path)
    with pytest.raises(UserError, match=r"bn.weight is \[7\] there, not \[768\]"):
        read_head(path, job, Stub(768, 12, 14))
    torch.save(tensors | {"decode_head.extra": torch.ones(7)}, path)
    with pytest.raises(UserError, match=r"decode_head.extra is \[7\] there, not None"):
        read_head(path, job, Stub(768, 12, 14))
    path.write_text("<html>")
    for missing in (path, tmp_path / "none.pth"):
        with pytest.raises(UserError, match=missing.name):
            read_head(missing, job, Stub(768, 12, 14))


def test_depth_is_the_formula():
    logits = torch.randn(2, 7, 3, 4)
    expected = torch.zeros(2, 3, 4)
    for b, y, x in np.ndindex(2, 3, 4):
        weights = [max(float(logits[b, k, y, x]), 0) + 0.1 for k in range(7)]
        expected[b, y, x] = sum(w * (2 + 8 * k / 6) for k, w in enumerate(weights)) / sum(weights)
    torch.testing.assert_close(metres(logits, 2.0, 10.0), expected)


def test_the_linear_map_may_come_before_the_enlargement():
    job, head = a_job("depth", "--depth-range", 1, 9), new_head("depth", 6, 256)
    x = torch.randn(2, 6, 3, 5)  # features of a 3 x 5 grid
    conv = head["decode_head"]["conv_depth"]
    published = metres(conv(F.interpolate(x, scale_factor=4, mode="bilinear")), 1.0, 9.0)
    tokens = x.flatten(2).transpose(1, 2)
    ours = answer(apply(head, tokens.flatten(0, 1)).unflatten(0, (2, 15)), job, 12, 20, 4)
    torch.testing.assert_close(ours[:, 0], published)


def test_losses_and_void():
    logits, labels = torch.randn(50, 5), torch.randint(-1, 5, (50,))
    p = logits.double().softmax(1).numpy()
    rows = [i for i in range(50) if labels[i] >= 0]
    expected = -np.mean([np.log(p[i, labels[i]]) for i in rows])
    assert loss(logits, labels, "seg").item() == pytest.approx(expected, rel=1e-5)
    guess, truth = torch.rand(50, 1) + 0.5, torch.rand(50) + 0.5
    truth[::3] = 0
    g = np.array([np.log(float(guess[i])) - np.log(float(truth[i])) for i in range(50) if truth[i] > 0])
    expected = np.sqrt((g**2).mean() - 0.85 * g.mean() ** 2)
    assert loss(guess, truth, "depth").item() == pytest.approx(expected, rel=1e-4)
    changed = guess.clone()
    changed[::3] = 99.0
    assert loss(changed, truth, "depth") == loss(guess, truth, "depth")
    nothing = loss(logits.requires_grad_(), torch.full((50,), -1), "seg")
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().sum() == 0


def teller(answers):
    """Instead of `see`: one answer after the other."""
    rest = list(answers)
    return lambda features, head, image: rest.pop(0)


def test_scores_are_those_of_plain_numpy(monkeypatch):
    job = scenes_job("seg")
    pairs, C = Pairs(job.test, job), 11
    answers = [torch.randn(C, 32, 32) for _ in range(20)]
    monkeypatch.setattr(eval_dense, "see", teller(answers))
    result = score(Features(tiny(), job), None, pairs)
    truth = np.stack([pairs[i][1].numpy() for i in range(20)])
    guess = np.stack([a.argmax(0).numpy() for a in answers])
    ious = [((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum() for c in range(C)]
    assert result["mIoU"] == pytest.approx(np.mean(ious)) and result["classes"] == pytest.approx(ious)

    job = scenes_job("depth")
    pairs = Pairs(job.test, job)
    answers = [torch.rand(1, 32, 32) * 9 + 1 for _ in range(20)]
    monkeypatch.setattr(eval_dense, "see", teller(answers))
    result = score(Features(tiny(), job), None, pairs)
    d, t = np.stack([a[0].numpy() for a in answers]), np.stack([pairs[i][1].numpy() for i in range(20)])
    assert result["RMSE"] == pytest.approx(np.sqrt(((d - t) ** 2).mean((1, 2))).mean(), rel=1e-5)
    assert result["delta1"] == pytest.approx((np.maximum(d / t, t / d) < 1.25).mean(), rel=1e-5)


def test_iou_leaves_out_absent_classes():
    values = iou(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert values[:2].tolist() == pytest.approx([3 / 6, 4 / 7]) and values[2].isnan()


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_one_window_is_the_whole_image(task):
    job = scenes_job(task, "--window", 64)
    features, image = Features(tiny(), job), torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    head = new_head(task, features.width, 11 if task == "seg" else 256).eval()
    whole = answer(apply(head, features.look(image[None])[0].float())[None], job, 48, 64, 8)[0]
    torch.testing.assert_close(see(features, head, image), whole)
    job.window = 32
    parts = see(features, head, image)
    assert parts.shape == whole.shape and not torch.allclose(parts, whole)


@pytest.mark.parametrize("size", [(64, 64), (32, 200), (72, 40), (8, 8)])
def test_windows_cover_everything_without_a_seam(size):
    job = scenes_job("seg", "--window", 37)  # no multiple of the patch
    features = Features(Stub(2, tokens=lambda *shape: torch.full(shape, 0.5)), job)
    head = new_head("seg", 2, 11).eval()
    seen = see(features, head, torch.zeros(3, *size, dtype=torch.uint8))
    torch.testing.assert_close(seen, seen[:, :1, :1].expand(11, *size))
    assert seen.isfinite().all()


# ---------------------------------------------------------------- masks and depth in files


def painted(root, n, size=(48, 32), labels=None):
    """Images of two colours whose halves are the classes 0 and 1, a void border above -> the URI."""
    rng = np.random.default_rng(n)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(n):
        W, H = size[i % len(size)] if isinstance(size, list) else size
        mask = np.zeros((H, W), np.uint8)
        mask[:, W // 2 :] = 1
        mask = mask if i % 2 else 1 - mask
        colour = np.where(mask[..., None] == 1, (200, 60, 40), (30, 90, 180)) + rng.integers(0, 30, (H, W, 3))
        Image.fromarray(colour.astype(np.uint8)).save(root / "images" / f"{i}.png")
        mask = rng.integers(0, 2, (H, W)).astype(np.uint8) if labels == "random" else mask
        mask[:3] = 7
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    return f"pairs:{root}/images:{root}/masks"


def masks_job(uri, *words):
    few = ["--classes", 2, "--ignore", 7, "--size", 32, "--iterations", 50, "--batch-size", 4]
    return a_job("seg", "--train", uri, "--test", uri, *few, *words)


def learned(job, backbone, tmp_path):
    features = Features(backbone, job)
    head = train_head(features, Pairs(job.train, job), tmp_path / "h.pth")
    return score(features, head, Pairs(job.test, job))


def test_an_oracle_is_perfect_and_random_labels_are_not(tmp_path):
    oracle = Pixels(Stub(patch=4).arch)
    job = masks_job(painted(tmp_path / "good", 8, size=[(48, 32), (32, 32), (32, 50)]))  # mixed in one batch
    assert learned(job, oracle, tmp_path / "a")["mIoU"] > 0.9
    job = masks_job(painted(tmp_path / "random", 8, labels="random"))
    assert learned(job, oracle, tmp_path / "b")["mIoU"] < 0.55
    noise = Stub(8, patch=4, tokens=lambda *shape: torch.randn(shape))
    job = masks_job(f"pairs:{tmp_path}/good/images:{tmp_path}/good/masks")
    assert learned(job, noise, tmp_path / "c")["mIoU"] < 0.55


def test_depth_learns_what_can_be_seen(tmp_path):
    """Left 2 m, right 6 m, told by the colour."""
    painted(tmp_path, 6)
    (tmp_path / "depth").mkdir()
    for i in range(6):
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{i}.png"))
        depth = np.where(mask == 7, 0, np.where(mask == 1, 6000, 2000)).astype(np.uint16)
        Image.fromarray(depth).save(tmp_path / "depth" / f"{i}.png")
    uri = f"pairs:{tmp_path}/images:{tmp_path}/depth"
    job = a_job("depth", "--train", uri, "--test", uri, "--size", 32, "--iterations", 100, "--batch-size", 4)
    assert Pairs(uri, job)[0][1].unique().tolist() == [0, 2, 6]
    backbone = Pixels(Stub(patch=4).arch)
    result = learned(job, backbone, tmp_path / "a")
    assert result["RMSE"] < 0.8 and result["delta1"] > 0.9
    head, _ = read_head(tmp_path / "a" / "h.pth", job, backbone)  # the norm is folded into it
    assert score(Features(backbone, job), head, Pairs(uri, job)) == pytest.approx(result, abs=1e-5)


def test_depth_files(tmp_path):
    job = a_job("depth", "--train", "pairs:a:b", "--test", "pairs:a:b", "--depth-range", 0.5, 80)
    plane = np.array([[0, 1500, 65535], [499, 500, 14464]], np.uint16)
    Image.fromarray(plane).save(tmp_path / "d.png")
    expected = [[0, 1.5, 65.535], [0, 0.5, 14.464]]
    np.testing.assert_allclose(read_truth(tmp_path / "d.png", job).numpy(), expected, rtol=1e-6)
    job.depth_scale = 256.0
    assert read_truth(tmp_path / "d.png", job)[0, 1] == 1500 / 256
    np.save(tmp_path / "d.npy", np.array([[np.nan, 2.5], [np.inf, 81.0]]))
    assert read_truth(tmp_path / "d.npy", job).tolist() == [[0, 2.5], [0, 0]]
    Image.new("L", (3, 2), 9).save(tmp_path / "eight.png")
    with pytest.raises(BadImage, match="8 bits"):
        read_truth(tmp_path / "eight.png", job)
    np.save(tmp_path / "far.npy", np.full((2, 2), 900.0))
    with pytest.raises(BadImage, match="no depth in 0.5 to 80 m"):
        read_truth(tmp_path / "far.npy", job)


def test_masks_with_void_and_palette(tmp_path):
    job = a_job("seg", "--train", "pairs:a:b", "--test", "pairs:a:b", "--classes", 3, "--ignore", 0)
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), "P")
    image.putpalette([i for c in range(256) for i in (c, 0, 255 - c)])
    image.save(tmp_path / "m.png")
    assert read_truth(tmp_path / "m.png", job).tolist() == [[-1, 0], [1, 2]]
    job.ignore = 255
    with pytest.raises(
        BadImage, match="label 3, on 25.00% of the pixels, is neither of the 3 classes nor void"
    ):
        read_truth(tmp_path / "m.png", job)
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(BadImage, match="not one number per pixel"):
        read_truth(tmp_path / "rgb.png", job)


def test_bad_pairs_are_left_out_and_named(tmp_path):
    uri = painted(tmp_path, 40)
    (tmp_path / "masks" / "3.png").unlink()
    (tmp_path / "images" / "4.png").write_bytes(b"no image")
    (tmp_path / "masks" / "5.png").write_bytes(b"no image")
    Image.new("L", (20, 30)).save(tmp_path / "masks" / "6.png")
    pairs = Pairs(uri, masks_job(uri))
    good = [pairs[i] for i in range(40) if pairs[i] is not None]
    assert len(good) == 36
    told = "\n".join(pairs.bad.values())
    for words in ("3.png: no mask or depth has its name", "images/4.png", "masks/5.png",
                  "6.png: 20 x 30 pixels, its image 48 x 32"):  # fmt: skip
        assert words in told
    features = Features(Pixels(Stub().arch), pairs.job)
    assert sum(len(x) for step in range(10) for x, _ in features.batch(pairs, step)) == 40


@pytest.mark.parametrize("words, message", [
    (["--train", "pairs:a:b"], "do not belong together"),
    (["--train", "pairs:a:b", "--test", "pairs:a:b"], "how many classes"),
    (["--size", "-3"], "above 0"),
    (["--depth-range", "5", "2"], "the smaller one first"),
])  # fmt: skip
def test_wrong_settings(words, message):
    with pytest.raises(UserError, match=message):
        a_job("seg", *words)


def test_wrong_data(tmp_path):
    uri = painted(tmp_path, 5)
    job = masks_job(uri)
    for source, message in ((f"folder:{tmp_path}", "has no masks or depth"),
                            (f"pairs:{tmp_path}", "has no masks or depth"),
                            (f"pairs:{tmp_path}/no:{tmp_path}/masks", "does not exist"),
                            (f"pairs:{tmp_path}/images:{tmp_path}/no", "no images and no .npy")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Pairs(source, job)
    job.ignore = 255  # now 7 is no label: not the fault of one file
    pairs = Pairs(uri, job)
    with pytest.raises(UserError, match="4 pairs of .* cannot be used, the last: .*label 7"):
        [pairs[i] for i in range(5)]


# ---------------------------------------------------------------- training, and the command


def test_features_are_kept_while_there_is_room(monkeypatch):
    monkeypatch.setattr(eval_dense, "KEEP_BYTES", 10_000)
    job = scenes_job("seg", "--batch-size", 8)
    features, pairs = Features(tiny(), job), Pairs(job.train, job)
    first = features.batch(pairs, 0)
    assert 0 < len(features.kept) < 8
    again = features.batch(pairs, 0)  # some from memory, some computed again
    assert all(torch.equal(a, b) for v, w in zip(first, again) for a, b in zip(v, w))
    assert sum(x.nbytes for v in features.kept.values() for x in v) <= 10_000


@pytest.mark.parametrize("task", ["seg", "depth"])
def test_a_stopped_training_goes_on_where_it_was(task, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_dense, "SAVE_EVERY", 4)
    job = scenes_job(task, "--iterations", 10, "--batch-size", 4)
    features, pairs = Features(tiny(), job), Pairs(job.train, job)
    whole = train_head(features, pairs, tmp_path / "whole.pth").state_dict()

    def stop(features, pairs, step, batch=Features.batch):
        if step == 6:
            raise KeyboardInterrupt
        return batch(features, pairs, step)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Features, "batch", stop)
        train_head(features, pairs, tmp_path / "h.pth")
    with pytest.raises(UserError, match="half trained"):
        read_head(tmp_path / "h.pth", job, tiny())
    went_on = train_head(features, pairs, tmp_path / "h.pth").state_dict()
    assert all(torch.equal(whole[k], went_on[k]) for k in whole)
    assert list(tmp_path.glob(".*")) == []
    done = train_head(features, None, tmp_path / "h.pth").state_dict()  # done: no image is needed
    assert all(torch.equal(whole[k], done[k]) for k in whole)
    job.lr = 0.5
    with pytest.raises(UserError, match="was made with lr 0.0, not 0.5"):
        train_head(features, pairs, tmp_path / "h.pth")
    (tmp_path / "h.pth").write_bytes(b"?")
    with pytest.raises(UserError, match="not written by this script"):
        train_head(features, pairs, tmp_path / "h.pth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(dict(teacher=tiny().state_dict(), arch=tiny().arch), path)
    return str(path)


@pytest.mark.parametrize("task, layers", [("seg", 4), ("depth", 1)])
def test_the_command(task, layers, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--task", task, "--weights", weights]
    few = ["--train", "scenes:12:seed=1:size=32", "--test", "scenes:6:seed=2:size=32", "--size", "32"]
    main([*words, *few, "--iterations", "6", "--batch-size", "4", "--layers", str(layers)])
    table = capsys.readouterr().out
    assert all(x in table for x in ("this backbone", "raw pixels", "random initialisation"))
    Image.effect_noise((90, 50), 60).convert("RGB").save("photo.jpg")
    main([*words, "--predict", "photo.jpg", "--out", "new/picture.png"])
    picture, values = Image.open("new/picture.png"), Image.open("new/picture_values.png")
    assert picture.size == values.size == (90, 50) and picture.mode == "RGB"
    values = np.asarray(values)
    if task == "seg":
        assert values.max() < 11 and any(name in capsys.readouterr().out for name in ["background", *CLASSES])
    else:
        assert values.dtype == np.uint16 and values.min() >= 1 and values.max() <= 10_000
    main([*words, *few, "--head", f"runs/dense_{task}/head.pth"])
    row = capsys.readouterr().out.split("this head")[1].split("\n")[0].split()
    assert row == table.split("this backbone")[1].split("\n")[0].split()  # the same head, read from its file


def test_the_command_on_bad_images_and_foreign_heads(weights, tmp_path):
    Image.new("RGB", (1, 20_000)).save(tmp_path / "thin.png")
    (tmp_path / "bad.png").write_bytes(b"?")
    torch.save(released("seg", 24, 3), tmp_path / "head.pth")
    words = ["--task", "seg", "--weights", weights, "--head", str(tmp_path / "head.pth")]
    wrong = {"thin.png": "cut it up", "bad.png": "no known format", "none.png": "does not exist"}
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            main([*words, "--predict", str(tmp_path / name)])
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    with pytest.raises(UserError, match="name a .png"):
        main([*words, "--predict", str(tmp_path / "good.png"), "--out", str(tmp_path / "x.words")])
    about = dict(backbone="0123456789abcdef", iterations=5)
    torch.save(dict(state_dict=released("seg", 24, 3), about=about, step=5), tmp_path / "head.pth")
    with pytest.raises(UserError, match="trained on other weights"):
        main([*words, "--predict", str(tmp_path / "good.png")])
