"""Tests of the tests: the classic mistakes of DINOv2 reimplementations must be caught.

Each is planted in a copy of the source.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL, STEP, LOSSES = "test_model.py", "test_train_step.py", "test_losses.py"
MUTANTS = {  # name: (file, what it says, what the mistake says, tests that must notice)
    "LayerNorm eps 1e-5": ("model.py", "eps=1e-6)", "eps=1e-5)", MODEL),
    "tanh GELU": ("model.py", "F.gelu(self.fc1(x))", "F.gelu(self.fc1(x), approximate='tanh')", MODEL),
    "antialias off": ("model.py", "antialias=self.interpolate_antialias", "antialias=False", MODEL),
    "registers before CLS": ("model.py", "[x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]]",
                             "[self.register_tokens.expand(B, -1, -1), x]", MODEL),
    "unswapped teacher crops": ("losses.py", "targets.flip(0)", "targets", LOSSES),
    "centre updated before use": ("losses.py", "        self.count += len(logits)\n",
                                  "        self.count += len(logits)\n        self.update()\n", LOSSES),
    "unmasked student CLS": ("train.py", "    cls, patches = state.student.heads(",
                             "    tokens = state.student.backbone.forward_crops(crops)\n"
                             "    cls, patches = state.student.heads(", STEP),
    "KoLeo mean instead of sum": ("train.py", "koleo = sum(", "koleo = 0.5 * sum(", STEP),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mistake_is_caught(name, tmp_path):
    file, right, wrong, tests = MUTANTS[name]
    for source in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(source, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for extra in ("kernels",):
        if (ROOT / extra).is_dir():
            shutil.copytree(ROOT / extra, tmp_path / extra)
    (tmp_path / "tests").mkdir()
    for test in (MODEL, tests, "conftest.py"):
        shutil.copy(ROOT / "tests" / test, tmp_path / "tests")
    (tmp_path / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
    text = (tmp_path / file).read_text()
    assert right in text, f"{file} no longer says {right!r}: adapt this mutant"
    (tmp_path / file).write_text(text.replace(right, wrong))
    # Only the comparisons with the authors' numbers: the rest of these files would take its time.
    pick = {MODEL: "five_resolutions", LOSSES: "dino_loss or three_steps", STEP: "whole_step"}[tests]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/{tests}",
        "-k",
        pick,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1 and "AssertionError: relative error" in done.stdout, done.stdout[-2000:]
