"""What the tests share: a small data set made of this project's own source, a runner for the commands, and the bridge
to Hugging Face's Llama, the implementation that ours is compared with."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece as spm
import torch

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # the products of tiny models are too small to share
ONE_THREAD.pop("TRITON_INTERPRET", None)  # of pytest's first process, whose workers this file is read in again
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton; what `command` starts does not get it

import config
from data.prepare import PrepareConfig, prepare
from model import Llama, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
OWN_TEXT = [str(ROOT / f"{name}.py") for name in ("checkpoint", "config", "dataset", "model", "sample", "train")]
TINY = {"n_layer": 2, "n_head": 4, "dim": 32, "hidden_dim": 48, "vocab_size": 64, "block_size": 64}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A prepared data set: some of the project's own .py files, 400 pieces."""
    folder = tmp_path_factory.mktemp("data") / "own"
    return prepare(PrepareConfig("own", text=OWN_TEXT, vocab_size=400, out=str(folder)))


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tmp_path_factory) -> Path:
    """The ckpt.pt of a short run."""
    out = tmp_path_factory.mktemp("run")
    done = command("train.py", *small_run(tiny_data, out), "--max_steps", 30, "--lr", 0.01, "--warmup_steps", 5)
    assert done.returncode == 0, done.stderr
    return out / "ckpt.pt"


@pytest.fixture(scope="session")
def prefixed():
    """A SentencePiece model that puts a space before every text, as Llama 2's and llama2.c's do."""
    model = io.BytesIO()
    text = (ROOT / "train.py").read_text().splitlines() + ["café"] * 200  # a piece that has more bytes than characters
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=500, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def small_run(data: Path, out: Path) -> list:
    """Flags of a training run that takes a second or two."""
    shape = ["--n_layer", 2, "--n_head", 4, "--dim", 32, "--block_size", 32, "--batch_size", 4]
    return ["--dataset", data, "--out_dir", out, *shape, "--eval_tokens", 512]


def command(script: str, *args, **how) -> subprocess.CompletedProcess:
    """Run one of the project's commands as a user would."""
    line = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, env=ONE_THREAD, **{"cwd": ROOT, **how})


def quick(script: str, *args) -> subprocess.CompletedProcess:
    """As `command`, but inside this process, which has imported torch already."""
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config.exit_cleanly(main)
    except SystemExit as leave:
        code = leave.code
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(args, code or 0, out.getvalue(), err.getvalue())


def refused(done, *words):
    """Exit code 2, one line on stderr that has the words, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr or done.stdout}"
    assert "Traceback" not in done.stderr and "error: " in lines[-1], done.stderr
    assert sum("error: " in line for line in lines) == 1 and len(lines[-1]) < 500
    for word in words:
        assert str(word) in lines[-1], lines[-1]


def start_command(script: str, *args) -> subprocess.Popen:
    line = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD)


def assert_close(ours, theirs, tolerance, what=""):
    worst = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
    assert worst <= tolerance, f"{what}: largest difference is {worst:.2e} of the largest value, above {tolerance:.0e}"


def sharp_model(seed: int = 0, **settings) -> Llama:
    """A tiny model in eval mode whose weights are large enough that its predictions differ clearly from each other."""
    torch.manual_seed(seed)
    model = Llama(ModelConfig(**{**TINY, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() == 2 else p.add_(0.1 * torch.randn_like(p))
    return model


def to_hugging_face(model: Llama):
    """LlamaForCausalLM with the same weights. It turns the pairs (f, f + D/2) where Meta's Llama turns (2f, 2f + 1)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    theirs = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.block_size, rope_theta=c.rope_theta, tie_word_embeddings=c.tie_embeddings,
        attn_implementation="eager", bos_token_id=1, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    twin = LlamaForCausalLM(theirs)

    def half_split(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(-1, c.head_dim // 2, 2, c.dim).transpose(1, 2).reshape(weight.shape)

    state = {"model.embed_tokens.weight": model.tok_embeddings.weight, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = model.output.weight
    for i, layer in enumerate(model.layers):
        attention, ffn, at = layer.attention, layer.feed_forward, f"model.layers.{i}."
        state[at + "self_attn.q_proj.weight"] = half_split(attention.wq.weight)
        state[at + "self_attn.k_proj.weight"] = half_split(attention.wk.weight)
        state[at + "self_attn.v_proj.weight"] = attention.wv.weight
        state[at + "self_attn.o_proj.weight"] = attention.wo.weight
        for name, ours in (("gate_proj", ffn.w1), ("down_proj", ffn.w2), ("up_proj", ffn.w3)):
            state[f"{at}mlp.{name}.weight"] = ours.weight
        state[at + "input_layernorm.weight"] = layer.attention_norm.weight
        state[at + "post_attention_layernorm.weight"] = layer.ffn_norm.weight
    twin.load_state_dict(state, strict=True)
    return twin.eval()
