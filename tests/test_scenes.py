"""scenes.py: pictures from (seed, index) alone, honest masks and depth, and no cheap way to the class."""

import numpy as np
import pytest

from config import UserError
from scenes import CLASSES, Scenes, render
from tools.audit_scenes import linear_probe, nearest_neighbours


@pytest.fixture(scope="module")
def world():
    """2,500 scenes: (images, labels, masks, depths), stacked."""
    return tuple(map(np.stack, zip(*(render(0, i) for i in range(2500)))))


def test_same_numbers_same_scene():
    # In any order, through either door: a scene remembers nothing.
    late, early = render(3, 41), render(3, 7)
    for a, b in zip(early, Scenes(100, seed=3).scene(7)):
        assert np.array_equal(a, b)
    image, label = Scenes(100, seed=3)[41]
    assert np.array_equal(np.asarray(image), late[0]) and label == late[1]


def test_seed_and_index_matter():
    pictures = [render(seed, index)[0] for seed in (0, 1, 2) for index in (0, 1, 2)]
    assert len({p.tobytes() for p in pictures}) == 9


@pytest.mark.parametrize("size", [8, 33, 64, 224])
def test_shapes_and_dtypes(size):
    image, label, mask, depth = render(0, 5, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert mask.shape == (size, size) and mask.dtype == np.uint8
    assert depth.shape == (size, size) and depth.dtype == np.float32
    assert type(label) is int and 0 <= label < len(CLASSES) == 10


def test_size_changes_sharpness_not_content():
    small, large = render(0, 9, 32), render(0, 9, 128)
    shrunk = large[0].reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert small[1] == large[1]
    assert np.corrcoef(shrunk.ravel(), small[0].ravel())[0, 1] > 0.9


def test_mask_names_the_label_and_nothing_else(world):
    _, labels, masks, _ = world
    assert all(set(np.unique(m)) == {0, 1 + k} for m, k in zip(masks, labels))


def test_things_stand_before_the_background(world):
    _, _, masks, depths = world
    assert np.isfinite(depths).all() and depths.min() >= 1.0 and depths.max() <= 10.0
    for mask, depth in zip(masks, depths):
        assert depth[mask > 0].max() < depth[mask == 0].min()


def test_kinds_are_balanced_and_cover_alike(world):
    _, labels, masks, _ = world
    counts = np.bincount(labels, minlength=10)
    assert counts.min() > 190 and counts.max() < 310  # 250 expected, 15 is one standard deviation
    cover = [(masks[labels == k] > 0).mean() for k in range(10)]
    assert max(cover) - min(cover) < 0.12


def test_order_tells_nothing(world):
    labels = world[1]
    assert abs(np.corrcoef(labels[1:], labels[:-1])[0, 1]) < 0.08
    assert abs(np.corrcoef(labels, np.arange(len(labels)))[0, 1]) < 0.08
    of_another_seed = np.array([render(1, i)[1] for i in range(len(labels))])
    assert (labels == of_another_seed).mean() < 0.13


def test_no_cheap_way_to_the_class(world):
    images, labels, masks, _ = world
    small = images.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4), dtype=np.float32) / 255
    cut = 2000

    def score(method, x):
        return (method(x[:cut], labels[:cut], x[cut:]) == labels[cut:]).mean()

    assert score(linear_probe, small.mean((1, 2))) <= 0.2
    assert score(linear_probe, (masks > 0).mean((1, 2))[:, None]) <= 0.2
    assert score(nearest_neighbours, small.reshape(len(small), -1)) <= 0.3


@pytest.mark.parametrize("wrong", [{"count": 0}, {"seed": -1}, {"size": 4}, {"size": 64.0}])
def test_wrong_numbers_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Scenes(**wrong)


def test_the_end_is_the_end():
    assert len(list(Scenes(3))) == 3
    with pytest.raises(IndexError):
        Scenes(3)[3]
