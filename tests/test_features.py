"""Frozen features: extraction, evaluation sets, the linear read-out, and the PCA picture."""

import pytest
import torch
from PIL import Image

import config
from config import UserError
from data import normalize
from eval_knn import eval_sets, knn_pixels
from features import EvalImages, extract, foreground_miou, preprocess, ridge
from model import VisionTransformer
from scenes import Scenes
from visualize import pca_colors, pca_sheet


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


def test_extract_is_the_backbone_and_leaves_its_mode_alone():
    m, images = tiny().train(), EvalImages(Scenes(7, 0, 32), 32)
    cls, labels, patches = extract(m, images, batch_size=3, patches=True)
    with torch.no_grad():
        expected = m.eval()(normalize(torch.stack([images[i][0] for i in range(7)])))
    torch.testing.assert_close(cls, expected.cls)
    torch.testing.assert_close(patches, expected.patches)
    assert labels.tolist() == [Scenes(7, 0, 32)[i][1] for i in range(7)]


def test_limit_is_spread_over_all_classes(tmp_path):
    for name in "abcd":
        pictures(tmp_path / name, 10)
    from data import open_source

    images = EvalImages(open_source(f"folder:{tmp_path}"), 32, limit=4)
    assert [images[i][1] for i in range(4)] == [0, 1, 2, 3]


def test_a_bad_image_is_left_out_and_named(tmp_path):
    from data import open_source

    pictures(tmp_path / "a", 3, bad=1)
    images = EvalImages(open_source(f"folder:{tmp_path}"), 32)
    cls, labels, _ = extract(tiny(), images)
    assert len(cls) == len(labels) == 3 and "bad0.png" in list(images.bad.values())[0]


def sets(train, test):
    overrides = [f"evaluation.train_path={train}", f"evaluation.test_path={test}"]
    return eval_sets(config.load(model="debug", overrides=overrides))


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
    predict = ridge(x, x @ w + 3)
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


def test_pca_colours_are_stable_and_in_range():
    patches = torch.randn(4, 16, 12)
    colors = pca_colors(patches)
    assert colors.shape == (4, 16, 3) and colors.min() >= 0 and colors.max() <= 1
    torch.testing.assert_close(pca_colors(patches @ torch.eye(12)), colors)


def test_pca_sheet_has_a_row_per_backbone():
    images = torch.stack([x for x, _ in EvalImages(Scenes(3, 0, 32), 32)])
    sheet = pca_sheet([tiny(), tiny()], images, side=50)
    assert sheet.size == (3 * 54 - 4, 3 * 54 - 4)
