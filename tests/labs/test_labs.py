"""The labs keep the promises of their pages: holes that say so, checks that bite, tables as printed."""

import ast
import importlib
import math
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
each_lab = pytest.mark.parametrize("lab", LABS, ids=lambda path: path.stem)


@pytest.fixture
def run_lab(monkeypatch, tmp_path, capsys, one_thread):
    """Runs a lab in this process, then takes the student's functions out of the real modules again."""
    monkeypatch.syspath_prepend(str(ROOT / "labs"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lab 6 sets it, too, and it must not stay
    monkeypatch.setattr(Scenes, "__getitem__", Scenes.__getitem__)
    monkeypatch.chdir(tmp_path)
    importlib.import_module("workbench")  # now, with all that labs change: what they find is what comes back
    folders = [ROOT, *(ROOT / name for name in ("curation", "evals", "kernels", "labs"))]
    files = [(module, getattr(module, "__file__", None)) for module in list(sys.modules.values())]
    modules = [module for module, file in files if file and Path(file).parent in folders]
    before = [(vars(module), dict(vars(module))) for module in modules]

    def run(lab, *flags):
        monkeypatch.setattr(sys, "argv", [str(lab), *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(lab), run_name="__main__")
        return end.value.code or 0, capsys.readouterr()

    yield run
    for current, original in before:
        current.update(original)


def read_row(line):
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def read_tables(text):
    """Markdown tables -> {(first cell of the row, name of the column): text of the cell}."""
    cells = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *rows = map(read_row, block.splitlines())
        for row in rows:
            cells.update({(row[0], column): cell for column, cell in zip(header[1:], row[1:])})
    return cells


def read_page(lab):
    return lab.with_suffix(".md").read_text()


def functions_of(path):
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def holes_of(lab):
    """{function: its sentence} for each function of the script that only raises NotImplementedError."""
    holes = {}
    for function in functions_of(lab):
        last = function.body[-1]
        if isinstance(last, ast.Raise) and last.exc.func.id == "NotImplementedError":
            holes[function.name] = ast.get_docstring(function) and ast.literal_eval(last.exc.args[0])
    return holes


def test_all_six_are_here():
    assert [lab.stem[:4] for lab in LABS] == [f"lab{i}" for i in range(1, 7)]


# ---------------------------------------------------------------- scripts


@each_lab
def test_it_runs(lab, run_lab, request):
    if lab.stem == "lab6_kernel" and triton:
        request.getfixturevalue("interpreter")
    code, printed = run_lab(lab, "--solution", "--short")
    assert code == 0, printed.err
    assert read_tables(printed.out), "it ends with a table"


@each_lab
def test_a_hole_says_so_in_one_sentence(lab, run_lab):
    code, printed = run_lab(lab, "--short")
    hole = next(iter(holes_of(lab).values()))
    assert code == 1
    assert printed.err == f"error: {lab.name} has a hole: {hole}; or run it with --solution\n"


@each_lab
def test_script_and_solution_fit(lab):
    """A short script of short functions, numbered holes with docstrings, one function of ours for each."""
    text = lab.read_text()
    assert len(text.splitlines()) < 200
    for function in functions_of(lab):
        assert function.end_lineno - function.lineno < 40, function.name
    for number, (name, sentence) in enumerate(holes_of(lab).items(), 1):
        assert sentence and sentence.startswith(f"hole {number} in {name}(): "), name
    named = ast.literal_eval(re.search(r"run_lab\(main, __doc__, (\[.*?\])", text, re.S)[1])
    solved = [function.name for function in functions_of(lab.parent / "solutions" / lab.name)]
    assert named == list(holes_of(lab)) == solved
    assert 1 <= len(solved) <= 3


# ---------------------------------------------------------------- wrong answers, easily given


def unsharpened_center(logits, center, tau):
    return (logits / tau - center).softmax(-1)


def momentum_swapped(center, mean, momentum):
    return (1 - momentum) * center + momentum * mean


def entropies_in_nats(targets):
    return torch.special.entr(targets).sum(1).mean(), torch.special.entr(targets.mean(0)).sum()


def columns_last(Q):
    Q = Q / Q.sum(1, keepdim=True)
    return Q / Q.sum(0, keepdim=True)


def mean_row_entropy(Q):
    return torch.special.entr(Q).sum(1).mean().exp()


def koleo_of_itself(features, group=0):
    x = F.normalize(features, dim=-1)
    nearest = x[(x @ x.T).argmax(1)]
    return -torch.log((x - nearest + 1e-8).norm(dim=-1) + 1e-8).mean()


def koleo_of_a_fixed_neighbour(features, group=0):
    x = F.normalize(features, dim=-1)
    nearest = x[(x @ x.T).fill_diagonal_(-2).argmax(1)].detach()
    return -torch.log((x - nearest + 1e-8).norm(dim=-1) + 1e-8).mean()


def first_patches(rng, side, count, largest_block):
    return (np.arange(side * side) < count).reshape(side, side)


def beyond_mean(norms, arch):
    limit = norms.mean() + 10 * norms.std()
    return (norms > limit).float().mean().item(), limit.item()


def mean_over_columns(maps, registers):
    kinds = [slice(0, 1), slice(1, 1 + registers), slice(1 + registers, None)]
    shares = torch.zeros(3, 3)
    for i, rows in enumerate(kinds):
        for j, columns in enumerate(kinds):
            shares[i, j] = maps[:, :, rows, columns].mean()
    return shares


def the_other_way_round(truth, found, reason):
    planted = {name for name, why in truth.items() if why == reason}
    dropped = {name for name, why in found.items() if why == reason}
    both = len(planted & dropped)
    return both / len(planted), both / len(dropped)


def too_near(hashes, radius):
    distance = np.bitwise_count(hashes[:, None] ^ hashes)
    yield np.argwhere(np.triu(distance < radius - 1, 1))


def with_itself(hashes, radius):
    yield np.argwhere(np.bitwise_count(hashes[:, None] ^ hashes) <= radius)


def in_proportion(sizes, total):
    return np.asarray(sizes) * total // np.sum(sizes)


def no_maximum(scores):
    return scores.exp() / scores.exp().sum(1, keepdim=True)


def never_shrunk(q, k, v, block):
    l = 0
    o = 0
    for keys, values in zip(k.split(block), v.split(block)):
        s = q @ keys.T
        p = (s - s.max(1, keepdim=True).values).exp()
        l = l + p.sum(1, keepdim=True)
        o = o + p @ values
    return o / l


@jit
def no_mask(q_ptr, k_ptr, v_ptr, out_ptr, n, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    columns = tl.arange(0, D)[None, :]
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    tile = rows[:, None] * D + columns
    q = tl.load(q_ptr + tile, mask=rows[:, None] < n, other=0.0)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, D], tl.float32)
    for first in range(0, n, BN):
        keys = first + tl.arange(0, BN)
        key_tile = keys[:, None] * D + columns
        keys_inside = keys[:, None] < n
        k = tl.load(k_ptr + key_tile, mask=keys_inside, other=0.0)
        v = tl.load(v_ptr + key_tile, mask=keys_inside, other=0.0)
        s = tl.dot(q, tl.trans(k))  # a key beyond n gets the score 0, which counts as exp(0)
        new_m = tl.maximum(m, tl.max(s, 1))
        c = tl.exp(m - new_m)
        p = tl.exp(s - new_m[:, None])
        l = c * l + tl.sum(p, 1)
        o = c[:, None] * o + tl.dot(p, v)
        m = new_m
    tl.store(out_ptr + tile, o / l[:, None], mask=rows[:, None] < n)


WRONG = [
    ("lab1_collapse", "center_and_sharpen", unsharpened_center),
    ("lab1_collapse", "move_center", momentum_swapped),
    ("lab1_collapse", "entropies", entropies_in_nats),
    ("lab2_sinkhorn", "sinkhorn_iteration", columns_last),
    ("lab2_sinkhorn", "prototypes_in_use", mean_row_entropy),
    ("lab3_losses", "koleo", koleo_of_itself),
    ("lab3_losses", "koleo", koleo_of_a_fixed_neighbour),
    ("lab3_losses", "scattered_mask", first_patches),
    ("lab4_registers", "outliers", beyond_mean),
    ("lab4_registers", "attention_shares", mean_over_columns),
    ("lab5_data", "precision_recall", the_other_way_round),
    ("lab5_data", "hamming_pairs", too_near),
    ("lab5_data", "hamming_pairs", with_itself),
    ("lab5_data", "water_fill", in_proportion),
    ("lab6_kernel", "softmax", no_maximum),
    ("lab6_kernel", "online_attention", never_shrunk),
    ("lab6_kernel", "attention_kernel", no_mask),
]


@pytest.mark.parametrize("name, hole, wrong", WRONG, ids=lambda x: getattr(x, "__name__", x))
def test_a_wrong_answer_trains_nothing(name, hole, wrong, run_lab, monkeypatch, request):
    if hole == "attention_kernel":
        request.getfixturevalue("interpreter")
    monkeypatch.setattr(importlib.import_module(f"solutions.{name}"), hole, wrong)
    code, printed = run_lab(ROOT / "labs" / f"{name}.py", "--solution", "--short")
    assert code == 1
    assert printed.err.startswith("error: not right yet: ")
    assert printed.out.splitlines()[-1].startswith("WRONG")
    assert "| run" not in printed.out


def test_a_check_must_reject_its_control(run_lab):
    from workbench import Checker

    checker = Checker(short=False)
    checker.check("good", 1.0, 0.0, low=0.5)
    checker.check("no effect", 0.0, 0.0, low=0.5)
    checker.check("a bound that lets everything pass", 1.0, 0.0, low=-1)
    checker.check("not a number", math.nan, 0.0, low=0.5)
    assert checker.failed == ["no effect", "a bound that lets everything pass", "not a number"]
    with pytest.raises(UserError, match="not right yet: at once"):
        Checker(short=True).check("at once", 0.0, 0.0, low=0.5, instant=True)
    short = Checker(short=True)
    short.check("nothing is learned", 0.0, 0.0, low=0.5)
    assert short.failed == []


def test_equal_seeds_mean_equal_trials(run_lab):
    from workbench import run_trial

    def losses(seed):
        trial = run_trial(SimpleNamespace(seed=seed, short=True), steps=2)
        return [row["loss"] for row in trial.rows]

    assert losses(0) == losses(0) != losses(1)


# ---------------------------------------------------------------- pages


@each_lab
def test_page(lab):
    """Six headings, its own command, settings and files that exist, a table with its tolerance."""
    page = read_page(lab)
    assert re.findall(r"^## (\w+)", page, re.M) == HEADINGS
    scripts = []
    for line in re.findall(r"^ *python [^#\n]+", page, re.M):
        _, script, *rest = shlex.split(line)
        if script == "-m":
            script = rest[0].replace(".", "/") + ".py"
        scripts.append(script)
    assert f"labs/{lab.name}" in scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert "//" in link or (lab.parent / link).exists(), link
    sections = "|".join(config.SECTIONS)
    for name in re.findall(rf"`((?:{sections})\.\w+)`", page):
        assert name in config.KINDS or (ROOT / f"{name.split('.')[0]}.py").exists(), name
    for setting in re.findall(rf"\b((?:{sections})\.\w+=[^\s\"`]+)", page):
        config.load(None, "laptop", [setting])
    assert any(row == "tolerance" for row, _ in read_tables(page))


@pytest.mark.slow
@each_lab
def test_page_tells_what_is_printed(lab, tmp_path):
    """The whole lab, as a student starts it: every number lies within the range of its page, widened by the
    tolerance of its column."""
    command = [sys.executable, str(lab), "--solution"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = read_tables(read_page(lab))
    printed = read_tables(done.stdout)
    assert printed and not printed.keys() - expected.keys()
    for (row, column), text in printed.items():
        cell = expected[row, column]  # mean (lowest-highest)
        numbers = [float(number) for number in re.findall(r"(?<![\d.])-?\d+\.?\d*", cell)]
        tolerance = float(expected["tolerance", column])
        close = min(numbers) - tolerance <= float(text) <= max(numbers) + tolerance
        assert close, f"{row}, {column}: {text} instead of {cell}"
