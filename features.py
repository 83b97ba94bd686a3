"""A frozen backbone looks at images: preprocessing, batched extraction, and the simplest linear read-out of
what it saw.

What is unusual here: the read-out of foreground against background is ridge regression in closed form (two
lines of linear algebra, no learning rate to choose), good enough to compare backbones while they train.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data import BadImage, normalize, to_tensor

CACHE_BYTES = 512 * 2**20  # evaluation images up to this total are decoded once and kept


def preprocess(image, size, resize):
    """PIL RGB -> uint8 (3, size, size): short side to `resize` (bicubic), then the centre.

    DINOv2's k-NN protocol is resize 256, size 224.
    """
    scale = resize / min(image.size)
    if min(image.size) != resize:
        image = image.resize([max(round(s * scale), size) for s in image.size], Image.BICUBIC)
    left, top = ((s - size) // 2 for s in image.size)
    return to_tensor(image.crop((left, top, left + size, top + size)))


class EvalImages(Dataset):
    """Images ready for a backbone: item i is (uint8 (3, size, size), label), or None for a bad image."""

    def __init__(self, dataset, size, resize=0, limit=0):
        self.dataset, self.size, self.resize = dataset, size, resize or size
        n = len(dataset)
        # A limited set takes every n/limit-th image: folders are sorted by class, the first `limit` would be
        # one class.
        self.indices = list(range(n)) if not limit or limit >= n else [i * n // limit for i in range(limit)]
        self.keep = len(self.indices) * 3 * size * size <= CACHE_BYTES
        self.cache, self.bad = {}, {}  # bad: {number: path and reason}

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        if i not in self.cache:
            try:
                image, label = self.dataset[self.indices[i]]
            except BadImage as e:
                self.bad[i] = str(e)
                return None
            item = preprocess(image, self.size, self.resize), label
            if not self.keep:
                return item
            self.cache[i] = item
        return self.cache[i]


def batches(images, batch_size=256, num_workers=0):
    """EvalImages -> uint8 (b, 3, S, S), labels (b,); images that do not decode are left out."""

    def collate(items):
        items = [x for x in items if x is not None]
        if not items:
            none = torch.empty(0, 3, images.size, images.size, dtype=torch.uint8)
            return none, torch.empty(0, dtype=torch.long)
        return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])

    return DataLoader(images, batch_size, collate_fn=collate, num_workers=num_workers)


@torch.no_grad()
def extract(backbone, images, batch_size=256, num_workers=0, patches=False):
    """All EvalImages through a backbone -> cls (n, D) fp32, labels (n,), patches (n, N, D) if asked for."""
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    cls, labels, dense = [], [], []
    for x, y in batches(images, batch_size, num_workers):
        tokens = backbone(normalize(x.to(device)))
        cls.append(tokens.cls.float().cpu())
        labels.append(y)
        if patches:
            dense.append(tokens.patches.float().cpu())
    backbone.train(was_training)
    return torch.cat(cls), torch.cat(labels), torch.cat(dense) if patches else None


def ridge(x, y, strength=1e-3):
    """Linear regression in closed form, x (n, D) and y (n,) -> a function (m, D) -> (m,)."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column is the bias
    gram = x.T @ x + strength * len(x) * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ y)
    return lambda new: F.pad((new - mean) / std, (0, 1), value=1.0) @ weights


def foreground_miou(backbone, scenes, size):
    """How well one linear map of patch tokens tells objects from background: mean IoU of the two, in pixels.

    The map is fitted on two thirds of (at most) 600 scenes, to the share of foreground in each patch, and
    scored on the others; its answer is enlarged (bilinear) and cut at one half.
    """
    n = min(600, len(scenes))
    train, test = n - n // 3, n // 3
    masks = torch.stack([torch.from_numpy(scenes.scene(i)[2] > 0) for i in range(train + test)]).float()
    masks = F.interpolate(masks[:, None], size=(size, size), mode="area")  # (n, 1, S, S)
    images = EvalImages(scenes, size)
    images.indices = images.indices[: train + test]
    patches = extract(backbone, images, patches=True)[2]  # (n, N, D)
    n = size // backbone.patch_size
    share = F.avg_pool2d(masks, backbone.patch_size)  # (n, 1, n, n)
    predict = ridge(patches[:train].flatten(0, 1), share[:train].flatten())
    answer = predict(patches[train:].flatten(0, 1)).view(test, 1, n, n)
    answer = F.interpolate(answer, size=(size, size), mode="bilinear") > 0.5
    truth = masks[train:] > 0.5
    ious = [(a & t).sum() / (a | t).sum() for a, t in ((answer, truth), (~answer, ~truth))]
    return float(sum(ious) / 2)
