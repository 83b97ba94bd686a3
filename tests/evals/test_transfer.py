"""Label transfer: the class of a patch, who hands it over, the score, the command."""

import numpy as np
import pytest
import torch
from PIL import Image

from config import UserError
from evals import transfer
from evals.dense import DenseFeatures, class_names
from evals.pairs import Pairs
from evals.transfer import labelled_bank, patch_classes, score
from model import Tokens, VisionTransformer

SETS = ["--train", "scenes:12:seed=1:size=32", "--test", "scenes:6:seed=2:size=32", "--size", "32"]


class Oracle(torch.nn.Module):
    """A backbone whose tokens are the mean colours of the patches."""

    patch_size = 8
    arch = dict(embed_dim=3, depth=1, patch_size=8)

    def intermediate(self, images, layers, norm=True):
        colors = torch.nn.functional.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2)
        return [Tokens(colors.mean(1), colors[:, :0], colors)]


def make_settings(train, test, classes, size=32):
    parser = transfer.make_parser()
    words = [
        "--train",
        train,
        "--test",
        test,
        "--classes",
        str(classes),
        "--ignore",
        "9",
        "--size",
        str(size),
    ]
    settings = parser.parse_args(words)
    settings.names = class_names(settings)
    return settings


def write_pairs(folder, seed, classes=3, void=False):
    """Four images of 4 x 4 squares in pure colours, with the number of the colour as the mask."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        squares = rng.integers(0, classes, (4, 4)).astype(np.uint8)
        image = (np.eye(3, dtype=np.uint8) * 255)[squares]
        mask = np.full_like(squares, 9) if void else squares
        Image.fromarray(image).resize((32, 32), Image.NEAREST).save(folder / "images" / f"{seed}_{i}.png")
        Image.fromarray(mask).resize((32, 32), Image.NEAREST).save(folder / "masks" / f"{seed}_{i}.png")
    return f"pairs:{folder}/images:{folder}/masks"


def test_a_patch_has_the_class_that_covers_most_of_it():
    truth = torch.zeros(8, 8, dtype=torch.int16)
    truth[:4, 4:] = 2  # all of the second patch
    truth[4:, :3] = 1  # three quarters of the third
    truth[4:, 4:] = -1
    truth[7, 7] = 1
    pixels = torch.zeros(3, 8, 8)
    assert patch_classes(truth, pixels, 4, 3).tolist() == [[0, 2], [1, -1]]
    enlarged = torch.zeros(3, 16, 16)  # the network sees the image at another size
    assert patch_classes(truth, enlarged, 8, 3).tolist() == [[0, 2], [1, -1]]


def test_patches_of_the_same_colour_hand_over_their_class(tmp_path):
    settings = make_settings(write_pairs(tmp_path / "a", 1), write_pairs(tmp_path / "b", 2), 3)
    train = Pairs(settings.train, settings)
    results = transfer.transfer(DenseFeatures(Oracle(), settings), train, Pairs(settings.test, settings))
    assert len(results) == 4
    perfect = {"patches": 1.0, "not first": 1.0, "mIoU": 1.0, "classes": [1.0, 1.0, 1.0]}
    assert score(results, settings) == perfect
    for pixels, truth, found in results:
        assert pixels.shape == (3, 32, 32)
        assert truth.shape == found.shape == (4, 4)


def test_a_network_that_sees_nothing_hands_over_one_class(tmp_path):
    settings = make_settings(write_pairs(tmp_path / "a", 1), write_pairs(tmp_path / "b", 2), 3)
    blind = Oracle()
    blind.intermediate = lambda images, layers, norm=True: [Tokens(None, None, torch.ones(1, 16, 3))]
    train = Pairs(settings.train, settings)
    results = transfer.transfer(DenseFeatures(blind, settings), train, Pairs(settings.test, settings))
    found = torch.cat([found.flatten() for _, _, found in results])
    assert len(found.unique()) == 1
    assert score(results, settings)["mIoU"] < 0.25


def test_the_score_by_hand():
    truth = torch.tensor([[0, 1], [1, -1]])
    found = torch.tensor([[0, 1], [0, 1]])
    row = score([(None, truth, found)], make_settings("pairs:a:b", "pairs:x:y", 2))
    assert row["patches"] == pytest.approx(2 / 3)
    assert row["not first"] == pytest.approx(1 / 2)
    assert row["mIoU"] == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_a_class_without_a_patch_or_without_training_does_not_count():
    truth = torch.tensor([[0, 1], [1, 3]])
    found = torch.tensor([[0, 1], [2, 0]])  # class 2 is found, but nowhere true
    settings = make_settings("pairs:a:b", "pairs:x:y", 4)
    settings.untrained = [3]
    row = score([(None, truth, found)], settings)
    assert row["classes"][:2] == pytest.approx([1 / 2, 1 / 2])
    assert np.isnan(row["classes"][2:]).all()
    assert row["mIoU"] == pytest.approx(1 / 2)


def test_a_large_bank_is_thinned_evenly(tmp_path, monkeypatch):
    settings = make_settings(write_pairs(tmp_path / "a", 1), "pairs:x:y", 3)
    pairs = Pairs(settings.train, settings)
    features = DenseFeatures(Oracle(), settings)
    tokens, classes = labelled_bank(features, pairs)
    monkeypatch.setattr(transfer, "BANK_PATCHES", 32)  # of 4 x 16
    fewer, their_classes = labelled_bank(features, pairs)
    assert torch.equal(fewer, tokens[::2])
    assert torch.equal(their_classes, classes[::2])


def test_void_masks_are_an_error(tmp_path):
    settings = make_settings(write_pairs(tmp_path / "a", 1, void=True), "pairs:x:y", 3)
    with pytest.raises(UserError, match="all are void: see --classes and --ignore"):
        labelled_bank(DenseFeatures(Oracle(), settings), Pairs(settings.train, settings))
    settings = make_settings(write_pairs(tmp_path / "b", 2), settings.train, 3)
    features = DenseFeatures(Oracle(), settings)
    with pytest.raises(UserError, match=r"a/masks has a class, all are void"):
        transfer.transfer(features, Pairs(settings.train, settings), Pairs(settings.test, settings))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = VisionTransformer(24, 2, 2, patch_size=8, img_size=32, num_register_tokens=2, init_std=0.1)
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(dict(teacher=model.state_dict(), arch=model.arch), path)
    return str(path)


def test_the_command(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    transfer.main(["--weights", weights, *SETS])
    printed = capsys.readouterr().out
    for name in ("this backbone", "raw pixels", "random initialisation"):
        numbers = printed.split(name)[1].split("\n")[0].split()
        assert len(numbers) == 3
        assert all(0 <= float(number) <= 1 for number in numbers)
    sheet = Image.open("runs/transfer/transfer.png")
    assert sheet.width > 5 * 160  # the image, the truth and three networks


def test_the_command_names_absent_classes(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sets = ["--train", write_pairs(tmp_path / "a", 1), "--test", write_pairs(tmp_path / "b", 2, classes=2)]
    transfer.main(["--weights", weights, *sets, "--classes", "4", "--size", "32"])
    absent = "no patch of class 2 in the test masks; no patch of class 3 in the training masks"
    assert f"mIoU over 2 of 4 classes; {absent}" in capsys.readouterr().out


def test_unusable_data_is_refused(weights, tmp_path):
    pairs = write_pairs(tmp_path / "a", 1)
    same = ["--train", pairs, "--test", pairs, "--classes", "3", "--size", "32"]
    with pytest.raises(UserError, match="4 of 4 test images are training images too"):
        transfer.main(["--weights", weights, *same])
    with pytest.raises(UserError, match="how many classes do the masks have"):
        transfer.main(["--weights", weights, "--train", pairs, "--test", pairs])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another --out"):
        transfer.main(["--weights", weights, *SETS, "--out", str(tmp_path / "file" / "x")])
