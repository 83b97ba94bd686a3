"""The house: what must be opened to understand `python train.py`, and which way imports may point."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ("model.py", "losses.py", "data.py", "train.py")
FOLDERS = ("curation", "evals", "tools")
TOP_LEVEL = sorted(path.name for path in ROOT.glob("*.py"))
PRODUCT = list(TOP_LEVEL)
for folder in ("kernels", *FOLDERS):
    PRODUCT += sorted(f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py"))


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def imported_modules(source):
    """Dotted names of all modules that a source imports, lazy imports included."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def texts_in(source):
    """All literal texts of a source that are one word: names of files and modules, not prose."""
    constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str) and not re.search(r"\s", value)}


def files_used(name):
    """The files of the repository that one file executes: those it imports, or names for a child process."""
    source = text_of(name)
    files = {module.replace(".", "/") + ".py" for module in imported_modules(source)}
    for text in texts_in(source):
        if text.endswith(".py"):  # runpy, subprocess
            files.add(text)
        elif re.fullmatch(r"\w+\.\w+", text):  # python -m folder.module
            files.add(text.replace(".", "/") + ".py")
    return {file for file in files if (ROOT / file).is_file()} - {name}


def reading_closure(start):
    """{file: how many files one must go through to get there}; kernels/ and its specifications apart."""
    depth = {start: 0}
    queue = [start]
    for name in queue:
        for file in sorted(files_used(name)):
            if file not in depth and not file.startswith("kernels/"):
                depth[file] = depth[name] + 1
                queue.append(file)
    return depth


def number_of_lines(name):
    return len(text_of(name).splitlines())


def test_what_must_be_opened_to_understand_train():
    closure = reading_closure("train.py")
    assert len(closure) <= 15
    assert max(closure.values()) <= 3
    assert closure.keys() | {"hubconf.py"} == set(TOP_LEVEL)  # where torch.hub looks for it
    assert sum(map(number_of_lines, closure)) <= 5527  # too many: let it only fall


def test_the_four_core_files_are_an_afternoon():
    assert sum(map(number_of_lines, CORE)) <= 1600


def test_the_core_has_no_forward_references():
    for i, name in enumerate(CORE):
        assert not files_used(name) & set(CORE[i + 1 :])


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_the_top_level_needs_no_folder_but_kernels(name):
    assert not {file.split("/")[0] for file in files_used(name) if "/" in file} - {"kernels"}


@pytest.mark.parametrize("name", PRODUCT)
def test_the_product_needs_neither_tests_nor_documents(name):
    roots = {module.split(".")[0] for module in imported_modules(text_of(name))}
    assert not roots & {"tests", "helpers", "conftest", "labs", "results"}
    assert not [text for text in texts_in(text_of(name)) if re.search(r"README|tests/", text)]


def test_a_lazy_import_or_a_script_run_by_name_counts(tmp_path, monkeypatch):
    command = "subprocess.run([sys.executable, '-m', 'tools.d'])"
    (tmp_path / "a.py").write_text(f"def f():\n    import b\n    runpy.run_path('c.py')\n    {command}\n")
    (tmp_path / "tools").mkdir()
    for name in ("b", "c", "tools/d"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert reading_closure("a.py") == {"a.py": 0, "b.py": 1, "c.py": 1, "tools/d.py": 1}
