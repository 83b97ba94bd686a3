"""Checkpoints survive kill -9, damage, a full disk, another number of processes; not another model."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import checkpoint
from config import UserError

ROOT = Path(__file__).parent.parent


def state(seed=0, width=4):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    student = {"backbone.blocks.0.weight": draw(width, 3), "backbone.norm.bias": draw(width).bfloat16()}
    groups = [{"lr": 0.1 * seed, "names": ["a", "b"]}, {"lr": None}]
    optimizer = {"state": {"a": {"m": draw(2), "step": draw(())}}, "groups": groups}
    return {"student": student, "optimizer": optimizer, "step": seed, "note": f"seed {seed}"}


def save(folder, step, state, *args, **kw):
    """Begin, and wait for the end."""
    writer = checkpoint.CheckpointWriter()
    writer.start(folder, step, state, *args, **kw)
    return writer.wait()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def test_round_trip_is_bitwise_and_in_place(tmp_path):
    path = save(tmp_path, 7, state(7), {"images": 70, "note": "for people"})
    assert path.name == "step_00000007" and checkpoint.newest_intact(tmp_path) == path
    fresh = state(1)
    tensor = fresh["student"]["backbone.blocks.0.weight"]
    meta = checkpoint.load_checkpoint(path, fresh)
    assert meta == {"step": 7, "images": 70, "note": "for people"}
    assert same(fresh, state(7)) and fresh["student"]["backbone.blocks.0.weight"] is tensor
    part = {"student": state(1)["student"]}
    checkpoint.load_checkpoint(path, part)  # a part of the top level alone
    assert same(part["student"], state(7)["student"])


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 3, state(1))
    path, fresh = save(tmp_path, 3, state(2)), state(0)
    checkpoint.load_checkpoint(path, fresh)
    assert same(fresh, state(2)) and [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_prunes_all_but_the_last_and_every_so_many(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, {"x": torch.zeros(1)}, keep_last=2, keep_every=3)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["3", "6", "7", "8"]


def truncate(path):
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])


def flip(path):
    data = next(path.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


DAMAGES = {
    "bytes, not": truncate,
    "SHA-256": flip,
    "has 0 bytes": lambda p: next(p.glob("*.distcp")).write_bytes(b""),
    "manifest.json is missing": lambda p: (p / "manifest.json").unlink(),
    "manifest.json is unreadable": lambda p: (p / "manifest.json").write_text('{"files": {'),
    "manifest.json lists too few": lambda p: (p / "manifest.json").write_text('{"files": {}}'),
    ".metadata is missing": lambda p: (p / ".metadata").unlink(),
    "interrupted": lambda p: p.rename(p.with_name(f".{p.name}.partial")),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_the_reason_told(reason, tmp_path, capsys):
    good, bad = save(tmp_path, 1, state(1)), save(tmp_path, 2, state(2))
    DAMAGES[reason](bad)
    assert checkpoint.newest_intact(tmp_path) == good
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and bad.name in said and reason in said
    checkpoint.load_checkpoint(good, fresh := state(0))
    assert same(fresh, state(1))
    save(tmp_path, 3, state(3))  # and life goes on
    assert checkpoint.newest_intact(tmp_path).name == "step_00000003"


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.newest_intact(tmp_path) is None and checkpoint.newest_intact(tmp_path / "nowhere") is None


def test_another_architecture_is_named(tmp_path):
    path = save(tmp_path, 1, state(1))
    wide = state(2, width=5)
    with pytest.raises(
        UserError, match=r"2 entries differ \(student.backbone.blocks.0.weight: \(4, 3\) there, \(5, 3\)"
    ):
        checkpoint.load_checkpoint(path, wide)
    assert same(wide, state(2, width=5)), "nothing may be overwritten"
    deeper, shallower = state(2), state(2)
    deeper["student"]["backbone.blocks.1.weight"] = torch.zeros(3)
    del shallower["student"]["backbone.norm.bias"]
    with pytest.raises(UserError, match="blocks.1.weight: nothing there"):
        checkpoint.load_checkpoint(path, deeper)
    with pytest.raises(UserError, match="norm.bias: .* nothing here"):  # DCP alone would not notice
        checkpoint.load_checkpoint(path, shallower)


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))


def test_hostile_metadata_runs_no_code(tmp_path):
    path, trace = save(tmp_path, 1, state(1)), tmp_path / "trace"
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(trace)))
    old = Version(torch.__version__) < Version("2.13")  # which keeps the reason to itself
    with pytest.raises(UserError, match="metadata is None" if old else "system"):
        checkpoint.load_checkpoint(path, state(0))
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
folder, writer, big = Path(sys.argv[1]), checkpoint.CheckpointWriter(), {"x": torch.zeros(100_000)}
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
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "step_00000002 could not be written" in first and "could not be written" in second
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1, state(1))


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
    for moment in (0.003, 0.01, 0.02):
        loop = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path)], env=environment(), stdout=subprocess.PIPE
        )
        while int(loop.stdout.readline()) < 3:
            pass
        time.sleep(moment)
        loop.send_signal(signal.SIGKILL)
        loop.wait()
        loop.stdout.close()
        path, loaded = checkpoint.newest_intact(tmp_path), {"x": torch.zeros(300_000), "step": 0}
        checkpoint.load_checkpoint(path, loaded)
        assert int(path.name[5:]) >= 3 and loaded["step"] == int(path.name[5:])
        assert (loaded["x"] == loaded["step"]).all()
        shutil.rmtree(tmp_path)


RANKS = """
import sys, torch, checkpoint, config, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

def main():
    mode, folder, x = sys.argv[1], sys.argv[2], torch.arange(12.).reshape(6, 2)
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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    folder = str(tmp_path / "checkpoints")
    for start, mode in ((torchrun, "save"), ([sys.executable], "load")):
        command = [*start, str(tmp_path / "ranks.py"), mode, folder]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
        assert done.returncode == (mode == "load"), done.stderr
    assert done.stderr.startswith("error: ") and "whole: (6, 2) there, (7, 2) here" in done.stderr
    names = {p.name for p in (tmp_path / "checkpoints" / "step_00000005").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp"} <= names
    manifest = json.loads((tmp_path / "checkpoints" / "step_00000005" / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}


def test_the_teacher_file_is_plain_and_atomic(tmp_path):
    for x in (torch.ones(2), torch.zeros(2)):
        checkpoint.save_teacher(tmp_path / "teacher.pth", {"backbone.x": x}, {"patch_size": 8})
    content = torch.load(tmp_path / "teacher.pth", weights_only=True)
    assert not content["teacher"]["backbone.x"].any() and content["arch"] == {"patch_size": 8}
    assert [p.name for p in tmp_path.iterdir()] == ["teacher.pth"]


def test_what_is_saved_is_the_state_at_the_start(tmp_path):
    """The training goes on while the file is written; a second save waits for the first."""
    writer, mine = checkpoint.CheckpointWriter(), state(1)
    for step in (1, 2):
        writer.start(tmp_path, step, mine)
        mine["student"]["backbone.blocks.0.weight"].fill_(step)
        mine["step"] = 100
    assert writer.wait().name == "step_00000002"
    checkpoint.load_checkpoint(tmp_path / "step_00000001", first := state(0))
    assert same(first, state(1))
    checkpoint.load_checkpoint(tmp_path / "step_00000002", second := state(0))
    assert (second["student"]["backbone.blocks.0.weight"] == 1).all()


def test_a_damaged_newer_one_does_not_cost_a_good_one_its_place(tmp_path):
    """Passed over at the start, it is still there when the run that went on saves, and prunes."""
    save(tmp_path, 4, state(4))
    truncate(save(tmp_path, 9, state(9)))
    path = save(tmp_path, 6, state(6), keep_last=1)
    assert checkpoint.newest_intact(tmp_path) == path and path.name == "step_00000006"


def test_a_folder_that_not_all_ranks_see_is_one_sentence(tmp_path, monkeypatch):
    real = checkpoint.SafeReader.read_metadata

    def and_another(self):
        metadata = real(self)
        next(iter(metadata.storage_data.values())).relative_path = "__1_0.distcp"
        return metadata

    monkeypatch.setattr(checkpoint.SafeReader, "read_metadata", and_another)
    with pytest.raises(UserError, match="__1_0.distcp is not there: all ranks must see the same folder"):
        save(tmp_path, 1, state(1))
    assert not list(tmp_path.iterdir())
