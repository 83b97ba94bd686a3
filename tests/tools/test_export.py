"""Weights in and out: every layout there and back, conversion for training, hostile files, the cache,
torch.hub; and the real packages, where they are installed."""

import argparse
import functools
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from helpers import RELEASED_CHECKPOINTS

import config
import features
import hubconf
from config import UserError
from model import DINOv2, VisionTransformer
from tools import export, weights
from tools.weights import load_backbone, read_weights, rename_to

ROOT = Path(__file__).parents[2]
REGISTERS = dict(num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0)
KINDS = {"mlp": {}, "mlp, registers": REGISTERS, "swiglu": dict(ffn_layer="swiglu"),
         "swiglu, registers": dict(ffn_layer="swiglu", **REGISTERS),
         "two heads": dict(num_heads=2, **REGISTERS),
         "no LayerScale, patches of 16": dict(layerscale=0, patch_size=16, img_size=48)}  # fmt: skip
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def tiny_backbone(**options):
    """A backbone in which every parameter matters."""
    arch = dict(embed_dim=96, depth=3, num_heads=3, patch_size=4, img_size=24, layerscale=1.0)
    return perturbed(VisionTransformer(**{**arch, **options}))


@torch.no_grad()
def perturbed(backbone):
    rng = torch.Generator().manual_seed(1)
    for x in backbone.parameters():
        x += 0.1 * torch.randn(x.shape, generator=rng)
    return backbone.eval().requires_grad_(False)


def same_features(a, b, sides=((6, 6), (5, 3))):
    for h, w in sides:
        x = torch.randn(2, 3, h * a.patch_size, w * a.patch_size)
        for ours, theirs in zip(a(x), b(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def assert_same_tensors(a, b, but=()):
    assert a.keys() == b.keys()
    assert [name for name in a if name not in but and not torch.equal(a[name], b[name])] == []


def refused(words, path, load=load_backbone):
    with pytest.raises(UserError, match=words) as error:
        load(path)
    assert "\n" not in str(error.value)


# ---- there and back --------------------------------------------------------------------------------------


@kinds
def test_hugging_face_and_back(options, tmp_path):
    backbone = tiny_backbone(**options)
    export.write_hf(backbone, tmp_path / "out")
    back = load_backbone(tmp_path / "out")
    tensors = rename_to("hf", back.state_dict())
    if not backbone.arch["layerscale"]:  # theirs has gained one
        tensors = {name: x for name, x in tensors.items() if "layer_scale" not in name}
    assert_same_tensors(rename_to("hf", backbone.state_dict()), tensors)
    same_features(backbone, back)
    assert back.arch == {**backbone.arch, "layerscale": 1.0}
    hf_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf_config["num_attention_heads"] == backbone.arch["num_heads"]


@kinds
def test_timm_and_back(options, tmp_path):
    backbone = tiny_backbone(**options)
    file = tmp_path / "w.safetensors"
    export.write_timm(backbone, file)
    back = load_backbone(file)
    folded = ("cls_token", "pos_embed") if backbone.num_register_tokens else ()
    assert_same_tensors(backbone.state_dict(), back.state_dict(), but=("mask_token", *folded))
    assert torch.equal(backbone.pos_embed[:, 1:], back.pos_embed[:, 1:])
    same_features(backbone, back)
    assert back.arch == backbone.arch


@kinds
def test_meta_and_back(options, tmp_path):
    backbone = tiny_backbone(**options)
    file = tmp_path / "w.pth"
    if backbone.arch["num_heads"] == 2:  # nothing in the file could say so
        with pytest.raises(UserError, match="2 heads"):
            export.write_meta(backbone, file)
        return
    export.write_meta(backbone, file)
    back = load_backbone(file)
    assert_same_tensors(backbone.state_dict(), back.state_dict())
    same_features(backbone, back)


def test_three_times_round_the_world(tmp_path):
    """Meta's -> Hugging Face's -> Meta's: the same bits."""
    torch.save(tiny_backbone(**REGISTERS).state_dict(), tmp_path / "a.pth")
    export.write_hf(load_backbone(tmp_path / "a.pth"), tmp_path / "hf")
    export.write_meta(load_backbone(tmp_path / "hf"), tmp_path / "b.pth")
    assert_same_tensors(*(torch.load(tmp_path / name, weights_only=True) for name in ("a.pth", "b.pth")))


@pytest.mark.parametrize("to, out", [("hf", "hf"), ("timm", "w.safetensors"), ("meta", "w.pth")])
def test_the_command_exports_a_run(to, out, tmp_path, capsys):
    backbone = tiny_backbone(**REGISTERS)
    (tmp_path / "run").mkdir()
    tensors = {f"backbone.{name}": x for name, x in backbone.state_dict().items()}
    torch.save({"teacher": tensors, "arch": backbone.arch}, tmp_path / "run" / "teacher.pth")
    command = [str(tmp_path / "run"), "--to", to, "--out"]
    export.main([*command, str(tmp_path / out)])
    printed = capsys.readouterr().out
    assert float(re.search(r"read back: (\S+)", printed)[1]) <= 1e-5
    assert "positions are interpolated" in printed
    assert not list(tmp_path.rglob("*.partial"))
    same_features(backbone, load_backbone(tmp_path / out))
    (tmp_path / "w.zip").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written|give --to"):
        export.main([*command, str(tmp_path / "w.zip")])


# ---- conversion for training -----------------------------------------------------------------------------


def save_as_training_checkpoint(backbone, file, student=False):
    """As the authors' code saves it: FSDP's words in the names, blocks in chunks of two, heads beside."""
    key, prefix = ("model", "teacher.") if student else ("teacher", "module.")
    tensors = {f"{prefix}dino_head.last_layer.weight_g": torch.ones(8, 1)}
    for name, x in backbone.state_dict().items():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            number = int(block[1])
            chunk = f"blocks.{number // 2}._fsdp_wrapped_module.{number}."
            name = chunk + name.removeprefix(block[0])
        tensors[f"{prefix}backbone._fsdp_wrapped_module.{name}"] = x
        if student:
            tensors[f"student.backbone._fsdp_wrapped_module.{name}"] = torch.zeros_like(x)
    content = {key: tensors, "iteration": 7}
    if student:
        content["optimizer"] = {"state": {}}
    torch.save(content, file)


def foreign_weights(layout, backbone, folder):
    """A backbone saved in a layout that features.py does not read -> the path."""
    if layout == "hf folder":
        export.write_hf(backbone, folder / "hf")
        return folder / "hf"
    if layout == "hf .bin":
        file = folder / "pytorch_model.bin"
        torch.save(rename_to("hf", backbone.state_dict()), file)
    elif layout == "timm .safetensors":
        file = folder / "timm.safetensors"
        export.write_timm(backbone, file)
    elif layout == "timm .bin":
        file = folder / "timm.bin"
        torch.save(rename_to("timm", backbone.state_dict()), file)
    else:
        file = folder / "teacher_checkpoint.pth"
        save_as_training_checkpoint(backbone, file, student="student" in layout)
    return file


FOREIGN = {  # and the parameters that the layout changes; with registers, timm's has no position of [CLS]
    "hf folder": (), "hf .bin": (), "timm .safetensors": ("mask_token", "cls_token", "pos_embed"),
    "timm .bin": ("mask_token",), "teacher checkpoint": (), "checkpoint with student": (),
}  # fmt: skip


@pytest.mark.parametrize("layout, changed", FOREIGN.items(), ids=FOREIGN)
def test_foreign_weights_are_converted_before_a_run_starts_from_them(layout, changed, tmp_path):
    """Refused with the command that converts them, which makes a file that is accepted."""
    cfg = config.load(model="debug")
    source = perturbed(DINOv2(cfg).backbone)
    student = DINOv2(cfg)
    file = foreign_weights(layout, source, tmp_path)
    hint = f"python -m tools.export {file} --to meta --out weights.pth"
    refused(re.escape(hint), file, load=features.load_backbone)
    refused(re.escape(hint), file, load=functools.partial(features.init_from_weights, student))
    converted = tmp_path / "weights.pth"
    export.main([str(file), "--to", "meta", "--out", str(converted)])
    sentence, heads_taken = features.init_from_weights(student, converted)
    assert "heads drawn anew" in sentence and not heads_taken
    assert_same_tensors(source.state_dict(), student.backbone.state_dict(), but=changed)
    same_features(source, student.backbone.eval())
    same_features(source, features.load_backbone(converted))


# ---- layouts that are recognised -------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED_CHECKPOINTS)
def test_released_names_must_be_true(name):
    """All eight layouts pass under their own name, and under no other, whoever gave it."""
    D = RELEASED_CHECKPOINTS[name]["keys"]["cls_token"][2]
    size = weights.SIZE_OF_WIDTH[D]
    tensors = {"cls_token": torch.empty(1, 1, D)}
    own = {f"{name}_pretrain.pth"}
    others = {f"{other}_pretrain.pth" for other in RELEASED_CHECKPOINTS} - own
    others.add(f"dinov2-{'small' if D > 400 else 'base'}")
    if "reg4" in name:
        tensors["register_tokens"] = 0
        own.add(f"vit_{size}_patch14_reg4_dinov2.lvd142m.safetensors")
        own.add(f"dinov2-with-registers-{size}/model.safetensors")
        others.add(f"vit_{size}_patch14_dinov2.pth")
    else:
        own.add(f"vit_{size}_patch14_dinov2.lvd142m.safetensors")
        own.add(f"dinov2-{size}/model.safetensors")
        others.add(f"vit_{size}_patch14_reg4_dinov2.pth")
    for path in own:
        weights.check_file_name(tensors, Path(path))
    for path in others:
        with pytest.raises(UserError, match=rf"named after a ViT-\w+ .* holds a ViT-{size} "):
            weights.check_file_name(tensors, Path(path))
    assert features.released_name(name) == features.released_name(f"{name}_pretrain.pth") == name


def test_a_file_called_b_that_holds_s(tmp_path):
    file = tmp_path / "dinov2_vitb14_pretrain.pth"
    torch.save(tiny_backbone(embed_dim=384, num_heads=6, depth=1).state_dict(), file)
    refused("dinov2_vitb14_pretrain.pth is named after a ViT-base .* but holds a ViT-small", file)


@pytest.mark.parametrize("student", [False, True], ids=["teacher alone", "with the student"])
def test_chunked_checkpoints_of_the_authors(student, tmp_path):
    backbone = tiny_backbone(depth=5, **REGISTERS)
    file = tmp_path / "teacher_checkpoint.pth"
    save_as_training_checkpoint(backbone, file, student)
    back = load_backbone(file)
    assert_same_tensors(backbone.state_dict(), back.state_dict())
    same_features(backbone, back)
    assert list(read_weights(file)[1]) == ["dino_head.last_layer.weight_g"]


def named(prefix, tensors, shift=0.0):
    return {prefix + name: x + shift for name, x in tensors.items()}


def in_chunks(tensors):
    """blocks.2.norm1.bias -> blocks.1.2.norm1.bias: two blocks a chunk."""
    chunk = functools.partial(
        re.sub, r"^blocks\.(\d+)", lambda block: f"blocks.{int(block[1]) // 2}.{block[1]}"
    )
    return {chunk(string=name): x for name, x in tensors.items()}


def both_networks(tensors, student="student.backbone.", teacher="teacher.backbone."):
    return named(student, tensors, shift=1) | named(teacher, tensors)


def dino_checkpoint(tensors, **others):
    """As DINOv1 and iBOT save it: the student in DistributedDataParallel, and no mask token."""
    tensors = {name: x for name, x in tensors.items() if name != "mask_token"}
    head = {"head.mlp.0.weight": torch.ones(8, 96), "head.mlp.1.num_batches_tracked": torch.tensor(3)}
    return {"student": named("module.backbone.", tensors, shift=1) | named("module.", head),
            "teacher": named("backbone.", tensors) | head, "epoch": 3, **others}  # fmt: skip


OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}},
    "param_groups": [{"lr": 0.1}],
}
SETTINGS = argparse.Namespace(
    arch="vit_small", patch_size=4, betas=(0.9, 0.95), nested=argparse.Namespace(a=1)
)
FSDP_NAMES = ("backbone.", "backbone._fsdp_wrapped_module."), ("attn.", "_checkpoint_wrapped_module.attn.")


def with_fsdp_names(tensors):
    for plain, wrapped in FSDP_NAMES:
        tensors = {name.replace(plain, wrapped): x for name, x in tensors.items()}
    return tensors


CHECKPOINTS = {  # what other programs save around the tensors of a backbone
    "DINOv1": lambda x: dino_checkpoint(x, optimizer=OPTIMIZER, args=SETTINGS, fp16_scaler=None),
    "DINOv1 without settings": dino_checkpoint,
    "iBOT, teacher": lambda x: {"state_dict": dino_checkpoint(x)["teacher"], "arch": "vit_small"},
    "iBOT, student": lambda x: {"student": {
        f"module.backbone.{name.replace('mask_token', 'masked_embed')}": y for name, y in x.items()}},
    "DINOv2": lambda x: {"model": both_networks(in_chunks(x)), "optimizer": OPTIMIZER, "iteration": 99},
    "DINOv2, teacher": lambda x: {"teacher": named("backbone.", in_chunks(x))},
    "DINOv2, FSDP": lambda x: {"model": with_fsdp_names(both_networks(x))},
    "Lightning": lambda x: {"state_dict": both_networks(x, "student_backbone.", "teacher_backbone.")
                            | {"criterion.steps": torch.tensor(7)}, "hyper_parameters": {"lr": 1e-3}},
    "data parallel": lambda x: named("module.", x),
    "compiled": lambda x: named("_orig_mod.", x),
    "only a student": lambda x: {"student": named("backbone.", x)},
    "model_state_dict": lambda x: {"model_state_dict": x},
    "half precision": lambda x: {"model": {name: y.half() for name, y in x.items()}},
    "classifier": lambda x: named("dinov2.", rename_to("hf", x)) | {"classifier.weight": torch.ones(5, 192)},
    "classifier, registers": lambda x: named("dinov2_with_registers.", rename_to("hf", x)),
}  # fmt: skip


@pytest.mark.parametrize("program", CHECKPOINTS)
@pytest.mark.parametrize("options", [dict(layerscale=0), REGISTERS], ids=["as DINOv1", "registers"])
def test_checkpoints_of_other_programs(program, options, tmp_path):
    """The teacher's features, bit for bit, here; a training run asks for a conversion first."""
    backbone = tiny_backbone(**options)
    file = tmp_path / "checkpoint.pth"
    torch.save(CHECKPOINTS[program](backbone.state_dict()), file)
    back = load_backbone(file)
    tolerance = 0.05 if program == "half precision" else 0
    image = torch.randn(1, 3, 24, 24)
    for ours, theirs in zip(backbone(image), back(image), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)
    no_mask_token = program.startswith("DINOv1") or program == "iBOT, teacher"
    if no_mask_token:
        assert back.mask_token.shape == (1, 96) and not back.mask_token.any()
    elif not tolerance:
        assert torch.equal(back.mask_token, backbone.mask_token)
    if tolerance:  # Meta's names: a run starts from it as it is
        assert features.load_backbone(file).embed_dim == 96
        return
    refused(re.escape(f"python -m tools.export {file} --to meta"), file, features.load_backbone)


def test_a_dinov1_checkpoint_is_converted_for_training(tmp_path):
    backbone = tiny_backbone(layerscale=0)
    torch.save(dino_checkpoint(backbone.state_dict(), args=SETTINGS), tmp_path / "checkpoint.pth")
    export.main([str(tmp_path / "checkpoint.pth"), "--to", "meta", "--out", str(tmp_path / "w.pth")])
    same_features(backbone, features.load_backbone(tmp_path / "w.pth"))


def test_a_classifier_has_the_heads_that_its_config_states(tmp_path):
    backbone = tiny_backbone(num_heads=2)
    export.write_hf(backbone, tmp_path)
    tensors = CHECKPOINTS["classifier"](backbone.state_dict())
    export.write_safetensors(tmp_path / "model.safetensors", tensors, {})
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        same_features(backbone, load_backbone(source))


def without(tensors, *names):
    return {name: x for name, x in tensors.items() if name not in names}


ONE = torch.ones(1, 4, 96)
DINOV3 = {"storage_tokens": ONE, "rope_embed.periods": torch.ones(8)}
NOT_READ = {  # what a file holds: (its content, made of a backbone's tensors; the words that name it)
    "DINOv3": (lambda x: without(x, "pos_embed") | DINOV3, "a DINOv3 model: another architecture .rotary"),
    "DINOv3, Hugging Face": (lambda x: {"layer.0.attention.o_proj.weight": ONE}, "a DINOv3 model"),
    "timm's EVA": (lambda x: x | {"blocks.0.gamma_1": ONE}, "a BEiT, EVA or DINOv3 model of timm"),
    "Hugging Face's ViT": (lambda x: {"vit.encoder.layer.0.layernorm_before.weight": ONE},
                           "a ViT in the names of .* ViTModel"),
    "CLIP": (lambda x: x | {"norm_pre.weight": ONE}, "the image encoder of CLIP or SigLIP"),
    "MAE": (lambda x: {"model": x | {"decoder_embed.weight": ONE}}, "a masked autoencoder with its decoder"),
    "ResNet": (lambda x: {"state_dict": {"module.layer1.0.conv1.weight": ONE}}, "a convolutional network"),
    "a classifier": (lambda x: without(x, "mask_token") | {"head.weight": torch.ones(5, 96)},
                     "a ViT trained as a classifier"),
    "flat parameters": (lambda x: {"model": {"teacher.backbone._flat_param": torch.ones(99)}},
                        "one rank's FSDP shard of the parameters: gather it first"),
    "no [CLS] position": (lambda x: x | {"pos_embed": x["pos_embed"][:, 1:]},
                          "a pos_embed without .CLS. position .36 are a square of patches.: prepend it"),
    "an optimizer": (lambda x: OPTIMIZER, "the state of an optimizer and no network: take the file of"),
    "an optimizer in a checkpoint": (lambda x: {"optimizer": OPTIMIZER},
                                     "the state of an optimizer and no network"),
    "two networks": (lambda x: named("a.", x) | named("b.", x), r"2 backbones \(a., b.\) and does not say"),
    "with a wrapper and without": (lambda x: x | named("module.", x),
                                   "a network both with and without a wrapper"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_not_read_is_named(kind, tmp_path):
    make, words = NOT_READ[kind]
    file = tmp_path / "checkpoint.pth"
    torch.save(make(tiny_backbone(layerscale=0).state_dict()), file)
    refused(f"checkpoint.pth (holds|has) {words}", file)
    refused("checkpoint.pth", file, features.load_backbone)


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("load", [load_backbone, features.load_backbone])
def test_classes_that_are_not_allowed_are_named(load, zipped, tmp_path):
    """An intact file is not called damaged, and none of its code runs, even inside of a Namespace."""
    bomb = Bomb(tmp_path / "exploded")
    contents = {
        r"holds a pathlib.*Path besides its tensors": {"output_dir": Path("x")},
        r"holds a \S*test_export.Bomb besides": {"class": Bomb},
        r"could run code: .* save the state_dict": {"args": argparse.Namespace(bomb=bomb)},
        r"holds one rank's FSDP shard": {"writer": torch.distributed.checkpoint.FileSystemWriter},
        r"holds a Namespace, not named tensors": argparse.Namespace(teacher=1),
    }
    for words, content in contents.items():
        if isinstance(content, dict):
            content["teacher"] = {"cls_token": torch.ones(1, 1, 96)}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        refused(f"w.pth .*{words}", tmp_path / "w.pth", load)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_sharded_tensor_and_a_script_are_named(tmp_path):
    class Shard(torch.Tensor):  # like a DTensor, which needs a process group
        pass

    with pytest.raises(UserError, match="w.pth holds one rank's FSDP shard .*norm.bias is a Shard"):
        features.check_tensors({"norm.bias": torch.ones(2).as_subclass(Shard)}, "w.pth")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "w.pth")
    refused("w.pth is a TorchScript program: save the state_dict", tmp_path / "w.pth")


def test_chunks_that_count_anew_are_refused(tmp_path):
    tensors = {}
    for name, x in tiny_backbone(depth=2).state_dict().items():
        tensors[re.sub(r"blocks\.(\d)\.", r"blocks.\1.0.", name)] = x
    torch.save({"teacher": tensors}, tmp_path / "w.pth")
    refused("anew in every chunk", tmp_path / "w.pth")


@pytest.mark.parametrize("layout", ["hf", "timm"])
def test_strict_in_every_layout(layout, tmp_path):
    file = tmp_path / "w.safetensors"
    tensors = rename_to(layout, tiny_backbone(**REGISTERS).state_dict())
    last = list(tensors)[-1]
    key = next(name for name in tensors if "key.weight" in name or "qkv.weight" in name)
    ours = "mask_token" if layout == "hf" else "register_tokens"
    broken = [
        {name: x for name, x in tensors.items() if name != key},
        {**tensors, "surplus": torch.ones(2)},
        {**tensors, last: torch.ones(7)},
        {**tensors, key: torch.tensor(1.0)},
        {**tensors, ours: torch.ones(1)},
        {name: torch.tensor(1.0) for name in tensors},
    ]
    for tensors in broken:
        export.write_safetensors(file, tensors, {})
        refused(r"w.safetensors (is not the ViT of width 96|holds tensors)", file)


@pytest.mark.parametrize("load", [load_backbone, features.load_backbone, features.open_backbone])
def test_a_name_that_no_file_can_have(load):
    for name in ("x" * 300, f"{'x' * 300}.safetensors", "x\0"):
        refused("no weights at x", name, load)


def test_a_stated_architecture_is_cut_where_it_is_long(tmp_path):
    claim = dict(layerscale=[0.0] * 100_000, num_heads=3)
    torch.save({"teacher": tiny_backbone().state_dict(), "arch": claim}, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        load_backbone(tmp_path / "w.pth")
    assert len(str(error.value)) < 500


def test_only_named_tensors_are_weights(tmp_path):
    torch.save({3: torch.ones(1)}, tmp_path / "w.pth")
    refused("no weights file", tmp_path / "w.pth")


WEIRD = {
    "NaN": torch.tensor([1.0, float("nan")]), "infinity": torch.tensor([float("-inf")]),
    "infinity as fp32": torch.tensor([1e300], dtype=torch.float64), "sparse": torch.eye(3).to_sparse(),
    "complex": torch.zeros(2, dtype=torch.complex64), "whole numbers": torch.ones(2, dtype=torch.int64),
    "meta": torch.zeros(2, device="meta"), "8 bits": torch.ones(2).to(torch.float8_e4m3fn),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),  # it warns
    "empty": torch.zeros(0, 3), "terabytes": torch.zeros(1).expand(10**12),
    "a name that moves the cursor": torch.ones(1)}  # fmt: skip


@pytest.mark.parametrize("kind", WEIRD)
@pytest.mark.filterwarnings("ignore")
def test_only_finite_plain_tensors_are_weights(kind, tmp_path):
    """Each of them used to load, or to end in a traceback; the sentence names the file and the tensor."""
    name = "norm.bias\x1b[2J" if "name" in kind else "norm.bias"
    tensors = tiny_backbone().state_dict()
    tensors[name] = WEIRD[kind]() if callable(WEIRD[kind]) else WEIRD[kind]
    torch.save({"teacher": tensors}, tmp_path / "w.pth")
    words = "w.pth: norm.bias (holds NaN or infinity|.* is no plain tensor)|holds other things than named"
    refused(words, tmp_path / "w.pth")
    refused(words, tmp_path / "w.pth", features.load_backbone)
    if kind in ("NaN", "infinity", "empty"):
        export.write_safetensors(tmp_path / "w.safetensors", tensors, {})
        refused("w.safetensors: norm.bias (holds NaN|.* is no plain)", tmp_path / "w.safetensors")


@pytest.mark.parametrize("arch", [[1], "num_heads", 7])
def test_an_architecture_is_named_values(arch, tmp_path):
    torch.save({"teacher": tiny_backbone().state_dict(), "arch": arch}, tmp_path / "w.pth")
    refused("w.pth holds other things than named tensors", tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "cls_token", "mask_token"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_shapes_of_no_network(name, shape, tmp_path):
    torch.save(tiny_backbone().state_dict() | {name: torch.ones(shape)}, tmp_path / "w.pth")
    refused("w.pth (is not the ViT|holds no DINOv2 backbone)", tmp_path / "w.pth")


def test_positions_without_a_patch_are_no_network(tmp_path):
    torch.save(tiny_backbone().state_dict() | {"pos_embed": torch.ones(1, 1, 32)}, tmp_path / "w.pth")
    refused("w.pth holds no DINOv2 backbone: .*pos_embed has no patch", tmp_path / "w.pth")


def test_what_is_exported_is_not_overwritten(tmp_path):
    backbone = tiny_backbone()
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"teacher": backbone.state_dict(), "arch": backbone.arch}, run / "teacher.pth")
    before = (run / "teacher.pth").read_bytes()
    for to, out in (("meta", run / "teacher.pth"), ("hf", run)):
        with pytest.raises(UserError, match="is what is exported"):
            export.main([str(run), "--to", to, "--out", str(out)])
    with pytest.raises(SystemExit):
        export.main([str(run), "--to", "hf", "--out", ""])
    assert (run / "teacher.pth").read_bytes() == before
    assert [path.name for path in run.iterdir()] == ["teacher.pth"]


def test_weights_in_a_folder_whose_name_is_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    backbone = tiny_backbone()
    torch.save({"teacher": backbone.state_dict(), "arch": backbone.arch}, folder / "teacher.pth")
    for to, out in (("timm", folder / "w.safetensors"), ("hf", folder / "hf"), ("meta", folder / "w.pth")):
        export.main([str(folder), "--to", to, "--out", str(out)])
        assert torch.equal(load_backbone(out).norm.weight, backbone.norm.weight)


def test_a_config_that_contradicts(tmp_path):
    backbone = tiny_backbone()
    export.write_hf(backbone, tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    tensors = rename_to("hf", backbone.state_dict())
    export.write_safetensors(tmp_path / "model.safetensors", tensors, {})
    bad = {"hidden_act relu": {**good, "hidden_act": "relu"}, "hidden_size 768": {**good, "hidden_size": 768},
           "num_heads is 5": {**good, "num_attention_heads": 5}, "no config": [1],
           "num_heads is '3'": {**good, "num_attention_heads": "3"}}  # fmt: skip
    for words, hf_config in bad.items():
        (tmp_path / "config.json").write_text(json.dumps(hf_config))
        refused(words, tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused("no config of a DINOv2 model .*nested too deeply", tmp_path)


# ---- safetensors -----------------------------------------------------------------------------------------


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start, stop, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


HOSTILE = {
    "empty": b"", "seven bytes": b"1234567", "a header longer than the file": file_of({}, length=1000),
    "a header of 2^64 bytes": file_of({}, length=2**64 - 1), "not JSON": file_of(b"<html></html>"),
    "a list": file_of([1]), "deep": file_of(b"[" * 100_000), "not text": file_of(b"\xff\xfe{}"),
    "overlapping": file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "twice the same bytes": file_of({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a gap": file_of({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "negative": file_of({"a": entry(-8, 0)}, bytes(8)), "backwards": file_of({"a": entry(8, 0)}, bytes(8)),
    "negative shape": file_of({"a": entry(0, 8, (-1, -2))}, bytes(8)),
    "a wrong size": file_of({"a": entry(0, 8, (3,))}, bytes(8)),
    "a huge shape": file_of({"a": entry(0, 8, (2**40, 2**40))}, bytes(8)),
    "not a number": file_of({"a": entry(0, 8, ("2",))}, bytes(8)),
    "true": file_of({"a": entry(0, 4, (True,))}, bytes(4)),
    "an unknown type": file_of({"a": entry(0, 8, dtype="F8")}, bytes(8)),
    "whole numbers": file_of({"a": entry(0, 16, dtype="I64")}, bytes(16)),
    "a type that is a list": file_of({"a": entry(0, 8, dtype=[])}, bytes(8)),
    "no type": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "cut short": file_of({"a": entry(0, 8)}, bytes(7)), "too long": file_of({"a": entry(0, 8)}, bytes(9)),
    "metadata of another kind": file_of({"__metadata__": 3, "a": entry(0, 8)}, bytes(8)),
    "no metadata but noise": file_of({"__metadata__": {"nanodino": "{"}, "a": entry(0, 8)}, bytes(8)),
    "a name that moves the cursor": file_of({"a\n\x1b[2J": entry(0, 8)}, bytes(8)),
    "a hundred dimensions": file_of({"a": entry(0, 4, (1,) * 100)}, bytes(4)),
    "deep metadata": file_of({"__metadata__": {"nanodino": "[" * 9999}, "a": entry(0, 8)}, bytes(8)),
    "three places": file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
}  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors_are_one_sentence(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    refused("w.safetensors is no intact safetensors file", tmp_path / "w.safetensors")


def test_claims_that_no_network_can_keep(tmp_path):
    backbone = tiny_backbone()
    tensors = rename_to("timm", backbone.state_dict())
    file = tmp_path / "w.safetensors"
    for claim in (dict(num_heads=0), dict(num_heads=7), dict(num_heads=10**9), dict(num_heads=True),
                  dict(num_heads="3"), dict(layerscale=float("nan")), dict(interpolate_offset="x"),
                  dict(interpolate_offset=-1), dict(interpolate_antialias=3)):  # fmt: skip
        words = f"{list(claim)[0]} is .* in .*w.(safetensors|pth), (but must be|of width 96: no network is)"
        export.write_safetensors(file, tensors, claim)
        refused(words, file)
        torch.save({"teacher": backbone.state_dict(), "arch": claim}, tmp_path / "w.pth")
        refused(words, tmp_path / "w.pth")
        refused(words, tmp_path / "w.pth", features.load_backbone)
    claim = dict(depth=10**9, embed_dim=10**9, surprise=1)  # the shapes show these: the file is not asked
    export.write_safetensors(file, tensors, claim)
    same_features(backbone, load_backbone(file), [(6, 6)])


@pytest.mark.parametrize("dtype", weights.DTYPES.values(), ids=weights.DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_every_type_at_any_place(dtype, shift, tmp_path):
    """Some files don't align their tensors."""
    x = torch.randn(3, 5, dtype=dtype)
    file = tmp_path / "w.safetensors"
    export.write_safetensors(file, {"a": x, "b": x[:0], "c": x[0, 0]}, {})
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * shift
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    tensors, _ = weights.read_safetensors(file)
    assert torch.equal(tensors["a"], x)
    assert tensors["b"].shape == (0, 5)
    assert torch.equal(tensors["c"], x[0, 0])


def test_half_precision_files_load_as_fp32(tmp_path):
    backbone = tiny_backbone(**REGISTERS)
    tensors = {name: x.half() for name, x in rename_to("hf", backbone.state_dict()).items()}
    export.write_safetensors(tmp_path / "w.safetensors", tensors, backbone.arch)
    back = load_backbone(tmp_path / "w.safetensors")
    assert_same_tensors(
        {name: x.half().float() for name, x in backbone.state_dict().items()}, back.state_dict()
    )


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError("No space left")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        export.write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


# ---- the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANODINO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_says_which_file_goes_where(cache, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    file = "dinov2_vits14_reg4_pretrain.pth"
    url = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/{file}"
    with pytest.raises(UserError, match=f"{url} cannot be fetched .no route.*{cache}/{file}"):
        weights.download("dinov2_vits14_reg4")
    with pytest.raises(UserError, match="not a released model"):
        weights.download("dinov2_vitx14")
    refused(f"no weights at dinov2_vits14: put Meta's file at {cache}", "dinov2_vits14")
    assert not list(cache.glob("*"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "www" / "dinov2_vits14"
    folder.mkdir(parents=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def end_headers(self):
            if "_reg4" in self.path:  # promises more than it sends
                sent = b"".join(self._headers_buffer)
                self._headers_buffer = [re.sub(rb"(Content-Length: )\d+", rb"\g<1>9999", sent)]
            super().end_headers()

    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(hubconf, "_BASE_URL", f"http://127.0.0.1:{httpd.server_port}")
    monkeypatch.setattr(hubconf, "_SHA256", {})
    yield folder
    httpd.shutdown()
    httpd.server_close()


def test_download(cache, server, monkeypatch, capsys):
    backbone = tiny_backbone(embed_dim=384, num_heads=6, depth=1, patch_size=14, img_size=28)
    torch.save(backbone.state_dict(), server / "dinov2_vits14_pretrain.pth")
    export.main(["dinov2_vits14", "--download"])
    assert str(cache / "dinov2_vits14_pretrain.pth") in capsys.readouterr().out
    same_features(backbone, load_backbone("dinov2_vits14"), [(2, 2)])  # from now on without --download
    (server / "dinov2_vits14_pretrain.pth").unlink()
    assert weights.download("dinov2_vits14").is_file()  # nothing is fetched twice
    (server / "dinov2_vits14_reg4_pretrain.pth").write_bytes(b"PK, and then the line is dead")
    with pytest.raises(UserError, match="ended after 29 of 9999|more expected|IncompleteRead"):
        weights.download("dinov2_vits14_reg4")
    monkeypatch.setattr(hubconf, "_BASE_URL", f"{hubconf._BASE_URL}/nowhere")
    with pytest.raises(UserError, match="404"):
        weights.download("dinov2_vits14_reg4")
    assert [p.name for p in cache.iterdir()] == ["dinov2_vits14_pretrain.pth"]


def test_the_sum_of_a_download_is_printed_and_checked(cache, server, monkeypatch, capsys):
    file = server / "dinov2_vits14_pretrain.pth"
    file.write_bytes(b"PK, and the rest")
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    other = "0" * 64
    with pytest.raises(UserError, match=f"its SHA-256 is {own}, not {other}"):
        export.main(["vits14", "--download", "--sha256", other])
    monkeypatch.setitem(hubconf._SHA256, "dinov2_vits14", other)  # a sum that is known needs no option
    with pytest.raises(UserError, match=f"its SHA-256 is {own}, not {other}"):
        weights.download("vits14")
    assert not list(cache.iterdir())
    export.main(["vits14", "--download", "--sha256", own.upper()])
    assert f"SHA-256 {own}, as expected" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{cache}.* has the SHA-256 {own}, not {other}: delete it"):
        export.main(["vits14", "--download", "--sha256", other])
    weights.download("vits14", own)  # from the cache
    (cache / file.name).unlink()
    monkeypatch.setattr(hubconf, "_SHA256", {})
    weights.download("vits14")
    assert f"SHA-256 {own}, and no sum is known to compare it with" in capsys.readouterr().out
    with pytest.raises(UserError, match="--sha256 goes with --download"):
        export.main(["vits14", "--sha256", own])
    with pytest.raises(SystemExit):
        export.main(["vits14", "--download", "--sha256", "beef"])


def test_a_web_page_is_no_weights_file(cache, server):
    (server / "dinov2_vits14_pretrain.pth").write_text("<html>please log in</html>")
    with pytest.raises(UserError, match="a web page came instead"):
        weights.download("vits14")
    (server / "dinov2_vits14_pretrain.pth").write_bytes(b"")
    with pytest.raises(UserError, match="it ended after 0 of"):
        weights.download("vits14")
    assert not list(cache.iterdir())


# ---- torch.hub and the real packages ---------------------------------------------------------------------


def test_torch_hub(tmp_path):
    load = functools.partial(torch.hub.load, str(ROOT), source="local", verbose=False)
    model = load("vits14_reg")
    tokens = model(torch.zeros(1, 3, 28, 28))
    assert tokens.cls.shape == (1, 384)
    assert tokens.registers.shape[1] == 4
    assert not model.training
    values = {name: torch.full_like(x, 0.5) for name, x in model.state_dict().items()}
    torch.save(values, tmp_path / "w.pth")
    assert_same_tensors(values, load("vits14_reg", weights=tmp_path / "w.pth").state_dict())
    for other, stem in (("vitb14_reg", "dinov2_vitb14_reg4"), ("vits14", "dinov2_vits14")):
        with pytest.raises(UserError, match=f"holds a ViT of width 384.*, not the {stem} of this entry"):
            load(other, weights=tmp_path / "w.pth")
    for size in "sblg":
        assert callable(getattr(hubconf, f"vit{size}14"))
        assert callable(getattr(hubconf, f"vit{size}14_reg"))


@kinds
def test_against_transformers(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = tiny_backbone(**options)
    export.write_hf(backbone, tmp_path)
    kind = "Dinov2WithRegistersModel" if backbone.num_register_tokens else "Dinov2Model"
    model_class = getattr(transformers, kind)
    theirs, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    same_as_transformers(theirs, backbone)


def same_as_transformers(theirs, backbone):
    """At the native size always; at others, and not square, where positions are interpolated alike: with
    registers (without, ours has the released offset of 0.1, theirs none)."""
    patch = backbone.patch_size
    native = backbone.arch["img_size"]
    sizes = [(native, native)]
    if backbone.num_register_tokens:
        sizes += [(5 * patch, 5 * patch), (3 * patch, 7 * patch)]
    for h, w in sizes:
        images = torch.randn(2, 3, h, w)
        with torch.no_grad():
            out = theirs.eval()(images).last_hidden_state
            tokens = backbone(images)
        torch.testing.assert_close(out, torch.cat(all_tokens(tokens), dim=1), rtol=0, atol=1e-5)


def all_tokens(tokens):
    """[CLS], registers and patches, each (B, n, D): the order of both libraries."""
    return tokens.cls[:, None], tokens.registers, tokens.patches


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True], ids=["mlp", "swiglu"])
def test_models_made_by_transformers(registers, swiglu, tmp_path):
    """The other direction: theirs are drawn at random, saved by them, and read here."""
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=24, patch_size=4,
                 use_swiglu_ffn=swiglu)  # fmt: skip
    if registers:
        sizes["num_register_tokens"] = registers
    hf_config = getattr(transformers, f"{kind}Config")(**sizes)
    theirs = getattr(transformers, f"{kind}Model")(hf_config)
    with torch.no_grad():
        for x in theirs.parameters():
            x += 0.1 * torch.randn(x.shape)
    theirs.save_pretrained(tmp_path / "model")
    same_as_transformers(theirs, load_backbone(tmp_path / "model"))


@kinds
def test_against_timm(options, tmp_path):
    timm = pytest.importorskip("timm")
    backbone = tiny_backbone(**options)
    theirs = eval(export.write_timm(backbone, tmp_path / "w.safetensors"), {"timm": timm}).eval()
    images = torch.randn(2, 3, backbone.arch["img_size"], backbone.arch["img_size"])
    with torch.no_grad():
        tokens = backbone(images)
        out = theirs.forward_features(images)
    torch.testing.assert_close(out, torch.cat(all_tokens(tokens), dim=1), rtol=0, atol=1e-5)


def test_against_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(5).half(), "c": torch.randn(1).bfloat16()}
    export.write_safetensors(tmp_path / "ours", tensors, {})
    assert_same_tensors(tensors, safetensors.load_file(tmp_path / "ours"))
    safetensors.save_file(tensors, tmp_path / "theirs")
    assert_same_tensors(tensors, weights.read_safetensors(tmp_path / "theirs")[0])


def test_a_run_folder_is_its_teacher_whatever_lies_beside_it(tmp_path):
    """An export into the run folder goes stale when the run continues."""
    run = tmp_path / "run"
    run.mkdir()
    teacher = tiny_backbone()
    other = tiny_backbone()
    with torch.no_grad():
        other.cls_token.fill_(1)
    torch.save({"teacher": teacher.state_dict(), "arch": teacher.arch}, run / "teacher.pth")
    export.write_safetensors(run / "model.safetensors", other.state_dict(), other.arch)
    assert torch.equal(load_backbone(run).cls_token, teacher.cls_token)
    assert torch.equal(load_backbone(run / "model.safetensors").cls_token, other.cls_token)
