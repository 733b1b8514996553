"""Several processes for one training run, each on a GPU or on a share of a CPU: what `torchrun` starts.

    torchrun --nproc_per_node 4 train.py --n_layer 6                 # the whole model in every process (DDP)
    torchrun --nproc_per_node 4 train.py --n_layer 6 --fsdp          # a fourth of the weights in each (FSDP2)

All run the same program in the same folder; rank 0 prints and saves. The batch size is global: its rows are
split, so the number of processes changes the result only by rounding and dropout, and a run may be resumed
with another.

DDP (arXiv 2006.15704) averages the gradients over all processes while the backward still runs. FSDP2 (arXiv
2304.11277) collects the matrices of a block just before it computes, frees them after, and leaves each rank
gradients and optimizer state of its own shard. Without torchrun all this does nothing.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

from common import IGNORE, require


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; all but rank 0 are silent."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    gpu_each = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # else see pick_device
    if gpu_each:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # others wait while rank 0 prepares data
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu_each else "gloo", timeout=timedelta(hours=2))
    if rank():
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115
    try:
        yield
    finally:
        # gloo's threads drop tensors late, and abort if Python is gone (pytorch#179291)
        time.sleep(0.1)
    dist.destroy_process_group()  # not after an error: it might wait for others


def sum_over_ranks(number: float) -> float:
    """The sum of a number over all processes, with the same bits in each; they wait for each other."""
    if world() == 1:
        return number
    x = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(x)
    return x.item()


@contextmanager
def first_alone() -> Iterator[None]:
    """Rank 0 runs the block first, then the others."""
    if rank():
        sum_over_ranks(0)
    yield
    if not rank():
        sum_over_ranks(0)


def own_rows(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of a micro-batch, inputs and targets (B, T), or else a row without targets."""
    if rank() >= len(x):
        return x[:1], torch.full_like(y[:1], IGNORE)
    return x[rank() :: world()], y[rank() :: world()]


def divided(model: nn.Module, fsdp: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """What to call instead of `model` so that gradients become the mean over the processes; the names in its
    state dict stay.

    With `fsdp` a model on the CPU is moved to `device` shard by shard; its blocks' weights are collected in
    bfloat16 if that is `dtype`, which halves the traffic and rounds norms and adapters, too; embeddings,
    output and gradients keep their format. Raises UserError for float16.
    """
    if fsdp:
        require(dtype != torch.float16, "--fsdp has no gradient scaler: give --dtype bfloat16 or float32")
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = dist.init_device_mesh(device.type, (world(),))
        half = dtype if dtype == torch.bfloat16 else None
        policy = MixedPrecisionPolicy(half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh)
    if world() == 1:
        return model
    # no step changes a buffer: 4-bit codes, which head reads which group. DDP's first backward lays gradients
    # out in another order than later ones, and a sum of three depends on the place
    return nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)


def send_gradients(model: nn.Module, now: bool) -> None:
    """Set whether the next backward adds up gradients over ranks: only a step's last micro-batch does."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2's, which keeps unsharded gradients until then
        model.set_requires_gradient_sync(now)
    elif world() > 1:
        model.require_backward_grad_sync = now


def whole(state, seen: dict | None = None):
    """A state dict, its sharded tensors gathered on the CPU of rank 0; all processes must call it. A tensor
    that stands under two names stays one."""
    seen = {} if seen is None else seen
    if hasattr(state, "full_tensor"):  # a DTensor
        if id(state) not in seen:
            full = state.detach().full_tensor()
            seen[id(state)] = full.cpu() if rank() == 0 else None
        return seen[id(state)]
    if isinstance(state, dict):
        return {key: whole(value, seen) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value, seen) for value in state)
    return state.detach() if isinstance(state, torch.Tensor) else state


def shard(x: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
    """This rank's shard of x, which each rank has whole; x itself, if its parameter is not sharded."""
    if not hasattr(like, "full_tensor") or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
