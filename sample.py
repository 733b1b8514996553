"""Write text with a checkpoint, as it comes; with --compile, each token by one compiled graph.

python sample.py out/RUN/ckpt.pt --prompt "def main(" --max_new_tokens 100
python sample.py out/RUN/ckpt.pt --temperature 0               # greedy: always the likeliest token
python sample.py tuned.pt --instruction "Name three animals."  # a prompt as instruction data have it
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from checkpoint import build, load
from common import bounded, compiler_missing, exit_cleanly, parse, pick_device, require
from data.tokenizer import Tokenizer, prompt_text
from model import ATTENTION, Attention, HeadGroups, Llama, widen


@dataclass
class SampleConfig:
    """sampling"""

    ckpt: str  # the checkpoint
    prompt: str = ""  # text to continue
    instruction: str = ""  # a task to answer instead, for a model that was tuned on instructions
    input: str = ""  # what the task is about
    max_new_tokens: int = bounded(200, 1)  # tokens to write at most; the model's context may end it sooner
    temperature: float = bounded(0.8, 0, 1e9)  # 0 is greedy, 1 the model's own distribution
    top_p: float = bounded(0.95, 1e-9, 1)  # draw from the fewest likeliest tokens that reach this probability
    num_samples: int = bounded(1, 1)  # texts to write
    seed: int = bounded(0, 0, 2**63 - 1)  # of the first text; the next has seed + 1
    kv_bits: int | None = bounded(None, 4, 16)  # KV cache in integers of 8 or 4 bits; 16: floats
    compile: bool = False  # compile the step of a token: half a minute, then several times as fast
    device: str = "auto"  # cuda, mps, cpu or auto


def readable(ids: list[int], new_tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of the new tokens, piece by piece, holding back a character until all of its bytes are there.
    `ids` begins as the prompt's and grows. Byte tokens (<0xC3>) wait for the end of their run: an invalid one
    changes how all of them decode."""
    shown = len(tokenizer.decode(ids))
    for token in new_tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd") and not tokenizer.pieces.get(token, "").startswith("<0x"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


class RowLinear(nn.Linear):
    """x W^T; one row as a loop over W, which torch.compile fuses with its neighbours, in float32 or wider."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > x.shape[-1]:
            return super().forward(x)
        return (self.weight * widen(x).flatten()).sum(-1).expand(*x.shape[:-1], -1)


def one_query(q, k, v, k_groups: HeadGroups, v_groups: HeadGroups, mask: torch.Tensor | None) -> torch.Tensor:
    """`model.naive` for T = 1, in sums that torch.compile makes loops over the cache, in float32 or wider."""
    rows = k_groups.gather(widen(q) * q.shape[-1] ** -0.5)  # (B, G_k, heads of a group, D)
    raw = k_groups.scatter((rows[:, :, :, None] * k[:, :, None]).sum(-1))  # (B, H, 1, S)
    raw = raw if mask is None else raw.masked_fill(~mask, -torch.inf)
    weights = v_groups.gather(raw.softmax(-1))
    return v_groups.scatter((weights[..., None] * v[:, :, None]).sum(-2)).type_as(v)


def compile_step(model: Llama) -> None:
    """Compile the step that adds one token to each text. The first such step takes tens of seconds, all
    others a fraction of the time. A small model's time goes into calling kernels from Python, so a twin that
    shares the weights, but computes products and attention as loops over one row, becomes one graph. Weights
    may still change in place, but not their dtype, nor the layers. Raises UserError without a compiler."""
    missing = compiler_missing(model.tok_embeddings.weight.device)
    require(not missing, f"--compile needs {missing}: install it, or drop --compile")
    model.compiled_step = None  # not copied
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=shared).eval()
    for module in twin.modules():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = RowLinear
        if isinstance(module, Attention) and module.attend in ATTENTION.values():
            module.attend = one_query
    options = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe, "size_asserts": False,
        "cpp.enable_floating_point_contract_flag": "fast",  # w * x + sum in one operation
    }  # fmt: skip
    how = {"dynamic": True, "fullgraph": True, "options": options, "isolate_recompiles": True}
    model.compiled_step = torch.compile(twin.forward, **how)


def main() -> None:
    config = SampleConfig(**parse(__doc__, SampleConfig))
    task = {"instruction": config.instruction, "input": config.input}
    require(not (config.prompt and any(task.values())), "--prompt is a text, --instruction a task: give one")
    device = pick_device(config.device)
    model, tokenizer = build(load(config.ckpt), device, config.kv_bits)
    prompt = tokenizer.prompt(prompt_text(task) if any(task.values()) else config.prompt)
    if config.compile:
        compile_step(model)
    how = {"temperature": config.temperature, "top_p": config.top_p, "stop": tokenizer.stop}
    for number in range(config.num_samples):
        generator = torch.Generator(device).manual_seed(config.seed + number)
        steps = model.stream([prompt], config.max_new_tokens, **how, generator=generator)
        if config.num_samples > 1:
            print(f"--- sample {number + 1}, seed {config.seed + number}")
        ids = list(prompt)
        pieces = readable(ids, (row[0] for row in steps), tokenizer)
        print(config.prompt + next(pieces), end="", flush=True)  # an error may come before the first token
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        if len(ids) == model.config.block_size < len(prompt) + config.max_new_tokens:
            print(f"(the context of {len(ids)} tokens is full)", file=sys.stderr)


if __name__ == "__main__":
    exit_cleanly(main)
