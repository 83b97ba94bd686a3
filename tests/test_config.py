"""Settings: the authors' files load as they are, ours load as saved, every mistake is one sentence."""

import dataclasses
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import pytest
import torch
import yaml

import config
from config import Count, Pattern, UserError
from eval_knn import KNNEvaluator
from model import DINOv2
from optim import compute_schedules, make_optimizer, total_steps
from train import Logits, compute_losses

ROOT = Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))

# The keys and values of DINOv2's published YAML files, as Python data.
PRECISION = {"param_dtype": "fp16", "reduce_dtype": "fp16", "buffer_dtype": "fp32"}
MODULES = {
    module: {"sharding_strategy": "SHARD_GRAD_OP", "mixed_precision": PRECISION}
    for module in ("backbone", "dino_head", "ibot_head")
}
HEAD = dict(head_n_prototypes=65536, head_bottleneck_dim=256, head_nlayers=3, head_hidden_dim=2048)
DEFAULT = dict(
    MODEL=dict(WEIGHTS=""),
    compute_precision=dict(grad_scaler=True, teacher=MODULES, student=MODULES),
    dino=dict(loss_weight=1.0, **HEAD, koleo_loss_weight=0.1),
    ibot=dict(
        loss_weight=1.0, mask_sample_probability=0.5, mask_ratio_min_max=[0.1, 0.5],
        separate_head=False, **HEAD),
    train=dict(
        batch_size_per_gpu=64, dataset_path="ImageNet:split=TRAIN", output_dir=".", saveckp_freq=20, seed=0,
        num_workers=10, OFFICIAL_EPOCH_LENGTH=1250, cache_dataset=True, centering="centering"),
    student=dict(
        arch="vit_large", patch_size=16, drop_path_rate=0.3, layerscale=1.0e-05, drop_path_uniform=True,
        pretrained_weights="", ffn_layer="mlp", block_chunks=0, qkv_bias=True, proj_bias=True, ffn_bias=True,
        num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1),
    teacher=dict(
        momentum_teacher=0.992, final_momentum_teacher=1, warmup_teacher_temp=0.04, teacher_temp=0.07,
        warmup_teacher_temp_epochs=30),
    optim=dict(
        epochs=100, weight_decay=0.04, weight_decay_end=0.4, base_lr=0.004, lr=0.0, warmup_epochs=10,
        min_lr=1.0e-06, clip_grad=3.0, freeze_last_layer_epochs=1, scaling_rule="sqrt_wrt_1024",
        patch_embed_lr_mult=0.2,
        layerwise_decay=0.9, adamw_beta1=0.9, adamw_beta2=0.999),
    crops=dict(
        global_crops_scale=[0.32, 1.0], local_crops_number=8, local_crops_scale=[0.05, 0.32],
        global_crops_size=224, local_crops_size=96),
    evaluation=dict(eval_period_iterations=12500),
)  # fmt: skip
SHORT = dict(
    train=dict(dataset_path="ImageNet:split=TRAIN", batch_size_per_gpu=64), student=dict(block_chunks=4)
)
LONG = dict(
    dino=dict(head_n_prototypes=131072, head_bottleneck_dim=384),
    ibot=dict(separate_head=True, head_n_prototypes=131072),
    train=dict(batch_size_per_gpu=32, dataset_path="ImageNet22k", centering="sinkhorn_knopp"),
    student=dict(
        arch="vit_large", patch_size=14, drop_path_rate=0.4, ffn_layer="swiglufused", block_chunks=4
    ),
    teacher=dict(momentum_teacher=0.994),
    optim=dict(epochs=500, weight_decay_end=0.2, base_lr=2.0e-04, warmup_epochs=80, layerwise_decay=1.0),
    crops=dict(local_crops_size=98),
)
GIANT = {
    **LONG,
    "train": {**LONG["train"], "batch_size_per_gpu": 12},
    "student": {**LONG["student"], "arch": "vit_giant2"},
}


def written(tmp_path, content):
    path = tmp_path / "theirs.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def resolved(cfg):
    return {section: dataclasses.asdict(getattr(cfg, section)) for section in vars(cfg)}


@pytest.mark.parametrize(
    "theirs", [DEFAULT, SHORT, LONG, GIANT], ids=["default", "short", "vitl14", "vitg14"]
)
def test_the_authors_files_load_unchanged_with_one_warning(theirs, tmp_path, capsys):
    cfg = config.load(written(tmp_path, theirs))
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and warning.startswith("warning: ")
    told = set(warning.strip().split("ignored: ")[1].split(", "))
    ours = resolved(cfg)
    defaults = resolved(config.Config())
    dead = set()
    for section, content in theirs.items():
        for key, value in content.items():
            if key in ours.get(section, {}):
                got = ours[section][key]
                assert (list(got) if isinstance(got, tuple) else got) == value, (section, key)
            elif f"{section}.{key}" not in config.FIXED:  # those have the one value that is implemented
                dead.add(f"{section}.{key}")
    assert told == dead
    for section, content in ours.items():  # what they don't name keeps the published default
        for key, value in content.items():
            assert key in theirs.get(section, {}) or value == defaults[section][key]


def test_our_defaults_are_the_published_ones_and_have_no_warning(tmp_path, capsys):
    plain = config.Config()
    short = config.load(model="vitl16_short")
    assert capsys.readouterr().err == "" and short.to_yaml() == plain.to_yaml()
    for section, content in DEFAULT.items():
        for key, value in content.items():
            if hasattr(getattr(plain, section, None), key) and key not in ("dataset_path", "output_dir"):
                got = getattr(getattr(plain, section), key)
                assert (list(got) if isinstance(got, tuple) else got) == value, (section, key)


@pytest.mark.parametrize("theirs, model", [(LONG, "vitl14"), (GIANT, "vitg14")])
def test_our_long_recipes_differ_from_theirs_only_by_the_registers(theirs, model, tmp_path):
    published = config.load(written(tmp_path, theirs))
    ours = config.load(model=model)
    different = {name for name in config.KINDS if attrgetter(name)(published) != attrgetter(name)(ours)}
    registers = {"num_register_tokens", "interpolate_antialias", "interpolate_offset"}
    assert different == {f"student.{key}" for key in registers} | {"train.dataset_path"}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_and_loads_again_as_saved(name, tmp_path, capsys):
    cfg = config.load(model=name)
    text = cfg.to_yaml()
    again = config.load(written(tmp_path, text))
    assert again.to_yaml() == text and resolved(again) == resolved(cfg) and capsys.readouterr().err == ""
    header = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    for word in ("# Purpose:", "# Command:", "# Hardware:", "# Cost:", "# Metric:"):
        assert any(line.startswith(word) for line in header), word
    assert name == "laptop" or f"--model {name}" in "\n".join(header)


def test_dinov1_is_the_cls_loss_alone():
    for name in ("dinov1_vitb16", "dinov1_laptop"):
        cfg = config.load(model=name)
        assert cfg.ibot.loss_weight == cfg.ibot.mask_sample_probability == cfg.dino.koleo_loss_weight == 0
        assert cfg.student.layerscale == 0 and cfg.dino.freeze_weight_g and cfg.train.centering == "centering"


def test_the_order_is_model_then_file_then_command_line(tmp_path):
    file = written(tmp_path, "optim: {epochs: 50}\ntrain: {seed: 5}\nteacher:\n")
    cfg = config.load(file, "vitl14", ["optim.epochs=90", "crops.blur=[0, 0.5, 1]"])
    assert cfg.student.patch_size == 14 and cfg.train.seed == 5 and cfg.optim.epochs == 90
    assert cfg.crops.blur == (0, 0.5, 1)
    assert resolved(config.load()) == resolved(config.Config())


@pytest.mark.parametrize(
    "text, value",
    [("1e-4", 1e-4), ("1", 1.0), ("2.5e-3", 2.5e-3), ("'1e-4'", 1e-4)],
)
def test_floats_may_be_written_in_every_way(text, value):
    got = config.load(overrides=[f"optim.base_lr={text}"]).optim.base_lr
    assert got == value and type(got) is float


def test_texts_and_whole_numbers():
    cfg = config.load(
        overrides=["train.dataset_path=scenes:10:seed=1:size=32", "train.output_dir=", "train.seed=1e3"]
    )
    assert cfg.train.dataset_path == "scenes:10:seed=1:size=32" and cfg.train.output_dir == ""
    assert cfg.train.seed == 1000 and type(cfg.train.seed) is int


WRONG = [  # setting, words of the sentence
    ("optim.epoch=3", "no setting optim.epoch (given as 3); the nearest is optim.epochs"),
    ("batch_size_per_gpu=3", "the nearest is train.batch_size_per_gpu"),
    ("optin.epochs=3", "the nearest is optim.epochs"),
    ("student.epochs=3", "the nearest is optim.epochs"),
    ("optim.epochs", "write section.key=value"),
    (
        "train.batch_size_per_gpu=many",
        "train.batch_size_per_gpu is 'many', but must be a whole number, 1 or more",
    ),
    ("train.batch_size_per_gpu=0", "1 or more"),
    ("train.seed=0.5", "whole number"),
    ("train.seed=true", "whole number"),
    ("train.seed=-1", "0 or more"),
    ("optim.base_lr=.nan", "a number"),
    ("optim.base_lr=.inf", "a number"),
    ("optim.base_lr=", "a number"),
    ("teacher.momentum_teacher=1.1", "teacher.momentum_teacher is 1.1, but must be a number from 0 to 1"),
    ("teacher.teacher_temp=0", "above 0"),
    ("student.arch=vit_lrage", "one of vit_laptop, vit_small"),
    ("train.centering=[a]", "one of centering, sinkhorn_knopp"),
    ("dino.freeze_weight_g=yess", "true or false"),
    ("crops.jitter=[0.1]", "4 numbers"),
    ("crops.jitter=3", "4 numbers"),
    ("crops.blur=no", "one of as_executed, as_written"),
    ("crops.local_crops_scale=[0.1, x]", "from 0 to 1"),
    ("student.qkv_bias=false", "student.qkv_bias is False, but only True is implemented: remove the line"),
    ("optim.scaling_rule=linear_wrt_256", "only 'sqrt_wrt_1024' is implemented: remove the line"),
    ("crops.blur=[0, 2, 1]", "one of as_executed, as_written, or a number from 0 to 1"),
    ("crops.global_crops_size=225", "no multiple of student.patch_size 16"),
    ("crops.global_crops_size=4", "crops.global_crops_size must be 5 or more"),
    ("crops.local_crops_size=4", "crops.local_crops_size must be 5 or more"),
    ("crops.local_crops_size=100", "no multiple of student.patch_size 16"),
    ("dino.koleo_group=48", "dino.koleo_group 48 must divide train.batch_size_per_gpu 64"),
    ("optim.epochs=3", "optim.warmup_epochs 10 is longer than the run, optim.epochs 3"),
    (
        "ibot.mask_ratio_min_max=[0.5, 0.1]",
        "ibot.mask_ratio_min_max [0.5, 0.1] must name the smaller number first",
    ),
    ("student.interpolate_offset=1", "must be a number from 0 to 0.999999"),
    ("optim.adamw_beta1=1", "must be a number from 0 to 0.999999"),
    ("optim.adamw_beta2=1", "must be a number from 0 to 0.999999"),
    ("dino.head_n_prototypes=1", "must be a whole number, 2 or more"),
    ("ibot.head_n_prototypes=1", "must be a whole number, 2 or more"),
    ("dino.head_nlayers=1e9", "from 1 to 100"),
    ("ibot.head_nlayers=1e9", "from 1 to 100"),
    ("speed.threads=1e6", "from 0 to 1024"),
    ("train.num_workers=5000", "from 0 to 1024"),
    ("crops.global_crops_size=8e9", "a number of pixels from 1 to 65535"),
    ("crops.local_crops_size=8e9", "a number of pixels from 1 to 65535"),
    ("student.patch_size=0", "a number of pixels from 1 to 65535"),
    ("student.pos_embed_size=8e14", "a number of pixels up to 65535, or 0"),
    ("evaluation.image_size=8e9", "a number of pixels up to 65535, or 0"),
    ("evaluation.resize_size=8e9", "a number of pixels up to 65535, or 0"),
    ("ibot.mask_ratio_min_max=[0, 0.001]", "never masks one of the 196 patches: raise it"),
    ("train.output_dir=a\0b", "text without NUL"),
    ("optim.base_lr=" + "[" * 100_000, "optim.base_lr is not valid plain YAML: it is nested too deeply"),
    ("optim.base_lr=[", "not valid plain YAML"),
    ("optim.base_lr=!!python/object/apply:os.system ['touch /tmp/owned']", "not valid plain YAML"),
]


@pytest.mark.parametrize("setting, words", WRONG, ids=[w[0][:60] for w in WRONG])
def test_a_mistake_is_one_sentence_with_culprit_and_remedy(setting, words):
    with pytest.raises(UserError) as caught:
        config.load(overrides=[setting])
    assert words in str(caught.value) and "\n" not in str(caught.value)


FILES = [
    ("train: [1, 2]", "must hold sections"),
    ("- a\n- b", "must hold sections"),
    ("just words", "must hold sections"),
    ("[]", "must hold sections"),
    ("train: false", "must hold sections"),
    ("train:\n  seed: [1\n", "not valid plain YAML"),
    ("train:\n\tseed: 1", "not valid plain YAML"),
    ("train: !!python/object/apply:os.system ['touch /tmp/owned']", "python/object"),
    ("tarin: {seed: 1}", "no setting tarin.seed (given as 1); the nearest is train.seed"),
    ("1: {2: 3}", "no setting 1.2"),
    ("\x00", "not valid plain YAML"),
    ("[" * 100_000, "theirs.yaml is not valid plain YAML: it is nested too deeply"),
]


@pytest.mark.parametrize("content, words", FILES, ids=[w[0][:60] for w in FILES])
def test_a_bad_file_is_one_sentence(content, words, tmp_path):
    with pytest.raises(UserError) as caught:
        config.load(written(tmp_path, content))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("/tmp/owned").exists()


def test_a_value_that_is_endless_in_print_is_cut():
    """Each list holds the one before it twice: a few bytes of YAML, a million of text."""
    lists = ["&a0 [x]"] + [f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 20)]
    for name in ("optim.base_lr", "optim.nothing", "optim.scaling_rule"):
        with pytest.raises(UserError) as caught:
            config.load(overrides=[f"{name}=[{', '.join(lists)}]"])
        assert name in str(caught.value)
        assert len(str(caught.value)) < 1000
    with pytest.raises(UserError, match="train.seed is a number of thousands of digits, but must be"):
        config.load(overrides=[f"train.seed=0x{'f' * 4500}"])


def test_a_run_of_no_step_is_refused():
    spans = ["warmup_epochs", "freeze_last_layer_epochs"]
    with pytest.raises(UserError, match="is not even one step"):
        config.load(overrides=["optim.epochs=1e-4", *(f"optim.{name}=0" for name in spans)])


def test_missing_files_and_models(tmp_path):
    with pytest.raises(UserError, match="the nearest of .* is vitg14"):
        config.load(model="vitg_14")
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            config.load(path)
    (tmp_path / "latin.yaml").write_bytes(b"train: {output_dir: \xe9}")
    with pytest.raises(UserError, match="cannot be read"):
        config.load(tmp_path / "latin.yaml")
    assert resolved(config.load(written(tmp_path, ""))) == resolved(config.Config())


@pytest.mark.parametrize("text", ["/data/scan #2", "a: b", "100%", "x{0..3}", "[odd]", "null", "~", "it's"])
def test_a_text_is_taken_as_it_stands(text):
    assert config.load(overrides=[f"train.dataset_path=folder:{text}"]).train.dataset_path == f"folder:{text}"
    assert config.load(overrides=[f"train.output_dir={text}"]).train.output_dir == text
    again = config.load(overrides=[f'train.output_dir="{text}"'])  # quotes around the whole are YAML's
    assert again.train.output_dir == text
    assert resolved(again) == resolved(config.load(overrides=[f"train.output_dir={text}"]))


class Pizza:
    """A class of sections of its own."""

    class dough:
        grams: Count = 250
        water: Annotated[str, Pattern(r"\d+%", "a percentage such as 65%")] | Count = "65%"

    def __init__(self):
        config.fill_sections(self)


def test_any_class_of_sections_is_read_by_the_same_rules():
    pizza = Pizza()
    kinds = config.kinds_of(pizza)
    values = config.read_values(kinds, None, "dough.grams=3e2", "dough.water=70%", "dough.grams=200")
    config.assign(pizza, values)
    assert (pizza.dough.grams, pizza.dough.water) == (200, "70%")
    config.assign(pizza, {"dough.water": 150})
    assert pizza.dough.water == 150
    assert (Pizza().dough.grams, Pizza().dough.water) == (250, "65%")
    with pytest.raises(UserError, match="no setting dough.gram .given as 1.; the nearest is dough.grams"):
        config.assign(pizza, {"dough.gram": 1})
    with pytest.raises(UserError, match="dough.water is '7%%', but must be a percentage such as 65%, or a "):
        config.assign(pizza, {"dough.water": "7%%"})


# ---------------------------------------------------------------- settings that no recipe changes, at work


def laptop(*overrides):
    return config.load(model="laptop", overrides=overrides)


def test_heads_have_as_many_layers_as_they_are_told():
    model = DINOv2(laptop("dino.head_nlayers=1", "ibot.separate_head=true", "ibot.head_nlayers=2"))
    layers = [type(layer).__name__ for layer in model.ibot_head.mlp]
    assert layers == ["Linear", "GELU", "Linear"]
    assert isinstance(model.dino_head.mlp, torch.nn.Linear)


def test_drop_path_may_grow_from_block_to_block():
    cfg = laptop("student.drop_path_uniform=false")
    rates = [block.drop_path_rate for block in DINOv2(cfg, drop_path_rate=0.3).backbone.blocks]
    assert rates[0] == 0 and rates[-1] == 0.3 and rates == sorted(set(rates))


def test_adamw_gets_its_betas():
    cfg = laptop("optim.adamw_beta1=0.8", "optim.adamw_beta2=0.95")
    assert make_optimizer(DINOv2(cfg), cfg).defaults["betas"] == (0.8, 0.95)


def test_learning_rate_and_weight_decay_end_where_they_are_told():
    cfg = laptop("optim.min_lr=3e-5", "optim.weight_decay=0.07", "optim.weight_decay_end=0.2")
    assert compute_schedules(cfg, 0)["weight_decay"] == pytest.approx(0.07)
    end = compute_schedules(cfg, total_steps(cfg))
    assert (end["lr"], end["weight_decay"]) == (3e-5, 0.2)


def test_the_student_s_temperature_divides_its_logits():
    logits = torch.randn(2, 4, 8)
    targets = Logits(torch.randn(2, 4, 8).softmax(-1), None, None, None)
    losses = []
    for temperature in (0.1, 0.2):
        cfg = laptop(f"dino.student_temp={temperature}", "dino.koleo_loss_weight=0")
        student = Logits(logits * temperature, None, None, None)
        losses.append(compute_losses(student, targets, dict(masks=None), cfg)["loss_dino_global"])
    assert torch.allclose(*losses) and losses[0] > 0


def test_knn_uses_its_number_of_neighbours_and_its_batch_size(monkeypatch):
    """An image that is in the bank is its own nearest neighbour; all images together outvote it."""
    monkeypatch.setattr("eval_knn.check_overlap", lambda *args: None)
    images = ["evaluation.train_path=scenes:40", "evaluation.test_path=scenes:40", "train.num_workers=0"]
    cfg = laptop(*images, "evaluation.batch_size=7")
    torch.manual_seed(0)
    backbone = DINOv2(cfg).backbone
    batch_sizes = []
    backbone.register_forward_pre_hook(lambda module, inputs: batch_sizes.append(len(inputs[0])))
    accuracy = {}
    for k in (1, 40):
        cfg.evaluation.knn_k = k
        evaluator = KNNEvaluator(cfg)
        accuracy[k] = evaluator.accuracy(backbone, evaluator.sets)
    assert accuracy[1] == 1 > accuracy[40]
    assert max(batch_sizes) == 7


def test_local_crops_of_any_size_where_there_are_none():
    assert config.load(overrides=["crops.local_crops_number=0", "crops.local_crops_size=97"])


def test_scripts_end_with_a_sentence_or_their_exit_code():
    script = [sys.executable, str(ROOT / "config.py"), "laptop"]
    good = subprocess.run(script, capture_output=True, text=True)
    assert good.returncode == 0 and yaml.safe_load(good.stdout)["student"]["arch"] == "vit_laptop"
    bad = subprocess.run([*script, "optim.epoch=1"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    for code in (0, 75, None):
        with pytest.raises(SystemExit) as left:
            config.run(lambda code=code: code)
        assert (left.value.code or 0) == (code or 0)
