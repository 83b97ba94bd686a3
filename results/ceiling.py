"""The ceiling of the embedded data: the laptop network trained *with* labels, on the same crops.

    python results/ceiling.py [steps]     # one accuracy, and how long it took

A self-supervised run has three numbers below it: chance, raw pixels, a random network. This is the one above.
The default number of steps takes about as long as `python train.py`, since a step is cheaper than there,
without a teacher, local crops and heads. `python -m tools.audit_scenes --audit` prints the baselines that
need no network.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import config  # noqa: E402
from data import make_loader, permuted_index, stable_hash  # noqa: E402
from eval_knn import open_eval_sets  # noqa: E402
from features import extract_features  # noqa: E402
from model import DINOv2, compute_dtype  # noqa: E402
from optim import compute_schedules  # noqa: E402
from sources import open_source  # noqa: E402


def labels_of_samples(samples, labels, seed):
    """The labels of the images behind these numbers of samples, as MultiCropDataset chooses them."""
    n = len(labels)
    return labels[[permuted_index(stable_hash(seed, i // n), i % n, n) for i in samples.tolist()]]


def train_supervised(cfg, steps):
    """-> backbone, linear head, last loss."""
    torch.manual_seed(cfg.train.seed)
    dataset = open_source(cfg.train.dataset_path)
    backbone = DINOv2(cfg).backbone
    head = torch.nn.Linear(backbone.embed_dim, 10)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], weight_decay=0.05)
    labels = torch.tensor([dataset[i][1] for i in range(len(dataset))])
    loader = make_loader(cfg, dataset, torch.device("cpu"))
    dtype = compute_dtype(cfg.compute_precision.dtype, "cpu")
    for step in range(steps):
        batch = next(loader)
        optimizer.param_groups[0]["lr"] = compute_schedules(cfg, step)["lr"]
        targets = labels_of_samples(batch["samples"], labels, cfg.train.seed).repeat(2)  # of both crops
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = head(backbone(batch["globals"]).cls)
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone, head, loss.item()


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("steps", nargs="?", type=config.argument(config.Count), default=1200)
    steps = parser.parse_args().steps
    length = config.load(model="laptop").train.OFFICIAL_EPOCH_LENGTH
    overrides = [f"optim.epochs={steps / length}", "crops.local_crops_number=0"]
    cfg = config.load(model="laptop", overrides=overrides)
    start = time.perf_counter()
    backbone, head, loss = train_supervised(cfg, steps)
    seconds = time.perf_counter() - start
    _, queries = open_eval_sets(cfg)
    cls, labels, _ = extract_features(backbone, queries)
    accuracy = (head(cls).argmax(1) == labels).float().mean().item()
    result = f"loss {loss:.3f}, accuracy {accuracy:.3f} on {len(labels)} scenes"
    print(f"supervised, {steps} steps in {seconds:.0f} s: {result}")


if __name__ == "__main__":
    config.run(main)
