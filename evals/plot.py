"""A small plot: axes, ticks, bars, lines and a legend, drawn with Pillow in the units of the data.

    plot = Plot((460, 230), (40, 26, 310, 208), x_range=(0, 300), y_range=(0, 1))
    plot.draw_axes([(0, "0"), (300, "step 300")], [(0, "0"), (1, "1")])
    plot.draw_line([(0, 1.0), (300, 0.4)], "blue")
    plot.image.save("loss.png")

Scales are linear; a logarithmic axis takes the logarithms of the data, and ticks labelled with the data
themselves. `Axis` and `round_ticks` also place the SVG plots of tools/metric_plots.py.
"""

import math
from typing import NamedTuple

from PIL import Image, ImageDraw

FONT_SIZE = 13  # pixels
LEGEND_LINE = 17  # pixels from one line of a legend to the next


class Axis(NamedTuple):
    """A linear scale: axis(value) -> pixel."""

    low: float  # the value at pixel `start`
    high: float  # the value at pixel `end`
    start: float
    end: float

    def __call__(self, value):
        share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share


def round_ticks(low, high):
    """Round numbers, evenly spaced: the first at or below `low`, the last at or above `high`."""
    wanted = (high - low) / 5
    power = 10 ** math.floor(math.log10(wanted))
    for factor in (1, 2, 5, 10):
        step = factor * power
        if step >= wanted / 1.0002:
            break
    first = math.floor(low / step + 1e-6)
    last = math.ceil(high / step - 1e-6)
    return [k * step for k in range(first, last + 1)]


class Plot:
    """A white picture with an area for data. Methods take values in the units of the data, not pixels, except
    where they say so."""

    def __init__(self, size, area, x_range, y_range):
        """size: (width, height) of the picture; area: (left, top, right, bottom) of the axes in it; pixels.

        x_range, y_range: (low, high), the values at the two ends of an axis.
        """
        self.image = Image.new("RGB", size, "white")
        self.canvas = ImageDraw.Draw(self.image)
        self.left, self.top, self.right, self.bottom = area
        self.x = Axis(*x_range, self.left, self.right)
        self.y = Axis(*y_range, self.bottom, self.top)

    def draw_text(self, pixel, text, anchor, color="black", font_size=FONT_SIZE):
        """pixel: (x, y) of the anchor, two letters as Pillow defines them, such as "lt" for the top left."""
        self.canvas.text(pixel, text, color, anchor=anchor, font_size=font_size)

    def draw_axes(self, x_ticks, y_ticks, x_label="", y_label=""):
        """Ticks are pairs (value, text). Call it after draw_bar: a bar covers the line it stands on."""
        for value, text in x_ticks:
            self.draw_text((self.x(value), self.bottom + 4), text, "mt")
        for value, text in y_ticks:
            self.draw_text((self.left - 6, self.y(value)), text, "rm")
        line = [self.left, self.top, self.left, self.bottom, self.right, self.bottom]
        self.canvas.line(line, "black")
        middle = (self.left + self.right) / 2
        self.draw_text((middle, self.image.height - 4), x_label, "mb")
        self.draw_y_label(y_label)

    def draw_y_label(self, text):
        """Along the left edge, read from below. Pillow has no upright text: it is drawn and turned."""
        if not text:
            return
        _, _, width, height = self.canvas.textbbox((0, 0), text, font_size=FONT_SIZE)
        strip = Image.new("RGB", (math.ceil(width), math.ceil(height)), "white")
        ImageDraw.Draw(strip).text((0, 0), text, "black", font_size=FONT_SIZE)
        middle = (self.top + self.bottom) // 2
        self.image.paste(strip.rotate(90, expand=True), (2, middle - strip.width // 2))

    def draw_title(self, text):
        self.draw_text((self.left, 4), text, "lt")

    def draw_bar(self, low, high, height, color, text=""):
        """A bar from x = low to x = high, with a little air at both sides; `text` stands on its top."""
        left = self.x(low)
        right = self.x(high)
        top = self.y(height)
        self.canvas.rectangle([left + 1, top, right - 1, self.bottom], fill=color)
        self.draw_text(((left + right) / 2, top - 2), text, "mb", font_size=FONT_SIZE - 2)

    def draw_line(self, points, color, width=2):
        """points: pairs (x, y)."""
        pixels = [(self.x(x), self.y(y)) for x, y in points]
        self.canvas.line(pixels, color, width)

    def draw_limit(self, value, text, color):
        """A vertical line, and a text above the plot that ends over it."""
        x = self.x(value)
        self.canvas.line([x, self.top, x, self.bottom], color, 2)
        self.draw_text((x, 4), text, "rt", color)

    def draw_legend(self, entries):
        """Right of the axes: pairs (text, color), a line each."""
        y = self.top
        for text, color in entries:
            self.draw_text((self.right + 8, y), text, "lt", color)
            y += LEGEND_LINE
