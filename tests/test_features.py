"""Frozen features: images of any kind, extraction, evaluation sets, and the linear read-out."""

import pytest
import torch
from PIL import Image

import config
import features
from config import UserError
from data import normalize
from eval_knn import foreground_miou, knn_pixels, open_eval_sets, ridge_regression
from features import (
    EvalImages,
    extract_features,
    iterate_batches,
    load_image,
    open_backbone,
    preprocess,
    resize_to_patches,
)
from model import VisionTransformer
from scenes import Scenes
from sources import BadImage, open_images, open_source


def tiny():
    torch.manual_seed(0)
    return VisionTransformer(32, 2, 2, patch_size=8, img_size=32, num_register_tokens=2, init_std=0.1).eval()


def pictures(root, good, bad=0, size=(40, 30), first=0):
    root.mkdir(parents=True)
    for i in range(good):
        Image.new("RGB", size, (40 * i % 256, first, 90)).save(root / f"{i}.png")
    for i in range(bad):
        (root / f"bad{i}.png").write_bytes(b"no image")


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (500, 31), (32, 32), (1, 300)])
def test_preprocess_gives_a_square_of_the_middle(size):
    assert preprocess(Image.new("RGB", size), 28, 32).shape == (3, 28, 28)


@pytest.mark.parametrize("how", ["crop", "resize", "pad"])
def test_preprocess_keeps_what_it_says(how):
    """A white picture with a red right edge: cropped it is gone, squeezed and padded it stays."""
    image = Image.new("RGB", (90, 30), "white")
    image.paste((255, 0, 0), (80, 0, 90, 30))
    x = preprocess(image, 28, 28, how)
    assert x.shape == (3, 28, 28) and x.dtype == torch.uint8
    red = (x[0] > 200) & (x[1] < 60)
    assert red.any() == (how != "crop")
    grey = (x == torch.tensor(features.IMAGENET_GREY)[:, None, None]).all(0)
    assert grey[-1].all() == (how == "pad") and not grey[0].any()


@pytest.mark.parametrize("size", [(37, 500), (14, 14), (3, 5), (1000, 701)])
@pytest.mark.parametrize("side", [0, 56])
def test_fit_stretches_by_half_a_patch_at_most(size, side):
    _, height, width = resize_to_patches(Image.new("RGB", size), 14, side).shape
    scale = side / min(size) if side else 1
    for new, old in ((width, size[0] * scale), (height, size[1] * scale)):
        assert new % 14 == 0 and (abs(new - old) <= 7.5 or new == 14)


def test_fit_leaves_alone_what_fits():
    x = torch.randint(0, 256, (28, 42, 3), dtype=torch.uint8)
    assert torch.equal(resize_to_patches(Image.fromarray(x.numpy()), 14), x.permute(2, 0, 1))


def test_a_photo_of_any_mode_and_no_thread(tmp_path):
    for mode in ("L", "RGBA", "P", "I;16", "CMYK"):
        Image.new(mode, (20, 30)).save(tmp_path / f"{mode[0]}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.new("RGB", (1, 20_000)).save(tmp_path / "thread.png")
    photos = open_images([str(tmp_path)])
    read = []
    for i in range(len(photos)):
        if "thread" in photos.name(i):
            with pytest.raises(BadImage, match="thread.png: 1 x 20000 pixels, more than 32 times"):
                load_image(photos, i)
        else:
            read.append(load_image(photos, i)[0])
    assert [(x.mode, x.size) for x in read] == 5 * [("RGB", (20, 30))]


def test_photos_of_the_command_line(tmp_path):
    pictures(tmp_path / "a", 3)
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    photos = open_images([str(tmp_path / "one.png"), str(tmp_path / "a")])
    assert [photos.name(i)[len(str(tmp_path)) :] for i in range(4)] == [
        "/one.png",
        "/a/0.png",
        "/a/1.png",
        "/a/2.png",
    ]
    assert len(open_images(["scenes:5"])) == 5 and len(open_images([f"folder:{tmp_path}"])) == 4
    for wrong, said in (
        ([str(tmp_path / "two.png")], "two.png does not exist"),
        (["scnes:5"], "scenes:10000"),
    ):
        with pytest.raises(UserError, match=said):
            open_images(wrong)


def test_weights_by_one_flag(tmp_path):
    """A released name needs no file when it is to be random; the same seed gives the same network."""
    a, cfg = open_backbone("random:dinov2_vits14_reg4")
    assert (a.embed_dim, a.num_register_tokens, a.patch_size) == (384, 4, 14)
    assert (cfg.evaluation.image_size, cfg.evaluation.resize_size) == (224, 256)
    m = tiny()
    m.pos_embed.data += 1  # as if trained
    torch.save({"teacher": m.state_dict(), "arch": {"num_heads": 2}}, tmp_path / "t.pth")
    trained, twin = (open_backbone(f"{x}{tmp_path / 't.pth'}")[0] for x in ("", "random:"))
    assert torch.equal(trained.pos_embed, m.pos_embed) and trained.arch == twin.arch
    again = open_backbone(f"random:{tmp_path / 't.pth'}")[0]
    assert torch.equal(twin.pos_embed, again.pos_embed) and twin.pos_embed.abs().max() < 1
    with pytest.raises(UserError, match="nowhere"):
        open_backbone("random:nowhere")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_name_what_they_leave_out(workers, tmp_path):
    pictures(tmp_path / "a", 5, bad=2)  # 0 1 2 3 4 bad0 bad1
    images = EvalImages(open_source(f"folder:{tmp_path}"), 32)
    seen = [(len(x), y.tolist(), n) for x, y, n in iterate_batches(images, 2, workers, start=1)]
    assert seen == [(2, [0, 0], [1, 2]), (2, [0, 0], [3, 4]), (0, [], [])]
    assert sorted(images.bad) == [5, 6] and "bad0.png" in images.bad[5]


def test_extract_is_the_backbone_and_leaves_its_mode_alone():
    m, images = tiny().train(), EvalImages(Scenes(7, 0, 32), 32)
    cls, labels, patches = extract_features(m, images, batch_size=3, patches=True)
    with torch.no_grad():
        expected = m.eval()(normalize(torch.stack([images[i][0] for i in range(7)])))
    torch.testing.assert_close(cls, expected.cls)
    torch.testing.assert_close(patches, expected.patches)
    assert labels.tolist() == [Scenes(7, 0, 32)[i][1] for i in range(7)]


def test_limit_is_spread_over_all_classes(tmp_path):
    for name in "abcd":
        pictures(tmp_path / name, 10)
    images = EvalImages(open_source(f"folder:{tmp_path}"), 32, limit=4)
    assert [images[i][1] for i in range(4)] == [0, 1, 2, 3]


def test_a_bad_image_is_left_out_and_named(tmp_path):
    pictures(tmp_path / "a", 3, bad=1)
    images = EvalImages(open_source(f"folder:{tmp_path}"), 32)
    cls, labels, _ = extract_features(tiny(), images)
    assert len(cls) == len(labels) == 3 and "bad0.png" in list(images.bad.values())[0]


def sets(train, test):
    overrides = [f"evaluation.train_path={train}", f"evaluation.test_path={test}"]
    return open_eval_sets(config.load(model="debug", overrides=overrides))


def test_evaluation_sets_need_labels_and_the_same_classes(tmp_path):
    pictures(tmp_path / "flat", 3)
    for name in ("x/cat", "x/dog", "y/cat", "y/emu"):
        pictures(tmp_path / name, 2)
    with pytest.raises(UserError, match="flat has no labels"):
        sets(f"folder:{tmp_path / 'flat'}", f"folder:{tmp_path / 'flat'}")
    with pytest.raises(UserError, match="dog, emu"):
        sets(f"folder:{tmp_path / 'x'}", f"folder:{tmp_path / 'y'}")
    with pytest.raises(UserError, match="evaluation.train_path"):
        sets("", "")
    assert len(sets(f"folder:{tmp_path / 'x'}", f"folder:{tmp_path / 'x'}")[0]) == 4


def test_pixels_find_what_pixels_can_find(tmp_path):
    for i, name in enumerate("ab"):
        pictures(tmp_path / name, 6, first=200 * i)
    bank, queries = sets(f"folder:{tmp_path}", f"folder:{tmp_path}")
    assert knn_pixels(bank, queries, ks=(1,)) == {1: 1.0}


def test_ridge_finds_a_linear_rule():
    x, w = torch.randn(500, 8), torch.randn(8)
    predict = ridge_regression(x, x @ w + 3)
    new = torch.randn(20, 8)
    torch.testing.assert_close(predict(new), new @ w + 3, atol=0.05, rtol=0.05)


class Oracle(torch.nn.Module):
    """A backbone that reads the foreground off the true masks: the metric must call it almost perfect."""

    patch_size = 4

    def __init__(self, scenes):
        super().__init__()
        masks = torch.stack([torch.from_numpy(scenes.scene(i)[2] > 0) for i in range(60)]).float()
        self.share = torch.nn.functional.avg_pool2d(masks[:, None], 4).flatten(1)
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), 0

    def forward(self, images):
        share = self.share[self.seen : self.seen + len(images)]
        self.seen += len(images)
        from model import Tokens

        return Tokens(share[:, :2], share[:, None, :0], torch.stack([share, share**2], -1))


def test_foreground_miou_knows_good_from_useless():
    scenes = Scenes(60, 5, 64)
    assert foreground_miou(Oracle(scenes), scenes, 64) > 0.75
    blind = Oracle(scenes)
    blind.share = torch.rand_like(blind.share)
    assert foreground_miou(blind, scenes, 64) < 0.5
