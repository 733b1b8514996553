"""How fast a model of random weights trains, evaluates and writes here, and where a training step spends its time:
`bench.py train` and `bench.py generate`; and how long checkpoints take to write: `bench.py latency`."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import build_model, load
from config import UserError
from dataset import Batch
from device import autocast, check_compiler, compiles_by_itself, peak_memory_bytes, pick_device, pick_dtype
from model import Llama, ModelConfig
from settings import TrainConfig, compiling_pays
from train import forward_backward, make_optimizers, update

PRODUCTS = {"aten::mm": "matmuls", "aten::addmm": "matmuls", "aten::bmm": "attention", "aten::baddbmm": "attention"}
WHOLE = {"CrossEntropy": "cross-entropy", "CrossEntropyBackward": "cross-entropy"}
WHOLE |= {f"aten::_scaled_dot_product_flash_attention_for_cpu{end}": "attention" for end in ("", "_backward")}


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def operations(c: ModelConfig, model: Llama) -> float:
    """Floating-point operations that training on one token needs: 2 for each weight of a matrix in the forward and 4 in
    the backward, and as often those of the scores and values that a causal mask lets it see, on average half."""
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    matrices += 0 if c.tie_embeddings else -model.tok_embeddings.weight.numel()  # a lookup is no product
    matrices += c.n_layer * (c.n_head - 1) * c.head_dim**2 if c.novel else 0  # one matrix, but a product for each head
    return 6 * (matrices + c.n_layer * c.n_head * c.head_dim * c.block_size)


def product_rate(rows: int, c: ModelConfig, dtype: torch.dtype) -> float:
    """Operations a second, on a CPU, of the product that a feed-forward begins with."""
    x, w = torch.randn(rows, c.dim, dtype=dtype), torch.randn(c.hidden_dim, c.dim, dtype=dtype)
    return 2 * rows * c.dim * c.hidden_dim / statistics.median(timed(lambda: x @ w.T) for _ in range(20))


def parts(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Seconds of a forward and a backward by part, from the profiler; what no name claims is element-wise."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = timed(lambda: [step() for _ in range(steps)])
    found = dict.fromkeys(("matmuls", "attention", "cross-entropy"), 0.0)
    for event in profile.key_averages():
        if event.key in PRODUCTS:
            found[PRODUCTS[event.key]] += event.self_cpu_time_total / 1e6
        elif event.key in WHOLE:
            found[WHOLE[event.key]] += event.cpu_time_total / 1e6
    return {name: time / steps for name, time in {**found, "element-wise": seconds - sum(found.values())}.items()}


def train_speed(c: ModelConfig, config) -> dict:
    """Tokens a second of training and of a forward without gradients, in the same blocks, seconds of the first step,
    peak GiB; and, on a CPU, the `shares` of a step by part, the rate of a product alone, and the share of that rate at
    which the whole step runs."""
    device = pick_device(config.device)
    dtype, train = pick_dtype(config.dtype, device), TrainConfig(optimizer=config.optimizer, compile=config.compile)
    torch.manual_seed(0)
    model = Llama(c).to(device).train()
    compiled = compiling_pays(train, c, 2**60, model.num_params(), device)  # tokens of a long run
    for layer in model.layers if compiled else ():
        layer.compile()
    optimizers = make_optimizers(model, train)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator, tokens = torch.Generator().manual_seed(0), config.batch_size * c.block_size

    def batch() -> list[Batch]:
        text = torch.randint(c.vocab_size, (config.batch_size, c.block_size + 1), generator=generator)
        return [(text[:, :-1].contiguous(), text[:, 1:].contiguous())]

    def learn(batches: list[Batch]) -> None:
        forward_backward(model, batches, dtype, scaler)

    def step() -> list[float]:
        batches: list[Batch] = []
        data = timed(lambda: batches.extend(batch()))
        return [data, timed(lambda: learn(batches)), timed(lambda: update(model, optimizers, scaler, train, 5e-4))]

    @torch.no_grad()
    def evaluate() -> None:
        (x, y), *_ = batch()
        with autocast(device, dtype):
            model(x.to(device), y.to(device)).item()

    steps = [step() for _ in range(config.steps + 2)]
    seconds, peak = statistics.median(map(sum, steps[2:])), peak_memory_bytes(device)
    found = {"train_tok_s": tokens / seconds, "first_step_s": sum(steps[0]), "peak_gb": peak / 2**30}
    found |= {"compiled": compiled, "dtype": str(dtype).removeprefix("torch."), "params": model.num_params()}
    if device.type == "cpu":
        rate = product_rate(tokens, c, dtype)
        data, _, optimizer = (statistics.median(times) for times in zip(*steps[2:]))
        batches = batch()
        of_part = {**parts(lambda: learn(batches), 3), "optimizer": optimizer, "data": data}
        found |= {"shares": {name: time / sum(of_part.values()) for name, time in of_part.items()}}
        found |= {"matmul_gflops": rate / 1e9, "matmul_share": operations(c, model) * tokens / seconds / rate}
    model.eval()
    found["eval_tok_s"] = tokens / statistics.median([timed(evaluate) for _ in range(config.steps + 2)][2:])
    return found


def print_train(found: dict) -> None:
    how = found["dtype"] + (", compiled" if found["compiled"] else "")
    print(f"{found['params']:,} parameters, {how}")
    print(f"training    {found['train_tok_s']:>9,.0f} tokens/s")
    print(f"evaluation  {found['eval_tok_s']:>9,.0f} tokens/s")
    print(f"first step  {found['first_step_s']:>9.1f} s")
    print(f"peak memory {found['peak_gb']:>9.2f} GiB")
    if "shares" in found:
        print("a step      " + ", ".join(f"{name} {100 * share:.1f}%" for name, share in found["shares"].items()))
        whole = f"the whole step runs at {100 * found['matmul_share']:.0f}% of that"
        print(f"one product {found['matmul_gflops']:>9.0f} GFLOP/s; {whole}")


def generate_speed(c: ModelConfig, config) -> dict:
    """Tokens a second of `batch` greedy texts that begin with one token and fill the context; compiling not counted."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    torch.manual_seed(0)
    model = Llama(c).to(device, dtype).eval()
    compiled = compiles_by_itself(device) if config.compile is None else config.compile
    if compiled:
        check_compiler(device)
        model.compile_step()
    new = c.block_size - 1
    seconds = [timed(lambda: model.generate([[1]] * config.batch, new)) for _ in range(config.steps + 1)]
    found = {"tok_s": config.batch * new / statistics.median(seconds[1:]), "first_text_s": seconds[0]}
    return {**found, "batch": config.batch, "compiled": compiled, "dtype": str(dtype).removeprefix("torch.")}


def print_generate(found: dict) -> None:
    how = found["dtype"] + (", compiled" if found["compiled"] else "")
    print(f"{found['tok_s']:,.0f} tokens/s, {found['batch']} texts at a time, {how}")
    print(f"the first took {found['first_text_s']:.1f} s")


def latencies(config) -> list[dict]:
    """{ckpt, params, layers, median, p5, p95, tokens} of each checkpoint: milliseconds of a greedy text of 64 tokens,
    or as many as all contexts have room for, in the checkpoint's number format, compiled with --compile. They take
    turns, since a machine has its moods."""
    if not config.ckpts:
        raise UserError("latency is of trained models: give --ckpts a/ckpt.pt b/ckpt.pt ...")
    device, seconds = pick_device(config.device), {path: [] for path in config.ckpts}
    models = {path: build_model(load(path)).to(device).eval() for path in config.ckpts}
    if config.compile:
        check_compiler(device)
        for model in models.values():
            model.compile_step()
    new = min(64, *(model.config.block_size - 1 for model in models.values()))
    for turn in tqdm(range(config.steps + 1), desc="writing", disable=None, leave=False):
        for path, model in models.items():
            spent = timed(lambda model=model: model.generate([[1]] * config.batch, new))
            seconds[path] += [spent] if turn else []  # the first sets things up
    rows = []
    for path, model in models.items():
        p5, median, p95 = (1000 * np.percentile(seconds[path], (5, 50, 95))).tolist()
        sizes = {"params": model.num_params(), "layers": model.config.n_layer}
        rows.append({"ckpt": path, **sizes, "median": median, "p5": p5, "p95": p95, "tokens": new})
    return rows


def print_latencies(rows: list[dict]) -> None:
    width = max(len(row["ckpt"]) for row in rows)
    print(f"{'':{width}}{'layers':>8}{'parameters':>14}{'median':>12}{'p5':>12}{'p95':>12}")
    for row in rows:
        times = "".join(f"{row[key]:>9.1f} ms" for key in ("median", "p5", "p95"))
        print(f"{row['ckpt']:{width}}{row['layers']:>8}{row['params']:>14,}{times}")
