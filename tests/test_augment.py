"""The crops and their colours against Pillow (tools/bench_input.py), operation by operation."""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

import config
from data import (
    AFTER_JITTER,
    BLUR_SIGMA,
    BRIGHTNESS,
    CONTRAST,
    GRAYSCALE,
    HUE,
    IMAGENET_STD,
    JITTER,
    ORDER,
    SATURATION,
    SOLARIZE,
    augment_batched,
    augment_one_by_one,
    crop_and_resize,
    photometric,
    sample_crop_params,
)
from decode import to_tensor
from tools.bench_input import PILLOW_AFTER, PILLOW_JITTER, photo, pillow_crop

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = JITTER | AFTER_JITTER
PILLOWS = dict(zip(JITTER, PILLOW_JITTER)) | dict(zip(AFTER_JITTER, PILLOW_AFTER))


def as_floats(image):
    return to_tensor(image).float()


def difference_from_pillow(operation, value, image):
    """The two results of one operation on one image, subtracted: (3, H, W)."""
    argument = torch.full((1, 1, 1, 1), value)
    images = as_floats(image)[None].contiguous()
    ours = OURS[operation](images, argument)[0]
    theirs = PILLOWS[operation](image, value)
    return (ours - as_floats(theirs)).abs()


JITTER_CASES = [
    *[(BRIGHTNESS, 0.6), (BRIGHTNESS, 1.4), (CONTRAST, 0.6), (CONTRAST, 1.4)],
    *[(SATURATION, 0.8), (SATURATION, 1.2), (HUE, -0.1), (HUE, 0.07), (HUE, 0.5)],
]


@pytest.mark.parametrize("size", [224, 98])
@pytest.mark.parametrize("operation, value", JITTER_CASES)
def test_jitter_agrees_with_pillow(operation, value, size):
    difference = difference_from_pillow(operation, value, photo(size, size, seed=size))
    assert difference.mean() < 2
    assert difference.quantile(0.99) < 6


AFTER_CASES = [(GRAYSCALE, 1.0), (SOLARIZE, 1.0), *[(BLUR_SIGMA, sigma) for sigma in (0.6, 1.0, 1.4, 2.0)]]


@pytest.mark.parametrize("operation, value", AFTER_CASES)
def test_grayscale_blur_solarize_agree_with_pillow(operation, value):
    """Pillow blurs with repeated box filters and repeated edge pixels: compare blur inside the frame."""
    difference = difference_from_pillow(operation, value, photo(224, 224, seed=3))
    assert difference[:, 8:-8, 8:-8].mean() < 2


def gaussian_blur_9_taps(x, sigma):
    """An exact convolution in float64 with mirrored edges, as torchvision defines it: (H, W) -> (H, W)."""
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(x, 4, mode="reflect")
    windows = sliding_window_view(padded, (9, 9))
    return (windows * kernel).sum((2, 3))


def test_blur_is_the_nine_tap_gaussian():
    image = np.random.default_rng(0).random((20, 17))
    images = torch.from_numpy(image).float().expand(2, 3, 20, 17).clone()
    sigmas = torch.tensor([1.3, 0.1]).view(2, 1, 1, 1)
    blurred = OURS[BLUR_SIGMA](images, sigmas)
    np.testing.assert_allclose(blurred[0, 1], gaussian_blur_9_taps(image, 1.3), atol=1e-6)
    np.testing.assert_allclose(blurred[1, 2], image, atol=1e-6)  # sigma 0.1 changes nothing


BOXES = [(50, 40, 350, 300), (10, 20, 130, 110), (100, 100, 40, 50), (0, 0, 500, 375)]


@pytest.mark.parametrize("size", [224, 98])
@pytest.mark.parametrize("left, top, width, height", BOXES)
def test_crop_agrees_with_pillow(left, top, width, height, size):
    image = photo()
    box = np.array([left, top, width, height])
    ours = crop_and_resize(to_tensor(image), box, size, False)
    cropped = image.crop((left, top, left + width, top + height))
    theirs = cropped.resize((size, size), Image.BICUBIC)
    difference = (ours.float() - as_floats(theirs)).abs()
    assert difference.max() <= 2
    assert difference.mean() < 0.05
    assert torch.equal(crop_and_resize(to_tensor(image), box, size, True), ours.flip(-1))


def test_sharp_edges_differ_from_pillow():
    """What the docstring says: pixels that are black or white at random are the worst case."""
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (375, 500, 1), np.uint8).repeat(3, 2)
    image = Image.fromarray(pixels)
    ours = crop_and_resize(to_tensor(image), np.array([13, 7, 214, 281]), 224, False)
    theirs = image.crop((13, 7, 227, 288)).resize((224, 224), Image.BICUBIC)
    difference = (ours.float() - as_floats(theirs)).abs()
    assert 2 < difference.max() <= 30
    assert difference.mean() < 8


def draw_params(count, crops, width=500, height=375):
    """boxes (count, V, 4), flips (count, V), colors (count, V, 11) of so many images."""
    rng = np.random.default_rng(0)
    images = [sample_crop_params(rng, crops, width, height) for _ in range(count)]
    return [np.stack(values) for values in zip(*images)]


@pytest.mark.parametrize("size, batch", [(224, 3), (98, 40), (32, 200)])
def test_whole_chain_agrees_with_pillow(size, batch):
    """All operations in their random orders, batched or one by one, against the image-by-image pipeline."""
    _, _, colors = draw_params(batch, config.load().crops)
    colors = colors[:, 1]  # of the second crop: it alone is solarized
    colors[:, BLUR_SIGMA] = 0  # blur is another filter in Pillow; it has its own test
    images = [photo(size, size, seed=k % 5) for k in range(batch)]
    crops = torch.stack([to_tensor(image) for image in images])
    ours = photometric(crops, torch.from_numpy(colors))
    whole = (0, 0, size, size)
    theirs = [pillow_crop(image, whole, size, False, row) for image, row in zip(images, colors)]
    difference = (ours - torch.stack(theirs)).abs() * IMAGENET_STD * 255
    # Near its threshold a solarized pixel may fall on either side, a large jump: compare the means.
    assert difference.mean() < 2
    assert difference.median() < 1.5


def test_batching_changes_nothing():
    _, _, colors = draw_params(60, config.load().crops)
    colors = torch.from_numpy(colors[:, 1])
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    together = photometric(images, colors)
    alone = [photometric(images[i : i + 1], colors[i : i + 1]) for i in range(60)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(photometric(channels_last, colors), together)


@pytest.mark.parametrize("size", [32, 98])
def test_both_ways_to_augment_agree(size):
    """Images one by one leave out taps of the blur that weigh below 1/1000."""
    _, _, colors = draw_params(9, config.load().crops)
    colors = torch.from_numpy(colors[:, 1])
    images = torch.randint(0, 256, (9, 3, size, size), dtype=torch.uint8)
    (_, batched), *rest = [(rows, x) for rows, x in augment_batched(images, colors)]
    assert not rest
    alone = [x for _, x in augment_one_by_one(images, colors)]
    difference = batched - torch.cat(alone)
    assert difference.abs().max() < 0.3


def near(values, expected):
    return abs(np.mean(values) - expected) < 0.04


@pytest.fixture(scope="module")
def drawn():
    """The parameters of 2,000 images, drawn with the default settings."""
    return draw_params(2000, config.load().crops)


def test_probabilities(drawn):
    _, flips, colors = drawn
    assert near(flips, 0.5)
    assert near(colors[..., ORDER][..., 0] >= 0, 0.8)
    assert near(colors[..., GRAYSCALE], 0.2)
    blurred = colors[..., BLUR_SIGMA] > 0
    assert not blurred[:, 0].any()
    assert near(blurred[:, 1], 0.9)
    assert near(blurred[:, 2:], 0.5)
    solarized = colors[..., SOLARIZE] > 0
    assert near(solarized[:, 1], 0.2)
    assert not solarized[:, [0, *range(2, 10)]].any()
    assert colors[..., BLUR_SIGMA][blurred].min() >= 0.1
    assert colors[..., BLUR_SIGMA].max() <= 2


RANGES = {BRIGHTNESS: (0.6, 1.4), CONTRAST: (0.6, 1.4), SATURATION: (0.8, 1.2), HUE: (-0.1, 0.1)}


@pytest.mark.parametrize("column", RANGES)
def test_factors_fill_their_range(column, drawn):
    low, high = RANGES[column]
    values = drawn[2][..., column]
    assert low <= values.min() < low + 0.01
    assert high - 0.01 < values.max() <= high


def test_every_order_of_the_jitter_occurs_equally_often(drawn):
    order = drawn[2][..., ORDER]
    order = order[order[..., 0] >= 0]
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    assert len(np.unique(order, axis=0)) == 24
    assert all(near(order[:, column] == 0, 0.25) for column in range(4))


def test_boxes_have_the_area_and_the_aspect_of_their_kind(drawn):
    width, height = np.moveaxis(drawn[0][..., 2:], -1, 0)
    share = width * height / (500 * 375)
    assert share[:, :2].min() > 0.31
    assert share[:, 2:].min() > 0.045
    assert share[:, 2:].max() < 0.33
    aspect = width / height
    assert aspect.min() > 0.72
    assert aspect.max() < 1.37


BLUR_PROBABILITIES = [("as_written", (1, 0.1, 0.5)), ((0.3, 0.6, 0.0), (0.3, 0.6, 0.0))]


@pytest.mark.parametrize("blur, expected", BLUR_PROBABILITIES)
def test_blur_settings(blur, expected):
    crops = config.load().crops
    crops.blur = blur
    _, _, colors = draw_params(1000, crops)
    blurred = colors[..., BLUR_SIGMA] > 0
    found = [blurred[:, 0].mean(), blurred[:, 1].mean(), blurred[:, 2:].mean()]
    assert np.abs(np.array(found) - expected).max() < 0.06


@pytest.mark.parametrize("width, height", [(1, 20000), (20000, 1), (1, 1), (3000, 40), (32, 32)])
def test_boxes_fit_any_image(width, height):
    """Where no aspect ratio in 3/4..4/3 fits, the largest centred box that keeps to it is taken."""
    boxes, _, _ = draw_params(100, config.load().crops, width, height)
    left, top, w, h = boxes.reshape(-1, 4).T
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()
    if (width, height) == (3000, 40):
        centred = (w == 53) & (h == 40) & (left == (3000 - 53) // 2)
        assert centred.sum() > 100


@pytest.mark.parametrize("axis, length", [(0, 500), (1, 375)])
def test_boxes_are_uniform_in_place(axis, length):
    boxes, _, _ = draw_params(500, config.load().crops)
    boxes = boxes.reshape(-1, 4)
    room = length - boxes[:, 2 + axis]
    position = boxes[room > 0, axis] / room[room > 0]
    assert abs(position.mean() - 0.5) < 0.02
    assert position.min() == 0
    assert position.max() == 1
