"""Procedural scenes: a small world with labels, masks and depth, made from two integers.

Every picture shows several things of ONE kind (of ten) before a hazy wall and floor. Position, size, tilt,
colours, polarity (lighter or darker than what is behind), depth and the phase of the pattern are drawn anew
for EACH thing. So two crops of one picture already disagree in all of them, and only the kind is left in
common. A network that looks for it can find it; raw pixels, mean colour and a random network can't.

What is unusual: scene i is a pure function of (seed, i). Nothing to download, no state: any worker on any
machine draws the same picture. Shapes are signed distance functions; colours are read off a distance.

    python scenes.py --sheet scenes.png     one row per kind, some with their mask and depth beside them
    python scenes.py --audit                what can be had without learning? (10 seconds)
"""

import argparse
import time
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from config import UserError, run

FAR, NEAR = 10.0, 1.5  # metres: the haze hides what is farther; no thing comes nearer
HAZE_LENGTH = 9.0  # metres after which only 1/e of an object's own colour is left
AREA = 2.0  # every kind covers as much (in squared radii), so that coverage doesn't tell the kind
DARK = 0.15  # share of things whose first colour is the darker one; 0.5 is much harder to learn
CLASSES = ("ring", "star", "target", "stripes", "bars", "slant", "checks", "lattice", "dots", "zigzag")


def _waves(x, period=0.57):
    """Stripes across x; this period is about 8 of 64 pixels, so that one patch sees a pattern."""
    return np.sin(x * (2 * np.pi / period)) * (period / (2 * np.pi))


def _kind(name, u, v, phase):
    """A kind at points (u, v) of a thing's own frame, radius about 1: signed distances (inside, tone).

    `inside` > 0 within the silhouette; `tone` > 0 where the surface has the first of its two colours. To add
    a kind, add a case and its name. A mirror image must stay the same kind: flips are an augmentation.
    """
    rho = np.hypot(u, v)
    disc, square = 1 - rho, 1 - np.maximum(np.abs(u), np.abs(v))
    match name:
        case "ring":
            return 0.25 - np.abs(rho - 0.75), np.ones_like(u)
        case "star":
            phi = np.arctan2(v, u) * (5 / (2 * np.pi))
            phi = np.abs(phi - np.round(phi)) * (2 * np.pi / 5)  # fold the five points onto one
            return 0.36 - rho * (0.45 * np.cos(phi) + 0.8 * np.sin(phi)), np.ones_like(u)
        case "target":
            return disc, _waves(rho + phase)
        case "stripes":
            return square, _waves(u + phase)
        case "bars":
            return square, _waves(v + phase)
        case "slant":  # either diagonal
            return disc, _waves((u + np.where(phase < 0.5, v, -v)) * 0.7071 + phase)
        case "checks":
            return square, _waves(u + phase, 0.74) * np.sin((v + 1.7 * phase) * (2 * np.pi / 0.74))
        case "lattice":  # checks on their corner
            return _kind("checks", (u + v) * 0.7071, (u - v) * 0.7071, phase)
        case "dots":
            return disc, 0.2 - np.hypot((u + phase) % 0.68 - 0.34, (v + 1.7 * phase) % 0.68 - 0.34)
        case "zigzag":
            return disc, 0.7 * _waves(v + phase + np.abs((u + phase) % 1 - 0.5), 0.74)


@cache
def _scale(name):
    """The radius factor that gives this silhouette the common AREA: measured on a grid, once."""
    v, u = np.mgrid[-1.5:1.5:96j, -1.5:1.5:96j]
    return np.float32(np.sqrt(AREA / ((_kind(name, u, v, 0)[0] > 0).mean() * 9)))


# ---------------------------------------------------------------- the picture


@cache
def _weights(size, knots):
    """(size, knots) float32: W @ grid @ W.T enlarges a small random grid softly."""
    x = (np.arange(size, dtype=np.float32)[:, None] + 0.5) / size * (knots - 1)
    w = np.clip(1 - np.abs(x - np.arange(knots)), 0, 1)
    w = w * w * (3 - 2 * w)
    return (w / w.sum(1, keepdims=True)).astype(np.float32)


def _colours(rng, light):
    """Random colours (n, 3) whose brightness is about `light` (n,), of random hue and saturation."""
    tint = rng.random((len(light), 3), dtype=np.float32) - np.float32(0.5)
    tint -= (tint @ np.float32([0.299, 0.587, 0.114]))[:, None]  # keep the brightness, change the colour
    return np.clip(light[:, None] + 0.9 * tint, 0, 1)


def _background(rng, size):
    """Wall and floor: colour (S, S, 3) in [0, 1] and depth (S, S) in metres, 4 to 10."""
    base = _colours(rng, rng.uniform(0.25, 0.75, 2).astype(np.float32))
    soft, fine = _weights(size, 4), _weights(size, 9)
    mix = soft @ rng.random((4, 4), dtype=np.float32) @ soft.T
    clutter = fine @ rng.normal(0, 0.09, (9, 9)).astype(np.float32) @ fine.T
    colour = base[0] + mix[..., None] * (base[1] - base[0]) + clutter[..., None]
    horizon, wall = rng.uniform(0.3, 0.7), rng.uniform(7, FAR)
    below = np.clip((np.arange(size) + 0.5) / size - horizon, 0, None) / (1 - horizon)
    depth = 1 / ((1 - below) / wall + below / 4.2)  # a floor in perspective: 1/depth is linear in the row
    return colour, np.broadcast_to(depth[:, None], (size, size)).astype(np.float32)


def _things(rng):
    """Where the things are: x, y, radius (in frames), angle, depth (m), far to near. (n,) float32 each."""
    n = int(rng.integers(4, 7))
    cell = rng.permutation(9)[:n]  # a jittered 3 x 3 lattice: spread out, yet overlapping here and there
    x, y = (np.stack([cell % 3, cell // 3]) + rng.uniform(0.2, 0.8, (2, n))) / 3
    depth = np.sort(rng.uniform(NEAR, 2.2, n))[::-1]
    radius = 0.5 / depth * rng.uniform(0.9, 1.1, n)
    angle = rng.uniform(-0.3, 0.3, n)  # +-17 degrees: stripes must not turn into bars
    return np.stack([x, y, radius, angle, depth]).astype(np.float32)


def render(seed, index, size=64):
    """Scene `index` of world `seed`.

    Returns image uint8 (S, S, 3); label int; mask uint8 (S, S), 0 = background, 1 + label = a thing; depth
    float32 (S, S) in metres.
    """
    rng = np.random.default_rng([seed, index])
    label = int(rng.integers(len(CLASSES)))
    colour, depth = _background(rng, size)
    x, y, radius, angle, far = _things(rng)
    light = rng.uniform(0.1, 0.4, n := len(x)).astype(np.float32)
    dark_first = rng.random(n) < DARK
    first = _colours(rng, np.where(dark_first, light, light + 0.5))
    second = _colours(rng, np.where(dark_first, light + 0.5, light))
    phase = rng.random(n, dtype=np.float32)
    haze = _colours(rng, rng.uniform(0.3, 0.7, 1).astype(np.float32))

    # All pixels of all things at once, but only those within reach: (P,) points, `who` says whose.
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    radius = radius * _scale(CLASSES[label])
    dx, dy = grid - x[:, None], grid - y[:, None]
    who, row, col = np.nonzero(dx[:, None] ** 2 + dy[:, :, None] ** 2 < (1.45 * radius[:, None, None]) ** 2)
    cos, sin = (np.cos(angle) / radius)[who], (np.sin(angle) / radius)[who]
    px, py = dx[who, col], dy[who, row]
    u, v = px * cos + py * sin, py * cos - px * sin
    inside, tone = _kind(CLASSES[label], u, v, phase[who])
    pixels = (radius * size)[who]  # distances in pixels: an edge is one pixel soft
    alpha = np.clip(inside * pixels + 0.5, 0, 1)[:, None]
    blend = np.clip(tone * pixels + 0.5, 0, 1)[:, None]
    paint = second[who] + blend * (first[who] - second[who])
    mask = np.zeros((size, size), np.uint8)
    colour = haze + (colour - haze) * np.exp(-depth / HAZE_LENGTH)[..., None]
    paint = haze + (paint - haze) * np.exp(-far / HAZE_LENGTH)[who, None]
    ends = np.searchsorted(who, np.arange(n + 1))
    for k in range(n):  # the painter's algorithm: far things first, nearer ones over them
        s = slice(ends[k], ends[k + 1])
        r, c, a = row[s], col[s], alpha[s]
        colour[r, c] += a * (paint[s] - colour[r, c])
        solid = a[:, 0] > 0.5
        mask[r[solid], c[solid]] = 1 + label
        depth[r[solid], c[solid]] = far[k]
    return (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8), label, mask, depth


class Scenes:
    """`count` scenes of world `seed`, `size` pixels wide and high: `scenes[i] -> (PIL image, label)`."""

    classes = list(CLASSES)

    def __init__(self, count=100_000, seed=0, size=64):
        for name, value, least in (("count", count, 1), ("seed", seed, 0), ("size", size, 8)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"scenes: {name} must be a whole number of at least {least}, not {value!r}.")
        self.count, self.seed, self.size = count, seed, size

    def __len__(self):
        return self.count

    def name(self, i):
        return f"scene {i}"

    def scene(self, i):
        """(image, label, mask, depth) as `render` gives them."""
        if not 0 <= i < self.count:
            raise IndexError(f"scene {i} of {self.count}")
        return render(self.seed, int(i), self.size)

    def __getitem__(self, i):
        image, label, _, _ = self.scene(i)
        return Image.fromarray(image), label


# ---------------------------------------------------------------- looking at it, measuring what it gives away


def _tiles(image, label, mask, depth):
    """A scene as three pictures (S, S, 3) uint8: the image, the mask, the depth (near is bright)."""
    hue = np.asarray(Image.new("HSV", (1, 1), (25 * label, 190, 230)).convert("RGB"))
    near = (1 / depth - 1 / FAR) / (1 / NEAR - 1 / FAR)
    grey = (255 * near.clip(0, 1)).astype(np.uint8)
    return [image, np.where(mask[..., None] > 0, hue, np.uint8(24)), np.stack([grey] * 3, -1)]


def sheet(path, seed=0, size=96, columns=13):
    """Write the contact sheet: a row per kind; the first two scenes have mask and depth beside them."""
    rows = [[] for _ in CLASSES]
    for scene in (render(seed, i, size) for i in range(30 * columns)):
        row = rows[scene[1]]
        row += _tiles(*scene)[: 3 if len(row) < 6 else 1]
    step, left = size + 4, 56
    page = Image.new("RGB", (left + columns * step, len(rows) * step + 4), "white")
    for k, row in enumerate(rows):
        ImageDraw.Draw(page).text((8, k * step + size // 2), CLASSES[k], fill="black")
        for j, tile in enumerate(row[:columns]):
            page.paste(Image.fromarray(tile), (left + j * step, k * step + 4))
    try:
        page.save(path)
    except (OSError, ValueError) as err:
        raise UserError(f"can't write {path} ({err}); name a .png in an existing folder.") from None


def knn(bank, labels, query, k=20):
    """Labels for `query` (m, d): majority of the k nearest in `bank` (n, d) by cosine, mean subtracted."""
    bank, query = bank - bank.mean(0), query - bank.mean(0)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    near = np.argpartition(-(query @ bank.T), k, axis=1)[:, :k]
    return (labels[near][..., None] == np.arange(len(CLASSES))).sum(1).argmax(1)


def probe(bank, labels, query):
    """Labels for `query` (m, d) by least squares on the features and their squares."""
    bank, query = (np.concatenate([np.ones((len(x), 1)), x, x * x], 1) for x in (bank, query))
    return (query @ np.linalg.lstsq(bank, np.eye(len(CLASSES))[labels], rcond=None)[0]).argmax(1)


def audit(seed=0, bank=4000, query=1000):
    """What can be had without learning: {name: value}; scenes 0 to `bank` against the next `query`."""
    start = time.perf_counter()
    images, labels, masks, _ = map(np.stack, zip(*(render(seed, i) for i in range(bank + query))))
    table = {"images/s, one core": (bank + query) / (time.perf_counter() - start)}
    images = images.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4), dtype=np.float32) / 255  # as a crop sees them
    for name, method, x in (
        ("raw pixels at 32 x 32, k-NN", knn, images.reshape(bank + query, -1)),
        ("mean colour, linear probe", probe, images.mean((1, 2))),
        ("covered area, linear probe", probe, (masks > 0).mean((1, 2))[:, None]),
    ):
        table[name] = float((method(x[:bank], labels[:bank], x[bank:]) == labels[bank:]).mean())
    return table | {"chance": 1 / len(CLASSES)}


def main():
    parser = argparse.ArgumentParser(description="Procedural scenes: look at them, measure them.")
    parser.add_argument("--sheet", metavar="PNG", help="write a contact sheet")
    parser.add_argument("--audit", action="store_true", help="print what can be had without learning")
    args = parser.parse_args()
    if args.sheet:
        sheet(args.sheet)
        print(f"wrote {args.sheet}")
    if args.audit:
        for name, value in audit().items():
            print(f"{name:28s} {value:8.{0 if value > 1 else 3}f}")


if __name__ == "__main__":
    run(main)
