"""One logged metric of one or several runs, as an SVG plot in an HTML <figure>.

Used by tools/report.py, whose RunRecord has all that is read here: name, color, cfg, curves and result.
Dashed reference lines lie where the settings and results of a run put them: at the loss of a student that
knows nothing, at the limit of clipping, at the baselines of k-NN.
"""

import html
import math
from operator import itemgetter

from evals.plot import Axis, round_ticks

SHARES = {"knn": "share right", "entropy": "share of ln K", "skipped": "1 = skipped"}  # axes from 0 to 1
UNITS = SHARES | {  # by the beginnings of names
    "loss": "nats", "kl": "nats", "rank": "directions", "grad": "norm", "images_per": "images/s",
    "peak": "GiB", "lr": "per step", "last_layer": "per step", "backbone": "per step",
    "weight_decay": "per unit of lr", "momentum": "share kept", "teacher_temp": "temperature"}  # fmt: skip
SVG_WIDTH = 360  # of a plot, in units of its viewBox, like all that follows
SVG_HEIGHT = 212
AXES_LEFT = 60  # the four edges of the axes
AXES_RIGHT = 336
AXES_TOP = 24
AXES_BOTTOM = 174
LABEL_HEIGHT = 15
MAX_STRETCHES = 300  # that a long curve is cut into; each keeps its lowest and its highest value
FEW_POINTS = 12  # a curve of at most so many points shows a dot for each


def unit_of(metric):
    """The unit of a metric, or "" for one that is not known."""
    for beginning, unit in UNITS.items():
        if metric.startswith(beginning):
            return unit
    return ""


def plot_value(value):
    """A logged number as it is drawn; None where it is not finite, or too large for round ticks above it."""
    if type(value) not in (int, float) or not abs(value) < 1e100:  # true for NaN
        return None
    return value if abs(value) > 1e-100 else 0


def known_values(points):
    """[(step, value or None)] -> the values."""
    return [value for _, value in points if value is not None]


# ---------------------------------------------------------------- dashed lines


def uniform_losses(cfg):
    """The losses of a student that knows nothing -> {metric: {number of prototypes k: factor of ln k}}.

    It answers uniformly, which costs ln K whatever the target: times the weight of the term; for DINO times
    its share of the 2 L + 2 pairs; for iBOT times the share p of masked crops, since the others count as 0.
    """
    L = cfg.crops.local_crops_number
    K = cfg.dino.head_n_prototypes
    patch_K = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else K
    losses = {
        "loss_dino_local": {K: cfg.dino.loss_weight * L / (L + 1)},
        "loss_dino_global": {K: cfg.dino.loss_weight / (L + 1)},
        "loss_ibot": {patch_K: cfg.ibot.loss_weight * cfg.ibot.mask_sample_probability},
    }
    total = {}
    for k in (K, patch_K):
        total[k] = sum(factors.get(k, 0) for factors in losses.values())
    return losses | {"loss": total}


def reference_lines(run):
    """-> {metric: [(value, label)]}: dashed lines, where this run's settings and results put them."""
    lines = {"loss_koleo": [(0.0, "distance 1")]}
    for metric, factors in uniform_losses(run.cfg).items():
        terms = [f"{factor:.3g} × ln {k:,}" for k, factor in factors.items() if factor]
        value = sum(factor * math.log(k) for k, factor in factors.items())
        lines[metric] = [(value, " + ".join(terms))] if terms else []
    if run.cfg.optim.clip_grad:
        for metric in run.curves:
            if metric.startswith("grad_"):
                lines[metric] = [(run.cfg.optim.clip_grad, "clipped above")]
    floors = {"knn_pixels": "raw pixels", "knn_random_init": "random init", "chance": "chance"}
    known = {floor: plot_value(run.result.get(key)) for key, floor in floors.items()}
    lines["knn_top1"] = [(value, floor) for floor, value in known.items() if value is not None]
    lines["entropy"] = [(0.9, "healthy below 0.9"), (0.2, "healthy above 0.2")]
    return lines


# ---------------------------------------------------------------- parts of a plot


def format_number(x, digits=4):
    return f"{x:,.0f}" if 1e4 <= abs(x) < 1e6 else f"{x:.{digits}g}"


def value_ticks(values, share):
    """Ticks of the vertical axis: 0 to 1 for shares; with 0 where it is not far."""
    low = min(values)
    high = max(values)
    if share:
        low = min(low, 0)
        high = max(high, 1)
    if high - low <= 1e-9 * abs(high):  # constant
        low = min(low, 0)
        high = high if high > 0 else 1
    if 0 < low < high / 2:
        low = 0
    return round_ticks(low, high)


def downsample(points):
    """Keep the lowest and the highest value of each stretch of a long curve, so that its spikes stay."""
    length = len(points) // MAX_STRETCHES
    if length < 3:
        return points
    kept = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        known = [point for point in stretch if point[1] is not None]
        if known:
            extremes = {min(known, key=itemgetter(1)), max(known, key=itemgetter(1))}
            kept += sorted(extremes)
        else:
            kept.append(stretch[0])  # so that the curve is broken here
    return kept


def spread_labels(wanted):
    """Heights of labels -> the nearest ones inside the axes at which no label touches another."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = list(wanted)
    free = AXES_TOP + 11  # from here down
    for i in order:
        placed[i] = max(placed[i], free)
        free = placed[i] + LABEL_HEIGHT
    free = AXES_BOTTOM - 3  # from here up
    for i in reversed(order):
        placed[i] = min(placed[i], free)
        free = placed[i] - LABEL_HEIGHT
    return placed


def svg_text(x, y, text, anchor, kind="tick"):
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def svg_axes(x, y, unit, steps, values):
    """Ticks and units; `steps` and `values` are the ticks of the Axis x and the Axis y."""
    parts = [svg_text(0, 12, unit, "start"), svg_text(AXES_RIGHT, SVG_HEIGHT - 4, "step", "end")]
    for value in values:
        parts.append(f'<path d="M{AXES_LEFT} {y(value):.1f}H{AXES_RIGHT}"/>')
        parts.append(svg_text(AXES_LEFT - 6, y(value) + 4, format_number(value, 6), "end"))
    for step in steps:
        parts.append(svg_text(x(step), AXES_BOTTOM + 18, format_number(step, 6), "middle"))
    return parts


def svg_curve(points, x, y, color):
    """Broken where nothing is known; a dot for a point alone, and for each where they are few."""
    line = ""
    dots = ""
    values = [None, *[value for _, value in points], None]
    for (step, value), before, after in zip(points, values, values[2:]):
        if value is None:
            continue
        place = f"{x(step):.1f} {y(value):.1f}"
        line += ("M" if before is None else "L") + place
        if len(points) <= FEW_POINTS or (before is None and after is None):
            dots += f"M{place}h0"
    style = f'style="stroke:{color}"'
    return f'<path class="curve" d="{line}" {style}/><path class="dots" d="{dots}" {style}/>'


def svg_reference_lines(colors, y, several):
    """{(value, label): colours of its runs} -> dashed lines as SVG, {label: height}.

    Where there are `several` runs, a line that belongs to one of them has its colour.
    """
    parts = []
    labels = {}
    for (value, label), own in colors.items():
        style = f' style="stroke:{own[0]}"' if several and len(own) == 1 else ""
        parts.append(f'<path class="mark" d="M{AXES_LEFT} {y(value):.2f}H{AXES_RIGHT}"{style}/>')
        labels[label] = y(value) - 4
    return parts, labels


def legend_item(run, text=""):
    return f'<span class="run"><i style="background:{run.color}"></i>{html.escape(run.name)} {text}</span> '


def metric_figure(metric, caption, runs, last_step):
    """One metric of all runs that have it, over the steps from 0 to last_step -> a <figure>."""
    runs = [run for run in runs if metric in run.curves]
    curves = [downsample(run.curves[metric]) for run in runs]
    references = {}  # {(value, label): colours of its runs}
    for run in runs:
        for line in reference_lines(run).get(metric, ()):
            references.setdefault(line, []).append(run.color)
    values = [value for value, _ in references]
    for points in curves:
        values += known_values(points)
    unit = unit_of(metric)
    ticks = value_ticks(values, unit in SHARES.values())
    steps = [step for step in round_ticks(0, last_step) if step <= last_step and round(step, 6) % 1 == 0]
    x = Axis(0, last_step, AXES_LEFT, AXES_RIGHT)
    y = Axis(ticks[0], ticks[-1], AXES_BOTTOM, AXES_TOP)
    lines, labels = svg_reference_lines(references, y, several=len(runs) > 1)
    parts = svg_axes(x, y, unit, steps, ticks) + lines
    for run, points in zip(runs, curves):
        parts.append(svg_curve(points, x, y, run.color))
    for label, height in zip(labels, spread_labels(list(labels.values()))):
        parts.append(svg_text(AXES_RIGHT, height, label, "end", "label"))
    last_values = [format_number(known_values(run.curves[metric])[-1]) for run in runs]
    spoken = ", ".join(f"{run.name} {value}" for run, value in zip(runs, last_values))
    title = html.escape(f"{metric}, {unit}, by step; last: {spoken}")
    svg = (
        f'<svg role="img" aria-label="{title}" viewBox="0 0 {SVG_WIDTH} {SVG_HEIGHT}">{"".join(parts)}</svg>'
    )
    legend = "".join(legend_item(run, value) for run, value in zip(runs, last_values))
    caption = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f"<figure><h3>{html.escape(metric)}</h3>{legend}{svg}{caption}</figure>"
