"""Processes that train together: start, collectives, FSDP2, compilation and activation checkpointing.

Started by `torchrun --nproc_per_node 8 train.py`, every process (a "rank") finds its number in the
environment. Started alone, there is no process group and every function here is a no-op, so no other file
asks "are we distributed?". Flags and objects travel on the CPU (gloo) even when tensors travel between GPUs
(NCCL): a stop signal or a decision of rank 0 costs no GPU synchronisation.
"""

import os
import sys
import warnings
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from config import UserError

DIST_TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 evaluates, or writes a large checkpoint


def setup(device="auto"):
    """Join torchrun's process group, if there is one. `device`: auto, cpu or cuda -> a torch.device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if shared_store and restarts and os.environ.get("RANK", "0") == "0":
        print("note: torchrun's --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/faults.md)",
              file=sys.stderr)  # fmt: skip
    if device == "cuda" and not gpus:
        raise UserError("speed.device is cuda, but PyTorch sees no GPU: take cpu, or a CUDA build")
    device = torch.device("cuda", local_rank) if gpus and device != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= gpus:
            remedy = f"take --nproc_per_node {gpus}"
            raise UserError(f"process {local_rank} has no GPU, there are {gpus}: {remedy}")
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=DIST_TIMEOUT)
    return device


def rank():
    """Number of this process, 0 to world_size() - 1; 0 writes the files and speaks to the user."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, op="sum"):
    """Sum (or "max") over all ranks, in place; returns the tensor. No gradient flows through it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor


def shard(model, device, dtype=torch.float32):
    """Give each rank 1 / world_size() of every tensor of a meta model (FSDP2, "ZeRO-3"), memory on `device`.

    A block's weights are gathered when it is called, in `dtype`, and freed again; gradients are averaged in
    fp32 on the way back to their owners. The model keeps its parameter names and knows nothing of this. Its
    values are not set: see `copy_to_sharded`.
    """
    if not dist.is_initialized():
        return model.to_empty(device=device)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*model.backbone.blocks, *model.children()):
        # Dropped after the forward pass too: a teacher has no backward pass that would do it.
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing writes into them
    return model.to_empty(device=device)


def compile_blocks(blocks, device, compile="auto"):
    """torch.compile, block by block; `compile`: on, off, or auto: on a GPU. Call it before `shard`.

    All blocks share two graphs, one of the teacher and one of the student. Only `forward` is compiled: FSDP's
    hooks around a block stay outside, so no graph breaks.
    """
    if compile == "off" or (compile == "auto" and device.type != "cuda"):
        return
    # Each drop path rate has a graph of its own: the default limit of 8 is soon met.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def apply_activation_checkpointing(blocks, mode="off"):
    """Trade time for memory, block by block; call it before `compile_blocks` and `shard`.

    mode: "full" keeps only a block's input and computes the rest again in the backward pass (a third more
    work); "selective" also keeps what is expensive to compute again, attention and the matrix products.
    """
    if mode == "off":
        return
    aten = torch.ops.aten
    saved_ops = {
        aten.mm.default,
        aten.addmm.default,
        torch.ops.nanodino.attention_forward.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved_ops else CheckpointPolicy.PREFER_RECOMPUTE

    options = dict(use_reentrant=False)
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def copy_to_sharded(parameter, value):
    """Copy a full tensor into a parameter; into a sharded one, this rank's part of it (no communication)."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def to_local(tensor):
    """This rank's part of a sharded tensor, in place; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor):
    """A sharded tensor in full, on every rank: all of them must call. A plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_reduce_ints(*numbers):
    """Each number (or flag) summed over all ranks -> ints. Between the hosts, without the GPUs."""
    return all_reduce(torch.tensor([int(n) for n in numbers])).tolist()


def broadcast_object(value):
    """Rank 0's `value` on every rank: a path, a sentence, None. Pickled between our own processes only."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def cleanup():
    """Leave the process group, so that the processes may end at different moments."""
    if dist.is_initialized():
        dist.destroy_process_group()
