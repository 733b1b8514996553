"""Experiments, benchmarks, figures, scores: python -m study NAME ...; NAME --help lists the flags of one."""

import importlib
import sys

from common import exit_cleanly, require

COMMANDS = {  # name: module and function, what it does
    "run": ("run.main", "every experiment of docs/results.md, to tables and figures"),
    "plot": ("plot.main", "loss curves, attention maps, similarity of heads, head groups, architecture"),
    "score": ("score.main", "answers of a model: loss, BLEU, chrF, ROUGE, F1 and more, latency"),
    "memory": ("bench.memory_main", "what each memory saver saves in training, and what it costs"),
    "decode": ("bench.decode_main", "milliseconds of a token by number of K/V heads"),
    "attention": ("attention.main", "attention backends and sliced products in a QLoRA run"),
    "kernel": ("attention.kernel_main", "the Triton kernels by themselves, on a GPU"),
    "train": ("bench.train_main", "speed of training and evaluation"),
    "write": ("write.main", "text that a model writes, to heal its smaller self on"),
    "latency": ("bench.latency_main", "milliseconds of a text, checkpoints in turns (--ckpts)"),
    "compare-groups": ("compare_groups.main", "what each step of merging heads contributes"),
    "compare-speed": ("compare_speed.main", "speed beside transformers, llama2.c, nanoGPT, llama.cpp"),
    "begin": ("variants.begin_main", "train.py from other first weights, or with another project's model"),
    "pace": ("bench.pace_main", "milliseconds of a training step, variants in turns"),
}


def main() -> None:
    name = "".join(sys.argv[1:2]) or "--help"
    sys.argv[:2] = [f"study {name}"]
    if name in ("-h", "--help"):
        print(__doc__, *(f"{name:18}{what}" for name, (_, what) in COMMANDS.items()), sep="\n")
        return
    require(name in COMMANDS, f"{name} is none of the commands: {' '.join(COMMANDS)}")
    module, function = COMMANDS[name][0].split(".")
    getattr(importlib.import_module(f"study.{module}"), function)()


if __name__ == "__main__":  # benchmarks start processes, which import this file again
    exit_cleanly(main)
