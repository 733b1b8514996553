"""What a model's attention does on a text, and refitting merged heads or latents to it, without labels.

partition.py and gqa.py need the `statistics` of each layer; `sensitivity`, from one backward pass, tells
what an error in a layer does to the model's predictions. Merging in closed form does the best that weights
allow, head by head. What refitting adds, layer by layer:

    wo      heads' errors add up, and those of lower layers change its inputs. Ridge regression finds the wo
            that comes closest to the original's residual stream. Errors count relative to the stream's size,
            as the next norm sees it, or a few tokens with streams 100 times larger would decide
    wq, wk  a merged key approximates each RoPE pair by itself, while the softmax sees the sum over pairs
    wv      shared values were chosen for heads that look where they looked, and whose errors are independent

Before wo, L-BFGS moves the other three together: queries should attend where they did, and the stream stay as
it was. Changes are damped, or the weights would learn the quirks of a short text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from tqdm import tqdm

from common import require
from model import Attention, Llama, rope_angles, scores, widen

SLICE = 64 if torch.cuda.is_available() else 8  # rows of text computed at a time
QUERIES = 64  # at least, evenly spaced in each row of text, to observe attention
STEPS = 20  # of L-BFGS
MOST_WEIGHTS = 2**28  # attention weights held of a layer, 1 GiB; beyond it fewer rows serve
SENSED = 4096  # tokens of `sensitivity`
RIDGE = 1e-3  # of token_maps, of the mean square of e
TINY = 1e-30  # in float32; partition.TINY is for float64


# ---- observe ----


def observed(T: int, device: torch.device) -> tuple[slice, torch.Tensor]:
    """Which of T queries are observed, the last always, and a mask of the keys that they see (queries, T)."""
    every = max(1, T // QUERIES)
    some = slice((T - 1) % every, None, every)
    return some, torch.ones(T, T, dtype=torch.bool, device=device).tril()[some]


@dataclass
class Statistics:
    """Means over a layer's attention inputs x and queries q; slices of text are added in float64."""

    inputs: torch.Tensor  # (C, C) E[x x^T]; not centred, since RoPE makes a constant key vary
    mixed: torch.Tensor  # (C, C) E[m m^T], m = sum_s a_s x_s as attention mixes x for an observed query
    energy: torch.Tensor  # (H, D/2) E|q_f|^2 of each RoPE pair f
    gates: torch.Tensor  # (H,) E[gate^2] of each head, 1 without gates
    told: torch.Tensor | None = None  # (C, C) of token_maps: x above is then x - told e


def attention_inputs(model: Llama, tokens: torch.Tensor) -> Iterator[tuple]:
    """Yield attention, its inputs x, rope and the tokens' e, `embedded`, of every layer, on slices of tokens
    (N, T). Raises UserError for a model that computes inf or nan."""
    rope = rope_angles(model.config, torch.arange(tokens.shape[1], device=tokens.device))
    for part in tokens.split(SLICE):
        x = model.tok_embeddings(part)
        for layer, e in zip(model.layers, model.embedded(part)):
            yield layer.attention, layer.attention_norm(x), rope, e
            x = layer(x, *rope, e)
        finite = model.norm(x).isfinite().all()
        require(finite, "the model computes inf or nan: its weights are damaged, or its training diverged")


@torch.no_grad()
def token_maps(model: Llama, tokens: torch.Tensor) -> list[torch.Tensor]:
    """`told` (C, C) of each layer, over tokens (N, T): ridge regression of its inputs x on e, `embedded`."""
    products, squares = [0] * len(model.layers), [0, 0][: len(model.layers)]  # two kinds of e
    for attention, x, _, e in attention_inputs(model, tokens):
        x, e = x.flatten(0, 1), e.flatten(0, 1)
        products[attention.layer] += (e.T @ x).double()
        if attention.layer < 2:
            squares[attention.layer] += (e.T @ e).double()
    for damped in squares:
        damped.diagonal().add_(RIDGE * damped.diagonal().mean())
    return [torch.linalg.solve(squares[min(i, 1)], product).T for i, product in enumerate(products)]


@torch.no_grad()
def statistics(model: Llama, tokens: torch.Tensor, told: list | None = None) -> list[Statistics]:
    """Of every layer, over tokens (N, T); with its `token_maps`, of x - told e instead of x."""
    stats = [Statistics(0, 0, 0, 0, of_layer) for of_layer in told or [None] * len(model.layers)]
    some, seen = observed(tokens.shape[1], tokens.device)
    count, observations = tokens.numel(), len(tokens) * len(seen) * model.config.n_head
    for attention, x, rope, e in attention_inputs(model, tokens):
        (q, k, _), means = attention.project(x, *rope), stats[attention.layer]
        left = x if means.told is None else x - e @ means.told.type_as(e).T
        m = (scores(q[:, :, some], k, attention.k_groups, seen).softmax(-1) @ left[:, None]).flatten(0, 2)
        rows = left.flatten(0, 1)
        means.inputs += (rows.T @ rows).double() / count
        means.mixed += (m.T @ m).double() / observations
        gates = attention.gate(x).sigmoid() if attention.gate else x.new_ones(*x.shape[:2], q.shape[1])
        means.gates += gates.double().square().sum(dim=(0, 1)) / count
        means.energy += q.unflatten(-1, (-1, 2)).square().sum(dim=(0, 2, 4), dtype=torch.float64) / count
    return stats


@torch.enable_grad()
def sensitivity(model: Llama, tokens: torch.Tensor) -> list[list[tuple]]:
    """[layer][batch], on the first tokens (N, T): attention's arguments (x, cos, sin, e), output y, and at y
    the gradient of log p of tokens drawn from p (why: `divergence`); all but angles (B, T, C)."""
    tokens = tokens[: max(1, SENSED // tokens.shape[1])]
    found, generator = [[] for _ in model.layers], torch.Generator(tokens.device).manual_seed(0)

    def observe(attention: Attention, inputs: tuple, y: torch.Tensor) -> None:
        args, output = (inputs[0].detach(), *inputs[1:3], e[attention.layer]), y.detach()
        # a hook that holds y itself would keep all this in memory for ever
        y.requires_grad_().register_hook(lambda g: found[attention.layer].append((args, output, g)))

    hooks = [layer.attention.register_forward_hook(observe) for layer in model.layers]
    for part in tokens.split(2):
        e = model.embedded(part)
        log_p = widen(model(part)).log_softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def divergence(attention: Attention, found: list[tuple]) -> float:
    """The KL divergence, nats a token, that an attention would cause in the place of the one whose
    `sensitivity` is `found`: to second order E[(g . error)^2] / 2, as E[g g^T] over tokens drawn from the
    model is the Fisher information, if errors at two positions are unrelated."""
    squares = [(g * (attention(*args) - y)).sum(-1).square() for args, y, g in found]
    return torch.cat(squares).mean().item() / 2


# ---- refit ----


@torch.no_grad()
def refit(model: Llama, original: Llama, tokens: torch.Tensor, steps: int = STEPS, quiet=True) -> Llama:
    """Give a merged model new wo and, in `steps` of L-BFGS, new wq, wk and wv, over tokens (N, T), bottom
    layer first. Layers below the first merged one stay as they are, bit for bit; one that was not merged, but
    stands above it, gets only a new wo."""
    x = y = original.tok_embeddings(tokens)  # the residual streams of the original and of the model
    rope = rope_angles(original.config, torch.arange(tokens.shape[1], device=tokens.device))
    e = original.embedded(tokens)
    layers = tqdm(model.layers, "refitting", disable=quiet or None, leave=False)
    for theirs, ours, own in zip(original.layers, layers, e):
        a, b = theirs.attention_norm(x), ours.attention_norm(y)
        old, new = theirs.attention.state_dict(), ours.attention.state_dict()
        changed = any(name not in old or not torch.equal(old[name], new[name]) for name in new)
        output = torch.cat([theirs.attention(part, *rope) for part in a.split(SLICE)])
        target, weight = x + output - y, 1 / (x + output).norm(dim=-1).clamp(min=TINY)
        if steps and changed:
            looks = observed_weights(theirs.attention, a, rope)
            refit_attention(ours.attention, b, rope, looks, own, target, weight, steps)
        parts = zip(b.split(SLICE), own.split(SLICE))
        heads = torch.cat([ours.attention.head_outputs(part, *rope, of) for part, of in parts])
        if changed or not torch.equal(x, y):
            refit_output(ours.attention.wo, heads, target, weight)
        x, y = x + output, y + torch.cat([ours.attention.wo(part) for part in heads.split(SLICE)])
        x = torch.cat([part + theirs.feed_forward(theirs.ffn_norm(part)) for part in x.split(SLICE)])
        y = torch.cat([part + ours.feed_forward(ours.ffn_norm(part)) for part in y.split(SLICE)])
    return model


def refit_output(wo: nn.Linear, z: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> None:
    """Ridge regression, in float64, of target (N, T, C) on heads' outputs z (N, T, n), each token by its
    weight (N, T): the wo of least sum |weight (wo z - target)|^2 + 4 E|weight z|^2 |wo - wo_before|^2."""
    before, squares, products = wo.weight.double(), 0, 0
    for rows, goal, part in zip(z.split(SLICE), target.split(SLICE), weight.double().split(SLICE)):
        rows, goal = ((part[..., None] * x).flatten(0, 1) for x in (rows, goal))
        squares = squares + rows.T @ rows
        products = products + rows.T @ (goal - rows @ before.T)
    squares.diagonal().add_(max(4 * squares.trace().item() / weight.numel(), TINY))
    change = torch.linalg.solve(squares, products)
    wo.weight = nn.Parameter((before + change.T).type_as(wo.weight))


def observed_weights(attention: Attention, x: torch.Tensor, rope) -> list[torch.Tensor]:
    """Weights (B, H, queries, T) of observed queries, for each slice of as many rows of x as may be held."""
    some, seen = observed(x.shape[1], x.device)
    most, weights = max(1, MOST_WEIGHTS // (attention.k_groups.of_head.numel() * seen.numel())), []
    for part in x[:most].split(SLICE):
        q, k, _ = attention.project(part, *rope)
        weights.append(scores(q[:, :, some], k, attention.k_groups, seen).softmax(-1))
    return weights


@torch.no_grad()
def refit_attention(ours: Attention, b, rope, looks: list, e, target, weight, steps: int) -> None:
    """wq, wk and wv that lessen, of observed queries on inputs b (N, T, C), the mean KL divergence of their
    attention weights from `looks`, and refit_output's weighted error, divided by the target's squares."""
    some, seen = observed(b.shape[1], b.device)
    given = b, e, target[:, some], weight[:, some, None]
    b, e, target, weight = (x[: sum(map(len, looks))] for x in given)
    energy = (weight * target).square().sum().clamp(min=TINY)
    count = sum(of_slice[..., 0].numel() for of_slice in looks)  # queries of all heads

    def attend(part, e, goal, weight, wq, wk, wv) -> tuple[torch.Tensor, torch.Tensor]:
        both = ours.beside(part, e)
        q, k, v = ours.queries(part[:, some] @ wq.T, *(x[some] for x in rope)), both @ wk.T, both @ wv.T
        log_weights = scores(q, ours.keys(k, *rope, e), ours.k_groups, seen).log_softmax(-1)
        y = ours.v_groups.scatter(ours.v_groups.gather(log_weights.exp()) @ ours.values(v, k, e))
        error = weight * (ours.wo(ours.readout(y, part[:, some])) - goal) / energy.sqrt()
        return log_weights.masked_fill(~seen, 0), error

    slices = list(zip(looks, b.split(SLICE), e.split(SLICE), target.split(SLICE), weight.split(SLICE)))
    damping = 2 * b.shape[-1] / weight.numel()
    of_both = whitening(ours.beside(b, e))
    roots = [whitening(b) if ours.wt else of_both, of_both, of_both]
    minimise(attend, [ours.wq, ours.wk, ours.wv], roots, slices, count, steps, damping)


def minimise(attend, linears: list[nn.Linear], roots, slices: list, count: int, steps: int, damping: float):
    """By L-BFGS on the weights w of linears: the sum of |error|^2 and KL over slices of text and targets, and
    of damping |D|^2 / |w C^(1/2)|^2, where D = (change of w) C^(1/2), C = E[b b^T] of w's inputs b
    (`whitening`). Its variable is S D, S one number a row, the `slopes`: there all directions matter about
    alike, and it gets far in few steps."""
    before, inverses = [linear.weight.detach() for linear in linears], [inverse for _, inverse in roots]
    scales = slopes(attend, before, inverses, slices, count)
    shares = [damping / (w @ root).square().sum().clamp(min=1e-12) for w, (root, _) in zip(before, roots)]
    changes = [torch.zeros_like(w, requires_grad=True) for w in before]

    def weights() -> list[torch.Tensor]:
        parts = zip(before, changes, scales, inverses)
        return [w + change / scale @ inverse for w, change, scale, inverse in parts]

    def closure() -> torch.Tensor:  # called with gradients on
        optimizer.zero_grad()
        total = sum(n * (x / scale).square().sum() for n, x, scale in zip(shares, changes, scales))
        total.backward()
        total = total.detach()
        for p, *given in slices:
            log_weights, error = attend(*given, *weights())
            of_slice = error.square().sum() - (p * log_weights).sum() / count  # KL but for a constant
            of_slice.backward(inputs=changes)  # not of wo, novel and gate
            total += of_slice.detach()
        return total

    optimizer = torch.optim.LBFGS(changes, max_iter=steps, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    for linear, weight in zip(linears, weights()):
        linear.weight = nn.Parameter(weight)


@torch.enable_grad()
def slopes(attend, weights: list[torch.Tensor], inverses, slices: list, count: int) -> list[torch.Tensor]:
    """For each of weights (n, C), (n, 1): the root mean square, over whitened inputs, of the derivative by a
    row of y, a vector whose squared change is about the objective's (Gauss-Newton). A backward pass with
    random signs estimates it (Hutchinson): the diagonal of K-FAC's factor of outputs (arXiv 1503.05671)."""
    generator = torch.Generator(weights[0].device).manual_seed(0)
    weights, squares = [w.detach().requires_grad_() for w in weights], [0] * len(weights)
    for _, *given in slices:
        log_weights, error = attend(*given, *weights)
        # nearby, KL is the squared change of (2 p)^(1/2)
        y = torch.cat((error.flatten(), (2 / count) ** 0.5 * (log_weights / 2).exp().flatten()))
        signs = torch.empty_like(y).bernoulli_(generator=generator) * 2 - 1
        gradients = torch.autograd.grad(y, weights, signs)
        rows = [(g @ inverse).square().mean(1, True) for g, inverse in zip(gradients, inverses)]
        squares = [old + new for old, new in zip(squares, rows)]
    return [(square + 1e-3 * square.mean() + TINY).sqrt() for square in squares]


def whitening(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C^(1/2) and C^(-1/2) of C = E[x x^T] over x (..., n), and a little more on its diagonal."""
    rows = x.flatten(0, -2).double()
    C = rows.T @ rows / len(rows)
    strength, U = torch.linalg.eigh(C + (1e-5 * C.diagonal().mean() + TINY) * torch.eye(len(C)).to(C))
    return tuple((U * strength**power @ U.T).type_as(x) for power in (0.5, -0.5))
