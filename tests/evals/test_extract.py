"""Extraction to .npz: the tokens of the backbone, killed jobs, other jobs, the command."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_backbone, write_flat_images
from PIL import Image

from config import UserError
from data import normalize
from decode import Reading
from evals import extract
from evals.extract import extract_to_npz
from features import EvalImages
from sources import open_images, open_source


def job(tmp_path, **options):
    """The arguments of a job of nine readable images and, at the end, a broken one."""
    if not (tmp_path / "photos").exists():
        write_flat_images(tmp_path / "photos", 9, bad=1)
    images = EvalImages(open_images([str(tmp_path / "photos")]), 32, **options)
    return dict(out=tmp_path / "f.npz", images=images, batch_size=2)


def test_the_file_holds_the_tokens(tmp_path):
    """Rows of what decodes, in order; the names of what does not; nothing is left beside the file."""
    done = extract_to_npz(backbone=tiny_backbone(), **job(tmp_path))
    found = np.load(tmp_path / "f.npz")
    images = EvalImages(open_images([str(tmp_path / "photos")]), 32)
    with torch.no_grad():
        expected = tiny_backbone()(normalize(torch.stack([images[i][0] for i in range(9)])))
    for name, tokens in expected._asdict().items():
        np.testing.assert_allclose(found[name], tokens.numpy(), atol=1e-5)
    assert found["paths"].tolist() == [str(tmp_path / f"photos/{i}.png") for i in range(9)]
    assert found["labels"].tolist() == 9 * [-1] and done["rows"] == 9
    assert len(found["bad"]) == 1 and "bad0.png" in str(found["bad"][0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "photos"]


def test_labels_have_their_names(tmp_path):
    for name in ("9", "10"):
        write_flat_images(tmp_path / "photos" / name, 2)
    extract_to_npz(backbone=tiny_backbone(), **job(tmp_path))
    found = np.load(tmp_path / "f.npz")
    assert found["classes"][found["labels"]].tolist() == ["10", "10", "9", "9"]  # in the order of the paths
    assert found["classes"].tolist() == ["9", "10"]


def test_half_the_bytes_and_fewer_parts(tmp_path):
    extract_to_npz(backbone=tiny_backbone(), parts=("cls", "patches"), dtype="float16", **job(tmp_path))
    found = np.load(tmp_path / "f.npz")
    assert sorted(found.files) == ["bad", "classes", "cls", "labels", "patches", "paths"]
    assert found["patches"].dtype == np.float16
    assert found["patches"].shape == (9, 16, 32) and np.isfinite(found["patches"]).all()


class Dying(torch.nn.Module):
    """A backbone whose process is killed on its third batch."""

    def __init__(self, backbone):
        super().__init__()
        self.inner = backbone
        self.arch = backbone.arch
        self.calls = 0

    def state_dict(self):
        return self.inner.state_dict()

    def forward(self, images):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return self.inner(images)


@pytest.fixture
def save_every_batch(monkeypatch):
    monkeypatch.setattr(extract, "SAVE_EVERY", 0)


def test_a_killed_job_resumes(tmp_path, save_every_batch):
    extract_to_npz(backbone=tiny_backbone(), **job(tmp_path))
    whole = dict(np.load(tmp_path / "f.npz"))
    (tmp_path / "f.npz").unlink()
    with pytest.raises(KeyboardInterrupt):
        extract_to_npz(backbone=Dying(tiny_backbone()), **job(tmp_path))
    assert not (tmp_path / "f.npz").exists()
    with open(tmp_path / "f.npz.partial" / "cls", "ab") as f:
        f.write(b"torn")  # as much of the third batch as reached the disk
    counted = Dying(tiny_backbone())
    counted.calls = 3  # never again the third
    extract_to_npz(backbone=counted, **job(tmp_path))
    assert counted.calls == 3 + 3  # two batches were done, the last has no readable image
    again = np.load(tmp_path / "f.npz")
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert set(again.files) == set(whole)


def test_another_job_does_not_resume_it(tmp_path, save_every_batch):
    with pytest.raises(KeyboardInterrupt):
        extract_to_npz(backbone=Dying(tiny_backbone()), **job(tmp_path))
    other = tiny_backbone()
    other.norm.weight.data += 1
    for backbone, options in ((other, {}), (tiny_backbone(), dict(fit="pad"))):
        with pytest.raises(UserError, match="f.npz.partial was begun with other images, weights or options"):
            extract_to_npz(backbone=backbone, **job(tmp_path, **options))


@pytest.mark.parametrize("damage", ["list", "brackets", "a text", "too few bytes", "no bad"])
def test_a_damaged_job_is_not_resumed(damage, tmp_path, save_every_batch):
    with pytest.raises(KeyboardInterrupt):
        extract_to_npz(backbone=Dying(tiny_backbone()), **job(tmp_path))
    work = tmp_path / "f.npz.partial"
    state = json.loads((work / "state.json").read_text())
    assert state["rows"] == 4
    texts = {"list": "[]", "brackets": "[" * 9999, "a text": json.dumps(state | {"rows": "4"}),
             "no bad": json.dumps({key: value for key, value in state.items() if key != "bad"})}  # fmt: skip
    if damage == "too few bytes":  # else the end would be filled with zeros
        os.truncate(work / "cls", 4 * 32 * 4 - 1)
    else:
        (work / "state.json").write_text(texts[damage])
    with pytest.raises(UserError, match="f.npz.partial was begun with .* or is damaged: delete it"):
        extract_to_npz(backbone=tiny_backbone(), **job(tmp_path))


def test_where_no_image_can_be_read_there_is_no_file(tmp_path):
    write_flat_images(tmp_path / "photos", 0, bad=3)
    with pytest.raises(UserError, match="none of these 3 images can be read: .*bad0.png"):
        extract_to_npz(backbone=tiny_backbone(), **job(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_names_need_not_be_text(tmp_path):
    write_flat_images(tmp_path / "photos", 1, bad=1)
    for name in ("0.png", "bad0.png"):
        (tmp_path / "photos" / name).rename(tmp_path / "photos" / (os.fsdecode(b"caf\xe9") + name))
    extract_to_npz(backbone=tiny_backbone(), **job(tmp_path))
    found = np.load(tmp_path / "f.npz")
    assert os.fsencode(str(found["paths"][0])).endswith(b"caf\xe90.png")
    assert b"caf\xe9bad0.png: " in os.fsencode(str(found["bad"][0]))


@pytest.mark.parametrize("words", ["--size -8", "--batch-size 0", "--workers -1", "--size 1e9"])
def test_numbers_out_of_range_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["extract.py", "scenes:2", *words.split()])
    with pytest.raises(SystemExit):
        extract.main()
    assert f"argument {words.split()[0]}: " in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch, capsys):
    write_flat_images(tmp_path / "photos", 4, bad=1)
    torch.save({"teacher": tiny_backbone().state_dict(), "arch": {"num_heads": 2}}, tmp_path / "t.pth")
    out = tmp_path / "f.npz"
    argv = ["extract.py", str(tmp_path / "photos"), "--weights", str(tmp_path / "t.pth"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, "--size", "48", "--fit", "pad"])
    extract.main()
    printed = capsys.readouterr().out
    assert "5 images, the whole image padded to 48 x 48 pixels" in printed and "left out:" in printed
    assert np.load(out)["patches"].shape == (4, 36, 32)
    for extra, message in (
        (["--size", "50"], "50 is not a multiple of the patch size, 8"),
        (["--parts", "cls,clss"], "cls,clss"),
        (["--out", "folder"], "--out folder: it must end in .npz"),
    ):
        monkeypatch.setattr(sys, "argv", [*argv, *extra])
        with pytest.raises(UserError, match=message):
            extract.main()
    monkeypatch.setattr(sys, "argv", [*argv, "--out", ""])
    with pytest.raises(SystemExit):  # else it would be the current folder
        extract.main()


def test_a_job_with_another_range_is_another_job(tmp_path):
    """A half-done file of features must not go on with other grey levels."""
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "a.png")
    jobs = set()
    for limits in ((0, 4095), (0, 255), None):
        images = EvalImages(open_source(f"folder:{tmp_path}", Reading(range=limits)), 32)
        jobs.add(extract.job_fingerprint({}, images, ()))
    assert len(jobs) == 3
