"""Checkpoints: saving a run so that nothing is ever half saved, and finding the newest intact one.

A checkpoint is a folder, checkpoints/step_00001234/:
    __0_0.distcp, .metadata   the tensors, written by all ranks (torch.distributed.checkpoint, "DCP"); any
                              number of processes may read them, also one without torchrun
    meta.json                 the step and whatever train.py adds, for people to read
    manifest.json             size and SHA-256 of every file: else a flipped byte loads silently

The folder is written under another name, flushed to the disk and renamed at the very end, so a folder called
step_* was complete once (kill -9 during a plain torch.save ruins the file almost every time). Reading never
runs code from a file: DCP unpickles its metadata; here, the unpickler admits only the few classes it needs.
All ranks must see the same folder and call `start`, `wait`, `newest_intact` and `load_checkpoint` together.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from config import UserError, parse_json, root_cause
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
    """Saves in the background: `start` copies the state, `wait` returns when it is on the disk.

    One save at a time. Its ranks communicate in a process group of their own, beside the loop's.
    """

    def __init__(self):
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=DIST_TIMEOUT)
        self.thread = ThreadPoolExecutor(1)
        self.saving = None  # the Future of the save in progress: None or the reason of its failure
        self.target = None
        self.step = None
        self.last_start = time.monotonic()

    def is_overdue(self, minutes):
        """Whether rank 0 began its last save so long ago, and has ended it; 0 minutes: never."""
        idle = self.saving is None or self.saving.done()
        passed = time.monotonic() - self.last_start
        return rank() == 0 and 0 < 60 * minutes <= passed and idle

    def start(self, folder, step, state, meta=None, keep_last=3, keep_every=0, teacher=None):
        """Save as folder/step_XXXXXXXX; keep the newest `keep_last` and every `keep_every`-th step.

        state: nested dicts (string keys) and lists of tensors, DTensors, numbers, texts. meta: a dict of
        plain values. teacher: rank 0's arguments for `save_teacher`. A failure is raised by the next `wait`.
        """
        self.wait()
        self.last_start = time.monotonic()
        self.step = step
        self.target = Path(folder) / f"step_{step:08d}"
        temporary = self.target.with_name(f".step_{step:08d}.partial")
        reason = broadcast_object(try_call(prepare_folder, temporary))
        if reason:
            raise UserError(self.failure(reason))
        files = dcp.FileSystemWriter(temporary, sync_files=True)
        ranks = dict(process_group=self.group, no_dist=self.group is None)
        copied = dcp.async_save(state, storage_writer=files, **ranks)
        meta = {"step": step, **(meta or {})}
        commit = partial(commit_checkpoint, temporary, self.target, meta, keep_last, keep_every)
        self.saving = self.thread.submit(self.complete, copied.result, commit, temporary, teacher)

    def complete(self, tensors_written, commit, temporary, teacher):
        """In the background -> None or the reason. DCP tells every rank of a failure on any."""
        reason = try_call(tensors_written)
        if rank() == 0:
            if not reason and teacher:
                reason = try_call(save_teacher, *teacher)
            if not reason:
                reason = try_call(commit)
            shutil.rmtree(temporary, ignore_errors=True)  # renamed by now, unless something failed
        return reason

    def failed(self):
        """True once a save in the background is known to have failed: time to call `wait`."""
        return self.saving is not None and self.saving.done() and self.saving.result() is not None

    def wait(self):
        """-> the path of the last checkpoint, once it is on the disk. Raises UserError, on all ranks."""
        reason = broadcast_object(self.saving.result() if self.saving else None)
        self.saving = None
        if reason:
            raise UserError(self.failure(reason))
        return self.target

    def failure(self, reason):
        remedy = "the earlier ones are intact: make room or choose another train.output_dir"
        if not self.target.parent.parent.is_dir():
            remedy = "the run folder is gone, deleted or moved: start again, or resume from where it is now"
        elif not step_folders(self.target.parent):
            remedy = "there is no earlier one: make room or choose another train.output_dir"
        return f"the checkpoint {self.target} could not be written ({reason}); {remedy}"


def try_call(function, *args):
    """Call it -> None, or why it failed."""
    try:
        function(*args)
    except (CheckpointException, OSError, RuntimeError) as e:  # the first is a BaseException
        cause = first_cause(e)
        if "unexpected pos" in str(cause):  # from another rank, without its cause
            return "a file could not be written to its end: is the disk full?"
        return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"


def first_cause(error):
    """What happened on the first rank that failed, if DCP reports for all of them."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return root_cause(error)


def prepare_folder(temporary):
    if rank() == 0:
        folder = temporary.parent
        for leftover in [*folder.glob(".step_*.partial"), *folder.glob(".step_*.old")]:
            shutil.rmtree(leftover, ignore_errors=True)  # of saves that were killed
        folder.mkdir(exist_ok=True)  # without parents: a run folder that is gone stays so
        temporary.mkdir()


def commit_checkpoint(temporary, target, meta, keep_last, keep_every):
    """Rank 0: the readable part, the manifest, the rename that makes it count; the oldest are deleted."""
    atomic_write_text(temporary / "meta.json", json.dumps(meta, indent=1))
    files = {}
    for path in sorted(temporary.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    atomic_write_text(temporary / "manifest.json", json.dumps({"files": files}, indent=1))
    fsync_folder(temporary)
    metadata = SafeReader(temporary).read_metadata()
    missing = {part.relative_path for part in metadata.storage_data.values()} - files.keys()
    if missing:
        raise OSError(f"{min(missing)} is not there: all ranks must see the same folder")
    old = move_aside(target) if target.exists() else None  # the same step again, after a resume
    os.replace(temporary, target)
    fsync_folder(target.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)
    # Later checkpoints than ours are damaged ones: they do not count among those to keep.
    ours = [path for path in step_folders(target.parent) if path.name <= target.name]
    for path in ours[keep_last:]:
        step = int(path.name.removeprefix("step_"))
        if not keep_every or step % keep_every:
            shutil.rmtree(move_aside(path), ignore_errors=True)


def move_aside(path):
    """Rename a checkpoint before it is deleted: a kill in between leaves no half folder called step_*."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    return old


def sha256(path):
    """Reads the file once more: about a second per gigabyte."""
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
    folders = [path for path in Path(folder).glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(folders, reverse=True)


def newest_intact(folder):
    """-> the newest intact checkpoint, or None; warns of newer ones that are damaged. Reads all its bytes."""
    intact = None  # rank 0 decides, all ranks get the answer
    if rank() == 0:
        interrupted = sorted(Path(folder).glob(".step_*.partial"))[-1:]
        for path in [*interrupted, *step_folders(folder)]:
            reason = find_damage(path)
            if not reason:
                intact = path
                break
            print(f"warning: passed over the checkpoint {path}: {reason}", file=sys.stderr)
    return broadcast_object(intact)


def find_damage(path):
    """The damage of a checkpoint in a few words; None if every file is as it was written."""
    if path.suffix == ".partial":
        return "its save was interrupted"
    try:
        files = parse_json((path / "manifest.json").read_bytes())["files"]
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

    A part of the top level, such as {"teacher": ...}, may be loaded alone. Raises UserError with the first
    entries whose names or shapes differ, before anything is overwritten.
    """
    try:
        dcp.load(state, storage_reader=SafeReader(path), planner=CheckedPlanner())
        meta = parse_json((Path(path) / "meta.json").read_bytes())
        if not isinstance(meta, dict):
            raise ValueError("meta.json holds no object")
        return meta
    except (CheckpointException, OSError, ValueError) as e:
        cause = first_cause(e)
        reason = f"cannot be read ({type(cause).__name__}: {cause})"
        if isinstance(cause, UserError):
            reason = str(cause)
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
    """DCP's plan for loading: names and shapes are compared first, values load with weights_only."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        super().set_up_planner(state_dict, metadata, is_coordinator)
        there = {}
        for name, saved in metadata.state_dict_metadata.items():
            if name.split(".")[0] in state_dict:
                there[name] = tuple(saved.size) if hasattr(saved, "size") else "a value"
        here = {}
        for name, value in self.state_dict.items():
            here[name] = tuple(value.size()) if isinstance(value, torch.Tensor) else "a value"
        differ = [name for name in here | there if here.get(name) != there.get(name)]
        if differ:
            no = "nothing"
            first = [f"{k}: {there.get(k, no)} there, {here.get(k, no)} here" for k in differ[:3]]
            raise UserError("is of another architecture or set of losses: "
                            f"{len(differ)} entries differ ({'; '.join(first)})")  # fmt: skip

    def load_bytes(self, read_item, value):
        *keys, last = self.mappings[read_item.dest_index.fqn]
        entry = self.original_state_dict
        for key in keys:
            entry = entry[key]
        entry[last] = torch.load(value, weights_only=True)


def save_teacher(path, tensors, arch):
    """{"teacher": {official name: whole tensor}, "arch": {...}} in one file that weights_only=True reads."""
    with atomic_open(path) as f:
        torch.save({"teacher": tensors, "arch": arch}, f)
    fsync_folder(path.parent)


# ---------------------------------------------------------------- the state of a run


def checkpoint_state(state):
    """Everything in a TrainState that the next step depends on, as named tensors."""
    return {
        "student": state.student.state_dict(),
        "teacher": state.ema.state_dict(),
        "dino_center": state.dino_center.state_dict(),
        "ibot_center": state.ibot_center.state_dict(),
        "optimizer": get_optimizer_state_dict(state.student, state.optimizer),
        "scaler": state.scaler.state_dict(),
        "step": state.step,
    }


def resume(state, folder):
    """Continue from the newest intact checkpoint, if there is one -> its meta.json, or {}."""
    path = newest_intact(folder)
    if path is None:
        return {}
    loaded = checkpoint_state(state)
    groups = state.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    meta = load_checkpoint(path, loaded)
    set_optimizer_state_dict(state.student, state.optimizer, loaded["optimizer"])
    for group, own in zip(state.optimizer.param_groups, settings):
        group.update(own)  # moments from the file, settings from the config
    state.scaler.load_state_dict(loaded["scaler"])
    state.step = loaded["step"]
    return meta


def save_checkpoint(writer, state, folder, cfg, logger):
    """Start to write a checkpoint to resume from, and the teacher as a plain file to use."""
    began = time.monotonic()
    meta = dict(seconds=logger.seconds, images=logger.images, bad=logger.num_bad_images)
    teacher = teacher_file(state, folder)
    keep = dict(keep_last=cfg.train.keep_last, keep_every=cfg.train.keep_every)
    writer.start(folder / "checkpoints", state.step, checkpoint_state(state), meta, **keep, teacher=teacher)
    logger.checkpoint_seconds = time.monotonic() - began


def teacher_file(state, folder):
    """On all ranks -> the arguments of `save_teacher`, which are complete on rank 0."""
    return folder / "teacher.pth", full_state_dict(state.ema), state.ema.backbone.arch


def full_state_dict(module):
    """A copy of a (sharded) module's state dict on the CPU of rank 0, nothing on the other ranks."""
    tensors = {}
    for name, shard in module.state_dict().items():
        tensor = to_full(shard)  # one at a time, on all ranks
        if rank() == 0:
            tensors[name] = tensor.to("cpu", copy=True)
    return tensors


def gather_teacher(state):
    """The teacher's backbone in full on rank 0, None on the other ranks; without sharding, itself."""
    teacher = state.ema.backbone
    if world_size() == 1:
        return teacher
    tensors = full_state_dict(teacher)
    device = to_local(teacher.norm.weight).device
    if rank() > 0:
        return None
    with torch.device("meta"):  # no numbers are drawn, only to be overwritten
        backbone = VisionTransformer(**teacher.arch)
    backbone.load_state_dict(tensors, assign=True)
    return backbone.to(device).eval().requires_grad_(False)
