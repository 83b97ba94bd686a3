"""The data report: what a data set holds, told before step 0.

Kinds of files, those that are not read, sizes, classes, pages, images without contrast, what the evaluation's
crop cuts off. One line if all of it is ordinary; a warning for whatever is not. A sample is looked at, evenly
spread, so that a million files cost no more than two hundred.

    survey_dataset(dataset, uri) -> Survey(summary, warnings, facts)
"""

import hashlib
import json
import sys
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from config import parse_json
from decode import PHONE_FORMATS, BadImage
from runfolder import atomic_write_text
from sources import ImageFiles

LOOKED_AT = 200  # images, of which the header is read
DECODED = 50  # of these, whose contrast is measured
FLAT = 3  # standard deviation of the grey values, of 255, below which there is hardly anything to see
BESIDE_IMAGES = {".txt", ".json", ".csv", ".md", ".xml", ".yaml", ".html", ".db", ".log"}  # no pictures
CUT_OFF = 1 / 3  # of an image: a crop that discards more is worth a warning


class Survey(NamedTuple):
    """What was found: a line, warnings, and numbers for survey.json."""

    summary: str
    warnings: list[str]
    facts: dict


def survey_dataset(dataset, uri, fit=None):
    """A data set -> Survey. fit: how images become square, if they do."""
    facts = dict(uri=uri, images=len(dataset))
    if not isinstance(dataset, ImageFiles):
        return Survey(f"{len(dataset):,} images of {uri}", [], facts)
    facts |= look_at(dataset) | dict(fingerprint=fingerprint(dataset), not_read=dict(dataset.not_read))
    if dataset.reading.range:
        facts["range"] = list(dataset.reading.range)
    counts = np.bincount(dataset.labels + 1, minlength=1)  # without a label first
    facts["unlabelled"] = int(counts[0])
    facts["classes"] = dict(zip(dataset.classes or (), counts[1:].tolist()))
    return Survey(summarise(facts), list_warnings(facts, fit), facts)


def look_at(dataset):
    """A sample of the images -> {what: how many of the sample, or numbers}."""
    kinds = Counter()
    sizes = []
    pages = []
    bad = []
    flat = 0
    numbers = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int))
    decoded = set(numbers[:: -(-len(numbers) // DECODED)].tolist())
    for i in numbers.tolist():
        try:
            with dataset.open_picture(i) as picture:
                kind, size, count = describe(picture)
            if i in decoded:
                flat += np.asarray(dataset[i][0].convert("L")).std() < FLAT
        except BadImage as error:
            bad.append(str(error))
            continue
        kinds[kind] += 1
        sizes.append(size)
        pages.append(count)
    elongation = [max(size) / min(size) for size in sizes]
    return dict(
        looked_at=len(numbers),
        kinds=dict(kinds.most_common()),
        smallest=min(sizes, key=min, default=(0, 0)),
        largest=max(sizes, key=max, default=(0, 0)),
        median_cut_off=float(1 - 1 / np.median(elongation)) if sizes else 0.0,
        cut_off=sum(ratio > 1 / (1 - CUT_OFF) for ratio in elongation),
        most_pages=max(pages, default=1),
        stacks=sum(count > 1 for count in pages),
        unreadable=len(bad),
        first_unreadable=bad[:1],
        decoded=len(decoded),
        flat=int(flat),
    )


def describe(picture):
    """Pillow's image, or numbers (H, W, C) -> its kind in words, (width, height), number of pages."""
    if isinstance(picture, np.ndarray):
        height, width, bands = picture.shape
        return f"{picture.dtype} of {bands} band{'s' * (bands > 1)}", (width, height), 1
    pages = 1
    with suppress(Exception):  # whatever the parser of a damaged directory of pages may raise
        pages = getattr(picture, "n_frames", 1)
    return f"{picture.format} {picture.mode}", picture.size, pages


def fingerprint(dataset):
    """The same for the same names of files, and places in shards: what a resumed run compares."""
    places = dataset.joined_names + dataset.offsets.tobytes() + dataset.sizes.tobytes()
    return hashlib.sha256(places).hexdigest()[:16]


def summarise(facts):
    """The one line."""
    kinds = ", ".join(list(facts["kinds"])[:3])
    sizes = [" x ".join(map(str, facts[key])) for key in ("smallest", "largest")]
    size = sizes[0] if sizes[0] == sizes[1] else f"{sizes[0]} to {sizes[1]}"
    line = f"{facts['images']:,} images of {facts['uri']}: {kinds}, {size} pixels"
    counts = facts["classes"].values()
    if counts:
        each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        line += f"; {len(counts)} classes of {each}"
    if "range" in facts:
        line += "; {:g} becomes black, {:g} white".format(*facts["range"])
    return line


def list_warnings(facts, fit):
    """What is not ordinary, a sentence each."""
    found = []
    seen = facts["looked_at"]
    not_read = facts["not_read"]
    pictures = {kind: count for kind, count in not_read.items() if kind not in BESIDE_IMAGES}
    if pictures:
        total = sum(pictures.values())
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(pictures).most_common(8))
        packages = {PHONE_FORMATS[kind][2] for kind in pictures if kind in PHONE_FORMATS}
        remedy = f"; pip install {' '.join(sorted(packages))}" if packages else ""
        found.append(f"{total:,} of {total + facts['images']:,} files are not read: {kinds}{remedy}")
    if facts["unreadable"]:
        example = facts["first_unreadable"][0]
        found.append(f"{facts['unreadable']} of {seen} images cannot be read, such as {example}")
    if facts["stacks"]:
        count = f"{facts['stacks']} of {seen} images have several pages, up to {facts['most_pages']}"
        found.append(f"{count}: only the first is read; save the others as files of their own")
    if facts["flat"]:
        count = f"{facts['flat']} of {facts['decoded']} images are almost without contrast"
        found.append(f"{count}: look at them, and if a sensor wrote them, set data.range")
    if fit == "crop" and facts["cut_off"] > seen / 10:
        count = f"{facts['cut_off']} of {seen} images that were looked at"
        remedy = "--fit resize or pad (evaluation.fit) shows all of them"
        found.append(f"the central square leaves out more than a third of {count}: {remedy}")
    return found


def print_warnings(dataset, uri, fit=None):
    """What is not ordinary about a data set, on stderr."""
    for warning in survey_dataset(dataset, uri, fit).warnings:
        print(f"warning: {uri}: {warning}", file=sys.stderr)


def report_data(dataset, uri, folder):
    """At the start of a run: the line and the warnings; they also go to folder/survey.json.

    A resumed run, whose folder has that file, says if the data set is another one now.
    """
    found = survey_dataset(dataset, uri)
    file = folder / "survey.json"
    print(found.summary, flush=True)
    for warning in found.warnings + changes_since(file, found.facts):
        print(f"warning: {uri}: {warning}", file=sys.stderr)
    atomic_write_text(file, json.dumps(found.facts | dict(warnings=found.warnings), indent=1))


def changes_since(file, facts):
    """[what has changed since an earlier part of the run wrote this file], or []."""
    try:
        earlier = parse_json(file.read_bytes())
        if earlier["fingerprint"] == facts["fingerprint"]:
            return []
        counts = f"{earlier['images']:,} images before, {facts['images']:,} now"
    except (OSError, ValueError, KeyError, TypeError):  # a new run, or embedded data
        return []
    return [f"the data set has changed since the last part of this run: {counts}"]
