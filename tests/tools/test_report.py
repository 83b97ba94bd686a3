"""The report: every logged metric drawn to scale, dashed lines, pictures, bad input, a real browser."""

import base64
import io
import json
import math
import os
import random
import re
import sys
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import config
import train
from config import UserError
from data import sample_masks
from eval_knn import open_eval_sets
from evals import transfer
from evals.neighbours import compare_networks
from evals.plot import round_ticks
from evals.visualize import large_sample, pca_row
from features import open_backbone, untrained_copy
from losses import collapse_warning
from scenes import CLASSES, Scenes
from tools import metric_plots, report
from tools.metric_plots import AXES_BOTTOM, AXES_LEFT, AXES_RIGHT, AXES_TOP
from train import Logits

LOGGED = [
    *("loss_dino_local", "loss_dino_global", "loss_ibot", "loss_koleo", "loss", "grad_backbone"),
    *("grad_dino_head", "skipped", "entropy", "entropy_mean", "kl", "rank", "lr", "last_layer_lr"),
    *("backbone_lr", "weight_decay", "momentum", "teacher_temp", "images_per_second"),
]
FEW_SCENES = ["--train", "scenes:6:seed=20", "--test", "scenes:3:seed=21"]
RESULT = dict(knn_top1=0.8, knn_random_init=0.2, knn_pixels=0.25, chance=0.1, steps=60, bad_images=3)


def make_run(path, rows=None, result=None, overrides=()):
    """A run folder of the laptop's settings with made-up numbers: each metric goes from 1 down to 0.5."""
    if rows is None:
        rows = [dict(step=step, **dict.fromkeys(LOGGED, 1 - step / 120)) for step in range(10, 61, 10)]
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.load(model="laptop", overrides=overrides).to_yaml())
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "environment.json").write_text(json.dumps(dict(torch="2.13.0", git_diff="a\nb\n")))
    if result:
        (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def make(monkeypatch, tmp_path, capsys):
    """Run the command -> the text of the page."""

    def make(*runs, images=0):
        out = tmp_path / "page.html"
        argv = ["report.py", *map(str, runs), "--out", str(out), "--images", str(images)]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(report, "TRANSFER_SETS", FEW_SCENES)
        report.main()
        assert f"wrote {out}: " in capsys.readouterr().out
        return out.read_text()

    return make


def figures(page):
    """{metric: the text of its <figure>}"""
    found = {}
    for figure in re.findall("<figure>.*?</figure>", page):
        if "<svg" in figure:
            found[re.search("<h3>(.*?)</h3>", figure)[1]] = figure
    return found


def texts(figure, kind="tick"):
    """[(x, y, text)] of the words of a plot."""
    found = re.findall(rf'<text class="{kind}" x="(.*?)" y="(.*?)" .*?>(.*?)</text>', figure)
    return [(float(x), float(y), text) for x, y, text in found]


def value_scale(figure):
    """A function from heights in a plot to values, read off the numbers at its vertical axis."""
    ticks = [(y - 4, float(text.replace(",", ""))) for x, y, text in texts(figure) if x == AXES_LEFT - 6]
    first_y, first_value = ticks[0]
    last_y, last_value = ticks[-1]
    unit = (last_value - first_value) / (last_y - first_y)
    return lambda y: first_value + unit * (y - first_y)


def dashed_lines(figure):
    """[(value, style)]"""
    to_value = value_scale(figure)
    lines = re.findall(r'class="mark" d="M[\d.]+ ([\d.]+)H[\d.]+"(.*?)/>', figure)
    return [(to_value(float(y)), style) for y, style in lines]


def curves(figure):
    """{colour: [(x, y)]}"""
    found = {}
    for path, color in re.findall(r'class="curve" d="(.*?)" style="stroke:(.*?)"', figure):
        points = re.findall(r"[ML]([^ML]+)", path)
        found[color] = [tuple(map(float, point.split())) for point in points]
    return found


# ---- what is drawn


def test_every_logged_metric_has_a_plot_with_axes_and_a_sentence(make, tmp_path):
    rows = [dict(step=step, **dict.fromkeys(LOGGED, 0.5), news=step, empty=None) for step in (1, 10, 20)]
    drawn = figures(make(make_run(tmp_path / "run", rows)))
    assert set(drawn) == {*LOGGED, "news"}
    for metric, figure in drawn.items():
        words = [text for *_, text in texts(figure)]
        assert "step" in words and "20" in words
        assert words.count("0") >= 1
        assert f'role="img" aria-label="{metric}' in figure
        caption = re.search("<figcaption>(.*?)</figcaption>", figure)[1]
        if metric != "news":
            assert len(caption) > 20 and "`" not in caption
            units = [unit for start, unit in metric_plots.UNITS.items() if metric.startswith(start)]
            assert words[0] == units[0]
    assert "Healthy: between 0.2 and 0.9" in drawn["entropy"]  # README's own words


def test_curves_are_to_scale(make, tmp_path):
    figure = figures(make(make_run(tmp_path / "run")))["kl"]
    points = curves(figure)["var(--c0)"]
    to_value = value_scale(figure)
    steps = [(x - AXES_LEFT) / (AXES_RIGHT - AXES_LEFT) * 60 for x, _ in points]
    values = [to_value(y) for _, y in points]
    assert steps == pytest.approx([10, 20, 30, 40, 50, 60], abs=0.02)
    assert values == pytest.approx([1 - step / 120 for step in steps], abs=0.002)


OVERRIDES = [
    (),
    ("crops.local_crops_number=0", "dino.loss_weight=0.5"),
    ("ibot.separate_head=true", "ibot.head_n_prototypes=128", "ibot.loss_weight=2"),
    ("ibot.mask_sample_probability=0", "ibot.separate_head=true"),
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_dashed_lines_are_the_loss_of_a_student_that_knows_nothing(overrides, make, tmp_path):
    """The losses of train.py themselves, of a student whose logits are all 0, against any targets."""
    cfg = config.load(model="laptop", overrides=[*overrides, "train.batch_size_per_gpu=8"])
    B = 8
    L = cfg.crops.local_crops_number
    K = cfg.dino.head_n_prototypes
    patch_K = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else K
    masks = sample_masks(cfg, 0, range(2 * B), 2 * B)
    M = len(masks["mask_indices"])
    features = torch.randn(2, B, 4)
    local_logits = torch.zeros(L, B, K) if L else None
    student = Logits(torch.zeros(2, B, K), local_logits, torch.zeros(M, patch_K), features)
    cls_targets = torch.rand(2, B, K).softmax(-1)
    patch_targets = torch.rand(M, patch_K).softmax(-1)
    targets = Logits(cls_targets, None, patch_targets, features)
    batch = dict(masks, globals=torch.zeros(2 * B, 1))
    expected = {}
    for metric, value in train.compute_losses(student, targets, batch, cfg).items():
        if metric != "loss_koleo" and value:
            expected[metric] = value.item()
    expected["loss"] = sum(expected.values())
    drawn = figures(make(make_run(tmp_path / "run", overrides=overrides)))
    for metric, value in expected.items():
        lines = dashed_lines(drawn[metric])
        height = lines[0][0] if lines else 0
        assert height == pytest.approx(value, abs=0.01), metric


def test_baselines_and_the_result_are_in_the_plot_of_knn(make, tmp_path):
    rows = [dict(step=20, loss=1.0), dict(step=20, knn_top1=0.5)]
    figure = figures(make(make_run(tmp_path / "run", rows, RESULT)))["knn_top1"]
    assert [value for value, _ in dashed_lines(figure)] == pytest.approx([0.25, 0.2, 0.1], abs=0.001)
    assert {text for *_, text in texts(figure, "label")} == {"raw pixels", "random init", "chance"}
    (x0, y0), (x1, y1) = curves(figure)["var(--c0)"]
    to_value = value_scale(figure)
    assert (to_value(y0), to_value(y1)) == pytest.approx((0.5, 0.8), abs=0.001)
    assert x1 == AXES_RIGHT
    assert x1 - x0 == pytest.approx((AXES_RIGHT - AXES_LEFT) * 40 / 60, abs=0.1)


def test_clipping_is_marked_where_there_is_any(make, tmp_path):
    drawn = figures(make(make_run(tmp_path / "a")))
    assert dashed_lines(drawn["grad_backbone"])[0][0] == pytest.approx(3, abs=0.02)
    drawn = figures(make(make_run(tmp_path / "b", overrides=["optim.clip_grad=0"])))
    assert not dashed_lines(drawn["grad_backbone"])
    assert len(dashed_lines(drawn["loss_koleo"])) == 1


def test_runs_of_other_length_and_K_share_a_plot(make, tmp_path):
    a = make_run(tmp_path / "a")
    rows = [dict(step=step, loss_ibot=2.0) for step in (10, 120)]
    b = make_run(tmp_path / "b", rows, overrides=["dino.head_n_prototypes=512", "optim.epochs=6"])
    page = make(a, b)
    drawn = figures(page)
    both = curves(drawn["loss_ibot"])
    assert both["var(--c0)"][-1][0] == (AXES_LEFT + AXES_RIGHT) / 2
    assert both["var(--c1)"][-1][0] == AXES_RIGHT
    (value_a, style_a), (value_b, style_b) = dashed_lines(drawn["loss_ibot"])
    assert (value_a, value_b) == pytest.approx((math.log(256) / 2, math.log(512) / 2), abs=0.01)
    assert "--c0" in style_a and "--c1" not in style_a
    assert "--c1" in style_b and "--c0" not in style_b
    assert "b 2<" not in drawn["loss"]
    assert 'style="stroke' not in drawn["loss"].split("mark")[1].split("/>")[0]
    for run in ("a", "b"):
        assert f"</i>{run} " in drawn["loss_ibot"]
    settings = page.split("Settings that differ")[1].split("<h2>")[0]
    changed = {}
    for key, *values in re.findall(r"<tr><td>(.*?)<td>(.*?)<td>(.*?)(?=<tr>|</table>)", settings):
        changed[key.replace("<wbr>", "")] = values
    assert changed == {"dino.head_n_prototypes": ["256", "512"], "optim.epochs": ["5", "6"]}


def test_equal_names_are_told_apart(make, tmp_path):
    a = make_run(tmp_path / "x" / "run")
    b = make_run(tmp_path / "y" / "run")
    page = make(a, b)
    assert f"</i>{a} " in page
    assert f"</i>{b} " in page


def test_results_warnings_and_faults_are_on_top(make, tmp_path):
    sentence = collapse_warning(1.0, 1.0) + " <b>"
    rows = [
        dict(step=1, loss=1.0),
        dict(step=1, warning=sentence),
        dict(step=2, skipped_samples=[64, 127]),
        dict(step=60, loss=2.0, skipped=0.0),
    ]
    page = make(make_run(tmp_path / "run", rows, RESULT))
    top = page.split("<h2>")[0].replace("<wbr>", "")
    assert 'role="alert"' in top
    assert "step 1: collapsed to uniform" in top
    assert "&lt;b&gt;" in top
    for key, value in dict(RESULT, state="finished", steps="60 of 640", skipped_steps=1).items():
        assert f"<td>{key}<td>{value}" in top
    skipped = figures(page)["skipped"]
    to_value = value_scale(skipped)
    assert [round(to_value(y), 2) for _, y in curves(skipped)["var(--c0)"]] == [1, 0]
    assert "<td>git_<wbr>diff<td>2 lines" in page


# ---- runs that are not as they should be


def test_a_run_still_going_with_a_torn_line_and_numbers_that_are_none(make, tmp_path):
    values = [1.0, None, 3.0, math.nan, 2.0, 2.0]
    rows = [dict(step=step, loss=value) for step, value in enumerate(values, start=1)]
    run = make_run(tmp_path / "run", rows)
    with open(run / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 7, "loss": 9.0, "l\xc3')
    (run / "bad_images_rank0.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    page = make(run)
    curve, dots = re.findall(r'<path class="(?:curve|dots)" d="(.*?)"', figures(page)["loss"])
    assert re.sub(r"[^ML]", "", curve) == "MMML"
    assert dots.count("h0") == 4
    assert "not finished: no result.json yet" in page
    assert "6 of 640" in page
    assert "1 of metrics.jsonl left out" in page
    assert "images<td>2" in page


def test_one_row_and_none(make, tmp_path):
    drawn = figures(make(make_run(tmp_path / "one", [dict(step=1, loss=7.5, weight_decay=0.04, kl=0.0)])))
    assert set(drawn) == {"loss", "weight_decay", "kl"}
    for figure in drawn.values():
        assert 'class="dots" d="M' in figure
        assert [text for _, y, text in texts(figure) if y == AXES_BOTTOM + 18] == ["0", "1"]
    page = make(make_run(tmp_path / "none", []))
    assert "Nothing is logged yet." in page
    assert "<svg" not in page
    (tmp_path / "none" / "metrics.jsonl").unlink()
    assert "Nothing is logged yet." in make(tmp_path / "none")


def test_what_is_no_run_is_said(make, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "page.html"):
        with pytest.raises(UserError, match=f"{path} is not a run folder.*name one"):
            make(make_run(tmp_path / f"good-{path.stem}"), path)
    assert not (tmp_path / "page.html").exists()


def test_broken_files_are_named(make, tmp_path):
    for name, text in (("result.json", '{"steps": 1'), ("config.yaml", "optim: {speed_of_light: 1}")):
        run = make_run(tmp_path / name)
        (run / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}.* of {run} cannot be used"):
            make(run)


@pytest.mark.parametrize("name", ["result.json", "environment.json"])
@pytest.mark.parametrize("text", ["[1]", "3", "[" * 9999, '"text"', "null"], ids=lambda text: text[:9])
def test_a_json_file_of_another_shape_is_named(name, text, make, tmp_path):
    run = make_run(tmp_path / "run")
    (run / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}.* of {run} cannot be used"):
        make(run)


@pytest.mark.parametrize("steps", ["many", None, [], -1, 1e30])
def test_a_result_of_impossible_steps(steps, make, tmp_path):
    run = make_run(tmp_path / "run", result=RESULT | dict(steps=steps))
    with pytest.raises(UserError, match=f"result.json.* of {run} cannot be used"):
        make(run)


def test_lines_that_are_no_rows_are_counted(make, tmp_path):
    run = make_run(tmp_path / "run", [dict(step=1, loss=1.0)])
    lines = ["[1]", "3", "[" * 9999, '{"step": "x"}', '{"step": null, "loss": 9}', '{"step": NaN}',
             '{"step": 1e400}', '{"step": -1}', '{"step": true}', '{"step": 2, "loss": 2.0}']  # fmt: skip
    with open(run / "metrics.jsonl", "a") as f:
        f.write("\n".join(lines))
    page = make(run)
    assert "9 of metrics.jsonl left out" in page
    assert curves(figures(page)["loss"])["var(--c0)"][-1][0] == AXES_RIGHT  # step 2 is the last


EXTREMES = [1e308, -1e308, 1e-320, 5e-324, 10**400, math.inf, math.nan]


@pytest.mark.parametrize("value", EXTREMES, ids=range(len(EXTREMES)))
def test_numbers_that_no_axis_can_hold(value, make, tmp_path):
    """They are left out, or drawn at 0; the others are drawn to scale."""
    rows = [dict(step=1, loss=value, kl=value), dict(step=2, loss=1.0), dict(step=3, loss=3.0)]
    result = RESULT | dict(knn_top1=value, knn_pixels=value, chance="none", knn_random_init=[1])
    drawn = figures(make(make_run(tmp_path / "run", rows, result)))
    to_value = value_scale(drawn["loss"])
    points = curves(drawn["loss"])["var(--c0)"]
    assert [to_value(y) for _, y in points[-2:]] == pytest.approx([1, 3], abs=0.02)
    assert ("kl" in drawn) == (abs(value) < 1)


def test_a_run_whose_name_is_no_text(make, tmp_path):
    run = make_run(tmp_path / os.fsdecode(b"caf\xe9"))
    assert r"Report: caf\udce9" in make(run)


@pytest.mark.parametrize("words", [["--images", "-1"], ["--images", "many"]])
def test_a_number_of_images(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), *words])
    with pytest.raises(SystemExit):
        report.main()


def test_a_page_needs_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(make_run(tmp_path / "run")), "--out", ""])
    with pytest.raises(UserError, match="--out .: it must end in .html"):
        report.main()


def test_too_many_runs_and_a_page_that_cannot_be_written(make, tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="9 runs cannot be told apart.*8 at most"):
        make(*[run] * 9)
    (tmp_path / "page.html").mkdir()
    with pytest.raises(UserError, match="page.html cannot be written"):
        make(run)


# ---- the parts


def test_ticks_are_round_and_reach_around():
    draw = random.Random(0)
    for _ in range(500):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-6, 6)
        high = low + abs(low) * 10 ** draw.uniform(-5, 3)
        ticks = round_ticks(low, high)
        step = ticks[1] - ticks[0]
        assert ticks[0] <= low + 1e-5 * step
        assert ticks[-1] >= high - 1e-5 * step
        assert 4 <= len(ticks) <= 8
        rounded = f"{step:.0e}"
        assert float(rounded) == pytest.approx(step)
        assert rounded[0] in "125"
    assert metric_plots.value_ticks([0.04, 0.04], False)[::4] == pytest.approx([0, 0.04])
    assert metric_plots.value_ticks([0.0], False)[-1] == 1
    assert metric_plots.value_ticks([0.3], True)[-1] == 1


def test_labels_never_touch_and_stay_inside():
    draw = random.Random(1)
    for n in (1, 2, 5, 8):
        wanted = [draw.uniform(AXES_TOP - 9, AXES_BOTTOM) for _ in range(n)]
        placed = sorted(metric_plots.spread_labels(wanted))
        assert min(np.diff(placed), default=15) >= 14.99
        assert placed[0] >= AXES_TOP and placed[-1] <= AXES_BOTTOM
    assert metric_plots.spread_labels([50.0, 100.0]) == [50.0, 100.0]


def test_a_long_curve_keeps_its_spikes_and_little_else():
    points = [(i, 0.5 + 0.1 * (i % 3)) for i in range(50_000)]
    points[31_234] = (31_234, 99.0)
    points[100] = (100, None)
    kept = metric_plots.downsample(points)
    assert len(kept) < 700
    assert (31_234, 99.0) in kept
    assert kept == sorted(kept)
    assert kept[0][0] < 200 and kept[-1][0] > 49_800
    assert metric_plots.downsample(points[:899]) == points[:899]


def test_the_legend_has_the_last_value_of_a_long_curve(make, tmp_path):
    rows = [dict(step=step, loss=5.0 + step % 7) for step in range(1, 2001)]
    rows.append(dict(step=2001, loss=7.5))
    assert "</i>run 7.5<" in figures(make(make_run(tmp_path / "run", rows)))["loss"]


def luminance(color):
    """Relative luminance of a CSS color "#rrggbb", as WCAG defines it."""
    linear = []
    for i in (1, 3, 5):
        x = int(color[i : i + 2], 16) / 255
        linear.append(x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def css_colors(style):
    """{name: "#rrggbb"} of the variables in a style."""
    colors = {}
    for name, color in re.findall(r"--(\w+): (#\w+)", style):
        if len(color) == 4:
            color = "#" + "".join(2 * digit for digit in color[1:])
        colors[name] = color
    return colors


def test_colours_stand_out_in_light_and_dark(make, tmp_path):
    page = make(make_run(tmp_path / "run"))
    run_colors = [f"c{i}" for i in range(report.MAX_RUNS)]
    for style in page.split("@media")[:2]:  # light, dark
        colors = css_colors(style)
        least_contrast = {"ink": 7, "soft": 4.5} | dict.fromkeys(run_colors, 3)
        for name, least in least_contrast.items():
            darker, lighter = sorted([luminance(colors[name]), luminance(colors["paper"])])
            assert (lighter + 0.05) / (darker + 0.05) >= least, (name, colors[name])
        assert len({colors[name] for name in run_colors}) == report.MAX_RUNS


# ---- pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of which two checkpoints are left, as train.py writes them."""
    folder = tmp_path_factory.mktemp("report") / "run"
    cfg = config.load(model="debug", overrides=["evaluation.test_path=scenes:9:seed=3"])
    make_run(folder, [dict(step=4, loss=1.0)])
    (folder / "config.yaml").write_text(cfg.to_yaml())
    state = train.TrainState(cfg)
    writer = checkpoint.CheckpointWriter()
    logger = SimpleNamespace(seconds=1, images=1, num_bad_images=0)
    for state.step in (2, 4):
        torch.nn.init.normal_(state.ema.backbone.patch_embed.proj.weight, std=0.1)
        checkpoint.save_checkpoint(writer, state, folder, cfg, logger)
        writer.wait()
    return folder


def decode(url):
    return Image.open(io.BytesIO(base64.b64decode(url)))


def test_pictures_are_the_teachers_views(make, trained, one_thread):
    page = make(trained, images=2)
    strips = dict(re.findall('aria-label="([^"]*)"><img(.*?)</div>', page))
    expected = ["evaluation images"]
    for moment in ("untrained", "step 2", "step 4"):
        expected.append(f"{moment}: principal components")
        expected.append(f"{moment}: attention of [CLS], mean of its heads")
    assert list(strips) == expected
    assert len(set(strips.values())) == len(strips)
    backbone, cfg = open_backbone(trained)
    size = cfg.evaluation.image_size or cfg.crops.global_crops_size
    tiles = pca_row(backbone, large_sample(Scenes(9, seed=3), size, size, 2))
    shown = re.findall('base64,(.*?)"', strips["step 4: principal components"])
    assert len(shown) == len(tiles)
    for url, tile in zip(shown, tiles):
        assert np.array_equal(np.array(decode(url)), np.array(tile))
    outside = r"""(src|href)=(?!"data:image/)|url\(|@import|<script|<link"""
    assert not re.search(outside, page)
    assert len(re.findall("src=", page)) == 16


def test_neighbours_of_the_teacher_and_an_untrained_network(make, trained, one_thread):
    (trained / "neighbours.png").unlink(missing_ok=True)
    make(trained)
    assert not (trained / "neighbours.png").exists()  # --images 0
    page = make(trained, images=1)
    teacher, cfg = open_backbone(trained)
    networks = {"after training": teacher, "untrained": untrained_copy(teacher, cfg, cfg.train.seed)}
    expected = np.array(compare_networks(networks, *open_eval_sets(cfg)))
    with Image.open(trained / "neighbours.png") as picture:
        assert np.array_equal(np.array(picture), expected)
    (url,) = re.findall('<img alt="images and their nearest[^>]*base64,(.*?)"', page)
    assert np.array_equal(np.array(decode(url)), expected)


def test_label_transfer_of_the_teacher_and_its_baselines(make, trained, one_thread):
    (trained / "transfer.png").unlink(missing_ok=True)
    page = make(trained, images=1)
    teacher, cfg = open_backbone(trained)
    settings = transfer.make_parser().parse_args([*FEW_SCENES, "--size", str(config.evaluation_size(cfg))])
    settings.names = ["background", *CLASSES]
    expected = np.array(transfer.draw_transfer(transfer.compare(teacher, cfg, settings)[0], settings))
    with Image.open(trained / "transfer.png") as picture:
        assert np.array_equal(np.array(picture), expected)
    (url,) = re.findall('<img alt="scenes, the true classes[^>]*base64,(.*?)"', page)
    assert np.array_equal(np.array(decode(url)), expected)


def test_why_there_are_no_pictures(make, trained, tmp_path, capsys):
    run = make_run(tmp_path / "run", overrides=["evaluation.test_path="])
    page = make(run, images=2)
    assert "No pictures: there are no evaluation images: evaluation.test_path names some" in page
    run = make_run(tmp_path / "blank")
    assert "No pictures: nothing is saved yet: train.checkpoint_every and train.keep" in make(run, images=2)
    assert not list(tmp_path.glob("*/*.png"))
    (run / "teacher.pth").write_bytes((trained / "teacher.pth").read_bytes())
    (run / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    page = make(run, images=2)
    assert "No pictures" in page
    assert "has no checkpoints: train with train.checkpoint_every" in page
    assert (run / "neighbours.png").exists()  # it needs none
    assert (run / "transfer.png").exists()
    page = make(run)
    assert "Nearest neighbours" not in page
    assert "Label transfer" not in page


def test_the_command_says_why_there_is_no_picture(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run)])
    report.main()
    *pictures, page = capsys.readouterr().out.splitlines()
    assert page.startswith(f"wrote {run}/report.html: ")
    for line, name in zip(pictures, ("neighbours", "transfer"), strict=True):
        assert line.startswith(f"no {run}/{name}.png: nothing is saved yet")


# ---- a real browser

LOOK = """
const texts = svg => [...svg.querySelectorAll('text')].filter(t => t.textContent);
const boxes = svg => texts(svg).map(t => t.getBoundingClientRect());
const touch = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const plots = [...document.querySelectorAll('svg')];
const name = s => s.parentNode.querySelector('h3').textContent;
const beyond = r => r.left < -0.5 || r.right > innerWidth + 0.5;
const outside = [...document.querySelectorAll('body *')].filter(
    e => !e.closest('.wide table') && beyond(e.getBoundingClientRect())).map(e => e.outerHTML.slice(0, 80));
return {
  width: document.documentElement.scrollWidth, plots: plots.length, outside,
  overlaps: plots.filter(s => boxes(s).some((a, i) => boxes(s).some((b, j) => i < j && touch(a, b))))
      .map(name),
  cut: plots.filter(s => { const r = s.getBoundingClientRect(); return boxes(s).some(
      b => b.left < r.left - 1 || b.right > r.right + 1 || b.bottom > r.bottom + 1); }).map(name),
  blank: plots.filter(s => { const r = [...s.querySelectorAll('.curve,.dots')].map(p => p.getBBox());
      return !r.some(b => b.width + b.height > 0) && !s.querySelector('.dots[d^=M]'); }).map(name),
  paper: getComputedStyle(document.body).backgroundColor,
  colors: [...new Set([...document.querySelectorAll('.curve')].map(p => getComputedStyle(p).stroke))].length,
};"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_in_a_browser_nothing_overlaps_or_sticks_out(width, dark, make, trained, tmp_path):
    rows = []
    for step in range(1000, 625_001, 1000):
        row = dict(step=step)
        for metric in LOGGED:
            row[metric] = random.uniform(0, 1e5 if "grad" in metric else 1)
        rows.append(row)
    long_name = tmp_path / ("a_very_long_name_of_a_run" * 3)
    long = make_run(long_name, rows, RESULT, ["ibot.separate_head=true"])
    close_results = dict(RESULT, knn_random_init=0.19, chance=0.2, knn_pixels=0.21)
    many_prototypes = ["dino.head_n_prototypes=65536", "ibot.separate_head=true"]
    other = make_run(tmp_path / "other", None, close_results, many_prototypes)
    make(long, other, trained, images=4)
    browser.open_page(tmp_path / "page.html", width, 800, dark)
    seen = browser.run_script(LOOK)
    assert seen["width"] == width and not seen["outside"]
    assert not seen["overlaps"] and not seen["cut"] and not seen["blank"]
    assert seen["plots"] >= len(LOGGED)
    assert seen["colors"] == 3
    assert seen["paper"] == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
