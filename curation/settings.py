"""Curation's settings: every threshold with its type and default, read and checked by config.py.

    python -m curation run folder:/pile out --config configs/curation/web.yaml quality.min_side=160

A Cut is a number, or a percentile such as "2%": the value below which 2 % of the pile lie.
"""

from pathlib import Path
from typing import Annotated

import config
from config import Bands, BlackWhite, Count, Pattern, Positive, Range, Share, UserError, Whole

Percentile = Annotated[str, Pattern(r"(100|\d{1,2}(\.\d+)?)%", "a percentile from 0% to 100%")]
Cut = Annotated[float, Range(-1e15, 1e15, "a number")] | Percentile
Cosine = Annotated[float, Range(-1, 2, "a cosine, or 2 for off")]
Pixels = Annotated[int, Range(0, 4096, "a whole number of pixels from 0 to 4096")]
Rounds = Annotated[int, Range(0, 100, "a whole number from 0 to 100")]
Radius = Annotated[int, Range(0, 16, "a whole number from 0 to 16")]  # strangers differ in 32 bits of 64
Levels = Annotated[str, Pattern(r"[1-9]\d{0,6}( [1-9]\d{0,6})*", "numbers of clusters such as 1000 100 10")]


# fmt: off
class Settings:
    """All settings, as in `cfg.quality.min_side`: an instance of every section below."""
    class ingest:
        piece: Count = 1000  # files in one piece of work; a tar shard is one piece, whatever its size
        range: BlackWhite = "auto"  # as data.range of a run; of tar shards, measured on the first
        bands: Bands = "auto"  # as data.bands of a run
    class quality:
        min_side: Whole = 200  # pixels of the shorter side (DataComp)
        max_aspect: Positive = 3.0  # longer side over shorter (DataComp)
        min_dark: Cut = 0.32  # brightness (0 to 1) that the lightest 1 % of pixels reach; below: black
        max_bright: Cut = 0.95  # brightness that all but the darkest 5 % exceed; above: white
        min_entropy: Cut = 3.0  # bits of the grey histogram, 8 at most; below: flat
        min_sharpness: Cut = 0.03  # variance of the Laplacian over that of the grey picture; below: blurred
    class dedup:
        radius: Radius = 6  # bits of 64 that may differ in pHash or in dHash; all such pairs are found
        other_radius: Whole = 10  # bits that may differ in the other hash: the two seldom err together
        evaluation: str = ""  # data URIs separated by ";": no image that resembles theirs may stay
    class features:
        weights: str = ""  # as --weights of the evals; empty: no features, and no stage that needs them
        embeddings: str = ""  # made elsewhere: .npz (cls, paths), or .npy (a row per image in ingest's order)
        size: Pixels = 0  # pixels that the backbone sees; 0 = its own
        batch: Count = 64
    class similar:
        min_cosine: Cosine = 2.0  # of features; above it, two images are duplicates; depends on the backbone
        leak_cosine: Cosine = 2.0  # the same against evaluation images; to be safe, below min_cosine
    class content:
        allow: str = ""  # data URI of examples of allowed content
        block: str = ""  # of unwanted content: both together train a head, with cross-validation
        recall: Share = 0.99  # of blocked examples in cross-validation: sets the head's threshold
        head: str = ""  # or a head from a file: .npz of weight (D,), bias, threshold
        ratings: str = ""  # CSV of path,rating (paths relative to it): trains the aesthetics score
        min_aesthetics: Cut = -1e15  # in the units of the ratings
    class balance:
        seeds: str = ""  # data URI: keep only the k nearest images of each of its images
        k: Count = 4  # LVD-142M: 4 for large seed sets, 32 for small ones
        target: Whole = 0  # images to keep, spread evenly over domains; 0 = all
        clusters: Levels | Count = "1000 100 10"  # of k-means levels, finest first; the last are the domains
        rounds: Rounds = 3  # of resampling, so that centroids do not crowd where images are many
        seed: Whole = 0  # of the first centroids
    class write:
        images: Count = 10_000  # per shard
    # fmt: on

    def __init__(self):
        config.fill_sections(self)


KINDS = config.kinds_of(Settings())


def load(file=None, overrides=()):
    """-> Settings: the defaults, then a YAML file, then texts "section.key=value". Raises UserError."""
    settings = Settings()
    config.assign(settings, config.read_values(KINDS, Path(file) if file else None, *overrides))
    if sorted(levels_of(settings), reverse=True) != levels_of(settings):
        raise UserError(f"balance.clusters {settings.balance.clusters} must name the largest number first")
    return settings


def levels_of(settings):
    """The numbers of clusters in balance.clusters, finest level first."""
    return [int(k) for k in str(settings.balance.clusters).split()]
