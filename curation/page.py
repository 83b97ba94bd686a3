"""The funnel of a curation as one page: how many images each stage left, and what the dropped ones look like.

    python funnel.py OUT     # writes OUT/funnel.html anew from OUT/manifest.jsonl and OUT/funnel.json

Look at it before you train: a threshold is right when its sheet shows what you do not want, and nothing else.
Everything is inside the file (curves as SVG, pictures as JPEG), so it can be sent and kept. What is unusual:
it needs nothing but the manifest, which is read twice, line by line; a sheet shows those images of a reason
whose SHA-256 is smallest, which is as good as a draw and shows the same ones each time.
"""

import argparse
import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

import config
from runfolder import atomic_write_text
from sources import BadImage, decode_image

SHEET, SIDE, BINS = 16, 112, 60  # images on a sheet, their side in pixels, bars of a histogram
PAIRED = ("exact duplicate", "near duplicate", "feature duplicate", "leak")  # shown above whom they resemble
SCORES = ("sharpness", "entropy", "dark", "bright", "aesthetics", "blocked")
CUTS = dict(sharpness="min_sharpness", entropy="min_entropy", dark="min_dark", bright="max_bright")
STYLE = """body{font:15px/1.5 system-ui;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
td,th{padding:.15em .8em;text-align:right}td:first-child,:is(td,th):last-child{text-align:left}
.bar{background:#4a7ebb;height:1em}img{max-width:100%}small,figcaption{color:#666}
figure{display:inline-block;margin:.5em 1em .5em 0}"""


def rows(out, name="manifest"):
    with open(out / f"{name}.jsonl", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def survey(out):
    """One pass over the manifest -> {group: its SHEET rows}, {score: [n values]}; a group is a reason or a
    ("cluster", number)."""
    groups, scores = {}, {name: [] for name in SCORES}
    for row in rows(out):
        names = [row["why"]] + ([("cluster", row["cluster"])] if row["keep"] and row["cluster"] >= 0 else [])
        for name in names:
            group = groups.setdefault(name, [])
            group.append(row)
            if len(group) > 20 * SHEET:
                group[:] = choice(group)
        for name in SCORES:
            if row.get(name) is not None:
                scores[name].append(row[name])
    return {name: choice(group) for name, group in groups.items()}, scores


def choice(group):
    return sorted(group, key=lambda row: row.get("sha256", ""))[:SHEET]


def thumbnail(row):
    """A row of a manifest -> its picture on a square, grey if it cannot be read."""
    tile = Image.new("RGB", (SIDE, SIDE), "#ddd")
    try:
        with open(row.get("path") or row["shard"], "rb") as f:
            f.seek(max(row["at"][0], 0))
            data = f.read(row["at"][1] if row["at"][0] >= 0 else -1)
        image = decode_image(data, "")
    except (BadImage, OSError):
        return tile
    image.thumbnail((SIDE, SIDE))
    tile.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return tile


def sheet(lines):
    """Lists of rows -> one picture, a line of thumbnails for each, as an <img>."""
    page = Image.new("RGB", (max(map(len, lines)) * (SIDE + 4), len(lines) * (SIDE + 4)), "white")
    for y, line in enumerate(lines):
        for x, row in enumerate(line):
            if row:
                page.paste(thumbnail(row), (x * (SIDE + 4), y * (SIDE + 4)))
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def histogram(name, values, cut):
    """Values -> an inline SVG; the red line is the threshold."""
    low, high = np.percentile(values, [0.1, 99.9])
    shown = "" if cut is None else f"; cut at {cut}"
    if isinstance(cut, str):  # a percentile: as curate.limit
        cut = np.percentile(values, float(cut[:-1]))
    counts, edges = np.histogram(np.clip(values, low, high), BINS, (low, high if high > low else low + 1))
    heights = 100 * counts / counts.max()
    bars = "".join(f'<rect x="{6 * i}" y="{100 - h:.1f}" width="5" height="{h:.1f}" fill="#4a7ebb"/>'
                   for i, h in enumerate(heights))  # fmt: skip
    if cut is not None and edges[0] <= cut <= edges[-1]:
        x = 6 * BINS * (cut - edges[0]) / (edges[-1] - edges[0])
        bars += f'<path d="M{x:.1f} 0v100" stroke="#c00" stroke-width="2"/>'
    drawn = f'<svg width="{6 * BINS}" height="100">{bars}</svg>'
    return f"<figure>{drawn}<figcaption>{name}: {low:.3g} to {high:.3g}{shown}</figcaption></figure>"


def stage_table(stages):
    """[stage, images left, {reason: images so far}] of each stage -> the funnel as a table."""
    total, before, lines = max(sum(stages[0][2].values()), 1), {}, []
    for name, left, why in stages:
        new = ", ".join(f"{n - before.get(k, 0):,d} {k}" for k, n in why.items()
                        if k != "kept" and n > before.get(k, 0))  # fmt: skip
        bar = f'<div class="bar" style="width:{300 * left / total:.0f}px"></div>'
        lines.append(f"<tr><td>{name}<td>{left:,d}<td>{bar}<td style='text-align:left'>{new}")
        before = why
    return f"<table><tr><th>stage<th>images left<th><th>dropped here{''.join(lines)}</table>"


def lines(stages):
    """The same for the console."""
    for name, left, why in stages:
        dropped = ", ".join(f"{count:,d} {reason}" for reason, count in why.items() if reason != "kept")
        yield f"{name:10s} {left:9,d} images; {dropped}"


def draw(out):
    """OUT/manifest.jsonl and OUT/funnel.json -> OUT/funnel.html."""
    about, (groups, scores) = json.loads((out / "funnel.json").read_text()), survey(out)
    wanted = {row["of"] for name in PAIRED for row in groups.get(name, ()) if "of" in row}
    partner = {}
    for row in (row for name in ("evaluation", "manifest") for row in rows(out, name)):
        sha = row.get("sha256")
        if sha in wanted and (row["keep"] or sha not in partner):  # of equal ones, the one that stayed
            partner[sha] = row
    parts = ["<h1>The funnel</h1>", stage_table(about["stages"])]
    parts += [f"<p>{html.escape(note)}</p>" for note in about["notes"]]
    parts.append("<h2>Scores</h2><p>Of all readable images; the red line is the threshold.</p>")
    quality = about["settings"]["quality"]
    parts += [histogram(k, v, quality.get(CUTS.get(k))) for k, v in scores.items() if v]
    parts.append("<h2>What was dropped, and why</h2>")
    for reason in [*about["reasons"][1:], "kept"]:
        if reason not in groups or not groups[reason]:
            continue
        group = groups[reason]
        caption = "; below each, what it resembles" if reason in PAIRED else ""
        total = about["stages"][-1][2][reason]
        parts.append(f"<h3>{reason}</h3><small>{len(group)} of {total:,d}{caption}</small>")
        if reason == "unreadable":
            lines = [f"{row.get('path', row.get('key'))}: {row['detail']}" for row in group]
            parts.append("<br>".join(map(html.escape, lines)))
        else:
            below = [[partner.get(row.get("of")) for row in group]] if reason in PAIRED else []
            parts.append(f"<div>{sheet([group, *below])}</div>")
    clusters = sorted(name for name in groups if isinstance(name, tuple))
    if clusters:
        parts.append("<h2>Clusters</h2><p>A line is a cluster of the finest level; evenly chosen ones.</p>")
        parts.append(sheet([groups[c][:10] for c in clusters[:: -(-len(clusters) // 20)]]))
    text = json.dumps(about["settings"], indent=1)
    parts.append(f"<h2>Settings</h2><pre>{html.escape(text)}</pre>")
    page = f"<!doctype html><meta charset=utf-8><title>Funnel</title><style>{STYLE}</style>"
    atomic_write_text(out / "funnel.html", page + "\n".join(parts))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("out", type=Path, help="what curate.py has written")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    config.run(main)
