"""Write text with a checkpoint, as it comes.

python sample.py out/RUN/ckpt.pt --prompt "def main(" --max_new_tokens 100
python sample.py out/RUN/ckpt.pt --temperature 0               # greedy: always the likeliest token
python sample.py tuned.pt --instruction "Name three animals."  # a prompt as instruction data have it
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from checkpoint import build, load
from common import UserError, bounded, compiler_missing, exit_cleanly, parse, pick_device
from data.tokenizer import Tokenizer, prompt_text


@dataclass
class SampleConfig:
    """sampling"""

    ckpt: str  # the checkpoint
    prompt: str = ""  # text to continue
    instruction: str = ""  # a task to answer instead, for a model that was tuned on instructions
    input: str = ""  # what the task is about
    max_new_tokens: int = bounded(200, 1)  # tokens to write at most; the model's context may end it sooner
    temperature: float = bounded(0.8, 0, 1e9)  # 0 is greedy, 1 the model's own distribution
    top_p: float = bounded(0.95, 1e-9, 1)  # draw from the likeliest tokens of this probability together
    num_samples: int = bounded(1, 1)  # texts to write
    seed: int = bounded(0, 0, 2**63 - 1)  # of the first text; the next has seed + 1
    kv_bits: int | None = bounded(None, 4, 16)  # KV cache in integers of 8 or 4 bits, or in floats (16)
    compile: bool = False  # compile the step of a token: half a minute at first, then several times the speed
    device: str = "auto"  # cuda, mps, cpu or auto


def readable(ids: list[int], new_tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of the new tokens, piece by piece, holding back a character until all of its bytes are there.
    `ids` begins as the prompt's and grows. A run of byte tokens, <0xC3>, waits: one may spoil all."""
    shown = len(tokenizer.decode(ids))
    for token in new_tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd") and not tokenizer.pieces.get(token, "").startswith("<0x"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


def main() -> None:
    config = SampleConfig(**parse(__doc__, SampleConfig))
    if config.prompt and (config.instruction or config.input):
        raise UserError("--prompt is text to continue, --instruction a task to answer: give one of them")
    device = pick_device(config.device)
    model, tokenizer = build(load(config.ckpt), device, config.kv_bits)
    text = config.prompt
    if config.instruction or config.input:
        text = prompt_text({"instruction": config.instruction, "input": config.input})
    prompt = tokenizer.prompt(text)
    if config.compile:
        if missing := compiler_missing(device):
            raise UserError(f"--compile needs {missing}: install it, or drop --compile")
        model.compile_step()
    for number in range(config.num_samples):
        generator = torch.Generator(device).manual_seed(config.seed + number)
        steps = model.stream(
            [prompt], config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            stop=tokenizer.stop, generator=generator,
        )  # fmt: skip
        if config.num_samples > 1:
            print(f"--- sample {number + 1}, seed {config.seed + number}")
        pieces = readable(ids := list(prompt), (row[0] for row in steps), tokenizer)
        print(config.prompt + next(pieces), end="", flush=True)  # an error may come before the first token
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        if len(ids) == model.config.block_size < len(prompt) + config.max_new_tokens:
            print(f"(stopped: the model's context of {len(ids)} tokens is full)", file=sys.stderr)


if __name__ == "__main__":
    exit_cleanly(main)
