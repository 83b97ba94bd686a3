"""The configuration: every setting with its kind and default, read from YAML and `key=value`, and checked.

Names and defaults are those of DINOv2's published YAML (the short ViT-L/16 recipe), so its files load
unchanged; one warning lists their keys without a meaning here. "ours" marks a setting they lack.

    python config.py vitg14 optim.epochs=10     prints the resolved settings; the text loads again as it is
"""

import errno
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml

# Kinds of numbers: type, lowest, highest, and what an error asks for.
Whole = Annotated[int, 0, 1e15, "a whole number, 0 or more"]
Count = Annotated[int, 1, 1e15, "a whole number, 1 or more"]
Number = Annotated[float, 0, 1e15, "a number, 0 or more"]
Positive = Annotated[float, 1e-15, 1e15, "a number above 0"]
Share = Annotated[float, 0, 1, "a number from 0 to 1"]


class UserError(Exception):
    """A mistake its user can mend: one sentence that names the culprit and the remedy."""


# fmt: off
class Config:
    """All settings, as in `cfg.optim.base_lr`: an instance of every section below."""
    class dino:
        loss_weight: Number = 1.0  # of the [CLS] loss; 0 turns it off
        head_n_prototypes: Count = 65536  # K, the number of pseudo-classes
        head_bottleneck_dim: Count = 256  # width of the unit vectors that meet the prototypes
        head_nlayers: Count = 3  # of the head's MLP
        head_hidden_dim: Count = 2048
        koleo_loss_weight: Number = 0.1  # spreads the images apart; counts for both global crops
        koleo_group: Whole = 0  # ours: images among which neighbours are sought; 0 = batch_size_per_gpu
        student_temp: Positive = 0.1  # ours: fixed in the authors' code
        freeze_weight_g: bool = False  # ours: unit prototypes, as in DINOv1; logits stay within [-1, 1]
    class ibot:
        loss_weight: Number = 1.0  # of the masked-patch loss
        mask_sample_probability: Share = 0.5  # share of global crops that are masked; DINOv1 needs 0 here too
        mask_ratio_min_max: tuple[Share, Share] = (0.1, 0.5)  # share of a masked crop's patches
        separate_head: bool = False  # false: patches share dino's head, and the four keys below do nothing
        head_n_prototypes: Count = 65536
        head_bottleneck_dim: Count = 256
        head_nlayers: Count = 3
        head_hidden_dim: Count = 2048
    class train:
        batch_size_per_gpu: Count = 64  # images (not crops) of a micro-batch on one process
        dataset_path: str = ""  # scenes:COUNT:seed=S, folder:PATH, tar:PATH, list:FILE; empty = scenes
        output_dir: str = ""  # the run folder; empty = under runs/
        seed: Whole = 0  # initial weights, order, crops, masks: the whole run follows from it
        num_workers: Whole = 10  # processes that decode images; 0 = none
        OFFICIAL_EPOCH_LENGTH: Count = 1250  # steps called one "epoch", whatever the size of the data set
        centering: Literal["centering", "sinkhorn_knopp"] = "centering"  # of teacher targets
        max_bad_images: Share = 0.01  # ours: share of unreadable images at which the run stops
        accumulate: Count = 1  # ours: micro-batches per step; Sinkhorn and KoLeo see one at a time
        checkpoint_every: Whole = 0  # ours: steps; 0 = only at the end and on a signal
        keep_last: Count = 3  # ours: newest checkpoints that are kept
        keep_every: Whole = 0  # ours: checkpoints at multiples of this step are kept for good; 0 = none
        log_every: Count = 10  # ours: steps between rows of metrics.jsonl
        max_nan: Count = 5  # ours: steps in a row without a finite loss, after which the run stops
        init_from: str = ""  # ours: a run, or released weights, that student and teacher start from
        distill_from: str = ""  # ours: a run with a larger model, whose teacher stays the teacher here
    class student:
        arch: Literal["vit_laptop", "vit_small", "vit_base", "vit_large", "vit_giant2"] = "vit_large"
        patch_size: Count = 16  # pixels
        drop_path_rate: Share = 0.3  # share of images that each branch skips
        layerscale: Number = 1.0e-5  # initial scale of each branch; 0 = no LayerScale
        drop_path_uniform: bool = True  # false: grows from 0 at the first block to the rate at the last
        init_std: Positive = 0.02  # ours: of the linear layers; the published 0.02 suits widths from 384 up
        ffn_layer: Literal["mlp", "swiglu", "swiglufused"] = "mlp"  # the last two are the same
        num_register_tokens: Whole = 0
        interpolate_antialias: bool = False  # true with offset 0.0 for weights with registers
        interpolate_offset: Number = 0.1  # false with 0.1 for those without
        pos_embed_size: Whole = 0  # ours: image size of the position grid; 0 = global_crops_size
    class teacher:
        momentum_teacher: Share = 0.992  # the teacher keeps this share of itself at each step; cosine
        final_momentum_teacher: Share = 1.0
        warmup_teacher_temp: Positive = 0.04  # a lower temperature makes sharper targets; linear
        teacher_temp: Positive = 0.07
        warmup_teacher_temp_epochs: Number = 30.0
    class optim:
        epochs: Positive = 100.0  # times OFFICIAL_EPOCH_LENGTH = steps of the run; may be a fraction
        weight_decay: Number = 0.04  # cosine
        weight_decay_end: Number = 0.4
        base_lr: Number = 0.004  # lr = base_lr * sqrt(images per step / 1024)
        warmup_epochs: Number = 10.0  # learning rate, linear from 0
        min_lr: Number = 1.0e-6  # at the end of its cosine
        clip_grad: Number = 3.0  # norm, for backbone and heads apart; 0 = no clipping
        freeze_last_layer_epochs: Number = 1.0  # the prototypes stand still that long
        freeze_backbone_epochs: Number = 0.0  # ours: new heads on old features learn alone that long
        scaling_rule: Literal["sqrt_wrt_1024"] = "sqrt_wrt_1024"  # of base_lr by images per step
        patch_embed_lr_mult: Number = 0.2
        layerwise_decay: Share = 0.9  # of the learning rate, per block, towards the input
        adamw_beta1: Share = 0.9
        adamw_beta2: Share = 0.999
    class crops:
        global_crops_scale: tuple[Share, Share] = (0.32, 1.0)  # share of the image's area
        local_crops_number: Whole = 8  # L
        local_crops_scale: tuple[Share, Share] = (0.05, 0.32)
        global_crops_size: Count = 224  # pixels
        local_crops_size: Count = 96
        blur: Literal["as_executed", "as_written"] | tuple[Share, Share, Share] = "as_executed"  # ours
        jitter: tuple[Share, Share, Share, Share] = (0.4, 0.4, 0.2, 0.1)  # ours: light, contrast, colour, hue
        jitter_prob: Share = 0.8  # ours
        gray_prob: Share = 0.2  # ours
        solarize_prob: Share = 0.2  # ours; second global crop only
    class evaluation:
        eval_period_iterations: Whole = 12500  # steps between k-NN evaluations; 0 = only the last
        train_path: str = ""  # ours: labelled images that are looked up; empty = no k-NN
        test_path: str = ""  # ours: labelled images that are classified
        knn_k: Count = 20  # ours
        online_limit: Whole = 0  # ours: images of each set that are used on the way; 0 = all of them
        batch_size: Count = 256  # ours
        image_size: Whole = 0  # ours: pixels; 0 = global_crops_size
        resize_size: Whole = 0  # ours: shorter side before the central crop; 0 = image_size
    class compute_precision:
        dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where a GPU has it
    class speed:  # ours: what changes the time of a run, not its result (beyond rounding)
        device: Literal["auto", "cpu", "cuda"] = "auto"
        checkpointing: Literal["off", "full", "selective"] = "off"  # of activations: less memory, more time
        compile: Literal["auto", "on", "off"] = "auto"  # torch.compile, block by block; auto: on a GPU
        kernels: Literal["auto", "triton", "pytorch"] = "auto"  # auto: Triton's where a GPU is
        threads: Whole = 0  # of each process on the CPU; 0 = leave it to PyTorch
    # fmt: on

    def __init__(self):
        for name in SECTIONS:
            setattr(self, name, dataclass(getattr(Config, name))())

    def to_yaml(self):
        """The resolved settings as YAML text, always in the same order; `load` reads it back unchanged."""
        return yaml.safe_dump({name: asdict(s) for name, s in vars(self).items()}, sort_keys=False)


SECTIONS = [name for name, section in vars(Config).items() if isinstance(section, type)]
KINDS = {f"{s}.{key}": kind for s in SECTIONS for key, kind in vars(Config)[s].__annotations__.items()}
BIASES = {f"student.{layer}_bias" for layer in ("qkv", "proj", "ffn")}  # always on here
DEAD = BIASES | {"MODEL.WEIGHTS", "train.saveckp_freq", "train.cache_dataset", "student.block_chunks",
                 "optim.lr", "student.pretrained_weights", "compute_precision.grad_scaler",
                 "compute_precision.student", "compute_precision.teacher"}  # fmt: skip


def load(file=None, model=None, overrides=()):
    """-> Config: the defaults, then configs/`model`.yaml, then `file`, then texts "section.key=value"."""
    presets = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
    if model and model not in presets:
        near = get_close_matches(model, presets, 1, 0)[0]
        raise UserError(f"there is no model {model}; the nearest of {', '.join(presets)} is {near}")
    cfg, values = Config(), {}
    for source in filter(None, (presets.get(model), file and Path(file), *overrides)):
        values |= read(source)
    for name, value in values.items():
        put(cfg, name, value)
    check(cfg)
    if (dead := sorted(DEAD & values.keys())) and os.environ.get("RANK", "0") == "0":
        print(f"warning: settings without a meaning here are ignored: {', '.join(dead)}", file=sys.stderr)
    return cfg


def read(source):
    """A Path to a YAML file, or a text "section.key=value" -> {"section.key": value}. Runs no YAML tag."""
    try:
        if isinstance(source, str):
            name, equals, value = source.partition("=")
            if not equals:
                raise UserError(f"'{source}' is no setting: write section.key=value, e.g. optim.epochs=10")
            return {name: yaml.safe_load(value)}
        tree = yaml.safe_load(source.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"the config {source} cannot be read: {e}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{source} is not valid plain YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict) or any(not isinstance(content or {}, dict) for content in tree.values()):
        raise UserError(f"the config {source} must hold sections, each with indented lines `key: value`")
    return {f"{section}.{key}": value for section in tree for key, value in (tree[section] or {}).items()}


def put(cfg, name, value):
    """Set cfg.section.key for the name "section.key", unless it is dead."""
    if name in BIASES and value is not True:
        raise UserError(f"{name} is {value!r}, but these models always have that bias: remove the line")
    if name in DEAD:
        return
    if name not in KINDS:
        same_key = [known for known in KINDS if known.split(".")[1] == name.split(".")[-1]]
        near = get_close_matches(name, same_key or KINDS, 1, 0)[0]
        raise UserError(f"there is no setting {name} (given as {value!r}); the nearest is {near}")
    section, key = name.split(".")
    try:
        setattr(getattr(cfg, section), key, convert(KINDS[name], value))
    except ValueError as e:
        raise UserError(f"{name} is {value!r}, but must be {e}") from None


def convert(kind, value):
    """`value` as its annotation wants it, or a ValueError that says what would do."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is Union:  # a word or a list
        return convert(args[isinstance(value, list)], value)
    if origin is tuple and isinstance(value, list) and len(value) == len(args):
        return tuple(map(convert, args, value))
    if origin is Annotated and type(value) in (int, float, str):  # YAML reads 1e-4 as text
        number, low, high, _ = args
        with suppress(ValueError, OverflowError):
            if low <= float(value) <= high and number(float(value)) == float(value):
                return number(float(value))
    if origin is Literal and isinstance(value, bool):  # YAML reads a bare on or off as a truth value
        value = "on" if value else "off"
    if origin is Literal and value in args or origin in (bool, str) and isinstance(value, origin):
        return value
    if origin is str and value is None:
        return ""
    words = {bool: "true or false", str: "text", tuple: f"{len(args)} numbers"}
    raise ValueError(words.get(origin) or (args[-1] if origin is Annotated else "one of " + ", ".join(args)))


def check(cfg):
    """What no value shows alone: that they fit each other."""
    v = {f"{name}.{key}": value for name, s in vars(cfg).items() for key, value in vars(s).items()}
    patch, group, batch = cfg.student.patch_size, cfg.dino.koleo_group, cfg.train.batch_size_per_gpu
    sizes = ["crops.global_crops_size", "student.pos_embed_size", "evaluation.image_size"]
    sizes += ["crops.local_crops_size"] if cfg.crops.local_crops_number else []
    bad = [f"{n} {v[n]} is no multiple of student.patch_size {patch}" for n in sizes if v[n] % patch]
    pairs = [n for n in v if KINDS[n] == tuple[Share, Share]]
    bad += [f"{n} {list(v[n])} must name the smaller number first" for n in pairs if v[n][0] > v[n][1]]
    run, spans = cfg.optim.epochs, [n for n in v if n.startswith(("optim.warmup", "optim.freeze"))]
    bad += [f"{n} {v[n]:g} is longer than the run, optim.epochs {run:g}" for n in spans if v[n] > run]
    if cfg.crops.local_crops_number and cfg.crops.local_crops_size < 5:
        bad += ["crops.local_crops_size must be 5 or more: blur reaches 4 pixels beyond the edge"]
    size = cfg.evaluation.image_size or cfg.crops.global_crops_size
    if 0 < cfg.evaluation.resize_size < size:
        bad += [f"evaluation.resize_size {cfg.evaluation.resize_size} is smaller than the image, {size}"]
    if group and batch % group:
        bad += [f"dino.koleo_group {group} must divide train.batch_size_per_gpu {batch}"]
    if bad:
        raise UserError("; ".join(bad))


def run(main):
    """Call a script's `main` and leave with its exit code (None = 0), or 1 and one line for a UserError."""
    try:
        code = main()
    except SystemExit as e:
        code = e.code
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 1
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        print(f"error: {e}: make room; a run goes on with --resume", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo's threads abort some normal exits
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)


if __name__ == "__main__":
    run(lambda: print(load(model=(sys.argv[1:] or [None])[0], overrides=sys.argv[2:]).to_yaml(), end=""))
