"""Cross-entropy that holds the logits once, and in float32 but a chunk of them.

The plain loss keeps four more things of the size of the logits for a while, three of them in float32: the logits,
widened; their log-softmax; its gradient; and that, narrowed. With a vocabulary of 32,000 this is most of a step's
memory. The gradient, softmax(logits) - onehot(target), is known as soon as the loss is, so both are computed here chunk
by chunk, and the gradient takes the place of the logits.
"""

import torch

IGNORE = -1  # a target that carries no loss
# logits that a CPU widens at a time: 2 MiB in float32, which stay in its cache; a GPU takes 64 times as many
CHUNK = 2**19
# the gradient waits times this: in float16, which has no number between 0 and 6e-8, small probabilities would be lost
RAISED = 2.0**14


def widen(x: torch.Tensor) -> torch.Tensor:
    """At least float32, for sums that bfloat16 and float16 would round away; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CrossEntropy(torch.autograd.Function):
    """logits (N, V), targets (N,) -> the sum, over the targets that are not IGNORE, of -log softmax(logits)[target]."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total, gradient = 0, logits.detach() if ctx.needs_input_grad[0] else None
        rows = max(1, (CHUNK if logits.device.type == "cpu" else 64 * CHUNK) // logits.shape[1])
        for begin in range(0, len(logits), rows):
            log_p, y = widen(logits[begin : begin + rows]).log_softmax(-1), targets[begin : begin + rows, None]
            counted = y != IGNORE
            y = y.where(counted, 0)
            total = total - log_p.gather(-1, y).where(counted, 0).sum()
            if gradient is not None:
                p = log_p.exp_().scatter_add_(-1, y, -torch.ones_like(y, dtype=log_p.dtype))
                gradient[begin : begin + rows] = p.mul_(counted * RAISED)
        ctx.gradient = gradient
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss: torch.Tensor):
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the loss can be differentiated once: its gradient has been given away"
        return gradient.mul_(of_loss / RAISED), None


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (N, V), targets (N,) int64 -> nats, summed over the targets that are not IGNORE; float32 or wider.

    Where gradients are recorded the logits are overwritten: they must be nobody else's.
    """
    return CrossEntropy.apply(logits, targets)
