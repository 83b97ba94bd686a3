"""The labs hold what their pages promise: holes that say so, checks that bite, tables as printed."""

import ast
import importlib
import math
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
from config import UserError
from kernels.attention import jit, tl, triton
from scenes import Scenes

ROOT = Path(__file__).parents[2]
LABS = sorted((ROOT / "labs").glob("lab[0-9]_*.py"))
HEADINGS = ["Question", "Predict", "Run", "Look", "Explain", "Change"]
lab = pytest.mark.parametrize("lab", LABS, ids=lambda p: p.stem)


@pytest.fixture
def run_lab(monkeypatch, tmp_path, capsys, one_thread):
    """A lab in this process: it puts the student's functions into the real modules, and here they go back."""
    monkeypatch.syspath_prepend(str(ROOT / "labs"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lab 6 does so too, and nothing may remain of it
    monkeypatch.setattr(Scenes, "__getitem__", Scenes.__getitem__)
    monkeypatch.chdir(tmp_path)
    places = (ROOT, ROOT / "kernels", ROOT / "labs")
    modules = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
    before = [(vars(m), dict(vars(m))) for m in modules if Path(m.__file__).parent in places]

    def run(lab, *flags):
        monkeypatch.setattr(sys, "argv", [str(lab), *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(lab), run_name="__main__")
        return end.value.code or 0, capsys.readouterr()

    yield run
    for now, then in before:
        now.update(then)


def tables(text):
    """Tables of Markdown -> {(first cell, name of the column): text of the cell}."""
    cells = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = [[x.strip() for x in line.strip("| \n").split("|")] for line in block.splitlines()]
        cells |= {(row[0], name): x for row in rows for name, x in zip(head[1:], row[1:])}
    return cells


def page_of(lab):
    return lab.with_suffix(".md").read_text()


def holes(lab):
    """{function: its sentence} for each function of the script that only raises NotImplementedError."""
    found = {}
    for f in ast.parse(lab.read_text()).body:
        last = f.body[-1] if isinstance(f, ast.FunctionDef) else None
        if isinstance(last, ast.Raise) and last.exc.func.id == "NotImplementedError":
            found[f.name] = ast.get_docstring(f) and ast.literal_eval(last.exc.args[0])
    return found


def test_all_six_are_here():
    assert [p.stem[:4] for p in LABS] == [f"lab{i}" for i in range(1, 7)]


# ---------------------------------------------------------------- scripts


@lab
def test_it_runs(lab, run_lab, request):
    if lab.stem == "lab6_kernel" and triton:
        request.getfixturevalue("interpreter")
    code, said = run_lab(lab, "--solution", "--short")
    assert code == 0, said.err
    assert tables(said.out), "it ends with a table"


@lab
def test_a_hole_says_so_in_one_sentence(lab, run_lab):
    code, said = run_lab(lab, "--short")
    hole = next(iter(holes(lab).values()))
    assert code == 1
    assert said.err == f"error: {lab.name} has a hole: {hole}; or look with --solution\n"


@lab
def test_script_and_solution_fit(lab):
    """Short, numbered holes with docstrings, and one function of ours for each."""
    text = lab.read_text()
    assert len(text.splitlines()) <= 120
    for number, (name, sentence) in enumerate(holes(lab).items(), 1):
        assert sentence and sentence.startswith(f"hole {number} in {name}(): "), name
    called = ast.literal_eval(re.search(r"run\(main, __doc__, (\[.*?\])", text, re.S)[1])
    answers = ast.parse((lab.parent / "solutions" / lab.name).read_text())
    ours = [f.name for f in answers.body if isinstance(f, ast.FunctionDef)]
    assert called == list(holes(lab)) == ours and 1 <= len(ours) <= 3


def koleo_of_itself(features, group=0):
    x = F.normalize(features, dim=-1)
    return -torch.log((x - x[(x @ x.T).argmax(1)] + 1e-8).norm(dim=-1) + 1e-8).mean()


def koleo_of_a_fixed_neighbour(features, group=0):
    x = F.normalize(features, dim=-1)
    nearest = x[(x @ x.T).fill_diagonal_(-2).argmax(1)].detach()
    return -torch.log((x - nearest + 1e-8).norm(dim=-1) + 1e-8).mean()


def first_patches(rng, n, wanted, cap):
    return (np.arange(n * n) < wanted).reshape(n, n)


def columns_last(Q):
    Q = Q / Q.sum(1, keepdim=True)
    return Q / Q.sum(0, keepdim=True)


def entropies_in_nats(p):
    return torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()


def beyond_mean(norms, arch):
    limit = norms.mean() + 10 * norms.std()
    return (norms > limit).float().mean().item(), limit.item()


def mean_over_columns(maps, r):
    kinds = slice(0, 1), slice(1, 1 + r), slice(1 + r, None)
    return torch.stack([torch.stack([maps[:, :, a, b].mean() for b in kinds]) for a in kinds])


def the_other_way_round(truth, found, reason):
    planted, dropped = ({k for k, why in x.items() if why == reason} for x in (truth, found))
    return len(planted & dropped) / len(planted), len(planted & dropped) / len(dropped)


def too_near(hashes, radius):
    yield np.argwhere(np.triu(np.bitwise_count(hashes[:, None] ^ hashes) < radius - 1, 1))


def with_itself(hashes, radius):
    yield np.argwhere(np.bitwise_count(hashes[:, None] ^ hashes) <= radius)


def in_proportion(sizes, total):
    return np.asarray(sizes) * total // np.sum(sizes)


def no_maximum(s):
    return s.exp() / s.exp().sum(1, keepdim=True)


def never_shrunk(q, k, v, block):
    l, o = 0, 0
    for keys, values in zip(k.split(block), v.split(block)):
        s = q @ keys.T
        p = (s - s.max(1, keepdim=True).values).exp()
        l, o = l + p.sum(1, keepdim=True), o + p @ values
    return o / l


@jit
def no_mask(q, k, v, out, n, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    mine = rows[:, None] * D + d[None, :]
    x = tl.load(q + mine, mask=rows[:, None] < n, other=0.0)
    l, o = tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], float("-inf"), tl.float32)
    for first in range(0, n, BN):
        j = first + tl.arange(0, BN)
        y = tl.load(k + j[:, None] * D + d[None, :], mask=j[:, None] < n, other=0.0)
        z = tl.load(v + j[:, None] * D + d[None, :], mask=j[:, None] < n, other=0.0)
        s = tl.dot(x, tl.trans(y))  # beyond n: 0, which counts as exp(0)
        grown = tl.maximum(m, tl.max(s, 1))
        shrink, p = tl.exp(m - grown), tl.exp(s - grown[:, None])
        m, l, o = grown, l * shrink + tl.sum(p, 1), o * shrink[:, None] + tl.dot(p, z)
    tl.store(out + mine, o / l[:, None], mask=rows[:, None] < n)


WRONG = [  # what one may well write at first
    ("lab1_collapse", "centred", lambda z, c, tau: (z / tau - c).softmax(-1)),
    ("lab1_collapse", "moved", lambda c, mean, m: (1 - m) * c + m * mean),
    ("lab1_collapse", "entropies", entropies_in_nats),
    ("lab2_sinkhorn", "balanced", columns_last),
    ("lab2_sinkhorn", "in_use", lambda Q: torch.special.entr(Q).sum(1).mean().exp()),
    ("lab3_losses", "koleo", koleo_of_itself),
    ("lab3_losses", "koleo", koleo_of_a_fixed_neighbour),
    ("lab3_losses", "scattered", first_patches),
    ("lab4_registers", "outliers", beyond_mean),
    ("lab4_registers", "who_looks", mean_over_columns),
    ("lab5_data", "precision_recall", the_other_way_round),
    ("lab5_data", "join", too_near),
    ("lab5_data", "join", with_itself),
    ("lab5_data", "fill", in_proportion),
    ("lab6_kernel", "softmax", no_maximum),
    ("lab6_kernel", "online", never_shrunk),
    ("lab6_kernel", "attend", no_mask),
]


@pytest.mark.parametrize("name, hole, wrong", WRONG, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_answer_trains_nothing(name, hole, wrong, run_lab, monkeypatch, request):
    if hole == "attend":
        request.getfixturevalue("interpreter")
    monkeypatch.setattr(importlib.import_module(f"solutions.{name}"), hole, wrong)
    code, said = run_lab(ROOT / "labs" / f"{name}.py", "--solution", "--short")
    assert code == 1 and said.err.startswith("error: not yet right: ")
    assert said.out.splitlines()[-1].startswith("WRONG") and "| run" not in said.out


def test_a_check_must_reject_its_control(run_lab, capsys):
    from workbench import Desk

    desk = Desk(short=False)
    desk.check("good", 1.0, 0.0, low=0.5)
    desk.check("no effect", 0.0, 0.0, low=0.5)
    desk.check("a bound that lets everything pass", 1.0, 0.0, low=-1)
    desk.check("not a number", math.nan, 0.0, low=0.5)
    assert desk.failed == ["no effect", "a bound that lets everything pass", "not a number"]
    with pytest.raises(UserError, match="not yet right: at once"):
        Desk(short=True).check("at once", 0.0, 0.0, low=0.5, instant=True)
    short = Desk(short=True)
    short.check("nothing is learned", 0.0, 0.0, low=0.5)
    assert short.failed == []


def test_equal_seeds_mean_equal_trials(run_lab):
    from workbench import trial

    def numbers(seed):
        return [row["loss"] for row in trial("train.batch_size_per_gpu=8", steps=2, seed=seed).rows]

    assert numbers(0) == numbers(0) != numbers(1)


# ---------------------------------------------------------------- pages


@lab
def test_page(lab):
    """Six headings, its own command, settings and files that exist, a table with its tolerance."""
    page = page_of(lab)
    assert re.findall(r"^## (\w+)", page, re.M) == HEADINGS
    commands = [shlex.split(c) for c in re.findall(r"^python [^#\n]+", page, re.M)]
    assert any(words[1] == f"labs/{lab.name}" for words in commands)
    for words in commands:
        assert (ROOT / words[1]).is_file(), words
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert "//" in link or (lab.parent / link).exists(), link
    sections = "|".join(config.SECTIONS)
    for name in re.findall(rf"`((?:{sections})\.\w+)`", page):
        assert name in config.KINDS or (ROOT / f"{name.split('.')[0]}.py").exists(), name
    for setting in re.findall(rf"\b((?:{sections})\.\w+=[^\s\"`]+)", page):
        config.load(None, "laptop", [setting])
    assert any(row == "tolerance" for row, _ in tables(page))


@pytest.mark.slow
@lab
def test_page_tells_what_is_printed(lab, tmp_path):
    """The whole lab, as a student starts it: every number lies within the range of its page, widened by the
    tolerance of its column."""
    command = [sys.executable, str(lab), "--solution"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, printed = tables(page_of(lab)), tables(done.stdout)
    assert printed and not printed.keys() - told.keys()
    for (row, column), text in printed.items():
        expected, slack = told[row, column], float(told["tolerance", column])
        numbers = [float(x) for x in re.findall(r"(?<![\d.])-?\d+\.?\d*", expected)]  # mean (lowest-highest)
        close = min(numbers) - slack <= float(text) <= max(numbers) + slack
        assert close, f"{row}, {column}: {text} instead of {expected}"
