"""LoRA adapters as files: to PEFT and back, and in a .pt of their own."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import assert_close, quick, refused, sharp_model, to_hugging_face
from foreign import checkpoint_of, run
from safetensors.torch import load_file, save_file

from checkpoint import build_model, load, save
from lora import TARGETS, LoRAConfig, adapt, adapters

TOKENS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


def files(folder, quantize="none", base=None, **settings):
    """A tuned model; its checkpoint ours.pt, and base.pt of its base without the adapter."""
    lora = LoRAConfig(3, 5.0, 0.0, list(TARGETS), quantize)
    base = base or sharp_model(**settings)
    save(folder / "base.pt", checkpoint_of(base))
    tuned = adapt(sharp_model(**settings), lora)
    for layer in adapters(tuned):  # B is zero before training
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save(folder / "ours.pt", {**checkpoint_of(tuned), "lora": asdict(lora)})
    return tuned


@pytest.mark.parametrize("kv", [4, 2])
def test_adapters_cross_to_peft_and_back(tmp_path, kv):
    from peft import PeftModel

    settings = {"n_kv_head": kv, "tie_embeddings": False}
    ours = files(tmp_path, **settings)
    said = run("export", tmp_path / "ours.pt", tmp_path / "adapter", "--adapter")
    assert "r 3 on wq wk wv wo w1 w2 w3 output" in said
    theirs = PeftModel.from_pretrained(to_hugging_face(sharp_model(**settings)), tmp_path / "adapter")
    # float32, and another order of the products: 24 tokens through two layers
    assert_close(logits(ours), logits(theirs), 1e-5, "exported")
    with torch.no_grad():  # their training
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path / "theirs")
    run("import", tmp_path / "theirs", tmp_path / "back.pt", "--base", tmp_path / "base.pt")
    back = build_model(load(tmp_path / "back.pt"))
    assert_close(logits(back), logits(theirs), 1e-5, "imported")
    assert (logits(back) - logits(ours)).abs().max() > 1e-2
    run("export", tmp_path / "back.pt", tmp_path / "again", "--adapter")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    first.pop("base_model.model.lm_head.base_layer.weight")  # a copy of the base's
    assert first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def test_rank_stabilized_adapters_keep_their_scale(tmp_path):
    from peft import LoraConfig, get_peft_model

    files(tmp_path, n_kv_head=2)
    settings = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    theirs = to_hugging_face(sharp_model(n_kv_head=2))
    theirs = get_peft_model(theirs, LoraConfig(**settings, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    run("import", tmp_path / "theirs", tmp_path / "back.pt", "--base", tmp_path / "base.pt")
    back = load(tmp_path / "back.pt")
    assert back["lora"] == asdict(LoRAConfig(4, 6.0, 0.0, ["wq", "w2"]))
    assert_close(logits(build_model(back)), logits(theirs), 1e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_in_a_pt_comes_back_bit_equal(tmp_path, quantize):
    ours = files(tmp_path, quantize)
    said = run("export", tmp_path / "ours.pt", tmp_path / "adapter.pt", "--adapter")
    assert ("a base in nf4" in said) == (quantize == "nf4")
    size = sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in adapters(ours))
    assert (tmp_path / "adapter.pt").stat().st_size < size + 20000  # without the base
    attach = ["import", tmp_path / "adapter.pt", tmp_path / "back.pt", "--base"]
    run(*attach, tmp_path / "base.pt")
    assert torch.equal(logits(build_model(load(tmp_path / "back.pt"))), logits(ours))
    save(tmp_path / "twice.pt", load(tmp_path / "back.pt"))
    refused(quick("-m formats", *attach, tmp_path / "twice.pt", "--overwrite"), "merge it")
    refused(quick("-m formats", "export", tmp_path / "base.pt", tmp_path / "x.pt", "--adapter"), "--lora_r")


def test_a_bfloat16_base_stays_bfloat16_beside_an_adapter(tmp_path):
    base = sharp_model().bfloat16()
    files(tmp_path, base=base)
    run("export", tmp_path / "ours.pt", tmp_path / "adapter.pt", "--adapter")
    run("import", tmp_path / "adapter.pt", tmp_path / "both.pt", "--base", tmp_path / "base.pt")
    both = load(tmp_path / "both.pt")["model"]
    assert torch.equal(both["layers.1.attention.wo.linear.weight"], base.layers[1].attention.wo.weight)


@pytest.mark.parametrize("other", [{"dim": 48}, {"n_layer": 3}, {"n_kv_head": 2}])
@pytest.mark.parametrize("kind", ["adapter.pt", "folder"])
def test_an_adapter_of_another_model_is_refused(tmp_path, other, kind):
    files(tmp_path, base=sharp_model(**other))
    run("export", tmp_path / "ours.pt", tmp_path / kind, "--adapter")
    attach = ["import", tmp_path / kind, tmp_path / "out.pt", "--base", tmp_path / "base.pt"]
    refused(quick("-m formats", *attach), "another model", "layers.")
    assert not (tmp_path / "out.pt").exists()


def test_a_copy_of_another_output_matrix_is_noticed(tmp_path):
    base = files(tmp_path)
    run("export", tmp_path / "ours.pt", tmp_path / "folder", "--adapter")
    path = tmp_path / "folder" / "adapter_model.safetensors"
    attach = ["import", tmp_path / "folder", tmp_path / "out.pt", "--base", tmp_path / "base.pt"]
    copy = base.output.linear.weight.detach().clone()
    save_file({**load_file(path), "base_model.model.lm_head.base_layer.weight": copy}, path)
    run(*attach)
    save_file({**load_file(path), "base_model.model.lm_head.base_layer.weight": 0 * copy}, path)
    refused(quick("-m formats", *attach, "--overwrite"), "lm_head")


@pytest.mark.parametrize("change, word", [
    ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias all"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"use_qalora": True}, "use_qalora"), ({"alora_invocation_tokens": [1]}, "alora"),
    ({"kasa_config": {"a": 1}}, "kasa"), ({"r": 5}, "another model"), ({"r": "four"}, "lora_r"),
    ({"r": None}, "lora_r"), ({"r": 2**62}, "lora_r"), ({"lora_alpha": -1}, "lora_alpha"),
])  # fmt: skip
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, change, word):
    files(tmp_path)
    run("export", tmp_path / "ours.pt", tmp_path / "folder", "--adapter")
    path = tmp_path / "folder" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    attach = ["import", tmp_path / "folder", tmp_path / "out.pt", "--base", tmp_path / "base.pt"]
    refused(quick("-m formats", *attach), word)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("settings", [{"k_groups": [[0, 1, 1, 1]] * 2}, {"novel": True}, {"gated": True}])
def test_uneven_groups_and_extra_layers_have_no_peft_format(tmp_path, settings):
    files(tmp_path, **settings)
    refused(quick("-m formats", "export", tmp_path / "ours.pt", tmp_path / "folder", "--adapter"), ".pt")
    assert not (tmp_path / "folder").exists()
    run("export", tmp_path / "ours.pt", tmp_path / "adapter.pt", "--adapter")
    for source in ("folder", "ours.pt"):  # one is missing, one is no adapter
        attach = ["import", tmp_path / source, tmp_path / "out.pt", "--base", tmp_path / "base.pt"]
        refused(quick("-m formats", *attach), tmp_path / source)
