"""Refit the attention of a model whose heads were merged to the original's, layer by layer, without labels.

`convert` in merging.py is the best that can be done with weights alone, head by head. Two things are left to gain.
`refit_output`: the errors of the heads add up, and those of the layers below arrive as other inputs, so wo is solved
for what comes closest to the residual stream that the original had there. `refit_attention`: a merged key stands for
each RoPE pair by itself, while what counts is the sum over pairs, behind a softmax, so wq and wk move until the queries
look where they looked.

Layers are refitted from the bottom up, each on what the refitted ones below it put out.
"""

import torch
import torch.nn as nn
from tqdm import tqdm

from attention import scores
from merging import observed
from model import Attention, Llama, rotate

SLICE = 8  # rows of text computed at a time
STEPS = 10  # of L-BFGS
MOST_WEIGHTS = 2**28  # attention weights that are held of a layer, 1 GiB in float32; beyond it fewer rows serve
TINY = 1e-30
MATRICES = ("wq", "wk", "wv", "wo")


@torch.no_grad()
def refit(
    model: Llama, original: Llama, tokens: torch.Tensor, rope, attention: bool = True, quiet: bool = True
) -> None:
    """Give a merged model new wo, and new wq and wk if `attention` says so, over tokens (N, T). A layer that does what
    the original's does stays as it is, bit for bit."""
    x = y = original.tok_embeddings(tokens)  # the residual streams of the original and of the model
    pairs = list(zip(original.layers, model.layers))
    for theirs, ours in tqdm(pairs, desc="refitting", disable=quiet or None, leave=False):
        a, b = theirs.attention_norm(x), ours.attention_norm(y)
        same = {name: equal(theirs.attention, ours.attention, name) for name in MATRICES}
        if attention and not same["wk"]:
            refit_attention(theirs.attention, ours.attention, a, b, rope)
        if not all(same.values()) or not torch.equal(x, y):
            refit_output(theirs.attention, ours.attention, a, b, x - y, rope)
        x, y = (torch.cat([layer(part, *rope) for part in z.split(SLICE)]) for layer, z in ((theirs, x), (ours, y)))


def equal(theirs: Attention, ours: Attention, name: str) -> bool:
    return torch.equal(getattr(theirs, name).weight, getattr(ours, name).weight)


@torch.no_grad()
def refit_output(theirs: Attention, ours: Attention, a, b, drift, rope, ridge: float = 1e-3) -> None:
    """The wo that minimises E|wo z - target|^2 + ridge E|z|^2 / n |wo - wo_before|^2, z (n,) the outputs of our heads
    on inputs b, and the target the original's attention on its inputs a, plus `drift`, by how much the streams differ:
    all (N, T, C). Solved in float64."""
    before, squares, products, tokens = ours.wo.weight.double(), 0, 0, b.shape[0] * b.shape[1]
    for part_a, part_b, part in zip(a.split(SLICE), b.split(SLICE), drift.split(SLICE)):
        z = ours.heads(part_b, *rope).flatten(0, 1).double()
        target = (theirs(part_a, *rope) + part).flatten(0, 1).double()
        squares = squares + z.T @ z / tokens
        products = products + z.T @ (target - z @ before.T) / tokens
    damping = max(ridge * squares.diagonal().mean().item(), TINY) * torch.eye(
        len(squares), dtype=squares.dtype, device=squares.device
    )
    change = torch.linalg.solve(squares + damping, products)
    ours.wo.weight = nn.Parameter((before + change.T).type_as(ours.wo.weight))


def whitening(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C^(1/2) and C^(-1/2) of C = E[x x^T] over x (..., n), and a little more on its diagonal."""
    rows = x.flatten(0, -2).double()
    C = rows.T @ rows / len(rows)
    strength, U = torch.linalg.eigh(C + 1e-5 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device))
    return tuple((U * strength**power @ U.T).type_as(x) for power in (0.5, -0.5))


@torch.no_grad()
def refit_attention(theirs: Attention, ours: Attention, a, b, rope) -> None:
    """wq and wk that lessen the mean KL divergence of our attention weights, on inputs b, from the original's on its
    inputs a, of as many rows as MOST_WEIGHTS allows; few steps of L-BFGS, for with many it learns the text by heart.

    It works on wq C^(1/2) and wk C^(1/2), C = E[b b^T], scaled to the same size: seen so, no direction of the inputs
    is much stronger than another, and a second-order method with a short memory gets far in few steps.
    """
    some, seen = observed(b.shape[1], b.device)
    most = max(1, MOST_WEIGHTS // (len(theirs.k_groups.of_head) * seen.numel()))
    a, b = a[:most], b[:most]
    root, inverse = whitening(b)
    targets = []
    for part in a.split(SLICE):
        q, k, _ = theirs.project(part, *rope)
        targets.append(scores(q[:, :, some], k, theirs.k_groups, seen).softmax(-1))
    count = sum(target.shape[:3].numel() for target in targets)
    turns = [[angles[some] for angles in rope], rope]
    whitened = [w.weight @ root for w in (ours.wq, ours.wk)]
    sizes = [w.square().mean().sqrt().clamp(min=TINY) for w in whitened]
    parameters = [nn.Parameter(w / size) for w, size in zip(whitened, sizes)]
    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:  # called with gradients on
        optimizer.zero_grad()
        total = torch.zeros((), device=b.device)
        for part, target in zip(b.split(SLICE), targets):
            q, k = (
                rotate((x @ (p * size @ inverse).T).unflatten(-1, (-1, ours.head_dim)).transpose(1, 2), *turn)
                for x, p, size, turn in zip((part[:, some], part), parameters, sizes, turns)
            )
            # cross-entropy, KL but for a constant: log sum exp(scores) - sum target * scores
            where = (q * (target @ ours.k_groups.expand(k))).sum() * ours.head_dim**-0.5
            loss = (scores(q, k, ours.k_groups, seen).logsumexp(-1).sum() - where) / count
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(closure)
    for w, p, size in zip((ours.wq, ours.wk), parameters, sizes):
        w.weight = nn.Parameter((p.detach() * size) @ inverse)
