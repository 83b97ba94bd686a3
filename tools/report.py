"""One run, or several side by side, as one HTML page: results, curves, pictures, settings, machine.

    python -m tools.report runs/laptop                  # writes runs/laptop/report.html and two pictures
    python -m tools.report runs/a runs/b --out report.html    # a colour for each run

Everything is inside the page: it opens from the disk, on a phone too, and can be sent and kept. Curves are
SVG (tools/metric_plots.py), without JavaScript or a plotting library; dashed lines show the loss of a student
that knows nothing, and other values to compare with. A run that is still going, or was killed in the middle
of a line, is drawn as far as it got.

If a run has labelled evaluation images and has saved a teacher, its folder also gets neighbours.png (an image
of each class, and its nearest by the teacher and by the same network untrained) and, if they are scenes,
transfer.png (evals/transfer.py). Expect a minute, nearly all for the pictures: each kept checkpoint (ten at
most) sees `--images` evaluation images. With `--images 0` there are none, and neither of the two files.
"""

import argparse
import base64
import html
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import config
from config import UserError, Whole, argument, convert, parse_json
from decode import Reading
from eval_knn import open_eval_sets
from evals import transfer
from evals.dense import class_names
from evals.neighbours import compare_networks
from evals.patch_maps import patch_attention
from evals.tiles import attention_tile, image_tile
from evals.visualize import large_sample, pca_row, teachers_through_training
from features import untrained_copy
from optim import total_steps
from runfolder import atomic_open
from sources import open_source
from tools.metric_plots import format_number, known_values, legend_item, metric_figure, plot_value
from tools.weights import open_backbone

MAX_RUNS = 8  # whose colours can be told apart: --c0 to --c7 of assets/report.css
STYLESHEET = Path(__file__).parents[1] / "assets" / "report.css"

# ---------------------------------------------------------------- what the logged numbers mean

METRICS = {  # {names: (formula, healthy, what failure looks like)}: the table of README, word for word
    ("loss",): (
        "the sum of the `loss_*` terms, exactly what is optimised",
        "falls below its start, slowly",
        "flat at its first value: nothing is learned",
    ),
    ("loss_dino_local", "loss_dino_global"): (
        "cross-entropy between crops, over all 2 + 2L pairs",
        "together below ln K",
        "at ln K: uniform; at 0: one prototype for all",
    ),
    ("loss_ibot",): (
        "the same for masked patches, averaged over all global crops",
        "below p ln K, p the share of masked crops",
        "stuck there",
    ),
    ("loss_koleo",): (
        "−log distance to the nearest neighbour, both global crops summed",
        "small, or below 0",
        "above 1: features coincide",
    ),
    ("entropy", "H"): (
        "mean entropy of a target / ln K",
        "between 0.2 and 0.9",
        "0: one-hot; 1: uniform",
    ),
    ("entropy_mean", "Hm"): (
        "entropy of the batch's mean target / ln K",
        "above `entropy`, near 1 if the batch is larger than K",
        "near 0: one prototype for everything",
    ),
    ("kl",): (
        "student's cross-entropy less the target's entropy, in nats",
        "falls, stays above 0",
        "0 with `entropy` at 1: nothing to learn from",
    ),
    ("rank",): (
        "exp(entropy of the normalised singular values) of the [CLS] features",
        "grows",
        "falls to a handful of directions",
    ),
    ("grad_backbone", "grad_dino_head", "grad_ibot_head"): (
        "gradient norm before clipping",
        "around `optim.clip_grad` or below",
        "grows without end: lower `optim.base_lr`",
    ),
    ("knn_top1",): (
        "k-NN accuracy of the teacher",
        "rises above pixels and random init",
        "at chance",
    ),
    ("skipped", "skipped_samples"): (
        "1 if a step was skipped because its loss or gradient was not finite; "
        "its first and last sample number",
        "0",
        "1 several times in a row",
    ),
    ("warning",): (
        "the message printed once the teacher has collapsed",
        "absent",
        "its text",
    ),
    ("peak_memory_gb",): (
        "largest GPU memory so far, in GiB",
        "below the card's",
        "out of memory: smaller `train.batch_size_per_gpu`, more `train.accumulate`",
    ),
    ("images_per_second",): (
        "images (not crops) trained per second, data included",
        "steady",
        "falls: the workers do not keep up",
    ),
    ("checkpoint_seconds",): (
        "for how long the last save held up training",
        "seconds; the disk is written beside the next steps",
        "a large part of `train.checkpoint_minutes`: raise that",
    ),
}
CHAPTERS = {  # of the page; whatever else is logged comes after them
    "The metric and the loss": "knn_top1 loss loss_dino_local loss_dino_global loss_ibot loss_koleo",
    "Collapse diagnostics": "entropy entropy_mean kl rank",
    "Steps": "grad_backbone grad_dino_head grad_ibot_head skipped images_per_second peak_memory_gb "
    "checkpoint_seconds",
    "Schedules": "lr last_layer_lr backbone_lr weight_decay momentum teacher_temp",
}
UNIFORM_LOSS = "Dashed: ln K × weight × {}, the loss of a student that knows nothing."
NOTES = {  # added to the sentences of METRICS
    "knn_top1": "A finished run's last point is its result, on all images.",
    "loss": "Dashed: the loss of a student that knows nothing, without KoLeo.",
    "loss_dino_local": UNIFORM_LOSS.format("L / (L + 1), the share of these pairs"),
    "loss_dino_global": UNIFORM_LOSS.format("1 / (L + 1), the share of these pairs"),
    "loss_ibot": UNIFORM_LOSS.format("p"),
    "loss_koleo": "Times its weight. Dashed: nearest neighbours at distance 1, of at most 2.",
    "kl": "No dashed line: that of ignorance, (1 − entropy) × ln K, moves with the entropy.",
    "images_per_second": "Mean since the start.",
    "lr": "Learning rate: linear warm-up, then a cosine to optim.min_lr.",
    "last_layer_lr": "Learning rate of the prototypes: 0 during optim.freeze_last_layer_epochs.",
    "backbone_lr": "Learning rate of the backbone: 0 during optim.freeze_backbone_epochs.",
    "weight_decay": "A cosine to optim.weight_decay_end.",
    "momentum": "Share of its own weights that the teacher keeps at each step.",
    "teacher_temp": "The lower, the sharper the targets.",
}


def describe_metric(metric):
    """-> the plain text below a plot, from METRICS and NOTES; "" for a metric that neither knows."""
    sentences = []
    for names, (formula, healthy, failure) in METRICS.items():
        if metric in names:
            if not formula.startswith(("k-NN", "exp(")):
                formula = formula[0].upper() + formula[1:]
            sentences.append(f"{formula}. Healthy: {healthy}. Failure: {failure}.".replace("`", ""))
    if metric in NOTES:
        sentences.append(NOTES[metric])
    return " ".join(sentences)


# ---------------------------------------------------------------- what a run has left


class RunRecord(NamedTuple):
    """What a run folder holds, as far as the run got."""

    folder: Path
    name: str
    color: str  # as CSS writes it
    cfg: config.Config
    curves: dict  # {metric: [(step, value, or None where it was not finite)]}
    warnings: list  # "step 60: sentence"
    result: dict  # of result.json, or what is known of it by now
    environment: dict  # of environment.json


def read_run(folder, name, color):
    """A run folder -> RunRecord. Raises UserError if it is not a run's, or is one of another version."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder, it has no config.yaml: name one that train.py wrote")
    try:
        cfg = config.load(folder / "config.yaml")
        final = read_json(folder / "result.json")
        environment = read_json(folder / "environment.json")
        if "steps" in final:
            final["steps"] = convert(Whole, final["steps"])
    except (OSError, UserError, ValueError) as e:
        files = "config.yaml, result.json or environment.json"
        raise UserError(f"{files} of {folder} cannot be used: {e}") from None
    rows, torn = read_jsonl(folder / "metrics.jsonl")
    last_step = rows[-1]["step"] if rows else 0
    last_step = final.get("steps", last_step)
    bad_images = sum(len(read_jsonl(file)[0]) for file in folder.glob("bad_images_rank*.jsonl"))
    result = {"state": "finished" if final else "not finished: no result.json yet"} | final
    result["steps"] = f"{last_step} of {total_steps(cfg)}"
    result["bad_images"] = final.get("bad_images", bad_images)
    result["skipped_steps"] = sum("skipped_samples" in row for row in rows)
    if torn:
        result["torn_lines"] = f"{torn} of metrics.jsonl left out"
    if "knn_top1" in final:
        rows.append({"step": last_step, "knn_top1": final["knn_top1"]})
    warnings = [f"step {row['step']}: {row['warning']}" for row in rows if "warning" in row]
    return RunRecord(folder, name, color, cfg, metric_curves(rows), warnings, result, environment)


def read_json(file):
    """-> the object in a JSON file, {} if there is no file. ValueError for anything else in it."""
    value = parse_json(file.read_bytes()) if file.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds a {type(value).__name__}, not named values")
    return value


def read_jsonl(file):
    """-> the lines of a .jsonl file that are dicts of a step, and the number of others. No file: no lines."""
    rows = []
    torn = 0
    if file.is_file():
        for line in file.read_bytes().splitlines():
            try:
                row = {"step": 0, **parse_json(line)}
                row["step"] = convert(Whole, row["step"])
                rows.append(row)
            except (ValueError, TypeError):
                torn += 1
    return rows, torn


def metric_curves(rows):
    """Rows of metrics.jsonl -> {metric: [(step, value or None)]} of the metrics that have a number at all."""
    curves = {}
    for row in rows:
        if "skipped_samples" in row:
            row = row | {"skipped": 1}
        for metric, value in row.items():
            if metric != "step" and isinstance(value, (int, float, type(None))):
                curves.setdefault(metric, []).append((row["step"], plot_value(value)))
    return {metric: points for metric, points in curves.items() if known_values(points)}


# ---------------------------------------------------------------- plots


def metric_chapters(runs):
    """Yields the chapters of plots: every logged metric that has a number."""
    logged = set()
    last_step = 0
    for run in runs:
        logged |= set(run.curves)
        for points in run.curves.values():
            last_step = max(last_step, *[step for step, _ in points])
    if not logged:
        yield "<p>Nothing is logged yet.</p>"
    chapters = {title: metrics.split() for title, metrics in CHAPTERS.items()}
    others = logged - set(" ".join(CHAPTERS.values()).split())
    chapters["Also logged"] = sorted(others)
    for title, metrics in chapters.items():
        figures = []
        for metric in metrics:
            if metric in logged:
                caption = describe_metric(metric)
                figures.append(metric_figure(metric, caption, runs, last_step or 1))
        if figures:
            yield f'<h2>{title}</h2><div class="plots">{"".join(figures)}</div>'


# ---------------------------------------------------------------- pictures

MAX_BANK = 2000  # images among which the neighbours of neighbours.png are sought
NEIGHBOURS_HEADING = """<h2>Nearest neighbours</h2>
<p>The first evaluation image of each class, and the images whose [CLS] is nearest to its own: by the teacher,
and by the same network untrained. Green: of its class. Red: of another.</p>"""
TRANSFER_SETS = ("--train", "scenes:600:seed=20", "--test", "scenes:5:seed=21")
TRANSFER_HEADING = """<h2>Label transfer</h2>
<p>Each patch takes the class of the most similar patch of 600 other scenes: by the teacher's patch tokens, by
raw pixels, and by the tokens of the same network untrained. A colour is a class, grey the background.</p>"""
PICTURES_HEADING = """<h2>Patch tokens through training</h2>
<p>The teacher of each checkpoint. Colours: the first three principal components of the patch tokens, each
strip on its own. Attention: from dark blue (none) to yellow (most). The components of an untrained network
are little more than the colours of the image; those of a trained one follow its patterns, patch by patch. So
the tidier strip is not the better one.</p>"""


def check_teacher(run):
    """Raise UserError if the run has saved no teacher yet."""
    if not (run.folder / "teacher.pth").exists():
        raise UserError("nothing is saved yet: train.checkpoint_every and train.keep_last say what is")


def evaluation_images(run, count):
    """`count` evaluation images, uint8 (n, 3, 2 S, 2 S). UserError if there are none, or no saved teacher."""
    evaluation = run.cfg.evaluation
    if not evaluation.test_path:
        raise UserError("there are no evaluation images: evaluation.test_path names some")
    check_teacher(run)
    size = config.evaluation_size(run.cfg)
    images = open_source(evaluation.test_path, Reading.from_config(run.cfg.data))
    return large_sample(images, size, evaluation.resize_size or size, count)


def draw_neighbours(run):
    """Evaluation images and their nearest ones, by the teacher and the same network untrained -> PIL image.

    Among at most MAX_BANK labelled images. Raises UserError if the run has none, or no saved teacher.
    """
    check_teacher(run)
    teacher, cfg = open_backbone(run.folder)
    bank, queries = open_eval_sets(cfg, MAX_BANK)
    untrained = untrained_copy(teacher, cfg, cfg.train.seed)
    return compare_networks({"after training": teacher, "untrained": untrained}, bank, queries)


def draw_transfer_sheet(run):
    """What the patches of a few scenes take as their classes: `evals.transfer.draw_transfer` -> PIL image.

    Raises UserError if the run has saved no teacher.
    """
    check_teacher(run)
    teacher, cfg = open_backbone(run.folder)
    settings = transfer.make_parser().parse_args(TRANSFER_SETS)
    settings.size = config.evaluation_size(cfg)
    settings.names = class_names(settings)
    results, _ = transfer.compare(teacher, cfg, settings)
    return transfer.draw_transfer(results, settings)


def write_picture(run, name, draw, description):
    """RUN/NAME.png, drawn by `draw(run)` -> its text in the page. Prints that it is there, or why not."""
    path = run.folder / f"{name}.png"
    try:
        sheet = draw(run)
        with atomic_open(path) as f:
            sheet.save(f, "PNG")
    except (UserError, OSError) as e:
        print(f"no {path}: {e}")
        return f"<p>{legend_item(run)}No {name}: {html.escape(str(e))}.</p>"
    print(f"wrote {path}")
    url = image_url(sheet, "png")
    picture = f'<img alt="{description}" width="{sheet.width}" height="{sheet.height}" src="{url}">'
    return f'<p>{legend_item(run)}</p><div class="wide" tabindex="0">{picture}</div>'


def comparison_chapters(runs):
    """Yield the HTML of the pictures that compare a teacher with its untrained network, and write them."""
    yield NEIGHBOURS_HEADING
    text = "images and their nearest neighbours, after training and untrained"
    for run in runs:
        yield write_picture(run, "neighbours", draw_neighbours, text)
    on_scenes = [run for run in runs if run.cfg.evaluation.test_path.startswith("scenes")]
    if on_scenes:  # other images have no masks
        yield TRANSFER_HEADING
    text = "scenes, the true classes of their patches, and those of the most similar patches"
    for run in on_scenes:
        yield write_picture(run, "transfer", draw_transfer_sheet, text)


def image_url(image, kind):
    """A PIL image as a URL that holds it; kind: "jpeg" or "png"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_strip(tiles, kind, text):
    """PIL images in a row, inside the page; kind: "jpeg" or "png"."""
    images = ""
    for tile in tiles:
        images += f'<img alt="" width="160" height="160" src="{image_url(tile, kind)}">'
    strip = f'<div class="strip" role="img" aria-label="{text}">{images}</div>'
    return f"<figure>{strip}<figcaption>{text}</figcaption></figure>"


def teacher_strips(run, count):
    """Evaluation images as the teacher of each checkpoint sees them; or why there is nothing to show."""
    try:
        images = evaluation_images(run, count)
        strips = image_strip([image_tile(image) for image in images], "jpeg", "evaluation images")
        backbone, _ = open_backbone(run.folder)
        for title, teacher in teachers_through_training(run.folder, backbone, run.cfg):
            maps = []
            for image in images:
                cls_attention = patch_attention(teacher, image)[:, 0].mean(0)  # (h, w)
                maps.append(attention_tile(cls_attention, image))
            strips += image_strip(pca_row(teacher, images), "png", f"{title}: principal components")
            strips += image_strip(maps, "jpeg", f"{title}: attention of [CLS], mean of its heads")
    except (UserError, OSError) as e:  # OSError: a run still going deletes its old checkpoints
        return f"<p>{legend_item(run)}No pictures: {html.escape(str(e))}.</p>"
    return f'<p>{legend_item(run)}</p><div class="strips">{strips}</div>'


# ---------------------------------------------------------------- the page


def html_table(runs, columns, only_differing=False):
    """A dict for each run -> a table with a row for each key, or only for those whose values differ."""
    body = "<tr><th>" + "".join(f"<th>{legend_item(run)}" for run in runs)
    keys = {}
    for column in sorted(columns, key=len, reverse=True):
        keys |= dict.fromkeys(column)
    for key in keys:
        row = [column.get(key, "-") for column in columns]
        if only_differing and all(value == row[0] for value in row):
            continue
        name = re.sub(r"[._]", r"\g<0><wbr>", html.escape(key))
        cells = "".join(f"<td>{html.escape(format_value(value))}" for value in row)
        body += f"<tr><td>{name}{cells}"
    return f'<div class="wide" tabindex="0"><table>{body}</table></div>'


def format_value(value):
    """Any value as text; for a text of several lines, only how many there are."""
    if isinstance(value, (list, tuple)):
        value = shlex.join(map(str, value))
    if value is None or value == "":
        return "none"
    if isinstance(value, float):
        return format_number(value, 6)
    text = str(value)
    return f"{len(text.splitlines())} lines" if "\n" in text else text


def all_settings(cfg):
    """-> {"section.key": value}"""
    flat = {}
    for section, settings in vars(cfg).items():
        for key, value in vars(settings).items():
            flat[f"{section}.{key}"] = value
    return flat


def render_report(runs, count):
    """The HTML of the page, with `count` evaluation images for each run."""
    title = html.escape(f"Report: {', '.join(run.name for run in runs)}")
    style = STYLESHEET.read_text(encoding="utf-8")
    parts = ["<!doctype html><html lang=en><meta charset=utf-8>",
             "<meta name=viewport content='width=device-width, initial-scale=1'>",
             f"<title>{title}</title><style>{style}</style><h1>{title}</h1>"]  # fmt: skip
    for run in runs:
        for warning in run.warnings:
            parts.append(f'<p class="warning" role="alert">{legend_item(run)}{html.escape(warning)}</p>')
    parts.append(html_table(runs, [run.result for run in runs]))
    if count:
        parts += comparison_chapters(runs)
    parts += metric_chapters(runs)
    if count:
        parts += [PICTURES_HEADING, *[teacher_strips(run, count) for run in runs]]
    if len(runs) > 1:
        settings = [all_settings(run.cfg) for run in runs]
        parts += ["<h2>Settings that differ</h2>", html_table(runs, settings, only_differing=True)]
    parts += ["<h2>Where and with what</h2>", html_table(runs, [run.environment for run in runs])]
    return "\n".join(parts)


def open_runs(folders):
    """Run folders -> RunRecords, named after their folders, or by their paths where these are equal."""
    names = [folder.resolve().name for folder in folders]
    runs = []
    for i, folder in enumerate(folders):
        name = names[i] if names.count(names[i]) == 1 else str(folder)
        runs.append(read_run(folder, name, f"var(--c{i})"))
    return runs


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.report", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help=f"run folders, {MAX_RUNS} at most")
    add("--out", type=Path, help="the page (default: report.html in the first run's folder)")
    add("--images", type=argument(Whole), default=4,
        help="how many evaluation images are drawn; 0: no pictures")  # fmt: skip
    args = parser.parse_args()
    if len(args.runs) > MAX_RUNS:
        raise UserError(f"{len(args.runs)} runs cannot be told apart in one plot: name {MAX_RUNS} at most")
    runs = open_runs(args.runs)
    out = args.out or args.runs[0] / "report.html"
    if out.suffix != ".html":
        raise UserError(f"--out {out}: it must end in .html")
    page = render_report(runs, args.images).encode(errors="backslashreplace")  # names need not be Unicode
    try:
        with atomic_open(out) as f:
            f.write(page)
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e}): name another --out") from None
    print(f"wrote {out}: {page.count(b'<svg')} plots, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    config.run(main)
