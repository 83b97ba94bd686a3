"""From a pile of images to a training set: `python -m curation run SOURCE OUT`.

Lowest first: settings, pieces, manifest (what is known about each image), vectors; then a file for each
stage, ingest, quality, embed, dedup, content, balance, write; and page, which shows the result.
"""
