"""The recipes, end to end on a tiny model: go on from weights, the high-resolution stage, distillation."""

import shutil

import pytest
import torch

import checkpoint
import config
import model
import train
from config import UserError
from features import init_from_weights, load_backbone
from model import SIZES

TINY = ["student.arch=vit_laptop", "student.patch_size=8", "student.ffn_layer=mlp", "student.layerscale=1.0",
        "train.dataset_path=scenes:60:seed=3", "train.batch_size_per_gpu=4", "train.num_workers=0",
        "train.log_every=1", "crops.global_crops_size=32", "crops.local_crops_size=16",
        "crops.local_crops_number=2", "evaluation.train_path=", "evaluation.test_path=",
        "speed.checkpointing=off"]  # fmt: skip
HEADS = ["head_n_prototypes=32", "head_hidden_dim=16", "head_bottleneck_dim=8"]
TINY += [f"{section}.{key}" for section in ("dino", "ibot") for key in HEADS]
SHORT = ["train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=2", "optim.warmup_epochs=0"]


def go(folder, *arguments):
    assert train.main(["--output-dir", str(folder), *arguments]) == 0
    return torch.load(folder / "teacher.pth", weights_only=True)


def settings(preset, *overrides):
    return config.load(model=preset, overrides=[*TINY, *overrides])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of the recipe that the three below start from: 32 pixels, so positions for 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    go(folder, "--model", "vitl14", *TINY, *SHORT, "optim.freeze_last_layer_epochs=0")
    return folder


def bare(run, folder):
    """The backbone alone, as released files hold it."""
    content = torch.load(run / "teacher.pth", weights_only=True)
    tensors = {k: v for k, v in content["teacher"].items() if k.startswith("backbone.")}
    torch.save({"teacher": tensors, "arch": content["arch"]}, folder / "released.pth")
    return folder / "released.pth"


def part_of(run, step, part, cfg):
    state = {part: getattr(train.TrainState(cfg), part).state_dict()}
    checkpoint.load_checkpoint(run / "checkpoints" / f"step_{step:08d}", state)
    return state[part]


def test_going_on_from_released_weights(pretrained, tmp_path, capsys):
    file = bare(pretrained, tmp_path)
    larger = [*TINY, *SHORT, "crops.global_crops_size=64", "train.checkpoint_every=2",
              "optim.freeze_backbone_epochs=1"]  # fmt: skip
    go(tmp_path / "run", "--model", "vitb14_continue", "--init-from", str(file), *larger)
    said = capsys.readouterr().out
    assert f"start: backbone of {file}, its positions resized from 4 x 4 to 8 x 8; heads drawn anew" in said
    cfg = config.load(tmp_path / "run" / "config.yaml")
    old = load_backbone(file)
    for name in ("student", "ema"):  # the heads have learned, the backbone waits
        saved = part_of(tmp_path / "run", 2, "student" if name == "student" else "teacher", cfg)
        waiting = {k.removeprefix("backbone."): v for k, v in saved.items() if k.startswith("backbone.")}
        assert all(torch.equal(waiting[k], v) for k, v in old.state_dict().items() if k != "pos_embed")
    start = train.TrainState(cfg).student.state_dict()
    moved = part_of(tmp_path / "run", 2, "student", cfg)
    assert not torch.equal(start["dino_head.mlp.0.weight"], moved["dino_head.mlp.0.weight"])
    end = part_of(tmp_path / "run", 4, "student", cfg)
    assert not torch.equal(end["backbone.blocks.0.attn.qkv.weight"], old.blocks[0].attn.qkv.weight)


def test_the_high_resolution_stage(pretrained, tmp_path):
    """Backbone and heads of the run, at twice the resolution: at its first step it sees what the run saw."""
    larger = [*TINY, "crops.global_crops_size=64", "optim.epochs=2", "optim.warmup_epochs=1",
              "train.OFFICIAL_EPOCH_LENGTH=2"]  # fmt: skip
    cfg = config.load(model="vitl14_highres", overrides=[*larger, f"train.init_from={pretrained}"])
    t = train.TrainState(cfg)
    assert t.origin.endswith("from 4 x 4 to 8 x 8; heads of the same")
    images, old = torch.randn(2, 3, 64, 64), load_backbone(pretrained)
    new = t.ema.backbone(images)
    torch.testing.assert_close(new.patches, old(images).patches, rtol=1e-5, atol=1e-6)
    theirs = torch.load(pretrained / "teacher.pth", weights_only=True)["teacher"]
    assert all(torch.equal(v, theirs[k]) for k, v in t.student.state_dict().items() if "head." in k)
    content = go(tmp_path / "run", "--model", "vitl14_highres", "--init-from", str(pretrained), *larger)
    assert content["arch"]["img_size"] == 64 and content["teacher"]["backbone.pos_embed"].shape[1] == 65


def test_the_high_resolution_schedules_are_those_of_the_long_run_compressed():
    long, short = (config.load(model=m) for m in ("vitl14", "vitl14_highres"))
    assert round(short.optim.epochs * short.train.OFFICIAL_EPOCH_LENGTH) == 10_000
    for share in (0.1, 0.5, 0.9):
        a, b = (train.compute_schedules(c, round(share * c.optim.epochs * c.train.OFFICIAL_EPOCH_LENGTH))
                for c in (long, short))  # fmt: skip
        for key in ("weight_decay", "momentum", "teacher_temp"):
            assert a[key] == pytest.approx(b[key], rel=1e-3)


@pytest.fixture
def smaller(monkeypatch):
    monkeypatch.setitem(SIZES, "vit_small", dict(embed_dim=48, depth=2, num_heads=3))
    return ["student.arch=vit_small"]


def test_distillation(pretrained, smaller, tmp_path):
    arguments = ["--model", "vits14_distill", *TINY, *smaller, *SHORT, f"train.distill_from={pretrained}",
                 "train.checkpoint_every=2", "optim.freeze_last_layer_epochs=0"]  # fmt: skip
    content = go(tmp_path / "run", *arguments)
    assert content["arch"]["embed_dim"] == 48
    cfg = config.load(tmp_path / "run" / "config.yaml")
    t = train.TrainState(cfg)
    frozen = torch.load(pretrained / "teacher.pth", weights_only=True)["teacher"]
    assert all(torch.equal(v, frozen[k]) for k, v in t.teacher.state_dict().items())
    start = t.ema.state_dict()
    assert any(not torch.equal(v, start[k]) for k, v in content["teacher"].items()), "the average has moved"
    # stopped and resumed, it comes to the same
    for path in (tmp_path / "run" / "checkpoints").glob("step_*4"):
        shutil.rmtree(checkpoint.move_aside(path))
    again = go(tmp_path / "run", *arguments, "--resume")
    assert all(torch.equal(v, again["teacher"][k]) for k, v in content["teacher"].items())


def test_a_step_of_distillation_hides_nothing_and_spares_the_teacher(pretrained, smaller):
    cfg = settings("vits14_distill", *smaller, f"train.distill_from={pretrained}")
    t, loader = train.TrainState(cfg), None
    loader = train.make_loader(cfg, train.open_source(cfg.train.dataset_path), "cpu")
    batch = next(loader)
    assert len(batch["mask_indices"]) == 2 * 4 * 16, "the iBOT loss is over all patches"
    seen = []
    t.student.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    before = [v.clone() for v in t.teacher.state_dict().values()]
    now = dict(train.compute_schedules(cfg, 0), lr=1e-3, last_layer_lr=1e-3, backbone_lr=1e-3)
    metrics = train.train_step(t, [batch], now, cfg)
    assert seen == [[None, None]] and metrics["loss_ibot"] > 0 and not metrics["skipped"]
    assert all(torch.equal(a, b) for a, b in zip(before, t.teacher.state_dict().values(), strict=True))


def complaint(preset, *overrides):
    with pytest.raises(UserError) as e:
        train.TrainState(settings(preset, *overrides))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_does_not_fit_is_one_sentence(pretrained, smaller, tmp_path):
    file = bare(pretrained, tmp_path)
    begin = f"train.init_from={pretrained}"
    assert "embed_dim is 96 there, 48 here" in complaint("vitb14_continue", begin, *smaller)
    assert "num_register_tokens is 4" in complaint("vitb14_continue", begin, "student.num_register_tokens=0")
    assert "interpolate_offset" in complaint("vitb14_continue", begin, "student.interpolate_offset=0.1")
    assert "no weights at" in complaint("vitb14_continue", "train.init_from=/nowhere.pth")
    learn = f"train.distill_from={pretrained}"
    assert "32 there, 64 here" in complaint("vits14_distill", learn, "dino.head_n_prototypes=64")
    assert "separate_head" in complaint("vits14_distill", learn, "ibot.separate_head=false")
    assert "no run at /nowhere" in complaint("vits14_distill", "train.distill_from=/nowhere")
    headless = tmp_path / "headless"
    headless.mkdir()
    (headless / "config.yaml").write_text((pretrained / "config.yaml").read_text())
    file.rename(headless / "teacher.pth")
    assert "lacks heads" in complaint("vits14_distill", f"train.distill_from={headless}")


def test_released_weights_start_as_they_are(tmp_path, monkeypatch):
    """Bare tensors without a description, 518-pixel positions: the architecture is read from the shapes."""
    monkeypatch.setitem(SIZES, "vit_base", dict(embed_dim=128, depth=2, num_heads=2))
    cfg = config.load(model="vitb14_continue", overrides=["dino.head_n_prototypes=16"])
    released = model.VisionTransformer(**SIZES["vit_base"], num_register_tokens=4, interpolate_antialias=True,
                                       interpolate_offset=0.0, init_std=0.1).eval()  # fmt: skip
    torch.save(released.state_dict(), tmp_path / "released.pth")
    ours = model.DINOv2(cfg)
    assert "from 37 x 37 to 16 x 16" in init_from_weights(ours, tmp_path / "released.pth")[0]
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours.backbone.eval()(images).cls, released(images).cls, rtol=1e-5, atol=1e-5)
