"""How fast herd and other implementations train, evaluate and write at one shape, on a CPU.

    python -m study compare-speed speed.jsonl --n_layer 6 --dim 288 --n_head 6 --hidden_dim 768 \\
        --llama2c llama2.c/model.py --nanogpt nanoGPT/model.py \\
        --run_c "llama2.c/run model.bin -z tokenizer.bin" "llama2.c/runq int8.bin -z tokenizer.bin"

llama2.c's programs (gcc -Ofast -fopenmp -march=native run.c -lm -o run) and llama.cpp (llama-cpp-python) need
a model of this shape, of few steps, so that no text ends early, exported with formats; llama2.c's export.py
--hf (runq: --version 2) converts it. Training is compiled, AdamW, bfloat16, on random tokens. Each row is a
process of its own; rows take turns.
"""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import IGNORE, bounded, require, writable
from formats.models import config_of
from model import Llama, ModelConfig
from sample import compile_step
from study.bench import BenchConfig, alone, configs, in_turns, show, train_speed


@dataclass
class SpeedConfig:
    """comparison"""

    out: str  # the JSONL of what was measured, a line a row and round
    llama2c: str | None = None  # llama2.c's model.py
    nanogpt: str | None = None  # nanoGPT's model.py
    run_c: list[str] | None = None  # llama2.c's programs, each with its model and tokenizer
    gguf: str | None = None  # llama.cpp's model
    rounds: int = bounded(5, 1)  # processes of each row
    overwrite: bool = False  # replace such a file


class Peer(nn.Module):
    """Another project's model of this shape, with herd's interface: model(x, y) is the summed loss, nats."""

    def __init__(self, name: str, path: str, c: ModelConfig):
        super().__init__()
        self.name, self.config = name, c
        require(not (c.novel or c.gated), f"{name} has no such layers: drop --novel and --gated")
        if name == "transformers":
            from transformers import LlamaConfig, LlamaForCausalLM

            self.model = LlamaForCausalLM(LlamaConfig(**config_of(c, c.n_kv_head, None, torch.float32)))
            return
        spec = importlib.util.spec_from_file_location("its_model", path)
        require(spec, f"{path} is no .py file: give the project's model.py")
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if name == "nanoGPT":
            sizes = c.block_size, c.vocab_size, c.n_layer, c.n_head, c.dim
            self.model = module.GPT(module.GPTConfig(*sizes, bias=False))
        else:
            sizes = c.dim, c.n_layer, c.n_head, c.n_kv_head, c.vocab_size, c.hidden_dim
            self.model = module.Transformer(module.ModelArgs(*sizes, max_seq_len=c.block_size))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.name == "transformers":
            logits = self.model(input_ids=x, use_cache=False).logits.flatten(0, 1).float()
            return F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE, reduction="sum")
        out = self.model(x, y)
        mean = out[1] if self.name == "nanoGPT" else self.model.last_loss  # both ignore -1
        return mean * (y != IGNORE).sum()


def learn(name: str, path: str, c: ModelConfig, config: BenchConfig) -> dict:
    torch.manual_seed(0)
    model = Llama(c) if name == "herd" else Peer(name, path, c)
    return train_speed(model, config, torch.bfloat16, compiled=True)


def write(name: str, path: str, c: ModelConfig, texts: int) -> dict:
    """Tokens a second of greedy texts, from one token to the end of the context."""
    torch.manual_seed(0)
    new = c.block_size - 1
    if name == "herd":
        model = Llama(c).bfloat16().eval()
        compile_step(model)
        run = partial(model.generate, [[1]] * texts, new)
    elif name == "transformers":
        model, prompts = Peer(name, path, c).model.eval().bfloat16(), torch.ones(texts, 1, dtype=torch.long)
        run = partial(model.generate, prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    elif name == "llama.cpp":
        from llama_cpp import Llama as LlamaCpp

        model = LlamaCpp(path, n_ctx=c.block_size, n_threads=torch.get_num_threads(), verbose=False)

        def run() -> None:
            list(islice(model.generate([1], temp=0.0, repeat_penalty=1.0), new))
    else:  # llama2.c's programs time themselves
        words = [*path.split(), "-t", "0", "-n", str(c.block_size)]
        said = subprocess.run(words, capture_output=True, text=True).stderr
        rate = re.search(r"tok/s: ([\d.]+)", said)
        require(rate, f"--run_c {path} prints no tok/s but {said[-80:]!r}")
        return {"tok_s": float(rate[1])}
    return {"tok_s": texts * new / median(in_turns({name: run}, 3)[name])}


def main() -> None:
    config, how, c = configs(__doc__, SpeedConfig, BenchConfig, ModelConfig)
    writable(Path(config.out), config.overwrite)
    require(how.device in ("auto", "cpu"), f"--device {how.device}: this compares on a CPU, leave it out")
    how.device = "cpu"
    files = {"herd": "-", "llama2.c": config.llama2c, "nanoGPT": config.nanogpt, "transformers": "-"}
    work = {f"{name}, compiled": (learn, name, path, c, how) for name, path in files.items() if path}
    for texts in (1, 16):
        work[f"herd, compiled, texts: {texts}"] = write, "herd", "-", c, texts
        work[f"transformers, eager, texts: {texts}"] = write, "transformers", "-", c, texts
    for words in config.run_c or ():
        work[f"{words}, texts: 1"] = write, "run.c", words, c, 1
    if config.gguf:
        work["llama.cpp, texts: 1"] = write, "llama.cpp", config.gguf, c, 1
    found: dict[str, list[dict]] = {name: [] for name in work}
    with open(config.out, "w", buffering=1) as file:  # what has been measured stays, whatever fails
        for _ in tqdm(range(config.rounds), desc="rounds", disable=None):
            for name, (function, *args) in work.items():
                found[name].append(alone(name, function, *args))
                print(json.dumps({"row": name, **found[name][-1]}), file=file)
    medians = {name: {key: median(one[key] for one in of) for key in of[0]} for name, of in found.items()}
    show(how, [{"medians of the rounds": name, **row} for name, row in medians.items()])
