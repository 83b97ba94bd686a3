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
from evals.visualize import RAMP, attention_of, patch_tokens, pca_colors
from model import VisionTransformer

KINDS = dict(code=np.int8, rgb=np.uint8, looks=np.uint8)


def tiny(heads=2, registers=2):
    torch.manual_seed(0)
    size = dict(patch_size=8, img_size=32, num_register_tokens=registers, init_std=0.1)
    backbone = VisionTransformer(16 * heads, 2, heads, **size).eval()
    torch.nn.init.normal_(backbone.register_tokens)  # else they attend to all patches alike
    return backbone


def known(text):
    """The data of a page, its bytes as arrays."""
    data = json.loads(re.search(r'id="known">(.*?)</script>', text)[1])
    for photo in data["photos"]:
        for name, kind in KINDS.items():
            photo[name] = np.frombuffer(zlib.decompress(base64.b64decode(photo[name])), kind)
        photo["code"] = photo["code"].reshape(-1, data["D"])
        photo["rgb"] = photo["rgb"].reshape(-1, 3)
        photo["looks"] = photo["looks"].reshape(len(data["tokens"]), len(data["heads"]), -1)
    return data


@pytest.fixture(scope="module")
def made():
    """A backbone, three images of different shapes, the text of their page."""
    backbone = tiny()
    torch.manual_seed(1)
    sizes = [(32, 48), (40, 24), (32, 32)]
    images = [F.interpolate(torch.rand(1, 3, h // 4, w // 4) * 255, (h, w))[0].byte() for h, w in sizes]
    names = ["first", "</script><b>second & third", "fourth"]
    photos, error, pairs = explore.survey(backbone, images, names)
    return backbone, images, explore.page(photos, "About & <about>", backbone), error, pairs


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- what is in the page


def test_cosines_are_those_of_the_backbone(made):
    backbone, images, text, error, pairs = made
    photos = known(text)["photos"]
    exact = unit(np.concatenate([patch_tokens(backbone, x).flatten(0, 1).numpy() for x in images]))
    coded = unit(np.concatenate([p["code"] for p in photos]).astype(np.float64))
    errors = np.abs(exact @ exact.T - coded @ coded.T)
    assert 0 < errors.max() < 0.02 and (exact @ exact.T).min() < 0.7
    assert error == pytest.approx(errors.max(), abs=1e-5) and pairs == errors.size
    assert [(p["h"], p["w"]) for p in photos] == [(4, 6), (5, 3), (4, 4)]


def test_error_and_size_do_not_depend_on_the_weights():
    """Directions spread evenly over the sphere are the hardest to shorten; a narrow cone, the easiest."""
    torch.manual_seed(0)
    noise, sizes = torch.randn(37 * 37, 384), []
    for tokens in (noise, noise + 3, noise * torch.logspace(0, -3, 384)):
        codes = explore.token_codes(100 * tokens)
        assert explore.largest_error(tokens, codes)[0] < 0.02
        sizes.append(len(explore.packed(codes)))
    assert sizes[0] == max(sizes) < 5e5


def test_attention_is_the_mean_and_each_head(made):
    backbone, images, text, *_ = made
    data = known(text)
    assert data["tokens"] == ["[CLS]", "register 1", "register 2"]
    assert data["heads"] == ["mean of all heads", "head 1", "head 2"]
    for x, photo in zip(images, data["photos"]):
        maps = attention_of(backbone, x).flatten(2).numpy()  # (heads, 1 + R, N)
        maps = np.concatenate([maps.mean(0, keepdims=True), maps]).swapaxes(0, 1)
        top = np.array(photo["top"])[..., None]
        assert (photo["looks"].max(-1) == 255).all()
        np.testing.assert_allclose((photo["looks"] / 255) ** 2 * top, maps, atol=top.max() / 200)
        np.testing.assert_allclose(photo["total"], maps.sum(-1), rtol=1e-5)


def test_colours_are_those_of_visualize(made):
    backbone, images, text, *_ = made
    tokens = torch.cat([patch_tokens(backbone, x).flatten(0, 1) for x in images])
    found = np.concatenate([p["rgb"] for p in known(text)["photos"]])
    np.testing.assert_allclose(found / 255, pca_colors(tokens).numpy(), atol=0.003)


def test_photos_are_what_the_network_saw(made):
    _, images, text, *_ = made
    for x, photo in zip(images, known(text)["photos"]):
        picture = Image.open(io.BytesIO(base64.b64decode(photo["photo"].partition(",")[2])))
        assert picture.size == (x.shape[2], x.shape[1])
        assert np.abs(np.array(picture).astype(int) - x.permute(1, 2, 0).numpy()).mean() < 25


def test_page_needs_nothing_else(made):
    text = made[2]
    page = text.replace(re.search(r'id="known">.*?</script>', text)[0], "")
    assert not re.search(r"https?:|//[a-z]+\.|src=|href=|url\(|@import|fetch\(|XMLHttp|<link", page)
    assert "default-src 'none'" in page and "{{known}}" not in text
    assert text.count("</script") == 2 and "<b>second" not in text  # a name of a file stays a name
    assert known(text)["photos"][1]["name"] == "</script><b>second & third"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_photos_at_518_pixels_take_less_than_2_mb(tmp_path, command):
    """3 : 2, as cameras make them. The numbers of the docstring: scenes:2 instead."""
    torch.manual_seed(0)
    for name in "ab":
        x = (
            F.interpolate(torch.rand(1, 3, 60, 90), (400, 600), mode="bicubic")[0]
            + torch.randn(400, 600) / 20
        )
        picture = (x * 255).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    said, text = command(tmp_path / "a.png", tmp_path / "b.png", weights="random:dinov2_vits14_reg4")
    assert said.count("56 x 37 patches") == 2
    assert len(text) < 2e6
    said, text = command("scenes:2", weights="random:dinov2_vits14_reg4")
    assert "Cosines are within 0.016" in said and said.endswith("explore.html: 0.9 MB\n")


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
    assert "3 of 4 images, evenly spread: --count says how many" in said
    data = known(text)
    assert [p["name"] for p in data["photos"]] == ["scene 0", "scene 1", "scene 2"]
    stated = re.search(r"Cosines are within 0\.0\d+ of exact ones \(2,304 pairs compared\)", said)
    assert stated and stated[0] in data["about"] and "width 32, depth 2, patch 8" in data["about"]


def test_what_cannot_be_looked_at_is_named_and_left_out(command, tmp_path, monkeypatch):
    for module in (explore, visualize):
        monkeypatch.setattr(module, "MOST", 200)
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (1, 20_000)).save(folder / "thread.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8 no photo")
    with pytest.raises(UserError, match="nothing to draw: .*thread.png: 1 x 20000 pixels"):
        command(folder)
    Image.effect_noise((600, 30), 90).save(folder / "long.png")
    said, text = command(folder, "--size", "480")
    assert re.search("left out: .*thread.png: 1 x 20000", said) and re.search("left out: .*torn.jpg", said)
    assert "long: 63 x 3 patches, near the 200 that a photo may have" in said
    assert [p["name"] for p in known(text)["photos"]] == ["long"]


def test_bad_input_is_one_sentence(command, tmp_path):
    (tmp_path / "file").touch()
    broken = {k: v * float("nan") for k, v in tiny().state_dict().items()}
    torch.save({"teacher": broken, "arch": {"num_heads": 2}}, tmp_path / "broken.pth")
    wrong = [
        ([tmp_path / "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["scenes:2", "--out", tmp_path / "page.txt"], "--out must end in .html"),
        (["scenes:2", "--out", tmp_path / "file" / "page.html", "--size", "8"], "cannot be written"),
        (["scenes:2", "--size", "-1"], "must be positive"),
        (["scenes:2", "--count", "0"], "must be positive"),
        (["scenes:2", "--weights", tmp_path / "broken.pth", "--size", "8"], "not finite"),
    ]
    for words, message in wrong:
        with pytest.raises(UserError, match=message):
            command(*words)
    assert not list(tmp_path.glob("*.html"))


# ---- in a browser


@pytest.fixture
def shown(made, tmp_path):
    """Show the page, at a width -> a function that runs a script in it."""
    (tmp_path / "page.html").write_text(made[2])

    def show(width=1280, dark=False):
        browser.visit(tmp_path / "page.html", width, 800, dark)
        return lambda script: browser.call(
            f"{browser.session()}/execute/sync", script=f"return ready.then(() => {{{script}}})", args=[]
        )

    return show


SEEN = """return photos.map(({figure, w, h}) => ({
    note: figure.querySelector("figcaption span").innerText, box: figure.querySelector(".stage")
    .getBoundingClientRect().toJSON(), ...Object.fromEntries(["best", "chosen"].map(k =>
    [k, !figure.querySelector("." + k).hidden && figure.querySelector("." + k).getBoundingClientRect()])),
    pixels: [...figure.querySelector("canvas").getContext("2d").getImageData(0, 0, w, h).data] }))"""
SAID = 'return document.querySelector("#said[aria-live=polite]").innerText'


def ramp(values):
    at = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(values, at, c) for c in RAMP.T], -1)


def pixels(seen):
    """-> (N, 3), all opaque."""
    x = np.array(seen["pixels"]).reshape(-1, 4)
    assert (x[:, 3] == 255).all()
    return x[:, :3]


def centre(box, photo, i):
    """Where patch i of a photo is on the screen."""
    x, y = i % photo["w"] + 0.5, i // photo["w"] + 0.5
    return dict(x=box["x"] + x * box["width"] / photo["w"], y=box["y"] + y * box["height"] / photo["h"])


def within(mark, box, photo, i):
    at = dict(x=mark["x"] + mark["width"] / 2, y=mark["y"] + mark["height"] / 2)
    return at == pytest.approx(centre(box, photo, i), abs=1)


def check_similarity(made, show, p, i):
    """Colours, rings, squares and numbers of a page on which patch i of photo p is chosen."""
    seen, said = show(SEEN), show(SAID)
    backbone, images, text, *_ = made
    photos = known(text)["photos"]
    coded = [unit(q["code"].astype(np.float64)) for q in photos]
    exact = [unit(patch_tokens(backbone, x).flatten(0, 1).numpy()) for x in images]
    maps, true = ([x @ every[p][i] for x in every] for every in (coded, exact))
    low = min(m.min() for m in maps)
    for q, (m, t, view) in enumerate(zip(maps, true, seen)):
        np.testing.assert_allclose(pixels(view), ramp((m - low) / (1 - low)), atol=2)
        others = np.where(np.arange(len(m)) == (i if q == p else -1), -2, m)
        best = others.argmax()
        number, column, row = re.fullmatch(
            r"best match: (-?[\d.]+) at column (\d+), row (\d+)", view["note"]
        ).groups()
        assert float(number) == pytest.approx(m[best], abs=6e-4)
        assert float(number) == pytest.approx(t[best], abs=0.02)
        assert (int(row) - 1) * photos[q]["w"] + int(column) - 1 == best
        assert within(view["best"], view["box"], photos[q], best)
        assert within(view["chosen"], view["box"], photos[q], i) if q == p else not view["chosen"]
    closest = max((q for q in range(len(photos)) if q != p), key=lambda q: maps[q].max())
    there = seen[closest]["note"].removeprefix("best match: ")
    assert said.endswith(f"; in the others: {there} of {photos[closest]['name']}.")


@pytest.mark.slow
def test_mouse_chooses_holds_and_lets_go(made, shown):
    show, photos = shown(), known(made[2])["photos"]
    seen = show(SEEN)
    check_similarity(made, show, 0, 15)  # at first: the middle

    def mouse(p, i, *types):
        for kind in ("mouseMoved", *types):
            place = centre(seen[p]["box"], photos[p], i)
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
    show, photos = shown(375), known(made[2])["photos"]
    place = centre(show(SEEN)[1]["box"], photos[1], 4)
    browser.devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
    browser.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    check_similarity(made, show, 1, 4)
    assert "(held)" not in show(SAID)


@pytest.mark.slow
def test_keys_are_enough(made, shown):
    show = shown()
    codes = dict(Tab=9, ArrowLeft=37, ArrowUp=38, ArrowRight=39, ArrowDown=40)

    def press(*keys):
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                how = dict(key=key, code=key, windowsVirtualKeyCode=codes[key])
                browser.devtools("Input.dispatchKeyEvent", type=kind, **how)

    show('document.body.style.minHeight = "3000px"')
    press("Tab", "Tab")  # the first is for the choice of what is shown
    scrolled = show("return scrollY")
    press("ArrowRight", "ArrowUp")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert show(outline) == "solid" and show("return document.activeElement.ariaLabel").startswith("first: 6")
    check_similarity(made, show, 0, 10)
    press(*["ArrowDown"] * 4, *["ArrowRight"] * 9)
    assert show(SAID).startswith("first, column 6, row 4. ") and show("return scrollY") == scrolled
    press("Tab", "ArrowLeft", "ArrowDown")
    check_similarity(made, show, 1, 9)
    press("Tab")
    assert show(SAID).startswith("fourth, column 3, row 3. ")


@pytest.mark.slow
def test_attention_and_colours_are_shown(made, shown):
    backbone, images, text, *_ = made
    show, photos = shown(), known(text)["photos"]
    visible = 'return [...document.querySelectorAll("select, #bar")].map(x => x.checkVisibility())'
    assert show(visible) == [False, False, True]
    show('document.querySelector("[value=attention]").click()')
    for token, head in ((0, 0), (2, 1)):
        show(f"form.token.value = {token}; form.head.value = {head};"
             'form.head.dispatchEvent(new Event("input", {bubbles: true}))')  # fmt: skip
        maps = [attention_of(backbone, x)[:, token].flatten(1) for x in images]  # (heads, N) each
        maps = [(m[head - 1] if head else m.mean(0)).numpy() for m in maps]
        for m, view in zip(maps, show(SEEN)):
            np.testing.assert_allclose(pixels(view), ramp(np.sqrt(m / m.max())), atol=3)
            strongest, every = (float(x) / 100 for x in re.findall(r"([\d.]+)\s%", view["note"]))
            assert (strongest, every) == pytest.approx((m.max(), m.sum()), rel=0.01)
        share = float(re.search(r"gets ([\d.]+)", show(SAID))[1]) / 100
        assert share == pytest.approx(maps[0][15], abs=float(maps[0].max()) / 200)
    assert show(SAID).endswith("of the attention of register 2 (head 1).") and show(visible) == [True] * 3
    show('document.querySelector("[value=colours]").click()')
    for photo, view in zip(photos, show(SEEN)):
        assert (pixels(view) == photo["rgb"]).all()
    numbers = ", ".join(map(str, photos[0]["rgb"][15]))
    assert f"red, green and blue are {numbers} of 255" in show(SAID) and show(visible) == [False] * 3


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
    x = np.array([int(c) for c in re.findall(r"\d+", color)[:3]]) / 255
    return np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overlaps_or_sticks_out(shown, width, dark):
    show = shown(width, dark)
    for mode in ("similarity", "attention", "colours"):
        fewer = 'document.querySelector("figure:nth-child(3)")?.remove();' if mode == "colours" else ""
        found = show(f'document.querySelector("[value={mode}]").click();{fewer}{LAYOUT}')
        assert not found["over"] and found["things"] > 11 and found["wide"] <= width and not found["small"]
        assert not found["fetched"]
        page = luminance(found["page"])
        assert (page < 0.05) == dark
        for color in (found["text"], found["faint"]):
            light = luminance(color)
            assert (max(page, light) + 0.05) / (min(page, light) + 0.05) > 4.5
