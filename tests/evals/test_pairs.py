"""Masks as labelling tools write them: numbers, black and white, palettes, colours, JPEG, orientations."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from config import UserError
from decode import BadImage
from evals import dense
from evals.dense import class_names, parse_settings
from evals.pairs import Pairs, read_depth, read_mask, survey_masks, turn_upright, untrained_classes
from model import VisionTransformer

MASKS = [np.array([[0, 1, 1], [0, 0, 1]], np.uint8), np.array([[1, 0, 0], [1, 1, 0]], np.uint8)]
PALETTE = [0, 0, 0, 200, 30, 60]
COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)


def palette_image(mask):
    image = Image.fromarray(mask, "P")
    image.putpalette(PALETTE)
    return image


def opaque(mask, mode):
    image = Image.fromarray(mask).convert(mode)
    image.putalpha(255)
    return image


KINDS = {
    "numbers": Image.fromarray,
    "black and white": lambda mask: Image.fromarray(mask * 255),
    "one bit": lambda mask: Image.fromarray(mask * 255).convert("1"),
    "palette": palette_image,
    "16 bits": lambda mask: Image.fromarray(mask.astype(np.uint16)),
    "16 bits black and white": lambda mask: Image.fromarray(mask.astype(np.uint16) * 65535),
    "black and red": lambda mask: Image.fromarray(COLORS[mask]),
    "numbers as RGB": lambda mask: Image.fromarray(mask).convert("RGB"),
    "black and white as RGB": lambda mask: Image.fromarray(mask * 255).convert("RGB"),
    "opaque RGBA": lambda mask: opaque(mask * 255, "RGBA"),
    "opaque LA": lambda mask: opaque(mask, "LA"),
}
EVIDENT = {
    "black and white": "values in the masks: 0 is class 0, 255 is class 1",
    "16 bits black and white": "values in the masks: 0 is class 0, 65535 is class 1",
    "black and red": "colours in the masks: #000000 is class 0, #ff0000 is class 1",
    "black and white as RGB": "values in the masks: 0 is class 0, 255 is class 1",
    "opaque RGBA": "values in the masks: 0 is class 0, 255 is class 1",
}


def write_pairs(folder, masks, draw=Image.fromarray, extension="png", exif=None):
    """Images of noise and their masks, as `draw(mask (h, w))` makes them -> the URI.

    With `exif`, an orientation, images are JPEG files that are upright when they are turned so, and as large
    as the masks as they are stored.
    """
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(len(str(folder)))
    for i, mask in enumerate(masks):
        noise = Image.fromarray(rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8))
        if exif:
            orientation = Image.Exif()
            orientation[0x0112] = exif
            noise.save(folder / "images" / f"{i}.jpg", exif=orientation)
        else:
            noise.save(folder / "images" / f"{i}.png")
        draw(mask).save(folder / "masks" / f"{i}.{extension}")
    return f"pairs:{folder}/images:{folder}/masks"


def mask_settings(uri, classes=2, *words):
    sets = ["--train", uri, "--test", uri, "--classes", str(classes)]
    settings = parse_settings(["--task", "seg", *sets, *words])
    settings.names = class_names(settings)
    return settings


def surveyed(uri, classes=2, *words):
    pairs = Pairs(uri, mask_settings(uri, classes, *words))
    survey_masks([pairs], pairs.settings)
    return pairs


# ---------------------------------------------------------------- values and colours


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind_are_the_same_classes(kind, tmp_path, capsys):
    pairs = surveyed(write_pairs(tmp_path, MASKS, KINDS[kind]))
    for i, mask in enumerate(MASKS):
        truth = pairs[i][1]
        assert truth.dtype == torch.int16
        assert truth.tolist() == mask.tolist()
    assert capsys.readouterr().out.strip() == EVIDENT.get(kind, "")


def test_255_is_void_beside_0_and_1(tmp_path, capsys):
    mask = np.array([[0, 1, 255]], np.uint8)
    assert surveyed(write_pairs(tmp_path, [mask]))[0][1].tolist() == [[0, 1, -1]]
    assert capsys.readouterr().out == ""


def test_black_and_white_in_one_set_and_numbers_in_the_other_are_refused(tmp_path):
    white = write_pairs(tmp_path / "a", MASKS, KINDS["black and white"])
    numbers = write_pairs(tmp_path / "b", MASKS)
    settings = mask_settings(white)
    message = r"a/masks has masks of black and white, yet .* they hold 0, 1, 255: write class 1 as 1"
    for sets in ((white, numbers), (numbers, white)):
        with pytest.raises(UserError, match=message):
            survey_masks([Pairs(uri, settings) for uri in sets], settings)
    empty = write_pairs(tmp_path / "c", [np.zeros((2, 3), np.uint8)])  # without an object, it fits to both
    survey_masks([Pairs(white, settings), Pairs(empty, settings)], settings)
    assert settings.class_values == [0, 255]


def test_colours_are_classes_in_order_over_all_sets(tmp_path, capsys):
    red_only = write_pairs(tmp_path / "a", MASKS, KINDS["black and red"])
    all_three = write_pairs(tmp_path / "b", [np.array([[2, 1, 0]], np.uint8)], KINDS["black and red"])
    settings = mask_settings(red_only, 3)
    train = Pairs(red_only, settings)
    test = Pairs(all_three, settings)
    survey_masks([train, test], settings)
    listed = "colours in the masks: #000000 is class 0, #00ff00 is class 1, #ff0000 is class 2\n"
    assert capsys.readouterr().out == listed
    assert train[0][1].tolist() == (MASKS[0] * 2).tolist()
    assert test[0][1].tolist() == [[1, 2, 0]]
    Image.new("RGB", (3, 2), (9, 9, 8)).save(tmp_path / "new.png")
    message = "colour #090908, on 100.00% of the pixels, is none of #000000, #00ff00, #ff0000"
    with pytest.raises(BadImage, match=message):
        read_mask(tmp_path / "new.png", settings)


def test_black_is_void_on_request(tmp_path, capsys):
    uri = write_pairs(tmp_path, [np.array([[2, 1, 0]], np.uint8)], KINDS["black and red"])
    pairs = surveyed(uri, 2, "--ignore", "0")
    assert pairs[0][1].tolist() == [[0, 1, -1]]
    assert "#00ff00 is class 0, #ff0000 is class 1, #000000 is void" in capsys.readouterr().out
    numbers = write_pairs(tmp_path / "white", MASKS, KINDS["black and white"])
    assert surveyed(numbers, 2, "--ignore", "0").settings.class_values == []


@pytest.mark.parametrize("classes, colours", [(2, 3), (4, 3), (3, 2)])
def test_more_or_fewer_colours_than_classes_are_refused(classes, colours, tmp_path):
    uri = write_pairs(tmp_path, [np.arange(colours, dtype=np.uint8)[None]], KINDS["black and red"])
    message = rf"RGB of {colours} colours \(#000000, .*ff0000\), not of {classes}, one for each class: save"
    with pytest.raises(UserError, match=message):
        surveyed(uri, classes)


def test_photographs_are_no_masks(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    uri = write_pairs(tmp_path, [np.zeros((40, 40), np.uint8)], lambda mask: Image.fromarray(noise))
    with pytest.raises(UserError, match="RGB of more than a thousand colours"):
        surveyed(uri)


def test_a_head_that_knows_numbers_takes_no_colours(tmp_path):
    uri = write_pairs(tmp_path, MASKS, KINDS["black and red"])
    with pytest.raises(UserError, match="this head knows classes by number"):
        surveyed(uri, 2, "--head", "head.pth")


def test_palettes_that_number_colours_differently_are_refused(tmp_path):
    uri = write_pairs(tmp_path, MASKS, palette_image)
    swapped = Image.fromarray(1 - MASKS[1], "P")
    swapped.putpalette(PALETTE[3:] + PALETTE[:3])
    swapped.save(tmp_path / "masks" / "1.png")
    with pytest.raises(UserError, match=r"has index 0 in .*1.png, but 1 in .*0.png: palettes differ"):
        surveyed(uri)


def test_jpeg_masks_are_refused(tmp_path):
    uri = write_pairs(tmp_path, MASKS, KINDS["black and white"], "jpg")
    with pytest.raises(UserError, match=r"no mask of .*: .*1.jpg: it is a JPEG, .*: save it as PNG"):
        surveyed(uri)
    disguised = tmp_path / "masks" / "x.png"
    Image.new("L", (3, 2)).save(disguised, "JPEG")
    with pytest.raises(BadImage, match="it is a JPEG"):
        read_mask(disguised, mask_settings(uri))


def test_transparent_masks_are_refused(tmp_path):
    Image.new("RGBA", (3, 2), (255, 0, 0, 128)).save(tmp_path / "x.png")
    with pytest.raises(BadImage, match="transparent: save it without an alpha channel"):
        read_mask(tmp_path / "x.png", mask_settings("pairs:a:b"))


def test_instances_are_refused(tmp_path):
    numbered = [mask * (i + 1) for i, mask in enumerate(MASKS * 6)]
    uri = write_pairs(tmp_path, numbered)
    pairs = surveyed(uri)
    with pytest.raises(UserError, match=r"is neither a class \(0 to 1\) nor void \(255\).*number instances"):
        [pairs[i] for i in range(len(pairs))]


def test_one_class_is_nothing_to_learn(tmp_path):
    uri = write_pairs(tmp_path, MASKS, KINDS["black and white"])
    settings = mask_settings(uri, 3)
    [values] = survey_masks([Pairs(uri, settings)], settings)
    with pytest.raises(UserError, match=r"a single class \(values 0, 255\): see --classes \(2 reads"):
        untrained_classes(values, settings)
    with pytest.raises(UserError, match="--classes 1 leaves nothing to tell apart"):
        mask_settings(uri, 1)
    white = np.full((2, 3), 255, np.uint8)
    void = write_pairs(tmp_path / "void", [white])
    with pytest.raises(UserError, match="void/masks has a class, all are void"):
        surveyed(void)


# ---------------------------------------------------------------- EXIF orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_upright_is_pillows(orientation):
    plane = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image = Image.fromarray(plane)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert turn_upright(torch.from_numpy(plane), orientation).tolist() == expected.tolist()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_in_the_frame_of_the_stored_image_is_turned_with_it(orientation, tmp_path, capsys):
    pairs = surveyed(write_pairs(tmp_path, MASKS, exif=orientation))
    image, truth = pairs[0]
    assert image.size == (2, 3)
    assert truth.tolist() == turn_upright(torch.from_numpy(MASKS[0]), orientation).tolist()
    printed = capsys.readouterr().out
    assert f"2 of 2 images of {pairs.uri} carry an EXIF orientation" in printed
    assert "2 of their masks fit the stored image alone, and are turned with it" in printed


def test_a_mask_in_the_frame_of_the_upright_image_stays(tmp_path, capsys):
    pairs = surveyed(write_pairs(tmp_path, MASKS, lambda mask: Image.fromarray(mask.T.copy()), exif=6))
    assert pairs[0][1].tolist() == MASKS[0].T.tolist()
    assert "2 of their masks fit the upright image alone, and stay as they are" in capsys.readouterr().out


def test_a_mask_that_fits_both_ways_is_upright(tmp_path, capsys):
    square = np.array([[0, 1], [0, 0]], np.uint8)
    pairs = surveyed(write_pairs(tmp_path, [square], exif=6))
    assert pairs[0][1].tolist() == square.tolist()
    printed = capsys.readouterr().out
    assert "1 of 1 images" in printed
    assert "1 fit both, and count as drawn on the upright image" in printed
    assert "remove the orientation from the images" in printed


def test_a_mask_that_fits_both_ways_goes_with_the_others(tmp_path, capsys):
    square = np.array([[0, 1], [0, 0]], np.uint8)
    pairs = surveyed(write_pairs(tmp_path, [square, MASKS[0]], exif=6))
    assert pairs[0][1].tolist() == np.rot90(square, -1).tolist()
    assert "1 fit both, and are turned like those" in capsys.readouterr().out


def test_the_orientation_of_the_mask_itself_is_applied(tmp_path):
    orientation = Image.Exif()
    orientation[0x0112] = 6
    palette_image(MASKS[0]).save(tmp_path / "m.png", exif=orientation)
    expected = np.rot90(MASKS[0], -1)
    truth = read_mask(tmp_path / "m.png", mask_settings("pairs:a:b"))
    assert truth.tolist() == expected.tolist()
    millimetres = MASKS[0].astype(np.uint16) * 1000 + 1000
    Image.fromarray(millimetres).save(tmp_path / "d.png", exif=orientation)
    depth = read_depth(tmp_path / "d.png", parse_settings(["--task", "depth"]))
    assert depth.tolist() == (expected + 1.0).tolist()


def test_a_mask_of_another_shape_is_refused(tmp_path):
    pairs = surveyed(write_pairs(tmp_path, MASKS, exif=6))
    Image.fromarray(np.zeros((4, 3), np.uint8)).save(tmp_path / "masks" / "0.png")
    assert pairs[0] is None
    assert "0.png: 3 x 4 pixels, but its image has 2 x 3: make them equal" in pairs.bad[0]


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = VisionTransformer(24, 2, 2, patch_size=4, img_size=16, num_register_tokens=2, init_std=0.1)
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(dict(teacher=model.state_dict(), arch=model.arch), path)
    return str(path)


def stripes(labels):
    return np.repeat(np.array(labels, np.uint8)[None], 16, 0).repeat(4, 1)


def test_the_command_names_absent_classes(weights, tmp_path, capsys):
    train = write_pairs(tmp_path / "train", [stripes([0, 1, 2, 4])] * 4)
    test = write_pairs(tmp_path / "test", [stripes([0, 0, 1, 3])] * 3)
    words = ["--task", "seg", "--weights", weights, "--classes", "5", "--size", "16", "--iterations", "3"]
    out = tmp_path / "out"
    dense.main([*words, "--train", train, "--test", test, "--out", str(out)])
    printed = capsys.readouterr().out
    absent = "mIoU over 2 of 5 classes; no pixel of class 2, class 4 in the test masks; no pixel of class 3"
    assert f"{absent} in the training masks" in printed
    counted = printed.split("IoU: ")[1].split("\n")[0]
    ious = [float(part.split()[-1]) for part in counted.split(", ")]
    mean = printed.split("this backbone")[1].split()[0]
    assert float(mean) == pytest.approx(np.mean(ious), abs=0.006)
    head = ["--head", str(out / "head.pth"), "--train", train, "--test", test]
    dense.main(["--task", "seg", "--weights", weights, *head])  # the file knows the training masks
    assert f"{absent} in the training masks" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["black and white", "black and red"])
def test_a_head_keeps_the_values_of_its_classes(kind, weights, tmp_path, capsys):
    train = write_pairs(tmp_path / "train", [stripes([0, 1, 0, 1])] * 4, KINDS[kind])
    test = write_pairs(tmp_path / "test", [stripes([1, 0, 0, 1])] * 3, KINDS[kind])
    words = ["--task", "seg", "--weights", weights]
    words += ["--train", train, "--test", test]
    out = tmp_path / "out"
    dense.main([*words, "--classes", "2", "--size", "16", "--iterations", "3", "--out", str(out)])
    trained = capsys.readouterr().out
    assert EVIDENT[kind] in trained
    dense.main([*words, "--head", str(out / "head.pth")])
    again = capsys.readouterr().out
    assert EVIDENT[kind] in again
    first_row = trained.split("this backbone")[1]
    second_row = again.split("this head")[1]
    assert second_row.split()[0] == first_row.split()[0]


@pytest.mark.parametrize("about", [
    dict(class_values=[0]), dict(class_values=["a", "b"]), dict(untrained=[2])])  # fmt: skip
def test_a_head_with_impossible_classes_is_refused(about):
    with pytest.raises(ValueError, match=next(iter(about))):
        dense.check_class_lists(about, 2)
