"""LoRA adapters as files: to PEFT and back, and in a .pt of their own."""

from dataclasses import asdict

import pytest
import torch
from conftest import assert_close, quick, refused, sharp_model, to_hugging_face
from foreign import change_json, checkpoint_of, formats, logits
from safetensors.torch import load_file, save_file

from checkpoint import build_model, load, save
from lora import TARGETS, LoRAConfig, adapt, adapters

OUTPUT = "base_model.model.lm_head.base_layer.weight"


def files(folder, quantize="none", base=None, **settings):
    """A tuned model, saved as ours.pt; base.pt is its base, or another one."""
    lora = LoRAConfig(3, 5.0, 0.0, list(TARGETS), quantize)
    save(folder / "base.pt", checkpoint_of(base or sharp_model(**settings)))
    tuned = adapt(sharp_model(**settings), lora)
    for layer in adapters(tuned):  # B is zero before training
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save(folder / "ours.pt", {**checkpoint_of(tuned), "lora": asdict(lora)})
    return tuned


def export(folder, name):
    return formats("export", folder / "ours.pt", folder / name, "--adapter")


def attach(folder, name, command=formats):
    """Put an adapter on base.pt, as back.pt."""
    return command("import", folder / name, folder / "back.pt", "--base", folder / "base.pt", "--overwrite")


def refuse(folder, name, *words):
    refused(attach(folder, name, lambda *line: quick("-m formats", *line)), *words)
    assert not (folder / "back.pt").exists()


@pytest.mark.parametrize("kv", [4, 2])
def test_adapters_cross_to_peft_and_back(tmp_path, kv):
    from peft import PeftModel

    settings = {"n_kv_head": kv, "tie_embeddings": False}
    ours = files(tmp_path, **settings)
    assert "r 3 on wq wk wv wo w1 w2 w3 output" in export(tmp_path, "adapter")
    theirs = PeftModel.from_pretrained(to_hugging_face(sharp_model(**settings)), tmp_path / "adapter")
    # float32, and another order of the products
    assert_close(logits(ours), logits(theirs), 1e-5, "exported")
    for name, p in theirs.named_parameters():  # their training
        if "lora_" in name:
            p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path / "theirs")
    attach(tmp_path, "theirs")
    back = build_model(load(tmp_path / "back.pt"))
    assert_close(logits(back), logits(theirs), 1e-5, "imported")
    assert (logits(back) - logits(ours)).abs().max() > 1e-2
    formats("export", tmp_path / "back.pt", tmp_path / "again", "--adapter")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    copied = first.pop(OUTPUT)  # a copy of the base's
    assert first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())
    save_file({**first, OUTPUT: 2 * copied}, tmp_path / "theirs/adapter_model.safetensors")
    (tmp_path / "back.pt").unlink()
    refuse(tmp_path, "theirs", "lm_head")


def test_rank_stabilized_adapters_keep_their_scale(tmp_path):
    from peft import LoraConfig, get_peft_model

    files(tmp_path, n_kv_head=2)
    settings = {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    theirs = to_hugging_face(sharp_model(n_kv_head=2))
    theirs = get_peft_model(theirs, LoraConfig(**settings, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    attach(tmp_path, "theirs")
    back = load(tmp_path / "back.pt")
    assert back["lora"] == asdict(LoRAConfig(4, 6.0, 0.0, ["wq", "w2"]))
    assert_close(logits(build_model(back)), logits(theirs), 1e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapter_in_a_pt_comes_back_bit_equal_and_goes_on_a_bfloat16_base(tmp_path, quantize):
    ours = files(tmp_path, quantize)
    assert ("a base in nf4" in export(tmp_path, "adapter.pt")) == (quantize == "nf4")
    size = sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in adapters(ours))
    assert (tmp_path / "adapter.pt").stat().st_size < size + 20000  # without the base
    attach(tmp_path, "adapter.pt")
    assert torch.equal(logits(build_model(load(tmp_path / "back.pt"))), logits(ours))
    (tmp_path / "back.pt").rename(tmp_path / "base.pt")
    refuse(tmp_path, "adapter.pt", "merge it")
    save(tmp_path / "base.pt", checkpoint_of(base := sharp_model().bfloat16()))
    attach(tmp_path, "adapter.pt")
    if quantize == "none":
        wo = load(tmp_path / "back.pt")["model"]["layers.1.attention.wo.linear.weight"]
        assert torch.equal(wo, base.layers[1].attention.wo.weight)


@pytest.mark.parametrize("other", [{"dim": 48}, {"n_layer": 3}, {"n_kv_head": 2}])
@pytest.mark.parametrize("kind", ["adapter.pt", "folder"])
def test_an_adapter_of_another_model_is_refused(tmp_path, other, kind):
    files(tmp_path, base=sharp_model(**other))
    export(tmp_path, kind)
    refuse(tmp_path, kind, "another model", "layers.")


@pytest.mark.parametrize("change, word", [
    ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias all"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"use_qalora": True}, "use_qalora"), ({"alora_invocation_tokens": [1]}, "alora"),
    ({"kasa_config": {"a": 1}}, "kasa"), ({"r": 5}, "another model"), ({"r": "four"}, "lora_r"),
    ({"r": None}, "damaged"), ({"r": 2**62}, "lora_r"), ({"lora_alpha": -1}, "lora_alpha"),
])  # fmt: skip
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, change, word):
    files(tmp_path)
    export(tmp_path, "folder")
    change_json(tmp_path / "folder" / "adapter_config.json", **change)
    refuse(tmp_path, "folder", word)


@pytest.mark.parametrize("settings", [{"k_groups": [[0, 1, 1, 1]] * 2}, {"novel": True}, {"gated": True}])
def test_uneven_groups_and_extra_layers_have_no_peft_format(tmp_path, settings):
    files(tmp_path, **settings)
    refused(quick("-m formats", "export", tmp_path / "ours.pt", tmp_path / "folder", "--adapter"), ".pt")
    for source in ("folder", "ours.pt"):  # one is missing, one is no adapter
        refuse(tmp_path, source, tmp_path / source)
