"""The page of patches: what is in it, decoded again; and what a browser shows of it, if there is one."""

import base64
import io
import json
import re
import sys
import zlib

import browser
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from config import UserError
from evals import explore, visualize
from evals.patch_maps import patch_attention, patch_tokens, pca_colors
from evals.tiles import COLORMAP
from model import VisionTransformer

DTYPES = dict(code=np.int8, rgb=np.uint8, attention=np.uint8)


def tiny(heads=2, registers=2):
    torch.manual_seed(0)
    size = dict(patch_size=8, img_size=32, num_register_tokens=registers, init_std=0.1)
    backbone = VisionTransformer(16 * heads, 2, heads, **size).eval()
    torch.nn.init.normal_(backbone.register_tokens)  # else they attend to all patches alike
    return backbone


def page_data(text):
    """The data of a page, its bytes as arrays."""
    data = json.loads(re.search(r'id="known">(.*?)</script>', text)[1])
    for photo in data["photos"]:
        for name, dtype in DTYPES.items():
            photo[name] = np.frombuffer(zlib.decompress(base64.b64decode(photo[name])), dtype)
        photo["code"] = photo["code"].reshape(-1, data["D"])
        photo["rgb"] = photo["rgb"].reshape(-1, 3)
        photo["attention"] = photo["attention"].reshape(len(data["tokens"]), len(data["heads"]), -1)
    return data


@pytest.fixture(scope="module")
def made():
    """A backbone, three images of different shapes, the text of their page, its error and number of pairs."""
    backbone = tiny()
    torch.manual_seed(1)
    images = []
    for height, width in ((32, 48), (40, 24), (32, 32)):
        coarse = torch.rand(1, 3, height // 4, width // 4) * 255
        images.append(F.interpolate(coarse, (height, width))[0].byte())
    names = ["first", "</script><b>second & third", "fourth"]
    photos, error, pairs = explore.encode_photos(backbone, images, names)
    return backbone, images, explore.render_page(photos, "About & <about>", backbone), error, pairs


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- what is in the page


def test_cosines_are_those_of_the_backbone(made):
    backbone, images, text, error, pairs = made
    photos = page_data(text)["photos"]
    tokens = [patch_tokens(backbone, image).flatten(0, 1).numpy() for image in images]
    exact = unit(np.concatenate(tokens))
    coded = unit(np.concatenate([photo["code"] for photo in photos]).astype(np.float64))
    errors = np.abs(exact @ exact.T - coded @ coded.T)
    assert 0 < errors.max() < 0.02
    assert (exact @ exact.T).min() < 0.7
    assert error == pytest.approx(errors.max(), abs=1e-5)
    assert pairs == errors.size
    assert [(photo["h"], photo["w"]) for photo in photos] == [(4, 6), (5, 3), (4, 4)]


def test_error_and_size_do_not_depend_on_the_weights():
    """Directions spread evenly over the sphere are the hardest to shorten; a narrow cone, the easiest."""
    torch.manual_seed(0)
    noise = torch.randn(37 * 37, 384)
    sizes = []
    for tokens in (noise, noise + 3, noise * torch.logspace(0, -3, 384)):
        codes = explore.quantize_tokens(100 * tokens)
        assert explore.largest_cosine_error(tokens, codes)[0] < 0.02
        sizes.append(len(explore.compress_bytes(codes)))
    assert sizes[0] == max(sizes) < 5e5


def attention_with_mean(backbone, image):
    """(1 + R, 1 + H, N): of [CLS] and each register, the mean of all heads and each head."""
    maps = patch_attention(backbone, image).flatten(2).numpy()  # (H, 1 + R, N)
    return np.concatenate([maps.mean(0, keepdims=True), maps]).swapaxes(0, 1)


def test_attention_is_the_mean_and_each_head(made):
    backbone, images, text, *_ = made
    data = page_data(text)
    assert data["tokens"] == ["[CLS]", "register 1", "register 2"]
    assert data["heads"] == ["mean of all heads", "head 1", "head 2"]
    for image, photo in zip(images, data["photos"]):
        maps = attention_with_mean(backbone, image)
        strongest = np.array(photo["top"])[..., None]
        decoded = (photo["attention"] / 255) ** 2 * strongest
        assert (photo["attention"].max(-1) == 255).all()
        np.testing.assert_allclose(decoded, maps, atol=strongest.max() / 200)
        np.testing.assert_allclose(photo["total"], maps.sum(-1), rtol=1e-5)


def test_colours_are_those_of_visualize(made):
    backbone, images, text, *_ = made
    tokens = torch.cat([patch_tokens(backbone, image).flatten(0, 1) for image in images])
    found = np.concatenate([photo["rgb"] for photo in page_data(text)["photos"]])
    np.testing.assert_allclose(found / 255, pca_colors(tokens).numpy(), atol=0.003)


def test_photos_are_what_the_network_saw(made):
    _, images, text, *_ = made
    for image, photo in zip(images, page_data(text)["photos"]):
        data = base64.b64decode(photo["photo"].partition(",")[2])
        picture = Image.open(io.BytesIO(data))
        assert picture.size == (image.shape[2], image.shape[1])
        assert np.abs(np.array(picture).astype(int) - image.permute(1, 2, 0).numpy()).mean() < 25


def test_page_needs_nothing_else(made):
    text = made[2]
    page = text.replace(re.search(r'id="known">.*?</script>', text)[0], "")
    assert not re.search(r"https?:|//[a-z]+\.|src=|href=|url\(|@import|fetch\(|XMLHttp|<link", page)
    assert "default-src 'none'" in page
    assert "{{known}}" not in text
    assert text.count("</script") == 2
    assert "<b>second" not in text  # a name of a file stays a name
    assert page_data(text)["photos"][1]["name"] == "</script><b>second & third"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_photos_at_518_pixels_take_less_than_2_mb(tmp_path, command):
    """3 : 2, as cameras make them. The numbers of the docstring: scenes:2 instead."""
    torch.manual_seed(0)
    for name in "ab":
        smooth = F.interpolate(torch.rand(1, 3, 60, 90), (400, 600), mode="bicubic")[0]
        photo = smooth + torch.randn(400, 600) / 20
        pixels = (photo * 255).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    said, text = command(tmp_path / "a.png", tmp_path / "b.png", weights="random:dinov2_vits14_reg4")
    assert said.count("56 x 37 patches") == 2
    assert len(text) < 2e6
    said, text = command("scenes:2", weights="random:dinov2_vits14_reg4")
    assert "Cosines are within 0.016" in said
    assert said.endswith("explore.html: 0.9 MB\n")


# ---- the command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("explore") / "teacher.pth"
    torch.save({"teacher": tiny().state_dict(), "arch": {"num_heads": 2}}, path)
    return path


@pytest.fixture
def command(weights, tmp_path, monkeypatch, capsys):
    def go(*words, weights=weights):
        argv = ["explore.py", "--weights", str(weights), "--out", str(tmp_path / "explore.html")]
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, words)])
        explore.main()
        return capsys.readouterr().out, (tmp_path / "explore.html").read_text()

    return go


def test_scenes_need_no_photos(command):
    said, text = command("scenes:4:seed=1", "--size", "32", "--count", "3")
    assert "3 of 4 images, evenly spread: --count sets how many" in said
    data = page_data(text)
    assert [photo["name"] for photo in data["photos"]] == [f"scene {i} of seed 1" for i in range(3)]
    stated = re.search(r"Cosines are within 0\.0\d+ of exact ones \(2,304 pairs compared\)", said)
    assert stated and stated[0] in data["about"]
    assert "width 32, depth 2, patch 8" in data["about"]


def test_what_cannot_be_looked_at_is_named_and_left_out(command, tmp_path, monkeypatch):
    for module in (explore, visualize):
        monkeypatch.setattr(module, "MAX_PATCHES", 200)
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (1, 20_000)).save(folder / "thread.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8 no photo")
    with pytest.raises(UserError, match="nothing to draw: .*thread.png: 1 x 20000 pixels"):
        command(folder)
    Image.effect_noise((600, 30), 90).save(folder / "long.png")
    said, text = command(folder, "--size", "480")
    assert re.search("left out: .*thread.png: 1 x 20000", said)
    assert re.search("left out: .*torn.jpg", said)
    assert "long: 63 x 3 patches, near the 200 that a photo may have" in said
    assert [photo["name"] for photo in page_data(text)["photos"]] == ["long"]


def test_bad_input_is_one_sentence(command, tmp_path):
    (tmp_path / "file").touch()
    broken = {name: x * float("nan") for name, x in tiny().state_dict().items()}
    torch.save({"teacher": broken, "arch": {"num_heads": 2}}, tmp_path / "broken.pth")
    wrong = [
        ([tmp_path / "nowhere.jpg"], "nowhere.jpg"),
        (["scenes:2", "--out", tmp_path / "page.txt"], "page.txt: it must end in .html"),
        (["scenes:2", "--out", tmp_path / "file" / "page.html", "--size", "8"], "cannot be written"),
        (["scenes:2", "--weights", tmp_path / "broken.pth", "--size", "8"], "holds NaN or infinity"),
    ]
    for words, message in wrong:
        with pytest.raises(UserError, match=message):
            command(*words)
    for words in (["--size", "-1"], ["--count", "0"]):
        with pytest.raises(SystemExit):
            command("scenes:2", *words)
    assert not list(tmp_path.glob("*.html"))


# ---- in a browser


@pytest.fixture
def shown(made, tmp_path):
    """Show the page, at a width -> a function that runs a script in it."""
    (tmp_path / "page.html").write_text(made[2])

    def show(width=1280, dark=False):
        browser.open_page(tmp_path / "page.html", width, 800, dark)
        return lambda script: browser.run_script(f"return ready.then(() => {{{script}}})")

    return show


# Of each photo: its note, the boxes of photo, ring ("best") and square ("chosen"), and the colours.
VIEWS = """
const box = element => element.getBoundingClientRect();
const shown = element => !element.hidden && box(element);
return photos.map(({figure, w, h}) => ({
    note: figure.querySelector("figcaption span").innerText,
    box: box(figure.querySelector(".stage")).toJSON(),
    best: shown(figure.querySelector(".best")),
    chosen: shown(figure.querySelector(".chosen")),
    pixels: [...figure.querySelector("canvas").getContext("2d").getImageData(0, 0, w, h).data],
}));"""
SAID = 'return document.querySelector("#said[aria-live=polite]").innerText'


def to_colors(values):
    stops = np.linspace(0, 1, len(COLORMAP))
    return np.stack([np.interp(values, stops, channel) for channel in COLORMAP.T], -1)


def shown_colors(view):
    """-> (N, 3), all opaque."""
    rgba = np.array(view["pixels"]).reshape(-1, 4)
    assert (rgba[:, 3] == 255).all()
    return rgba[:, :3]


def patch_centre(box, photo, i):
    """Where patch i of a photo is on the screen."""
    column = i % photo["w"] + 0.5
    row = i // photo["w"] + 0.5
    return dict(
        x=box["x"] + column * box["width"] / photo["w"],
        y=box["y"] + row * box["height"] / photo["h"],
    )


def marks_patch(mark, box, photo, i):
    centre = dict(x=mark["x"] + mark["width"] / 2, y=mark["y"] + mark["height"] / 2)
    return centre == pytest.approx(patch_centre(box, photo, i), abs=1)


def check_similarity(made, show, p, i):
    """Colours, rings, squares and numbers of a page on which patch i of photo p is chosen."""
    views = show(VIEWS)
    said = show(SAID)
    backbone, images, text, *_ = made
    photos = page_data(text)["photos"]
    coded = [unit(photo["code"].astype(np.float64)) for photo in photos]
    exact = [unit(patch_tokens(backbone, image).flatten(0, 1).numpy()) for image in images]
    maps = [tokens @ coded[p][i] for tokens in coded]
    exact_maps = [tokens @ exact[p][i] for tokens in exact]
    low = min(cosines.min() for cosines in maps)
    for q, (cosines, view, photo) in enumerate(zip(maps, views, photos)):
        np.testing.assert_allclose(shown_colors(view), to_colors((cosines - low) / (1 - low)), atol=2)
        others = cosines.copy()
        if q == p:
            others[i] = -2
        best = others.argmax()
        note = re.fullmatch(r"best match: (-?[\d.]+) at column (\d+), row (\d+)", view["note"])
        number, column, row = note.groups()
        assert float(number) == pytest.approx(cosines[best], abs=6e-4)
        assert float(number) == pytest.approx(exact_maps[q][best], abs=0.02)
        assert (int(row) - 1) * photo["w"] + int(column) - 1 == best
        assert marks_patch(view["best"], view["box"], photo, best)
        if q == p:
            assert marks_patch(view["chosen"], view["box"], photo, i)
        else:
            assert not view["chosen"]
    other_photos = [q for q in range(len(photos)) if q != p]
    closest = max(other_photos, key=lambda q: maps[q].max())
    there = views[closest]["note"].removeprefix("best match: ")
    assert said.endswith(f"; in the others: {there} of {photos[closest]['name']}.")


@pytest.mark.slow
def test_mouse_chooses_holds_and_lets_go(made, shown):
    show = shown()
    photos = page_data(made[2])["photos"]
    views = show(VIEWS)
    check_similarity(made, show, 0, 15)  # at first: the middle

    def mouse(p, i, *types):
        place = patch_centre(views[p]["box"], photos[p], i)
        for kind in ("mouseMoved", *types):
            browser.devtools("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    mouse(1, 7)
    check_similarity(made, show, 1, 7)
    assert show(SAID).startswith("</script><b>second & third, column 2, row 3. Most like it in this photo:")
    mouse(0, 3, "mousePressed", "mouseReleased")
    assert "first, column 4, row 1 (held)" in show(SAID)
    mouse(1, 7)
    check_similarity(made, show, 0, 3)
    mouse(2, 0, "mousePressed", "mouseReleased")
    assert "fourth, column 1, row 1 (held)" in show(SAID)
    mouse(2, 0, "mousePressed", "mouseReleased")
    mouse(0, 23)
    check_similarity(made, show, 0, 23)


@pytest.mark.slow
def test_finger_chooses_by_tapping(made, shown):
    show = shown(375)
    photos = page_data(made[2])["photos"]
    place = patch_centre(show(VIEWS)[1]["box"], photos[1], 4)
    browser.devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
    browser.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    check_similarity(made, show, 1, 4)
    assert "(held)" not in show(SAID)


KEY_CODES = dict(Tab=9, ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40)


def press(*keys):
    for key in keys:
        for kind in ("rawKeyDown", "keyUp"):
            event = dict(key=key, code=key, windowsVirtualKeyCode=KEY_CODES[key])
            browser.devtools("Input.dispatchKeyEvent", type=kind, **event)


@pytest.mark.slow
def test_keys_are_enough(made, shown):
    show = shown()
    show('document.body.style.minHeight = "3000px"')
    press("Tab", "Tab")  # the first is for the choice of what is shown
    scrolled = show("return scrollY")
    press("ArrowRight", "ArrowUp")
    assert show("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert show("return document.activeElement.ariaLabel").startswith("first: 6")
    check_similarity(made, show, 0, 10)
    press(*["ArrowDown"] * 4, *["ArrowRight"] * 9)
    assert show(SAID).startswith("first, column 6, row 4. ")
    assert show("return scrollY") == scrolled
    press("Tab", "ArrowLeft", "ArrowDown")
    check_similarity(made, show, 1, 9)
    press("Tab")
    assert show(SAID).startswith("fourth, column 3, row 3. ")


@pytest.mark.slow
def test_attention_and_colours_are_shown(made, shown):
    backbone, images, text, *_ = made
    show = shown()
    photos = page_data(text)["photos"]
    visible = 'return [...document.querySelectorAll("select, #bar")].map(x => x.checkVisibility())'
    assert show(visible) == [False, False, True]
    show('document.querySelector("[value=attention]").click()')
    for token, head in ((0, 0), (2, 1)):
        show(f"form.token.value = {token}; form.head.value = {head};"
             'form.head.dispatchEvent(new Event("input", {bubbles: true}))')  # fmt: skip
        maps = [attention_with_mean(backbone, image)[token, head] for image in images]  # (N,) each
        for attention, view in zip(maps, show(VIEWS)):
            strongest = attention.max()
            np.testing.assert_allclose(shown_colors(view), to_colors(np.sqrt(attention / strongest)), atol=3)
            noted = [float(number) / 100 for number in re.findall(r"([\d.]+)\s%", view["note"])]
            assert noted == pytest.approx([strongest, attention.sum()], rel=0.01)
        share = float(re.search(r"gets ([\d.]+)", show(SAID))[1]) / 100
        assert share == pytest.approx(maps[0][15], abs=float(maps[0].max()) / 200)
    assert show(SAID).endswith("of the attention of register 2 (head 1).")
    assert show(visible) == [True] * 3
    show('document.querySelector("[value=colours]").click()')
    for photo, view in zip(photos, show(VIEWS)):
        assert (shown_colors(view) == photo["rgb"]).all()
    numbers = ", ".join(map(str, photos[0]["rgb"][15]))
    assert f"red, green and blue are {numbers} of 255" in show(SAID)
    assert show(visible) == [False] * 3


LAYOUT = """
const things = [...document.querySelectorAll("h1, p, label, #legend span, .stage, figcaption")]
    .filter(x => x.checkVisibility() && x.getBoundingClientRect().height);
const boxes = things.map(x => x.getBoundingClientRect()), over = [];
boxes.forEach((a, i) => boxes.slice(0, i).forEach((b, j) => {
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        over.push([things[j].outerHTML.slice(0, 80), things[i].outerHTML.slice(0, 80)]); }));
const style = getComputedStyle(document.body), fetched = performance.getEntriesByType("resource");
return {over, things: things.length, wide: document.documentElement.scrollWidth,
    small: [...document.querySelectorAll("label, select")].map(x => x.getBoundingClientRect().height)
        .filter(x => x && x < 36),
    text: style.color, page: style.backgroundColor,
    faint: getComputedStyle(document.querySelector("#about")).color,
    fetched: fetched.map(x => x.name).filter(x => !x.startsWith("data:"))}"""


def luminance(color):
    """Relative luminance of a CSS color "rgb(r, g, b)", as WCAG defines it."""
    x = np.array([int(channel) for channel in re.findall(r"\d+", color)[:3]]) / 255
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overlaps_or_sticks_out(shown, width, dark):
    show = shown(width, dark)
    for mode in ("similarity", "attention", "colours"):
        script = f'document.querySelector("[value={mode}]").click();'
        if mode == "colours":  # with fewer photos
            script += 'document.querySelector("figure:nth-child(3)")?.remove();'
        found = show(script + LAYOUT)
        assert not found["over"] and found["things"] > 11
        assert found["wide"] <= width and not found["small"]
        assert not found["fetched"]
        page = luminance(found["page"])
        assert (page < 0.05) == dark
        for color in (found["text"], found["faint"]):
            darker, lighter = sorted([page, luminance(color)])
            assert (lighter + 0.05) / (darker + 0.05) > 4.5
