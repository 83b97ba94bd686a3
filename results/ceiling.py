"""The ceiling of the embedded data: the laptop network trained *with* labels, on the same crops.

    python results/ceiling.py [steps]     # one accuracy; for the other baselines: python scenes.py --audit

A self-supervised run has three numbers below it: chance, raw pixels, a random network. This is the one above.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import config  # noqa: E402
from data import make_loader, permuted_index, stable_hash
from eval_knn import open_eval_sets
from features import extract_features
from model import DINOv2
from optim import compute_schedules
from sources import open_source


def main(steps):
    cfg = config.load(model="laptop", overrides=[f"optim.epochs={steps / 100}", "crops.local_crops_number=0"])
    torch.manual_seed(cfg.train.seed)
    dataset, backbone = open_source(cfg.train.dataset_path), DINOv2(cfg).backbone
    head = torch.nn.Linear(backbone.embed_dim, 10)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    labels = torch.tensor([dataset[i][1] for i in range(len(dataset))])
    loader, n, seed = make_loader(cfg, dataset, torch.device("cpu")), len(dataset), cfg.train.seed
    for step in range(steps):
        batch = next(loader)
        optimizer.param_groups[0]["lr"] = compute_schedules(cfg, step)["lr"]
        images = [permuted_index(stable_hash(seed, i // n), i % n, n) for i in batch["samples"].tolist()]
        y = labels[images].repeat(2)
        loss = F.cross_entropy(head(backbone(batch["globals"]).cls), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, queries = open_eval_sets(cfg)
    cls, truth, _ = extract_features(backbone, queries)
    accuracy = (head(cls).argmax(1) == truth).float().mean().item()
    print(
        f"supervised, {steps} steps: loss {loss.item():.3f}, accuracy {accuracy:.3f} on {len(truth)} scenes"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600)
