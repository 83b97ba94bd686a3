"""Pictures: what is read off a backbone, rules for signs and outliers, plots, page layout, every command."""

import sys

import numpy as np
import pytest
import torch
from helpers import TINY_RUN
from PIL import Image

import config
import train
from config import UserError
from data import normalize
from evals import visualize
from evals.patch_maps import (
    first_component,
    first_component_iou,
    outliers,
    patch_attention,
    patch_norms,
    patch_tokens,
    pca_colors,
    principal_components,
)
from evals.plot import Plot
from evals.tiles import COLORMAP, TILE_SIDE, contact_sheet, image_tile
from evals.visualize import attention_rows, norm_histogram, pca_row, teachers_through_training
from features import open_backbone, untrained_copy
from kernels import attention as kernels
from model import Tokens, VisionTransformer
from scenes import Scenes


def tiny(heads=2, registers=2):
    torch.manual_seed(0)
    size = dict(patch_size=8, img_size=32, num_register_tokens=registers, init_std=0.1)
    return VisionTransformer(16 * heads, 2, heads, **size).eval()


def random_image(height=32, width=48):
    torch.manual_seed(1)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def scene_images(count, *numbers):
    scenes = Scenes(count)
    return [torch.from_numpy(scenes.scene(i)[0]).permute(2, 0, 1) for i in numbers]


# ---- principal components


@pytest.fixture
def other_signs(monkeypatch):
    """Eigenvectors with the opposite sign, as another library or machine may give them."""
    real = torch.linalg.eigh

    def flipped(x):
        values, vectors = real(x)
        return values, -vectors

    return lambda: monkeypatch.setattr(torch.linalg, "eigh", flipped)


def test_pca_colours_are_stable_and_in_range(other_signs):
    patches = torch.randn(4, 16, 12)
    colors = pca_colors(patches)
    assert colors.shape == (4, 16, 3)
    assert colors.min() >= 0 and colors.max() <= 1
    other_signs()
    torch.testing.assert_close(pca_colors(patches), colors)


def test_colours_are_the_components_of_numpy():
    x = torch.randn(200, 6) * torch.tensor([1, 9, 2, 5, 1, 3.0]) + 4
    centred = (x - x.mean(0)).numpy()
    _, _, v = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ v[:3].T
    found = principal_components(x, 3).numpy()
    correlation = np.corrcoef(found.T, expected.T)[:3, 3:]
    np.testing.assert_allclose(np.abs(correlation), np.eye(3), atol=1e-5)


def object_tokens():
    """Tokens (8, 8, 16) of a square object before a background, and where it is."""
    torch.manual_seed(2)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:5] = True
    return torch.randn(8, 8, 16) * 0.1 + mask[..., None] * torch.randn(16), mask


def test_foreground_is_where_cls_looks_whatever_the_sign(other_signs):
    tokens, mask = object_tokens()
    component = first_component(tokens, 0.1 + mask.float())
    assert component[mask].min() > component[~mask].median() + 0.3
    assert component[3:5, 3].min() > 0  # soft at the edge: means of 3 x 3
    torch.testing.assert_close(first_component(tokens, 1.1 - mask.float()), -component)
    other_signs()
    torch.testing.assert_close(first_component(tokens, 0.1 + mask.float()), component)


class Oracle(torch.nn.Module):
    """A backbone whose tokens and attention are read off the true masks, scene by scene."""

    patch_size = 4
    num_register_tokens = 0

    def __init__(self, scenes, useless=False):
        super().__init__()
        masks = torch.stack([torch.from_numpy(scenes.scene(i)[2] > 0) for i in range(len(scenes))]).float()
        self.share = torch.nn.functional.avg_pool2d(masks[:, None], 4).flatten(1)  # (n, 256)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = -1
        self.useless = useless

    def forward(self, images):
        self.seen = min(self.seen + 1, len(self.share) - 1)
        share = self.share[self.seen : self.seen + 1]
        if self.useless:
            share = torch.rand(1, 256)
        tokens = torch.stack([share, share / 2, torch.rand(1, 256) / 20], -1)
        return Tokens(tokens[:, 0], tokens[:, :0], tokens)

    def attention_maps(self, images):
        rows = torch.nn.functional.pad(self.share[self.seen], (1, 0))
        return rows.expand(1, 2, 257, 257)


def test_iou_knows_an_oracle_from_noise():
    scenes = Scenes(20, 5, 64)
    torch.manual_seed(0)
    assert first_component_iou(Oracle(scenes), scenes, 64, 20) > 0.8
    assert first_component_iou(Oracle(scenes, useless=True), scenes, 64, 20) < 0.5


def is_grey(picture):
    return (np.array(picture) == visualize.BACKGROUND_GREY).all(-1)


def test_background_is_grey_and_spends_no_colours():
    scenes = Scenes(1, 5, 64)
    image = torch.from_numpy(scenes.scene(0)[0]).permute(2, 0, 1)
    (picture,) = pca_row(Oracle(scenes), [image], side=16)  # a pixel for each patch
    assert not is_grey(picture).any()
    oracle = Oracle(scenes)
    (picture,) = pca_row(oracle, [image], side=16, hide_background=True)
    grey = is_grey(picture).flatten()
    share = oracle.share[0].numpy()
    assert grey[share == 0].mean() > 0.8
    assert grey[share == 1].mean() < 0.2


# ---- attention


@pytest.mark.parametrize("choice", ["pytorch", "triton"])
def test_explicit_attention_is_that_of_the_kernel(choice, monkeypatch, request):
    """Rows sum to one, and probabilities times v are what the last block computes by its kernel."""
    if choice == "triton":
        request.getfixturevalue("interpreter")  # all this is in fp32
    backbone = tiny()
    block = backbone.blocks[-1]
    inputs = []
    block.norm1.register_forward_hook(lambda *args: inputs.append(args[-1]))
    with torch.no_grad():
        maps = backbone.attention_maps(normalize(random_image()[None]))
        heads = block.attn.heads(inputs[0])
        groups = [(1, maps.shape[-1])]
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
        explicit = (maps[0] @ heads[:, 2].transpose(0, 1)).transpose(0, 1)  # (T, H, d)
        monkeypatch.setattr(kernels, "CHOICE", choice)
        torch.testing.assert_close(kernels.attention(heads, groups), explicit, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(block.attn(inputs[0], groups), block.attn.proj(explicit.flatten(1)))


def test_maps_are_of_cls_and_registers_over_patches():
    backbone = tiny(registers=2)
    image = random_image(32, 48)
    maps = patch_attention(backbone, image)
    whole = backbone.attention_maps(normalize(image[None]))[0]
    assert maps.shape == (2, 3, 4, 6)
    torch.testing.assert_close(maps[1, 2].flatten(), whole[1, 2, 3:])
    torch.testing.assert_close(maps.sum((-1, -2)) + whole[:, :3, :3].sum(-1), torch.ones(2, 3))


def test_many_heads_are_wrapped():
    rows = attention_rows(tiny(heads=12, registers=1), random_image())
    assert [len(row.tiles) for row in rows] == [9, 4, 9, 4]
    assert [row.title for row in rows] == ["[CLS]", "", "register 1", ""]
    assert rows[0].captions[0].startswith("all heads: ")
    assert rows[1].captions[-1].startswith("head 12: ")


# ---- norms


def test_norms_are_taken_before_the_final_norm():
    backbone = tiny()
    image = random_image()
    seen = []
    backbone.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    norms = patch_norms(backbone, image)
    after = patch_tokens(backbone, image).norm(dim=-1)
    torch.testing.assert_close(norms.flatten(), seen[0][3:].norm(dim=-1))
    assert norms.shape == (4, 6)
    assert not torch.allclose(norms, after, rtol=0.1)
    backbone.norm.weight.data *= 100
    torch.testing.assert_close(patch_norms(backbone, image), norms)


def test_planted_outliers_are_counted():
    torch.manual_seed(0)
    norms = 40 + 5 * torch.randn(10_000)
    small = dict(embed_dim=384, depth=12)
    assert outliers(norms, small)[0] == 0
    norms[:237] = 200 + 50 * torch.rand(237)
    share, limit = outliers(norms, small)
    assert share == pytest.approx(0.0237)
    assert 70 < limit < 150
    assert outliers(norms, dict(embed_dim=1536, depth=40)) == (pytest.approx(0.0237), 150)
    assert outliers(torch.full((9,), 3.0), small) == (0, 6)  # all alike: nothing stands out


# ---- plots


def pixels_of(picture, color):
    """bool (height, width)"""
    return (np.array(picture) == color).all(-1)


def test_plots_are_to_scale_and_nothing_is_drawn_over_the_texts():
    size = (300, 200)
    area = (60, 30, 280, 160)
    plot = Plot(size, area, x_range=(0, 10), y_range=(0, 4))
    plot.draw_bar(2, 4, 3, (0, 0, 255), text="7")
    plot.draw_line([(0, 0), (10, 4)], (255, 0, 0), width=1)
    blue = pixels_of(plot.image, (0, 0, 255)) | pixels_of(plot.image, (255, 0, 0))
    columns = blue[31:160].sum(0)
    assert columns[60 + 44 + 3 : 60 + 88 - 3].min() == pytest.approx(130 * 3 / 4, abs=2)
    assert columns[60 + 44 - 3] == 1 and columns[60 + 88 + 3] == 1  # the line alone
    red_y, red_x = pixels_of(plot.image, (255, 0, 0)).nonzero()
    np.testing.assert_allclose(160 - (red_x - 60) / 220 * 130, red_y, atol=1)


def test_each_text_of_a_plot_has_ink_of_its_own():
    """Ticks, labels, title, limit and legend, one after the other: no text lies on another."""

    def ink(*names):
        plot = Plot((400, 200), (70, 30, 300, 150), x_range=(0, 1), y_range=(0, 1))
        draw = dict(
            title=lambda: plot.draw_title("title"),
            limit=lambda: plot.draw_limit(0.9, "limit", "black"),
            legend=lambda: plot.draw_legend([("one", "black"), ("two", "black")]),
            ticks=lambda: plot.draw_axes([(0, "0"), (1, "10")], [(0, "0"), (1, "1,000")]),
            x_label=lambda: plot.draw_axes([], [], x_label="across"),
            y_label=lambda: plot.draw_axes([], [], y_label="upwards"),
        )
        for name in names:
            draw[name]()
        return (np.array(plot.image).max(-1) < 128).sum()

    axes = 230 + 120 + 1  # pixels of the two lines
    names = ["title", "limit", "legend", "ticks", "x_label", "y_label"]
    own = [ink(name) for name in names]
    assert min(own) > 10
    crossing = 2  # pixels of the line of the limit on the axis
    assert ink(*names) == sum(own) - 2 * axes - crossing  # three of them draw the axes


def test_the_histogram_counts_on_a_logarithmic_axis():
    norms = torch.cat([torch.full((999,), 5.0), torch.full((9,), 19.0)])
    picture = norm_histogram(norms, 10.0)
    columns = pixels_of(picture, COLORMAP[1]).sum(0)
    heights = sorted(set(columns[columns > 0]))
    assert len(heights) == 2
    assert heights[0] / heights[1] == pytest.approx(np.log(10) / np.log(1000), abs=0.02)
    assert pixels_of(picture, visualize.LIMIT_RED).sum(0).max() > 140


# ---- contact sheets


def color_tile(k, size):
    return Image.new("RGB", size, (10 + 20 * k, 255 - 20 * k, 100))


@pytest.mark.parametrize("texts", [False, True])
def test_nothing_overlaps_on_a_sheet(texts):
    """Every tile is there with all of its pixels; texts find room, also those wider than their tile."""
    sizes = [[(30, 40), (50, 40), (5, 90)], [(70, 20)], [(30, 10), (20, 20), (20, 30)]]
    rows = []
    for i, row in enumerate(sizes):
        rows.append([color_tile(3 * i + j, size) for j, size in enumerate(row)])
    titles = ["first", "", "a title of\ntwo lines"] if texts else None
    captions = [["a caption that is wide", "b"], [], ["c", "", "d\nd"]] if texts else None
    plain = contact_sheet(rows)
    picture = contact_sheet(rows, titles, captions)
    for i, row in enumerate(sizes):
        for j, (width, height) in enumerate(row):
            color = color_tile(3 * i + j, (1, 1)).getpixel((0, 0))
            assert pixels_of(picture, color).sum() == width * height
    dark = np.array(picture).max(-1) < 60
    assert (dark.sum() > 200) == texts
    assert (picture.width > plain.width and picture.height > plain.height) == texts
    assert plain.size == (30 + 50 + 20 + 8, 90 + 20 + 30 + 8)  # rows of three share their columns


def test_each_text_has_ink_of_its_own():
    def ink(*texts):
        sheet = contact_sheet([[color_tile(1, (20, 20))] * 2], *texts)
        return (np.array(sheet).max(-1) < 128).sum()

    left = ink(["row"])
    under = ink(None, [["one", "two"]])
    both = ink(["row"], [["one", "two"]])
    assert both == left + under
    assert ink(None, [["one"]]) < under
    assert ink() == 0 < left


@pytest.mark.parametrize("size", [(64, 64), (37, 500), (1000, 40)])
def test_tiles_have_one_area_and_their_own_shape(size):
    width, height = image_tile(torch.zeros(3, size[1], size[0], dtype=torch.uint8), 100).size
    assert width * height == pytest.approx(100**2, rel=0.05)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.05)


# ---- the commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("visualize") / "run"
    extra = "train.checkpoint_every=2", "train.OFFICIAL_EPOCH_LENGTH=4", "student.arch=vit_laptop"
    train.main([*TINY_RUN, "--output-dir", str(folder), *extra])
    return folder


@pytest.fixture
def command(run, tmp_path, monkeypatch, capsys):
    def go(what, *words, weights=run):
        out = tmp_path / f"{what}.png"
        argv = ["visualize.py", what, "--weights", str(weights), *map(str, words), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", argv)
        visualize.main()
        with Image.open(out) as picture:
            return picture.convert("RGB"), capsys.readouterr().out

    return go


def test_rows_through_training(run):
    """The start, step 2, step 4: the first is the untrained copy, the last is the teacher."""
    backbone, cfg = open_backbone(run)
    images = scene_images(9, 0, 3, 6)
    rows = []
    titles = []
    for title, teacher in teachers_through_training(run, backbone, cfg):
        titles.append(title)
        rows.append([np.array(tile) for tile in pca_row(teacher, images)])
    untrained = [np.array(tile) for tile in pca_row(untrained_copy(backbone, cfg), images)]
    trained = [np.array(tile) for tile in pca_row(backbone, images)]
    assert titles == ["untrained", "step 2", "step 4"]
    assert np.array_equal(rows[0], untrained)
    assert np.array_equal(rows[2], trained)
    assert not np.array_equal(rows[1], rows[2])
    assert not np.array_equal(rows[0], rows[1])


def test_the_picture_through_training_has_these_rows(command, run):
    picture, _ = command("training", "scenes:9", "--count", "3")
    picture = np.array(picture)
    backbone, _ = open_backbone(run)
    last = np.array(pca_row(backbone, scene_images(9, 0, 3, 6))[-1])
    assert np.array_equal(picture[-TILE_SIDE:, -TILE_SIDE:], last)
    for rows_above in (1, 2):
        top = -TILE_SIDE - rows_above * (TILE_SIDE + 4)
        assert not np.array_equal(picture[top:, -TILE_SIDE:][:TILE_SIDE], last)


def test_a_run_without_checkpoints_says_how_to_get_some(command, run, tmp_path):
    with pytest.raises(UserError, match="no checkpoints: train with train.checkpoint_every"):
        command("training", "scenes:9", weights=run / "teacher.pth")


def test_pca_beside_another_backbone_with_its_iou(command, run):
    random = f"random:{run}"
    picture, said = command("pca", "scenes:9", "--count", "2", "--foreground", "--against", random)
    assert "true masks of 9 scenes" in said
    assert "if everything were called foreground" in said
    numbers = [float(line.split()[0]) for line in said.splitlines() if line.startswith("  0.")]
    assert len(numbers) == 3
    assert all(0 < number < 1 for number in numbers)
    assert is_grey(picture).mean() > 0.05


@pytest.fixture
def odd_photos(tmp_path):
    """Photos of odd sizes and modes."""
    folder = tmp_path / "odd"
    folder.mkdir()
    sizes = (("narrow", "RGB", (37, 500)), ("wide", "RGBA", (300, 20)), ("grey", "L", (50, 50)))
    for name, mode, size in sizes:
        Image.effect_noise(size, 90).convert(mode).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("what", ["pca", "attention", "norms", "sheet"])
def test_photos_of_any_size(what, command, odd_photos):
    picture, _ = command(what, odd_photos, "--size", "12", "--count", "3")
    assert picture.width > TILE_SIDE
    assert picture.height > TILE_SIDE


def test_a_thread_is_no_photo(command, odd_photos):
    Image.new("RGB", (1, 20_000)).save(odd_photos / "thread.png")
    _, said = command("norms", odd_photos, "--size", "8", "--count", "9")
    assert "left out: " in said
    assert "thread.png: 1 x 20000 pixels, more than 32 times" in said
    assert "patch tokens are longer than" in said
    with pytest.raises(UserError, match="nothing to draw: .*thread.png: 1 x 20000 pixels"):
        command("norms", odd_photos / "thread.png")


def test_long_photos_have_few_patches():
    backbone = tiny()
    cfg = config.load(model="debug")
    (image,) = visualize.prepare_images([Image.new("RGB", (3000, 100))], backbone, cfg, 512)
    patches = image.shape[1] * image.shape[2] / 64
    assert 0.8 * visualize.MAX_PATCHES < patches < 1.2 * visualize.MAX_PATCHES
    (image,) = visualize.prepare_images([Image.new("RGB", (30, 10))], backbone, cfg, 0)
    assert image.shape == (3, 64, 192)  # twice the 32 pixels of its evaluation


def test_register_study(command, run, tmp_path):
    without = tmp_path / "none.pth"
    torch.save({"teacher": tiny(registers=0).state_dict(), "arch": {"num_heads": 2}}, without)
    picture, said = command("registers", "scenes:4", "--count", "1", "--against", without)
    registers = open_backbone(run)[0].num_register_tokens
    assert f"{registers} registers:" in said
    assert "0 registers:" in said
    assert said.count("longer than") == 3
    assert "small models have no outliers" in said
    assert "dinov2_vitg14_reg4" in said
    assert picture.height > 2 * TILE_SIDE


def test_what_does_not_fit_is_said(command, run, tmp_path):
    wrong = [
        (["sheet", "--against", run], "--against has no effect on sheet: leave it out"),
        (["norms", "--foreground"], "--foreground has no effect on norms: leave it out"),
        (["registers"], "name the other with --against"),
        (["pca", tmp_path / "nowhere.png"], "nowhere.png"),
        (["pca"], "has no evaluation images: name photos"),  # this run names none
    ]
    for words, message in wrong:
        with pytest.raises(UserError, match=message):
            command(*words)
    with pytest.raises(SystemExit):
        command("pca", "--count", "-1")
