"""Content: linear heads on features, for what must not be in the set (blocked) and what looks poor (ugly).

No head is shipped. One is trained from your examples, or read from a file; a trained one is saved under
OUT/heads and may serve as content.head for another source.
"""

import csv
import io
import os
from typing import NamedTuple

import numpy as np

from config import UserError
from curation.embed import embed_examples
from curation.manifest import REASONS, load_arrays, save_arrays
from curation.quality import threshold
from curation.vectors import BLOCK, to_float64
from decode import open_regular
from sources import Entry, ImageFiles, check_name, open_source

PENALTY = 10.0  # of squared weights, for standardised features
NEWTON_STEPS = 25
FOLDS = 5  # of cross-validation, and so the smallest number of examples of a kind


class Head(NamedTuple):
    """A linear head and what the funnel says about it."""

    column: str  # "aesthetics": a rating; "blocked": the probability that the content is unwanted
    arrays: dict  # weight (D,), bias; for "blocked" a threshold too
    note: str


def content(state):
    settings = state.cfg.content
    named = (settings.ratings, settings.head, settings.allow, settings.block)
    files = [name for name in named if name]
    if files:
        state.apply("content", filter_content, settings, files)
    else:
        state.notes.append("no content head: none is shipped; content.allow and content.block train one")


def filter_content(state):
    """-> the columns why, aesthetics, blocked and the notes."""
    kept = state.kept()
    columns = dict(why=np.zeros(state.num_images, np.uint8))
    notes = []
    for head in open_heads(state.embedder, state.cfg.content):
        scores = np.full(state.num_images, np.nan, np.float32)
        scores[state.embedded] = apply_head(head.arrays, state.features)
        if head.column == "aesthetics":
            reason = "ugly"
            fails = scores[kept] < threshold(state.cfg.content.min_aesthetics, scores[kept])
        else:
            reason = "blocked"
            fails = scores[kept] >= head.arrays["threshold"]
        columns["why"][kept[fails]] = REASONS.index(reason)
        columns[head.column] = scores
        notes.append(head.note)
        save_arrays(state.out / "heads" / f"{head.column}.npz", head.arrays)
    return dict(columns, notes=np.array(notes))


def open_heads(embedder, settings):
    """The heads that the settings `content` ask for -> [Head]. Raises UserError."""
    heads = []
    if settings.ratings:
        heads.append(train_aesthetics(embedder, settings.ratings))
    if settings.head:
        heads.append(load_head(settings.head))
    elif settings.block or settings.allow:
        heads.append(train_filter(embedder, settings))
    for head in heads:
        weight = head.arrays["weight"]
        if weight.shape != (embedder.width,):
            raise UserError(f"the head is for {weight.size} features, here are {embedder.width}")
        if not all(np.isfinite(values).all() for values in head.arrays.values()):
            raise UserError(f"the head for {head.column} is not finite: look at its file, or at its examples")
    return heads


def load_head(path):
    kinds = dict(weight=("fiu", 1), bias=("fiu", 0), threshold=("fiu", 0))
    arrays = load_arrays(path, kinds, "must be an .npz with weight, bias and threshold")
    return Head("blocked", arrays, f"content head {path}")


def train_filter(embedder, settings):
    """Allowed and blocked examples -> a Head, its note with the cross-validated precision and recall."""
    if not settings.allow or not settings.block:
        raise UserError("content.allow and content.block belong together: name examples of both")
    allowed, _ = embed_examples(embedder, open_source(settings.allow), settings.allow, FOLDS)
    blocked, _ = embed_examples(embedder, open_source(settings.block), settings.block, FOLDS)
    x = np.concatenate([allowed, blocked]).astype(np.float64)
    y = np.repeat([0.0, 1.0], [len(allowed), len(blocked)])
    p = held_out_scores(x, y, logistic=True)
    num_missed = min(int((1 - settings.recall) * len(blocked)), len(blocked) - 1)
    cut = np.sort(p[y == 1])[num_missed]
    weight, bias = fit_linear(x, y, logistic=True)
    precision = y[p >= cut].mean()
    recall = (p >= cut)[y == 1].mean()
    note = f"content head of {len(allowed)} allowed and {len(blocked)} blocked examples; cross-validated at "
    note += f"its threshold {cut:.3f}: precision {precision:.3f}, recall {recall:.3f}"
    return Head("blocked", dict(weight=weight, bias=bias, threshold=cut), note)


def train_aesthetics(embedder, ratings_file):
    """A CSV of path,rating -> a Head, its note with the rank correlation on held-out images."""
    paths = []
    ratings = []
    try:
        with open_regular(ratings_file) as file:
            for line in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
                paths.append(check_name(os.path.join(os.path.dirname(ratings_file), line["path"])))
                ratings.append(float(line["rating"]))
        if not ratings or not (np.abs(ratings) <= 1e15).all():
            raise ValueError("no ratings, or one that is no number up to 1e15")
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{ratings_file} must be a CSV with columns path and rating ({error!r})") from None
    images = ImageFiles([Entry(path) for path in paths])
    x, readable = embed_examples(embedder, images, ratings_file, FOLDS)
    x = x.astype(np.float64)
    y = np.array(ratings)[readable]
    ranks = [np.argsort(np.argsort(values)) for values in (held_out_scores(x, y, logistic=False), y)]
    correlation = np.corrcoef(ranks)[0, 1]
    weight, bias = fit_linear(x, y, logistic=False)
    note = f"aesthetics head of {len(y)} ratings; rank correlation on held-out ones {correlation:.3f}"
    return Head("aesthetics", dict(weight=weight, bias=bias), note)


# ---------------------------------------------------------------- linear heads


def fit_linear(x, y, logistic):
    """Ridge (one step) or logistic regression by Newton's method: x (n, D), y (n,) -> weight (D,), bias."""
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    z = np.column_stack([(x - mean) / std, np.ones(len(x))])  # the last column is for the bias
    w = np.zeros(z.shape[1])
    penalty = np.diag([PENALTY] * x.shape[1] + [1e-6])
    for _ in range(NEWTON_STEPS if logistic else 1):
        p = sigmoid(z @ w) if logistic else z @ w
        curvature = p * (1 - p) if logistic else np.ones(len(z))
        w += np.linalg.solve((z.T * curvature) @ z + penalty, z.T @ (y - p) - penalty @ w)
    return np.float32(w[:-1] / std), np.float32(w[-1] - (w[:-1] * mean / std).sum())


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def apply_head(head, x):
    """A head's arrays, rows x (n, D) -> (n,): probabilities if it has a threshold, else ratings."""
    scores = []
    for start in range(0, len(x), BLOCK):
        rows = to_float64(x[start : start + BLOCK]).cpu().numpy()
        scores.append(rows @ head["weight"])
    scores = np.concatenate(scores) + head["bias"]
    return sigmoid(scores) if "threshold" in head else scores


def held_out_scores(x, y, logistic):
    """The score of each example (n,) from a head that was fitted without it."""
    scores = np.empty(len(y))
    fold_of = np.random.default_rng(0).permutation(len(y)) % FOLDS
    for fold in range(FOLDS):
        held_out = fold_of == fold
        weight, bias = fit_linear(x[~held_out], y[~held_out], logistic)
        scores[held_out] = x[held_out] @ weight + bias
    return sigmoid(scores) if logistic else scores
