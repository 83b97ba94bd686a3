"""Tiles and contact sheets: images and maps as small pictures, and rows of them with titles and captions.

    contact_sheet([[image_tile(a), image_tile(b)]], titles=["photos"], captions=[["a.jpg", "b.jpg"]])

Every tile covers the same area, whatever its shape. On a sheet nothing overlaps: texts make the room that
they need.
"""

from itertools import zip_longest

import numpy as np
from PIL import Image, ImageDraw

from evals.plot import FONT_SIZE

TILE_SIDE = 160  # pixels: a tile covers as much as a square of this side
TILE_GAP = 4  # pixels between tiles
COLORMAP = np.array([(11, 16, 60), (28, 67, 129), (30, 128, 133), (104, 178, 92), (253, 231, 76)])


# ---------------------------------------------------------------- tiles


def to_pil(pixels):
    """uint8 (3, H, W) -> PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def image_tile(pixels, side=TILE_SIDE):
    """uint8 (3, H, W) -> PIL image with the area of side x side. Enlarged pixels stay sharp."""
    image = to_pil(pixels)
    scale = side / (image.width * image.height) ** 0.5
    size = [max(round(length * scale), 1) for length in image.size]
    return image.resize(size, Image.NEAREST if scale > 1 else Image.LANCZOS)


def heatmap_tile(values, pixels):
    """A map (h, w) of 0...1 in colours from dark blue to yellow, as large as the tile of pixels (3, H, W)."""
    stops = np.linspace(0, 1, len(COLORMAP))
    channels = [np.interp(values.clamp(0, 1), stops, channel) for channel in COLORMAP.T]
    colors = np.stack(channels, -1).round().astype(np.uint8)
    return Image.fromarray(colors).resize(image_tile(pixels).size, Image.NEAREST)


def attention_tile(attention, pixels):
    """Attention (h, w) over the image (3, H, W); square roots, because a few patches get nearly all of it."""
    relative = (attention / attention.max().clamp(min=1e-12)).sqrt()
    grey = image_tile(pixels).convert("L").convert("RGB")
    return Image.blend(heatmap_tile(relative, pixels), grey, 0.25)


# ---------------------------------------------------------------- sheets


def text_size(text):
    """Width and height of a text of one or more lines, in pixels."""
    if not text:
        return 0, 0
    canvas = ImageDraw.Draw(Image.new("L", (1, 1)))
    _, _, right, _ = canvas.multiline_textbbox((0, 0), text, font_size=FONT_SIZE)
    tallest = "\n".join(["Xg"] * len(text.split("\n")))  # so that rows without descenders are no lower
    _, _, _, bottom = canvas.multiline_textbbox((0, 0), tallest, font_size=FONT_SIZE)
    return round(right) + 1, round(bottom) + 3


def column_widths(rows, captions):
    """-> {number of tiles in a row: width of each column}: rows of equally many tiles share their columns."""
    widths = {}
    for tiles, texts in zip(rows, captions):
        needed = []
        for tile, text in zip_longest(tiles, texts, fillvalue=""):
            needed.append(max(tile.width, text_size(text)[0]))
        others = widths.get(len(tiles), needed)
        widths[len(tiles)] = [max(pair) for pair in zip(needed, others)]
    return widths


def sheet_row(tiles, title, texts, columns, left):
    """PIL tiles side by side from x = `left` on, the title before them, a text under each -> PIL image.

    columns: their widths. A tile lies in the middle of its column.
    """
    _, title_height = text_size(title)
    tile_height = max(title_height, *[tile.height for tile in tiles])
    text_height = max([text_size(text)[1] for text in texts], default=0)
    width = left + sum(columns) + TILE_GAP * (len(columns) - 1)
    row = Image.new("RGB", (width, tile_height + text_height), "white")
    canvas = ImageDraw.Draw(row)
    title_y = (tile_height - title_height) // 2
    canvas.multiline_text((0, title_y), title, "black", font_size=FONT_SIZE)
    x = left
    for tile, text, column in zip_longest(tiles, texts, columns, fillvalue=""):
        tile_x = x + (column - tile.width) // 2
        tile_y = (tile_height - tile.height) // 2
        row.paste(tile, (tile_x, tile_y))
        text_width, _ = text_size(text)
        text_x = x + (column - text_width) // 2
        canvas.multiline_text((text_x, tile_height), text, "black", font_size=FONT_SIZE, align="center")
        x += column + TILE_GAP
    return row


def contact_sheet(rows, titles=None, captions=None):
    """Rows of PIL tiles -> one PIL image.

    titles: a text for each row, at its left. captions: for each row a list of texts, under its tiles. Rows of
    equally many tiles share their columns; other rows are laid out on their own.
    """
    if titles is None:
        titles = [""] * len(rows)
    if captions is None:
        captions = [()] * len(rows)
    title_width = max(text_size(title)[0] for title in titles)
    left = title_width + 2 * TILE_GAP if title_width else 0
    widths = column_widths(rows, captions)
    drawn = []
    for tiles, title, texts in zip(rows, titles, captions):
        drawn.append(sheet_row(tiles, title, texts, widths[len(tiles)], left))
    height = sum(row.height for row in drawn) + TILE_GAP * (len(drawn) - 1)
    sheet = Image.new("RGB", (max(row.width for row in drawn), height), "white")
    y = 0
    for row in drawn:
        sheet.paste(row, (0, y))
        y += row.height + TILE_GAP
    return sheet
