"""Twenty training steps of tiny models, by as many processes as torchrun starts; test_parallel.py compares the weights.

torchrun --nproc_per_node 2 tests/divided_steps.py OUT.pt
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from cross_entropy import IGNORE
from lora import LoRAConfig, adapt
from model import Llama, ModelConfig
from parallel import divided, first_alone, processes, rank, whole, world
from settings import TrainConfig
from train import forward_backward, learning_rate, make_optimizers, update

SHAPE = {"n_layer": 2, "n_head": 4, "dim": 32, "hidden_dim": 48, "vocab_size": 64, "block_size": 32, "novel": True}
GROUPS = {"k_groups": [[0, 1, 1, 1], [0, 0, 1, 2]], "v_groups": [[0, 0, 0, 0], [0, 1, 1, 0]]}
# adapter, optimizer, dtype, activation checkpointing
VARIANTS = [
    (0, "adamw", torch.float64, False),
    (4, "adamw", torch.float64, True),
    (0, "muon", torch.float32, False),
]


def batches(step: int) -> list:
    """Two micro-batches of 5 and 3 rows with very different numbers of targets: no number of processes divides them."""
    generator = torch.Generator().manual_seed(step % 2)
    x, y = (torch.randint(64, (8, 16), generator=generator) for _ in "xy")
    for row in range(8):
        y[row, : 2 * row] = IGNORE
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def steps(r: int, optimizer: str, dtype: torch.dtype, recompute: bool, fsdp: bool) -> dict:
    """The state dict after 20 steps, and the losses; whole in the first process."""
    torch.manual_seed(0)
    model = adapt(Llama(ModelConfig(**SHAPE, **GROUPS)), LoRAConfig(lora_r=r)).to(dtype).train()
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(std=0.02)  # at 0 the first step would leave lora_A alone
    model.checkpoint_activations = recompute
    config = TrainConfig(optimizer=optimizer, lr=0.01, max_steps=20, warmup_steps=5)
    learner = divided(model, fsdp, dtype, torch.device("cpu"))
    optimizers, losses = make_optimizers(model, config), []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(config.max_steps):
        losses.append(forward_backward(learner, batches(step), dtype, scaler))
        update(model, optimizers, scaler, config, learning_rate(config, step))
    return {**whole(model.state_dict(keep_vars=True)), "losses": torch.tensor(losses, dtype=torch.float64)}


@processes()
def main() -> None:
    torch.set_num_threads(1)
    mark = Path(sys.argv[1] + ".mark")
    with first_alone():
        time.sleep(0 if rank() else 0.5)
        assert rank() == 0 or mark.exists(), "the others did not wait for the first"
        mark.touch()
    few = VARIANTS if world() <= 2 else VARIANTS[:2]  # Muon on four shares of such small matrices takes its time
    found = [[steps(*variant, fsdp) for variant in few] for fsdp in ((False, True) if world() > 1 else (False,))]
    if rank() == 0:
        torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
