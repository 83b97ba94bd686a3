"""Tests of the tests: the classic mistakes of DINOv2 reimplementations must be caught.

Each is planted in a copy of the source.
"""

import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
from helpers import GOLDEN, ROOT, child_environment

# The tests that compare with the authors' numbers; the rest of their files would take its time.
COMPARISONS = {
    "test_model.py": "five_resolutions",
    "test_losses.py": "dino_loss or three_steps",
    "test_train_step.py": "whole_step",
}


class Mutant(NamedTuple):
    file: str
    right: str  # the text in the file
    wrong: str  # the text with the mistake
    tests: str  # the test file that must notice


SEPARATE_PASS = """\
    tokens = state.student.backbone.forward_crops(crops)
    cls, patches = state.student.heads("""

MUTANTS = {
    "LayerNorm eps 1e-5": Mutant("model.py", "eps=1e-6)", "eps=1e-5)", "test_model.py"),
    "tanh GELU": Mutant(
        "model.py", "F.gelu(self.fc1(x))", "F.gelu(self.fc1(x), approximate='tanh')", "test_model.py"
    ),
    "antialias off": Mutant(
        "model.py", "antialias=self.interpolate_antialias", "antialias=False", "test_model.py"
    ),
    "registers before CLS": Mutant(
        "model.py",
        "[x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]]",
        "[self.register_tokens.expand(B, -1, -1), x]",
        "test_model.py",
    ),
    "unswapped teacher crops": Mutant("losses.py", "targets.flip(0)", "targets", "test_losses.py"),
    "centre updated before use": Mutant(
        "losses.py",
        "        self.count += len(logits)\n",
        "        self.count += len(logits)\n        self.update()\n",
        "test_losses.py",
    ),
    "unmasked student CLS": Mutant(
        "train.py", "    cls, patches = state.student.heads(", SEPARATE_PASS, "test_train_step.py"
    ),
    "KoLeo mean instead of sum": Mutant(
        "train.py", "koleo = sum(", "koleo = 0.5 * sum(", "test_train_step.py"
    ),
}


def copy_repository(folder):
    """The part of it that these tests need."""
    for source in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(source, folder)
    for name in ("configs", "kernels"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    for test in (*COMPARISONS, "helpers.py", "conftest.py"):
        shutil.copy(ROOT / "tests" / test, folder / "tests")
    (folder / "tests" / "golden").symlink_to(GOLDEN)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mistake_is_caught(name, tmp_path):
    mutant = MUTANTS[name]
    copy_repository(tmp_path)
    text = (tmp_path / mutant.file).read_text()
    assert mutant.right in text, f"{mutant.file} no longer says {mutant.right!r}: adapt this mutant"
    (tmp_path / mutant.file).write_text(text.replace(mutant.right, mutant.wrong))
    pytest_ = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_, f"tests/{mutant.tests}", "-k", COMPARISONS[mutant.tests]]
    environment = child_environment(PYTHONPATH=str(tmp_path))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout[-2000:]
    assert "AssertionError: relative error" in done.stdout, done.stdout[-2000:]
