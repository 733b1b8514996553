"""Models and tokenizers as other programs write them, for the tests that read them."""

import json
import struct
from dataclasses import asdict

import torch
from conftest import run, sharpened, tokens_of
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint import build_model, load, save
from data.tokenizer import read_tokenizer


def formats(*args) -> str:
    """What the command prints."""
    done = run("-m formats", *args)
    return done.stdout + done.stderr


def imported(source, out, *flags):
    """The model, and the tokenizer if there is one."""
    formats("import", source, out, *flags)
    data = load(out)["tokenizer"]
    return build_model(load(out)), data and read_tokenizer(data)


def their_model(dtype=torch.float32, **settings):
    """A random LlamaForCausalLM."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 3e-6}
    torch.manual_seed(0)
    return sharpened(LlamaForCausalLM(LlamaConfig(**{**shape, **settings}))).to(dtype)


def save_folder(model, folder, how="safetensors"):
    """As transformers saves it, whole or sharded; or as older releases did, in torch.save's format."""
    model.save_pretrained(folder, max_shard_size="15KB" if "shards" in how else "1GB")
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 2) == ("shards" in how)
    for path in files if "bin" in how else []:
        older = path.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        torch.save(load_file(path), folder / older)
        path.unlink()
    return folder


def change_json(path, **changes):
    """Replace values of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def logits(model, length=100):
    with torch.no_grad():
        out = model(tokens_of((2, length), seed=1))
    return out if isinstance(out, torch.Tensor) else out.logits


def checkpoint_of(model, tokenizer=None):
    return {"model": model.state_dict(), "config": asdict(model.config), "tokenizer": tokenizer}


def export_of(model, folder, tokenizer=None, out="out"):
    save(folder / "ours.pt", checkpoint_of(model, tokenizer))
    return formats("export", folder / "ours.pt", folder / out)


def write_llama2c(folder, model, sp, spaces=None):
    """model.bin and tok.bin as llama2.c writes them; from `spaces` down are the scores of runs of spaces."""
    c, tensors = model.config, [model.tok_embeddings.weight]
    attention = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    for name in ("attention_norm", *attention, "ffn_norm", *(f"feed_forward.w{i}" for i in (1, 2, 3))):
        tensors += [layer.get_parameter(f"{name}.weight") for layer in model.layers]
    steps = 10000.0 ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
    angles = torch.outer(torch.arange(c.block_size), steps)
    tensors += [model.norm.weight, angles.cos(), angles.sin()]
    tensors += [] if c.tie_embeddings else [model.output.weight]
    vocabulary = c.vocab_size if c.tie_embeddings else -c.vocab_size
    sizes = (c.dim, c.hidden_dim, c.n_layer, c.n_head, c.n_kv_head, vocabulary, c.block_size)
    numbers = (x.detach().numpy().astype("<f4").tobytes() for x in tensors)
    (folder / "model.bin").write_bytes(struct.pack("<7i", *sizes) + b"".join(numbers))
    marks = {sp.bos_id(): "\n<s>\n", sp.eos_id(): "\n</s>\n"}
    pieces = [marks.get(i, sp.id_to_piece(i)).replace("\u2581", " ").encode() for i in range(len(sp))]
    data = struct.pack("<I", max(map(len, pieces)))
    for i, piece in enumerate(pieces):
        score = sp.get_score(i) if spaces is None or piece.strip(b" ") else spaces - i
        data += struct.pack("<fI", score, len(piece)) + piece
    (folder / "tok.bin").write_bytes(data)
