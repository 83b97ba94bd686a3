"""The crops and their colours against Pillow (tools/bench_input.py), operation by operation."""

import numpy as np
import pytest
import torch
from PIL import Image

import config
from data import (
    AFTER_JITTER,
    IMAGENET_STD,
    JITTER,
    augment_batched,
    augment_one_by_one,
    crop_and_resize,
    photometric,
    sample_crop_params,
)
from sources import to_tensor
from tools.bench_input import PILLOW_AFTER, PILLOW_JITTER, photo, pillow_crop

pytestmark = pytest.mark.usefixtures("one_thread")


OPERATIONS = (*JITTER.values(), *AFTER_JITTER.values())  # in the order of the columns of Pillow's


def bytes_of(image):
    return to_tensor(image).float()


def apply(operation, image, value):
    return operation(bytes_of(image)[None].contiguous(), torch.full((1, 1, 1, 1), value))[0]


@pytest.mark.parametrize("size", [224, 98])
@pytest.mark.parametrize(
    "k,value", [(0, 0.6), (0, 1.4), (1, 0.6), (1, 1.4), (2, 0.8), (2, 1.2), (3, -0.1), (3, 0.07), (3, 0.5)]
)
def test_jitter_agrees_with_pillow(k, value, size):
    image = photo(size, size, seed=size)
    difference = (apply(OPERATIONS[k], image, value) - bytes_of(PILLOW_JITTER[k](image, value))).abs()
    assert difference.mean() < 2 and difference.quantile(0.99) < 6


@pytest.mark.parametrize("k,value", [(0, 1.0), (2, 1.0), (1, 0.6), (1, 1.0), (1, 1.4), (1, 2.0)])
def test_grayscale_blur_solarize_agree_with_pillow(k, value):
    """Pillow blurs with repeated box filters and repeated edge pixels: compare blur inside the frame."""
    image = photo(224, 224, seed=3)
    difference = (apply(OPERATIONS[4 + k], image, value) - bytes_of(PILLOW_AFTER[k](image, value))).abs()
    assert difference[:, 8:-8, 8:-8].mean() < 2


def test_blur_is_the_nine_tap_gaussian():
    """Against an exact convolution in float64 with mirrored edges, as torchvision defines it."""
    x, sigma = np.random.default_rng(0).random((20, 17)), 1.3
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(x, 4, mode="reflect")
    expected = np.array(
        [[(padded[i : i + 9, j : j + 9] * kernel).sum() for j in range(17)] for i in range(20)]
    )
    ours = OPERATIONS[5](
        torch.from_numpy(x).float().expand(2, 3, 20, 17).clone(), torch.tensor([sigma, 0.1]).view(2, 1, 1, 1)
    )
    np.testing.assert_allclose(ours[0, 1], expected, atol=1e-6)
    np.testing.assert_allclose(ours[1, 2], x, atol=1e-6)  # sigma .1 changes nothing


@pytest.mark.parametrize(
    "box", [(50, 40, 350, 300), (10, 20, 130, 110), (100, 100, 40, 50), (0, 0, 500, 375)]
)
def test_cut_agrees_with_pillow(box):
    image, (left, top, w, h) = photo(), box
    for size in (224, 98):
        expected = image.crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)
        difference = (crop_and_resize(to_tensor(image), np.array(box), size, False).float() - bytes_of(expected)).abs()
        assert difference.max() <= 2 and difference.mean() < 0.05
        flipped = crop_and_resize(to_tensor(image), np.array(box), size, True)
        assert torch.equal(flipped, crop_and_resize(to_tensor(image), np.array(box), size, False).flip(-1))


def draws(count, crops, width=500, height=375):
    rng = np.random.default_rng(0)
    return [np.stack(x) for x in zip(*(sample_crop_params(rng, crops, width, height) for _ in range(count)))]


@pytest.mark.parametrize("size,batch", [(224, 3), (98, 40), (32, 200)])
def test_whole_chain_agrees_with_pillow(size, batch):
    """All operations in their random orders, batched or one by one, against the image-by-image pipeline."""
    crops = config.load().crops
    rows = draws(batch, crops)[2][:, 1]  # the second crop: it alone is solarized
    rows[:, 9] = 0  # blur is another filter in Pillow; it has its own test
    images = [photo(size, size, seed=k % 5) for k in range(batch)]
    ours = photometric(torch.stack([to_tensor(x) for x in images]), torch.from_numpy(rows))
    whole = (0, 0, size, size)
    expected = torch.stack([pillow_crop(x, whole, size, False, row) for x, row in zip(images, rows)])
    difference = (ours - expected).abs() * IMAGENET_STD * 255
    # Near its threshold a solarized pixel may fall on either side, a large jump: look at the mean.
    assert difference.mean() < 2 and difference.median() < 1.5


def test_batching_changes_nothing():
    rows = torch.from_numpy(draws(60, config.load().crops)[2][:, 1])
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    alone = torch.cat([photometric(images[i : i + 1], rows[i : i + 1]) for i in range(60)])
    torch.testing.assert_close(photometric(images, rows), alone, atol=1e-5, rtol=0)
    for size in (32, 98):  # a batch is as good as images one by one, which leave out taps below 1/1000
        big = torch.randint(0, 256, (60, 3, size, size), dtype=torch.uint8)
        (_, whole), *rest = [(here, x) for here, x in augment_batched(big[:9], rows[:9])]
        alone = torch.cat([x for _, x in augment_one_by_one(big[:9], rows[:9])])
        assert not rest and (whole - alone).abs().max() < 0.3
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(photometric(channels_last, rows), photometric(images, rows))


def test_probabilities_and_ranges():
    crops = config.load().crops
    boxes, flips, params = draws(2000, crops)
    near = lambda x, p: abs(np.mean(x) - p) < 0.04  # noqa: E731
    assert near(flips, 0.5) and near(params[..., 4] >= 0, 0.8) and near(params[..., 8], 0.2)
    blurred, solarized = params[..., 9] > 0, params[..., 10] > 0
    assert not blurred[:, 0].any() and near(blurred[:, 1], 0.9) and near(blurred[:, 2:], 0.5)
    assert near(solarized[:, 1], 0.2) and not solarized[:, [0, *range(2, 10)]].any()
    for k, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert low <= params[..., k].min() < low + 0.01 and high - 0.01 < params[..., k].max() <= high
    assert params[..., 9][blurred].min() >= 0.1 and params[..., 9].max() <= 2
    turns = params[..., 4:8][params[..., 4] >= 0]
    assert (np.sort(turns, axis=1) == np.arange(4)).all()  # every order, each as often as the others
    assert len(np.unique(turns, axis=0)) == 24 and all(near(turns[:, k] == 0, 0.25) for k in range(4))
    share = boxes[..., 2] * boxes[..., 3] / (500 * 375)
    assert share[:, :2].min() > 0.31 and share[:, 2:].min() > 0.045 and share[:, 2:].max() < 0.33
    aspect = boxes[..., 2] / boxes[..., 3]
    assert aspect.min() > 0.72 and aspect.max() < 1.37


@pytest.mark.parametrize("blur,expected", [("as_written", (1, 0.1, 0.5)), ((0.3, 0.6, 0.0), (0.3, 0.6, 0.0))])
def test_blur_settings(blur, expected):
    crops = config.load().crops
    crops.blur = blur
    params = draws(1000, crops)[2]
    share = (params[:, 0, 9] > 0).mean(), (params[:, 1, 9] > 0).mean(), (params[:, 2:, 9] > 0).mean()
    assert np.abs(np.array(share) - expected).max() < 0.06


@pytest.mark.parametrize("width,height", [(1, 20000), (20000, 1), (1, 1), (3000, 40), (32, 32)])
def test_boxes_fit_any_image(width, height):
    """Where no aspect ratio in 3/4..4/3 fits, the largest centred box that keeps to it is taken."""
    left, top, w, h = draws(100, config.load().crops, width, height)[0].reshape(-1, 4).T
    assert (w >= 1).all() and (h >= 1).all() and (left >= 0).all() and (top >= 0).all()
    assert (left + w <= width).all() and (top + h <= height).all()
    if (width, height) == (3000, 40):
        assert ((w == 53) & (h == 40) & (left == (3000 - 53) // 2)).sum() > 100


def test_boxes_are_uniform_in_place():
    boxes = draws(500, config.load().crops)[0].reshape(-1, 4)
    for k, size in enumerate((500, 375)):
        room = size - boxes[:, 2 + k]
        share = boxes[room > 0, k] / room[room > 0]
        assert abs(share.mean() - 0.5) < 0.02 and share.min() == 0 and share.max() == 1
