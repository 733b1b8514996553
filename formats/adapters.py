"""LoRA adapters as files of their own, in and out: a .pt of ours (settings, and tensors under our names), and
PEFT's folder (adapter_config.json, adapter_model.safetensors), where the rows of q_proj and k_proj, and so of
their lora_B, stand in Hugging Face's order.
"""

import math
import re
from dataclasses import asdict
from pathlib import Path

from checkpoint import (
    build_model, check_tensors, empty_model, load, load_weights, lora_config, map_file, save,
)  # fmt: skip
from common import checked, note, require, writable
from formats.files import Weights, check_finite, read_json, read_tensors, reading, write_folder
from formats.models import permute_rows, their_name
from lora import TARGETS, LoRAConfig, adapt
from model import Llama, ModelConfig

PEFT = "base_model.model.{}.weight"  # a tensor's name there: ...model.layers.3.self_attn.q_proj.lora_A.weight
# settings with which the same tensors would compute something else; other variants of LoRA have other tensors
ACCEPTED = {"peft_type": ["LORA"], "init_lora_weights": [None, True, False, "gaussian", "eva", "orthogonal"]}
VARIANTS, HARMLESS = "alpha_pattern|alora_.+|use_.+|.+_config", ("use_rslora", "eva_config")


def check_order(c: ModelConfig) -> None:
    """Raise UserError for a model whose heads Hugging Face's format would lay out otherwise."""
    plain = c.n_kv_head and not (c.novel or c.gated)
    require(plain, "PEFT has no uneven groups, latents, --novel or --gated: name a .pt, or merge it")


def with_adapter(base: dict, source: Path) -> dict:
    """A checkpoint of the base, in NF4 if the adapter was trained so, with the adapter in `source`. Raises
    UserError when the adapter is damaged, or of another model than the base."""
    require(not base.get("lora"), "the base has an adapter: merge it, python checkpoint.py merge CKPT")
    model = build_model(base)
    with reading(source, "adapter"):
        settings, tensors = read_peft(source, model) if source.is_dir() else read_own(source)
    empty = empty_model(model.config, settings)
    others = {name: x for name, x in empty.state_dict().items() if ".lora_" not in name}
    load_weights(empty, others | tensors, f"{source} is of another model, or")
    check_finite(tensors, source)
    if source.is_dir():  # whose rows stand in Hugging Face's order
        permute_rows(tensors, model.config.head_dim, to_pairs=True)
    adapt(model, settings).load_state_dict(tensors, strict=False, assign=True)
    kept = {key: x for key, x in base.items() if key in ("config", "tokenizer", "data", "train", "grouped")}
    return {**kept, "model": model.state_dict(), "lora": asdict(settings), "source": str(source)}


def read_own(path: Path) -> tuple[LoRAConfig, Weights]:
    """Settings and tensors of an adapter .pt."""
    found = map_file(path)
    check_tensors(found["adapter"], path.stat().st_size)
    return checked(LoRAConfig, found["lora"]), found["adapter"]


def read_peft(folder: Path, base: Llama) -> tuple[LoRAConfig, Weights]:
    """Settings and tensors of PEFT's folder, under our names."""
    check_order(base.config)
    config = read_json(folder / "adapter_config.json")
    for name, value in config.items():
        plain = not value or name in HARMLESS or not re.fullmatch(VARIANTS, name)
        require(plain and value in ACCEPTED.get(name, [value]), f"{name} {str(value)[:60]} is no plain LoRA")
    kinds = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    tensors = read_tensors(next((path for path in kinds if path.exists()), kinds[0]))
    head = tensors.pop("base_model.model.lm_head.base_layer.weight", base.output.weight)
    require(head.float().allclose(base.output.weight.float(), 0.01), "its lm_head is not that of the base")
    names = empty_model(base.config, LoRAConfig(1, lora_targets=list(TARGETS))).state_dict()
    ours = {PEFT.format(their_name(name)): name for name in names if ".lora_" in name}
    tensors = {ours.get(name, name): x for name, x in tensors.items()}
    targets = [target for target in TARGETS if target in {name.split(".")[-2] for name in tensors}]
    fields = {"lora_r": config["r"], "lora_alpha": config["lora_alpha"], "lora_targets": targets}
    settings = checked(LoRAConfig, {**fields, "lora_dropout": config.get("lora_dropout", 0.0)})
    if config.get("use_rslora"):  # scales by alpha / sqrt(r)
        settings.lora_alpha *= math.sqrt(settings.lora_r)
    return settings, tensors


def export(source: Path, out: Path, overwrite: bool) -> None:
    """Write the adapter of a checkpoint by itself, to a .pt or else a PEFT folder."""
    checkpoint = load(source)
    settings, model = lora_config(checkpoint), build_model(checkpoint)
    require(settings.lora_r, f"{source} has no adapter: python train.py --init_from {source} --lora_r 8")
    tensors = {name: x for name, x in checkpoint["model"].items() if ".lora_" in name}
    if out.suffix == ".pt":
        writable(out, overwrite)
        save(out, {"lora": asdict(settings), "adapter": tensors})
    else:
        check_order(model.config)
        permute_rows(tensors, model.config.head_dim, to_pairs=False)
        alpha, theirs = settings.lora_alpha, {PEFT.format(their_name(name)): x for name, x in tensors.items()}
        modules = list(dict.fromkeys(name.split(".")[-3] for name in theirs))  # such as q_proj
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
            "bias": "none", "r": settings.lora_r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": settings.lora_dropout, "target_modules": modules, "modules_to_save": None,
            "fan_in_fan_out": False, "use_dora": False, "use_rslora": False, "inference_mode": True,
        }  # fmt: skip
        write_folder(out, {"adapter_model.safetensors": theirs, "adapter_config.json": config})
    if settings.quantize != "none":
        note(f"it was trained on a base in {settings.quantize}: use it on such a base")
    size = sum(path.stat().st_size for path in (out.iterdir() if out.is_dir() else [out]))
    count, targets = sum(x.numel() for x in tensors.values()), " ".join(settings.lora_targets)
    print(f"wrote {out}, {size:,} bytes: {count:,} parameters, r {settings.lora_r} on {targets}")
