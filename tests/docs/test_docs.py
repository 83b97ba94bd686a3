"""The documents are true: links, commands, names, numbers and diagrams of all *.md files agree with the code.

    python -m pytest tests/test_docs.py
    MERMAID=/folder python -m pytest tests/test_docs.py -m slow     # after `npm install mermaid jsdom` there

What is unusual here: each check makes complaints out of a text, and what it must complain about is tested
too. A command is read by the parser of the script that it names, and its settings are loaded; then it is
stopped. Marks in the documents, which a reader does not see, say what the next table or diagram is held to:

    %% imports                                 the arrows between files are all imports that there are
    %% calls: train.py::train_step             names with () are called there, in this order
    %% shapes: laptop                          tuples of numbers are shapes in this model, for one image
    <!-- calls: train.py::train_step -->       the same for the text up to the next heading
    <!-- results: laptop.knn_top1 ... | ... -->  numbers of results/laptop.json, row by row
    <!-- presets: dinov1_laptop laptop -->     values of these presets, column by column
    <!-- sizes: vit_b laptop -->               parameters and tokens of these models, column by column
    <!-- start: laptop vits14 -->              what a loss is before anything is learned
"""

import argparse
import ast
import fnmatch
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from torch.distributed.run import parse_args as torchrun_arguments

import config
from config import UserError
from curation import __main__ as curate
from model import DINOv2
from tools import plan

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT, *(ROOT / name for name in ("docs", "kernels", "labs", "tests/golden"))]
DOCS = sorted(path for folder in FOLDERS for path in folder.glob("*.md"))
STRICT = [p for p in DOCS if p.parent.name == "docs" or p.name in ("README.zh.md", "CONTRIBUTING.md")]
CODE = [p for folder in (ROOT, ROOT / "kernels", ROOT / "labs") for p in sorted(folder.glob("*.py"))]
STARTERS = ("python", "torchrun", "sbatch", "pip")  # of commands that are checked
OTHERS = ("kill", "git", "npm", "ruff", "python3")  # of commands that are not
ENDS = "py|ya?ml|json|jsonl|md|pth|npz|npy|png|html|txt|cff|toml|tar|sbatch|safetensors"
FILE = rf"[\w./*-]+\.(?:{ENDS})(?![A-Za-z0-9_])"
URI = r"(?:scenes|folder|tar|list|pairs|random):\S*"
# Words of the field that look like code: what the glossary explains, and names of papers and libraries.
TERMS = {"KoLeo", "SwiGLU", "LayerScale", "PyTorch", "ViT", "DINOv1"}


# ---------------------------------------------------------------- what the code holds


@cache
def tree(path):
    return ast.parse(path.read_text())


@cache
def defined(path):
    """Functions, classes, Class.member and constants of a file: {name: its node}."""
    found = {}

    def enter(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node
            if isinstance(node, ast.ClassDef):
                enter(node.body, f"{prefix}{node.name}.")
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                found.update((prefix + name, node) for name in names)

    enter(tree(path).body, "")
    return found


@cache
def words():
    """-> every identifier of the code, and all its texts in one."""
    names, texts = set(), []
    for node in (n for path in CODE for n in ast.walk(tree(path))):
        names.update(getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
            names.update(re.findall(r"\w+", node.value) if " " not in node.value else ())
    texts += [path.read_text() for path in sorted((ROOT / "configs").iterdir()) if path.is_file()]
    return names - {None}, "\n".join(texts)


@cache
def calls(place):
    """The names that a function calls, in the order in which calls end. `place` as "train.py::train_step"."""
    file, _, name = place.partition("::")
    found = [n for n in ast.walk(defined(ROOT / file)[name]) if isinstance(n, ast.Call)]
    found.sort(key=lambda n: (n.end_lineno, n.end_col_offset))
    return [ast.unparse(n.func).rpartition(".")[2] for n in found]


@cache
def callable_names():
    """What the code defines as a function or class, or calls."""
    nodes = [n for path in CODE for n in ast.walk(tree(path))]
    made = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return made | {ast.unparse(n.func).rpartition(".")[2] for n in nodes if isinstance(n, ast.Call)}


def out_of_order(names, places):
    """Complaints if the functions at `places` do not call these names in this order."""
    left = iter([name for place in places.split() for name in calls(place)])
    return [f"{name}() is not called by {places}, or earlier" for name in names if name not in left]


@cache
def settings():
    """-> section.key of train.py and of curate.py, and their sections."""
    keys = {*config.KINDS, *curate.KINDS}
    return keys | {key.split(".")[0] for key in keys}


def unknown(span, here=ROOT / "x"):
    """Why this piece of code in a text stands for nothing in the repository, or None."""
    names, texts = words()
    if span.split()[0] in (*STARTERS, *OTHERS) or re.fullmatch(URI, span):
        return None  # commands have a check of their own
    if re.fullmatch(r"[a-z_]+\.\w+=\S*", span):
        return refused(lambda: load_settings("train.py", "", "", [span]))
    if place := re.fullmatch(rf"({FILE})::([\w.]+)", span):
        known = (ROOT / place[1]).is_file() and defined(ROOT / place[1])
        return None if known and place[2] in known else f"{span} does not exist"
    if re.fullmatch(FILE, span) or "/" in span:
        there = [*ROOT.glob(span.strip("/")), *here.parent.glob(span.strip("/"))]
        written = rf"(?<![\w.]){re.escape(Path(span).name)}(?!\w)"
        left_by_a_run = span.startswith("runs/") or span[-3:] != ".py" and re.search(written, texts)
        return None if there or left_by_a_run else f"there is no {span}, and nothing writes it"
    if span.startswith("--"):
        return None if span in texts else f"no script has the flag {span}"
    if variable := re.fullmatch(r"([A-Z_]{5,})=\S*", span):
        return None if variable[1] in texts else f"nothing reads or sets {variable[1]}"
    if span.endswith("()") and not callable_names().intersection([span[:-2], span[:-2].rpartition(".")[2]]):
        return f"{span} is no function"
    name = span.removesuffix("()")
    if "." in name:
        owner, _, member = name.partition(".")
        file = ROOT / f"{owner}.py"
        known = name in settings() or owner in settings() and member == "*"
        known = known or any(name in defined(path) for path in CODE)
        known = known or file.is_file() and member in defined(file)
        return None if known else f"there is no {name}"
    known = fnmatch.filter(names, name) or name in settings() or (ROOT / "configs" / f"{name}.yaml").is_file()
    return None if known else f"{name!r} is no name of the code"


# ---------------------------------------------------------------- commands


def without_code(text):
    return re.sub(r"^```.*?^```\n", "", text, flags=re.S | re.M)


def commands(text):
    """All commands of a text, in blocks and in sentences, as lists of words."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    shell = [block for language, block in blocks if language in ("", "sh", "bash")]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    start = rf"(?:[A-Z_]+=\S+ +)*({'|'.join(STARTERS)}) "
    lines += [m[1] for m in re.finditer(rf"`((?={start})[^`]+)`", without_code(text).replace("\n", " "))]
    parts = [part.strip() for line in lines for part in re.split(r"&&|;", line.split("  #")[0])]
    found = [(re.match(start, part), part) for part in parts]
    return [shlex.split(part[match.start(1) :]) for match, part in found if match]


class Parsed(Exception):
    """Carries what a script's parser understood out of its main()."""


def understood(script, given):
    """What the parser of a script makes of these words: an argparse.Namespace. ValueError if it refuses."""

    entered = []

    def stop(original):
        def parse(parser, *given):
            if entered:  # parse_args asks parse_known_args
                return original(parser, *given)
            entered.append(parser)
            parser.allow_abbrev = False
            raise Parsed(original(parser, *given))

        return parse

    def refuse(parser, message):
        raise ValueError(f"{script}: {message}")

    parser, ways = argparse.ArgumentParser, ("parse_args", "parse_intermixed_args", "parse_known_args")
    stops = {name: stop(getattr(parser, name)) for name in ways}
    with patch.multiple(parser, error=refuse, **stops), patch.object(sys, "argv", [script, *given]):
        folder = str((ROOT / script).parent)
        try:
            with patch.object(sys, "path", [folder, *sys.path]):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except Parsed as e:
            found, rest = e.args[0] if isinstance(e.args[0], tuple) else (e.args[0], [])
    if strange := [word for word in rest if word.startswith("-")]:
        raise ValueError(f"{script} does not know {strange}")
    return argparse.Namespace(settings=rest, **vars(found)) if rest else found


def load_settings(script, file, preset, given):
    if script.endswith(("curate.py", "curation.py")):
        return curate.load(file or None, given)
    given = [x for x in given if x.partition("=")[0] not in plan.EXTRA]
    return config.load(file or None, preset or ("" if file else "laptop"), given)


def check_script(script, given):
    """Raises an error if the script would not take these words."""
    source = (ROOT / script).read_text()
    if script == "config.py":
        config.load(model=given[0], overrides=given[1:])
    elif not re.search("argparse|from workbench import .*run", source):  # never run: nothing would stop it
        if alien := [x for x in given if x.startswith("--") and f'"{x}"' not in source]:
            raise ValueError(f"{script} does not know {alien}")
    else:
        a = understood(script, given)
        own = getattr(a, "overrides", getattr(a, "settings", None))
        if own is not None:
            file = getattr(a, "config", "")
            load_settings(script, "" if str(file).startswith("runs/") else file, getattr(a, "model", ""), own)


def refused(act):
    """The error that act() raises, as a text, or None."""
    try:
        act()
    except (UserError, ValueError, FileNotFoundError, SystemExit) as e:
        return str(e)


def bad_command(given):
    """Why a command, as a list of words, would not start, or None."""
    if given[0] == "pip":
        files = [b for a, b in zip(given, given[1:]) if a == "-r"]
        return next((f"there is no {f}" for f in files if not (ROOT / f).is_file()), None)
    if given[:2] == ["python", "-m"]:
        if given[2] not in ("pytest", "venv"):
            return f"python -m {given[2]} is not known here"
        paths = [
            (ROOT / f, name) for f, _, name in (x.partition("::") for x in given[3:]) if f[:5] == "tests"
        ]
        missing = [f"{f}::{name}" for f, name in paths if not f.exists() or name and name not in defined(f)]
        return f"there is no {missing}" if missing else None
    if given[0] == "sbatch":
        return refused(lambda: (ROOT / given[1]).read_text() and check_script("train.py", given[2:]))
    if given[0] == "torchrun" and (problem := refused(lambda: torchrun_arguments(given[1:]))):
        return f"torchrun refuses {' '.join(given)} ({problem})"
    at = next((i for i, word in enumerate(given) if word.endswith(".py")), None)
    if at is None or given[0] == "python" and at != 1:
        return f"no script in {' '.join(given)}"
    return refused(lambda: check_script(given[at], given[at + 1 :]))


# ---------------------------------------------------------------- diagrams

BRACKETS = {"[": "]", "(": ")", "{": "}", "([": "])", "[(": ")]", "[[": "]]", "{{": "}}", "((": "))"}
NODE = re.compile(r'(\w+)(?:([\[({]{1,2})"([^"#;]*)"([\])}]{1,2}))?')
ARROW = re.compile(r'\s*(?:-->|---|-\.->|-\.-|==>|<-->)(?:\|"([^"#;]*)"\|)?\s*')
RESERVED = [
    "class",
    "classDef",
    "click",
    "default",
    "direction",
    "end",
    "flowchart",
    "graph",
    "style",
    "subgraph",
]
PLAIN = re.compile(r"%%|classDef \w+ \S|class [\w,]+ \w+$|direction (TB|LR|BT|RL)$|$")


def diagrams(text):
    return re.findall(r"^```mermaid\n(.*?)^```", text, re.S | re.M)


def flow(line, labels, arrows):
    """Read one line `a["x"] & b --> c`, fill in labels {node: text} and arrows -> complaint or None."""
    at, left, last = 0, [], []
    while at < len(line):
        if not (node := NODE.match(line, at)):
            return f"no node at {line[at:]!r}"
        name, opening, text, closing = node.groups()
        if opening and BRACKETS.get(opening) != closing or name in RESERVED:
            return f"{node[0]!r} is no node"
        if opening and labels.setdefault(name, text) != text:
            return f"{name} has two labels"
        last.append(name)
        at = node.end()
        if more := re.compile(r"\s*&\s*").match(line, at):
            at = more.end()
            continue
        arrows += [(a, b) for a in left for b in last]
        if at == len(line):
            return None
        if not (arrow := ARROW.match(line, at)) or arrow.end() == len(line):
            return f"no arrow to a node at {line[at:]!r}"
        labels[f"|{len(labels)}"] = arrow[1] or ""
        left, last, at = last, [], arrow.end()
    return "nothing after &"


def read_flowchart(lines):
    """-> complaints, {node: label}, arrows."""
    wrong, labels, arrows, depth = [], {}, [], 0
    for line in lines:
        if box := re.fullmatch(r'subgraph (\w+)\["([^"#;]*)"\]', line):
            depth, labels[f"|{box[1]}"] = depth + 1, box[2]
        elif line == "end":
            depth -= 1
        elif not PLAIN.match(line) and (problem := flow(line, labels, arrows)):
            wrong.append(problem)
    wrong += ["subgraph and end do not match"] * (depth != 0)
    nodes, ends = {n for n in labels if n[0] != "|"}, {n for arrow in arrows for n in arrow}
    boxes = {n[1:] for n in labels if n[0] == "|"}
    wrong += [f"{n} is in an arrow, but has no label" for n in sorted(ends - nodes - boxes)]
    wrong += [f"no arrow touches {n}" for n in sorted(nodes - ends)]
    return wrong, labels, arrows


def read_sequence(lines):
    """-> complaints, {participant or line: text}, arrows."""
    wrong, labels, arrows, depth = [], {}, [], 0
    for line in lines:
        if who := re.fullmatch(r"participant (\w+) as ([^#;]+)", line):
            labels[who[1]] = who[2]
        elif said := re.fullmatch(r"(\w+)(?:->>|-->>)(\w+): ([^#;]+)", line):
            arrows.append(said.groups()[:2])
            labels[f"|{len(labels)}"] = said[3]
        elif note := re.fullmatch(r"Note (?:over|left of|right of) (\w+)(?:,(\w+))?: ([^#;]+)", line):
            arrows.append((note[1], note[2] or note[1]))
            labels[f"|{len(labels)}"] = note[3]
        elif loop := re.fullmatch(r"(?:loop|opt|par|and|alt|else) ([^#;]+)", line):
            depth += not line.startswith(("and ", "else "))
            labels[f"|{len(labels)}"] = loop[1]
        elif line == "end":
            depth -= 1
        elif not PLAIN.match(line):
            wrong.append(f"not understood: {line!r}")
    wrong += ["loop and end do not match"] * (depth != 0)
    wrong += [f"{n} is no participant" for arrow in arrows for n in arrow if n not in labels]
    return wrong, labels, arrows


def names_in(label):
    """What is written as code in a label: files, functions(), section.key, under_scores, CamelCase, and
    whatever stands before a shape."""
    label = label.replace("<br/>", " \n ")
    found = re.findall(FILE, label)
    rest = re.sub(FILE, " ", label)
    found += re.findall(r"[A-Za-z_][\w.]*\(\)", rest)
    found += re.findall(r"\b[A-Za-z_]\w*\.(?:[a-z_]\w*|\*)", re.sub(r"[\w.]+\(\)", " ", rest))
    found += re.findall(r"(?<![\w.])\w*[a-z0-9]_\w+(?![\w.(])", rest)
    found += re.findall(r"\b[A-Z][a-z]+[A-Z]\w*|\b[A-Z]{3,}[a-z]\w+", rest)
    found += re.findall(r"([A-Za-z_]\w*) \((?=[^)]*[A-Z])[\w ,.+*/-]+\)", rest)
    return [name for name in found if name not in TERMS]


def bad_diagram(block):
    """Complaints about one Mermaid block: its grammar, its names, and what its marks promise."""
    head, *lines = [line.strip() for line in block.splitlines()]
    marks = dict(re.findall(r"%% (\w+):? ?(.*)", block))
    if re.fullmatch(r"flowchart (TB|TD|LR|RL|BT)", head):
        wrong, labels, arrows = read_flowchart(lines)
    elif head == "sequenceDiagram":
        wrong, labels, arrows = read_sequence(lines)
    else:
        return [f"{head!r} is neither a flowchart with a direction nor a sequenceDiagram"]
    names = [name for label in labels.values() for name in names_in(label)]
    wrong += [problem for name in names if (problem := unknown(name))]
    if "imports" in marks:
        wrong += bad_imports(labels, arrows)
    if "calls" in marks:
        called = [n for label in labels.values() for n in re.findall(r"(\w+)\(\)", label)]
        wrong += out_of_order(called, marks["calls"])
    if "shapes" in marks:
        known = shapes(marks["shapes"])
        given = re.findall(r"\((\d[\d, ]*\d)\)", " ".join(labels.values()))
        wrong += [f"({x}) is no shape of {marks['shapes']}" for x in given if x not in known]
    return wrong


def bad_imports(labels, arrows):
    """Complaints if the arrows between files of a diagram are not exactly their imports of each other."""
    files = {node: re.search(r"[\w/]+\.py", text)[0] for node, text in labels.items() if node[0] != "|"}
    owner, true = {f[:-3].replace("/", "."): node for node, f in files.items()}, set()
    for node, file in files.items():
        for x in ast.walk(tree(ROOT / file)):
            names = [a.name for a in x.names] if isinstance(x, (ast.Import, ast.ImportFrom)) else []
            if isinstance(x, ast.ImportFrom):
                names = [x.module, *(f"{x.module}.{name}" for name in names)]
            true |= {(node, owner[name]) for name in names if name in owner}
    wrong = [f"{a} does not import {b}" for a, b in sorted(set(arrows) - true)]
    return wrong + [f"{a} imports {b}, which is not drawn" for a, b in sorted(true - set(arrows))]


VIT_B = "", ["student.arch=vit_base", "student.num_register_tokens=4", "train.batch_size_per_gpu=1"]
EXAMPLES = {"vit_b": VIT_B, "laptop": ("laptop", ["train.batch_size_per_gpu=1"])}  # one image


@cache
def shapes(name):
    """Shapes of all that one image turns into in a model, as texts such as "2, 201, 768"."""
    preset, overrides = EXAMPLES[name]
    cfg, seen = config.load(model=preset, overrides=overrides), []
    with torch.device("meta"):
        model = DINOv2(cfg)
        c, model_input = cfg.crops, lambda n, size: torch.empty(n, 3, size, size)
        images = model_input(2, c.global_crops_size), model_input(c.local_crops_number, c.local_crops_size)
        seen += images
        for part in model.modules():
            part.register_forward_hook(lambda part, given, out: seen.extend((*given, out)))
        seen += [model.backbone.embed(x) for x in images]
        tokens = model.backbone.forward_crops(images)
        seen += [x for group in tokens for x in group]
        model.heads(torch.cat([x.cls for x in tokens]), tokens[0].patches.flatten(0, 1)[:0])
    return {", ".join(map(str, x.shape)) for x in seen if torch.is_tensor(x)}


# ---------------------------------------------------------------- links, tables, texts


def slugs(text):
    """The anchors that code hosts give to the headings of a text."""
    heads = re.findall(r"^#+ +(.+?) *$", without_code(text), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads]
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in plain}


def bad_links(text, here):
    """Complaints about relative links and anchors of a text that lies at `here`."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_code(text))):
        path, _, anchor = link.partition("#")
        target = here.parent / path if path else here
        if "//" in link:
            continue
        if not target.exists():
            wrong.append(f"{link} leads nowhere")
        elif anchor and anchor not in slugs(target.read_text() if path else text):
            wrong.append(f"{link}: there is no such heading")
    return wrong


def tables(text, mark):
    """(what a mark says, the rows of cells below it) for each `<!-- mark: ... -->`."""
    for said, table in re.findall(rf"<!-- {mark}: (.*?) -->\n+((?:\|.*\n)+)", text + "\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        yield said, rows[2:]


def bad_results(text):
    """Complaints about tables whose numbers are not those of results/*.json, rounded as they are."""
    wrong = []
    for said, rows in tables(text, "results"):
        for wanted, (name, *cells) in zip(said.split("|"), rows, strict=True):
            cells = [cell for cell in cells if re.search(r"\d", cell)]
            if len(cells) != len(wanted.split()):
                wrong.append(f"{name}: {len(cells)} numbers, the mark names {wanted.split()}")
                continue
            for key, cell in zip(wanted.split(), cells):
                file, number, *which = key.split(".")
                numbers = re.findall(r"\d+(?:\.\d+)?", cell)
                summary = json.loads((ROOT / "results" / f"{file}.json").read_text())["summary"][number]
                true = [summary[k] for k in (which or ["mean", "min", "max"])[: len(numbers)]]
                if numbers != [f"{x:.{len(n.partition('.')[2])}f}" for x, n in zip(true, numbers)]:
                    wrong.append(f"{name}: {cell} is not {key}, {true}")
    return wrong


def bad_presets(text):
    """Complaints about tables of settings: first column the key, then one column for each preset."""
    wrong = []
    for said, rows in tables(text, "presets"):
        loaded = [config.load(model=name) for name in said.split()]
        for key, *cells in rows:
            section, _, name = key.strip("`").partition(".")
            true = [getattr(getattr(cfg, section, None), name, None) for cfg in loaded]
            given = [yaml.safe_load(cell.strip("`")) for cell in cells]
            if [list(x) if isinstance(x, tuple) else x for x in true] != given:
                wrong.append(f"{key}: {given} is not {true}")
    return wrong


def bad_starts(text):
    """Complaints about a table of losses before learning: preset, K, ln K, the terms of a uniform answer."""
    wrong = []
    for said, rows in tables(text, "start"):
        if [row[0].strip("`") for row in rows] != said.split():
            wrong.append(f"the rows are not {said}")
        for name, *cells in rows:
            cfg = config.load(model=name.strip("`"))
            K, pairs = cfg.dino.head_n_prototypes, 2 * cfg.crops.local_crops_number + 2
            of_patches = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else K
            ibot = cfg.ibot.mask_sample_probability * cfg.ibot.loss_weight * math.log(of_patches)
            dino = [math.log(K) * share for share in (1, 1 - 2 / pairs, 2 / pairs)]
            true = [f"{K:,}", *(f"{x:.3f}" for x in (*dino, ibot))]
            if cells != true:
                wrong.append(f"{name}: {cells} is not {true}")
    return wrong


def bad_sizes(text):
    """Complaints about a table: parameters of backbone and head, tokens per image of student and teacher."""
    wrong = []
    for said, rows in tables(text, "sizes"):
        for name, *cells in zip(said.split(), *(row[1:] for row in rows)):
            preset, overrides = EXAMPLES[name]
            shape = plan.Shape(config.load(model=preset, overrides=overrides))
            backbone = sum(x.numel() for x in shape.model.backbone.parameters())
            true = backbone, shape.size() - backbone, shape.tokens(shape.crops), shape.tokens(shape.crops[:1])
            if cells != [f"{n:,}" for n in true]:
                wrong.append(f"{name}: {cells} is not {true}")
    return wrong


def bad_calls(text):
    """Complaints about texts that walk through a function: names with () stand in the order of its calls."""
    wrong = []
    for place, part in re.findall(r"<!-- calls: (.*?) -->\n(.*?)(?=^#|\Z)", text, re.S | re.M):
        wrong += out_of_order(re.findall(r"`(?:\w+\.)*(\w+)\(\)`", part), place)
    return wrong


def bad_counts(text):
    """Complaints about rows `file.py | lines`."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", text, re.M)
    true = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    return [f"{name} has {true[name]} lines, not {n}" for name, n in rows if true[name] != int(n)]


def bad_names(text, here=ROOT / "x"):
    """Complaints about code in a text that is no code of the repository."""
    spans = re.findall(r"`([^`]+)`", without_code(text).replace("\n", " "))
    return [problem for span in spans if (problem := unknown(span, here))]


# ---------------------------------------------------------------- the tests


def complaints(path, text):
    """All that is wrong with the text of a document."""
    checks = bad_results, bad_presets, bad_starts, bad_sizes, bad_counts, bad_calls
    wrong = bad_links(text, path) + [problem for check in checks for problem in check(text)]
    wrong += [problem for block in diagrams(text) for problem in bad_diagram(block)]
    wrong += [f"{' '.join(c)}: {problem}" for c in commands(text) if (problem := bad_command(c))]
    return wrong + (bad_names(text, path) if path in STRICT else [])


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_document(path):
    wrong = complaints(path, path.read_text())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file, true, false", [
    ("README.zh.md", "0.855 (0.833", "0.856 (0.833"), ("README.zh.md", "| 0.113 |", "| |"),
    ("README.zh.md", "| `losses.py` | ", "| `losses.py` | 1"), ("README.zh.md", "`zero_grad()`", "`step()`"),
    ("docs/README.md", "  data --> scenes", "  losses --> scenes"), ("docs/README.md", "](faults", "](fault"),
    ("docs/README.md", "#read)", "#reading)"), ("docs/architecture.md", "(730, 768)", "(731, 768)"),
    ("docs/architecture.md", "| 459,840", "| 459,841"), ("docs/architecture.md", "norm1()", "norm3()"),
    ("docs/attention.md", "heads()", "head()"), ("docs/attention.md", "r2 -->", "r3 -->"),
    ("docs/curation.md", "dedup.radius", "dedup.width"), ("docs/inference.md", "eval_dense.py", "dense.py"),
    ("docs/losses.md", "| 5.545 |", "| 5.546 |"), ("docs/losses.md", "features (2, ", "sizes_ (2, "),
    ("docs/sharding.md", "participant b", "participant c"), ("docs/sharding.md", "gpus=8", "gpu=8"),
    ("docs/training_step.md", "teacher_targets()", "student_targets()"),
    ("docs/v1_and_v2.md", "| 0.996 |", "| 0.9996 |"), ("docs/v1_and_v2.md", "| 425 |", "| 500 |"),
    ("docs/faq.md", "--task seg", "--task segm"), ("docs/faq.md", "vits14_distill", "vits14_distil"),
    ("docs/glossary.md", "losses.py::ibot_loss", "losses.py::ibot"),
    ("CONTRIBUTING.md", "config.UserError", "config.UsersError"),
])  # fmt: skip
def test_a_false_word_is_noticed(file, true, false):
    text = (ROOT / file).read_text()
    assert true in text
    assert complaints(ROOT / file, text.replace(true, false, 1))


@pytest.mark.parametrize("text", [
    "`train_stepp`", "`train.cantering`", "`optim.*.lr`", "`--no-such-flag`", "`configs/vitx.yaml`",
    "`rain.py`", "`optim.base_lr=fast`", "`losses.py::koleo`", "`lossy.py::koleo_loss`", "`model.Token`",
])  # fmt: skip
def test_a_false_name_is_refused(text):
    assert bad_names(text) and bad_names(f"as in {text}, for instance")


@pytest.mark.parametrize("text", [
    "python train.py --modle vits14", "python train.py --model vits15", "python train.py optim.base_lrr=1",
    "python train.py optim.base_lr=fast", "python train.py student.patch_size=15", "python nothing.py",
    "python eval_dense.py --weights runs/laptop", "python eval_knn.py --k many", "python eval_knn.py --tra x",
    "torchrun --nproc-per-nodes 8 train.py", "torchrun --nproc-per-node 8 train.py --model vits15",
    "A=1 torchrun train.py --resumee", "python curate.py run folder:/x out quality.min_sid=3",
    "python curate.py runs folder:/x out", "python plan.py gpus=8 gpu=8", "python data.py --bensh",
    "python config.py vits15", "python -m pytest tests/test_nothing.py", "python -m train",
    "python x train.py", "python -m pytest tests/test_docs.py::test_nothing",
    "sbatch configs/slurm.sbatch --model vit",
    "sbatch configs/slum.sbatch", "pip install -r requirement.txt", "python export.py runs/laptop --to onnx",
])  # fmt: skip
def test_a_false_command_is_refused(text):
    for written in (f"```\n{text}\n```", f"```\ntrue && {text}\n```", f"see `{text}`"):
        (command,) = commands(written)
        assert bad_command(command)


@pytest.mark.parametrize("text", [
    'graph\na["x"] --> b["y"]', 'flowchart\na["x"] --> b["y"]', 'flowchart TB\na["x"] --> b',
    'flowchart TB\na["x"] -> b["y"]', 'flowchart TB\na["x") --> b["y"]', 'flowchart TB\na["x" --> b["y"]',
    'flowchart TB\na["x"] -->', 'flowchart TB\na["x"] --> end["y"]', 'flowchart TB\na["x"]', "pie",
    'flowchart TB\nsubgraph s["s"]\na["x"] --> b["y"]', 'flowchart TB\na["x"] --> b["y"]\na["z"] --> b',
    'flowchart TB\na[x] --> b["y"]', 'flowchart TB\na["x"; y] --> b["y"]', 'flowchart TB\na["a;b"] --> a',
    "sequenceDiagram\nparticipant a as x\na->>b: y", "sequenceDiagram\nparticipant a as x\na->>a",
    "sequenceDiagram\nparticipant a as x\nloop z\na->>a: y", 'flowchart TB\na["x"] --> b["no_such_name"]',
    'flowchart TB\na["nothing.py"] --> b["y"]', 'flowchart TB\na["x"] -->|"temperature()"| b["y"]',
    'flowchart TB\na["NoClass"] --> b["y"]', 'flowchart TB\na["tensors (B, N)"] --> b["optim.rate"]',
    'flowchart TB\n%% imports\na["model.py"] --> b["losses.py"]',
    'flowchart TB\n%% imports\na["train.py"] --> b["losses.py"]\nc["data.py"] --> a',
    'flowchart TB\n%% calls: optim.py::compute_schedules\na["round()"] --> b["sqrt()"] --> c["sqrt()"]',
])  # fmt: skip
def test_a_false_diagram_is_refused(text):
    assert bad_diagram(text)


def test_chinese_readme_has_the_commands_of_the_english_one():
    english, chinese = (commands((ROOT / f"README{x}.md").read_text()) for x in ("", ".zh"))
    assert len(chinese) > 12
    assert not [" ".join(c) for c in chinese if c not in english]


def test_every_question_has_a_command_and_a_trap():
    head, *answers = re.split(r"^## \d+\. .*[?.]$", (ROOT / "docs" / "faq.md").read_text(), flags=re.M)
    assert len(answers) == 15 and "Fifteen" in head
    for answer in answers:
        assert len(commands(re.search(r"^```\n.*?^```", answer, re.S | re.M)[0])) in (1, 2)
        assert answer.count("\nTrap: ") == 1


def test_every_page_is_linked_and_every_word_has_its_place():
    pages = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in pages
    rows = re.findall(r"^\| (?!word|-)(.*)", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    assert len(rows) > 30 and all(re.search(r"`\w+\.py::[\w.]+` \|$", row) for row in rows)


def test_citation():
    """What the format asks for, and the four papers. (`cffconvert --validate` checks the whole format.)"""
    text = (ROOT / "CITATION.cff").read_text()
    cff = yaml.safe_load(text)
    assert {"cff-version", "message", "title", "authors"} <= cff.keys() and cff["cff-version"] == "1.2.0"
    assert cff["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    papers = ("2104.14294", "2111.07832", "2304.07193", "2309.16588")
    assert [r["identifiers"][0]["value"] for r in cff["references"]] == [f"arXiv:{paper}" for paper in papers]
    assert all(r["title"] and r["year"] and r["authors"] for r in cff["references"])


MERMAID = """
import { createRequire } from "node:module"
import { pathToFileURL } from "node:url"
const find = createRequire(process.env.MERMAID + "/")
const { JSDOM } = find("jsdom")
globalThis.window = new JSDOM("").window
globalThis.document = window.document
const mermaid = (await import(pathToFileURL(find.resolve("mermaid")))).default
const wrong = []
for (const text of JSON.parse(process.argv[1]))
  await mermaid.parse(text).catch(e => wrong.push(text + e.message))
if (wrong.length) { console.error(wrong.join("\\n")); process.exit(1) }
"""


@pytest.mark.slow
@pytest.mark.skipif("MERMAID" not in os.environ, reason="MERMAID names no folder with mermaid and jsdom")
def test_mermaid_itself_reads_every_diagram():
    blocks = [block for path in DOCS for block in diagrams(path.read_text())]
    run = ["node", "--input-type=module", "-e", MERMAID]
    assert subprocess.run([*run, json.dumps(blocks)]).returncode == 0
    assert subprocess.run([*run, json.dumps([*blocks, "flowchart TB\na["])], capture_output=True).returncode
