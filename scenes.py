"""Procedural scenes: a small world with labels, masks and depth, made from two integers.

Every picture shows several things of ONE kind (of ten) before a hazy wall and floor. Position, size, tilt,
colours, polarity (lighter or darker than the background), depth and the phase of the pattern are drawn anew
for EACH thing. So two crops of one picture already disagree in all of them, and only the kind is left in
common. A network that looks for it can find it; raw pixels, mean colour and a random network can't.

Scene i is a pure function of (seed, i): nothing to download, no state, and any worker on any machine draws
the same picture. Shapes are signed distance functions; colours are read off a distance.

    python -m tools.audit_scenes --sheet scenes.png     # look at them
    python -m tools.audit_scenes --audit                # what can be had without learning?
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from config import UserError

FAR = 10.0  # metres: the haze hides everything beyond
NEAR = 1.5  # metres: no thing comes nearer
HAZE_LENGTH = 9.0  # metres after which only 1/e of an object's own colour is left
AREA = 2.0  # every kind covers as much (in squared radii), so that coverage doesn't tell the kind
DARK = 0.15  # share of things whose first colour is the darker one; 0.5 is much harder to learn
REACH = 1.45  # radii: no silhouette is larger
LUMA = np.float32([0.299, 0.587, 0.114])
CLASSES = ("ring", "star", "target", "stripes", "bars", "slant", "checks", "lattice", "dots", "zigzag")


def _waves(x, period=0.57):
    """Stripes across x; this period is about 8 of 64 pixels, so that one patch sees a pattern."""
    return np.sin(x * (2 * np.pi / period)) * (period / (2 * np.pi))


def _signed_distances(kind, u, v, phase):
    """A kind at points (u, v) of a thing's own frame, radius about 1: signed distances (inside, tone).

    `inside` > 0 within the silhouette; `tone` > 0 where the surface has the first of its two colours. To add
    a kind, add a case and its name. A mirror image must stay the same kind: flips are an augmentation.
    """
    rho = np.hypot(u, v)
    disc = 1 - rho
    square = 1 - np.maximum(np.abs(u), np.abs(v))
    match kind:
        case "ring":
            return 0.25 - np.abs(rho - 0.75), np.ones_like(u)
        case "star":
            phi = np.arctan2(v, u) * (5 / (2 * np.pi))
            phi = np.abs(phi - np.round(phi)) * (2 * np.pi / 5)  # fold the five points onto one
            edge = 0.45 * np.cos(phi) + 0.8 * np.sin(phi)
            return 0.36 - rho * edge, np.ones_like(u)
        case "target":
            return disc, _waves(rho + phase)
        case "stripes":
            return square, _waves(u + phase)
        case "bars":
            return square, _waves(v + phase)
        case "slant":  # either diagonal
            diagonal = u + np.where(phase < 0.5, v, -v)
            return disc, _waves(diagonal * 0.7071 + phase)
        case "checks":
            columns = _waves(u + phase, 0.74)
            rows = np.sin((v + 1.7 * phase) * (2 * np.pi / 0.74))
            return square, columns * rows
        case "lattice":  # checks on their corner
            right = (u + v) * 0.7071
            down = (u - v) * 0.7071
            return _signed_distances("checks", right, down, phase)
        case "dots":
            dx = (u + phase) % 0.68 - 0.34
            dy = (v + 1.7 * phase) % 0.68 - 0.34
            return disc, 0.2 - np.hypot(dx, dy)
        case "zigzag":
            zigzag = np.abs((u + phase) % 1 - 0.5)
            return disc, 0.7 * _waves(v + phase + zigzag, 0.74)


@cache
def _radius_factor(kind):
    """The factor on the radius that gives this silhouette the common AREA: measured on a grid, once."""
    v, u = np.mgrid[-1.5:1.5:96j, -1.5:1.5:96j]
    inside, _ = _signed_distances(kind, u, v, 0)
    covered = (inside > 0).mean() * 9
    return np.float32(np.sqrt(AREA / covered))


# ---------------------------------------------------------------- the picture


class Things(NamedTuple):
    """The n things of a scene, from far to near; (n,) float32 each."""

    x: np.ndarray  # in frames, 0 to 1
    y: np.ndarray
    radius: np.ndarray  # in frames
    angle: np.ndarray  # in radians
    depth: np.ndarray  # in metres


@cache
def _upsampling_weights(size, knots):
    """(size, knots) float32: W @ grid @ W.T enlarges a small random grid softly."""
    pixel = np.arange(size, dtype=np.float32)[:, None]
    position = (pixel + 0.5) / size * (knots - 1)
    weight = np.clip(1 - np.abs(position - np.arange(knots)), 0, 1)
    weight = weight * weight * (3 - 2 * weight)
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def _random_colours(rng, light):
    """Random colours (n, 3) whose brightness is about `light` (n,), of random hue and saturation."""
    tint = rng.random((len(light), 3), dtype=np.float32) - np.float32(0.5)
    tint -= (tint @ LUMA)[:, None]  # keep the brightness, change the colour
    return np.clip(light[:, None] + 0.9 * tint, 0, 1)


def _background(rng, size):
    """Wall and floor: colour (S, S, 3) in [0, 1] and depth (S, S) in metres, 4 to 10."""
    light = rng.uniform(0.25, 0.75, 2).astype(np.float32)
    base = _random_colours(rng, light)
    soft = _upsampling_weights(size, 4)
    fine = _upsampling_weights(size, 9)
    mix = soft @ rng.random((4, 4), dtype=np.float32) @ soft.T
    clutter = fine @ rng.normal(0, 0.09, (9, 9)).astype(np.float32) @ fine.T
    colour = base[0] + mix[..., None] * (base[1] - base[0])
    colour = colour + clutter[..., None]
    horizon = rng.uniform(0.3, 0.7)
    wall = rng.uniform(7, FAR)
    row = (np.arange(size) + 0.5) / size
    below = np.clip(row - horizon, 0, None) / (1 - horizon)
    depth = 1 / ((1 - below) / wall + below / 4.2)  # a floor in perspective: 1/depth is linear in the row
    return colour, np.broadcast_to(depth[:, None], (size, size)).astype(np.float32)


def _place_things(rng):
    """Four to six things on a jittered 3 x 3 lattice: spread out, yet overlapping here and there."""
    n = int(rng.integers(4, 7))
    cell = rng.permutation(9)[:n]
    corner = np.stack([cell % 3, cell // 3])
    x, y = (corner + rng.uniform(0.2, 0.8, (2, n))) / 3
    depth = np.sort(rng.uniform(NEAR, 2.2, n))[::-1]
    radius = 0.5 / depth * rng.uniform(0.9, 1.1, n)
    angle = rng.uniform(-0.3, 0.3, n)  # +-17 degrees: stripes must not turn into bars
    return Things(*np.stack([x, y, radius, angle, depth]).astype(np.float32))


def _fade(colour, depth, haze):
    """A colour as it looks through `depth` metres of haze."""
    return haze + (colour - haze) * np.exp(-depth / HAZE_LENGTH)


def render(seed, index, size=64):
    """Scene `index` of world `seed`.

    Returns image uint8 (S, S, 3); label int; mask uint8 (S, S), 0 = background, 1 + label = a thing; depth
    float32 (S, S) in metres.
    """
    rng = np.random.default_rng([seed, index])
    label = int(rng.integers(len(CLASSES)))
    kind = CLASSES[label]
    colour, depth = _background(rng, size)
    things = _place_things(rng)
    n = len(things.x)
    light = rng.uniform(0.1, 0.4, n).astype(np.float32)
    dark_first = rng.random(n) < DARK
    first = _random_colours(rng, np.where(dark_first, light, light + 0.5))
    second = _random_colours(rng, np.where(dark_first, light + 0.5, light))
    phase = rng.random(n, dtype=np.float32)
    haze = _random_colours(rng, rng.uniform(0.3, 0.7, 1).astype(np.float32))

    # All pixels of all things at once, but only those within reach: (P,) points, `who` is the thing of each.
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    radius = things.radius * _radius_factor(kind)
    dx = grid - things.x[:, None]
    dy = grid - things.y[:, None]
    distance_squared = dx[:, None] ** 2 + dy[:, :, None] ** 2  # (n, S, S)
    near = distance_squared < (REACH * radius[:, None, None]) ** 2
    who, row, column = np.nonzero(near)
    cos = (np.cos(things.angle) / radius)[who]
    sin = (np.sin(things.angle) / radius)[who]
    px = dx[who, column]
    py = dy[who, row]
    u = px * cos + py * sin
    v = py * cos - px * sin
    inside, tone = _signed_distances(kind, u, v, phase[who])
    pixels = (radius * size)[who]  # from radii to pixels: an edge is one pixel soft
    alpha = np.clip(inside * pixels + 0.5, 0, 1)[:, None]
    blend = np.clip(tone * pixels + 0.5, 0, 1)[:, None]
    paint = second[who] + blend * (first[who] - second[who])
    paint = _fade(paint, things.depth[who, None], haze)
    colour = _fade(colour, depth[..., None], haze)

    mask = np.zeros((size, size), np.uint8)
    ends = np.searchsorted(who, np.arange(n + 1))
    for k in range(n):  # the painter's algorithm: far things first, nearer ones over them
        own = slice(ends[k], ends[k + 1])
        at = row[own], column[own]
        colour[at] += alpha[own] * (paint[own] - colour[at])
        solid = alpha[own, 0] > 0.5
        at = row[own][solid], column[own][solid]
        mask[at] = 1 + label
        depth[at] = things.depth[k]
    image = (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)
    return image, label, mask, depth


class Scenes:
    """`count` scenes of world `seed`, `size` pixels wide and high: `scenes[i] -> (PIL image, label)`."""

    classes = list(CLASSES)

    def __init__(self, count=100_000, seed=0, size=64):
        for name, value, least in (("count", count, 1), ("seed", seed, 0), ("size", size, 8)):
            if not isinstance(value, int) or not least <= value <= 1e15:
                raise UserError(f"scenes: {name} must be a whole number from {least} to 1e15, not {value!r}.")
        self.count = count
        self.seed = seed
        self.size = size

    def __len__(self):
        return self.count

    def name(self, i):
        return f"scene {i} of seed {self.seed}"

    def scene(self, i):
        """(image, label, mask, depth) as `render` gives them."""
        if not 0 <= i < self.count:
            raise IndexError(f"scene {i} of {self.count}")
        return render(self.seed, int(i), self.size)

    def __getitem__(self, i):
        image, label, _, _ = self.scene(i)
        return Image.fromarray(image), label
