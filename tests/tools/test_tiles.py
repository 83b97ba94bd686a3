"""Cutting large pictures into tiles."""

import sys

import numpy as np
import pytest
from PIL import Image

import decode
from config import UserError
from sources import open_source
from tools import tiles


def slide(path, width=130, height=100):
    """Noise in the upper left quarter, glass elsewhere."""
    pixels = np.full((height, width, 3), 240, np.uint8)
    pixels[:50, :65] = np.random.default_rng(0).integers(0, 255, (50, 65, 3))
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "MAX_PIXELS", 10_000)  # what all other scripts accept
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", decode.MAX_FILE_BYTES)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)

    def call(*words):
        monkeypatch.setattr(
            sys, "argv", ["tiles.py", str(tmp_path / "slide.tif"), str(tmp_path / "out"), *words]
        )
        tiles.main()
        return capsys.readouterr().out

    return call


def test_tiles_are_the_picture(tmp_path, run):
    pixels = slide(tmp_path / "slide.tif")
    with pytest.raises(decode.BadImage, match="130 x 100 pixels, .*python -m tools.tiles"):
        open_source(f"folder:{tmp_path}")[0]
    said = run("--size", "32")
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == [f"slide_r{r:04d}_c{c:04d}.png" for r in range(2) for c in range(3)]  # the rest is glass
    assert "6 tiles" in said
    with Image.open(tmp_path / "out" / "slide_r0001_c0002.png") as tile:
        assert (np.asarray(tile) == pixels[32:64, 64:96]).all()
    run("--size", "32", "--keep-blank")
    assert len(list((tmp_path / "out").iterdir())) == 3 * 4


def test_nothing_to_cut(tmp_path, run):
    slide(tmp_path / "slide.tif")
    with pytest.raises(UserError, match="no tile was written"):
        run("--size", "200")
