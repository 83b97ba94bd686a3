"""The recipes, end to end on a tiny model: go on from weights, the high-resolution stage, distillation."""

import shutil

import pytest
import torch
from helpers import load_teacher, same_tensors

import checkpoint
import config
import model
import train
from config import UserError
from features import init_from_weights, load_backbone
from model import SIZES
from optim import compute_schedules, total_steps

# Any recipe, on 4 x 4 patches with 32 prototypes.
TINY = ["student.arch=vit_laptop", "student.patch_size=8", "student.ffn_layer=mlp", "student.layerscale=1.0",
        "train.dataset_path=scenes:60:seed=3", "train.batch_size_per_gpu=4", "train.num_workers=0",
        "train.log_every=1", "crops.global_crops_size=32", "crops.local_crops_size=16",
        "crops.local_crops_number=2", "evaluation.train_path=", "evaluation.test_path=",
        "dino.head_n_prototypes=32", "dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8",
        "ibot.head_n_prototypes=32", "ibot.head_hidden_dim=16", "ibot.head_bottleneck_dim=8",
        "speed.checkpointing=off"]  # fmt: skip
FOUR_STEPS = ["train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=2", "optim.warmup_epochs=0"]


def run_recipe(folder, *arguments):
    """-> the content of teacher.pth."""
    assert train.main(["--output-dir", str(folder), *arguments]) == 0
    return torch.load(folder / "teacher.pth", weights_only=True)


def tiny_recipe(preset, *overrides):
    return config.load(model=preset, overrides=[*TINY, *overrides])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of the recipe that the three below start from: 32 pixels, so positions for 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    run_recipe(folder, "--model", "vitl14", *TINY, *FOUR_STEPS, "optim.freeze_last_layer_epochs=0")
    return folder


def backbone_file(run, folder):
    """The backbone of a run alone, as released files hold it: folder/released.pth."""
    content = torch.load(run / "teacher.pth", weights_only=True)
    content["teacher"] = {k: v for k, v in content["teacher"].items() if k.startswith("backbone.")}
    torch.save(content, folder / "released.pth")
    return folder / "released.pth"


def load_saved(run, step, network, cfg):
    """The weights of "student" or "teacher" in a checkpoint of a run."""
    state = {network: getattr(train.TrainState(cfg), network).state_dict()}
    checkpoint.load_checkpoint(run / "checkpoints" / f"step_{step:08d}", state)
    return state[network]


def test_going_on_from_released_weights(pretrained, tmp_path, capsys):
    file = backbone_file(pretrained, tmp_path)
    larger = [*TINY, *FOUR_STEPS, "crops.global_crops_size=64", "train.checkpoint_every=2",
              "optim.freeze_backbone_epochs=1"]  # fmt: skip
    run_recipe(tmp_path / "run", "--model", "vitb14_continue", "--init-from", str(file), *larger)
    start = f"start: backbone of {file}, its positions resized from 4 x 4 to 8 x 8; heads drawn anew"
    assert start in capsys.readouterr().out
    cfg = config.load(tmp_path / "run" / "config.yaml")
    old = load_backbone(file).state_dict()
    for network in ("student", "teacher"):  # the heads have learned, the backbone waits
        saved = load_saved(tmp_path / "run", 2, network, cfg)
        for name, value in old.items():
            if name != "pos_embed":
                assert torch.equal(saved[f"backbone.{name}"], value), name
    first_layer = "dino_head.mlp.0.weight"
    halfway = load_saved(tmp_path / "run", 2, "student", cfg)
    assert not torch.equal(train.TrainState(cfg).student.state_dict()[first_layer], halfway[first_layer])
    qkv = "blocks.0.attn.qkv.weight"
    end = load_saved(tmp_path / "run", 4, "student", cfg)
    assert not torch.equal(end[f"backbone.{qkv}"], old[qkv])


def test_the_high_resolution_stage(pretrained, tmp_path):
    """Backbone and heads of the run, at twice the resolution: at its first step it sees what the run saw."""
    larger = [*TINY, "crops.global_crops_size=64", "optim.epochs=2", "optim.warmup_epochs=1",
              "train.OFFICIAL_EPOCH_LENGTH=2"]  # fmt: skip
    cfg = config.load(model="vitl14_highres", overrides=[*larger, f"train.init_from={pretrained}"])
    state = train.TrainState(cfg)
    assert state.origin.endswith("from 4 x 4 to 8 x 8; heads of the same")
    images = torch.randn(2, 3, 64, 64)
    expected = load_backbone(pretrained)(images)
    torch.testing.assert_close(state.ema.backbone(images).patches, expected.patches, rtol=1e-5, atol=1e-6)
    theirs = load_teacher(pretrained)
    for name, value in state.student.state_dict().items():
        if "head." in name:
            assert torch.equal(value, theirs[name]), name
    arguments = ["--model", "vitl14_highres", "--init-from", str(pretrained), *larger]
    content = run_recipe(tmp_path / "run", *arguments)
    assert content["arch"]["img_size"] == 64
    assert content["teacher"]["backbone.pos_embed"].shape[1] == 65


def test_the_high_resolution_schedules_are_those_of_the_long_run_compressed():
    long = config.load(model="vitl14")
    short = config.load(model="vitl14_highres")
    assert total_steps(short) == 10_000
    for share in (0.1, 0.5, 0.9):
        expected = compute_schedules(long, round(share * total_steps(long)))
        found = compute_schedules(short, round(share * total_steps(short)))
        for name in ("weight_decay", "momentum", "teacher_temp"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3)


@pytest.fixture
def smaller(monkeypatch):
    """The settings of a student that is smaller than the teacher."""
    monkeypatch.setitem(SIZES, "vit_small", dict(embed_dim=48, depth=2, num_heads=3))
    return ["student.arch=vit_small"]


def test_distillation(pretrained, smaller, tmp_path):
    arguments = ["--model", "vits14_distill", f"train.distill_from={pretrained}", *TINY, *smaller]
    arguments += [*FOUR_STEPS, "train.checkpoint_every=2", "optim.freeze_last_layer_epochs=0"]
    content = run_recipe(tmp_path / "run", *arguments)
    assert content["arch"]["embed_dim"] == 48
    cfg = config.load(tmp_path / "run" / "config.yaml")
    state = train.TrainState(cfg)
    assert same_tensors(state.teacher.state_dict(), load_teacher(pretrained))
    assert not same_tensors(state.ema.state_dict(), content["teacher"]), "the average has not moved"
    # stopped and resumed, it comes to the same
    for path in (tmp_path / "run" / "checkpoints").glob("step_*4"):
        shutil.rmtree(checkpoint.move_aside(path))
    again = run_recipe(tmp_path / "run", *arguments, "--resume")
    assert same_tensors(again["teacher"], content["teacher"])


def test_a_step_of_distillation_hides_nothing_and_spares_the_teacher(pretrained, smaller):
    cfg = tiny_recipe("vits14_distill", *smaller, f"train.distill_from={pretrained}")
    state = train.TrainState(cfg)
    batch = next(train.make_loader(cfg, train.open_dataset(cfg.train.dataset_path, cfg.data), "cpu"))
    assert len(batch["mask_indices"]) == 2 * 4 * 16, "the iBOT loss is over all patches"
    masks = []
    backbone = state.student.backbone
    backbone.register_forward_pre_hook(lambda module, inputs: masks.append(inputs[1]))
    before = {name: value.clone() for name, value in state.teacher.state_dict().items()}
    schedules = dict(compute_schedules(cfg, 0), lr=1e-3, last_layer_lr=1e-3, backbone_lr=1e-3)
    metrics = train.train_step(state, [batch], schedules, cfg)
    assert masks == [[None, None]]
    assert metrics["loss_ibot"] > 0
    assert not metrics["skipped"]
    assert same_tensors(state.teacher.state_dict(), before)


def refusal(preset, *overrides):
    """The sentence with which a run is refused."""
    with pytest.raises(UserError) as error:
        train.TrainState(tiny_recipe(preset, *overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_one_sentence(pretrained, smaller, tmp_path):
    init_from = f"train.init_from={pretrained}"
    assert "embed_dim is 96 there, 48 here" in refusal("vitb14_continue", init_from, *smaller)
    no_registers = refusal("vitb14_continue", init_from, "student.num_register_tokens=0")
    assert "num_register_tokens is 4" in no_registers
    assert "interpolate_offset" in refusal("vitb14_continue", init_from, "student.interpolate_offset=0.1")
    assert "no weights at" in refusal("vitb14_continue", "train.init_from=/nowhere.pth")
    distill_from = f"train.distill_from={pretrained}"
    assert "32 there, 64 here" in refusal("vits14_distill", distill_from, "dino.head_n_prototypes=64")
    assert "separate_head" in refusal("vits14_distill", distill_from, "ibot.separate_head=false")
    assert "no run at /nowhere" in refusal("vits14_distill", "train.distill_from=/nowhere")
    headless = tmp_path / "headless"
    headless.mkdir()
    (headless / "config.yaml").write_text((pretrained / "config.yaml").read_text())
    backbone_file(pretrained, tmp_path).rename(headless / "teacher.pth")
    assert "lacks heads" in refusal("vits14_distill", f"train.distill_from={headless}")


def test_released_weights_start_as_they_are(tmp_path, monkeypatch):
    """Bare tensors without a description, 518-pixel positions: the architecture is read from the shapes."""
    monkeypatch.setitem(SIZES, "vit_base", dict(embed_dim=128, depth=2, num_heads=2))
    cfg = config.load(model="vitb14_continue", overrides=["dino.head_n_prototypes=16"])
    layout = dict(num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0)
    released = model.VisionTransformer(**SIZES["vit_base"], **layout, init_std=0.1).eval()
    torch.save(released.state_dict(), tmp_path / "released.pth")
    ours = model.DINOv2(cfg)
    assert "from 37 x 37 to 16 x 16" in init_from_weights(ours, tmp_path / "released.pth")[0]
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours.backbone.eval()(images).cls, released(images).cls, rtol=1e-5, atol=1e-5)
