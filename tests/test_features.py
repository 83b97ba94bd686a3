"""Frozen features: images of any kind, extraction, evaluation sets, and the linear read-out."""

import pytest
import torch
from helpers import tiny_backbone, write_flat_images
from PIL import Image
from torch.nn import functional as F

import config
import features
from config import UserError
from data import normalize
from decode import BadImage, to_tensor
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
from model import Tokens, describe_backbone
from scenes import Scenes
from sources import open_images, open_source

# ---------------------------------------------------------------- images


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (500, 31), (32, 32), (1, 300)])
def test_preprocess_gives_a_square_of_the_middle(size):
    assert preprocess(Image.new("RGB", size), 28, 32).shape == (3, 28, 28)


TORCHVISION = {  # size, protocol: size after torchvision 0.29's Resize, left and top of its CenterCrop
    ((640, 427), (256, 224)): ((383, 256), (80, 16)),
    ((427, 640), (256, 224)): ((256, 383), (16, 80)),
    ((500, 334), (256, 224)): ((383, 256), (80, 16)),
    ((1024, 683), (256, 224)): ((383, 256), (80, 16)),
    ((500, 375), (224, 224)): ((298, 224), (37, 0)),
    ((300, 257), (256, 224)): ((298, 256), (37, 16)),
    ((256, 301), (256, 224)): ((256, 301), (16, 38)),
}


@pytest.mark.parametrize("size, protocol", TORCHVISION)
def test_preprocess_is_torchvisions_to_the_pixel(size, protocol):
    resized, (left, top) = TORCHVISION[size, protocol]
    image = Image.effect_noise(size, 90).convert("RGB")
    expected = image.resize(resized, Image.BICUBIC).crop((left, top, left + 224, top + 224))
    resize_size, crop_size = protocol
    assert torch.equal(preprocess(image, crop_size, resize_size), to_tensor(expected))


def test_the_protocol_is_in_words():
    assert EvalImages(Scenes(1), 224, 256).protocol == "224 pixels out of 256"
    assert EvalImages(Scenes(1), 224).protocol == "224 pixels out of 224"


@pytest.mark.parametrize("fit", ["crop", "resize", "pad"])
def test_preprocess_keeps_what_it_says(fit):
    """A white picture with a red right edge: cropped it is gone, squeezed and padded it stays."""
    image = Image.new("RGB", (90, 30), "white")
    image.paste((255, 0, 0), (80, 0, 90, 30))
    x = preprocess(image, 28, 28, fit)
    assert x.shape == (3, 28, 28)
    assert x.dtype == torch.uint8
    red = (x[0] > 200) & (x[1] < 60)
    assert red.any() == (fit != "crop")
    grey = (x == torch.tensor(features.IMAGENET_GREY)[:, None, None]).all(0)
    assert grey[-1].all() == (fit == "pad")
    assert not grey[0].any()


@pytest.mark.parametrize("size", [(37, 500), (14, 14), (3, 5), (1000, 701)])
@pytest.mark.parametrize("side", [0, 56])
def test_fit_stretches_by_half_a_patch_at_most(size, side):
    _, height, width = resize_to_patches(Image.new("RGB", size), 14, side).shape
    scale = side / min(size) if side else 1
    for new, old in ((width, size[0] * scale), (height, size[1] * scale)):
        assert new % 14 == 0
        assert abs(new - old) <= 7.5 or new == 14


def test_fit_leaves_alone_what_fits():
    pixels = torch.randint(0, 256, (28, 42, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    assert torch.equal(resize_to_patches(image, 14), pixels.permute(2, 0, 1))


def test_a_photo_of_any_mode_and_no_thread(tmp_path):
    for mode in ("L", "RGBA", "P", "I;16"):
        Image.new(mode, (20, 30)).save(tmp_path / f"{mode[0]}.png")
    Image.new("CMYK", (20, 30)).save(tmp_path / "C.tif")
    Image.new("RGB", (1, 20_000)).save(tmp_path / "thread.png")
    photos = open_images([str(tmp_path)])
    loaded = []
    for i in range(len(photos)):
        if "thread" in photos.name(i):
            with pytest.raises(BadImage, match="thread.png: 1 x 20000 pixels, more than 32 times"):
                load_image(photos, i)
        else:
            loaded.append(load_image(photos, i)[0])
    assert [image.mode for image in loaded] == ["RGB"] * 5
    assert [image.size for image in loaded] == [(20, 30)] * 5


def test_photos_of_the_command_line(tmp_path):
    write_flat_images(tmp_path / "a", 3)
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    photos = open_images([str(tmp_path / "one.png"), str(tmp_path / "a")])
    names = [photos.name(i).removeprefix(str(tmp_path)) for i in range(4)]
    assert names == ["/one.png", "/a/0.png", "/a/1.png", "/a/2.png"]
    assert len(open_images(["scenes:5"])) == 5
    assert len(open_images([f"folder:{tmp_path}"])) == 4
    with pytest.raises(UserError, match="two.png"):
        open_images([str(tmp_path / "two.png")])
    with pytest.raises(UserError, match="scenes:10000"):
        open_images(["scnes:5"])


# ---------------------------------------------------------------- backbones and extraction


def test_a_released_name_needs_no_file_when_it_is_to_be_random():
    backbone, cfg = open_backbone("random:dinov2_vits14_reg4")
    assert backbone.embed_dim == 384
    assert backbone.num_register_tokens == 4
    assert backbone.patch_size == 14
    assert cfg.evaluation.image_size == 224
    assert cfg.evaluation.resize_size == 256
    with pytest.raises(UserError, match="nowhere"):
        open_backbone("random:nowhere")


def test_random_twice_is_the_same_network(tmp_path):
    backbone = tiny_backbone()
    backbone.pos_embed.data += 1  # as if trained
    file = tmp_path / "t.pth"
    torch.save({"teacher": backbone.state_dict(), "arch": {"num_heads": 2}}, file)
    trained, _ = open_backbone(str(file))
    random, _ = open_backbone(f"random:{file}")
    again, _ = open_backbone(f"random:{file}")
    assert torch.equal(trained.pos_embed, backbone.pos_embed)
    assert trained.arch == random.arch
    assert torch.equal(random.pos_embed, again.pos_embed)
    assert random.pos_embed.abs().max() < 1


def test_features_in_bf16_point_where_those_of_fp32_do():
    """Cosines of every token of ViT-S/14 to those of fp32; printed, see `python -m pytest -s`."""
    images = EvalImages(Scenes(4, seed=1, size=224), 224)
    backbone, _ = open_backbone("random:dinov2_vits14_reg4")
    cls, _, patches = extract_features(backbone, images, patches=True)
    converted, _ = open_backbone("random:dinov2_vits14_reg4", dtype="bf16")
    assert converted.norm.weight.dtype == torch.bfloat16
    assert describe_backbone(converted) == f"{describe_backbone(backbone)}, in bfloat16"
    found_cls, _, found_patches = extract_features(converted, images, patches=True)
    assert found_cls.dtype == found_patches.dtype == torch.float32
    of_cls = F.cosine_similarity(cls, found_cls, dim=-1).min().item()
    of_patches = F.cosine_similarity(patches, found_patches, dim=-1).min().item()
    print(f"cosine of bf16 to fp32: [CLS] {of_cls:.5f}, patches {of_patches:.5f} at least")
    assert min(of_cls, of_patches) > 0.999


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_name_what_they_leave_out(workers, tmp_path):
    write_flat_images(tmp_path / "a", 5, bad=2)  # 0 1 2 3 4 bad0 bad1
    images = EvalImages(open_source(f"folder:{tmp_path}"), 32)
    batches = []
    for pixels, labels, numbers in iterate_batches(images, 2, workers, start=1):
        batches.append((len(pixels), labels.tolist(), numbers))
    assert batches == [(2, [0, 0], [1, 2]), (2, [0, 0], [3, 4]), (0, [], [])]
    assert sorted(images.bad) == [5, 6]
    assert "bad0.png" in images.bad[5]


def test_extract_is_the_backbone_and_leaves_its_mode_alone():
    backbone = tiny_backbone().train()
    images = EvalImages(Scenes(7, 0, 32), 32)
    cls, labels, patches = extract_features(backbone, images, batch_size=3, patches=True)
    assert backbone.training
    pixels = torch.stack([images[i][0] for i in range(7)])
    with torch.no_grad():
        expected = backbone.eval()(normalize(pixels))
    torch.testing.assert_close(cls, expected.cls)
    torch.testing.assert_close(patches, expected.patches)
    assert labels.tolist() == [label for _, label in Scenes(7, 0, 32)]


def test_limit_is_spread_over_all_classes(tmp_path):
    for name in "abcd":
        write_flat_images(tmp_path / name, 10)
    images = EvalImages(open_source(f"folder:{tmp_path}"), 32, limit=4)
    assert [images[i][1] for i in range(4)] == [0, 1, 2, 3]


def test_a_bad_image_is_left_out_and_named(tmp_path):
    write_flat_images(tmp_path / "a", 3, bad=1)
    images = EvalImages(open_source(f"folder:{tmp_path}"), 32)
    cls, labels, _ = extract_features(tiny_backbone(), images)
    assert len(cls) == len(labels) == 3
    assert "bad0.png" in list(images.bad.values())[0]


# ---------------------------------------------------------------- evaluation sets and read-outs


def eval_sets(train, test):
    overrides = [f"evaluation.train_path={train}", f"evaluation.test_path={test}"]
    return open_eval_sets(config.load(model="debug", overrides=overrides))


def test_evaluation_sets_need_labels_and_the_same_classes(tmp_path):
    write_flat_images(tmp_path / "flat", 3)
    for name in ("x/cat", "x/dog", "y/cat", "y/emu"):
        write_flat_images(tmp_path / name, 2)
    unlabelled = f"folder:{tmp_path / 'flat'}"
    cats_and_dogs = f"folder:{tmp_path / 'x'}"
    with pytest.raises(UserError, match="flat has no labels"):
        eval_sets(unlabelled, unlabelled)
    with pytest.raises(UserError, match="y has classes that are unknown .emu.: they are compared by name"):
        eval_sets(cats_and_dogs, f"folder:{tmp_path / 'y'}")
    with pytest.raises(UserError, match="evaluation.train_path"):
        eval_sets("", "")


def test_pixels_find_what_pixels_can_find(tmp_path):
    write_flat_images(tmp_path / "a", 6, green=0)
    write_flat_images(tmp_path / "b", 6, green=200)
    bank, queries = eval_sets(f"folder:{tmp_path}", "")
    assert len(bank) == 8
    assert knn_pixels(bank, queries, ks=(1,)) == {1: 1.0}


def test_ridge_finds_a_linear_rule():
    weight = torch.randn(8)
    x = torch.randn(500, 8)
    predict = ridge_regression(x, x @ weight + 3)
    unseen = torch.randn(20, 8)
    torch.testing.assert_close(predict(unseen), unseen @ weight + 3, atol=0.05, rtol=0.05)


class Oracle(torch.nn.Module):
    """A backbone that reads the foreground off the true masks: the metric must call it almost perfect."""

    patch_size = 4

    def __init__(self, scenes):
        super().__init__()
        masks = [torch.from_numpy(scenes.scene(i)[2] > 0).float() for i in range(60)]
        self.share = F.avg_pool2d(torch.stack(masks)[:, None], 4).flatten(1)  # (60, N) foreground per patch
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.images_seen = 0

    def forward(self, images):
        share = self.share[self.images_seen : self.images_seen + len(images)]
        self.images_seen += len(images)
        return Tokens(share[:, :2], share[:, None, :0], torch.stack([share, share**2], -1))


def test_foreground_miou_knows_good_from_useless():
    scenes = Scenes(60, 5, 64)
    assert foreground_miou(Oracle(scenes), scenes, 64) > 0.75
    blind = Oracle(scenes)
    blind.share = torch.rand_like(blind.share)
    assert foreground_miou(blind, scenes, 64) < 0.5


# ---------------------------------------------------------------- files that are called like Meta's


@pytest.mark.parametrize("name", ["runs/vits14", "vits14.pth", "runs/dinov2_vits14", "vitb14_reg.pth"])
def test_own_weights_may_be_called_like_a_released_model(name, tmp_path):
    """The preset vits14 has registers, and its run folder is runs/vits14."""
    save_as(tmp_path / name)
    assert features.load_backbone(tmp_path / name).num_register_tokens == 2


@pytest.mark.parametrize("name", ["dinov2_vits14_pretrain.pth", "dinov2_vitl14_reg4_pretrain.pth"])
def test_a_file_that_claims_to_be_metas_must_be(name, tmp_path):
    save_as(tmp_path / name)
    with pytest.raises(UserError, match="has the name of dinov2_vit"):
        features.load_backbone(tmp_path / name)


def test_a_downloaded_file_must_be_the_named_model(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODINO_CACHE", str(tmp_path))
    save_as(tmp_path / "dinov2_vits14_pretrain.pth")
    with pytest.raises(UserError, match="vits14 has the name of dinov2_vits14"):
        features.load_backbone("vits14")


def save_as(path):
    """A small backbone as a run folder, or as a file if the path ends in .pth."""
    file = path if path.suffix else path / "teacher.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    backbone = tiny_backbone()
    torch.save({"teacher": backbone.state_dict(), "arch": backbone.arch}, file)
