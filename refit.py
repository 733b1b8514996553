"""Refit the attention of a model whose heads were merged to the original's, layer by layer, without labels.

Merging in closed form (gqa.py) does the best that weights allow, head by head. What is left to gain:

    wo      heads' errors add up, and the layers below change the inputs: ridge regression finds the wo that
            comes closest to the original's residual stream
    wq, wk  a merged key approximates each RoPE pair by itself, while the sum over pairs counts, inside a
            softmax: L-BFGS moves the two until the queries look where they looked
"""

import torch
import torch.nn as nn
from tqdm import tqdm

from model import Attention, Llama, rope_angles, rotate, scores

SLICE = 8  # rows of text computed at a time
QUERIES = 64  # sampled in each row of text, evenly spaced, to observe attention
STEPS = 10  # of L-BFGS: with many it learns the text by heart
MOST_WEIGHTS = 2**28  # attention weights held of a layer, 1 GiB in float32; beyond it fewer rows serve
RIDGE = 1e-3
TINY = 1e-30


def observed(T: int, device: torch.device) -> tuple[slice, torch.Tensor]:
    """The observed queries among T, the last of them one, and the keys that they see, (queries, T)."""
    every = max(1, T // QUERIES)
    some = slice((T - 1) % every, None, every)
    return some, torch.ones(T, T, dtype=torch.bool, device=device).tril()[some]


@torch.no_grad()
def refit(model: Llama, original: Llama, tokens: torch.Tensor, attention=True, quiet=True) -> Llama:
    """Give a merged model new wo, and wq and wk if `attention`, over tokens (N, T), bottom layer first.
    Layers that do what the original does stay as they are, bit for bit."""
    x = y = original.tok_embeddings(tokens)  # the residual streams of the original and of the model
    rope = rope_angles(original.config, torch.arange(tokens.shape[1], device=tokens.device))
    layers = tqdm(model.layers, "refitting", disable=quiet or None, leave=False)
    for theirs, ours in zip(original.layers, layers):
        a, b = theirs.attention_norm(x), ours.attention_norm(y)
        old, new = theirs.attention.state_dict(), ours.attention.state_dict()
        changed = [name for name in new if not torch.equal(old[name], new[name])]
        if attention and "wk.weight" in changed:
            refit_attention(theirs.attention, ours.attention, a, b, rope)
        if changed or not torch.equal(x, y):
            refit_output(theirs.attention, ours.attention, a, b, x - y, rope)
        x = torch.cat([theirs(part, *rope) for part in x.split(SLICE)])
        y = torch.cat([ours(part, *rope) for part in y.split(SLICE)])
    return model


@torch.no_grad()
def refit_output(theirs: Attention, ours: Attention, a, b, drift, rope) -> None:
    """Ridge regression for wo, in float64: it minimises E|wo z - target|^2 + (RIDGE E|z|^2 / n) |wo -
    wo_before|^2.

    z (n,) are the outputs of our heads on inputs b; the target is the output of the original's attention on
    its inputs a, plus the drift, by which its residual stream differs from ours: all (N, T, C).
    """
    before, squares, products, tokens = ours.wo.weight.double(), 0, 0, b[..., 0].numel()
    for part_a, part_b, part in zip(a.split(SLICE), b.split(SLICE), drift.split(SLICE)):
        z = ours.head_outputs(part_b, *rope).flatten(0, 1).double()
        target = (theirs(part_a, *rope) + part).flatten(0, 1).double()
        squares = squares + z.T @ z / tokens
        products = products + z.T @ (target - z @ before.T) / tokens
    damping = max(RIDGE * squares.diagonal().mean().item(), TINY) * torch.eye(len(squares)).to(squares)
    change = torch.linalg.solve(squares + damping, products)
    ours.wo.weight = nn.Parameter((before + change.T).type_as(ours.wo.weight))


@torch.no_grad()
def refit_attention(theirs: Attention, ours: Attention, a, b, rope) -> None:
    """wq and wk that lessen the mean KL divergence of our attention weights, on inputs b, from the original's
    on its inputs a. L-BFGS works on wq C^(1/2) and wk C^(1/2), C = E[b b^T], scaled to the same size: where
    no direction of the inputs is much stronger than another it gets far in few steps."""
    some, seen = observed(b.shape[1], b.device)
    most = max(1, MOST_WEIGHTS // (len(theirs.k_groups.of_list) * seen.numel()))
    a, b, targets = a[:most], b[:most], []
    for part in a.split(SLICE):
        q, k, _ = theirs.project(part, *rope)
        targets.append(scores(q[:, :, some], k, theirs.k_groups, seen).softmax(-1))
    count = sum(target[..., 0].numel() for target in targets)
    root, inverse = whitening(b)
    whitened = [w.weight @ root for w in (ours.wq, ours.wk)]
    sizes = [w.square().mean().sqrt().clamp(min=TINY) for w in whitened]
    parameters = [nn.Parameter(w / size) for w, size in zip(whitened, sizes)]

    def weight(i: int) -> torch.Tensor:
        return parameters[i] * sizes[i] @ inverse

    def heads(x: torch.Tensor, i: int, angles) -> torch.Tensor:  # (B, T, C) -> (B, H or G, T, D)
        return rotate((x @ weight(i).T).unflatten(-1, (-1, ours.head_dim)).transpose(1, 2), *angles)

    def closure() -> torch.Tensor:  # called with gradients on
        optimizer.zero_grad()
        divergence = torch.zeros((), device=b.device)
        for part, target in zip(b.split(SLICE), targets):
            q, k = heads(part[:, some], 0, [x[some] for x in rope]), heads(part, 1, rope)
            # cross-entropy, KL but for a constant: log sum exp(scores) - sum target * scores
            where = (q * (target @ ours.k_groups.expand(k))).sum() * ours.head_dim**-0.5
            loss = (scores(q, k, ours.k_groups, seen).logsumexp(-1).sum() - where) / count
            loss.backward()
            divergence += loss.detach()
        return divergence

    optimizer = torch.optim.LBFGS(parameters, max_iter=STEPS, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    ours.wq.weight, ours.wk.weight = nn.Parameter(weight(0)), nn.Parameter(weight(1))


def whitening(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C^(1/2) and C^(-1/2) of C = E[x x^T] over x (..., n), and a little more on its diagonal."""
    rows = x.flatten(0, -2).double()
    C = rows.T @ rows / len(rows)
    strength, U = torch.linalg.eigh(C + 1e-5 * C.diagonal().mean() * torch.eye(len(C)).to(C))
    return tuple((U * strength**power @ U.T).type_as(x) for power in (0.5, -0.5))
