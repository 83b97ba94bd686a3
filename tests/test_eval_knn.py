"""Weighted k-NN against the authors' (tests/golden), and the command."""

import io
import re
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from helpers import (
    assert_close,
    check_printed_predictions,
    load_golden,
    make_color_sets,
    write_flat_images,
    write_noise_images,
)
from PIL import Image

import config
import eval_knn
from config import UserError
from eval_knn import (
    KNNEvaluator,
    calibration,
    knn_accuracy,
    knn_pixels,
    knn_predict,
    knn_scores,
    majority_accuracy,
    open_eval_sets,
)

KS = (5, 10, 20, 100)
BANK = torch.eye(4).repeat(3, 1)  # three times each of four directions,
LABELS = torch.arange(4).repeat(3)  # a class each


def test_votes_are_the_authors():
    golden = load_golden("j_knn")
    labels = golden["train_labels"].long()
    scores = knn_scores(golden["train_features"], labels, golden["test_features"], 10, ks=KS, chunk=7)
    for k in KS:
        assert_close(scores[k], golden[f"scores_k{k}"])


def test_accuracy_and_small_banks():
    found = knn_accuracy(BANK, LABELS, torch.eye(4), torch.arange(4), ks=(1, 3, 200))
    assert found == {1: 1.0, 3: 1.0, 12: 1.0}
    assert majority_accuracy(torch.tensor([0, 0, 0, 1])) == pytest.approx(0.75)


def test_votes_sum_to_one_and_name_the_voters():
    predicted, share, neighbours = knn_predict(BANK, LABELS, 5 * torch.eye(4), k=3)
    assert predicted.tolist() == [0, 1, 2, 3]
    assert LABELS[neighbours].tolist() == [[label] * 3 for label in range(4)]
    torch.testing.assert_close(share, torch.ones(4))
    _, share, _ = knn_predict(BANK, LABELS, torch.ones(1, 4), k=12)  # as near to all
    torch.testing.assert_close(share, torch.tensor([0.25]))


def test_calibration_against_a_loop():
    torch.manual_seed(0)
    share = torch.rand(500)
    right = torch.rand(500) < share**2
    error, table = calibration(share, right, bins=5)
    expected = 0
    for i, (mean_share, accuracy, count) in enumerate(table):
        in_bin = [case for case in range(500) if i / 5 <= share[case] < (i + 1) / 5]
        assert count == len(in_bin)
        assert mean_share == pytest.approx(share[in_bin].mean().item(), abs=1e-6)
        assert accuracy == pytest.approx(right[in_bin].float().mean().item())
        expected += count / 500 * abs(mean_share - accuracy)
    assert error == pytest.approx(expected, abs=1e-6)
    assert error > 0.1


def test_calibration_of_the_honest_and_of_the_liar():
    right_half_of_the_time = torch.arange(100) % 2 == 0
    error, _ = calibration(torch.full((100,), 0.5), right_half_of_the_time)
    assert error == pytest.approx(0)
    error, table = calibration(torch.ones(100), right_half_of_the_time)
    assert error == pytest.approx(0.5)
    assert table[-1] == (1.0, 0.5, 100)  # 1.0 lies in the last bin, not behind it


def test_predict_names_class_and_share(tmp_path, monkeypatch, capsys):
    """Even a random network tells flat colours apart; an unreadable image is left out and named."""
    args, photos = make_color_sets(tmp_path)
    argv = ["eval_knn.py", *args, "--predict"]
    monkeypatch.setattr(sys, "argv", [*argv, *photos])
    eval_knn.main()
    check_printed_predictions(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", [*argv, photos[1]])
    with pytest.raises(UserError, match="none of these images can be read"):
        eval_knn.main()


# ---------------------------------------------------------------- which images: classes, copies, a split


def eval_sets(train, test="", *overrides, limit=0):
    paths = [f"evaluation.train_path={train}", f"evaluation.test_path={test}"]
    return open_eval_sets(config.load(model="debug", overrides=[*paths, *overrides]), limit)


def names_of(images):
    return [images.dataset.name(i) for i in images.indices]


def class_names_of(images):
    return [images.dataset.classes[images[i][1]] for i in range(len(images))]


def write_classes(folder, names, count=4, shade=0):
    """Folders of differing images: a white stripe on dark red; its place tells the class."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (32, 32), (2 * i + shade, 0, 0))
            image.paste("white", (0, 2 * number, 32, 2 * number + 2))
            image.save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def test_the_two_sides_are_compared_by_name(tmp_path):
    """Folders 1 to 12 and a tar whose .cls hold 1 to 12, in another order: the same classes."""
    names = [str(number) for number in range(1, 13)]
    train = write_classes(tmp_path / "train", names)
    write_classes(tmp_path / "test", names, shade=5)
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        for name in reversed(names):
            for extension, content in ((".png", (tmp_path / "test" / name / "0.png").read_bytes()),
                                       (".cls", name.encode())):  # fmt: skip
                member = tarfile.TarInfo(name + extension)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    bank, queries = eval_sets(train, f"tar:{tmp_path}/test.tar")
    assert class_names_of(queries) == names[::-1]
    assert knn_pixels(bank, queries, ks=(1,)) == {1: 1.0}


def test_queries_may_lack_classes_and_may_not_have_more(tmp_path):
    train = write_classes(tmp_path / "train", ["ant", "bee", "cat"])
    few = write_classes(tmp_path / "few", ["bee", "cat"], shade=5)
    bank, queries = eval_sets(train, few)
    assert class_names_of(queries) == 4 * ["bee"] + 4 * ["cat"]
    assert queries.dataset.classes == bank.dataset.classes
    with pytest.raises(UserError, match="train has classes that are unknown .ant"):
        eval_sets(few, train)
    with pytest.raises(UserError, match="compared by name"):
        eval_sets(train, "scenes:20")


def test_the_same_images_on_both_sides_are_refused(tmp_path):
    train = write_classes(tmp_path / "train", ["a", "b"])
    with pytest.raises(UserError, match="8 of 8 test images are training images too.*to split the train"):
        eval_sets(train, train)
    shutil.copytree(tmp_path / "train", tmp_path / "copy")
    with pytest.raises(UserError, match="8 of 8"):
        eval_sets(train, f"folder:{tmp_path}/copy")
    with pytest.raises(UserError, match="20 of 20 test images.*scene 0 of seed 3"):
        eval_sets("scenes:50:seed=3", "scenes:20:seed=3")
    eval_sets("scenes:50:seed=3", "scenes:20:seed=4")


def test_what_cannot_be_read_is_no_copy(tmp_path):
    train = write_classes(tmp_path / "train", ["a", "b"])
    test = write_classes(tmp_path / "test", ["a", "b"], shade=5)
    for name in ("train", "test"):
        (tmp_path / name / "a" / "empty.png").touch()
    eval_sets(train, test)


def test_one_copy_in_hundreds_is_a_note(tmp_path, capsys):
    write_noise_images(tmp_path / "train", 3)
    train = tmp_path / "train" / "noise"
    train.mkdir()
    for file in (tmp_path / "train").glob("*.png"):
        file.rename(train / file.name)
    test = tmp_path / "test" / "noise"
    write_flat_images(test, 120)
    for i, file in enumerate(test.iterdir()):
        file.write_bytes(file.read_bytes() + bytes([i]))  # all differ
    shutil.copy(train / "0.png", test / "copy.png")
    eval_sets(f"folder:{tmp_path}/train", f"folder:{tmp_path}/test")
    assert "1 of 121 test images are training images too" in capsys.readouterr().err


def test_one_folder_is_split_by_class(tmp_path, capsys):
    uri = write_classes(tmp_path / "all", ["a", "b"], count=8)
    write_classes(tmp_path / "all", ["single"], count=1, shade=3)
    for i in range(5):
        shutil.copy(tmp_path / "all" / "a" / "0.png", tmp_path / "all" / "b" / f"copy{i}.png")
    bank, queries = eval_sets(uri)
    assert "4 queries, 13 images in the bank; 5 copies of others are left out" in capsys.readouterr().out
    assert sorted(class_names_of(queries)) == ["a", "a", "b", "b"]
    assert sorted(class_names_of(bank)) == 6 * ["a"] + 6 * ["b"] + ["single"]
    assert len({*names_of(bank), *names_of(queries)}) == 17
    again = eval_sets(uri)
    assert [names_of(images) for images in again] == [names_of(bank), names_of(queries)]
    others = eval_sets(uri, "", "evaluation.split_seed=1")
    assert names_of(others[1]) != names_of(queries)
    bank, queries = eval_sets(uri, "", "evaluation.split=0.5", limit=4)
    assert len(bank) == len(queries) == 4
    with pytest.raises(UserError, match="no class has two different images"):
        eval_sets(write_classes(tmp_path / "none", ["a", "b"], count=1))


def test_scenes_are_split_too():
    bank, queries = eval_sets("scenes:40:seed=3")
    assert len(bank) + len(queries) == 40
    assert set(class_names_of(queries)) <= set(class_names_of(bank))


def test_a_run_with_one_labelled_folder_evaluates_on_its_split(tmp_path):
    uri = write_classes(tmp_path / "all", ["a", "b"], count=8)
    options = [f"evaluation.train_path={uri}", "evaluation.test_path=", "evaluation.online_limit=2"]
    evaluator = KNNEvaluator(config.load(model="debug", overrides=options))
    assert [len(images) for images in evaluator.sets] == [12, 4]
    assert [len(images) for images in evaluator.online_sets] == [2, 2]


def test_train_alone_is_split_by_the_command(tmp_path, monkeypatch, capsys):
    """And not compared with the scenes of the run; the header says what the network sees."""
    args, _ = make_color_sets(tmp_path)
    weights = args[:2]
    train = ["--train", f"folder:{tmp_path}/test"]
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", *weights, *train, "--image-size", "32"])
    eval_knn.main()
    printed = capsys.readouterr().out
    assert "8 images in the bank, 4 queries, 32 pixels out of 32" in printed
    assert "this backbone           1.000" in printed
    both = ["--test", f"folder:{tmp_path}/train", "--split", "0.5", "--split-seed", "3"]
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", *weights, *train, *both])
    with pytest.raises(UserError, match="leave out --test"):
        eval_knn.main()


@pytest.mark.parametrize(
    "argument", ["--k=0", "--k=-1", "--image-size=-8", "--limit=-1", "--split=2", "--k=x"]
)
def test_numbers_out_of_range_are_one_sentence(monkeypatch, capsys, argument):
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", argument])
    with pytest.raises(SystemExit):
        eval_knn.main()
    assert "must be a" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- rare classes, and what is unlike the bank


def test_a_rare_class_is_not_hidden(capsys):
    """190 of the common class found, none of the rare one: accuracy 0.95, balanced accuracy 0.5."""
    predicted = torch.zeros(200, dtype=torch.long)
    labels = torch.tensor([0] * 190 + [1] * 10)
    eval_knn.print_recall(predicted, labels, ["normal", "tumour", "cyst"])
    said = capsys.readouterr().out
    assert "no query is of class cyst\n" in said
    assert "balanced accuracy 0.500" in said
    assert re.search(r"tumour +0.000 of 10\n  normal +1.000 of 190", said)
    eval_knn.print_recall(predicted[:20], labels[-20:] * 0 + torch.arange(20) % 2, ["normal", "tumour"])
    assert "balanced" not in capsys.readouterr().out


def test_how_far_from_everything():
    """Against a loop; an image of the bank is near, one across from all of them is farther than all."""
    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(40, 5) + 3, dim=-1)
    queries = torch.cat([torch.randn(6, 5) + 3, bank[:1], -bank[:1]])
    ranks = eval_knn.distance_rank(bank, queries, chunk=16)
    similarity = bank @ bank.T - 3 * torch.eye(40)
    for query, rank in zip(torch.nn.functional.normalize(queries, dim=-1), ranks.tolist()):
        own = (bank @ query).max()
        assert rank == pytest.approx((similarity.amax(1) > own).float().mean().item(), abs=0.03)
    assert ranks[-2] < 0.05
    assert ranks[-1] == 1
    some = eval_knn.distance_rank(bank, queries, most=20)  # of every second image
    for query, rank in zip(torch.nn.functional.normalize(queries, dim=-1), some.tolist()):
        own = (bank @ query).max()
        assert rank == pytest.approx((similarity.amax(1)[::2] > own).float().mean().item(), abs=0.06)


def test_right_in_so_many_cases_is_per_class():
    share = torch.tensor([0.95] * 100)
    right = torch.tensor([True] * 98 + [False] * 2)
    assert eval_knn.hit_rate(share, right, 0.97) == (pytest.approx(0.98), 100)
    assert eval_knn.hit_rate(share[98:], right[98:], 0.97) == (0, 2)
    assert eval_knn.hit_rate(share[:0], right[:0], 0.97)[1] == 0


# ---------------------------------------------------------------- whole images, and sensors' numbers


def write_long_classes(folder, seed):
    """120 x 12 pixels; only the two ends tell the four classes apart."""
    rng = np.random.default_rng(seed)
    for label in range(4):
        (folder / str(label)).mkdir(parents=True)
        for k in range(12):
            pixels = np.full((12, 120, 3), 110.0) + rng.normal(0, 6, (12, 120, 3))
            pixels[:, :24, 2 * (label & 1)] += 90
            pixels[:, -24:, 1 - (label >> 1)] += 90
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / str(label) / f"{k}.png")
    return f"folder:{folder}"


def test_the_ends_of_long_images_are_seen_if_asked_for(tmp_path, capsys):
    train = write_long_classes(tmp_path / "train", 0)
    test = write_long_classes(tmp_path / "test", 1)
    sizes = ["evaluation.image_size=32", "evaluation.resize_size=32"]
    found = {}
    for fit in ("crop", "resize", "pad"):
        bank, queries = eval_sets(train, test, *sizes, f"evaluation.fit={fit}")
        found[fit] = max(eval_knn.knn_pixels(bank, queries, ks=(5,)).values())
        assert ("leaves out more than a third" in capsys.readouterr().err) == (fit == "crop")
    assert found["crop"] < 0.5
    assert found["resize"] == 1
    assert found["pad"] > 0.9


def test_one_range_for_bank_and_queries(tmp_path):
    for name, gain in (("train", 4095), ("test", 2000)):
        for label in range(2):
            (tmp_path / name / str(label)).mkdir(parents=True)
            for k in range(4):
                numbers = np.random.default_rng(k).random((32, 32)) * gain / (label + 1)
                Image.fromarray(numbers.astype(np.uint16)).save(tmp_path / name / str(label) / f"{k}.png")
    cfg = config.load(model="debug", overrides=[f"evaluation.train_path=folder:{tmp_path}/train",
                                                f"evaluation.test_path=folder:{tmp_path}/test"])  # fmt: skip
    bank, queries = open_eval_sets(cfg)
    assert bank.dataset.reading.range == queries.dataset.reading.range == cfg.data.range
    assert queries[0][0].float().mean() < 0.7 * bank[0][0].float().mean()
    again = config.load(overrides=[f"data.range={list(cfg.data.range)}"])
    assert again.data.range == cfg.data.range  # as a run's config.yaml has it
