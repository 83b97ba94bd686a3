"""The data report: what is said about ordinary data sets, and about those that are not."""

import json

import numpy as np
import pytest
from PIL import Image

import survey
from decode import Reading
from scenes import Scenes
from sources import open_source
from survey import report_data


def write_photos(folder, count=6, size=(40, 30), ending="png", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.{ending}")


def report(folder, fit=None, reading=None):
    return survey.survey_dataset(open_source(f"folder:{folder}", reading), "folder:pile", fit)


def test_one_line_if_all_is_ordinary(tmp_path):
    write_photos(tmp_path / "cat")
    write_photos(tmp_path / "dog", 4)
    (tmp_path / "labels.csv").write_text("not an image")
    found = report(tmp_path, "crop")
    line = "10 images of folder:pile: PNG RGB, 40 x 30 pixels; 2 classes of 4 to 6"
    assert (found.summary, found.warnings) == (line, [])
    assert found.facts["classes"] == dict(cat=6, dog=4)
    assert survey.survey_dataset(Scenes(5), "scenes:5").warnings == []


def test_files_that_are_not_read(tmp_path, monkeypatch):
    write_photos(tmp_path, 2)
    for k in range(7):
        (tmp_path / f"{k}.dcm").write_bytes(b"x")
    monkeypatch.setattr("sources.EXTENSIONS", [".png"])
    (tmp_path / "IMG.HEIC").write_bytes(b"x")
    (warning,) = report(tmp_path).warnings
    assert warning == "8 of 10 files are not read: .dcm 7, .heic 1; pip install pillow-heif"


def test_stacks_damage_and_flat_images(tmp_path):
    write_photos(tmp_path, 3)
    pages = [Image.new("L", (32, 32), shade) for shade in (9, 80, 200)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "torn.png").write_bytes(b"no image")
    said = "\n".join(report(tmp_path).warnings)
    assert "1 of 5 images have several pages, up to 3: only the first is read" in said
    assert "1 of 5 images cannot be read, such as" in said and "torn.png" in said
    assert "1 of 5 images are almost without contrast" in said


def test_what_the_crop_cuts_off(tmp_path):
    write_photos(tmp_path, 6, (200, 20))
    (warning,) = report(tmp_path, "crop").warnings
    assert "leaves out more than a third of 6 of 6 images that" in warning and "evaluation.fit" in warning
    assert report(tmp_path, "pad").warnings == []


def test_the_range_is_told(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    numbers = np.random.default_rng(0).integers(0, 4095, (32, 32)).astype(np.uint16)
    Image.fromarray(numbers).save(tmp_path / "a.png")
    found = report(tmp_path, reading=Reading(range=(0, 4095)))
    assert found.summary.endswith("uint16 of 1 band, 32 x 32 pixels; 0 becomes black, 4095 white")
    assert found.facts["range"] == [0, 4095]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
def test_a_resumed_run_says_when_the_data_set_has_changed(tmp_path, capsys, damage):
    write_photos(tmp_path / "pile", 3)
    report_data(open_source(f"folder:{tmp_path}/pile"), "folder:pile", tmp_path)
    report_data(open_source(f"folder:{tmp_path}/pile"), "folder:pile", tmp_path)
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "survey.json").read_text())["images"] == 3
    write_photos(tmp_path / "pile", 5)
    report_data(open_source(f"folder:{tmp_path}/pile"), "folder:pile", tmp_path)
    said = capsys.readouterr().err
    assert "the data set has changed since the last part of this run: 3 images before, 5 now" in said
    (tmp_path / "survey.json").write_text(damage)
    report_data(open_source(f"folder:{tmp_path}/pile"), "folder:pile", tmp_path)
    assert capsys.readouterr().err == ""
