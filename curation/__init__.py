"""From a pile of images to a training set: `python -m curation run SOURCE OUT`."""
