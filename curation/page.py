"""The funnel of a curation as one page: how many images each stage left, and what the dropped ones look like.

    python -m curation.page OUT     # draws OUT/funnel.html again from OUT/manifest.jsonl and OUT/funnel.json

Look at it before you train: a threshold is right when its sheet shows what you do not want, and nothing else.
Everything is inside the file (curves as SVG, pictures as JPEG), so it can be sent and kept. Only the manifest
is needed; it is read twice, line by line. A sheet shows those images of a reason whose SHA-256 is smallest:
as good as a random choice, and the same one each time.
"""

import argparse
import base64
import html
import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import config
from config import UserError, parse_json
from curation.manifest import SCORES, load_bytes
from curation.quality import threshold
from curation.settings import load
from decode import BadImage, Reading, decode_image, open_regular
from runfolder import atomic_write_text

SHEET = 16  # images on a sheet
SIDE = 112  # of a thumbnail, in pixels
TILE = SIDE + 4
SHOWN_CLUSTERS = 20
SHOWN_OF_CLUSTER = 10  # images
SHOWN_GROUPS = 5  # of duplicates, the largest ones
SHOWN_OF_GROUP = 9  # images, besides the one that they resemble
BINS = 60  # bars of a histogram
BAR = 6  # pixels from one bar to the next
HEIGHT = 100  # of a histogram, in pixels
HISTOGRAMS = (*SCORES, "aesthetics", "blocked")
CUTS = dict(sharpness="min_sharpness", entropy="min_entropy", dark="min_dark", bright="max_bright")
PAIRED = ("exact duplicate", "near duplicate", "feature duplicate", "leak")  # shown above what they resemble
STYLE = """body{font:15px/1.5 system-ui;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
td,th{padding:.15em .8em;text-align:right}td:first-child,:is(td,th):last-child{text-align:left}
.bar{background:#4a7ebb;height:1em}img{max-width:100%}small,figcaption{color:#666}
figure{display:inline-block;margin:.5em 1em .5em 0}"""


def curation_report(out):
    """OUT/manifest.jsonl and OUT/funnel.json -> OUT/funnel.html."""
    with open_regular(out / "funnel.json") as file:
        facts = parse_json(file.read())
    groups, scores, duplicates = survey(out)
    largest = dict(duplicates.most_common(SHOWN_GROUPS))
    partners, members = find_partners(out, groups, largest)
    settings = load()
    config.assign(settings, {f"ingest.{key}": value for key, value in facts["settings"]["ingest"].items()})
    reading = Reading.from_config(settings.ingest)
    parts = ["<h1>The funnel</h1>", stage_table(facts["stages"])]
    parts += [f"<p>{escape(note)}</p>" for note in facts["notes"]]
    parts.append("<h2>Scores</h2><p>Of all readable images; the red line is the threshold.</p>")
    for name, values in scores.items():
        if values:
            parts.append(histogram(name, values, facts["settings"]["quality"].get(CUTS.get(name))))
    parts.append("<h2>What was dropped, and why</h2>")
    parts += reason_sheets(facts, groups, partners, reading)
    parts += group_sheets(largest, partners, members, reading)
    clusters = sorted(name for name in groups if isinstance(name, tuple))
    if clusters:
        parts.append("<h2>Clusters</h2><p>A line is a cluster of the finest level; evenly chosen ones.</p>")
        every = -(-len(clusters) // SHOWN_CLUSTERS)
        lines = [groups[name][:SHOWN_OF_CLUSTER] for name in clusters[::every]]
        parts.append(sheet(lines, reading))
    settings = json.dumps(facts["settings"], indent=1)
    parts.append(f"<h2>Settings</h2><pre>{escape(settings)}</pre>")
    head = f"<!doctype html><meta charset=utf-8><title>Funnel</title><style>{STYLE}</style>"
    atomic_write_text(out / "funnel.html", head + "\n".join(parts))


# ---------------------------------------------------------------- from the manifest


def read_manifest(out, name="manifest"):
    """Yields the rows of OUT/manifest.jsonl, or of evaluation.jsonl."""
    with open_regular(out / f"{name}.jsonl", limit=math.inf) as lines:
        yield from map(parse_json, lines)


def survey(out):
    """One pass over the manifest -> {group: its SHEET rows}, {score: [n values]}, Counter of duplicates.

    A group is a reason or a tuple ("cluster", number). The duplicates of an image are counted by its SHA-256.
    """
    groups = {}
    duplicates = Counter()
    scores = {name: [] for name in HISTOGRAMS}
    for row in read_manifest(out):
        names = [row["why"]]
        if row["keep"] and row["cluster"] >= 0:
            names.append(("cluster", row["cluster"]))
        for name in names:
            add_row(groups.setdefault(name, []), row)
        if "of" in row:
            duplicates[row["of"]] += 1
        for name in HISTOGRAMS:
            if row.get(name) is not None:
                scores[name].append(row[name])
    return {name: choose(group) for name, group in groups.items()}, scores, duplicates


def add_row(group, row):
    """Append a row to a list of which only a sheet will be shown."""
    group.append(row)
    if len(group) > 20 * SHEET:  # sort seldom, and hold few
        group[:] = choose(group)


def choose(group):
    return sorted(group, key=lambda row: row.get("sha256", ""))[:SHEET]


def find_partners(out, groups, largest):
    """Another pass -> {SHA-256: row} of the images that the duplicates and leaks on the sheets resemble.

    largest: the SHA-256 of others that are wanted. Also -> {each of these: its SHEET duplicates}
    """
    wanted = set(largest)
    members = {sha: [] for sha in largest}
    for reason in PAIRED:
        wanted |= {row["of"] for row in groups.get(reason, ()) if "of" in row}
    partners = {}
    for name in ("evaluation", "manifest"):
        for row in read_manifest(out, name):
            sha = row.get("sha256")
            if sha in wanted and (row["keep"] or sha not in partners):  # of equal ones, the one that stayed
                partners[sha] = row
            if row.get("of") in members:
                add_row(members[row["of"]], row)
    return partners, {sha: choose(group) for sha, group in members.items()}


# ---------------------------------------------------------------- to HTML


def escape(text):
    """What a file says -> text for HTML; bytes in its name that are no UTF-8 as \\udcff."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def stage_table(stages):
    """[stage, images left, {reason: images so far}] of each stage -> the funnel as a table."""
    total = max(sum(stages[0][2].values()), 1)
    before = {}
    lines = []
    for name, left, reasons in stages:
        dropped = []
        for reason, count in reasons.items():
            new = count - before.get(reason, 0)
            if reason != "kept" and new > 0:
                dropped.append(f"{new:,d} {reason}")
        bar = f'<div class="bar" style="width:{300 * left / total:.0f}px"></div>'
        dropped = escape(", ".join(dropped))
        lines.append(f"<tr><td>{escape(name)}<td>{left:,d}<td>{bar}<td style='text-align:left'>{dropped}")
        before = reasons
    return f"<table><tr><th>stage<th>images left<th><th>dropped here{''.join(lines)}</table>"


def stage_lines(stages):
    """The funnel as text, for the console."""
    for name, left, reasons in stages:
        dropped = ", ".join(f"{count:,d} {reason}" for reason, count in reasons.items() if reason != "kept")
        yield f"{name:10s} {left:9,d} images; {dropped}"


def histogram(name, values, cut):
    """Values -> an inline SVG; the red line is the threshold, if there is one."""
    low, high = np.percentile(values, [0.1, 99.9])
    caption = f"{name}: {low:.3g} to {high:.3g}"
    span = (low, high if high > low else low + 1)
    counts, edges = np.histogram(np.clip(values, low, high), BINS, span)
    shapes = []
    for i, height in enumerate(HEIGHT * counts / counts.max()):
        place = f'x="{BAR * i}" y="{HEIGHT - height:.1f}" width="{BAR - 1}" height="{height:.1f}"'
        shapes.append(f'<rect {place} fill="#4a7ebb"/>')
    if cut is not None:
        caption += f"; cut at {cut}"
        red = threshold(cut, values)
        if edges[0] <= red <= edges[-1]:
            x = BAR * BINS * (red - edges[0]) / (edges[-1] - edges[0])
            shapes.append(f'<path d="M{x:.1f} 0v{HEIGHT}" stroke="#c00" stroke-width="2"/>')
    drawing = f'<svg width="{BAR * BINS}" height="{HEIGHT}">{"".join(shapes)}</svg>'
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def reason_sheets(facts, groups, partners, reading):
    """A title and a sheet of examples for each reason, as pieces of HTML."""
    totals = facts["stages"][-1][2]
    parts = []
    for reason in [*facts["reasons"][1:], "kept"]:
        group = groups.get(reason)
        if not group:
            continue
        caption = "; below each, what it resembles" if reason in PAIRED else ""
        parts.append(f"<h3>{escape(reason)}</h3><small>{len(group)} of {totals[reason]:,d}{caption}</small>")
        if reason == "unreadable":
            lines = [f"{row.get('path', row.get('key'))}: {row['detail']}" for row in group]
            parts.append("<br>".join(map(escape, lines)))
            continue
        lines = [group]
        if reason in PAIRED:
            lines.append([partners.get(row.get("of")) for row in group])
        parts.append(f"<div>{sheet(lines, reading)}</div>")
    return parts


def group_sheets(largest, partners, members, reading):
    """The largest groups of duplicates, {SHA-256 of what they resemble: how many}, as pieces of HTML."""
    if not largest:
        return []
    text = "Each begins with the image that the others resemble: the one that was kept, or one that leaked."
    parts = [f"<h2>The largest groups of duplicates</h2><p>{text}</p>"]
    for sha, count in largest.items():
        picture = sheet([[partners.get(sha), *members[sha][:SHOWN_OF_GROUP]]], reading)
        parts.append(f"<figure>{picture}<figcaption>{count + 1:,d} images</figcaption></figure>")
    return parts


def sheet(lines, reading=None):
    """Lists of rows (None: leave a gap) -> one picture, a line of thumbnails for each list, as an <img>."""
    longest = max(map(len, lines))
    page = Image.new("RGB", (longest * TILE, len(lines) * TILE), "white")
    for y, line in enumerate(lines):
        for x, row in enumerate(line):
            if row:
                page.paste(thumbnail(row, reading), (x * TILE, y * TILE))
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def thumbnail(row, reading=None):
    """A row of a manifest -> its picture on a square, which is grey if it cannot be read."""
    tile = Image.new("RGB", (SIDE, SIDE), "#ddd")
    try:
        image = decode_image(load_bytes(row), "", reading=reading)
    except (BadImage, OSError):
        return tile
    image.thumbnail((SIDE, SIDE))
    tile.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return tile


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m curation.page", description=__doc__, formatter_class=form)
    parser.add_argument("out", type=Path, help="the folder that a curation has written")
    out = parser.parse_args().out
    try:
        curation_report(out)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        problem = f"{out} holds no result of a curation that can be drawn ({error!r:.200})"
        raise UserError(f"{problem}: run the curation again") from error


if __name__ == "__main__":
    config.run(main)
