"""Twenty steps in fp64, pinned: losses and the norms of all weights, teacher and centres included.

The golden steps (tests/test_train_step.py) pin one step against the authors' code. This one pins what only
several steps show: AdamW, the separate clipping of backbone and heads, the order of optimizer, EMA and
centres, weight decay, schedules. The numbers are this code's own: `python tests/test_trajectory.py` writes
them.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the command above

import config  # noqa: E402
import optim  # noqa: E402
import train  # noqa: E402
from data import sample_masks  # noqa: E402
from model import SIZES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PINNED = Path(__file__).parent / "golden" / "trajectory.json"
STEPS = 20
VARIANTS = {
    "sinkhorn_knopp": ["train.centering=sinkhorn_knopp"],
    "centering": ["train.centering=centering", "ibot.separate_head=true"],
}
SIZE = dict(embed_dim=24, depth=2, num_heads=2)
SETTINGS = [
    "compute_precision.dtype=fp32",  # of the products: the weights are fp64
    "dino.head_n_prototypes=48",
    "dino.head_hidden_dim=32",
    "dino.head_bottleneck_dim=16",
    "ibot.head_n_prototypes=48",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=2",
    "student.drop_path_rate=0.3",
    "train.batch_size_per_gpu=4",
    "train.OFFICIAL_EPOCH_LENGTH=10",
    "optim.epochs=2",
    "optim.warmup_epochs=0.5",
    "optim.freeze_last_layer_epochs=0.2",
    "optim.base_lr=0.02",
    "optim.clip_grad=0.05",  # below every norm: clipping is always at work
    "teacher.momentum_teacher=0.9",
]


@contextmanager
def double_precision():
    """fp64 everywhere, also where the code asks for fp32: sums in another order then agree to many digits."""
    single = torch.float32
    to_single = torch.Tensor.float
    all_reduce = train.dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vit_laptop", SIZE)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        # The flag of a step that is skipped stays fp32: the fused AdamW wants it so.
        patch.setattr(train.dist, "all_reduce", lambda flag, op: to_single(all_reduce(flag, op)))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(single)


def draw(rng, *shape):
    """NumPy's numbers: those of PyTorch differ between its versions."""
    return torch.from_numpy(rng.normal(0, 1, shape))


@torch.no_grad()
def draw_weights(state):
    rng = np.random.default_rng(0)
    for parameter in state.student.parameters():
        if parameter.min() < parameter.max():  # biases, norms and LayerScale start constant: they stay
            parameter.copy_(0.1 * draw(rng, *parameter.shape))
    state.ema.load_state_dict(state.student.state_dict())


def make_batch(cfg, step):
    """Noise under the real masks of that step."""
    rng = np.random.default_rng(step)
    crops = cfg.crops
    B = cfg.train.batch_size_per_gpu
    global_crops = draw(rng, 2 * B, 3, crops.global_crops_size, crops.global_crops_size)
    local_crops = draw(rng, crops.local_crops_number * B, 3, crops.local_crops_size, crops.local_crops_size)
    masks = sample_masks(cfg, step, range(2 * B), 2 * B)
    return dict(masks, globals=global_crops, locals=local_crops)


def norm(module):
    return torch.cat([x.detach().flatten() for x in module.state_dict().values()]).norm().item()


def trajectory(overrides):
    """-> {name: one number per step}"""
    cfg = config.load(model="debug", overrides=SETTINGS + overrides)
    rows = []
    with double_precision():
        state = train.TrainState(cfg)
        draw_weights(state)
        for step in range(STEPS):
            torch.manual_seed(step)  # of drop path
            schedules = optim.compute_schedules(cfg, step)
            metrics = train.train_step(state, [make_batch(cfg, step)], schedules, cfg)
            state.step += 1
            row = {name: value.item() for name, value in metrics.items()}
            for network in ("student", "ema"):
                for name, module in getattr(state, network).named_children():
                    row[f"{network}.{name}"] = norm(module)
            row["dino_center"] = state.dino_center.center.norm().item()
            row["ibot_center"] = state.ibot_center.center.norm().item()
            rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps(variant):
    pinned = json.loads(PINNED.read_text())[variant]
    found = trajectory(VARIANTS[variant])
    assert found.keys() == pinned.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, pinned[name], rtol=1e-9, atol=1e-12, err_msg=name)


def clip_jointly(student, max_norm):
    total = torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm)
    return {f"grad_{name}": total for name, _ in student.named_children()}


def ema_of_the_old_student(state, *args, real=train.train_step, **options):
    """The teacher follows before the optimizer moves the student."""
    real_update = train.update_teacher
    schedules = args[1]
    real_update(state.ema, state.student, schedules["momentum"], torch.zeros(()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update_teacher", lambda *ignored: None)
        return real(state, *args, **options)


def center_used_at_once(self, logits, tau, fused=False, real=train.Centering.targets):
    """A centre that already knows the batch whose targets it makes."""
    real(self, logits, tau, fused)
    self.center.copy_(self.center * self.momentum + logits.mean(0, keepdim=True) * (1 - self.momentum))
    return torch.softmax((logits - self.center) / tau, dim=-1)


MUTANTS = {
    "joint clipping": (train, "clip_gradients", clip_jointly),
    "EMA before the optimizer": (train, "train_step", ema_of_the_old_student),
    "centre used at once": (train.Centering, "targets", center_used_at_once),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_numbers_notice(mutant, monkeypatch):
    monkeypatch.setattr(*MUTANTS[mutant])
    with pytest.raises(AssertionError):
        test_twenty_steps("centering")


if __name__ == "__main__":
    found = {name: trajectory(overrides) for name, overrides in VARIANTS.items()}
    PINNED.write_text(json.dumps(found, indent=1) + "\n")
