"""Other programs' checkpoints in and out, against transformers, safetensors, sentencepiece and tokenizers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ONE_THREAD, ROOT, assert_close, quick, refused, sharp_model
from foreign import (
    LLAMA3,
    TEXTS,
    checkpoint_of,
    export_of,
    logits,
    run,
    save_folder,
    their_model,
    write_llama2c,
    write_llama2c_tokenizer,
)  # fmt: skip
from safetensors.torch import load_file, save_file

from checkpoint import build, build_model, load, save
from hugging_face import uniform_heads
from model import ROPE_SCALING, ModelConfig

TOLERANCE = 1e-5  # of the largest logit: some hundred float32 roundings of 6e-8, in another order


@pytest.mark.parametrize(
    "settings, how",
    [
        ({}, "safetensors"),
        ({"num_key_value_heads": 2}, "safetensors shards"),
        ({"num_key_value_heads": 1, "head_dim": 12}, "bin"),
        ({"num_key_value_heads": 2, "tie_word_embeddings": True}, "bin shards"),
        ({"tie_word_embeddings": True}, "safetensors"),
        ({"num_key_value_heads": 2, "rope_parameters": LLAMA3}, "safetensors"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "safetensors"),
    ],
)
def test_hugging_face_folder_comes_back_bit_equal(tmp_path, settings, how):
    from transformers import LlamaForCausalLM

    theirs = their_model(**settings)
    folder = save_folder(theirs, tmp_path / "in", how)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run("import", folder, tmp_path / "ours.pt")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # permuted in place, but not there
    assert_close(logits(build_model(load(tmp_path / "ours.pt"))), logits(theirs), TOLERANCE, "logits")
    run("export", tmp_path / "ours.pt", tmp_path / "out")
    back, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(back.eval()), logits(theirs))
    for name, p in theirs.state_dict().items():
        assert torch.equal(p, back.state_dict()[name]), name


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": None, "max_position_embeddings": None, "rope_theta": None},  # what a missing one means
        {"rope_theta": 300.0, "rope_scaling": {**LLAMA3, "rope_theta": None}},
        {"rope_scaling": {**LLAMA3, "rope_theta": None, "original_max_position_embeddings": None}},
        {"tie_word_embeddings": True, "num_key_value_heads": None, "hidden_act": "swish"},
    ],
)
def test_folder_of_transformers_4(tmp_path, change):
    """Its config.json has no rope_parameters, its pytorch_model.bin a tied lm_head and the buffers of RoPE."""
    from transformers import LlamaForCausalLM

    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
        "max_position_embeddings": 64, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 2e-3, "rope_scaling": None, "rope_theta": 5000.0,
        "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.31.0", "vocab_size": 64,
    }  # fmt: skip
    config = {name: value for name, value in {**config, **change}.items() if value is not None or name not in change}
    if config["rope_scaling"]:
        config["rope_scaling"] = {name: value for name, value in config["rope_scaling"].items() if value is not None}
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    state = their_model(tie_word_embeddings=config["tie_word_embeddings"]).state_dict()
    save_file({name: x.clone() for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(folder).eval()
    (folder / "model.safetensors").unlink()
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    state["lm_head.weight"] = state[
        "model.embed_tokens.weight" if theirs.config.tie_word_embeddings else "lm_head.weight"
    ]
    torch.save({**state, **buffers}, folder / "pytorch_model.bin")
    run("import", folder, tmp_path / "ours.pt")
    ours = build_model(load(tmp_path / "ours.pt"))
    assert ours.config.block_size == theirs.config.max_position_embeddings
    assert_close(logits(ours), logits(theirs), TOLERANCE, "logits")


def test_bfloat16_stays_bfloat16(tmp_path):
    from transformers import LlamaForCausalLM

    folder = save_folder(their_model(torch.bfloat16, num_key_value_heads=2), tmp_path / "in", "safetensors")
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    run("import", folder, tmp_path / "ours.pt")
    checkpoint = load(tmp_path / "ours.pt")
    ours = build_model(checkpoint)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    exact = logits(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().double())
    # each is as far from the exact result as bfloat16 rounds: 2^-9 an operation, some tens of them one after another
    assert_close(logits(ours).double(), exact, 0.03, "ours, to float64 on the same weights")
    assert_close(logits(theirs).double(), exact, 0.03, "theirs")
    wide = build_model(checkpoint, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert_close(logits(wide).double(), exact, TOLERANCE, "widened to float32")
    run("export", tmp_path / "ours.pt", tmp_path / "out")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.dtype for k, v in back.items()} == dict.fromkeys(theirs.state_dict(), torch.bfloat16)
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())


def test_weights_of_several_dtypes_become_float32(tmp_path):
    model = sharp_model()
    model.norm.bfloat16()
    save(tmp_path / "mixed.pt", checkpoint_of(model))
    mixed = build_model(load(tmp_path / "mixed.pt"))
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert torch.equal(mixed.norm.weight, model.norm.weight.float())


# ---- uneven groups ----


@pytest.mark.parametrize(
    "heads, k_groups, v_groups",
    [
        (1, [[0, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]),
        (2, [[0, 1, 0, 1], [0, 0, 1, 1]], [[0, 0, 0, 0], [1, 1, 0, 0]]),  # heads change places
        (4, [[0, 1, 1, 1], [0, 0, 1, 1]], [[0, 1, 1, 1], [0, 0, 1, 1]]),
        (4, [[0, 0, 1, 1], [0, 0, 1, 1]], [[0, 0, 1, 1], [0, 1, 1, 0]]),  # no two heads of layer 1 share both
    ],
)
def test_uneven_groups_are_exported_as_the_fewest_equal_ones(tmp_path, heads, k_groups, v_groups):
    from transformers import LlamaForCausalLM

    ours = sharp_model(k_groups=k_groups, v_groups=v_groups)
    said = export_of(ours, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_key_value_heads == heads
    assert_close(logits(theirs, 60), logits(ours, 60), TOLERANCE, "logits")
    cache, here = 2 * 2 * heads * 8 * 4, ours.config.kv_numbers_per_token * 4
    assert ("expanded" not in said) if cache == here else f"{cache:,} bytes a token there and {here:,} here" in said
    run("import", tmp_path / "out", tmp_path / "back.pt")
    assert_close(logits(build_model(load(tmp_path / "back.pt")), 60), logits(ours, 60), TOLERANCE, "imported again")


def test_fewest_equal_groups_of_classes_of_two_and_four_and_of_four_and_six():
    config = ModelConfig(n_layer=1, n_head=6, dim=48, k_groups=[[0, 1, 1, 0, 1, 1]], v_groups=[[0, 1, 1, 0, 1, 1]])
    assert uniform_heads(config) == (3, [[0, 3, 1, 2, 4, 5]])
    config = ModelConfig(n_layer=1, n_head=10, dim=80, k_groups=[[0] * 4 + [1] * 6], v_groups=[[0] * 10])
    assert uniform_heads(config) == (5, [list(range(10))])


# ---- llama2.c and Meta ----


@pytest.mark.parametrize("settings", [{"n_kv_head": 2}, {"tie_embeddings": False}])
def test_llama2c_file_gives_the_same_model_and_tokens(tmp_path, prefixed, settings):
    ours = sharp_model(vocab_size=500, **settings)
    write_llama2c(tmp_path / "model.bin", ours)
    write_llama2c_tokenizer(tmp_path / "tok.bin", prefixed)
    run("import", tmp_path / "model.bin", tmp_path / "got.pt", "--tokenizer", tmp_path / "tok.bin")
    model, tokenizer = build(load(tmp_path / "got.pt"))
    assert model.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    for text in TEXTS:
        assert tokenizer.encode(text) == prefixed.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.stop == [2, 1]


@pytest.mark.parametrize("scaled", [False, True])
def test_meta_folder_gives_the_same_model(tmp_path, scaled):
    extra = dict(zip(ROPE_SCALING, (8, 1, 4, 8192))) if scaled else None
    ours = sharp_model(n_kv_head=2, tie_embeddings=False, rope_theta=5e5, norm_eps=2e-3, rope_scaling=extra).bfloat16()
    folder = tmp_path / "meta"
    folder.mkdir()
    torch.save({**ours.state_dict(), "rope.freqs": torch.ones(4)}, folder / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 2e-3, "vocab_size": -1}
    params |= {"multiple_of": 16, "rope_theta": 5e5, "use_scaled_rope": scaled, "rope_scaling_factor": 8}
    (folder / "params.json").write_text(json.dumps(params))
    run("import", folder, tmp_path / "got.pt", "--block_size", 64)
    model = build_model(load(tmp_path / "got.pt"))
    assert model.config == ours.config and torch.equal(logits(model, 60), logits(ours, 60))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_scaled_rope": True}, ["rope_scaling_factor", "32"]),
        ({"sliding_window": 16}, ["sliding_window"]),
        ({"head_dim": 16}, ["head_dim"]),
        ({"vocab_size": 99}, ["vocab_size 99", "64 embeddings"]),
        ({"n_layers": 3}, ["3 layers", "holds 2"]),
    ],
)
def test_other_models_in_metas_layout_are_refused(tmp_path, change, words):
    torch.save(sharp_model().state_dict(), tmp_path / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, **change}
    (tmp_path / "params.json").write_text(json.dumps(params))
    refused(quick("checkpoint.py", "import", tmp_path, tmp_path / "no.pt"), *words)


# ---- what cannot be read, or written ----


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["MistralForCausalLM"]}, ["MistralForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None, "model_type": "gemma"}, ["gemma"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act gelu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["RoPE type yarn"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, ["RoPE type linear"]),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["low_freq_factor"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5"]),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope_parameters and rope_scaling"]),
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 16}, ["original_max_position_embeddings 16"]),
        ({"model_type": "mistral", "sliding_window": 8}, ["mistral"]),
        ({"num_hidden_layers": 3}, ["3 layers", "it holds 2"]),
        ({"num_key_value_heads": 2}, ["k_proj.weight [16, 32]", "it holds [32, 32]"]),
        ({"num_key_value_heads": 3}, ["config.json: num_key_value_heads 3 does not divide"]),
        ({"tie_word_embeddings": True}, ["ties its embeddings"]),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path, change, words):
    folder = save_folder(their_model(), tmp_path / "in", "safetensors")
    config = {**json.loads((folder / "config.json").read_text()), **change}
    (folder / "config.json").write_text(json.dumps(config))
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), *words)
    assert not (tmp_path / "ours.pt").exists()


def test_biases_are_refused_by_name_even_if_the_config_hides_them(tmp_path):
    theirs = their_model(attention_bias=True)
    theirs.config.attention_bias = False
    folder = save_folder(theirs, tmp_path / "in", "safetensors")
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), "k_proj.bias", "no such biases")


def test_what_cannot_be_exported_is_refused(tmp_path, tiny_run):
    save(tmp_path / "novel.pt", {**load(tiny_run), **checkpoint_of(sharp_model(novel=True))})
    refused(quick("checkpoint.py", "export", tmp_path / "novel.pt", tmp_path / "out"), "--novel")
    save(tmp_path / "odd.pt", checkpoint_of(sharp_model(n_head=5, head_dim=6)))
    refused(quick("checkpoint.py", "export", tmp_path / "odd.pt", tmp_path / "out"), "dim 32", "n_head 5")
    assert not (tmp_path / "out").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("all of it")
    refused(quick("checkpoint.py", "export", tiny_run, tmp_path / "precious"), "exists", "delete it")
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "all of it"


def test_a_trained_run_is_exported_and_shown(tmp_path, tiny_run):
    from transformers import AutoTokenizer, LlamaForCausalLM

    run("export", tiny_run, tmp_path / "out")
    theirs, tokenizer = (
        LlamaForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    ours, own_tokenizer = build(load(tiny_run))
    prompt = tokenizer("def main(", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == own_tokenizer.prompt("def main(")
    text = theirs.generate(**prompt, max_new_tokens=15, do_sample=False)[0].tolist()
    assert text == own_tokenizer.prompt("def main(") + ours.generate([own_tokenizer.prompt("def main(")], 15)[0]
    shown = run("show", tiny_run)
    assert "training: step 30 of 30" in shown and "LoRA: none" in shown and "0-1      ABCD (4)" in shown


def test_show_draws_uneven_groups_and_counts_their_cache(tmp_path):
    groups = {"k_groups": [[0, 1, 1, 1], [0, 1, 0, 2]], "v_groups": [[0, 0, 0, 0], [2, 1, 0, 2]]}
    save(tmp_path / "uneven.pt", checkpoint_of(sharp_model(novel=True, **groups)))
    shown = run("show", tmp_path / "uneven.pt")
    for line in (
        r"0 +ABBB \(2\) +AAAA \(1\)",
        r"1 +ABAC \(3\) +CBAC \(3\)",
        r"attention.novel +144 ",
        "none recorded",
    ):
        assert re.search(line, shown), shown
    cache = (2 + 1 + 3 + 3) * 8 * 4
    assert f"KV cache: {cache} bytes a token, {64 * cache:,} for a context of 64 (56% of multi-head attention)" in shown
    assert "n_kv_head" not in shown


def test_import_without_a_tokenizer_says_so_when_one_is_needed(tmp_path):
    folder = save_folder(their_model(), tmp_path / "in", "safetensors")
    assert "no tokenizer" in run("import", folder, tmp_path / "ours.pt")
    refused(quick("sample.py", tmp_path / "ours.pt"), "no tokenizer", "--tokenizer FILE")
    refused(quick("checkpoint.py", "import", folder, tmp_path / "ours.pt"), "exists", "--overwrite")
    refused(quick("checkpoint.py", "import", tmp_path / "none", tmp_path / "x.pt"), "no such file or folder")
    refused(quick("checkpoint.py", "import", tmp_path, tmp_path / "x.pt"), "no config.json")
    refused(quick("checkpoint.py", "import", folder / "model.safetensors", tmp_path / "x.pt"), "name its folder")
    refused(quick("checkpoint.py", "import", folder), "one name is missing")
    refused(quick("checkpoint.py", "show", folder), "no such checkpoint")
    big = ["--tokenizer", folder / "config.json"]
    refused(quick("checkpoint.py", "import", folder, tmp_path / "x.pt", *big), "config.json", "no tokenizer.json")


def test_training_goes_on_from_an_imported_bfloat16_model_in_float32(tmp_path, tiny_data):
    theirs = their_model(torch.bfloat16, vocab_size=400)
    folder = save_folder(theirs, tmp_path / "in", "safetensors")
    (folder / "tokenizer.model").write_bytes((tiny_data / "tokenizer.model").read_bytes())
    run("import", folder, tmp_path / "ours.pt", "--block_size", 32)
    flags = ["--init_from", tmp_path / "ours.pt", "--out_dir", tmp_path / "run", "--max_steps", 2, "--eval_tokens", 512]
    done = quick("train.py", "--dataset", tiny_data, "--batch_size", 4, *flags)
    assert done.returncode == 0, done.stderr
    trained = load(tmp_path / "run" / "ckpt.pt")["model"]
    assert {x.dtype for x in trained.values()} == {torch.float32} and len(trained) == len(
        load(tmp_path / "ours.pt")["model"]
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_import_and_export_hold_the_checkpoint_once(tmp_path):
    """Copies of wq and wk, here 2/9 of the weights, would show."""
    theirs = their_model(hidden_size=768, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8)
    folder = save_folder(theirs, tmp_path / "in", "safetensors")
    size = (folder / "model.safetensors").stat().st_size
    measure = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import checkpoint, convert, hugging_face, model, safetensors.torch, torch
with torch.device("meta"):
    model.Llama(model.ModelConfig())  # what it imports when first used is not the checkpoint's
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
if {what!r} == "show":
    checkpoint.show({source!r})
elif {what!r} == "import":
    checkpoint.save(Path({to!r}), convert.read(Path({source!r}))[0])
else:
    hugging_face.export({source!r}, Path({to!r}))
print(peak() - before)
"""
    ours = tmp_path / "ours.pt"
    ends = {"import": (folder, ours), "export": (ours, tmp_path / "out"), "show": (ours, None)}
    for what, (source, to) in ends.items():
        code = measure.format(root=str(ROOT), what=what, source=str(source), to=str(to))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ONE_THREAD)
        assert done.returncode == 0, done.stderr
        held, most = int(done.stdout.split()[-1]), 0.2 if what == "show" else 1.15
        assert held < most * size, f"{what}: {held:,} bytes for {size:,}"
