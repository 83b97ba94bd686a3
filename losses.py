"""The objective of DINOv2: the DINO, iBOT and KoLeo losses, and the two ways to make their targets.

Three things to know:
- everything is computed in fp32, whatever type the network runs in: a softmax over 131,072 prototypes needs
  it, and KoLeo in fp16 is infinite as soon as two images of a batch look alike;
- Sinkhorn-Knopp is three lines per iteration: the normalisations by the number of samples and of prototypes
  in the published code cancel exactly, and their collectives with them;
- the loss is linear in its targets, so the targets of both global crops are summed first and each local crop
  meets its targets once instead of twice.

Read top to bottom: targets (centering or Sinkhorn-Knopp), the three losses, the instruments that show
collapse. To read a log: a student that knows nothing has a cross-entropy of ln K. A run that *stays* at ln K
has collapsed to the uniform distribution; a loss that falls to zero has collapsed to a single prototype.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from distributed import all_reduce
from kernels.prototypes import SoftTargets, sinkhorn_targets, soft_cross_entropy

# ---------------------------------------------------------------- targets


class Centering(nn.Module):
    """Targets by sharpening and centering: p = softmax((z - c) / tau), c an EMA of the mean logit (DINO 3.1).

    Sharpening (a small tau) alone ends in one prototype for everything, centering alone in a uniform answer;
    together they balance. Step t uses the centre of the steps before t: `targets` only collects sums, and
    `update`, called once per optimizer step, moves the centre. The mean is over all rows of all ranks, each
    row with the same weight.
    """

    def __init__(self, K, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, K))
        self.total, self.count = 0, 0

    @torch.no_grad()
    def targets(self, logits, tau, fused=False):
        """logits (n, K) -> probabilities (n, K), fp32; `fused`: as SoftTargets, not written out."""
        self.total = self.total + logits.sum(0, keepdim=True, dtype=torch.float32)
        self.count += len(logits)
        if fused:
            return SoftTargets(logits, -self.center[0] / tau, tau)
        return F.softmax((logits.float() - self.center) / tau, dim=-1)

    @torch.no_grad()
    def update(self, found_inf=0.0):
        """c <- m c + (1 - m) mean(z); c stays if `found_inf` is 1 or no patch was masked anywhere."""
        sums = torch.zeros_like(self.center) + self.total
        packed = all_reduce(F.pad(sums, (0, 1), value=self.count))  # sums and count travel together
        mean = packed[:, :-1] / packed[:, -1:].clamp(min=1)
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        self.center.copy_(torch.where(packed[:, -1:] * (1 - found_inf) > 0, moved, self.center))
        self.total, self.count = 0, 0


@torch.no_grad()
def sinkhorn_knopp(logits, tau, iterations=3, fused=False):
    """Targets by balanced assignment: every prototype gets the same share of the batch (DINOv2 section 4).

    Q = exp(z / tau); then, three times: divide each column by its sum over all ranks, each row by its own
    sum. logits (n, K), n may differ between ranks -> probabilities (n, K), fp32: rows sum to 1, columns
    almost to n / K. `fused`: as SoftTargets, without writing Q.
    """
    if fused:
        return sinkhorn_targets(logits, tau, iterations)
    logits = logits.float() / tau
    floor = logits.new_full((1, logits.shape[1]), -torch.inf)
    largest = torch.cat([logits, floor]).amax(dim=0, keepdim=True)  # of a prototype; there may be no rows
    # A factor per column cancels in the first division; without it exp overflows as soon as z > 88 tau.
    Q = torch.exp(logits - all_reduce(largest, "max"))
    for _ in range(iterations):
        Q /= all_reduce(Q.sum(dim=0, keepdim=True))
        # A row 88 tau below the best logit of *every* prototype underflows: no target, no loss, no NaN.
        Q /= Q.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return Q


# ---------------------------------------------------------------- losses


def cross_entropy(student_logits, targets, student_temp=0.1):
    """-sum_k p_k log softmax(z / tau)_k for each row: (n, K), (n, K) -> (n,), fp32."""
    if isinstance(targets, SoftTargets):  # on a GPU: the same without writing p, see kernels/prototypes.py
        return soft_cross_entropy(student_logits, targets, student_temp)
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    return -(targets * log_probs).sum(dim=-1)


def dino_loss(student_global, student_local, targets, student_temp=0.1):
    """Each crop of the student must predict the teacher's output for the *other* global crop(s) (DINO eq. 3).

    student_global (2, B, K), student_local (L, B, K) or None, targets (2, B, K) -> two scalars: the local and
    the global share of the mean over all ordered pairs (student crop, teacher crop) that are not the same
    crop, 2 L + 2 in number.
    """
    L = 0 if student_local is None else len(student_local)
    pairs = 2 * L + 2
    crossed = cross_entropy(student_global, targets.flip(0), student_temp)  # (2, B): 1 against 2, and back
    loss_global = crossed.mean(dim=1).sum() / pairs
    if not L:
        return torch.zeros_like(loss_global), loss_global
    both = targets.sum(dim=0)  # (B, K): linear in the targets, so both global targets at once
    loss_local = cross_entropy(student_local, both, student_temp).mean(dim=1).sum() / pairs
    return loss_local, loss_global


def ibot_loss(student_logits, targets, weights, images, student_temp=0.1):
    """A masked patch of the student must predict the teacher's output, who sees that patch (iBOT eq. 2).

    student_logits and targets (M, K) of the masked patches, weights (M,) = 1 / (masked patches of the same
    crop), images = all 2 B global crops, masked or not -> scalar. Crops without a mask add nothing but count:
    with half of the crops masked the term is half of a mean over masked crops. That is what the published
    recipe optimises.
    """
    return (cross_entropy(student_logits, targets, student_temp) * weights).sum() / images


def koleo_loss(features, group=0):
    """-mean log(distance to the nearest neighbour): spreads images apart (Sablayrolles 2019; DINOv2 4).

    features (B, D), student [CLS] before the head, of one global crop; neighbours are sought among `group`
    consecutive images (0: all B) -> scalar. Fewer than two images have no neighbour: 0. Distances are exact
    differences in fp32: the faster |a|^2 + |b|^2 - 2ab of torch.cdist rounds close neighbours to distance 0
    and their gradient with it.
    """
    if min(len(features), group or len(features)) < 2:
        return features.float().sum() * 0.0  # still a part of the graph: every parameter gets a gradient
    features = F.normalize(features.float(), dim=-1, eps=1e-8)
    x = features.view(-1, group or len(features), features.shape[-1])  # (groups, b, D)
    with torch.no_grad():  # which neighbour it is has no gradient, how far it is has
        similarity = x @ x.transpose(1, 2)
        similarity.diagonal(dim1=1, dim2=2).fill_(-1)
        nearest = similarity.argmax(dim=-1)  # (groups, b)
    neighbours = torch.gather(x, 1, nearest.unsqueeze(-1).expand_as(x))
    distance = (x - neighbours + 1e-8).norm(dim=-1)  # duplicates stay finite: about -ln 1e-8 instead of inf
    distance = torch.where(distance < 1e-6, distance.detach(), distance)  # and have no direction to part in
    return -torch.log(distance + 1e-8).mean()


# ---------------------------------------------------------------- instruments


@torch.no_grad()
def collapse_metrics(targets, student_logits, features, student_temp=0.1):
    """The scalars that tell learning from collapse. targets, student_logits (n, K), features (B, D).

    entropy: mean entropy of a target over ln K (0: one-hot, 1: uniform). entropy_mean: entropy of the mean
    target over ln K (how many prototypes are in use at all; near 0: one for everything). kl: student's
    distance from its target in nats. rank: effective rank of the features, exp(entropy of the normalised
    singular values) (Roy & Vetterli 2007).
    """
    K = targets.shape[-1]
    mean = targets.mean(dim=0)
    row_entropy = torch.special.entr(targets).sum(dim=-1).mean()
    features = torch.nan_to_num(features.float())  # one NaN must not stop the diagnosis
    singular = torch.linalg.svdvals(features - features.mean(dim=0))
    share = singular / singular.sum().clamp(min=1e-12)
    return {
        "entropy": row_entropy / math.log(K),
        "entropy_mean": torch.special.entr(mean).sum() / math.log(K),
        "kl": cross_entropy(student_logits, targets, student_temp).mean() - row_entropy,
        "rank": torch.special.entr(share).sum().exp(),
    }


def collapse_warning(entropy, entropy_mean):
    """A sentence if the teacher's outputs have collapsed, else None. Both entropies are over ln K."""
    if entropy_mean < 0.1:
        return ("collapsed to one-hot: every image gets the same prototype, so the loss looks great; "
                "try train.centering=sinkhorn_knopp, a higher teacher_temp or a lower base_lr")  # fmt: skip
    if entropy > 0.99:
        return ("collapsed to uniform: all prototypes are equally likely, and the loss sits at ln K; "
                "try a lower teacher_temp, fewer prototypes, or a higher base_lr")  # fmt: skip
    return None
