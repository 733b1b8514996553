"""Models and tokenizers as other programs write them, for the tests that read them."""

import struct
from dataclasses import asdict

import torch
from conftest import quick
from safetensors.torch import load_file

from checkpoint import save
from model import Llama

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def their_model(dtype=torch.float32, seed=0, **settings):
    """A random LlamaForCausalLM, whose weights are large enough that its logits differ clearly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{"vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 3e-6, **shape, **settings}
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    model.tie_weights()
    return model.to(dtype).eval()


def save_folder(model, folder, how):
    """As transformers saves it, whole or sharded; or as older releases did, in torch.save's format."""
    model.save_pretrained(folder, max_shard_size="15KB" if "shards" in how else "1GB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 if "shards" in how else len(files) == 1
    if "bin" in how:
        for file in files:
            torch.save(
                load_file(file), folder / file.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            )
            file.unlink()
        for index in folder.glob("*.index.json"):
            text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    return folder


def logits(model, length=100):
    tokens = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(model, Llama) else out.logits


def run(*args):
    done = quick("checkpoint.py", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def checkpoint_of(model, tokenizer=None):
    return {"model": model.state_dict(), "config": asdict(model.config), "tokenizer": tokenizer}


def export_of(model, folder, tokenizer=None):
    save(folder / "ours.pt", checkpoint_of(model, tokenizer))
    return run("export", folder / "ours.pt", folder / "out")


def write_llama2c(path, model):
    """As llama2.c's legacy export does, whose layout its run.c reads."""
    c, layers = model.config, model.layers
    angles = torch.outer(torch.arange(c.block_size), 10000.0 ** -(torch.arange(0, c.head_dim, 2) / c.head_dim))
    tensors = [model.tok_embeddings.weight, *(layer.attention_norm.weight for layer in layers)]
    for name in ("wq", "wk", "wv", "wo"):
        tensors += [getattr(layer.attention, name).weight for layer in layers]
    tensors += [layer.ffn_norm.weight for layer in layers]
    for name in ("w1", "w2", "w3"):
        tensors += [getattr(layer.feed_forward, name).weight for layer in layers]
    tensors += [model.norm.weight, angles.cos(), angles.sin(), *([] if c.tie_embeddings else [model.output.weight])]
    vocabulary = c.vocab_size if c.tie_embeddings else -c.vocab_size
    sizes = (c.dim, c.hidden_dim, c.n_layer, c.n_head, c.n_kv_head, vocabulary, c.block_size)
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *sizes))
        for x in tensors:
            file.write(x.detach().numpy().astype("<f4").tobytes())


def write_llama2c_tokenizer(path, sp, spaces=None):
    """As llama2.c's tokenizer.py does. The pieces that are runs of spaces may have worse scores, from `spaces` down."""
    marks = {sp.bos_id(): "\n<s>\n", sp.eos_id(): "\n</s>\n"}
    pieces = [marks.get(i, sp.id_to_piece(i)).replace("\u2581", " ").encode() for i in range(sp.vocab_size())]
    with open(path, "wb") as file:
        file.write(struct.pack("<I", max(map(len, pieces))))
        for i, piece in enumerate(pieces):
            score = sp.get_score(i) if spaces is None or piece.strip(b" ") else spaces - i
            file.write(struct.pack("<fI", score, len(piece)) + piece)


TEXTS = ["", "Once upon a time", " two  spaces\nand a line", "def f(x):\n    return x ** 2", "café 中😀 \t."]
