"""Several processes at one task, each on a GPU or on a share of a CPU: what `torchrun` starts, on one machine or many.

    torchrun --nproc_per_node 4 train.py --n_layer 6                 # the whole model in every process (DDP)
    torchrun --nproc_per_node 4 train.py --n_layer 6 --fsdp          # a fourth of the weights in each (FSDP2)
    torchrun --nproc_per_node 4 eval_ppl.py ckpt.pt

All run the same program in the same folder, and differ in two things alone: in the rows, windows or groupings that they
compute, and in that the first prints and writes files. A step is divided, not multiplied: its rows are those of one
process, so a run does the same whatever their number, but for rounding and dropout, and may be resumed by another.

DDP (arXiv 2006.15704) adds up the gradients while the backward still runs. FSDP2 (arXiv 2304.11277, then torch's
`fully_shard`) collects the matrices of a block just before it computes, forgets them after, and leaves to each process
the gradients and the optimizer's state of its own share.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from config import UserError
from cross_entropy import IGNORE
from dataset import Batch


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def processes() -> Iterator[None]:
    """Be one of those that torchrun started, if it did; all but the first are silent. A decorator of `main`."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # else see pick_device
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the others wait while the first downloads and prepares data
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(hours=2))
    if rank():
        sys.stdout = open(os.devnull, "w", errors="replace")  # noqa: SIM115
    yield
    dist.destroy_process_group()  # not after an error: it might wait for the others


def add_up(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all processes, in its place, with the same bits in each; they wait for each other."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def total(*numbers: float) -> list[float]:
    """The sum of each number over all processes."""
    return add_up(torch.tensor(numbers, dtype=torch.float64)).tolist()


def wait_for_all() -> None:
    total(0)


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block while the others wait; then they do."""
    if rank():
        wait_for_all()
    yield
    if not rank():
        wait_for_all()


def note(text: str) -> None:
    """One line on stderr, from the first process."""
    if rank() == 0:
        print(f"note: {text}", file=sys.stderr)


def in_turn(count: int) -> Iterator[tuple[int, bool]]:
    """Which of `count` things this process computes, and whether it keeps the result. All have equally many, for those
    that share a model compute together, or wait for ever; so some repeat the last."""
    for i in range(rank(), world() * math.ceil(count / world()), world()):
        yield min(i, count - 1), i < count


def gathered(mine: dict) -> dict:
    """What all processes put in."""
    parts = [mine] * world()
    if world() > 1:
        dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def share(batch: Batch) -> Batch:
    """This process's rows of a micro-batch; if there are none, a row without targets."""
    x, y = (part[rank() :: world()] for part in batch)
    return (x, y) if len(x) else (batch[0][:1], torch.full_like(batch[1][:1], IGNORE))


# ---- one model in several processes ----


def divided(model: nn.Module, fsdp: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """What to call instead of `model` so that gradients become the mean over the processes. The names in the state dict
    of `model` stay.

    With `fsdp` a model on the CPU is moved to `device` share by share; its blocks' weights are collected in `dtype`,
    which halves what is sent if it is bfloat16, and rounds norms and adapters, too; embeddings, output and gradients
    stay as they are. Raises UserError for float16.
    """
    if fsdp and dtype == torch.float16:
        raise UserError("--fsdp has no gradient scaler: give --dtype bfloat16 or float32, or drop --fsdp")
    if fsdp:
        mesh = init_device_mesh(device.type, (world(),))
        half = dtype if dtype == torch.bfloat16 else None
        policy = MixedPrecisionPolicy(half, reduce_dtype=half and torch.float32, cast_forward_inputs=False)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh)
    # no step changes a buffer: they are the codes of 4-bit matrices, and which head reads which group
    return DistributedDataParallel(model, forward_sync_buffers=False) if world() > 1 else model


def send_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward sends its gradients: not before the last micro-batch of a step. Until then those of a
    shared model stand whole in each process."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def whole(state, seen: dict | None = None):
    """A state dict, with every sharded tensor gathered on the CPU of the first process; all processes must call it.
    A tensor that stands under two names stays one."""
    seen = {} if seen is None else seen
    if isinstance(state, DTensor):
        if id(state) not in seen:
            full = state.detach().full_tensor()
            seen[id(state)] = full.cpu() if rank() == 0 else None
        return seen[id(state)]
    if isinstance(state, dict):
        return {key: whole(value, seen) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, seen) for value in state)
    return state.detach() if isinstance(state, torch.Tensor) else state


def shared(moments: dict, params: list[nn.Parameter]) -> dict:
    """An optimizer's saved moments {number of a parameter: {name: tensor}}, of which this process keeps its share where
    the parameters are shared."""

    def part(x: torch.Tensor, p: nn.Parameter) -> torch.Tensor:
        if not isinstance(p, DTensor) or x.shape != p.shape:
            return x
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

    return {i: {name: part(x, params[i]) for name, x in of_one.items()} for i, of_one in moments.items()}
