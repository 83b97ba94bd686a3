"""From a pile of images to a training set that you can defend: one manifest, one funnel.

    python -m curation run folder:/pile out --config configs/curation/web.yaml --workers 8
    python -m curation dedup folder:/pile out ...     # up to this stage; finished work is not repeated
    torchrun --nproc-per-node 8 -m curation run 'tar:/pile/{00000..00099}.tar' out    # on many machines too

ingest   reads each image once: decodes, measures and hashes it
quality  drops images by rules on these scores
dedup    drops duplicates by bytes, looks or features, and all that resembles an evaluation set
content  linear heads on features, for what must not be in the set and what should
balance  an equal share for each domain, or the neighbours of a set of seed images
write    tar shards, manifest.jsonl, funnel.html

Pixels are never changed or deleted. No head is shipped and no backbone is the default: until you name them,
the stages that need one are off, and say so. Downloading is img2dataset's job (`img2dataset --url_list
urls.parquet --input_format parquet --output_format webdataset --output_folder pile`).

Any number of processes, killed any number of times, write the same bytes. Work is cut into pieces (a shard,
or 1,000 files). The result of a piece, and the decision of a stage, is a file that is written atomically and
named by a hash of everything it depends on. Memory: one piece, under 800 bytes for each image and, where
features are balanced, two for each of their numbers (vectors.py).
"""

import argparse
import sys
from pathlib import Path

import config
from config import UserError, Whole, argument
from curation.balance import balance
from curation.content import content
from curation.dedup import dedup
from curation.ingest import ingest
from curation.manifest import Curation
from curation.page import stage_lines
from curation.quality import quality
from curation.settings import load
from curation.write import write
from distributed import cleanup, rank, setup
from runfolder import acquire_lock

STAGES = {
    "ingest": ingest,
    "quality": quality,
    "dedup": dedup,
    "content": content,
    "balance": balance,
    "write": write,
}


def curate(source, out, cfg, last_stage="write", workers=0):
    """Run the stages up to `last_stage` on a data URI -> Curation. Results are in the folder `out`."""
    state = Curation(source, out, cfg, workers)
    for name, stage in STAGES.items():
        stage(state)
        if name == last_stage:
            break
    return state


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m curation", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("stage", choices=[*STAGES, "run"], help="the last stage to do; run: all of them")
    add("source", help="folder:PATH, list:FILE.jsonl, or tar:PATH, a folder or {000..010}.tar")
    add("out", help="a folder, on a file system that all processes see")
    add("settings", nargs="*", help="section.key=value")
    add("--config", help="YAML file of settings; the defaults are in curation/settings.py")
    add("--workers", type=argument(Whole), default=0, help="processes that read images, per torchrun process")
    return parser.parse_intermixed_args()


def main():
    args = parse_args()
    cfg = load(args.config, args.settings)
    if not args.out:
        raise UserError("OUT is empty: name a folder")
    setup()
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(out) if rank() == 0 else None  # held until this object is gone
        state = curate(args.source, out, cfg, args.stage, args.workers)
    except OSError as error:
        remedy = "make room, or take another OUT, and run it again: finished work is not repeated"
        raise UserError(f"the curation stops: {error}; {remedy}") from error
    if rank() == 0:
        sys.stdout.reconfigure(errors="backslashreplace")  # notes name files, whatever their bytes
        print(*stage_lines(state.stages), *state.notes, sep="\n")
        lock.close()
    cleanup()


if __name__ == "__main__":
    config.run(main)
