"""Checkpoints survive kill -9, damage, a full disk and another number of processes; not another model."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest
import torch
from helpers import TWO_RANKS, Bomb, child_environment, torchrun
from packaging.version import Version
from torch.distributed.checkpoint.api import CheckpointException

import checkpoint
from config import UserError


def make_state(seed=0, width=4):
    """Nested as the state of a run: dicts, lists, tensors of two types, numbers, texts, None."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "student": {
            "backbone.blocks.0.weight": torch.randn(width, 3, generator=rng),
            "backbone.norm.bias": torch.randn(width, generator=rng).bfloat16(),
        },
        "optimizer": {
            "state": {"a": {"m": torch.randn(2, generator=rng), "step": torch.randn((), generator=rng)}},
            "groups": [{"lr": 0.1 * seed, "names": ["a", "b"]}, {"lr": None}],
        },
        "step": seed,
        "note": f"seed {seed}",
    }


def save(folder, step, state, *args, **options):
    """Start, and wait for the end."""
    writer = checkpoint.CheckpointWriter()
    writer.start(folder, step, state, *args, **options)
    return writer.wait()


def same(ours, theirs):
    """Whether two nested states agree in every name, type and bit."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def test_round_trip_is_bitwise_and_in_place(tmp_path):
    path = save(tmp_path, 7, make_state(7), {"images": 70, "note": "for people"})
    assert path.name == "step_00000007"
    assert checkpoint.newest_intact(tmp_path) == path
    fresh = make_state(1)
    tensor = fresh["student"]["backbone.blocks.0.weight"]
    meta = checkpoint.load_checkpoint(path, fresh)
    assert meta == {"step": 7, "images": 70, "note": "for people"}
    assert same(fresh, make_state(7))
    assert fresh["student"]["backbone.blocks.0.weight"] is tensor
    part = {"student": make_state(1)["student"]}
    checkpoint.load_checkpoint(path, part)  # a part of the top level alone
    assert same(part["student"], make_state(7)["student"])


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 3, make_state(1))
    path = save(tmp_path, 3, make_state(2))
    loaded = make_state(0)
    checkpoint.load_checkpoint(path, loaded)
    assert same(loaded, make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_prunes_all_but_the_last_and_every_so_many(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, {"x": torch.zeros(1)}, keep_last=2, keep_every=3)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "6", "7", "8"]


def truncate(path):
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])


def flip_a_bit(path):
    data = next(path.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


DAMAGES = {  # the reason that must be told, what to do to the folder of a checkpoint
    "bytes, not": truncate,
    "SHA-256": flip_a_bit,
    "has 0 bytes": lambda path: next(path.glob("*.distcp")).write_bytes(b""),
    "manifest.json is missing": lambda path: (path / "manifest.json").unlink(),
    "manifest.json is unreadable": lambda path: (path / "manifest.json").write_text('{"files": {'),
    "unreadable (ValueError)": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "unreadable (TypeError)": lambda path: (path / "manifest.json").write_text("null"),
    "unreadable (AttributeError)": lambda path: (path / "manifest.json").write_text('{"files": []}'),
    "manifest.json lists too few": lambda path: (path / "manifest.json").write_text('{"files": {}}'),
    ".metadata is missing": lambda path: (path / ".metadata").unlink(),
    "interrupted": lambda path: path.rename(path.with_name(f".{path.name}.partial")),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_the_reason_told(reason, tmp_path, capsys):
    good = save(tmp_path, 1, make_state(1))
    bad = save(tmp_path, 2, make_state(2))
    DAMAGES[reason](bad)
    assert checkpoint.newest_intact(tmp_path) == good
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert bad.name in warning
    assert reason in warning
    loaded = make_state(0)
    checkpoint.load_checkpoint(good, loaded)
    assert same(loaded, make_state(1))
    save(tmp_path, 3, make_state(3))  # and life goes on
    assert checkpoint.newest_intact(tmp_path).name == "step_00000003"


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None
    assert checkpoint.newest_intact(tmp_path / "nowhere") is None


def test_another_architecture_is_named(tmp_path):
    path = save(tmp_path, 1, make_state(1))
    wide = make_state(2, width=5)
    words = r"2 entries differ \(student.backbone.blocks.0.weight: \(4, 3\) there, \(5, 3\)"
    with pytest.raises(UserError, match=words):
        checkpoint.load_checkpoint(path, wide)
    assert same(wide, make_state(2, width=5)), "nothing may be overwritten"
    deeper = make_state(2)
    deeper["student"]["backbone.blocks.1.weight"] = torch.zeros(3)
    with pytest.raises(UserError, match="blocks.1.weight: nothing there"):
        checkpoint.load_checkpoint(path, deeper)
    shallower = make_state(2)
    del shallower["student"]["backbone.norm.bias"]
    with pytest.raises(UserError, match="norm.bias: .* nothing here"):  # DCP alone would not notice
        checkpoint.load_checkpoint(path, shallower)


def test_hostile_metadata_runs_no_code(tmp_path):
    path = save(tmp_path, 1, make_state(1))
    trace = tmp_path / "trace"
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(trace)))
    old = Version(torch.__version__) < Version("2.13")  # which keeps the reason to itself
    with pytest.raises(UserError, match="metadata is None" if old else "system"):
        checkpoint.load_checkpoint(path, make_state(0))
    assert not trace.exists()


def test_hostile_values_run_no_code(tmp_path):
    trace = tmp_path / "trace"
    path = save(tmp_path, 1, {"x": torch.zeros(1), "step": 1})
    torch.distributed.checkpoint.save({"x": torch.zeros(1), "step": Bomb(trace)}, checkpoint_id=path)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_checkpoint(path, {"x": torch.ones(1), "step": 0})
    assert not trace.exists()


FULL = """
import resource, sys, time, torch, checkpoint
from config import UserError
from pathlib import Path
folder = Path(sys.argv[1])
writer = checkpoint.CheckpointWriter()
big = {"x": torch.zeros(100_000)}
writer.start(folder, 1, {"x": torch.zeros(10)})
assert writer.wait() and not writer.failed()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for state, teacher in ((big, None), ({"x": torch.zeros(10)}, (folder / "teacher.pth", big, {}))):
    writer.start(folder, 2, state, keep_last=1, teacher=teacher)
    while not writer.failed():  # in the background, so nothing is raised until somebody asks
        time.sleep(0.01)
    try:
        writer.wait()
    except UserError as e:
        print(e)
checkpoint.load_checkpoint(checkpoint.newest_intact(sys.argv[1]), {"x": torch.ones(10)})
"""


def test_a_full_disk_is_one_sentence_and_spoils_nothing(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    for sentence in (first, second):
        assert "step_00000002 could not be written (OSError: [Errno 27] File too large)" in sentence
        assert "the earlier ones are intact: make room" in sentence
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_a_full_disk_of_another_rank_is_named_too():
    """Its error comes without the one that caused it: torch's own words would mean nothing to anybody."""

    def fail():
        raise CheckpointException("save", {1: (RuntimeError("unexpected pos 704 vs 598"), None)})

    assert checkpoint.try_call(fail) == "a file could not be written to its end: is the disk full?"


@pytest.mark.parametrize("content", ["[1]", "null", '"text"', "[" * 100_000])
def test_meta_of_a_wrong_shape_is_one_sentence(content, tmp_path):
    path = save(tmp_path, 1, make_state(1))
    (path / "meta.json").write_text(content)
    with pytest.raises(UserError, match="step_00000001 cannot be read .ValueError: "):
        checkpoint.load_checkpoint(path, make_state(0))


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path):
    writer = checkpoint.CheckpointWriter()
    run = tmp_path / "run"
    with pytest.raises(UserError, match="the run folder is gone, deleted or moved") as error:
        writer.start(run / "checkpoints", 1, make_state(1))
    assert "intact" not in str(error.value)
    assert not run.exists()


def test_a_save_is_due_when_the_last_is_long_ago_and_done(tmp_path):
    writer = checkpoint.CheckpointWriter()
    assert not writer.is_overdue(15)
    writer.last_start -= 15 * 60
    assert writer.is_overdue(15)
    assert not writer.is_overdue(0), "0 minutes turn it off"
    writer.start(tmp_path, 1, make_state(1))
    assert not writer.is_overdue(15)
    writer.wait()
    writer.last_start -= 15 * 60
    assert writer.is_overdue(15)
    writer.saving = Future()  # it goes on
    assert not writer.is_overdue(15), "a slow disk must not hold up the training"


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1, make_state(1))


LOOP = """
import sys, torch, checkpoint
torch.set_num_threads(1)
writer = checkpoint.CheckpointWriter()
for step in range(1, 10_000):
    state = {"x": torch.full((300_000,), float(step)), "step": step}
    writer.start(sys.argv[1], step, state, keep_last=2)
    writer.wait()
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    command = [sys.executable, "-c", LOOP, str(tmp_path)]
    for moment in (0.003, 0.01, 0.02):
        loop = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE)
        while int(loop.stdout.readline()) < 3:
            pass
        time.sleep(moment)
        loop.send_signal(signal.SIGKILL)
        loop.wait()
        loop.stdout.close()
        path = checkpoint.newest_intact(tmp_path)
        loaded = {"x": torch.zeros(300_000), "step": 0}
        checkpoint.load_checkpoint(path, loaded)
        assert loaded["step"] == int(path.name.removeprefix("step_")) >= 3
        assert (loaded["x"] == loaded["step"]).all()
        shutil.rmtree(tmp_path)


RANKS = """
import sys, torch, checkpoint, config, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

def main():
    _, mode, folder = sys.argv
    x = torch.arange(12.).reshape(6, 2)
    distributed.setup("cpu")
    if mode == "save":
        mesh = init_device_mesh("cpu", (2,))
        state = {"whole": x.clone(), "sharded": distribute_tensor(x, mesh, [Shard(0)]), "step": 5}
        writer = checkpoint.CheckpointWriter()
        writer.start(folder, 5, state, {"ranks": distributed.world_size()})
        path = writer.wait()
        assert checkpoint.newest_intact(folder) == path
    state = {"whole": torch.zeros(6, 2), "sharded": torch.zeros(6, 2), "step": 0}
    meta = checkpoint.load_checkpoint(checkpoint.newest_intact(folder), state)
    assert torch.equal(state["whole"], x) and torch.equal(state["sharded"], x)
    assert state["step"] == 5 and meta["ranks"] == 2
    distributed.cleanup()
    if mode == "load":
        checkpoint.load_checkpoint(checkpoint.newest_intact(folder), {"whole": torch.zeros(7, 2)})

config.run(main)
"""


def test_saved_by_two_processes_read_by_one(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    script = str(tmp_path / "ranks.py")
    folder = tmp_path / "checkpoints"
    options = dict(env=child_environment(), capture_output=True, text=True, timeout=100)
    done = subprocess.run([*torchrun(*TWO_RANKS), script, "save", str(folder)], **options)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, script, "load", str(folder)], **options)
    assert done.returncode == 1, done.stderr  # its last line loads a tensor of another shape
    assert done.stderr.startswith("error: ")
    assert "whole: (6, 2) there, (7, 2) here" in done.stderr
    names = {path.name for path in (folder / "step_00000005").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp"} <= names
    manifest = json.loads((folder / "step_00000005" / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}


def test_the_teacher_file_is_plain_and_atomic(tmp_path):
    for x in (torch.ones(2), torch.zeros(2)):
        checkpoint.save_teacher(tmp_path / "teacher.pth", {"backbone.x": x}, {"patch_size": 8})
    content = torch.load(tmp_path / "teacher.pth", weights_only=True)
    assert not content["teacher"]["backbone.x"].any()
    assert content["arch"] == {"patch_size": 8}
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.pth"]


def test_what_is_saved_is_the_state_at_the_start(tmp_path):
    """The training goes on while the file is written; a second save waits for the first."""
    writer = checkpoint.CheckpointWriter()
    state = make_state(1)
    for step in (1, 2):
        writer.start(tmp_path, step, state)
        state["student"]["backbone.blocks.0.weight"].fill_(step)
        state["step"] = 100
    assert writer.wait().name == "step_00000002"
    loaded = make_state(0)
    checkpoint.load_checkpoint(tmp_path / "step_00000001", loaded)
    assert same(loaded, make_state(1))
    checkpoint.load_checkpoint(tmp_path / "step_00000002", loaded)
    assert (loaded["student"]["backbone.blocks.0.weight"] == 1).all()


def test_a_damaged_newer_one_does_not_cost_a_good_one_its_place(tmp_path):
    """Passed over at the start, it is still there when the run that went on saves, and prunes."""
    save(tmp_path, 4, make_state(4))
    truncate(save(tmp_path, 9, make_state(9)))
    path = save(tmp_path, 6, make_state(6), keep_last=1)
    assert path.name == "step_00000006"
    assert checkpoint.newest_intact(tmp_path) == path


def test_a_folder_that_not_all_ranks_see_is_one_sentence(tmp_path, monkeypatch):
    real = checkpoint.SafeReader.read_metadata

    def with_a_file_of_rank_1(self):
        metadata = real(self)
        next(iter(metadata.storage_data.values())).relative_path = "__1_0.distcp"
        return metadata

    monkeypatch.setattr(checkpoint.SafeReader, "read_metadata", with_a_file_of_rank_1)
    with pytest.raises(UserError, match="__1_0.distcp is not there: all ranks must see the same folder"):
        save(tmp_path, 1, make_state(1))
    assert not list(tmp_path.iterdir())
