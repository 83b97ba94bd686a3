"""The report: every logged term drawn to scale, dashed lines, pictures, bad input, a real browser."""

import base64
import io
import json
import math
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import ask
from PIL import Image

import checkpoint
import config
import train
from config import UserError
from data import sample_masks
from evals.visualize import large_sample, pca_row
from features import open_backbone
from losses import collapse_warning
from scenes import Scenes
from tools import report
from train import Logits

TERMS = [
    *("loss_dino_local", "loss_dino_global", "loss_ibot", "loss_koleo", "loss", "grad_backbone"),
    *("grad_dino_head", "skipped", "entropy", "entropy_mean", "kl", "rank", "lr", "last_layer_lr"),
    *("backbone_lr", "weight_decay", "momentum", "teacher_temp", "images_per_second"),
]
DONE = dict(knn_top1=0.8, knn_random_init=0.2, knn_pixels=0.25, chance=0.1, steps=60, bad_images=3)


def make_run(path, rows=None, result=None, overrides=()):
    """A run folder of the laptop's settings with made-up numbers: each term goes from 1 down to 0.5."""
    if rows is None:
        rows = [dict(step=s, **dict.fromkeys(TERMS, 1 - s / 120)) for s in range(10, 61, 10)]
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config.load(model="laptop", overrides=overrides).to_yaml())
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "environment.json").write_text(json.dumps(dict(torch="2.13.0", git_diff="a\nb\n")))
    if result:
        (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def make(monkeypatch, tmp_path, capsys):
    def make(*runs, images=0):
        out = tmp_path / "page.html"
        argv = ["report.py", *map(str, runs), "--out", str(out), "--images", str(images)]
        monkeypatch.setattr(sys, "argv", argv)
        report.main()
        assert capsys.readouterr().out.startswith(f"wrote {out}: ")
        return out.read_text()

    return make


def figures(page):
    """{term: the text of its <figure>}"""
    return {
        re.search("<h3>(.*?)</h3>", f)[1]: f for f in re.findall("<figure>.*?</figure>", page) if "<svg" in f
    }


def texts(figure, kind="tick"):
    """[(x, y, text)] of the words of a plot."""
    found = re.findall(rf'<text class="{kind}" x="(.*?)" y="(.*?)" .*?>(.*?)</text>', figure)
    return [(float(x), float(y), text) for x, y, text in found]


def ruler(figure):
    """A function from heights in a plot to values, read off the numbers at its vertical axis."""
    numbers = [(y - 4, float(t.replace(",", ""))) for x, y, t in texts(figure) if x == report.LEFT - 6]
    (y0, v0), (y1, v1) = numbers[0], numbers[-1]
    return lambda y: v0 + (v1 - v0) * (y - y0) / (y1 - y0)


def marks(figure):
    """[(value, style)] of the dashed lines."""
    lines = re.findall(r'class="mark" d="M[\d.]+ ([\d.]+)H[\d.]+"(.*?)/>', figure)
    return [(ruler(figure)(float(y)), style) for y, style in lines]


def paths(figure):
    """{colour: [(x, y)]} of the curves."""
    found = re.findall(r'class="curve" d="(.*?)" style="stroke:(.*?)"', figure)
    return {c: [tuple(map(float, p.split())) for p in re.findall(r"[ML]([^ML]+)", d)] for d, c in found}


# ---- what is drawn


def test_every_logged_term_has_a_plot_with_axes_and_a_sentence(make, tmp_path):
    rows = [dict(step=s, **dict.fromkeys(TERMS, 0.5), news=s, empty=None) for s in (1, 10, 20)]
    drawn = figures(make(make_run(tmp_path / "run", rows)))
    assert set(drawn) == {*TERMS, "news"}
    for term, figure in drawn.items():
        words = [text for *_, text in texts(figure)]
        assert "step" in words and words.count("0") >= 1 and "20" in words
        assert f'role="img" aria-label="{term}' in figure
        caption = re.search("<figcaption>(.*?)</figcaption>", figure)[1]
        if term != "news":
            assert len(caption) > 20 and "`" not in caption
            assert words[0] == next(u for start, u in report.UNITS.items() if term.startswith(start))
    assert "Healthy: between 0.2 and 0.9" in drawn["entropy"]  # README's own words


def test_curves_are_to_scale(make, tmp_path):
    figure = figures(make(make_run(tmp_path / "run")))["kl"]
    points, value = paths(figure)["var(--c0)"], ruler(figure)
    steps = [(x - report.LEFT) / (report.RIGHT - report.LEFT) * 60 for x, _ in points]
    assert steps == pytest.approx([10, 20, 30, 40, 50, 60], abs=0.02)
    assert [value(y) for _, y in points] == pytest.approx([1 - s / 120 for s in steps], abs=0.002)


IGNORANCE = [
    (),
    ("crops.local_crops_number=0", "dino.loss_weight=0.5"),
    ("ibot.separate_head=true", "ibot.head_n_prototypes=128", "ibot.loss_weight=2"),
    ("ibot.mask_sample_probability=0", "ibot.separate_head=true"),
]


@pytest.mark.parametrize("overrides", IGNORANCE, ids=str)
def test_dashed_lines_are_what_a_student_pays_that_knows_nothing(overrides, make, tmp_path):
    """The losses of train.py themselves, of a student whose logits are all 0, against any targets."""
    cfg = config.load(model="laptop", overrides=[*overrides, "train.batch_size_per_gpu=8"])
    B, L, K = 8, cfg.crops.local_crops_number, cfg.dino.head_n_prototypes
    masks = sample_masks(cfg, 0, range(2 * B), 2 * B)
    own = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else K
    M, zeros, features = len(masks["mask_indices"]), torch.zeros, torch.randn(2, B, 4)
    student = Logits(zeros(2, B, K), zeros(L, B, K) if L else None, zeros(M, own), features)
    targets = Logits(torch.rand(2, B, K).softmax(-1), None, torch.rand(M, own).softmax(-1), features)
    terms = train.compute_losses(student, targets, dict(masks, globals=zeros(2 * B, 1)), cfg)
    terms = {k: v.item() for k, v in terms.items() if k != "loss_koleo" and v}
    drawn = figures(make(make_run(tmp_path / "run", overrides=overrides)))
    for term, value in (terms | {"loss": sum(terms.values())}).items():
        height = drawn[term].count('class="mark"') and marks(drawn[term])[0][0]
        assert height == pytest.approx(value, abs=0.01), term


def test_baselines_and_the_result_are_in_the_plot_of_knn(make, tmp_path):
    rows = [dict(step=20, loss=1.0), dict(step=20, knn_top1=0.5)]
    figure = figures(make(make_run(tmp_path / "run", rows, DONE)))["knn_top1"]
    assert [v for v, _ in marks(figure)] == pytest.approx([0.25, 0.2, 0.1], abs=0.001)
    assert {t for *_, t in texts(figure, "label")} == {"raw pixels", "random init", "chance"}
    (x0, y0), (x1, y1) = paths(figure)["var(--c0)"]
    assert (ruler(figure)(y0), ruler(figure)(y1)) == pytest.approx((0.5, 0.8), abs=0.001)
    assert x1 == report.RIGHT and x1 - x0 == pytest.approx((report.RIGHT - report.LEFT) * 40 / 60, abs=0.1)


def test_clipping_is_marked_where_there_is_any(make, tmp_path):
    drawn = figures(make(make_run(tmp_path / "a")))
    assert marks(drawn["grad_backbone"])[0][0] == pytest.approx(3, abs=0.02)
    drawn = figures(make(make_run(tmp_path / "b", overrides=["optim.clip_grad=0"])))
    assert not marks(drawn["grad_backbone"]) and len(marks(drawn["loss_koleo"])) == 1


def test_runs_of_other_length_and_K_share_a_plot(make, tmp_path):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", [dict(step=s, loss_ibot=2.0) for s in (10, 120)],
                 overrides=["dino.head_n_prototypes=512", "optim.epochs=6"])  # fmt: skip
    page = make(a, b)
    drawn = figures(page)
    curves, dashed = paths(drawn["loss_ibot"]), marks(drawn["loss_ibot"])
    assert curves["var(--c0)"][-1][0] == (report.LEFT + report.RIGHT) / 2
    assert curves["var(--c1)"][-1][0] == report.RIGHT
    assert [v for v, _ in dashed] == pytest.approx([math.log(256) / 2, math.log(512) / 2], abs=0.01)
    assert ["--c0" in s for _, s in dashed] == [True, False] and "--c1" in dashed[1][1]
    assert (
        "b 2<" not in drawn["loss"] and 'style="stroke' not in drawn["loss"].split("mark")[1].split("/>")[0]
    )
    for run in ("a", "b"):
        assert f"</i>{run} " in drawn["loss_ibot"]
    settings = page.split("Settings that differ")[1].split("<h2>")[0]
    changed = re.findall(r"<tr><td>(.*?)<td>(.*?)<td>(.*?)(?=<tr>|</table>)", settings)
    changed = {key.replace("<wbr>", ""): values for key, *values in changed}
    assert changed == {"dino.head_n_prototypes": ["256", "512"], "optim.epochs": ["5", "6"]}


def test_equal_names_are_told_apart(make, tmp_path):
    a, b = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    page = make(a, b)
    assert f"</i>{a} " in page and f"</i>{b} " in page


def test_results_warnings_and_faults_are_on_top(make, tmp_path):
    sentence = collapse_warning(1.0, 1.0) + " <b>"
    rows = [dict(step=1, loss=1.0), dict(step=1, warning=sentence), dict(step=2, skipped_samples=[64, 127])]
    page = make(make_run(tmp_path / "run", [*rows, dict(step=60, loss=2.0, skipped=0.0)], DONE))
    top = page.split("<h2>")[0].replace("<wbr>", "")
    assert 'role="alert"' in top and "step 1: collapsed to uniform" in top and "&lt;b&gt;" in top
    for key, value in dict(DONE, state="finished", steps="60 of 425", skipped_steps=1).items():
        assert f"<td>{key}<td>{value}" in top
    skipped = figures(page)["skipped"]
    assert [round(ruler(skipped)(y), 2) for _, y in paths(skipped)["var(--c0)"]] == [1, 0]
    assert "<td>git_<wbr>diff<td>2 lines" in page


# ---- runs that are not as they should be


def test_a_run_still_going_with_a_torn_line_and_numbers_that_are_none(make, tmp_path):
    rows = [
        dict(step=s, loss=v) for s, v in ((1, 1.0), (2, None), (3, 3.0), (4, math.nan), (5, 2.0), (6, 2.0))
    ]
    run = make_run(tmp_path / "run", rows)
    with open(run / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 7, "loss": 9.0, "l\xc3')
    (run / "bad_images_rank0.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    page = make(run)
    curve, dots = re.findall(r'<path class="(?:curve|dots)" d="(.*?)"', figures(page)["loss"])
    assert re.sub(r"[^ML]", "", curve) == "MMML" and dots.count("h0") == 4
    for said in (
        "not finished: no result.json yet",
        "6 of 425",
        "1 of metrics.jsonl left out",
        "images<td>2",
    ):
        assert said in page


def test_one_row_and_none(make, tmp_path):
    drawn = figures(make(make_run(tmp_path / "one", [dict(step=1, loss=7.5, weight_decay=0.04, kl=0.0)])))
    assert set(drawn) == {"loss", "weight_decay", "kl"}
    for figure in drawn.values():
        assert 'class="dots" d="M' in figure
        assert [t for _, y, t in texts(figure) if y == report.BOTTOM + 18] == ["0", "1"]
    page = make(make_run(tmp_path / "none", []))
    assert "Nothing is logged yet." in page and "<svg" not in page
    (tmp_path / "none" / "metrics.jsonl").unlink()
    assert "Nothing is logged yet." in make(tmp_path / "none")


def test_what_is_no_run_is_said(make, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "page.html"):
        with pytest.raises(UserError, match=f"{path} is no run folder.*name one"):
            make(make_run(tmp_path / f"good-{path.stem}"), path)
    assert not (tmp_path / "page.html").exists()


def test_broken_files_are_named(make, tmp_path):
    for name, text in (("result.json", '{"steps": 1'), ("config.yaml", "optim: {speed_of_light: 1}")):
        run = make_run(tmp_path / name)
        (run / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}.* of {run} is no good"):
            make(run)


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
        at = report.ticks(low, high)
        step = at[1] - at[0]
        assert at[0] <= low + 1e-5 * step and at[-1] >= high - 1e-5 * step and 4 <= len(at) <= 8
        assert float(f"{step:.0e}") == pytest.approx(step) and f"{step:.0e}"[0] in "125"
    assert report.levels([0.04, 0.04], False)[::4] == pytest.approx([0, 0.04])
    assert report.levels([0.0], False)[-1] == 1 and report.levels([0.3], True)[-1] == 1


def test_labels_never_touch_and_stay_inside():
    draw = random.Random(1)
    for n in (1, 2, 5, 8):
        wanted = [draw.uniform(report.TOP - 9, report.BOTTOM) for _ in range(n)]
        placed = sorted(report.apart(wanted))
        assert min(np.diff(placed), default=15) >= 14.99
        assert placed[0] >= report.TOP and placed[-1] <= report.BOTTOM
    assert report.apart([50.0, 100.0]) == [50.0, 100.0]


def test_a_long_curve_keeps_its_spikes_and_little_else():
    points = [(i, 0.5 + 0.1 * (i % 3)) for i in range(50_000)]
    points[31_234], points[100] = (31_234, 99.0), (100, None)
    kept = report.thin(points)
    assert len(kept) < 700 and (31_234, 99.0) in kept and kept == sorted(kept)
    assert kept[0][0] < 200 and kept[-1][0] > 49_800 and report.thin(points[:899]) == points[:899]


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts))


def test_colours_stand_out_in_light_and_dark(make, tmp_path):
    page = make(make_run(tmp_path / "run"))
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", half)) for half in page.split("@media")[:2])
    for theme in (light, dark):
        full = {k: c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:]) for k, c in theme.items()}
        paper = luminance(full["paper"])
        for name, least in {"ink": 7, "soft": 4.5, **{f"c{i}": 3 for i in range(report.MOST)}}.items():
            pair = sorted((luminance(full[name]), paper))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= least, (name, full[name])
        assert len({full[f"c{i}"] for i in range(report.MOST)}) == report.MOST


# ---- pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of which two checkpoints are left, as train.py writes them."""
    folder = tmp_path_factory.mktemp("report") / "run"
    cfg = config.load(model="debug", overrides=["evaluation.test_path=scenes:9:seed=3"])
    make_run(folder, [dict(step=4, loss=1.0)])
    (folder / "config.yaml").write_text(cfg.to_yaml())
    t, writer, watch = train.TrainState(cfg), checkpoint.CheckpointWriter(), SimpleNamespace(seconds=1, images=1, bad=0)
    for t.step in (2, 4):
        torch.nn.init.normal_(t.ema.backbone.patch_embed.proj.weight, std=0.1)
        checkpoint.save_checkpoint(writer, t, folder, cfg, watch)
        writer.wait()
    return folder


def test_pictures_are_the_teachers_views(make, trained, one_thread):
    page = make(trained, images=2)
    strips = dict(re.findall('aria-label="([^"]*)"><img(.*?)</div>', page))
    moments = ["untrained", "step 2", "step 4"]
    attention = "attention of [CLS], mean of its heads"
    wanted = [f"{moment}: {what}" for moment in moments for what in ("principal components", attention)]
    assert list(strips) == ["evaluation images", *wanted]
    images = [
        base64.b64decode(data) for data in re.findall('base64,(.*?)"', strips["step 4: principal components"])
    ]
    backbone, cfg = open_backbone(trained)
    size = cfg.evaluation.image_size or cfg.crops.global_crops_size
    expected = pca_row(backbone, large_sample(Scenes(9, seed=3), size, size, 2))
    assert [np.array(Image.open(io.BytesIO(x))).tolist() for x in images] == [
        np.array(x).tolist() for x in expected
    ]
    assert len(set(strips.values())) == len(strips)
    outside = r"""(src|href)=(?!"data:image/)|url\(|@import|<script|<link"""
    assert not re.search(outside, page) and len(re.findall("src=", page)) == 14


def test_why_there_are_no_pictures(make, trained, tmp_path):
    run = make_run(tmp_path / "run", overrides=["evaluation.test_path="])
    assert "No pictures: there are no evaluation images: evaluation.test_path names some" in make(
        run, images=2
    )
    run = make_run(tmp_path / "blank")
    assert "No pictures: nothing is saved yet: train.checkpoint_every and train.keep" in make(run, images=2)
    (run / "teacher.pth").write_bytes((trained / "teacher.pth").read_bytes())
    (run / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    page = make(run, images=2)
    assert "No pictures" in page and "has no checkpoints: train with train.checkpoint_every" in page
    assert "Pictures" not in make(run)


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
    steps = range(1000, 625_001, 1000)
    rows = [dict(step=s, **{t: random.uniform(0, 1e5 if "grad" in t else 1) for t in TERMS}) for s in steps]
    long = make_run(tmp_path / ("a_very_long_name_of_a_run" * 3), rows, DONE, ["ibot.separate_head=true"])
    other = make_run(tmp_path / "other", None, dict(DONE, knn_random_init=0.19, chance=0.2, knn_pixels=0.21),
                     ["dino.head_n_prototypes=65536", "ibot.separate_head=true"])  # fmt: skip
    make(long, other, trained, images=4)
    seen = ask(tmp_path / "page.html", LOOK, width, dark)
    assert seen["width"] == width and not seen["outside"]
    assert not seen["overlaps"] and not seen["cut"] and not seen["blank"]
    assert seen["plots"] >= len(TERMS) and seen["colors"] == 3
    assert seen["paper"] == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
