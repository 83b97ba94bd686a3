"""scenes.py: pictures from (seed, index) alone, honest masks and depth, and no cheap way to the class."""

import numpy as np
import pytest

from config import UserError
from scenes import CLASSES, Scenes, render
from tools.audit_scenes import linear_probe, nearest_neighbours


@pytest.fixture(scope="module")
def world():
    """2,500 scenes: (images, labels, masks, depths), stacked."""
    scenes = [render(0, i) for i in range(2500)]
    return [np.stack(values) for values in zip(*scenes)]


def test_same_numbers_same_scene():
    # In any order, through either door: a scene remembers nothing.
    late = render(3, 41)
    early = render(3, 7)
    for ours, theirs in zip(early, Scenes(100, seed=3).scene(7)):
        assert np.array_equal(ours, theirs)
    image, label = Scenes(100, seed=3)[41]
    assert np.array_equal(np.asarray(image), late[0])
    assert label == late[1]


def test_seed_and_index_matter():
    pictures = set()
    for seed in (0, 1, 2):
        for index in (0, 1, 2):
            pictures.add(render(seed, index)[0].tobytes())
    assert len(pictures) == 9


@pytest.mark.parametrize("size", [8, 33, 64, 224])
def test_shapes_and_dtypes(size):
    image, label, mask, depth = render(0, 5, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (size, size)
    assert mask.dtype == np.uint8
    assert depth.shape == (size, size)
    assert depth.dtype == np.float32
    assert type(label) is int
    assert 0 <= label < len(CLASSES) == 10


def test_size_changes_sharpness_not_content():
    small, small_label, _, _ = render(0, 9, 32)
    large, large_label, _, _ = render(0, 9, 128)
    shrunk = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert small_label == large_label
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.9


def test_mask_names_the_label_and_nothing_else(world):
    _, labels, masks, _ = world
    for mask, label in zip(masks, labels):
        assert set(np.unique(mask)) == {0, 1 + label}


def test_things_stand_before_the_background(world):
    _, _, masks, depths = world
    assert np.isfinite(depths).all()
    assert depths.min() >= 1.0
    assert depths.max() <= 10.0
    for mask, depth in zip(masks, depths):
        assert depth[mask > 0].max() < depth[mask == 0].min()


def test_kinds_are_balanced_and_cover_alike(world):
    _, labels, masks, _ = world
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 190  # 250 expected, 15 is one standard deviation
    assert counts.max() < 310
    coverage = [(masks[labels == label] > 0).mean() for label in range(10)]
    assert max(coverage) - min(coverage) < 0.12


def correlation(x, y):
    return abs(np.corrcoef(x, y)[0, 1])


def test_order_tells_nothing(world):
    _, labels, _, _ = world
    assert correlation(labels[1:], labels[:-1]) < 0.08
    assert correlation(labels, np.arange(len(labels))) < 0.08
    of_another_seed = np.array([render(1, i)[1] for i in range(len(labels))])
    assert (labels == of_another_seed).mean() < 0.13


def test_no_cheap_way_to_the_class(world):
    images, labels, masks, _ = world
    small = images.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4), dtype=np.float32) / 255
    bank = slice(0, 2000)
    queries = slice(2000, None)

    def accuracy(method, features):
        predicted = method(features[bank], labels[bank], features[queries])
        return (predicted == labels[queries]).mean()

    mean_color = small.mean((1, 2))
    covered_area = (masks > 0).mean((1, 2))[:, None]
    assert accuracy(linear_probe, mean_color) <= 0.2
    assert accuracy(linear_probe, covered_area) <= 0.2
    assert accuracy(nearest_neighbours, small.reshape(len(small), -1)) <= 0.3


@pytest.mark.parametrize("wrong", [{"count": 0}, {"seed": -1}, {"size": 4}, {"size": 64.0}])
def test_wrong_numbers_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Scenes(**wrong)


def test_the_end_is_the_end():
    assert len(list(Scenes(3))) == 3
    with pytest.raises(IndexError):
        Scenes(3)[3]
