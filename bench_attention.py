"""What fused attention buys: the two tables of `bench.py attention` and `bench.py kernel`.

The first repeats a published experiment, flash or textbook attention with pretraining_tp 1 or 2 in a QLoRA fine-tune,
whose four runs were in truth two: the adapter's library had set pretraining_tp back to 1. Here every row must have
computed its own attention and no other. The second times the kernels by themselves.
"""

import contextlib
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from pathlib import Path

import torch

import attention
import train
from attention import HeadGroups
from checkpoint import build_model, load
from config import UserError
from device import pick_device
from lora import LoRAConfig

NEW_TOKENS, PROMPT = 100, 16
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def alone(name: str, function, *args):
    """function(*args) in a process of its own, whose peak memory is the row's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(f"out of memory in {name!r}: give a smaller --batch_size or model") from None


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Assert that inside this context no attention but this is computed, and this is. Where blocks and sdpa take the
    textbook's way, as they say they do, that is theirs; where triton leaves something to another, that counts."""
    calls, depth = Counter(), Counter()
    plain = {name: getattr(attention, name) for name in ("naive", "blocks", "sdpa", "triton")}

    def counted(name: str) -> Callable:
        def count(*args):
            calls[name] += not (depth["sdpa"] or depth["blocks"])
            depth[name] += 1
            out = plain[name](*args)
            depth[name] -= 1
            return out

        return count

    for name in plain:
        setattr(attention, name, counted(name))
    try:
        yield
    finally:
        for name, compute in plain.items():
            setattr(attention, name, compute)
    assert +calls == Counter({backend: calls[backend]}) != Counter(), f"--attention {backend} computed {dict(calls)}"


def finetune(init_from: str, flags: list[str], lora: LoRAConfig, backend: str, slices: int, folder: str) -> dict:
    """Train a QLoRA adapter, into folder/ckpt.pt; in a process of its own, whose peak memory is the row's.

    Returns the loss on the val split (nats a token), seconds of training, the median milliseconds of a step and peak
    bytes. On a GPU the first two steps of triton hold its compiling and its tuning, whose 256 MB are in the peak.
    """
    sys.argv = ["train.py", "--init_from", init_from, "--attention", backend, "--pretraining_tp", str(slices)]
    sys.argv += ["--quantize", "nf4", "--lora_r", str(lora.lora_r), "--lora_alpha", str(lora.lora_alpha)]
    sys.argv += ["--lora_dropout", str(lora.lora_dropout), "--lora_targets", *lora.lora_targets]
    sys.argv += [*flags, "--out_dir", folder]
    with only(backend), contextlib.redirect_stdout(io.StringIO()):
        train.main()
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "ms" in record]
    return {
        "attention": backend, "pretraining_tp": slices, "val_loss": records[-1]["val_loss"],
        "training_s": steps[-1]["seconds"], "step_ms": statistics.median(record["ms"] for record in steps[1:]),
        "peak": records[-1]["peak_memory_bytes"],
    }  # fmt: skip


def generation_seconds(paths: list[Path], backends: list[str], device: torch.device, texts: int) -> list[float]:
    """The median seconds of a greedy text by each checkpoint, which take turns, since a machine has its moods."""
    models = [build_model(load(path)).to(device).eval() for path in paths]
    seconds, generator = [[] for _ in models], torch.Generator().manual_seed(0)
    c = models[0].config
    for _ in range(texts):
        prompt = torch.randint(c.vocab_size, (PROMPT,), generator=generator).tolist()
        for model, backend, own in zip(models, backends, seconds):
            with only(backend):
                began = time.perf_counter()
                model.generate([prompt], min(NEW_TOKENS, c.block_size - PROMPT))
                own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in seconds]


def attention_table(config, lora: LoRAConfig) -> list[dict]:
    """A row for every attention that runs here, with pretraining_tp 1 and 2: `finetune`'s, and generation_s."""
    if config.init_from is None:
        raise UserError("attention fine-tunes a trained model: give --init_from ckpt.pt")
    steps = 10 * config.steps
    flags = ["--max_steps", steps, "--warmup_steps", steps // 10, "--eval_every", steps, "--device", config.device]
    flags += ["--batch_size", config.batch_size, *(["--dataset", config.dataset] if config.dataset else [])]
    c, device = load(config.init_from)["config"], pick_device(config.device)
    if c["block_size"] <= PROMPT:
        raise UserError(f"{config.init_from} has a context of {c['block_size']}: give a model of more than {PROMPT}")
    gpu = device.type == "cuda" and attention.triton_runs(device, torch.float32, c["head_dim"])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for backend, slices in product(("naive", "blocks", "sdpa", *["triton"] * gpu), (1, 2)):
            name = f"{backend}, pretraining_tp {slices}"
            print(f"training: {name}", file=sys.stderr, flush=True)
            how = (config.init_from, [str(flag) for flag in flags], lora, backend, slices, f"{folder}/{len(rows)}")
            rows.append(alone(name, finetune, *how))
        paths = [Path(folder) / str(i) / "ckpt.pt" for i in range(len(rows))]
        times = generation_seconds(paths, [row["attention"] for row in rows], device, 4 * config.steps)
    return [{**row, "generation_s": seconds} for row, seconds in zip(rows, times)]


def print_attention(rows: list[dict]) -> None:
    print(f"{'attention':12}{'tp':>3}{'val loss':>11}{'training':>11}{'a step':>11}{'peak':>12}{'100 tokens':>13}")
    for row in rows:
        times = f"{row['training_s']:>9.1f} s{row['step_ms']:>8.0f} ms{row['peak'] / 2**20:>8.0f} MiB"
        head = f"{row['attention']:12}{row['pretraining_tp']:>3}{row['val_loss']:>11.6f}"
        print(f"{head}{times}{row['generation_s']:>11.3f} s")


# ---- the kernels by themselves ----


def maps(H: int) -> dict[str, tuple[HeadGroups, HeadGroups]]:
    """Groups to compare: a head each, a quarter of the heads in equal runs, and about as many in uneven groups."""
    quarter = max(1, H // 4)
    equal = HeadGroups([h * quarter // H for h in range(H)])
    uneven = [HeadGroups([max(0, h - H + n) for h in range(H)]) for n in (max(1, H * 3 // 8), max(1, H // 8))]
    return {"every head": (HeadGroups(list(range(H))),) * 2, "equal": (equal, equal), "uneven": tuple(uneven)}


def timed(name: str, heads: tuple[HeadGroups, HeadGroups], q, k, v, milliseconds: Callable) -> dict[str, float]:
    """Milliseconds of each direction of this attention, and of no other that took its place."""
    inputs, token, grad = (q, k, v), q.detach()[:, :, -1:], torch.randn_like(q)
    with only(name):
        way = getattr(attention, name)
        out = way(*inputs, *heads, None)
        found = {"backward": milliseconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))}
        with torch.no_grad():
            found["forward"] = milliseconds(lambda: way(*inputs, *heads, None))
            found["decode"] = milliseconds(lambda: way(token, k, v, *heads, None))
    return found


def kernel_rows(B: int, H: int, D: int, T: int, device: torch.device, milliseconds: Callable) -> list[dict]:
    """{groups, direction, attention, T, ms, operations, bytes} of every attention for B texts of T tokens.

    milliseconds(run) times one call. Operations and bytes are those that flash_attention.py counts for itself, seven or
    eight products in the backward; the others, which may need fewer, are measured by the same.
    """
    from flash_attention import FUSED, decode_kernel, forward_kernel, grad_kv_kernel, grad_q_kernel

    rows = []
    for groups, heads in maps(H).items():
        heads = tuple(x.to(device) for x in heads)
        sizes = H, heads[0].n_group, heads[1].n_group
        q, k, v = (torch.randn(B, n, T, D, device=device, dtype=torch.bfloat16, requires_grad=True) for n in sizes)
        sums, tokens, both = B * H * T * D, 2 * B * T * D, sizes[1] + sizes[2]
        one_map = heads[0].of_list == heads[1].of_list and D <= FUSED
        backward = 6 * H + 3 * both if one_map else 8 * H + 4 * sizes[1] + 3 * sizes[2]
        work = {  # operations, bytes
            "forward": (2 * sums * T, tokens * (2 * H + both)),
            "backward": ((7 if one_map else 8) * sums * T, tokens * backward),
            "decode": (4 * sums, tokens * both),
        }
        for kernel in (forward_kernel, grad_q_kernel, grad_kv_kernel, decode_kernel):
            kernel.cache.clear()  # tuned anew for these groups and this length
        for name in ("triton", "sdpa", "naive"):
            if name == "naive" and 4 * B * H * T * T > 2**33:
                continue  # scores, weights and their gradients would not fit
            for direction, ms in timed(name, heads, q, k, v, milliseconds).items():
                row = {"groups": groups, "direction": direction, "attention": name, "T": T, "ms": ms}
                rows.append({**row, "operations": work[direction][0], "bytes": work[direction][1]})
    return rows


def kernel_table(config, H: int, D: int) -> dict:
    """Rows of all lengths, and this GPU's own speed in a product (operations/s) and in a copy (bytes/s)."""
    device = pick_device(config.device)
    if device.type != "cuda" or not attention.triton_runs(device, torch.bfloat16, D):
        raise UserError(f"kernel times Triton on a GPU, and this is {device}: `bench.py attention` runs anywhere")
    from triton.testing import do_bench

    def milliseconds(run: Callable) -> float:
        return do_bench(run, warmup=50, rep=200, return_mode="median")

    square, block = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), torch.empty(2**28, device=device)
    peak = 2 * 8192**3 / milliseconds(lambda: square @ square) * 1e3
    bandwidth = 2 * block.nbytes / milliseconds(block.clone) * 1e3
    rows = [row for T in LENGTHS for row in kernel_rows(config.batch_size, H, D, T, device, milliseconds)]
    return {"gpu": torch.cuda.get_device_name(device), "peak": peak, "bandwidth": bandwidth, "rows": rows}


def print_kernel(found: dict) -> None:
    print(f"{found['gpu']}: {found['peak'] / 1e12:.0f} TFLOP/s in a product, {found['bandwidth'] / 1e12:.2f} TB/s")
    print(f"{'groups':12}{'direction':11}{'attention':10}{'T':>7}{'time':>13}{'TFLOP/s':>10}{'of peak':>9}")
    for row in found["rows"]:
        speed = row["operations"] / row["ms"] * 1e3
        share = row["bytes"] / row["ms"] * 1e3 / found["bandwidth"]
        share = share if row["direction"] == "decode" else speed / found["peak"]
        head = f"{row['groups']:12}{row['direction']:11}{row['attention']:10}{row['T']:>7,}"
        print(f"{head}{row['ms']:>10.3f} ms{speed / 1e12:>10.1f}{100 * share:>8.1f}%")
