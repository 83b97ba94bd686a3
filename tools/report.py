"""One run, or several beside each other, as one HTML page: results, curves, pictures, settings, machine.

    python report.py runs/laptop                        # writes runs/laptop/report.html
    python report.py runs/a runs/b --out report.html    # a colour for each run

Everything is inside the file: it opens from the disk, on a phone too, and can be sent and kept. What is
unusual: curves are SVG written here, without JavaScript or a plotting library; each has a dashed line where
the run's own settings put ignorance (see `reference`); the sentence below it is that of README's table. A run
still going, or killed amid a line, is drawn as far as it got. Expect seconds, nearly all for the pictures:
each kept checkpoint (ten at most) looks at `--images` evaluation images.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import config
from config import UserError
from evals.visualize import attention_of, attention_tile, large_sample, pca_row, through_training, tile
from optim import total_steps
from runfolder import atomic_write_text
from sources import open_source
from tools.weights import open_backbone

MOST = 8  # runs whose colours can be told apart: --c0 to --c7 of assets/report.css
BINS = 300  # stretches of a long curve, each of which keeps its lowest and its highest value
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 212, 60, 336, 24, 174  # of a plot, and of its axes in it
CHAPTERS = {  # of the page; whatever else is logged comes after them
    "The metric and the loss": "knn_top1 loss loss_dino_local loss_dino_global loss_ibot loss_koleo",
    "What the teacher says": "entropy entropy_mean kl rank",
    "Steps": "grad_backbone grad_dino_head grad_ibot_head skipped images_per_second peak_memory_gb",
    "Schedules": "lr last_layer_lr backbone_lr weight_decay momentum teacher_temp",
}
SHARES = {"knn": "share right", "entropy": "share of ln K", "skipped": "1 = skipped"}  # axes from 0 to 1
UNITS = SHARES | {  # by the beginnings of names
    "loss": "nats", "kl": "nats", "rank": "directions", "grad": "norm", "images_per": "images/s",
    "peak": "GiB", "lr": "per step", "last_layer": "per step", "backbone": "per step",
    "weight_decay": "per unit of lr", "momentum": "share kept", "teacher_temp": "temperature"}  # fmt: skip
IGNORANT = "Dashed: ln K × weight × {}, what a student pays that knows nothing."
NOTES = {  # what is to be said besides README's sentence
    "knn_top1": "A finished run's last point is its result, on all images.",
    "loss": "Dashed: what a student pays that knows nothing, KoLeo left out.",
    "loss_dino_local": IGNORANT.format("L / (L + 1), the share of these pairs"),
    "loss_dino_global": IGNORANT.format("1 / (L + 1), the share of these pairs"),
    "loss_ibot": IGNORANT.format("p"),
    "loss_koleo": "Times its weight. Dashed: neighbours at distance 1, of at most 2.",
    "kl": "No dashed line: ignorance, (1 − entropy) × ln K, moves with the entropy.",
    "images_per_second": "Mean since the start.",
    "lr": "Learning rate: linear warm-up, then a cosine to optim.min_lr.",
    "last_layer_lr": "That of the prototypes: 0 during optim.freeze_last_layer_epochs.",
    "backbone_lr": "That of the backbone: 0 during optim.freeze_backbone_epochs.",
    "weight_decay": "A cosine to optim.weight_decay_end.",
    "momentum": "What the teacher keeps of itself at each step.",
    "teacher_temp": "The lower, the sharper the targets.",
}
PICTURES = """<h2>Pictures through training</h2><p>The teacher of each checkpoint. Colours: the first three
principal components of the patch tokens, of each strip by itself. Attention: from dark blue to yellow.</p>"""

# ---------------------------------------------------------------- what a run has left


class Run(NamedTuple):
    path: Path
    name: str
    color: str
    cfg: config.Config
    curves: dict  # {term: [(step, value, or None where it was not finite)]}
    warnings: list  # "step 60: sentence"
    result: dict  # of result.json, or what is known of it by now
    about: dict  # of environment.json


def read_run(path, name, color):
    """A run folder -> Run. UserError if it is none, or of another version."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run folder, it has no config.yaml: name one that train.py has written")
    try:
        files, cfg = [path / "result.json", path / "environment.json"], config.load(path / "config.yaml")
        done, about = (json.loads(file.read_bytes()) if file.exists() else {} for file in files)
    except (UserError, ValueError) as e:
        raise UserError(f"config.yaml, result.json or environment.json of {path} is no good: {e}") from None
    rows, torn = read_rows(path / "metrics.jsonl")
    last, steps = rows[-1]["step"] if rows else 0, total_steps(cfg)
    bad = sum(len(read_rows(file)[0]) for file in path.glob("bad_images_rank*.jsonl"))
    result = {"state": "finished" if done else "not finished: no result.json yet"} | done
    result |= {"steps": f"{done.get('steps', last)} of {steps}", "bad_images": done.get("bad_images", bad)}
    result |= {"skipped_steps": sum("skipped_samples" in row for row in rows)}
    result |= {"torn_lines": f"{torn} of metrics.jsonl left out"} if torn else {}
    rows += [{"step": done.get("steps", last), "knn_top1": done["knn_top1"]}] if "knn_top1" in done else []
    warnings = [f"step {row['step']}: {row['warning']}" for row in rows if "warning" in row]
    return Run(path, name, color, cfg, curves_of(rows), warnings, result, about)


def read_rows(path):
    """-> the whole lines of a .jsonl file as dicts, and how many others there are."""
    rows, torn = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append({"step": 0, **json.loads(line)})
        except (ValueError, TypeError):
            torn += 1
    return rows, torn


def curves_of(rows):
    """Rows of metrics.jsonl -> {term: [(step, value or None)]} of the terms that have a number at all."""
    curves = {}
    for row in rows:
        for term, value in (row | ({"skipped": 1} if "skipped_samples" in row else {})).items():
            if term != "step" and (value is None or isinstance(value, (int, float))):
                known = value is not None and math.isfinite(value)
                curves.setdefault(term, []).append((row["step"], value if known else None))
    return {term: points for term, points in curves.items() if any(v is not None for _, v in points)}


def reference(run):
    """-> {term: [(value, label)]}: dashed lines, where this run's settings and results put them.

    A student that knows nothing answers uniformly, which costs ln K whatever the target: times the weight of
    the term; for DINO times its share of the 2 L + 2 pairs; for iBOT times the share p of masked crops, since
    the others count as 0.
    """
    dino, ibot, L = run.cfg.dino, run.cfg.ibot, run.cfg.crops.local_crops_number
    K, p, clip = dino.head_n_prototypes, ibot.mask_sample_probability, run.cfg.optim.clip_grad
    patch_K = ibot.head_n_prototypes if ibot.separate_head else K
    sums = {"loss_dino_local": {K: dino.loss_weight * L / (L + 1)},
            "loss_dino_global": {K: dino.loss_weight / (L + 1)},
            "loss_ibot": {patch_K: ibot.loss_weight * p}}  # fmt: skip
    sums["loss"] = {k: sum(parts.get(k, 0) for parts in sums.values()) for k in (K, patch_K)}
    marks = {term: [(clip, "clipped above")] for term in run.curves if term.startswith("grad_") and clip}
    for term, parts in sums.items():
        label = " + ".join(f"{w:.3g} × ln {k:,}" for k, w in parts.items() if w)
        marks[term] = [(sum(w * math.log(k) for k, w in parts.items()), label)] if label else []
    floors = {"knn_pixels": "raw pixels", "knn_random_init": "random init", "chance": "chance"}
    marks["knn_top1"] = [(run.result[key], floor) for key, floor in floors.items() if key in run.result]
    marks["entropy"] = [(0.9, "healthy below 0.9"), (0.2, "healthy above 0.2")]
    return marks | {"loss_koleo": [(0.0, "distance 1")]}


def glossary():
    """README's table of logged numbers -> {term: how it is read}."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.*) \| (.*) \| (.*) \| (.*) \|$", text.split("logged numbers mean")[-1], re.M)
    read = {}
    for names, what, good, bad in table:
        what = re.sub(r"^[a-z](?!-)", lambda first: first[0].upper(), what)
        text = f"{what}. Healthy: {good}. Failure: {bad}.".replace("`", "")
        read |= dict.fromkeys(re.findall(r"`(\w+)`", names), text)
    return read


# ---------------------------------------------------------------- plots


def short(x, digits=4):
    return f"{x:,.0f}" if 1e4 <= abs(x) < 1e6 else f"{x:.{digits}g}"


def ticks(low, high):
    """Round numbers, evenly spaced: the first at or below `low`, the last at or above `high`."""
    unit = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= (high - low) / 5.001)
    return [k * step for k in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def levels(values, share):
    """Ticks of the vertical axis: 0 to 1 for shares; with 0 where it is not far."""
    low, high = min(values + [0] * share), max(values + [1] * share)
    if high - low <= 1e-9 * abs(high):  # constant
        low, high = min(low, 0), max(high, 0) or 1
    return ticks(0 if 0 < low < high / 2 else low, high)


def thin(points):
    """Of a long curve the lowest and the highest value of each stretch: its spikes stay."""
    n = len(points) // BINS
    if n < 3:
        return points
    low, high = (lambda p: (p[1] is None, p[1])), (lambda p: (p[1] is not None, p[1]))
    parts = [points[i : i + n] for i in range(0, len(points), n)]
    return [p for part in parts for p in sorted({min(part, key=low), max(part, key=high)})]


def curve(points, x, y, color):
    """Broken where nothing is known; a dot for a point alone, and for each where they are few."""
    d, dots, values = "", "", [None, *(v for _, v in points), None]
    for (step, value), before, after in zip(points, values, values[2:]):
        if value is not None:
            at = f"{x(step):.1f} {y(value):.1f}"
            d += ("M" if before is None else "L") + at
            dots += f"M{at}h0" if len(points) <= 12 or before is None is after else ""
    style = f'style="stroke:{color}"'
    return f'<path class="curve" d="{d}" {style}/><path class="dots" d="{dots}" {style}/>'


def apart(wanted, gap=15):
    """Heights of labels -> the nearest ones inside the axes at which no label touches another."""
    order, placed = sorted(range(len(wanted)), key=wanted.__getitem__), list(wanted)
    for edge, step, better, path in ((TOP + 11, gap, max, order), (BOTTOM - 3, -gap, min, order[::-1])):
        for i in path:
            placed[i] = better(placed[i], edge)
            edge = placed[i] + step
    return placed


def word(x, y, text, anchor, kind="tick"):
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def plot(term, text, runs, end):
    """One term of all runs that have it, over steps from 0 to `end` -> a <figure>."""
    drawn, marks = [(run, thin(run.curves[term])) for run in runs if term in run.curves], {}
    for run, _ in drawn:
        for mark in reference(run).get(term, ()):
            marks.setdefault(mark, []).append(run.color)
    unit = next((unit for start, unit in UNITS.items() if term.startswith(start)), "")
    values = [v for _, points in drawn for _, v in points if v is not None] + [v for v, _ in marks]
    rungs = levels(values, unit in SHARES.values())
    x = lambda step: LEFT + (RIGHT - LEFT) * step / end  # noqa: E731
    y = lambda value: BOTTOM - (BOTTOM - TOP) * (value - rungs[0]) / (rungs[-1] - rungs[0])  # noqa: E731
    parts = [word(0, 12, unit, "start"), word(RIGHT, HEIGHT - 4, "step", "end")]
    for r in rungs:
        parts += [f'<path d="M{LEFT} {y(r):.1f}H{RIGHT}"/>', word(LEFT - 6, y(r) + 4, short(r, 6), "end")]
    for step in (t for t in ticks(0, end) if t <= end and round(t, 6) % 1 == 0):
        parts.append(word(x(step), BOTTOM + 18, short(step, 6), "middle"))
    for (value, _), colors in marks.items():
        own = f' style="stroke:{colors[0]}"' if len(colors) == 1 < len(drawn) else ""
        parts.append(f'<path class="mark" d="M{LEFT} {y(value):.2f}H{RIGHT}"{own}/>')
    parts += [curve(points, x, y, run.color) for run, points in drawn]
    labels = {label: y(value) - 4 for value, label in marks}
    parts += [word(RIGHT, at, t, "end", "label") for t, at in zip(labels, apart(list(labels.values())))]
    ends = [(run, short(next(v for _, v in points[::-1] if v is not None))) for run, points in drawn]
    title = html.escape(f"{term}, {unit}, by step; last: {', '.join(f'{run.name} {v}' for run, v in ends)}")
    svg = f'<svg role="img" aria-label="{title}" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'
    chips = "".join(chip(run, value) for run, value in ends)
    return f"<figure><h3>{html.escape(term)}</h3>{chips}{svg}<figcaption>{text}</figcaption></figure>"


def plots(runs):
    """-> the chapters of plots: every logged term that has a number."""
    logged, read = {term for run in runs for term in run.curves}, glossary()
    end = max([step for run in runs for points in run.curves.values() for step, _ in points], default=0) or 1
    rest = sorted(logged - set(" ".join(CHAPTERS.values()).split()))
    for chapter, terms in (CHAPTERS | {"Also logged": " ".join(rest)}).items():
        known = {t: f"{read.get(t, '')} {NOTES.get(t, '')}" for t in terms.split() if t in logged}
        figures = "".join(plot(term, html.escape(text), runs, end) for term, text in known.items())
        yield f'<h2>{chapter}</h2><div class="plots">{figures}</div>' if figures else ""
    if not logged:
        yield "<p>Nothing is logged yet.</p>"


# ---------------------------------------------------------------- the page


def chip(run, text=""):
    return f'<span class="run"><i style="background:{run.color}"></i>{html.escape(run.name)} {text}</span> '


def table(runs, columns, differing=False):
    """A dict for each run -> a table with a row for each key, or for those only whose values differ."""
    body = "<tr><th>" + "".join(f"<th>{chip(run)}" for run in runs)
    for key in dict.fromkeys(k for column in sorted(columns, key=len, reverse=True) for k in column):
        row = [column.get(key, "-") for column in columns]
        if not differing or any(value != row[0] for value in row):
            name = re.sub(r"[._]", r"\g<0><wbr>", html.escape(key))
            body += f"<tr><td>{name}" + "".join(f"<td>{html.escape(shown(value))}" for value in row)
    return f'<div class="wide" tabindex="0"><table>{body}</table></div>'


def shown(value):
    """As text; of several lines only their number."""
    if isinstance(value, (list, tuple)):
        value = shlex.join(map(str, value))
    text = "" if value is None else short(value, 6) if isinstance(value, float) else str(value)
    return f"{len(text.splitlines())} lines" if "\n" in text else text or "none"


def strip(tiles, kind, text):
    """PIL images in a row, inside the page."""
    images = ""
    for picture in tiles:
        picture.save(buffer := io.BytesIO(), kind, quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        images += f'<img alt="" width="160" height="160" src="data:image/{kind};base64,{data}">'
    shelf = f'<div class="strip" role="img" aria-label="{text}">{images}</div>'
    return f"<figure>{shelf}<figcaption>{text}</figcaption></figure>"


def pictures(run, count):
    """What the teacher of each checkpoint makes of some evaluation images; or why there is nothing to see."""
    e, size = run.cfg.evaluation, run.cfg.evaluation.image_size or run.cfg.crops.global_crops_size
    try:
        if not e.test_path:
            raise UserError("there are no evaluation images: evaluation.test_path names some")
        if not (run.path / "teacher.pth").exists():
            raise UserError("nothing is saved yet: train.checkpoint_every and train.keep_last say what is")
        images = large_sample(open_source(e.test_path), size, e.resize_size or size, count)
        strips = strip(map(tile, images), "jpeg", "evaluation images")
        for title, backbone, _ in through_training(run.path, open_backbone(run.path)[0], images, run.cfg):
            maps = [attention_tile(attention_of(backbone, x)[:, 0].mean(0), x) for x in images]
            strips += strip(pca_row(backbone, images), "png", f"{title}: principal components")
            strips += strip(maps, "jpeg", f"{title}: attention of [CLS], mean of its heads")
    except (UserError, OSError) as why:  # OSError: a run still going deletes its old checkpoints
        return f"<p>{chip(run)}No pictures: {html.escape(str(why))}.</p>"
    return f'<p>{chip(run)}</p><div class="strips">{strips}</div>'


def page(runs, count):
    """-> the HTML text."""
    style = (Path(__file__).parents[1] / "assets" / "report.css").read_text(encoding="utf-8")
    title = html.escape(f"Report: {', '.join(run.name for run in runs)}")
    parts = ["<!doctype html><html lang=en><meta charset=utf-8>",
             "<meta name=viewport content='width=device-width, initial-scale=1'>",
             f"<title>{title}</title><style>{style}</style><h1>{title}</h1>"]  # fmt: skip
    for run in runs:
        parts += [f'<p class="warning" role="alert">{chip(run)}{html.escape(w)}</p>' for w in run.warnings]
    parts += [table(runs, [run.result for run in runs]), *plots(runs)]
    if count:
        parts += [PICTURES, *(pictures(run, count) for run in runs)]
    if len(runs) > 1:
        flat = [
            {f"{s}.{k}": v for s in vars(r.cfg) for k, v in vars(getattr(r.cfg, s)).items()} for r in runs
        ]
        parts += ["<h2>Settings that differ</h2>", table(runs, flat, differing=True)]
    parts += ["<h2>Where and with what</h2>", table(runs, [run.about for run in runs])]
    return "\n".join(parts)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help=f"run folders, {MOST} at most")
    add("--out", type=Path, help="the page (default: report.html in the first run's folder)")
    add("--images", type=int, default=4, help="how many evaluation images are drawn; 0: no pictures")
    args = parser.parse_args()
    if args.images < 0:
        raise UserError(f"--images {args.images}: how many, or 0 for none")
    if len(args.runs) > MOST:
        raise UserError(f"{len(args.runs)} runs cannot be told apart in one plot: name {MOST} at most")
    names = [path.resolve().name for path in args.runs]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, args.runs)]
    runs = [read_run(path, name, f"var(--c{i})") for i, (path, name) in enumerate(zip(args.runs, names))]
    out, text = args.out or args.runs[0] / "report.html", page(runs, args.images)
    try:
        atomic_write_text(out, text)
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e}): name another --out") from None
    print(f"wrote {out}: {text.count('<svg')} plots, {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    config.run(main)
