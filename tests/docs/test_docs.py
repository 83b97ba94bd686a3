"""Every document is true: links, commands, names, numbers and diagrams in all *.md files agree with the code.

    python -m pytest tests/docs/test_docs.py
    MERMAID=/folder python -m pytest tests/docs/test_docs.py -m slow    # `npm install mermaid jsdom` there

Each check turns a text into a list of problems, and is itself tested on texts in which it must find one. A
command is read by the parser of the script that it names, and its settings are loaded; then it is stopped.
Marks in the documents, invisible to a reader, say how the next table or diagram is checked:

    %% imports                                 the arrows between files are all the imports that exist
    %% calls: train.py::train_step             names with () are called there, in this order
    %% shapes: laptop                          tuples of numbers are shapes in this model, for one image
    <!-- calls: train.py::train_step -->       the same for the text up to the next heading
    <!-- results: laptop.knn_top1 ... | ... -->  numbers of results/laptop.json, row by row
    <!-- presets: dinov1_laptop laptop -->     values of these presets, column by column
    <!-- sizes: vit_b laptop -->               parameters and tokens of these models, column by column
    <!-- start: laptop vits14 -->              the losses before anything is learned
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
from torch.distributed.run import parse_args as parse_torchrun

import config
from config import UserError
from curation import settings as curation_settings
from model import DINOv2
from tools import plan

ROOT = Path(__file__).parents[2]
DOCS = []
for folder in (".", "docs", "kernels", "labs", "tests/golden"):
    DOCS += sorted(ROOT.glob(f"{folder}/*.md"))
STRICT = ("README.zh.md", "CONTRIBUTING.md")  # and docs/: every code span must be a name that exists
CODE = []
for folder in (".", "kernels", "evals", "curation", "tools", "labs"):
    CODE += sorted(ROOT.glob(f"{folder}/*.py"))
CHECKED = ("python", "torchrun", "sbatch", "pip")  # programs whose commands are checked
UNCHECKED = ("kill", "git", "npm", "ruff", "python3")
COMMAND = rf"(?:[A-Z_]+=\S+ +)*(?P<program>{'|'.join(CHECKED)}) "
ENDINGS = "py|ya?ml|json|jsonl|md|pth|npz|npy|png|html|txt|cff|toml|tar|sbatch|safetensors"
FILE = rf"[\w./*-]+\.(?:{ENDINGS})(?![A-Za-z0-9_])"
URI = r"(?:scenes|folder|tar|list|pairs|random):\S*"
# Words of the field that look like code: terms of the glossary, names of papers and libraries.
TERMS = {"KoLeo", "SwiGLU", "LayerScale", "PyTorch", "ViT", "DINOv1"}


# ---------------------------------------------------------------- names in the code


@cache
def syntax_tree(path):
    return ast.parse(path.read_text())


def all_nodes():
    for path in CODE:
        yield from ast.walk(syntax_tree(path))


@cache
def definitions(path):
    """{name: node} of the functions, classes, Class.members and constants of a file."""
    found = {}
    add_definitions(syntax_tree(path).body, "", found)
    return found


def add_definitions(body, prefix, found):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[prefix + node.name] = node
        if isinstance(node, ast.ClassDef):
            add_definitions(node.body, f"{prefix}{node.name}.", found)
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            names = [leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
            found.update({prefix + name: node for name in names})


@cache
def identifiers():
    """Every name in the code, and every word in a string without spaces."""
    found = set()
    for node in all_nodes():
        for field in ("id", "attr", "arg", "name"):
            found.add(getattr(node, field, None))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found.update(re.findall(r"\w+", node.value))
    return found - {None}


@cache
def all_strings():
    """All strings of the code and the text of the presets, in one."""
    constants = [node.value for node in all_nodes() if isinstance(node, ast.Constant)]
    presets = [path.read_text() for path in (ROOT / "configs").iterdir() if path.is_file()]
    return "\n".join([text for text in constants if isinstance(text, str)] + presets)


def called_name(node):
    return ast.unparse(node.func).rpartition(".")[2]


@cache
def callables():
    """Functions and classes that the code defines, and everything that it calls."""
    nodes = list(all_nodes())
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return defined | {called_name(node) for node in nodes if isinstance(node, ast.Call)}


@cache
def calls_of(place):
    """Names that the function at "train.py::train_step" calls, in the order in which the calls end."""
    file, _, name = place.partition("::")
    found = [node for node in ast.walk(definitions(ROOT / file)[name]) if isinstance(node, ast.Call)]
    found.sort(key=lambda node: (node.end_lineno, node.end_col_offset))
    return [called_name(node) for node in found]


def order_problems(names, places):
    """Problems if the functions at `places` do not call these names in this order."""
    calls = []
    for place in places.split():
        calls += calls_of(place)
    remaining = iter(calls)  # `in` consumes it, so each name is found only after the one before
    return [f"{name}() is not called by {places}, or earlier" for name in names if name not in remaining]


# ---------------------------------------------------------------- names in a text


@cache
def settings():
    """section.key of training and of curation, and their sections."""
    keys = {*config.KINDS, *curation_settings.KINDS}
    return keys | {key.split(".")[0] for key in keys}


def name_problem(span, here=ROOT / "x"):
    """Why this code span in the document `here` stands for nothing in the repository, or None."""
    if span.split()[0] in (*CHECKED, *UNCHECKED) or re.fullmatch(URI, span):
        return None  # commands have a check of their own
    if re.fullmatch(r"[a-z_]+\.\w+=\S*", span):
        return error_of(lambda: load_settings("train.py", "", "", [span]))
    if "::" in span:
        return reference_problem(span)
    if re.fullmatch(FILE, span) or "/" in span:
        return file_problem(span, here)
    if span.startswith("--"):
        return None if span in all_strings() else f"no script has the flag {span}"
    variable = re.fullmatch(r"([A-Z_]{5,})=\S*", span)
    if variable:
        return None if variable[1] in all_strings() else f"nothing reads or sets {variable[1]}"
    name = span.removesuffix("()")
    if span.endswith("()") and not callables().intersection([name, name.rpartition(".")[2]]):
        return f"{span} is no function"
    if "." in name:
        return None if dotted_name_exists(name) else f"there is no {name}"
    preset = ROOT / "configs" / f"{name}.yaml"
    if fnmatch.filter(identifiers(), name) or name in settings() or preset.is_file():
        return None
    return f"{name!r} is no name of the code"


def reference_problem(span):
    """file.py::name"""
    file, _, name = span.partition("::")
    exists = (ROOT / file).is_file() and name in definitions(ROOT / file)
    return None if exists else f"{span} does not exist"


def file_problem(span, here):
    """A path from the root or from the document, or a file that some code writes."""
    pattern = span.strip("/")
    if span.startswith("runs/") or [*ROOT.glob(pattern), *here.parent.glob(pattern)]:
        return None
    written = rf"(?<![\w.]){re.escape(Path(span).name)}(?!\w)"
    if not span.endswith(".py") and re.search(written, all_strings()):
        return None
    return f"there is no {span}, and nothing writes it"


def dotted_name_exists(name):
    """section.key, section.*, Class.member, or module.name."""
    owner, _, member = name.partition(".")
    if name in settings() or (member == "*" and owner in settings()):
        return True
    module = ROOT / f"{owner}.py"
    if module.is_file() and member in definitions(module):
        return True
    return any(name in definitions(path) for path in CODE)


def name_problems(text, here=ROOT / "x"):
    spans = re.findall(r"`([^`]+)`", without_blocks(text).replace("\n", " "))
    problems = [name_problem(span, here) for span in spans]
    return [problem for problem in problems if problem]


# ---------------------------------------------------------------- commands


def without_blocks(text):
    return re.sub(r"^```.*?^```\n", "", text, flags=re.S | re.M)


def commands(text):
    """All commands of a text, from code blocks and from sentences, as lists of words."""
    lines = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language in ("", "sh", "bash"):
            lines += block.replace("\\\n", " ").splitlines()
    prose = without_blocks(text).replace("\n", " ")
    lines += [found[1] for found in re.finditer(rf"`({COMMAND}[^`]+)`", prose)]
    found = []
    for line in lines:
        for part in re.split("&&|;", line.split("  #")[0]):
            command = re.match(COMMAND, part.strip())
            if command:
                found.append(shlex.split(part.strip()[command.start("program") :]))
    return found


class Parsed(Exception):
    """Carries the arguments that a script has parsed out of its main()."""


def parse_as(script, words):
    """The argparse.Namespace that a script's own parser makes of these words. ValueError if it refuses."""
    started = []

    def intercept(original):
        def parse(parser, *args):
            if started:  # parse_args calls parse_known_args
                return original(parser, *args)
            started.append(parser)
            parser.allow_abbrev = False
            raise Parsed(original(parser, *args))

        return parse

    def refuse(parser, message):
        raise ValueError(f"{script}: {message}")

    parser = argparse.ArgumentParser
    methods = ("parse_args", "parse_intermixed_args", "parse_known_args")
    replaced = {name: intercept(getattr(parser, name)) for name in methods}
    path = [str((ROOT / script).parent), *sys.path]
    with patch.multiple(parser, error=refuse, **replaced), patch.object(sys, "argv", [script, *words]):
        try:
            with patch.object(sys, "path", path):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            raise ValueError(f"{script} parses no arguments")
        except Parsed as parsed:
            result = parsed.args[0]
    if not isinstance(result, tuple):
        return result
    arguments, rest = result  # of parse_known_args
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        raise ValueError(f"{script} does not know {unknown}")
    return argparse.Namespace(settings=rest, **vars(arguments)) if rest else arguments


def load_settings(script, file, preset, overrides):
    if "curation" in script:
        return curation_settings.load(file or None, overrides)
    overrides = [word for word in overrides if word.partition("=")[0] not in plan.PLAN_SETTINGS]
    return config.load(file or None, preset or ("" if file else "laptop"), overrides)


def check_arguments(script, words):
    """Raises an error if the script would not accept these words."""
    source = (ROOT / script).read_text()
    if script == "config.py":
        config.load(model=words[0], overrides=words[1:])
    elif not re.search("argparse|from workbench import .*run", source):  # never run: nothing would stop it
        unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
        if unknown:
            raise ValueError(f"{script} does not know {unknown}")
    else:
        arguments = parse_as(script, words)
        overrides = getattr(arguments, "overrides", getattr(arguments, "settings", None))
        file = str(getattr(arguments, "config", None) or "")
        if overrides is not None:
            file = "" if file.startswith("runs/") else file
            load_settings(script, file, getattr(arguments, "model", ""), overrides)


def error_of(act):
    """The error that act() raises, as a text, or None."""
    try:
        act()
    except (UserError, ValueError, FileNotFoundError, SystemExit) as error:
        return str(error)
    return None


def command_problem(words):
    """Why a command, as a list of words, would not start, or None."""
    program, *rest = words
    if program == "pip":
        files = [rest[i + 1] for i, word in enumerate(rest) if word == "-r"]
        return next((f"there is no {file}" for file in files if not (ROOT / file).is_file()), None)
    if program == "sbatch":
        script = ROOT / rest[0]
        return error_of(lambda: script.read_text() and check_arguments("train.py", rest[1:]))
    if program == "torchrun":
        problem = error_of(lambda: parse_torchrun(rest))
        if problem:
            return f"torchrun refuses {' '.join(words)} ({problem})"
        launched = parse_torchrun(rest)
        rest = [launched.training_script, *launched.training_script_args]
        rest = ["-m", *rest] if launched.module else rest
    if rest[0] == "-m":
        return module_problem(*rest[1:]) if rest[1:] else "python -m names no module"
    if not rest[0].endswith(".py"):
        return f"no script in {' '.join(words)}"
    return error_of(lambda: check_arguments(rest[0], rest[1:]))


def module_problem(module, *words):
    """Why `python -m module words` would not start, or None."""
    if module == "venv":
        return None
    if module == "pytest":
        files = [word for word in words if word.startswith("tests")]
        return next((f"there is no {file}" for file in files if not has_test(file)), None)
    path = module.replace(".", "/")
    for script in (f"{path}.py", f"{path}/__main__.py"):
        if "/" in script and (ROOT / script).is_file():
            return error_of(lambda script=script: check_arguments(script, list(words)))
    return f"there is no module {module}"


def has_test(word):
    """tests/file.py, or tests/file.py::test_name"""
    file, _, name = word.partition("::")
    path = ROOT / file
    return path.exists() and (not name or name in definitions(path))


def command_problems(text):
    problems = {" ".join(words): command_problem(words) for words in commands(text)}
    return [f"{words}: {problem}" for words, problem in problems.items() if problem]


# ---------------------------------------------------------------- diagrams

BRACKETS = {"[": "]", "(": ")", "{": "}", "([": "])", "[(": ")]", "[[": "]]", "{{": "}}", "((": "))"}
NODE = re.compile(r'(\w+)(?:([\[({]{1,2})"([^"#;]*)"([\])}]{1,2}))?')
AND = re.compile(r"\s*&\s*")
ARROW = re.compile(r'\s*(?:-->|---|-\.->|-\.-|==>|<-->)(?:\|"([^"#;]*)"\|)?\s*')
SUBGRAPH = re.compile(r'subgraph (\w+)\["([^"#;]*)"\]')
PARTICIPANT = re.compile(r"participant (\w+) as ([^#;]+)")
MESSAGE = re.compile(r"(\w+)(?:->>|-->>)(\w+): ([^#;]+)")
NOTE = re.compile(r"Note (?:over|left of|right of) (\w+)(?:,(\w+))?: ([^#;]+)")
BLOCK = re.compile(r"(loop|opt|par|and|alt|else) ([^#;]+)")
PLAIN = re.compile(r"%%|classDef \w+ \S|class [\w,]+ \w+$|direction (TB|LR|BT|RL)$|$")
RESERVED = ("class", "classDef", "click", "default", "direction", "end", "flowchart", "graph", "style",
            "subgraph")  # fmt: skip


class Diagram:
    """A Mermaid block: its nodes and arrows, all its labels in order, and problems with its grammar."""

    def __init__(self):
        self.nodes = {}  # name: label
        self.boxes = set()  # names of subgraphs
        self.labels = []
        self.arrows = []  # (from, to)
        self.problems = []

    def read_flowchart(self, lines):
        depth = 0
        for line in lines:
            box = SUBGRAPH.fullmatch(line)
            if box:
                depth += 1
                self.boxes.add(box[1])
                self.labels.append(box[2])
            elif line == "end":
                depth -= 1
            elif not PLAIN.match(line):
                self.read_flow(line)
        if depth != 0:
            self.problems.append("subgraph and end do not match")
        connected = {name for arrow in self.arrows for name in arrow}
        nameless = connected - self.nodes.keys() - self.boxes
        self.problems += [f"{name} is in an arrow, but has no label" for name in sorted(nameless)]
        self.problems += [f"no arrow touches {name}" for name in sorted(self.nodes.keys() - connected)]

    def read_flow(self, line):
        """One line such as `a["x"] & b --> c`."""
        sources = []
        targets = []
        position = 0
        while position < len(line):
            node = NODE.match(line, position)
            if not node:
                self.problems.append(f"no node at {line[position:]!r}")
                return
            self.read_node(*node.groups())
            targets.append(node[1])
            position = node.end()
            more = AND.match(line, position)
            if more:
                position = more.end()
                continue
            for source in sources:
                self.arrows += [(source, target) for target in targets]
            if position == len(line):
                return
            arrow = ARROW.match(line, position)
            if not arrow or arrow.end() == len(line):
                self.problems.append(f"no arrow to a node at {line[position:]!r}")
                return
            if arrow[1]:
                self.labels.append(arrow[1])
            sources = targets
            targets = []
            position = arrow.end()
        self.problems.append("nothing after &")

    def read_node(self, name, opening, label, closing):
        if name in RESERVED or (opening and BRACKETS.get(opening) != closing):
            self.problems.append(f"{name} is no node")
        elif opening and name not in self.nodes:
            self.nodes[name] = label
            self.labels.append(label)
        elif opening and self.nodes[name] != label:
            self.problems.append(f"{name} has two labels")

    def read_sequence(self, lines):
        depth = 0
        for line in lines:
            participant = PARTICIPANT.fullmatch(line)
            message = MESSAGE.fullmatch(line)
            note = NOTE.fullmatch(line)
            block = BLOCK.fullmatch(line)
            if participant:
                self.nodes[participant[1]] = participant[2]
                self.labels.append(participant[2])
            elif message:
                self.arrows.append((message[1], message[2]))
                self.labels.append(message[3])
            elif note:
                self.arrows.append((note[1], note[2] or note[1]))
                self.labels.append(note[3])
            elif block:
                if block[1] not in ("and", "else"):
                    depth += 1
                self.labels.append(block[2])
            elif line == "end":
                depth -= 1
            elif not PLAIN.match(line):
                self.problems.append(f"not understood: {line!r}")
        if depth != 0:
            self.problems.append("loop and end do not match")
        for arrow in self.arrows:
            self.problems += [f"{name} is no participant" for name in arrow if name not in self.nodes]


def diagrams(text):
    return re.findall(r"^```mermaid\n(.*?)^```", text, re.S | re.M)


def names_in(label):
    """Everything that is written as code in a label."""
    label = label.replace("<br/>", " \n ")
    without_files = re.sub(FILE, " ", label)
    without_calls = re.sub(r"[\w.]+\(\)", " ", without_files)
    found = re.findall(FILE, label)
    found += re.findall(r"[A-Za-z_][\w.]*\(\)", without_files)  # functions()
    found += re.findall(r"\b[A-Za-z_]\w*\.(?:[a-z_]\w*|\*)", without_calls)  # section.key
    found += re.findall(r"(?<![\w.])\w*[a-z0-9]_\w+(?![\w.(])", without_files)  # under_scores
    found += re.findall(r"\b[A-Z][a-z]+[A-Z]\w*|\b[A-Z]{3,}[a-z]\w+", without_files)  # CamelCase
    found += re.findall(r"([A-Za-z_]\w*) \((?=[^)]*[A-Z])[\w ,.+*/-]+\)", without_files)  # tensor (B, N, D)
    return [name for name in found if name not in TERMS]


def diagram_problems(block):
    """Problems with one Mermaid block: its grammar, its names, and the promises of its marks."""
    head, *lines = [line.strip() for line in block.splitlines()]
    marks = dict(re.findall(r"%% (\w+):? ?(.*)", block))
    diagram = Diagram()
    if re.fullmatch(r"flowchart (TB|TD|LR|RL|BT)", head):
        diagram.read_flowchart(lines)
    elif head == "sequenceDiagram":
        diagram.read_sequence(lines)
    else:
        return [f"{head!r} is neither a flowchart with a direction nor a sequenceDiagram"]
    problems = list(diagram.problems)
    text = "<br/>".join(diagram.labels)
    unknown = [name_problem(name) for name in names_in(text)]
    problems += [problem for problem in unknown if problem]
    if "imports" in marks:
        problems += import_problems(diagram)
    if "calls" in marks:
        problems += order_problems(re.findall(r"(\w+)\(\)", text), marks["calls"])
    if "shapes" in marks:
        shown = re.findall(r"\((\d[\d, ]*\d)\)", text)
        known = shapes(marks["shapes"])
        problems += [f"({shape}) is no shape of {marks['shapes']}" for shape in shown if shape not in known]
    return problems


def import_problems(diagram):
    """Problems if the arrows between files are not exactly their imports of each other."""
    files = {name: re.search(r"[\w/]+\.py", label)[0] for name, label in diagram.nodes.items()}
    modules = {file.removesuffix(".py").replace("/", "."): name for name, file in files.items()}
    true = set()
    for name, file in files.items():
        imported = imports_of(ROOT / file) & modules.keys()
        true |= {(name, modules[module]) for module in imported}
    drawn = set(diagram.arrows)
    wrong = [f"{files[a]} does not import {files[b]}" for a, b in sorted(drawn - true)]
    return wrong + [f"{files[a]} imports {files[b]}, which is not drawn" for a, b in sorted(true - drawn)]


def imports_of(path):
    """Modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


ONE_IMAGE = "train.batch_size_per_gpu=1"
MODELS = {  # of the marks `shapes` and `sizes`: preset, overrides
    "vit_b": ("", ["student.arch=vit_base", "student.num_register_tokens=4", ONE_IMAGE]),
    "laptop": ("laptop", [ONE_IMAGE]),
}


@cache
def shapes(name):
    """Shapes of every tensor that one image becomes in a model, as texts such as "2, 201, 768"."""
    preset, overrides = MODELS[name]
    cfg = config.load(model=preset, overrides=overrides)
    crops = cfg.crops
    seen = []

    def record(module, inputs, output):
        seen.extend([*inputs, output])

    with torch.device("meta"):
        model = DINOv2(cfg)
        global_crops = torch.empty(2, 3, crops.global_crops_size, crops.global_crops_size)
        local_crops = torch.empty(crops.local_crops_number, 3, crops.local_crops_size, crops.local_crops_size)
        for module in model.modules():
            module.register_forward_hook(record)
        seen += [global_crops, local_crops]
        seen += [model.backbone.embed(global_crops), model.backbone.embed(local_crops)]
        tokens = model.backbone.forward_crops([global_crops, local_crops])
        for group in tokens:
            seen += group
        model.heads(torch.cat([group.cls for group in tokens]), tokens[0].patches.flatten(0, 1)[:0])
    return {", ".join(map(str, tensor.shape)) for tensor in seen if torch.is_tensor(tensor)}


# ---------------------------------------------------------------- links and tables


def anchors(text):
    """The anchors that code hosts give to the headings of a text."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_blocks(text), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def link_problems(text, here):
    """Problems with relative links and anchors of the document `here`."""
    problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_blocks(text))):
        if "//" in link:
            continue
        path, _, anchor = link.partition("#")
        target = here.parent / path if path else here
        if not target.exists():
            problems.append(f"{link} leads nowhere")
        elif anchor and anchor not in anchors(target.read_text() if path else text):
            problems.append(f"{link}: there is no such heading")
    return problems


def tables(text, mark):
    """(words of the mark, rows of cells) of each table below a `<!-- mark: ... -->`."""
    for words, table in re.findall(rf"<!-- {mark}: (.*?) -->\n+((?:\|.*\n)+)", text + "\n"):
        lines = table.splitlines()[2:]  # without the header
        yield words, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def result_problems(text):
    """Problems with tables whose numbers are not those of results/*.json, as far as they are printed."""
    problems = []
    for words, rows in tables(text, "results"):
        for keys, (title, *cells) in zip(words.split("|"), rows, strict=True):
            keys = keys.split()
            cells = [cell for cell in cells if re.search(r"\d", cell)]
            if len(cells) != len(keys):
                problems.append(f"{title}: {len(cells)} numbers, the mark names {keys}")
            for key, cell in zip(keys, cells):
                shown = re.findall(r"\d+(?:\.\d+)?", cell)
                true = measured(key)[: len(shown)]
                rounded = [f"{value:.{decimals(number)}f}" for value, number in zip(true, shown)]
                if shown != rounded:
                    problems.append(f"{title}: {cell} is not {key}, {true}")
    return problems


def measured(key):
    """laptop.knn_top1 -> its mean, min and max; laptop.train_seconds.min -> that alone."""
    file, name, *statistics = key.split(".")
    summary = json.loads((ROOT / "results" / f"{file}.json").read_text())["summary"][name]
    return [summary[statistic] for statistic in statistics or ("mean", "min", "max")]


def decimals(number):
    return len(number.partition(".")[2])


def preset_problems(text):
    """Problems with tables of settings: the key, then its value in each preset."""
    problems = []
    for presets, rows in tables(text, "presets"):
        loaded = [config.load(model=preset) for preset in presets.split()]
        for key, *cells in rows:
            section, _, name = key.strip("`").partition(".")
            true = [getattr(getattr(cfg, section, None), name, None) for cfg in loaded]
            true = [list(value) if isinstance(value, tuple) else value for value in true]
            shown = [yaml.safe_load(cell.strip("`")) for cell in cells]
            if shown != true:
                problems.append(f"{key}: {shown} is not {true}")
    return problems


def start_problems(text):
    """Problems with tables of losses before learning: preset, K, ln K, and the terms of a uniform answer."""
    problems = []
    for presets, rows in tables(text, "start"):
        if [row[0].strip("`") for row in rows] != presets.split():
            problems.append(f"the rows are not {presets}")
        for preset, *cells in rows:
            true = losses_at_start(config.load(model=preset.strip("`")))
            if cells != true:
                problems.append(f"{preset}: {cells} is not {true}")
    return problems


def losses_at_start(cfg):
    """Cells of such a row: K, ln K, and the local, global and iBOT terms if every probability is 1 / K."""
    K = cfg.dino.head_n_prototypes
    pairs = 2 * cfg.crops.local_crops_number + 2
    ibot_prototypes = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else K
    ibot = cfg.ibot.mask_sample_probability * cfg.ibot.loss_weight * math.log(ibot_prototypes)
    terms = [math.log(K), math.log(K) * (1 - 2 / pairs), math.log(K) * 2 / pairs, ibot]
    return [f"{K:,}"] + [f"{term:.3f}" for term in terms]


def size_problems(text):
    """Problems with tables of parameters (backbone, head) and of tokens per image (student, teacher)."""
    problems = []
    for models, rows in tables(text, "sizes"):
        columns = zip(*(row[1:] for row in rows))
        for name, shown in zip(models.split(), columns):
            preset, overrides = MODELS[name]
            work = plan.Workload(config.load(model=preset, overrides=overrides))
            backbone = plan.count_parameters(work.model.backbone)
            heads = plan.count_parameters(work.model) - backbone
            true = [backbone, heads, work.tokens(work.crops), work.tokens([work.global_crops])]
            if list(shown) != [f"{number:,}" for number in true]:
                problems.append(f"{name}: {shown} is not {true}")
    return problems


def walkthrough_problems(text):
    """Problems with texts that follow a function: names with () in the order of its calls."""
    problems = []
    for place, part in re.findall(r"<!-- calls: (.*?) -->\n(.*?)(?=^#|\Z)", text, re.S | re.M):
        problems += order_problems(re.findall(r"`(?:\w+\.)*(\w+)\(\)`", part), place)
    return problems


def count_problems(text):
    """Problems with rows `file.py | lines`."""
    problems = []
    for file, shown in re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", text, re.M):
        true = len((ROOT / file).read_text().splitlines()) if (ROOT / file).is_file() else "no"
        if true != int(shown):
            problems.append(f"{file} has {true} lines, not {shown}")
    return problems


# ---------------------------------------------------------------- the tests


def problems_of(path, text):
    """Everything that is wrong with the text of a document."""
    problems = link_problems(text, path) + command_problems(text)
    problems += result_problems(text) + preset_problems(text) + start_problems(text)
    problems += size_problems(text) + count_problems(text) + walkthrough_problems(text)
    for block in diagrams(text):
        problems += diagram_problems(block)
    if path.parent.name == "docs" or path.name in STRICT:
        problems += name_problems(text, path)
    return problems


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document(path):
    problems = problems_of(path, path.read_text())
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("file, true, false", [
    ("README.zh.md", "0.907 (0.904", "0.908 (0.904"), ("README.zh.md", "| 0.113 |", "| |"),
    ("README.zh.md", "| `losses.py` | ", "| `losses.py` | 1"), ("README.zh.md", "`zero_grad()`", "`step()`"),
    ("README.md", "-m evals.linear", "-m evals.linea"), ("README.md", "--to hf", "--to hff"),
    ("docs/README.md", "sources --> scenes", "losses --> scenes"), ("docs/README.md", "](faults", "](fault"),
    ("docs/README.md", "#read)", "#reading)"), ("docs/architecture.md", "(730, 768)", "(731, 768)"),
    ("docs/architecture.md", "| 459,840", "| 459,841"), ("docs/architecture.md", "norm1()", "norm3()"),
    ("docs/attention.md", "heads()", "head()"), ("docs/attention.md", "r2 -->", "r3 -->"),
    ("docs/curation.md", "dedup.radius", "dedup.width"), ("docs/inference.md", "evals/dense.py", "dense.py"),
    ("docs/losses.md", "| 5.545 |", "| 5.546 |"), ("docs/losses.md", "features (2, ", "sizes_ (2, "),
    ("docs/sharding.md", "participant b", "participant c"), ("docs/sharding.md", "gpus=8", "gpu=8"),
    ("docs/training_step.md", "teacher_targets()", "student_targets()"),
    ("docs/v1_and_v2.md", "| 0.996 |", "| 0.9996 |"), ("docs/v1_and_v2.md", "| 640 |", "| 641 |"),
    ("docs/faq.md", "--task seg", "--task segm"), ("docs/faq.md", "vits14_distill", "vits14_distil"),
    ("docs/glossary.md", "losses.py::ibot_loss", "losses.py::ibot"),
    ("CONTRIBUTING.md", "config.UserError", "config.UsersError"),
])  # fmt: skip
def test_a_false_word_is_noticed(file, true, false):
    text = (ROOT / file).read_text()
    assert true in text
    assert problems_of(ROOT / file, text.replace(true, false, 1))


@pytest.mark.parametrize("text", [
    "`train_stepp`", "`train.cantering`", "`optim.*.lr`", "`--no-such-flag`", "`configs/vitx.yaml`",
    "`rain.py`", "`optim.base_lr=fast`", "`losses.py::koleo`", "`lossy.py::koleo_loss`", "`model.Token`",
])  # fmt: skip
def test_a_false_name_is_refused(text):
    assert name_problems(text)
    assert name_problems(f"as in {text}, for instance")


@pytest.mark.parametrize("text", [
    "python train.py --modle vits14", "python train.py --model vits15", "python train.py optim.base_lrr=1",
    "python train.py optim.base_lr=fast", "python train.py student.patch_size=15", "python nothing.py",
    "python -m evals.dense --weights runs/laptop", "python eval_knn.py --k a", "python eval_knn.py --tra x",
    "torchrun --nproc-per-nodes 8 train.py", "torchrun --nproc-per-node 8 train.py --model vits15",
    "A=1 torchrun train.py --resumee", "torchrun -m curation run folder:/x out quality.min_sid=3",
    "python -m curation run folder:/x out quality.min_sid=3", "python -m curation runs folder:/x out",
    "python -m tools.plan gpus=8 gpu=8", "python -m tools.report --bensh", "python -m tools.nothing",
    "python config.py vits15", "python -m pytest tests/test_nothing.py", "python -m train",
    "python x train.py", "python -m pytest tests/docs/test_docs.py::test_nothing",
    "sbatch configs/slurm.sbatch --model vit", "sbatch configs/slum.sbatch", "pip install -r requirement.txt",
    "python -m tools.export runs/laptop --to onnx",
])  # fmt: skip
def test_a_false_command_is_refused(text):
    for written in (f"```\n{text}\n```", f"```\ntrue && {text}\n```", f"see `{text}`"):
        assert len(commands(written)) == 1
        assert command_problems(written)


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
    assert diagram_problems(text)


def test_chinese_readme_has_the_commands_of_the_english_one():
    english = commands((ROOT / "README.md").read_text())
    chinese = commands((ROOT / "README.zh.md").read_text())
    assert len(chinese) > 12
    assert not [" ".join(words) for words in chinese if words not in english]


def test_every_question_has_a_command_and_a_trap():
    head, *answers = re.split(r"^## \d+\. .*[?.]$", (ROOT / "docs" / "faq.md").read_text(), flags=re.M)
    assert len(answers) == 15
    assert "Fifteen" in head
    for answer in answers:
        block = re.search(r"^```\n.*?^```", answer, re.S | re.M)[0]
        assert len(commands(block)) in (1, 2)
        assert answer.count("\nTrap: ") == 1


def test_every_page_is_linked_and_every_word_has_its_place():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index
    rows = re.findall(r"^\| (?!word|-)(.*)", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    assert len(rows) > 30
    assert all(re.search(r"`[\w/]+\.py::[\w.]+` \|$", row) for row in rows)


def test_citation():
    """The fields that the format requires, and four papers. (`cffconvert --validate` checks all of it.)"""
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cff.keys()
    assert cff["cff-version"] == "1.2.0"
    assert cff["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    papers = ("2104.14294", "2111.07832", "2304.07193", "2309.16588")
    identifiers = [reference["identifiers"][0]["value"] for reference in cff["references"]]
    assert identifiers == [f"arXiv:{paper}" for paper in papers]
    for reference in cff["references"]:
        assert reference["title"] and reference["year"] and reference["authors"]


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
    blocks = []
    for path in DOCS:
        blocks += diagrams(path.read_text())
    command = ["node", "--input-type=module", "-e", MERMAID]
    assert subprocess.run([*command, json.dumps(blocks)]).returncode == 0
    broken = [*blocks, "flowchart TB\na["]
    assert subprocess.run([*command, json.dumps(broken)], capture_output=True).returncode
