"""Checkpoints, adapters and tokenizers of other programs, in and out.

python -m formats import TinyLlama-1.1B/ tiny.pt                     # a Hugging Face folder, or Meta's own
python -m formats import stories260K.bin stories.pt --tokenizer tok512.bin              # llama2.c's
python -m formats import SmolLM2-135M.gguf smol.pt                   # llama.cpp's, also quantized
python -m formats import ADAPTER both.pt --base base.pt              # PEFT's folder, or our own .pt
python -m formats export out/RUN/ckpt.pt FOLDER                      # a Hugging Face folder
python -m formats export out/RUN/ckpt.pt OUT.gguf                    # for llama.cpp
python -m formats export out/RUN/ckpt.pt FOLDER_OR_PT --adapter      # the adapter, for PEFT or in a .pt
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import empty_model, load, load_weights, model_config, save, show
from common import UserError, bounded, exit_cleanly, parse, require, writable
from formats import adapters, gguf, models
from formats.files import check_finite, reading
from formats.tokenizers import find_tokenizer


@dataclass
class FormatsConfig:
    """formats"""

    action: Literal["import", "export"]  # what to do
    source: str  # import: a model's folder, a .gguf, llama2.c's .bin, or an adapter; export: a checkpoint
    out: str  # import: the checkpoint to write; export: the folder, a .gguf, or of an adapter a .pt
    tokenizer: str | None = None  # import: tokenizer.model, .json or llama2.c's .bin (default: its own)
    block_size: int | None = bounded(None, 2, 2**24)  # import: longest context, tokens (default: its own)
    base: str | None = None  # import an adapter: the checkpoint of its base
    adapter: bool = False  # export the adapter only
    overwrite: bool = False  # replace an existing .pt or .gguf


def import_model(source: Path, tokenizer: str | None, block_size: int | None) -> dict:
    """A checkpoint made of `source`. Raises UserError when it is damaged, or a model that ours cannot be."""
    fields: dict = {}
    with reading(source, "Llama in a supported format"):
        if source.is_file() and source.suffix == ".gguf":
            settings, weights, fields = gguf.read_gguf(source)
        elif source.is_file() and source.suffix == ".bin":
            settings, weights = models.read_llama2c(source)
        elif (source / "config.json").exists():
            settings, weights = models.read_hugging_face(source)
        elif (source / "params.json").exists():
            settings, weights = models.read_meta(source)
        else:
            kinds = "a folder with config.json or params.json, a .gguf, or llama2.c's .bin"
            raise UserError(f"no such file or model: name {kinds}; an adapter needs --base BASE.pt")
    settings |= {"block_size": block_size} if block_size else {}
    ends = [weights[name] for name in ("tok_embeddings.weight", "output.weight") if name in weights]
    settings["tie_embeddings"] |= len({x.data_ptr() for x in ends}) < len(ends)  # one matrix
    c = model_config({"config": settings})
    if c.tie_embeddings and ends:  # the file may have either name
        weights = dict.fromkeys(("tok_embeddings.weight", "output.weight"), ends[0]) | weights
    load_weights(empty_model(c), weights, str(source))
    check_finite(weights, source)
    if c.tie_embeddings and not torch.equal(weights["output.weight"], weights["tok_embeddings.weight"]):
        raise UserError(f"{source}: embeddings and output differ, but are tied: correct config.json")
    if fields and not tokenizer:
        found = gguf.tokenizer_of(source, fields)
    else:
        found = find_tokenizer(source, tokenizer, c.vocab_size)
    if found and found.vocab_size > c.vocab_size:
        counts = f"tokens, BOS and EOS need a vocabulary of {found.vocab_size}, the model's is {c.vocab_size}"
        raise UserError(f"{source}: {counts}; give its own, --tokenizer FILE, or correct eos_token_id")
    return {"model": weights, "config": settings, "tokenizer": found and found.data, "source": str(source)}


def main() -> None:
    flags = parse(__doc__, FormatsConfig)
    config = FormatsConfig(**flags)
    source, out = Path(config.source), Path(config.out)
    other = {"import": ["adapter"], "export": ["tokenizer", "block_size", "base"]}[config.action]
    other += ["tokenizer", "block_size"] * (config.base is not None)  # the base has both
    if unused := [name for name in other if name in flags]:
        raise UserError(f"{config.action} does not use --{unused[0]}: leave it out")
    wrong = ".gguf" if config.action == "import" or config.adapter else ".pt"
    kinds = "import writes a .pt, export a folder or a .gguf, export --adapter a folder or a .pt"
    require(out.suffix != wrong, f"{out} has the wrong ending: {kinds}")
    if config.adapter:
        adapters.export(source, out, config.overwrite)
    elif config.action == "export" and out.suffix == ".gguf":
        writable(out, config.overwrite)
        gguf.write_gguf(source, out)
    elif config.action == "export":
        models.export(source, out)
    else:
        writable(out, config.overwrite)
        if config.base:
            checkpoint = adapters.with_adapter(load(config.base), source)
        else:
            checkpoint = import_model(source, config.tokenizer, config.block_size)
        save(out, checkpoint)
        show(out)
        if checkpoint["tokenizer"]:
            print(f"--- next:\npython eval_ppl.py {out} --text FILE\npython sample.py {out}")


if __name__ == "__main__":
    exit_cleanly(main)
