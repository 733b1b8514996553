"""For developers: how fast this project and others train, evaluate and write at one shape, on a CPU. Each row is a
process of its own; all rows take turns, and the table holds the medians of the rounds.

    python tests/compare_speed.py speed.jsonl --n_layer 6 --dim 288 --n_head 6 --hidden_dim 768 \\
        --llama2c llama2.c/model.py --nanogpt nanoGPT/model.py --run_c llama2.c/run --gguf model.gguf

transformers is always measured; the others are files of their projects, and are left out unless named: model.py of
llama2.c and of nanoGPT, llama2.c's program (gcc -Ofast -fopenmp -march=native run.c -lm -o run), and a model of this
shape for llama.cpp (an exported run, converted by its convert_hf_to_gguf.py; needs pip install llama-cpp-python).

Training: AdamW, bfloat16, on random tokens. Text: greedy, from one token to the end of the context. A second call with
the same file goes on where the first was interrupted.
"""

import importlib.util
import json
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import BenchConfig
from bench_attention import alone
from bench_speed import generate_speed, timed, train_speed
from config import UserError, exit_cleanly, parse, pick
from device import peak_memory_bytes
from model import Llama, ModelConfig

COLUMNS = {
    "train_tok_s": "training, tokens/s", "eval_tok_s": "evaluation, tokens/s", "first_step_s": "first step, s",
    "peak_gb": "peak memory, GiB", "tok_s": "text, tokens/s",
}  # fmt: skip


@dataclass
class CompareConfig:
    """comparison"""

    out: str  # the JSONL of what was measured, a line a row and round
    llama2c: str | None = None  # llama2.c's model.py
    nanogpt: str | None = None  # nanoGPT's model.py
    run_c: str | None = None  # llama2.c's program, compiled
    gguf: str | None = None  # a model of this shape for llama.cpp
    rounds: int = 5  # processes of each row
    steps: int = 5  # timed steps of a process; two more come before them
    batch_size: int = 16  # sequences of a training step


def source(path: str):
    """The module of a file anywhere."""
    spec = importlib.util.spec_from_file_location("its_model", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hf_llama(c: ModelConfig):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": c.dim, "intermediate_size": c.hidden_dim, "num_hidden_layers": c.n_layer}
    heads = {"num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "vocab_size": c.vocab_size}
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
    room = {"max_position_embeddings": 2 * c.block_size, "tie_word_embeddings": c.tie_embeddings}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, **room))


def other(peer: str, c: ModelConfig, path: str | None) -> tuple[torch.nn.Module, Callable]:
    """The model and loss(model, x, y)."""
    torch.manual_seed(0)
    if peer == "transformers":
        return hf_llama(c), lambda m, x, y: F.cross_entropy(
            m(input_ids=x, use_cache=False).logits.flatten(0, 1).float(), y.flatten()
        )
    module = source(path)
    if peer == "nanoGPT":
        sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.dim, "vocab_size": c.vocab_size}
        model = module.GPT(module.GPTConfig(block_size=c.block_size, bias=False, **sizes))
        return model, lambda m, x, y: m(x, y)[1]
    sizes = {"n_layers": c.n_layer, "n_heads": c.n_head, "n_kv_heads": c.n_kv_head, "dim": c.dim}
    sizes |= {"hidden_dim": c.hidden_dim, "vocab_size": c.vocab_size, "max_seq_len": c.block_size}

    def loss(m, x, y):
        m(x, y)
        return m.last_loss

    return module.Transformer(module.ModelArgs(**sizes)), loss


def train_other(peer: str, path: str | None, compiled: bool, c: ModelConfig, config: CompareConfig) -> dict:
    """What `train_speed` says of ours, of another's model."""
    model, loss = other(peer, c, path)
    run = torch.compile(model) if compiled else model
    generator, tokens = torch.Generator().manual_seed(0), config.batch_size * c.block_size
    if hasattr(model, "configure_optimizers"):
        optimizer = model.configure_optimizers(0.1, 5e-4, (0.9, 0.95), "cpu")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randint(c.vocab_size, (config.batch_size, c.block_size + 1), generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(run, *batch())
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss(run, *batch()).item()

    seconds = [timed(step) for _ in range(config.steps + 2)]
    peak = peak_memory_bytes(torch.device("cpu")) / 2**30
    model.eval()
    evaluation = statistics.median([timed(evaluate) for _ in range(config.steps + 2)][2:])
    rates = {"train_tok_s": tokens / statistics.median(seconds[2:]), "eval_tok_s": tokens / evaluation}
    return {**rates, "first_step_s": seconds[0], "peak_gb": peak}


def generate_hf(texts: int, c: ModelConfig) -> dict:
    torch.manual_seed(0)
    model, new = hf_llama(c).eval().to(torch.bfloat16), c.block_size - 1
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    prompt = torch.ones(texts, 1, dtype=torch.long)
    with torch.no_grad():
        seconds = [timed(lambda: model.generate(prompt, **how)) for _ in range(4)]
    return {"tok_s": texts * new / statistics.median(seconds[1:])}


def generate_run_c(program: str, c: ModelConfig) -> dict:
    """Of random weights in llama2.c's legacy format, and a vocabulary of any words; the program counts itself."""
    torch.manual_seed(0)
    weights = Llama(c).state_dict()
    weights["tok_embeddings.weight"][1] = 0  # it ends at BOS, which is never the likeliest now
    names = ["attention_norm", *(f"attention.w{x}" for x in "qkvo"), "ffn_norm", *(f"feed_forward.w{i}" for i in "123")]
    stacks = [weights[f"layers.{layer}.{name}.weight"] for name in names for layer in range(c.n_layer)]
    angles = torch.zeros(2, c.block_size, c.head_dim // 2)
    tensors = [weights["tok_embeddings.weight"], *stacks, weights["norm.weight"], angles]
    with tempfile.TemporaryDirectory() as folder:
        model, words = Path(folder) / "model.bin", Path(folder) / "tok.bin"
        sizes = (c.dim, c.hidden_dim, c.n_layer, c.n_head, c.n_kv_head, c.vocab_size, c.block_size)
        model.write_bytes(struct.pack("<7i", *sizes) + b"".join(x.numpy().tobytes() for x in tensors))
        pieces = [f"w{i}".encode() for i in range(c.vocab_size)]
        words.write_bytes(struct.pack("<i", 8) + b"".join(struct.pack("<fi", 0, len(p)) + p for p in pieces))
        command = [program, str(model), "-z", str(words), "-t", "0", "-n", str(c.block_size)]
        said = [subprocess.run(command, capture_output=True, text=True, check=True).stderr for _ in range(3)]
    return {"tok_s": statistics.median(float(re.search(r"tok/s: ([\d.]+)", text)[1]) for text in said)}


def generate_gguf(path: str, c: ModelConfig) -> dict:
    from llama_cpp import Llama as LlamaCpp

    model = LlamaCpp(path, n_ctx=c.block_size, n_threads=torch.get_num_threads(), verbose=False)

    def write() -> None:
        model.reset()
        for count, _ in enumerate(model.generate([1], temp=0.0, repeat_penalty=1.0), 1):
            if count == c.block_size - 1:
                return

    return {"tok_s": (c.block_size - 1) / statistics.median([timed(write) for _ in range(4)][1:])}


def rows(c: ModelConfig, config: CompareConfig) -> dict[str, tuple]:
    """{label: (function, arguments)}"""
    ours = BenchConfig("train", batch_size=config.batch_size, steps=config.steps, dtype="bfloat16", device="cpu")
    peers = {"llama2.c": config.llama2c, "nanoGPT": config.nanogpt, "transformers": ""}
    found: dict[str, tuple] = {}
    for compiled, how in ((True, "compiled"), (False, "eager")):
        found[f"herd, {how}"] = (train_speed, c, replace(ours, compile=compiled))
        for peer, path in peers.items():
            if path is not None:
                found[f"{peer}, {how}"] = (train_other, peer, path, compiled, c, config)
    for texts in (1, 16):
        found[f"herd, compiled, texts: {texts}"] = (generate_speed, c, replace(ours, action="generate", batch=texts))
        found[f"transformers, eager, texts: {texts}"] = (generate_hf, texts, c)
    if config.run_c:
        found["llama2.c's C program, float32, texts: 1"] = (generate_run_c, config.run_c, c)
    if config.gguf:
        found["llama.cpp, texts: 1"] = (generate_gguf, config.gguf, c)
    return found


def main() -> None:
    values = parse(__doc__, CompareConfig, ModelConfig)
    c, config = ModelConfig(**pick(ModelConfig, values)), CompareConfig(**pick(CompareConfig, values))
    if min(config.rounds, config.steps, config.batch_size) < 1:
        raise UserError("give --rounds, --steps and --batch_size 1 or more")
    out = Path(config.out)
    lines = out.read_text().splitlines() if out.exists() else []
    known: dict[str, list[dict]] = {name: [] for name in rows(c, config)}
    for record in map(json.loads, lines):
        known.setdefault(record["row"], []).append(record)
    for turn in range(config.rounds):
        for name, work in rows(c, config).items():
            if len(known[name]) > turn:
                continue
            began = time.time()
            record = {"row": name, "round": turn, **alone(name, *work)}
            known[name].append(record)
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            shown = ", ".join(f"{label} {record[key]:,.2f}" for key, label in COLUMNS.items() if key in record)
            print(f"round {turn + 1}, {time.time() - began:.0f} s | {name} | {shown}", flush=True)
    print("| medians of the rounds | " + " | ".join(COLUMNS.values()) + " |\n| --- |" + " --- |" * len(COLUMNS))
    for name, found in known.items():
        cells = [f"{statistics.median(r[k] for r in found):,.4g}" if k in found[0] else "" for k in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    exit_cleanly(main)
