"""Quality: rules on the size and the scores of an image."""

import numpy as np

from curation.manifest import REASONS, SCORES


def quality(state):
    state.apply("quality", filter_quality, state.cfg.quality)


def filter_quality(state):
    """-> the column why: of the rules that an image breaks, the first."""
    settings = state.cfg.quality
    short_side = np.minimum(state.width, state.height)
    long_side = np.maximum(state.width, state.height)
    kept = state.kept()
    cuts = {}
    for name in vars(settings):
        score = name.partition("_")[2]
        if score in SCORES:
            cuts[name] = threshold(getattr(settings, name), getattr(state, score)[kept])
    broken = {
        "small": short_side < settings.min_side,
        "long": long_side > settings.max_aspect * short_side,
        "dark": state.dark < cuts["min_dark"],
        "bright": state.bright > cuts["max_bright"],
        "flat": state.entropy < cuts["min_entropy"],
        "blurred": state.sharpness < cuts["min_sharpness"],
    }
    why = np.zeros(state.num_images, np.uint8)
    for reason, fails in broken.items():
        why[(why == 0) & fails] = REASONS.index(reason)
    why[state.num_source :] = 0  # evaluation images are not judged
    return dict(why=why)


def threshold(cut, scores):
    """A number or a percentile such as "2%" -> a number."""
    if isinstance(cut, str):
        return float(np.percentile(scores, float(cut.removesuffix("%"))))
    return float(cut)
