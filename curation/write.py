"""Writing: the kept images as tar shards, the manifest of all images, and the funnel."""

import hashlib
import json
import math
import os
import tarfile
from dataclasses import asdict
from io import BytesIO

from config import UserError
from curation.manifest import REASONS, load_bytes
from curation.page import curation_report
from curation.pieces import cache_key, run_jobs
from distributed import all_reduce_ints, rank
from runfolder import atomic_open, atomic_write_text


def write(state):
    """OUT/shards/*.tar, manifest.jsonl, evaluation.jsonl (the evaluation sets' rows), funnel.json, .html."""
    num_shards = write_shards(state)
    if rank() == 0:
        for old in (state.out / "shards").glob("*.tar"):  # of a run here that kept more
            if old.stem.isdecimal() and int(old.stem) >= num_shards:
                old.unlink()
        write_manifest(state, "manifest", range(state.num_source_pieces))
        write_manifest(state, "evaluation", range(state.num_source_pieces, len(state.pieces)))
        settings = {name: asdict(section) for name, section in vars(state.cfg).items()}
        facts = dict(stages=state.stages, reasons=REASONS, notes=state.notes, settings=settings)
        atomic_write_text(state.out / "funnel.json", json.dumps(facts, indent=1))
        curation_report(state.out)
    all_reduce_ints(0)  # the others wait until all of it is there


def write_shards(state):
    """Those shards that are not there yet -> how many there are in all."""
    kept = state.kept()
    size = state.cfg.write.images
    key = cache_key(state.key, size)
    num_shards = math.ceil(len(kept) / size)
    folder = state.work / "shards"  # a file for each shard that is written, with its key
    marks = [folder / str(number) for number in range(num_shards)]

    def job(number):
        marks[number].unlink(missing_ok=True)  # from here on, no run vouches for this shard
        with atomic_open(state.out / "shards" / f"{number:05d}.tar") as file:
            write_shard(file, state.iter_rows(kept[number * size : (number + 1) * size]))
        atomic_write_text(marks[number], key)

    todo = [number for number, mark in enumerate(marks) if not mark.exists() or mark.read_text() != key]
    run_jobs(job, todo, state.workers)
    return num_shards


def write_shard(file, numbered_rows):
    """Samples as sources.py and webdataset know them: key.jpg (the bytes as they were), key.cls, key.json."""
    with tarfile.open(None, "w", file, format=tarfile.USTAR_FORMAT) as tar:
        for number, row in numbered_rows:
            name = row.get("path") or "{shard}::{key}".format(**row)
            try:
                data = load_bytes(row)
            except OSError as error:
                raise UserError(f"{name} can no longer be read ({error}): take a new OUT") from None
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise UserError(f"{name} has changed since ingest: take a new OUT")
            about = {key: value for key, value in row.items() if key != "at"}
            extension = row["format"].lower().replace("jpeg", "jpg")
            members = {extension: data, "json": json.dumps(about).encode()}
            if row["label"] is not None:
                members["cls"] = os.fsencode(row["label"])
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")  # with constant time, owner and mode
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


def write_manifest(state, name, pieces):
    with atomic_open(state.out / f"{name}.jsonl") as file:
        for index in pieces:
            for number, row in enumerate(state.read_rows(index), state.piece_starts[index]):
                file.write(manifest_line(state, number, row))


def manifest_line(state, number, row):
    """One image -> a line of JSON: its place, scores, clusters, keep, why, and what it resembles."""
    line = {}
    for key, value in row.items():
        line[key] = round(value, 4) if isinstance(value, float) else value
    for name in ("cluster", "domain"):
        line[name] = int(getattr(state, name)[number])
    for name in ("aesthetics", "blocked"):
        score = getattr(state, name)[number]
        if not math.isnan(score):
            line[name] = round(float(score), 4)
    line["keep"] = bool(state.why[number] == 0 and number < state.num_source)
    line["why"] = REASONS[state.why[number]]
    if state.of[number] >= 0:
        line["of"] = state.sha[state.of[number]].decode()
    return (json.dumps(line) + "\n").encode()
