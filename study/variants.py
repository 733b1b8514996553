"""train.py with another beginning: controls of the novel layer, and other projects' models.

    python -m study begin scaled --n_layer 6 --out_dir out/scaled
    python -m study begin torch --n_layer 6 --novel --out_dir out/torch
    python -m study begin llama2.c=llama2.c/model.py --n_layer 6 --optimizer adamw --out_dir out/llama2c

The novel layer multiplies what attention adds to the stream by SILU'(0) = 1/2 and by its own weights, whose
deviation is 0.02 and whose width D: at first by 0.01 sqrt(D), an 18th where D is 32. `scaled` gives a plain
block so small a beginning by its wo, and `torch` gives the novel layer the first weights of nn.Linear, of
deviation 1 / sqrt(3 D), with which it multiplies by 0.29; its bias begins as zero in both.

`transformers`, `llama2.c=FILE` and `nanoGPT=FILE` put that project's model of this shape, FILE its model.py,
in the place of ours: the same batches and loop, for `plot loss`. Its checkpoint holds that model: neither
--resume nor any other command can read it.
"""

import math
import sys
from functools import partial

import torch
import torch.nn as nn

import train
from common import require
from model import Llama
from study.compare_speed import Peer

PEERS = {"transformers": "", "llama2.c": ".py", "nanoGPT": ".py"}  # and how the names of their files end


@torch.no_grad()
def change(model: Llama, how: str, path: str = "") -> None:
    """Give the blocks of a new model other first weights, or put a peer's model in their place."""
    if how in PEERS:
        peer = Peer(how, path, model.config).to(model.tok_embeddings.weight.device)
        model.layers = nn.ModuleList([peer])
        # the weights of ours that are left would count as parameters
        model.tok_embeddings = next(m for m in peer.modules() if isinstance(m, nn.Embedding))
        model.norm = model.output = nn.Identity()
        model.forward = lambda *batch: peer(*batch)
        model.generate = lambda *_, **__: [[]]
        return
    for attention in (layer.attention for layer in model.layers):
        if how == "scaled":
            attention.wo.weight.mul_(0.01 * math.sqrt(attention.head_dim))
        else:
            require(attention.novel is not None, "torch is how the novel layer may begin: give --novel")
            attention.novel.reset_parameters()
            attention.novel.bias.zero_()


def begin_main() -> None:
    how, _, path = "".join(sys.argv[1:2]).partition("=")
    if how in ("-h", "--help"):
        return print(__doc__)
    known = how in ("scaled", "torch", *PEERS) and path.endswith(PEERS.get(how, ""))
    require(known, "begin takes scaled, torch, transformers, llama2.c=FILE.py or nanoGPT=FILE.py")
    typed = {word.partition("=")[0] for word in sys.argv}
    require("--init_from" not in typed, "begin is for new models: drop --init_from")
    require(how not in PEERS or "--teacher" not in typed, f"{how} gives no logits: drop --teacher")
    require("--out_dir" in typed, "give --out_dir: the default folder is named after an ordinary run")
    del sys.argv[1]
    train.main(partial(change, how=how, path=path))
