"""Pictures: what is read off a backbone, rules for signs and outliers, page layout, and every command."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import TINY

import config
import train
from config import UserError
from data import normalize
from evals import visualize
from evals.visualize import (
    attention_lines,
    attention_of,
    first_component,
    first_component_iou,
    outliers,
    page,
    patch_norms,
    patch_tokens,
    pca_colors,
    pca_row,
    pca_sheet,
    through_training,
    tile,
)
from features import EvalImages, open_backbone, untrained_copy
from kernels import attention as kernels
from model import Tokens, VisionTransformer
from scenes import Scenes


def tiny(heads=2, registers=2):
    torch.manual_seed(0)
    size = dict(patch_size=8, img_size=32, num_register_tokens=registers, init_std=0.1)
    return VisionTransformer(16 * heads, 2, heads, **size).eval()


def image(height=32, width=48):
    torch.manual_seed(1)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


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
    assert colors.shape == (4, 16, 3) and colors.min() >= 0 and colors.max() <= 1
    other_signs()
    torch.testing.assert_close(pca_colors(patches), colors)


def test_colours_are_the_components_of_numpy():
    x = torch.randn(200, 6) * torch.tensor([1, 9, 2, 5, 1, 3.0]) + 4
    _, _, v = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    expected = (x - x.mean(0)).numpy() @ v[:3].T
    found = np.corrcoef(visualize.principal(x, 3).T.numpy(), expected.T)[:3, 3:]
    np.testing.assert_allclose(np.abs(found), np.eye(3), atol=1e-5)


def test_pca_sheet_has_a_row_per_backbone():
    images = torch.stack([x for x, _ in EvalImages(Scenes(3, 0, 32), 32)])
    sheet = pca_sheet([tiny(), tiny()], images, side=50)
    assert sheet.size == (3 * 54 - 4, 3 * 54 - 4)


def two_things():
    """Tokens (8, 8, 16) of a square thing before a background, and where it is."""
    torch.manual_seed(2)
    there = torch.zeros(8, 8, dtype=torch.bool)
    there[2:6, 2:5] = True
    return torch.randn(8, 8, 16) * 0.1 + there[..., None] * torch.randn(16), there


def test_foreground_is_where_cls_looks_whatever_the_sign(other_signs):
    tokens, there = two_things()
    y = first_component(tokens, 0.1 + there.float())
    assert (
        y[there].min() > y[~there].median() + 0.3 and y[3:5, 3].min() > 0
    )  # soft at the edge: means of 3 x 3
    torch.testing.assert_close(first_component(tokens, 1.1 - there.float()), -y)
    other_signs()
    torch.testing.assert_close(first_component(tokens, 0.1 + there.float()), y)


class Oracle(torch.nn.Module):
    """A backbone whose tokens and attention are read off the true masks, scene by scene."""

    patch_size, num_register_tokens = 4, 0

    def __init__(self, scenes, useless=False):
        super().__init__()
        masks = torch.stack([torch.from_numpy(scenes.scene(i)[2] > 0) for i in range(len(scenes))]).float()
        self.share = torch.nn.functional.avg_pool2d(masks[:, None], 4).flatten(1)  # (n, 256)
        self.weight, self.seen, self.useless = torch.nn.Parameter(torch.zeros(1)), -1, useless

    def forward(self, images):
        self.seen = min(self.seen + 1, len(self.share) - 1)
        share = torch.rand(1, 256) if self.useless else self.share[self.seen : self.seen + 1]
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


def test_background_is_grey_and_spends_no_colours():
    scenes = Scenes(1, 5, 64)
    x = torch.from_numpy(scenes.scene(0)[0]).permute(2, 0, 1)
    (picture,) = pca_row(Oracle(scenes), [x], side=16)  # a pixel for each patch
    assert not (np.array(picture) == visualize.GREY).all(-1).any()
    oracle = Oracle(scenes)
    (picture,) = pca_row(oracle, [x], side=16, cut_out=True)
    grey = (np.array(picture) == visualize.GREY).all(-1).flatten()
    share = oracle.share[0].numpy()
    assert grey[share == 0].mean() > 0.8 and grey[share == 1].mean() < 0.2


# ---- attention


@pytest.mark.parametrize("choice", ["pytorch", "triton"])
def test_explicit_attention_is_that_of_the_kernel(choice, monkeypatch, request):
    """Rows sum to one, and probabilities times v are what the last block computes by its kernel."""
    if choice == "triton":
        request.getfixturevalue("interpreter")  # all this is in fp32
    m, x = tiny(), normalize(image()[None])
    block, inputs = m.blocks[-1], []
    block.norm1.register_forward_hook(lambda *args: inputs.append(args[-1]))
    with torch.no_grad():
        maps = m.attention_maps(x)
        heads, groups = block.attn.heads(inputs[0]), [(1, maps.shape[-1])]
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
        explicit = (maps[0] @ heads[:, 2].transpose(0, 1)).transpose(0, 1)  # (T, H, d)
        monkeypatch.setattr(kernels, "CHOICE", choice)
        torch.testing.assert_close(kernels.attention(heads, groups), explicit, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(block.attn(inputs[0], groups), block.attn.proj(explicit.flatten(1)))


def test_maps_are_of_cls_and_registers_over_patches():
    m, x = tiny(registers=2), image(32, 48)
    maps, whole = attention_of(m, x), m.attention_maps(normalize(x[None]))[0]
    assert maps.shape == (2, 3, 4, 6)
    torch.testing.assert_close(maps[1, 2].flatten(), whole[1, 2, 3:])
    torch.testing.assert_close(maps.sum((-1, -2)) + whole[:, :3, :3].sum(-1), torch.ones(2, 3))


def test_many_heads_are_wrapped():
    lines = attention_lines(tiny(heads=12, registers=1), image())
    assert [len(tiles) for tiles, _, _ in lines] == [9, 4, 9, 4]
    assert [title for _, title, _ in lines] == ["[CLS]", "", "register 1", ""]
    assert lines[1][2][-1].startswith("head 12: ")


# ---- norms


def test_norms_are_taken_before_the_final_norm():
    m, x, seen = tiny(), image(), []
    m.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    norms, after = patch_norms(m, x), patch_tokens(m, x).norm(dim=-1)
    torch.testing.assert_close(norms.flatten(), seen[0][3:].norm(dim=-1))
    assert norms.shape == (4, 6) and not torch.allclose(norms, after, rtol=0.1)
    m.norm.weight.data *= 100
    torch.testing.assert_close(patch_norms(m, x), norms)


def test_planted_outliers_are_counted():
    torch.manual_seed(0)
    norms, small = 40 + 5 * torch.randn(10_000), dict(embed_dim=384, depth=12)
    assert outliers(norms, small)[0] == 0
    norms[:237] = 200 + 50 * torch.rand(237)
    share, limit = outliers(norms, small)
    assert share == pytest.approx(0.0237) and 70 < limit < 150
    assert outliers(norms, dict(embed_dim=1536, depth=40)) == (pytest.approx(0.0237), 150)
    assert outliers(torch.full((9,), 3.0), small) == (0, 6)  # all alike: nothing stands out


# ---- pages


def color(k, size):
    return Image.new("RGB", size, (10 + 20 * k, 255 - 20 * k, 100))


@pytest.mark.parametrize("texts", [False, True])
def test_nothing_overlaps_on_a_page(texts):
    """Every tile is there with all of its pixels; texts find room, also those wider than their tile."""
    sizes = [[(30, 40), (50, 40), (5, 90)], [(70, 20)], [(30, 10), (20, 20), (20, 30)]]
    rows = [[color(3 * i + j, size) for j, size in enumerate(row)] for i, row in enumerate(sizes)]
    titles = ["first", "", "a title of\ntwo lines"] if texts else None
    captions = [["a caption that is wide", "b"], [], ["c", "", "d\nd"]] if texts else None
    plain, picture = page(rows), page(rows, titles, captions)
    pixels = np.array(picture).reshape(-1, 3)
    for i, row in enumerate(sizes):
        for j, (width, height) in enumerate(row):
            assert (pixels == color(3 * i + j, (1, 1)).getpixel((0, 0))).all(-1).sum() == width * height
    assert ((pixels.max(-1) < 60).sum() > 200) == texts
    assert (picture.width > plain.width and picture.height > plain.height) == texts
    assert plain.size == (30 + 50 + 20 + 8, 90 + 20 + 30 + 8)  # rows of three share their columns


def test_each_text_has_ink_of_its_own():
    def ink(*texts):
        return (np.array(page([[color(1, (20, 20))] * 2], *texts)).max(-1) < 128).sum()

    left, under, both = ink(["row"]), ink(None, [["one", "two"]]), ink(["row"], [["one", "two"]])
    assert both == left + under and ink(None, [["one"]]) < under and ink() == 0 < left


@pytest.mark.parametrize("size", [(64, 64), (37, 500), (1000, 40)])
def test_tiles_have_one_area_and_their_own_shape(size):
    width, height = tile(torch.zeros(3, size[1], size[0], dtype=torch.uint8), 100).size
    assert width * height == pytest.approx(100**2, rel=0.05)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.05)


# ---- the commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("visualize") / "run"
    extra = "train.checkpoint_every=2", "train.OFFICIAL_EPOCH_LENGTH=4", "student.arch=vit_laptop"
    train.main([*TINY, "--output-dir", str(folder), *extra])
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
    """The start, step 2, step 4: the first is the random twin, the last is the teacher."""
    backbone, cfg = open_backbone(run)
    images = [torch.from_numpy(Scenes(9).scene(i)[0]).permute(2, 0, 1) for i in (0, 3, 6)]
    rows, titles = [], []
    for title, b, x in through_training(run, backbone, images, cfg):
        titles.append(title)
        rows.append([np.array(t) for t in pca_row(b, x)])
    expected = [[np.array(t) for t in pca_row(b, images)] for b in (untrained_copy(backbone, cfg), backbone)]
    assert titles == ["untrained", "step 2", "step 4"]
    assert np.array_equal(rows[0], expected[0]) and np.array_equal(rows[2], expected[1])
    assert not np.array_equal(rows[1], rows[2]) and not np.array_equal(rows[0], rows[1])


def test_the_picture_through_training_has_these_rows(command, run):
    picture, _ = command("training", "scenes:9", "--count", "3")
    backbone, _ = open_backbone(run)
    images = [torch.from_numpy(Scenes(9).scene(i)[0]).permute(2, 0, 1) for i in (0, 3, 6)]
    last, side = pca_row(backbone, images)[-1], visualize.SIDE
    assert np.array_equal(np.array(picture)[-side:, -side:], np.array(last))
    others = [np.array(picture)[-side - k * (side + 4) :, -side:][:side] for k in (1, 2)]
    assert not any(np.array_equal(x, np.array(last)) for x in others)


def test_a_run_without_checkpoints_says_how_to_get_some(command, run, tmp_path):
    with pytest.raises(UserError, match="no checkpoints: train with train.checkpoint_every"):
        command("training", "scenes:9", weights=run / "teacher.pth")


def test_pca_beside_another_backbone_with_its_iou(command, run):
    random = f"random:{run}"
    picture, said = command("pca", "scenes:9", "--count", "2", "--foreground", "--against", random)
    assert "true masks of 9 scenes" in said and "if everything were called foreground" in said
    numbers = [float(line.split()[0]) for line in said.splitlines() if line.startswith("  0.")]
    assert len(numbers) == 3 and all(0 < x < 1 for x in numbers)
    assert (np.array(picture) == visualize.GREY).all(-1).mean() > 0.05


@pytest.fixture
def odd(tmp_path):
    """Photos of odd sizes and modes."""
    (tmp_path / "odd").mkdir()
    for name, mode, size in (
        ("narrow", "RGB", (37, 500)),
        ("wide", "RGBA", (300, 20)),
        ("grey", "L", (50, 50)),
    ):
        picture = Image.effect_noise(size, 90).convert(mode)
        picture.save(tmp_path / "odd" / f"{name}.png")
    return tmp_path / "odd"


@pytest.mark.parametrize("what", ["pca", "attention", "norms", "sheet"])
def test_photos_of_any_size(what, command, odd):
    picture, _ = command(what, odd, "--size", "12", "--count", "3")
    assert picture.width > visualize.SIDE and picture.height > visualize.SIDE


def test_a_thread_is_no_photo(command, odd):
    Image.new("RGB", (1, 20_000)).save(odd / "thread.png")
    _, said = command("norms", odd, "--size", "8", "--count", "9")
    assert "left out: " in said and "thread.png: 1 x 20000 pixels, more than 32 times" in said
    assert "patch tokens are longer than" in said
    with pytest.raises(UserError, match="nothing to draw: .*thread.png: 1 x 20000 pixels"):
        command("norms", odd / "thread.png")


def test_long_photos_have_few_patches():
    m, cfg = tiny(), config.load(model="debug")
    (x,) = visualize.ready([Image.new("RGB", (3000, 100))], m, cfg, 512)
    patches = x.shape[1] * x.shape[2] / 64
    assert 0.8 * visualize.MOST < patches < 1.2 * visualize.MOST
    (x,) = visualize.ready([Image.new("RGB", (30, 10))], m, cfg, 0)
    assert x.shape == (3, 64, 192)  # twice the 32 pixels of its evaluation


def test_register_study(command, run, tmp_path):
    torch.save({"teacher": tiny(registers=0).state_dict(), "arch": {"num_heads": 2}}, tmp_path / "none.pth")
    picture, said = command("registers", "scenes:4", "--count", "1", "--against", tmp_path / "none.pth")
    registers = open_backbone(run)[0].num_register_tokens
    assert f"{registers} registers:" in said and "0 registers:" in said and said.count("longer than") == 3
    assert "small models have no outliers" in said and "dinov2_vitg14_reg4" in said
    assert picture.height > 2 * visualize.SIDE


def test_what_does_not_fit_is_said(command, run, tmp_path):
    wrong = [
        (["sheet", "--against", run], "--against is nothing for sheet"),
        (["norms", "--foreground"], "--foreground is nothing for norms"),
        (["registers"], "name the other with --against"),
        (["pca", "--count", "-1"], "must be positive"),
        (["pca", tmp_path / "nowhere.png"], "nowhere.png does not exist"),
        (["pca"], "has no evaluation images: name photos"),  # this run names none
    ]
    for words, message in wrong:
        with pytest.raises(UserError, match=message):
            command(*words)
