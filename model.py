"""The Vision Transformer with register tokens, and the DINO head. All of the network is in this file.

Compared with a textbook ViT:
- register tokens sit between [CLS] and the patches and have no position (Darcet et al. 2023, "Vision
  Transformers Need Registers"); the order is [CLS, registers x R, patches x N];
- several resolutions run in one pass (`forward_crops`): the tokens of all crops lie end to end, so norms,
  linears and MLPs see one large matrix; only attention works on one group of equal length at a time;
- stochastic depth drops images from the *computation* of a branch, not only from its result (section 5);
- parameter names are DINOv2's own: Meta's released files load with strict=True, without renaming.

Legend, used in every file: B images, V views, N patches, R registers, D width, H heads, K prototypes, M
masked patches, L local crops, T tokens of all crops together. A ViT-B/16 with 4 registers: image 3 x 224 x
224 -> 196 patches -> 201 tokens x 768 -> cls 768, registers 4 x 768, patches 196 x 768 -> head 65,536.
"""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import UserError
from distributed import copy_to_sharded
from kernels.attention import attention, reference

SIZES = {  # DINOv2 Table 17 (which prints 18 blocks for B: a misprint, code and weights have 12)
    "vit_laptop": dict(embed_dim=96, depth=4, num_heads=3),  # ours: five minutes on two CPU cores
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_giant2": dict(embed_dim=1536, depth=40, num_heads=24),  # not 16 heads of 88: kernels like 64
}


class Tokens(NamedTuple):
    """The output of a backbone for a batch of images: all that anything downstream needs."""

    cls: torch.Tensor  # (B, D) the image
    registers: torch.Tensor  # (B, R, D) scratch space of the network, not used downstream
    patches: torch.Tensor  # (B, N, D) one vector per patch, row by row


# ---------------------------------------------------------------- layers


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)  # rows ordered (q | k | v), each (H, d)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):  # (T, D) -> (T, 3, H, D / H)
        return self.qkv(x).unflatten(1, (3, self.num_heads, -1))

    def forward(self, x, groups):
        return self.proj(attention(self.heads(x), groups).flatten(1))  # see kernels/attention.py


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # the exact (erf) GELU: tanh is off by 1e-4 on released weights


class SwiGLU(nn.Module):
    """silu(a) * b with (a | b) = w12 x (Shazeer 2020); two thirds of the width keep the parameter count."""

    def __init__(self, dim, hidden):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # S 1024, B 2048, L 2736, g 4096
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LayerScale(nn.Module):
    """A learned gain per channel; starting small, it keeps deep models calm (Touvron et al. 2021)."""

    def __init__(self, dim, init):
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return x * self.gamma.to(x.dtype)


def to_autocast_dtype(x):
    """x in autocast's type, if autocast is on: tokens flow between blocks in 16 bits, as the authors' do.

    Autocast by itself would add every branch to fp32, twice the bytes for the largest tensors of a step.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def compute_dtype(name, device):
    """The dtype of matrix products on a device, by its name: fp32, bf16, fp16 or auto.

    `auto` is bf16 where the hardware multiplies it: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX, which
    do so five times as fast as fp32. Elsewhere bf16 is emulated and slower, and `auto` is fp32.
    """
    if name == "auto":
        if torch.device(device).type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            abilities = torch.cpu.get_capabilities()
            has_bf16 = abilities.get("avx512_bf16", False) or abilities.get("amx_bf16", False)
        name = "bf16" if has_bf16 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def drop_path(x, groups, branch, rate):
    """x + branch(x) for a random subset of the images, x for the others (DINOv2 section 5).

    The dropped images are not computed at all: at rate 0.4 a block costs 40 % less. Each group (crop size)
    draws its own subset of k = max(floor(b (1 - rate)), 1) images, and the residual is scaled by b / k, so
    its expectation is unchanged. x (T, D), groups [(b, length), ...] -> (T, D).
    """
    rows = []
    scales = []
    kept_groups = []
    start = 0
    for b, length in groups:
        k = max(int(b * (1 - rate)), 1)
        kept = torch.randperm(b, device=x.device)[:k]
        tokens = start + kept[:, None] * length + torch.arange(length, device=x.device)  # (k, length)
        rows.append(tokens.flatten())
        scales.append(x.new_full((k * length, 1), b / k))
        kept_groups.append((k, length))
        start += b * length
    rows = torch.cat(rows)
    # Not x[rows]: indexing sorts the rows in its backward pass, in case one came twice.
    residual = branch(x.index_select(0, rows), kept_groups) * torch.cat(scales)
    return x.index_add(0, rows, residual.to(x.dtype))


class Block(nn.Module):
    """Pre-norm block on tokens (T, D): x + ls1(attn(norm1 x)), then x + ls2(mlp(norm2 x))."""

    def __init__(self, dim, num_heads, ffn_layer, layerscale, drop_path_rate):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim) if ffn_layer == "mlp" else SwiGLU(dim, 4 * dim)
        self.ls2 = LayerScale(dim, layerscale) if layerscale else nn.Identity()

    def attention_branch(self, x, groups):
        return self.ls1(self.attn(self.norm1(x), groups))

    def mlp_branch(self, x, groups):
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x, groups):
        for branch in (self.attention_branch, self.mlp_branch):
            if self.training and self.drop_path_rate > 0:
                x = drop_path(x, groups, branch, self.drop_path_rate)  # a fresh subset for each branch
            else:
                x = x + branch(x, groups)
        return x


class PatchEmbed(nn.Module):
    """Maps each p x p patch linearly to D numbers. The weights are those of a convolution, as in DINOv2."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):  # (B, 3, h p, w p) -> (B, h w, D), row by row
        # One product, not self.proj(images): a CPU's bf16 convolution returns memory that it never wrote
        # where the result is one column wide (torch 2.13.0, tests/test_model.py).
        p = self.patch_size
        patches = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, 3, h, p, w, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, h w, 3 p p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


# ---------------------------------------------------------------- the backbone


class VisionTransformer(nn.Module):
    """The backbone: images (B, 3, h p, w p), float, ImageNet-normalised -> Tokens after the final norm.

    `img_size` only fixes the native grid of the position embedding; any size divisible by the patch goes in,
    and the embedding is interpolated. `layerscale` 0 leaves LayerScale out (DINOv1). Two modes of
    interpolation exist in the released weights: `interpolate_offset` 0.1 without antialias (no registers),
    0.0 with antialias (registers). The wrong one costs 3-8 % of a feature's magnitude.
    """

    def __init__(self, embed_dim, depth, num_heads, *, patch_size=14, img_size=518, num_register_tokens=0,
                 ffn_layer="mlp", layerscale=1e-5, interpolate_antialias=False, interpolate_offset=0.1,
                 drop_path_rate=0.0, drop_path_uniform=True, init_std=0.02):  # fmt: skip
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.arch = dict(  # the arguments that make this network again: saved with its weights
            embed_dim=embed_dim, depth=depth, num_heads=num_heads, patch_size=patch_size, img_size=img_size,
            num_register_tokens=num_register_tokens, ffn_layer=ffn_layer, layerscale=layerscale,
            interpolate_antialias=interpolate_antialias, interpolate_offset=interpolate_offset)  # fmt: skip
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        if num_register_tokens:  # absent without registers, as in the released files
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        ramp = [1.0 if drop_path_uniform else i / max(depth - 1, 1) for i in range(depth)]
        rates = [drop_path_rate * share for share in ramp]
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, ffn_layer, layerscale, r) for r in rates])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self, init_std)

    def interpolate_pos_embed(self, h, w):
        """The position embedding for a grid of h x w patches: (1, 1 + h w, D), bicubic, in fp32."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)  # of the native grid
        if (h, w) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().unflatten(1, (side, side))  # (1, side, side, D)
        grid = grid.permute(0, 3, 1, 2)
        options = dict(mode="bicubic", align_corners=False, antialias=self.interpolate_antialias)
        offset = self.interpolate_offset
        if offset:  # it shifts the sampling grid too, so size= would not be the same thing
            factors = ((h + offset) / side, (w + offset) / side)
            grid = F.interpolate(grid, scale_factor=factors, **options)
        else:
            grid = F.interpolate(grid, size=(h, w), **options)
        patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)  # (1, h w, D)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def embed(self, images, masks=None):
        """images (B, 3, h p, w p), masks (B, N) bool or None -> tokens (B, 1 + R + N, D)."""
        B, _, height, width = images.shape
        p = self.patch_size
        if height % p or width % p:
            fits = f"{max(width // p, 1) * p} x {max(height // p, 1) * p}"
            raise UserError(f"an image of {width} x {height} does not divide into {p} x {p} patches: "
                            f"make it {fits}")  # fmt: skip
        x = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))
        if masks is not None:  # before the position is added: a masked patch still knows where it is
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)
        x = x + self.interpolate_pos_embed(height // p, width // p)
        if self.num_register_tokens:  # after the position: registers have none
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        return to_autocast_dtype(x)

    def forward(self, images, masks=None):
        """images (B, 3, h p, w p), masks (B, N) bool or None -> Tokens. Lists of both: see forward_crops."""
        if torch.is_tensor(images):
            return self.forward([images], [masks])[0]
        masks = masks or [None] * len(images)
        embedded = [self.embed(x, mask) for x, mask in zip(images, masks, strict=True)]
        groups = [tuple(x.shape[:2]) for x in embedded]
        x = torch.cat([x.flatten(0, 1) for x in embedded])  # (T, D): all tokens of all crops, end to end
        for block in self.blocks:
            x = block(x, groups)
        return self.split(self.norm(x), groups)

    def forward_crops(self, images, masks=None):
        """Several batches of images of different sizes in one pass.

        images: list of (B_i, 3, h_i p, w_i p); masks: list of (B_i, N_i) bool or None -> list of Tokens.
        """
        return self(images, masks)  # not self.forward: FSDP gathers the weights in hooks of the call

    def split(self, x, groups):
        """(T, D) -> Tokens per group."""
        R = self.num_register_tokens
        outputs = []
        for rows, group in zip(x.split([b * n for b, n in groups]), groups, strict=True):
            tokens = rows.view(*group, self.embed_dim)  # (b, 1 + R + N, D)
            outputs.append(Tokens(tokens[:, 0], tokens[:, 1 : 1 + R], tokens[:, 1 + R :]))
        return outputs

    def attention_maps(self, images, layer=-1):
        """The attention of one block: (B, H, T, T), T = [CLS, registers, patches]; each row sums to 1."""
        x = self.embed(images)
        groups = [tuple(x.shape[:2])]
        x = x.flatten(0, 1)
        for block in self.blocks[:layer]:
            x = block(x, groups)
        block = self.blocks[layer]
        return reference(block.attn.heads(block.norm1(x)), groups)[1][0]

    def intermediate(self, images, layers, norm=True):
        """The outputs of chosen blocks (0-based ids), after the final norm or raw -> list of Tokens."""
        x = self.embed(images)
        groups = [tuple(x.shape[:2])]
        x = x.flatten(0, 1)
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = block(x, groups)
            if i in layers:
                outputs[i] = self.split(self.norm(x) if norm else x, groups)[0]
        return [outputs[i] for i in layers]


# ---------------------------------------------------------------- the head


class WeightNormLinear(nn.Module):
    """y = g v / |v| x, row by row, without bias: a prototype is a direction v with a length g.

    DINOv1 froze the lengths, DINOv2 trains (and decays) them. (Salimans & Kingma 2016.)
    """

    def __init__(self, in_dim, out_dim, freeze_g=False):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not freeze_g)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))

    def forward(self, x):
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=-1, eps=0))


class DINOHead(nn.Module):
    """Features (M, D) -> logits (M, K): an MLP, then the cosine with each prototype, times its length."""

    def __init__(self, in_dim, out_dim, nlayers=3, hidden_dim=2048, bottleneck_dim=256, freeze_g=False):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers = []
        for fan_in, fan_out in zip(dims, dims[1:], strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        layers.pop()  # no GELU after the last
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]  # keys mlp.0/2/4.*, or mlp.* alone
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, freeze_g)
        init_weights(self)

    def forward(self, x):
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return self.last_layer(F.normalize(x, dim=-1, eps=eps))


class DINOv2(nn.Module):
    """A backbone with its heads: the student, and in the same shape the teacher.

    Without a separate iBOT head, [CLS] and patches share one (the published default).
    """

    def __init__(self, cfg, drop_path_rate=0.0):
        super().__init__()
        student = cfg.student
        self.backbone = VisionTransformer(
            **SIZES[student.arch],
            patch_size=student.patch_size,
            img_size=student.pos_embed_size or cfg.crops.global_crops_size,
            num_register_tokens=student.num_register_tokens,
            ffn_layer="mlp" if student.ffn_layer == "mlp" else "swiglu",
            layerscale=student.layerscale,
            interpolate_antialias=student.interpolate_antialias,
            interpolate_offset=student.interpolate_offset,
            drop_path_rate=drop_path_rate,
            drop_path_uniform=student.drop_path_uniform,
        )
        self.dino_head = self.make_head(cfg.dino, cfg)
        if cfg.ibot.separate_head and cfg.ibot.mask_sample_probability:
            self.ibot_head = self.make_head(cfg.ibot, cfg)
        init_weights(self, student.init_std)

    def make_head(self, section, cfg):
        return DINOHead(
            self.backbone.embed_dim,
            section.head_n_prototypes,
            section.head_nlayers,
            section.head_hidden_dim,
            section.head_bottleneck_dim,
            cfg.dino.freeze_weight_g,
        )

    def heads(self, cls, masked_patches):
        """cls (n, D), masked_patches (M, D) -> logits (n, K), (M, K). A shared head runs once over both."""
        if hasattr(self, "ibot_head"):
            return self.dino_head(cls), self.ibot_head(masked_patches)
        return self.dino_head(torch.cat([cls, masked_patches])).split([len(cls), len(masked_patches)])


@torch.no_grad()
def init_weights(model, std=0.02, seed=None):
    """Draw every parameter from (seed, its name): the same numbers in any order and on any number of GPUs.

    The authors' distributions, for std 0.02. `seed`: that of torch.manual_seed, unless given. One tensor at a
    time is whole, on the CPU; nothing is drawn for a model on the meta device.
    """
    seed = torch.initial_seed() if seed is None else seed
    rng = torch.Generator()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            key = f"{path}.{name}".removeprefix("backbone").strip(".")  # the backbone alone draws the same
            digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest()
            rng.manual_seed(int.from_bytes(digest))
            copy_to_sharded(parameter, initial_value(module, name, parameter.shape, std, rng))


def initial_value(module, name, shape, std, rng):
    """The first value of one parameter: tokens almost zero, biases and the mask token zero, gains one."""
    x = torch.zeros(shape)
    if name == "pos_embed" or name == "weight" and isinstance(module, nn.Linear):
        nn.init.trunc_normal_(x, std=0.02 if name == "pos_embed" else std, generator=rng)
    elif name in ("cls_token", "register_tokens"):
        x.normal_(std=1e-6, generator=rng)
    elif name == "weight_v" or isinstance(module, nn.Conv2d):  # as PyTorch's own linear and convolution
        fan_in = (module.weight.shape if name == "bias" else shape)[1:].numel()
        x.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=rng)
    elif name == "weight_g" or name == "weight":  # of LayerNorm
        x.fill_(1)
    elif name == "gamma":
        x.fill_(module.init)
    return x


def describe_backbone(backbone):
    """'ViT of width 384, depth 12, patch 14, 4 registers, mlp' for messages."""
    shape = "ViT of width {embed_dim}, depth {depth}, patch {patch_size}".format(**backbone.arch)
    dtype = backbone.norm.weight.dtype
    numbers = "" if dtype == torch.float32 else f", in {str(dtype).removeprefix('torch.')}"
    return f"{shape}, {backbone.num_register_tokens} registers, {backbone.arch['ffn_layer']}{numbers}"
