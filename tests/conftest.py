"""What the tests share: a small data set, a trained model, runners for the commands, transformers' Llama."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the programs of this folder, which pytest does not start
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # the products of tiny models are too small to share
ONE_THREAD.pop("TRITON_INTERPRET", None)  # set below in pytest's first process, whose workers inherit it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; what `command` starts does not get it

from corpus import write_corpus

import common
from checkpoint import load
from data.prepare import learned
from lora import LoRAConfig, adapt, adapters
from model import Llama, ModelConfig

torch.set_num_threads(1)
TINY = {"n_layer": 2, "n_head": 4, "dim": 32, "hidden_dim": 48, "vocab_size": 64, "block_size": 64}
PARTS = "attention.wq attention.wk attention.wv attention.wo feed_forward.w1 feed_forward.w3 feed_forward.w2"
PARTS += " attention_norm ffn_norm"  # of a block, in the order of the transformers library


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """The generated corpus, prepared with 400 pieces."""
    text, folder = write_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("data") / "own"
    run("data/prepare.py", "own", "--text", *text, "--vocab_size", 400, "--out", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tmp_path_factory) -> Path:
    """The ckpt.pt of a short run."""
    flags = small_run(tiny_data, out := tmp_path_factory.mktemp("run"))
    run("train.py", *flags, "--max_steps", 30, "--lr", 0.01, "--warmup_steps", 5)
    return out / "ckpt.pt"


@pytest.fixture
def uncompiled(monkeypatch):
    """What sample.py would compile runs as it is."""
    monkeypatch.setattr("sample.compiler_missing", lambda device: None)
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=lambda step, **options: step))


@pytest.fixture(scope="session")
def prefixed(tmp_path_factory):
    """A SentencePiece model that puts a space before every text, as Llama 2's and llama2.c's do."""
    text = "".join(path.read_text("utf-8") for path in write_corpus(tmp_path_factory.mktemp("corpus")))
    with mock.patch.dict("data.prepare.SETTINGS", add_dummy_prefix=True):
        return learned(text.splitlines(), 500).sp


def small_run(data: Path, out: Path) -> list:
    """Flags of a training run that takes a second or two."""
    shape = ["--n_layer", 2, "--n_head", 4, "--dim", 32, "--block_size", 32, "--batch_size", 4]
    return ["--dataset", data, "--out_dir", out, *shape, "--eval_tokens", 512]


def typed(name: str, *args) -> list[str]:
    """What a user types to run a script, such as train.py, or a package, such as formats."""
    program = [str(ROOT / name)] if name.endswith(".py") else ["-m", name.removeprefix("-m ")]
    return [sys.executable, *program, *map(str, args)]


def command(name: str, *args, **how) -> subprocess.CompletedProcess:
    """Run one of the project's commands as a user would."""
    how = {"cwd": ROOT, "env": ONE_THREAD, "timeout": 240, **how}
    return subprocess.run(typed(name, *args), capture_output=True, text=True, **how)


def start_command(name: str, *args) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(typed(name, *args), text=True, cwd=ROOT, env=ONE_THREAD, **pipes)


def quick(name: str, *args) -> subprocess.CompletedProcess:
    """As `command`, but inside this process, which has imported torch already."""
    module = name.removesuffix(".py") if name.endswith(".py") else name.removeprefix("-m ") + "/__main__"
    main = importlib.import_module(module.replace("/", ".")).main
    out, err, code = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO(), 0
    argv, signals = mock.patch.object(sys, "argv", [name, *map(str, args)]), mock.patch("signal.signal")
    with argv, signals, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.exit_cleanly(main)
        except SystemExit as leave:
            code = leave.code or 0
        out.flush()
    return subprocess.CompletedProcess(args, code, out.buffer.getvalue().decode(), err.getvalue())


def run(name: str, *args) -> subprocess.CompletedProcess:
    """As `quick`, a command that must succeed."""
    done = quick(name, *args)
    assert done.returncode == 0, done.stderr
    return done


def refused(done, *words):
    """Exit code 2, one line on stderr that has the words, no traceback."""
    *before, last = done.stderr.strip().splitlines() or [""]
    assert done.returncode == 2 and "Traceback" not in done.stderr, f"{done.returncode}: {done.stderr}"
    assert "error: " in last and "error: " not in "".join(before) and len(last) < 500, done.stderr
    assert not [word for word in words if str(word) not in last], last


def assert_close(ours, theirs, tolerance, what=""):
    worst = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
    assert worst <= tolerance, f"{what}: the largest difference is {worst:.2e} of the largest value"


def records(path: Path) -> list[dict]:
    """The whole lines of a JSONL file; a killed process may leave half a line."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def logged(out: Path, key: str) -> dict:
    """{step: value} of all lines of a run's log that have the key."""
    return {line["step"]: line[key] for line in records(out / "log.jsonl") if key in line}


def content(path: Path) -> object:
    """What must be equal in two files that the same command wrote: no seconds, no folder's name."""
    if path.suffix == ".pt":
        found = load(path)
        tensors = [(x.dtype, x.tolist()) for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        return found["config"], found["tokenizer"], list(found["model"]), tensors
    if path.name == "log.jsonl":
        numbers = ("step", "loss", "norm", "val_loss")
        return [[r.get(key) for key in numbers] for r in records(path) if {"loss", "val_loss"} & {*r}]
    if path.name == "groups.json":
        return [json.loads(path.read_text())[key] for key in ("k_groups", "v_groups", "loss", "kl", "judged")]
    return path.name if path.name == "groups.jsonl" else path.read_bytes()


def tokens_of(shape: tuple, seed: int = 0, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """The model in eval mode, with random weights so large that its predictions differ clearly."""
    for p in model.parameters():
        p.normal_(std=0.2) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def sharp_model(seed: int = 0, **settings) -> Llama:
    torch.manual_seed(seed)
    return sharpened(Llama(ModelConfig(**{**TINY, **settings})))


def adapted(model: Llama, std: float = 0.2, **settings) -> Llama:
    """The model with an adapter (see LoRAConfig) whose B is not zero, as after training."""
    for layer in adapters(adapt(model, LoRAConfig(**settings))):
        torch.nn.init.normal_(layer.lora_B, std=std)
    return model


def to_hugging_face(model: Llama):
    """The same weights in LlamaForCausalLM, which turns pairs (f, f + D/2), Meta's turns (2f, 2f + 1)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    sizes = {"vocab_size": c.vocab_size, "hidden_size": c.dim, "intermediate_size": c.hidden_dim}
    sizes |= {"num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "head_dim": c.head_dim}
    sizes |= {"num_key_value_heads": c.n_kv_head, "max_position_embeddings": c.block_size}
    how = {"rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tie_embeddings}
    how |= {"rope_scaling": c.rope_scaling and {"rope_type": "llama3", **c.rope_scaling}}
    twin = LlamaForCausalLM(LlamaConfig(**sizes, **how, eos_token_id=None, attn_implementation="eager"))
    names = [f"layers.{i}.{part}" for i in range(c.n_layer) for part in PARTS.split()]
    for name, theirs in zip(["tok_embeddings", *names, "norm", "output"], twin.parameters()):
        ours = model.get_parameter(f"{name}.weight").data
        if name.endswith(("wq", "wk")):
            ours = ours.view(-1, c.head_dim // 2, 2, c.dim).transpose(1, 2).reshape(ours.shape)
        theirs.data.copy_(ours)
    return twin.eval()
