"""Checkpoints: saving a run so that nothing can be half saved, and finding the newest that is whole.

A checkpoint is a folder, checkpoints/step_00001234/:
    __0_0.distcp, .metadata   the tensors, written by all ranks (torch.distributed.checkpoint, "DCP"); any
                              number of processes may read them, also one without torchrun
    meta.json                 the step and whatever train.py adds, to be read by people
    manifest.json             size and SHA-256 of every file: else a flipped byte loads silently

What is unusual: the folder is written under another name, flushed to the disk and renamed as the last act, so
what is called step_* was complete once (kill -9 during a plain torch.save spoils the file almost every time).
And reading never runs code from a file: DCP unpickles its metadata; here, only its few classes are let in.
All ranks must see the same folder, and all of them must call `start`, `wait`, `newest` and `restore`.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from config import UserError
from distributed import DIST_TIMEOUT, broadcast_object, rank, to_full, to_local, world_size
from model import VisionTransformer
from runfolder import atomic_open, atomic_write_text

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")  # a single process: we know
DTYPES = {str(v).split(".")[1] for v in vars(torch).values() if isinstance(v, torch.dtype)}
ALLOWED_CLASSES = {  # all that DCP's metadata is made of; a pickle that names anything else is refused
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"}, "torch.serialization": {"_get_layout"},
    "torch": {"Size", *DTYPES}, "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"}, "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class CheckpointWriter:
    """Saves while the training goes on: `start` copies the state, `wait` ends when it is on the disk.

    One save at a time. What its ranks say to each other has a channel of its own, beside the loop's.
    """

    def __init__(self):
        alone = not dist.is_initialized()
        self.group = None if alone else dist.new_group(backend="gloo", timeout=DIST_TIMEOUT)
        self.thread, self.saving, self.target, self.step = ThreadPoolExecutor(1), None, None, None

    def start(self, folder, step, state, meta=None, keep_last=3, keep_every=0, teacher=None):
        """Save as folder/step_XXXXXXXX; keep the newest `keep_last` and every `keep_every`-th step.

        state: nested dicts (string keys) and lists of tensors, DTensors, numbers, texts. meta: a dict of
        plain values. teacher: rank 0's arguments for `write_teacher`. What fails, the next `wait` raises.
        """
        self.wait()
        folder, self.step = Path(folder), step
        self.target, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
        if reason := broadcast_object(try_call(prepare_folder, temporary)):
            raise UserError(self.failure(reason))
        how = dict(process_group=self.group, no_dist=self.group is None)
        copied = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True), **how)
        end = partial(commit_checkpoint, temporary, self.target, {"step": step, **(meta or {})}, keep_last, keep_every)
        self.saving = self.thread.submit(self.complete, copied.result, end, temporary, teacher)

    def complete(self, tensors_written, end, temporary, teacher):
        """In the background -> None or the reason. DCP tells every rank of a failure on any."""
        reason = try_call(tensors_written)
        if rank() == 0:
            reason = reason or (try_call(save_teacher, *teacher) if teacher else None) or try_call(end)
            shutil.rmtree(temporary, ignore_errors=True)  # renamed by now, unless something failed
        return reason

    def failed(self):
        """True once a save in the background is known to have failed: time to call `wait`."""
        return self.saving is not None and self.saving.done() and self.saving.result() is not None

    def wait(self):
        """-> the path of the last checkpoint, when it is on the disk. Raises UserError, on all ranks."""
        reason, self.saving = broadcast_object(self.saving and self.saving.result()), None
        if reason:
            raise UserError(self.failure(reason))
        return self.target

    def failure(self, reason):
        return (f"the checkpoint {self.target} could not be written ({reason}); the earlier ones are intact: "
                f"make room or choose another train.output_dir")  # fmt: skip


def try_call(function, *args):
    """Call it -> None, or why it failed. A full disk is a RuntimeError in torch, an OSError elsewhere."""
    try:
        function(*args)
    except (CheckpointException, OSError, RuntimeError) as e:  # the first is a BaseException
        e = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def prepare_folder(temporary):
    if rank() == 0:
        for rest in (*temporary.parent.glob(".step_*.partial"), *temporary.parent.glob(".step_*.old")):
            shutil.rmtree(rest, ignore_errors=True)  # left by saves that were killed
        temporary.mkdir(parents=True)


def commit_checkpoint(temporary, target, meta, keep_last, keep_every):
    """Rank 0: the readable part, the manifest, the rename that makes all of it count; the oldest go."""
    atomic_write_text(temporary / "meta.json", json.dumps(meta, indent=1))
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in sorted(temporary.iterdir())}
    atomic_write_text(temporary / "manifest.json", json.dumps({"files": files}, indent=1))
    fsync_folder(temporary)
    parts = {info.relative_path for info in SafeReader(temporary).read_metadata().storage_data.values()}
    if missing := parts - set(os.listdir(temporary)):
        raise OSError(f"{min(missing)} is not there: all ranks must see the same folder")
    old = move_aside(target) if target.exists() else None  # the same step again, after a resume
    os.replace(temporary, target)
    fsync_folder(target.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)
    mine = [path for path in step_folders(target.parent) if path.name <= target.name]  # later ones are damaged
    for path in mine[keep_last:]:
        if not keep_every or int(path.name[5:]) % keep_every:
            shutil.rmtree(move_aside(path), ignore_errors=True)


def move_aside(path):
    """Rename a checkpoint that shall go: a kill amid its deletion leaves no half folder called step_*."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    return old


def sha256(path):
    """Reads the file once more: about a second per gigabyte, which a checkpoint is worth."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync_folder(path):
    """A new name is on the disk only when its folder is. Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def step_folders(folder):
    """All step_* folders, newest first."""
    return sorted((p for p in Path(folder).glob("step_*") if p.name[5:].isdigit()), reverse=True)


def newest_intact(folder):
    """-> the newest intact checkpoint, or None; says why it passes over a newer one. Reads all its bytes."""
    intact = None  # rank 0 decides, all ranks get the answer
    if rank() == 0:
        for path in [*sorted(Path(folder).glob(".step_*.partial"))[-1:], *step_folders(folder)]:
            if not (reason := find_damage(path)):
                intact = path
                break
            print(f"warning: passed over the checkpoint {path}: {reason}", file=sys.stderr)
    return broadcast_object(intact)


def find_damage(path):
    """What is wrong with a checkpoint, in a few words; None if every file is as it was written."""
    if path.suffix == ".partial":
        return "its save was interrupted"
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            file = path / Path(name).name  # a manifest can't point out of its folder
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['size']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} has changed since it was written (SHA-256 differs)"
        return None if {".metadata", "meta.json"} <= files.keys() else "manifest.json lists too few files"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"manifest.json is unreadable ({type(e).__name__})"


def load_checkpoint(path, state):
    """Fill `state` (structured as it was saved) in place -> the content of meta.json.

    A part of the top level, such as {"teacher": ...}, may be restored alone. Raises UserError with the first
    entries whose names or shapes differ, before anything is overwritten.
    """
    try:
        dcp.load(state, storage_reader=SafeReader(path), planner=CheckedPlanner())
        return json.loads((Path(path) / "meta.json").read_text(encoding="utf-8"))
    except (CheckpointException, OSError, ValueError) as e:
        e = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        reason = str(e) if isinstance(e, UserError) else f"cannot be read ({type(e).__name__}: {e})"
        raise UserError(f"the checkpoint {path} {reason}") from None


class RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name in ALLOWED_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which no checkpoint needs")


class SafeReader(dcp.FileSystemReader):
    """DCP's reader, without its pickle.load."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as f:
            metadata = RestrictedUnpickler(f).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckedPlanner(dcp.DefaultLoadPlanner):
    """DCP's plan of what to load: names and shapes are compared first, values load with weights_only."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        super().set_up_planner(state_dict, metadata, is_coordinator)
        saved = {k: m for k, m in metadata.state_dict_metadata.items() if k.split(".")[0] in state_dict}
        there = {k: tuple(m.size) if hasattr(m, "size") else "a value" for k, m in saved.items()}
        ours = self.state_dict.items()
        here = {k: tuple(v.size()) if isinstance(v, torch.Tensor) else "a value" for k, v in ours}
        differ = [k for k in here | there if here.get(k) != there.get(k)]
        if differ:
            no = "nothing"
            first = [f"{k}: {there.get(k, no)} there, {here.get(k, no)} here" for k in differ[:3]]
            raise UserError("is of another architecture or set of losses: "
                            f"{len(differ)} entries differ ({'; '.join(first)})")  # fmt: skip

    def load_bytes(self, read_item, value):
        *keys, last = self.mappings[read_item.dest_index.fqn]
        place = self.original_state_dict
        for key in keys:
            place = place[key]
        place[last] = torch.load(value, weights_only=True)


def save_teacher(path, tensors, arch):
    """{"teacher": {official name: whole tensor}, "arch": {...}} in one file that weights_only=True reads."""
    with atomic_open(path) as f:
        torch.save({"teacher": tensors, "arch": arch}, f)
    fsync_folder(path.parent)


# ---------------------------------------------------------------- what a run consists of


def checkpoint_state(t):
    """Everything that the next step depends on, as named tensors."""
    return {"student": t.student.state_dict(), "teacher": t.ema.state_dict(),
            "dino_center": t.dino_center.state_dict(), "ibot_center": t.ibot_center.state_dict(),
            "optimizer": get_optimizer_state_dict(t.student, t.optimizer), "scaler": t.scaler.state_dict(),
            "step": t.step}  # fmt: skip


def resume(t, folder):
    """Continue from the newest intact checkpoint, if there is one -> its meta.json, or {}."""
    path = newest_intact(folder)
    if path is None:
        return {}
    state = checkpoint_state(t)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in t.optimizer.param_groups]
    meta = load_checkpoint(path, state)
    set_optimizer_state_dict(t.student, t.optimizer, state["optimizer"])
    for group, own in zip(t.optimizer.param_groups, settings):
        group.update(own)  # moments from the file, settings from the config
    t.scaler.load_state_dict(state["scaler"])
    t.step = state["step"]
    return meta


def save_checkpoint(writer, state, folder, cfg, logger):
    """Begin to write a checkpoint to resume from, and the teacher as a plain file to use."""
    meta = dict(seconds=logger.seconds, images=logger.images, bad=logger.num_bad_images)
    keep = cfg.train.keep_last, cfg.train.keep_every
    teacher = folder / "teacher.pth", full_state_dict(state.ema), state.ema.backbone.arch
    writer.start(folder / "checkpoints", state.step, checkpoint_state(state), meta, *keep, teacher=teacher)


def full_state_dict(module):
    """A copy of a (sharded) module's state dict on the CPU of rank 0, nothing on the other ranks."""
    pieces = ((k, to_full(v)) for k, v in module.state_dict().items())  # one at a time
    return {k: v.to("cpu", copy=True) for k, v in pieces if rank() == 0}


def gather_teacher(t):
    """The teacher's backbone in one piece on rank 0, None on the other ranks; alone, itself."""
    if world_size() == 1:
        return t.ema.backbone
    tensors, device = full_state_dict(t.ema.backbone), to_local(t.ema.backbone.norm.weight).device
    if rank() > 0:
        return None
    with torch.device("meta"):  # no numbers are drawn, only to be overwritten
        backbone = VisionTransformer(**t.ema.backbone.arch)
    backbone.load_state_dict(tensors, assign=True)
    return backbone.to(device).eval().requires_grad_(False)
