"""Ten steps of tiny models by as many processes as torchrun starts; test_parallel.py compares the weights.

torchrun --nproc_per_node 3 tests/divided_steps.py OUT.pt
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import TINY, tokens_of

from common import IGNORE
from lora import LoRAConfig, adapt
from model import Llama, ModelConfig
from parallel import divided, first_alone, processes, rank, whole
from train import TrainConfig, learning_rate, make_optimizers, train_step

GROUPS = {"k_groups": [[0, 1, 1, 1], [0, 0, 1, 2]], "v_groups": [[0, 0, 0, 0], [0, 1, 1, 0]]}
# rank of the adapter, optimizer, dtype, activation checkpointing
ADAPTED = (4, "adamw", torch.float64, True)
VARIANTS = [(0, "adamw", torch.float64, False), ADAPTED, (0, "muon", torch.float32, False)]


def batches(step: int) -> list:
    """Micro-batches of 7 rows and 1, with very different numbers of targets."""
    x, y = (tokens_of((8, 16), 2 * (step % 2) + i) for i in range(2))
    for row in range(8):
        y[row, : 2 * row] = IGNORE
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def steps(r: int, optimizer: str, dtype: torch.dtype, recompute: bool, fsdp: bool) -> dict:
    """The state dict after ten steps, and the losses; whole in the first process."""
    torch.manual_seed(0)
    model = adapt(Llama(ModelConfig(**TINY, **GROUPS, novel=True)), LoRAConfig(lora_r=r)).to(dtype).train()
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(std=0.02)  # at 0 the first step would leave lora_A as it is
    model.checkpoint_activations = recompute
    config = TrainConfig(optimizer=optimizer, lr=0.01, max_steps=10, warmup_steps=3)
    learner, scaler = divided(model, fsdp, dtype, torch.device("cpu")), torch.amp.GradScaler(enabled=False)
    optimizers, losses = make_optimizers(model, config), []
    for step in range(config.max_steps):
        lr = learning_rate(config, step)
        losses.append(train_step(learner, batches(step), optimizers, lr, dtype, scaler)[0])
    return {**whole(model.state_dict(keep_vars=True)), "losses": torch.tensor(losses, dtype=torch.float64)}


@processes()
def main() -> None:
    torch.set_num_threads(1)
    mark = Path(sys.argv[1] + ".mark")
    with first_alone():
        time.sleep(0 if rank() else 0.5)
        assert rank() == 0 or mark.exists(), "the others did not wait for the first"
        mark.touch()
    found = [[steps(*variant, fsdp) for variant in VARIANTS] for fsdp in (False, True)]
    if rank() == 0:
        torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
