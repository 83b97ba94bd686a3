"""tools/audit_scenes.py: baselines that work, and a contact sheet."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tools.audit_scenes import linear_probe, nearest_neighbours

ROOT = Path(__file__).parents[2]


def test_the_baselines_find_what_is_there():
    # The baselines must be low because of the pictures, not because they are broken.
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=600)
    x = np.eye(10)[labels] + rng.normal(0, 0.1, (600, 10))
    for method in (nearest_neighbours, linear_probe):
        assert (method(x[:400], labels[:400], x[400:]) == labels[400:]).mean() > 0.95


def test_sheet(tmp_path):
    page = tmp_path / "sheet.png"
    command = [sys.executable, "-m", "tools.audit_scenes", "--sheet"]
    subprocess.run([*command, str(page)], cwd=ROOT, check=True, capture_output=True)
    assert min(Image.open(page).size) > 500
    nowhere = str(tmp_path / "no" / "a.png")
    lost = subprocess.run([*command, nowhere], cwd=ROOT, capture_output=True, text=True)
    assert lost.returncode == 1 and lost.stderr.startswith("error: ") and "Traceback" not in lost.stderr
