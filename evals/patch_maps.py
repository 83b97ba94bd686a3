"""Patch maps: a number, a vector or a colour for each patch of one image, read off a frozen backbone.

An image is uint8 (3, H, W), both sides multiples of the patch size; its map has a grid of (h, w) patches.
evals/visualize.py draws these maps, and evals/explore.py puts them on a page.

The foreground is found in every image on its own. Patch tokens are first averaged with their neighbours;
otherwise patterns as fine as the patches, as in our scenes, are all that the first component sees. Of its two
sides, the foreground is then the one that [CLS] attends to more. In figure 1 of DINOv2 (Oquab et al. 2023),
images of one kind share the component.
"""

import torch
import torch.nn.functional as F
from PIL import Image

from data import normalize
from features import resize_to_patches

MAX_ROWS = 100_000  # tokens that a covariance or a quantile is computed from; of more, evenly spread ones


# ---------------------------------------------------------------- one image through a backbone


def model_input(backbone, image):
    """uint8 (3, H, W) -> normalised pixels (1, 3, H, W) on the backbone's device, and the grid (h, w)."""
    device = next(backbone.parameters()).device
    _, height, width = image.shape
    grid = (height // backbone.patch_size, width // backbone.patch_size)
    return normalize(image[None].to(device)), grid


@torch.no_grad()
def patch_tokens(backbone, image):
    """uint8 (3, H, W) -> patch tokens (h, w, D) after the final norm, fp32 on the CPU."""
    pixels, grid = model_input(backbone, image)
    patches = backbone.eval()(pixels).patches[0]  # (N, D)
    return patches.unflatten(0, grid).float().cpu()


@torch.no_grad()
def patch_norms(backbone, image):
    """uint8 (3, H, W) -> lengths (h, w) of the patch tokens before the final norm, which makes them alike."""
    pixels, grid = model_input(backbone, image)
    last = len(backbone.blocks) - 1
    patches = backbone.eval().intermediate(pixels, [last], norm=False)[0].patches[0]  # (N, D)
    return patches.norm(dim=-1).unflatten(0, grid).float().cpu()


@torch.no_grad()
def patch_attention(backbone, image):
    """uint8 (3, H, W) -> (H, 1 + R, h, w): the attention of [CLS] and each register to the patches, by head.

    That of the last block. Each map sums to less than 1: the rest goes to [CLS] and registers.
    """
    pixels, grid = model_input(backbone, image)
    first_patch = 1 + backbone.num_register_tokens
    attention = backbone.eval().attention_maps(pixels)[0]  # (H, T, T)
    return attention[:, :first_patch, first_patch:].unflatten(-1, grid).float().cpu()


def outliers(norms, arch):
    """norms (n,) -> the share of outliers, and the norm beyond which a token is one.

    For ViT-g 150, set by hand in the registers paper (Darcet et al. 2023, figure 3: 2.37 % lie beyond).
    Otherwise a rule of ours: median + 10 robust standard deviations (1.4826 MAD), at least twice the median.
    """
    median = norms.median()
    robust_limit = median + 10 * 1.4826 * (norms - median).abs().median()
    limit = max(robust_limit, 2 * median).item()
    if (arch["embed_dim"], arch["depth"]) == (1536, 40):  # ViT-g
        limit = 150.0
    return (norms > limit).float().mean().item(), limit


# ---------------------------------------------------------------- principal components


def every_nth(x):
    """Rows of x, evenly spread: all, or some MAX_ROWS of them."""
    return x[:: 1 + len(x) // MAX_ROWS]


def principal_components(x, k):
    """x (m, D) -> its k strongest components (m, k), centred.

    A direction has no sign of its own; here the sum of its numbers is made positive.
    """
    rows = every_nth(x).double()
    mean = rows.mean(0)
    rows = rows - mean
    eigenvectors = torch.linalg.eigh(rows.T @ rows)[1]
    directions = eigenvectors.flip(1)[:, :k]  # (D, k), strongest first
    directions = directions * torch.where(directions.sum(0) < 0, -1.0, 1.0)
    return ((x.double() - mean) @ directions).float()


def pca_colors(patches):
    """patches (..., D) -> (..., 3) in 0...1: the first three principal components, outliers clipped."""
    components = principal_components(patches.flatten(0, -2), 3)
    low, high = torch.quantile(every_nth(components), torch.tensor([0.02, 0.98]), dim=0)
    colors = ((components - low) / (high - low + 1e-9)).clamp(0, 1)
    return colors.unflatten(0, patches.shape[:-1])


def first_component(tokens, attention):
    """tokens (h, w, D), attention (h, w) of [CLS] -> (h, w): the first component of one image, its tokens
    averaged over 3 x 3. Positive is the foreground, to which [CLS] attends more."""
    smooth = F.avg_pool2d(tokens.permute(2, 0, 1)[None], 3, 1, 1, count_include_pad=False)  # (1, D, h, w)
    component = principal_components(smooth[0].flatten(1).T, 1).view(attention.shape)
    if (component * attention).sum() < 0:
        return -component
    return component


def foreground_map(backbone, image):
    """uint8 (3, H, W) -> its `first_component` (h, w): the foreground is where it is not negative."""
    tokens = patch_tokens(backbone, image)
    cls_attention = patch_attention(backbone, image)[:, 0].mean(0)
    return first_component(tokens, cls_attention)


def first_component_iou(backbone, scenes, size, count):
    """How well the first component finds the objects: the foreground's IoU, over all pixels of all scenes.

    The first `count` scenes, seen at `size` pixels; the component is enlarged (bilinear) and cut at 0.
    Nothing is fitted to the masks.
    """
    intersection = 0
    union = 0
    for i in range(count):
        pixels, _, mask, _ = scenes.scene(i)
        truth = torch.from_numpy(mask > 0)  # (H, W)
        image = resize_to_patches(Image.fromarray(pixels), backbone.patch_size, size)
        component = foreground_map(backbone, image)
        enlarged = F.interpolate(component[None, None], size=truth.shape, mode="bilinear")[0, 0]
        found = enlarged >= 0
        intersection += (found & truth).sum().item()
        union += (found | truth).sum().item()
    return intersection / max(union, 1)
