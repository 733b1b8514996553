"""A small Llama, whole: configuration, RMSNorm, RoPE, attention over head groups, SwiGLU, KV cache, generation.

Llama (arXiv 2302.13971) is a stack of pre-norm residual blocks, x + attention(norm(x)) then x + feed_forward(norm(x)),
without biases. Modules carry Meta's names, so public Llama checkpoints load by name.

Some things are not in the paper. Query heads read key and value *groups* of any size, given for K and for V by one list
a layer: multi-head, grouped-query, multi-query and uneven grouping are one path (`HeadGroups`). And `novel` gives every
attention layer one small linear + SiLU, shared by its heads, on each head's output; `gated` is another such layer, from
the literature, to compare it with.

Shapes are written with: B batch, T time (tokens), S cached time, C model width, H query heads, G key/value groups,
D head width, V vocabulary.

    model = Llama(ModelConfig(n_layer=6, novel=True))
    loss = model(tokens, targets)                        # training: nats, summed over targets
    new_tokens = model.eval().generate([[1, 15, 7]], max_new_tokens=20)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import HeadGroups, KVCache, attend
from config import NO_FLAG, UserError
from cross_entropy import cross_entropy, widen
from projection import Projection

ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# a damaged file must not make us build lists of 10^9 layers before its weights are seen to be absent
LARGEST = {"n_layer": 1024, "n_head": 1024, "block_size": 2**24}  # other sizes: 2^20


@dataclass
class ModelConfig:
    """model"""

    n_layer: int = 6  # transformer blocks
    n_head: int = 8  # query heads of a layer
    n_kv_head: int | None = None  # key/value heads, each for an equal run of query heads (default: n_head)
    dim: int = 256  # model width
    head_dim: int | None = None  # width of one head, even (default: dim / n_head)
    hidden_dim: int | None = None  # width inside the feed-forward (default: 8/3 dim, rounded up to a multiple of 32)
    block_size: int = 256  # longest context, tokens
    vocab_size: int = 4096  # tokens in the vocabulary
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    # Llama 3's stretching of long ones: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    rope_scaling: dict[str, float] | None = field(default=None, metadata=NO_FLAG)
    norm_eps: float = 1e-5  # keeps RMSNorm from dividing by zero
    tie_embeddings: bool = True  # one matrix for the token embeddings and the output
    novel: bool = False  # the per-head layer: head_dim x head_dim linear + SiLU on each head's attention output
    gated: bool = False  # a sigmoid of the layer's input, one number a head, multiplies each head's output
    dropout: float = 0.0  # on the embeddings and on both residual branches
    attention: Literal["auto", "naive", "blocks", "sdpa", "triton"] = "auto"  # see attention.py; auto is the fastest
    pretraining_tp: int = 1  # slices of each matrix, multiplied one by one, as on so many tensor-parallel ranks
    # [layer][query head] -> the K group, the V group that it reads; equal runs of heads unless given
    k_groups: list[list[int]] | None = field(default=None, metadata=NO_FLAG)
    v_groups: list[list[int]] | None = field(default=None, metadata=NO_FLAG)

    def __post_init__(self):
        self.check_size("n_layer", "n_head", "dim", "block_size", "vocab_size")
        if self.head_dim is None:
            hint = f"give --n_head a divisor of {self.dim}, or set --head_dim"
            _require(self.dim % self.n_head == 0, f"dim {self.dim} is not divisible by n_head {self.n_head}: {hint}")
            self.head_dim = self.dim // self.n_head
        hint = "rotary position embedding turns pairs, so it must be even: change --head_dim, --dim or --n_head"
        _require(self.head_dim >= 2 and self.head_dim % 2 == 0, f"head_dim is {self.head_dim}: {hint}")
        if self.hidden_dim is None:
            self.hidden_dim = 32 * math.ceil(8 * self.dim / 3 / 32)
        self.check_size("head_dim", "hidden_dim")
        _require(0 <= self.dropout < 1, f"dropout is {self.dropout}: give --dropout from 0 up to, not including, 1")
        positive = 0 < self.rope_theta < math.inf and 0 < self.norm_eps < math.inf
        _require(positive, f"rope_theta {self.rope_theta} and norm_eps {self.norm_eps} must be above 0, and finite")
        self.check_rope_scaling()
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        hint = f"give --n_kv_head a divisor of {self.n_head}"
        fits = self.n_kv_head >= 1 and self.n_head % self.n_kv_head == 0
        _require(fits, f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}: {hint}")
        uniform = [h * self.n_kv_head // self.n_head for h in range(self.n_head)]
        self.k_groups = self.k_groups or [list(uniform) for _ in range(self.n_layer)]
        self.v_groups = self.v_groups or [list(uniform) for _ in range(self.n_layer)]
        for name in ("k_groups", "v_groups"):
            groups = getattr(self, name)
            _require(len(groups) == self.n_layer, f"{name} has {len(groups)} layers, n_layer is {self.n_layer}")
            for layer, of_head in enumerate(groups):
                dense = len(of_head) == self.n_head and sorted(set(of_head)) == list(range(len(set(of_head))))
                hint = f"give {self.n_head} group numbers, one a head, that skip none from 0 on"
                _require(dense, f"{name}[{layer}] is {of_head}: {hint}")

        self.check_slices()

    def check_size(self, *names: str) -> None:
        for name in names:
            most = LARGEST.get(name, 2**20)
            _require(
                1 <= getattr(self, name) <= most, f"{name} is {getattr(self, name)}: give --{name} from 1 to {most}"
            )

    def check_slices(self) -> None:
        heads = {self.n_head, *(max(groups) + 1 for groups in self.k_groups + self.v_groups)}
        widths = {f"the width of {n} heads": n * self.head_dim for n in sorted(heads)}
        for name, width in {**widths, "hidden_dim": self.hidden_dim, "vocab_size": self.vocab_size}.items():
            fits = self.pretraining_tp >= 1 and width % self.pretraining_tp == 0
            hint = "give --pretraining_tp 1, or a number that does"
            _require(fits, f"pretraining_tp {self.pretraining_tp} does not divide {name}, {width}: {hint}")

    def check_rope_scaling(self) -> None:
        scaling = self.rope_scaling
        if scaling is not None:
            named = set(scaling) == set(ROPE_SCALING) and all(0 < value < math.inf for value in scaling.values())
            ordered = named and scaling["low_freq_factor"] < scaling["high_freq_factor"]
            _require(ordered, f"rope_scaling is {scaling}: give {', '.join(ROPE_SCALING)}, above 0, low below high")

    @property
    def kv_numbers_per_token(self) -> int:
        """Numbers that the KV cache holds for one token: sum over layers of (G_k + G_v) * D."""
        return sum(max(groups) + 1 for groups in self.k_groups + self.v_groups) * self.head_dim


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467), in float32 or wider."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = widen(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rope_angles(
    positions: torch.Tensor, head_dim: int, theta: float, scaling: dict[str, float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each positions.shape + (D/2,), of position * theta^(-2f/D) for each pair f (RoPE, arXiv 2104.09864).

    `scaling` is Llama 3's (arXiv 2407.21783, and its reference code): a pair that turns fewer than low_freq_factor
    times in the original context turns `factor` times slower, one that turns more than high_freq_factor times stays,
    and between them the speed is interpolated. So a model learns a context longer than its first.

    They are made anew in every forward, which costs nothing, because a buffer would be rounded by `model.bfloat16()`:
    in bfloat16 the positions 256 and 257 are the same number.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    if scaling:
        factor, low, high, context = (scaling[name] for name in ROPE_SCALING)
        turns = context * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each interleaved pair (2f, 2f+1) of x (B, H or G, T, D) by the angle of its position."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal self-attention; every query head reads its own key group and its own value group."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.backend = layer, config.head_dim, config.attention
        self.slices = config.pretraining_tp
        self.k_groups, self.v_groups = HeadGroups(config.k_groups[layer]), HeadGroups(config.v_groups[layer])
        heads = config.n_head * config.head_dim
        self.wq = Projection(config.dim, heads)
        self.wk = Projection(config.dim, self.k_groups.n_group * config.head_dim)
        self.wv = Projection(config.dim, self.v_groups.n_group * config.head_dim)
        self.wo = Projection(heads, config.dim)
        self.novel = nn.Linear(config.head_dim, config.head_dim) if config.novel else None
        self.gate = Projection(config.dim, config.n_head) if config.gated else None  # arXiv 2505.06708, head-wise

    def forward(self, x, cos, sin, mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). `mask`, broadcast to (B, H, T, S), is True where a query looks; None is causal."""
        return self.wo(self.heads(x, cos, sin, mask, cache), self.slices, columns=True)

    def project(self, x, cos, sin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, C) -> queries (B, H, T, D), keys (B, G_k, T, D), both turned to their positions, values."""
        wide = (w(x, self.slices) for w in (self.wq, self.wk, self.wv))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in wide)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def heads(self, x, cos, sin, mask: torch.Tensor | None = None, cache: KVCache | None = None) -> torch.Tensor:
        """x (B, T, C) -> the outputs of all heads, side by side (B, T, H * D), which `wo` adds up."""
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = attend(q, k, v, self.k_groups, self.v_groups, mask, self.backend)
        if self.novel is not None:
            y = F.silu(self.novel(y))
        if self.gate is not None:
            y = y * self.gate(x).transpose(1, 2)[..., None].sigmoid()  # (B, H, T, 1)
        return y.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.slices = config.pretraining_tp
        self.w1 = Projection(config.dim, config.hidden_dim)
        self.w2 = Projection(config.hidden_dim, config.dim)
        self.w3 = Projection(config.dim, config.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(self.w1(x, self.slices)) * self.w3(x, self.slices)
        return self.w2(hidden, self.slices, columns=True)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention, self.feed_forward = Attention(config, layer), FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, mask=None, cache=None) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask, cache))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class Llama(nn.Module):
    """Token embeddings, `n_layer` blocks, a norm, and logits over the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep only each block's input and recompute the rest in the backward
        self.compiled_step = None  # see compile_step
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Projection(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Normal(0, 0.02); the projections that add to the residual stream shrink with depth, as in GPT-2, so that
        the stream's variance does not grow with the number of layers."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, targets=None, cache: KVCache | None = None, padding=None) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V); with `targets` (B, T) the loss instead, in nats, summed over the
        targets that are not IGNORE; with `cache` only the last token's logits (B, 1, V), and the cache grows by T.

        padding: (B,) the number of tokens at each row's left that are no text and are not seen. They shift the
        positions of the row, which changes nothing: rotary attention depends on differences of positions alone.
        """
        T, past = tokens.shape[1], cache.length if cache else 0
        positions, mask = torch.arange(past, past + T, device=tokens.device), None
        if padding is not None or (past and T > 1):
            seen = torch.arange(past + T, device=tokens.device)
            mask = seen <= positions[:, None]  # (T, S)
            if padding is not None:  # a padded query sees itself: a row with nothing to see would be NaN
                mask = mask & ((seen >= padding[:, None, None]) | (seen == positions[:, None]))
                mask = mask[:, None]  # (B, 1, T, S)
        c = self.config
        cos, sin = rope_angles(positions, c.head_dim, c.rope_theta, c.rope_scaling)

        x = self.dropout(self.tok_embeddings(tokens))
        if tokens.numel() == 1 and torch.compiler.is_compiling():
            x = widen(x)  # one row costs nothing more in float32
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        logits = self.output(self.norm(x), c.pretraining_tp)
        if targets is None:
            return logits
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def compile_step(self) -> None:
        """From now on compile what adds one token to each text: tens of seconds for the first, a fraction of the time
        for all others. The step is one graph, for any cache and position, since a small model spends most of a token
        on calling kernels from Python. Afterwards the weights may change, but neither their dtype nor the layers,
        which are not looked at again; nor may another model get the graph, hence `isolate_recompiles`."""
        options = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe, "size_asserts": False,
            "cpp.enable_floating_point_contract_flag": "fast",  # w * x + sum in one operation
        }  # fmt: skip
        self.compiled_step = torch.compile(self.forward, dynamic=True, options=options, isolate_recompiles=True)

    def num_params(self) -> int:
        """Weights, tied ones counted once, and those too that are stored in less than a Parameter."""
        stored = sum(layer.num_weights for layer in self.modules() if hasattr(layer, "num_weights"))
        return stored + sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def stream(
        self, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        stop: Sequence[int] = (), use_cache: bool = True, generator: torch.Generator | None = None,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """Yield, token by token, the next token of every prompt; None for a prompt that has met a `stop` token.

        A text also stops after max_new_tokens, or when it fills block_size, so that it is the same in any batch.
        Temperature 0 is greedy; above it, tokens are drawn from the smallest set of probability `top_p` or more
        (arXiv 1904.09751).
        Raises UserError for an empty prompt or one that leaves no room.
        """
        assert not self.training, "call model.eval() first: dropout would change the text"
        longest, room = max(map(len, prompts)), self.config.block_size
        _require(all(prompts), "an empty prompt: give at least one token, such as the tokenizer's BOS")
        _require(longest < room, f"the prompt has {longest} tokens and the model's context {room}: shorten the prompt")
        device = self.tok_embeddings.weight.device
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        padding = torch.tensor([longest - len(p) for p in prompts], device=device)
        padding = padding if padding.any() else None
        most = [min(max_new_tokens, room - len(p)) for p in prompts]
        cache = KVCache(self.config, longest + max(most)) if use_cache else None  # by padding, maybe beyond block_size
        stopped, stop, step = [False] * len(prompts), set(stop), tokens
        for count in range(1, max(most) + 1):
            forward = self.compiled_step if self.compiled_step and cache and cache.length else self
            logits = forward(step if cache else tokens, cache=cache, padding=padding)[:, -1]
            step = pick_token(logits, temperature, top_p, generator)  # (B, 1)
            new = step[:, 0].tolist()
            stopped = [s or t in stop for s, t in zip(stopped, new)]
            if all(stopped):
                return
            yield [None if s else t for s, t in zip(stopped, new)]
            stopped = [s or count >= m for s, m in zip(stopped, most)]
            tokens = tokens if cache else torch.cat((tokens, step), dim=1)

    def generate(self, prompts: list[list[int]], max_new_tokens: int, **how) -> list[list[int]]:
        """The new tokens of every prompt, without the prompt and the stop token; `how` as for `stream`."""
        steps = list(self.stream(prompts, max_new_tokens, **how))
        return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


def pick_token(logits: torch.Tensor, temperature: float, top_p: float, generator=None) -> torch.Tensor:
    """logits (B, V) -> the next tokens (B, 1): the likeliest at temperature 0, else one drawn from the nucleus."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = widen(logits)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the likeliest at 0: no temperature overflows
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier tokens; the first always stays
    drawn = torch.multinomial(probabilities.masked_fill(before >= top_p, 0), 1, generator=generator)
    return order.gather(-1, drawn)
