"""The configuration: every setting with its type and default, read from YAML and `key=value`, and checked.

Names and defaults are those of DINOv2's published YAML (the short ViT-L/16 recipe), so the authors' files
load unchanged; one warning lists their keys without a meaning here. "ours" marks settings they lack.

    python config.py vitg14 optim.epochs=10     # prints the resolved settings, as YAML that loads again

Everything between Config and `load` serves any class of sections, curation's settings too.
"""

import argparse
import errno
import json
import os
import re
import reprlib
import sys
from collections import namedtuple
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml

# What a number or a text must be, and how an error puts it.
Range = namedtuple("Range", "low high words")
Pattern = namedtuple("Pattern", "regex words")
Whole = Annotated[int, Range(0, 1e15, "a whole number, 0 or more")]
Count = Annotated[int, Range(1, 1e15, "a whole number, 1 or more")]
Number = Annotated[float, Range(0, 1e15, "a number, 0 or more")]
Positive = Annotated[float, Range(1e-15, 1e15, "a number above 0")]
Share = Annotated[float, Range(0, 1, "a number from 0 to 1")]
Part = Annotated[float, Range(0.01, 0.99, "a number from 0.01 to 0.99")]
Pixels = Annotated[int, Range(1, 65535, "a number of pixels from 1 to 65535")]
OptionalPixels = Annotated[int, Range(0, 65535, "a number of pixels up to 65535, or 0")]
Real = Annotated[float, Range(-1e15, 1e15, "a number")]
BlackWhite = Literal["auto"] | tuple[Real, Real]
Bands = Literal["auto"] | tuple[Count] | tuple[Count, Count, Count]
Layers = Annotated[int, Range(1, 100, "a whole number from 1 to 100")]
Workers = Annotated[int, Range(0, 1024, "a whole number from 0 to 1024")]
BelowOne = Annotated[float, Range(0, 0.999999, "a number from 0 to 0.999999")]
Prototypes = Annotated[int, Range(2, 1e15, "a whole number, 2 or more")]  # one would make every answer right


class UserError(Exception):
    """A mistake that the user can fix: one sentence that names the culprit and the remedy."""


# fmt: off
class Config:
    """All settings, as in `cfg.optim.base_lr`: an instance of every section below."""
    class dino:
        loss_weight: Number = 1.0  # of the [CLS] loss; 0 turns it off
        head_n_prototypes: Prototypes = 65536  # K, the number of pseudo-classes
        head_bottleneck_dim: Count = 256  # width of the unit vectors that are compared with the prototypes
        head_nlayers: Layers = 3  # of the head's MLP
        head_hidden_dim: Count = 2048
        koleo_loss_weight: Number = 0.1  # spreads images apart; applied to each global crop
        koleo_group: Whole = 0  # ours: images among which neighbours are searched; 0 = batch_size_per_gpu
        student_temp: Positive = 0.1  # ours: fixed in the authors' code
        freeze_weight_g: bool = False  # ours: unit prototypes, as in DINOv1; logits stay within [-1, 1]
    class ibot:
        loss_weight: Number = 1.0  # of the masked-patch loss
        mask_sample_probability: Share = 0.5  # share of global crops that are masked; 0 for DINOv1
        mask_ratio_min_max: tuple[Share, Share] = (0.1, 0.5)  # share of a masked crop's patches
        separate_head: bool = False  # false: patches share dino's head, and the four keys below are unused
        head_n_prototypes: Prototypes = 65536
        head_bottleneck_dim: Count = 256
        head_nlayers: Layers = 3
        head_hidden_dim: Count = 2048
    class train:
        batch_size_per_gpu: Count = 64  # images (not crops) of a micro-batch on one process
        dataset_path: str = ""  # scenes:COUNT:seed=S, folder:PATH, tar:PATH, list:FILE; empty = scenes
        output_dir: str = ""  # the run folder; empty = under runs/
        seed: Whole = 0  # determines initial weights, order, crops and masks
        num_workers: Workers = 10  # processes that decode images; 0 = the training process itself
        OFFICIAL_EPOCH_LENGTH: Count = 1250  # steps per "epoch", whatever the size of the data set
        centering: Literal["centering", "sinkhorn_knopp"] = "centering"  # of teacher targets
        max_bad_images: Share = 0.01  # ours: share of unreadable images at which the run stops
        accumulate: Count = 1  # ours: micro-batches per step; Sinkhorn and KoLeo see one at a time
        checkpoint_minutes: Number = 15.0  # ours: since the last save; 0 = not by time
        checkpoint_every: Whole = 0  # ours: steps; 0 = only by time, at the end and on a signal
        keep_last: Count = 3  # ours: number of newest checkpoints kept
        keep_every: Whole = 0  # ours: checkpoints at multiples of this step are never deleted; 0 = none
        log_every: Count = 10  # ours: steps between rows of metrics.jsonl
        max_nan: Count = 5  # ours: more steps in a row without a finite loss stop the run
        init_from: str = ""  # ours: a run or released weights from which student and teacher start
        distill_from: str = ""  # ours: a run of a larger model, whose teacher stays frozen as the teacher
    class data:  # ours: how the numbers in image files become colours; all evaluations of a run keep to it
        range: BlackWhite = "auto"  # the numbers that become black and white, where files do not have 8 bits
        bands: Bands = "auto"  # one or three channels, counted from 1; auto: as the files say
    class student:
        arch: Literal["vit_laptop", "vit_small", "vit_base", "vit_large", "vit_giant2"] = "vit_large"
        patch_size: Pixels = 16
        drop_path_rate: Share = 0.3  # share of images for which a branch is skipped
        layerscale: Number = 1.0e-5  # initial scale of each branch; 0 = no LayerScale
        drop_path_uniform: bool = True  # false: grows from 0 at the first block to the rate at the last
        init_std: Positive = 0.02  # ours: of the linear layers; the published 0.02 suits widths from 384 up
        ffn_layer: Literal["mlp", "swiglu", "swiglufused"] = "mlp"  # the last two are the same
        num_register_tokens: Whole = 0
        interpolate_antialias: bool = False  # true, with offset 0.0, for weights with registers
        interpolate_offset: BelowOne = 0.1  # 0.1, with antialias false, for those without
        pos_embed_size: OptionalPixels = 0  # ours: image size of the position grid; 0 = global_crops_size
    class teacher:
        momentum_teacher: Share = 0.992  # share of the teacher kept at each step; cosine schedule
        final_momentum_teacher: Share = 1.0
        warmup_teacher_temp: Positive = 0.04  # lower makes sharper targets; linear schedule
        teacher_temp: Positive = 0.07
        warmup_teacher_temp_epochs: Number = 30.0
    class optim:
        epochs: Positive = 100.0  # times OFFICIAL_EPOCH_LENGTH = steps of the run; may be fractional
        weight_decay: Number = 0.04  # cosine schedule
        weight_decay_end: Number = 0.4
        base_lr: Number = 0.004  # lr = base_lr * sqrt(images per step / 1024)
        warmup_epochs: Number = 10.0  # linear rise of the learning rate from 0
        min_lr: Number = 1.0e-6  # learning rate at the end of its cosine
        clip_grad: Number = 3.0  # gradient norm, of backbone and heads separately; 0 = no clipping
        freeze_last_layer_epochs: Number = 1.0  # the prototypes are frozen this long
        freeze_backbone_epochs: Number = 0.0  # ours: only the heads learn this long, e.g. after init_from
        patch_embed_lr_mult: Number = 0.2
        layerwise_decay: Share = 0.9  # of the learning rate, per block towards the input
        adamw_beta1: BelowOne = 0.9
        adamw_beta2: BelowOne = 0.999
    class crops:
        global_crops_scale: tuple[Share, Share] = (0.32, 1.0)  # share of the image's area
        local_crops_number: Whole = 8  # L
        local_crops_scale: tuple[Share, Share] = (0.05, 0.32)
        global_crops_size: Pixels = 224
        local_crops_size: Pixels = 96
        blur: Literal["as_executed", "as_written"] | tuple[Share, Share, Share] = "as_executed"  # ours
        jitter: tuple[Share, Share, Share, Share] = (0.4, 0.4, 0.2, 0.1)  # ours: light, contrast, colour, hue
        jitter_prob: Share = 0.8  # ours
        gray_prob: Share = 0.2  # ours
        solarize_prob: Share = 0.2  # ours; second global crop only
    class evaluation:
        eval_period_iterations: Whole = 12500  # steps between k-NN evaluations; 0 = only at the end
        train_path: str = ""  # ours: labelled images to search in; empty = no k-NN
        test_path: str = ""  # ours: labelled images to classify; empty = a part of train_path
        split: Part = 0.25  # ours: that part, of each class
        split_seed: Whole = 0  # ours: another number is another part
        knn_k: Count = 20  # ours
        online_limit: Whole = 0  # ours: images of each set used during training; 0 = all
        batch_size: Count = 256  # ours
        image_size: OptionalPixels = 0  # ours; 0 = global_crops_size
        resize_size: OptionalPixels = 0  # ours: shorter side before the centre crop; 0 = image_size
        fit: Literal["crop", "resize", "pad"] = "crop"  # ours: the centre, or all of it squeezed or padded
    class compute_precision:
        dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where it is fast
    class speed:  # ours: these change the time of a run, not its result (beyond rounding)
        device: Literal["auto", "cpu", "cuda"] = "auto"
        checkpointing: Literal["off", "full", "selective"] = "off"  # of activations: less memory, more time
        compile: Literal["auto", "on", "off"] = "auto"  # torch.compile, block by block; auto: on a GPU
        kernels: Literal["auto", "triton", "pytorch"] = "auto"  # auto: triton on a GPU
        threads: Workers = 0  # of a step, per process, on the CPU; 0 = PyTorch's default
    # fmt: on

    def __init__(self):
        fill_sections(self)

    def to_yaml(self):
        """The resolved settings as YAML, always in the same order; `load` reads it back unchanged."""
        return yaml.safe_dump({name: asdict(s) for name, s in vars(self).items()}, sort_keys=False)


def fill_sections(settings):
    """Give a new object of Config, or another class of sections, one instance of each, with its defaults."""
    for name, section in vars(type(settings)).items():
        if isinstance(section, type):
            setattr(settings, name, dataclass(section)())


def kinds_of(settings):
    """An object of such a class -> {"section.key": annotation}."""
    kinds = {}
    for name, section in vars(settings).items():
        kinds |= {f"{name}.{key}": kind for key, kind in section.__annotations__.items()}
    return kinds


def read_values(kinds, *sources):
    """Paths of YAML files, texts "section.key=value" or None -> {"section.key": value}; the last one wins.

    kinds: the settings' annotations, as kinds_of gives them. Runs no YAML tags. Raises UserError.
    """
    values = {}
    for source in filter(None, sources):
        name = source
        try:
            if isinstance(source, str):
                name, equals, text = source.partition("=")
                if not equals:
                    raise UserError(f"'{name}' is no setting: write section.key=value, e.g. optim.epochs=10")
                values[name] = unquote(text) if kinds.get(name) in (str, Path) else parse_yaml(text)
                continue
            tree = parse_yaml(source.read_text(encoding="utf-8"))
            tree = {} if tree is None else tree
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"the config {source} cannot be read: {e}") from None
        except ValueError as e:
            raise UserError(f"{name} is not valid plain YAML: {e}") from None
        if not isinstance(tree, dict) or not all(isinstance(v, dict | None) for v in tree.values()):
            raise UserError(f"the config {source} must hold sections, each with indented lines `key: value`")
        for section, keys in tree.items():
            values |= {f"{section}.{key}": value for key, value in (keys or {}).items()}
    return values


def unquote(text):
    """A text from the command line as it stands, where YAML would end at "#" or stumble over ": "."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def assign(settings, values):
    """Set settings.section.key for each "section.key". UserError for an unknown name or a bad value."""
    kinds = kinds_of(settings)
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        if name not in kinds:
            same_key = [known for known in kinds if known.split(".")[1] == key]
            near = get_close_matches(name, same_key or kinds, n=1, cutoff=0)[0]
            given = short_repr(value)
            raise UserError(f"there is no setting {name} (given as {given}); the nearest is {near}")
        try:
            setattr(getattr(settings, section), key, convert(kinds[name], value))
        except ValueError as e:
            raise UserError(f"{name} is {short_repr(value)}, but must be {e}") from None


def convert(kind, value):
    """A YAML value -> the type that its annotation asks for, or a ValueError that says what is accepted."""
    origin = get_origin(kind) or kind
    args = get_args(kind)
    if origin is Union:
        problems = []
        for one_kind in args:
            try:
                return convert(one_kind, value)
            except ValueError as e:
                problems.append(str(e))
        raise ValueError(", or ".join(problems))
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(args):
            raise ValueError(f"{len(args)} numbers")
        return tuple(map(convert, args, value))
    if origin is Literal:
        if isinstance(value, bool):  # YAML reads a bare on or off as a truth value
            value = "on" if value else "off"
        if value not in args:
            raise ValueError("one of " + ", ".join(args))
        return value
    if origin is Annotated:
        number_type, limit = args
        if isinstance(limit, Pattern):
            if isinstance(value, str) and re.fullmatch(limit.regex, value):
                return value
        elif type(value) in (int, float, str):  # no bool, which is an int; YAML reads 1e-4 as text
            with suppress(ValueError, OverflowError):
                number = number_type(float(value))
                if limit.low <= number <= limit.high and number == float(value):
                    return number
        raise ValueError(limit.words)
    if origin is str and value is None:  # YAML reads an empty text as null
        return ""
    if origin is Path and value:
        return Path(value)
    if not isinstance(value, origin) or "\0" in str(value):
        raise ValueError({bool: "true or false", Path: "a path"}.get(origin, "text without NUL bytes"))
    return value


def argument(kind):
    """For argparse: `type=argument(Count)` reads one text of that kind, or says what is accepted."""

    def read(text):
        try:
            return convert(kind, text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(f"{text!r} must be {e}") from None

    return read


def short_repr(value):
    """A value in a message, cut: a few bytes of YAML can be endless in print."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"


def parse_yaml(text):
    """Plain YAML, without tags -> its value. Whatever is wrong with it is a ValueError, as in parse_json."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as e:
        raise ValueError(" ".join(str(e).split())) from None


def parse_json(text):
    """JSON, text or bytes -> its value. Whatever is wrong with it is a ValueError, endless brackets too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


KINDS = kinds_of(Config())
SECTIONS = list(vars(Config()))
# Published settings that have only one value here, and those that mean nothing here.
FIXED = {"student.qkv_bias": True, "student.proj_bias": True, "student.ffn_bias": True,
         "optim.scaling_rule": "sqrt_wrt_1024"}  # fmt: skip
IGNORED = {"MODEL.WEIGHTS", "train.saveckp_freq", "train.cache_dataset", "student.block_chunks", "optim.lr",
           "student.pretrained_weights", "compute_precision.grad_scaler", "compute_precision.student",
           "compute_precision.teacher"}  # fmt: skip


def load(file=None, model=None, overrides=()):
    """-> Config: the defaults, then configs/`model`.yaml, then `file`, then texts "section.key=value"."""
    presets = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
    if model and model not in presets:
        near = get_close_matches(model, presets, n=1, cutoff=0)[0]
        raise UserError(f"there is no model {model}; the nearest of {', '.join(presets)} is {near}")
    values = read_values(KINDS, presets.get(model), Path(file) if file else None, *overrides)
    for name, only in FIXED.items():
        if values.get(name, only) != only:
            given = short_repr(values[name])
            raise UserError(f"{name} is {given}, but only {only!r} is implemented: remove the line")
    ignored = sorted(values.keys() & IGNORED)
    cfg = Config()
    assign(cfg, {name: value for name, value in values.items() if name not in {*FIXED, *IGNORED}})
    check(cfg)
    if ignored and os.environ.get("RANK", "0") == "0":
        print(f"warning: settings without a meaning here are ignored: {', '.join(ignored)}", file=sys.stderr)
    return cfg


def evaluation_size(cfg):
    """Side of the square that a frozen backbone sees, in pixels."""
    return cfg.evaluation.image_size or cfg.crops.global_crops_size


def check(cfg):
    """Raise UserError for settings that do not fit each other."""
    problems = []
    values = {name: attrgetter(name)(cfg) for name in KINDS}
    patch_size = cfg.student.patch_size
    sizes = ["crops.global_crops_size", "student.pos_embed_size", "evaluation.image_size"]
    if cfg.crops.local_crops_number:
        sizes.append("crops.local_crops_size")
    for name in sizes:
        if name.startswith("crops.") and values[name] < 5:
            problems.append(f"{name} must be 5 or more: blur reaches 4 pixels beyond the edge")
        if values[name] % patch_size:
            problems.append(f"{name} {values[name]} is no multiple of student.patch_size {patch_size}")
    for name, value in values.items():
        if KINDS[name] == tuple[Share, Share] and value[0] > value[1]:
            problems.append(f"{name} {list(value)} must name the smaller number first")
        if name.startswith(("optim.warmup", "optim.freeze")) and value > cfg.optim.epochs:
            problems.append(f"{name} {value:g} is longer than the run, optim.epochs {cfg.optim.epochs:g}")
    if cfg.data.range != "auto" and cfg.data.range[0] >= cfg.data.range[1]:
        problems.append(f"data.range {list(cfg.data.range)} must name the smaller number first")
    resize = cfg.evaluation.resize_size
    size = evaluation_size(cfg)
    if 0 < resize < size:
        problems.append(f"evaluation.resize_size {resize} is smaller than the image, {size}")
    patches = (cfg.crops.global_crops_size // patch_size) ** 2
    most_masked = int(patches * cfg.ibot.mask_ratio_min_max[1])
    if cfg.ibot.mask_sample_probability and cfg.ibot.loss_weight and not most_masked:
        limits = f"ibot.mask_ratio_min_max {list(cfg.ibot.mask_ratio_min_max)}"
        problems.append(f"{limits} never masks one of the {patches} patches: raise it, or set "
                        f"ibot.mask_sample_probability=0")  # fmt: skip
    group = cfg.dino.koleo_group
    batch_size = cfg.train.batch_size_per_gpu
    if group and batch_size % group:
        problems.append(f"dino.koleo_group {group} must divide train.batch_size_per_gpu {batch_size}")
    if cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH < 0.5:
        problems.append("optim.epochs * train.OFFICIAL_EPOCH_LENGTH is not even one step")
    if problems:
        raise UserError("; ".join(problems))


# As Python, NumPy, and PyTorch for a CPU, a GPU and numbers beyond 64 bits put it.
OUT_OF_MEMORY = "MemoryError|DefaultCPUAllocator|out of memory|ALLOC_FAILED|size calculation overflowed"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, a quota, the largest file


def run(main, if_out_of_memory="lower the batch size, or the size or number of images"):
    """Call a script's `main` and exit with its code (None = 0), or with 1 and a sentence: see `explain`.

    if_out_of_memory: what to do then, for that sentence.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    try:
        code = main()
    except SystemExit as e:
        code = e.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as e:
        sentence = explain(e, if_out_of_memory)
        if not sentence:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        code = 1
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # gloo's threads abort some normal exits
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)


def root_cause(error):
    """torch's zip writer answers a full disk with "unexpected pos": the OSError before it knows better."""
    while isinstance(error, RuntimeError) and error.__context__:
        error = error.__context__
    return error


def explain(error, if_out_of_memory):
    """What a user can mend, in a sentence; None for a bug, whose traceback is wanted."""
    text = f"{type(error).__name__}: {error}"
    if re.search(OUT_OF_MEMORY, text):
        amount = re.search(r"allocate ([\d.]+ \w+)", text)
        needed = f" for another {amount[1]}" if amount else ""
        return f"there is not enough memory{needed}: {if_out_of_memory}"
    if isinstance(error, UserError):
        return str(error)
    error = root_cause(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"{error}: make room; a run goes on with --resume"
    if isinstance(error, OSError) and error.filename:
        return f"{error}: check that path, or choose another"


if __name__ == "__main__":
    preset, *changes = sys.argv[1:] or [None]
    run(lambda: print(load(None, preset, changes).to_yaml(), end=""))
