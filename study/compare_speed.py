"""How fast herd and other implementations train, evaluate and write at one shape, on a CPU.

    python -m study compare-speed speed.jsonl --n_layer 6 --dim 288 --n_head 6 --hidden_dim 768 \\
        --llama2c llama2.c/model.py --nanogpt nanoGPT/model.py --run_c llama2.c/run --gguf model.gguf
    python -m study time-to-loss llama2.c llama2.c/model.py --out_dir out/llama2c --n_layer 6 --dim 288 \\
        --n_head 6 --hidden_dim 768 --optimizer adamw --compile --max_steps 330 --eval_every 25

transformers is always measured; the others are left out unless named: model.py of llama2.c and of nanoGPT,
llama2.c's program (gcc -Ofast -fopenmp -march=native run.c -lm -o run), and a model of this shape for
llama.cpp (an exported run, converted by its convert_hf_to_gguf.py; needs pip install llama-cpp-python).
Training is compiled, AdamW, bfloat16, on random tokens; text is greedy, from one token to the end of the
context. Each row is a process of its own; rows take turns, and the table has the medians of the rounds.

time-to-loss is train.py with another project's model (transformers takes - in place of a file), whose
log.jsonl is for `python -m study plot loss --against seconds`. Its ckpt.pt is of no use.
"""

import importlib.util
import json
import re
import statistics
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import train
from common import IGNORE, UserError, bounded
from model import Llama, ModelConfig
from study.bench import BenchConfig, WriteConfig, alone, configs, in_turns, table, train_speed, write_rows

COLUMNS = {"train_tok_s": "training, tokens/s", "eval_tok_s": "evaluation, tokens/s"}
COLUMNS |= {"peak_gb": "peak memory, GiB", "tok_s": "text, tokens/s"}


@dataclass
class SpeedConfig:
    """comparison"""

    out: str  # the JSONL of what was measured, a line a row and round
    llama2c: str | None = None  # llama2.c's model.py
    nanogpt: str | None = None  # nanoGPT's model.py
    run_c: str | None = None  # llama2.c's program, compiled
    gguf: str | None = None  # a model of this shape for llama.cpp
    rounds: int = bounded(5, 1)  # processes of each row
    steps: int = bounded(5, 1)  # timed steps of a process; two more come before them
    batch_size: int = bounded(16, 1)  # sequences of a training step


class Peer(nn.Module):
    """Another project's model of this shape, with herd's interface: model(x, y) is the summed loss, nats."""

    def __init__(self, name: str, path: str, c: ModelConfig):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.config = name, c
        if name == "transformers":
            from transformers import LlamaConfig, LlamaForCausalLM

            shape = {"hidden_size": c.dim, "intermediate_size": c.hidden_dim, "vocab_size": c.vocab_size}
            shape |= {"num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head}
            shape |= {"num_key_value_heads": c.n_kv_head, "max_position_embeddings": 2 * c.block_size}
            shape |= {"bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": c.tie_embeddings}
            self.model = LlamaForCausalLM(LlamaConfig(**shape))
            return
        spec = importlib.util.spec_from_file_location("its_model", path)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if name == "nanoGPT":
            shape = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.dim, "vocab_size": c.vocab_size}
            self.model = module.GPT(module.GPTConfig(block_size=c.block_size, bias=False, **shape))
        else:
            shape = {"n_layers": c.n_layer, "n_heads": c.n_head, "n_kv_heads": c.n_kv_head, "dim": c.dim}
            shape |= {"hidden_dim": c.hidden_dim, "vocab_size": c.vocab_size, "max_seq_len": c.block_size}
            self.model = module.Transformer(module.ModelArgs(**shape))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.name == "transformers":
            logits = self.model(input_ids=x, use_cache=False).logits.flatten(0, 1).float()
            return F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE, reduction="sum")
        out = self.model(x, y)
        mean = out[1] if self.name == "nanoGPT" else self.model.last_loss  # both ignore -1
        return mean * (y != IGNORE).sum()


# ---- speed ----


def learn(name: str, path: str, c: ModelConfig, config: BenchConfig) -> dict:
    return train_speed(Llama(c) if name == "herd" else Peer(name, path, c), config, "bfloat16", True)


def write_herd(c: ModelConfig, texts: int) -> dict:
    model, how = Llama(c).bfloat16().eval(), WriteConfig(batch_size=texts, compile=True)
    return {"tok_s": write_rows({"": model}, c.block_size - 1, how)[0]["tok_s"]}


def write_transformers(c: ModelConfig, texts: int) -> dict:
    model, new = Peer("transformers", "", c).model.eval().to(torch.bfloat16), c.block_size - 1
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    prompt = torch.ones(texts, 1, dtype=torch.long)
    seconds = in_turns({"": lambda: model.generate(prompt, **how)}, 3)[""]
    return {"tok_s": texts * new / statistics.median(seconds)}


def write_run_c(program: str, c: ModelConfig) -> dict:
    """Random weights in llama2.c's legacy format, a vocabulary of any words; the program times itself."""
    torch.manual_seed(0)
    weights = Llama(c).state_dict()
    weights["tok_embeddings.weight"][1] = 0  # it ends at BOS, which is never the likeliest now
    names = ["attention_norm", *(f"attention.w{x}" for x in "qkvo"), "ffn_norm"]
    names += [f"feed_forward.w{i}" for i in "123"]
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


def write_gguf(path: str, c: ModelConfig) -> dict:
    from llama_cpp import Llama as LlamaCpp

    model = LlamaCpp(path, n_ctx=c.block_size, n_threads=torch.get_num_threads(), verbose=False)

    def write() -> None:
        model.reset()
        for _ in zip(range(c.block_size - 1), model.generate([1], temp=0.0, repeat_penalty=1.0)):
            pass

    return {"tok_s": (c.block_size - 1) / statistics.median(in_turns({"": write}, 3)[""])}


def rows(c: ModelConfig, config: SpeedConfig) -> dict[str, tuple]:
    """{label: function and arguments}"""
    how = BenchConfig(config.batch_size, config.steps, "cpu")
    files = {"herd": "", "llama2.c": config.llama2c, "nanoGPT": config.nanogpt, "transformers": ""}
    files = {name: file for name, file in files.items() if file is not None}
    found = {f"{name}, compiled": (learn, name, file, c, how) for name, file in files.items()}
    for texts in (1, 16):
        found[f"herd, compiled, texts: {texts}"] = write_herd, c, texts
        found[f"transformers, eager, texts: {texts}"] = write_transformers, c, texts
    if config.run_c:
        found["llama2.c's C program, float32, texts: 1"] = write_run_c, config.run_c, c
    if config.gguf:
        found["llama.cpp, texts: 1"] = write_gguf, config.gguf, c
    return found


def main() -> None:
    config, c = configs(__doc__, SpeedConfig, ModelConfig)
    work = rows(c, config)
    found: dict[str, list[dict]] = {name: [] for name in work}
    with open(config.out, "w") as file:
        for turn in tqdm(range(config.rounds), desc="rounds", disable=None):
            for name, (function, *how) in work.items():
                found[name].append(alone(name, function, *how))
                file.write(json.dumps({"row": name, "round": turn, **found[name][-1]}) + "\n")
                file.flush()
    lines = []
    for name, each in found.items():
        medians = {key: statistics.median(record[key] for record in each) for key in each[0]}
        lines.append([name, *(f"{medians[key]:,.4g}" if key in medians else "" for key in COLUMNS)])
    print(table(["medians of the rounds", *COLUMNS.values()], lines))


# ---- time to loss ----


def loss_main() -> None:
    """train.py, with the peer's model in place of the blocks of the Llama that it has made."""
    if len(sys.argv) < 3:
        raise UserError("give llama2.c, nanoGPT or transformers, its model.py or -, and flags of train.py")
    name, path = sys.argv.pop(1), sys.argv.pop(1)

    def change(model: Llama) -> None:
        peer = Peer(name, path, model.config)
        model.layers = nn.ModuleList([peer])
        model.forward = lambda *batch: peer(*batch)
        model.generate = lambda *_, **__: [[]]

    train.main(change)
