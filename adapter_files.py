"""The command behind `python lora.py`: adapters merged, and adapters as files of their own.

An adapter file is ours (a .pt: the settings and the tensors under our names) or a folder in PEFT's format:

    adapter_config.json    adapter_model.safetensors    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

As in all of Hugging Face's Llamas, the rows of q_proj and k_proj, and so of their lora_B, stand in the order
(f, f + D/2) instead of ours, (2f, 2f + 1).
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

import lora
from checkpoint import (
    build_model,
    check_tensors,
    checked,
    load,
    lora_config,
    map_file,
    model_config,
    save,
    show,
)
from config import POSITIONAL, UserError, parse
from files import writable
from hugging_face import NAMES, new_folder, open_weights, permute_rows, write_safetensors
from lora import LoRAConfig, adapt, plain
from model import Llama, ModelConfig
from tokenizer_files import read_json

OURS = {theirs: ours for ours, theirs in NAMES.items() if ours.rpartition(".")[2] in lora.TARGETS}
SHORT = {ours.rpartition(".")[2]: theirs.rpartition(".")[2] for theirs, ours in OURS.items()}  # such as w3: up_proj
PLAIN = {  # settings of PEFT's that would make another function of the same tensors: what an ordinary LoRA has
    "use_dora": (None, False), "fan_in_fan_out": (None, False), "bias": (None, "none"), "modules_to_save": (None, []),
    "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "lora_bias": (None, False),
    "init_lora_weights": (None, True, False, "gaussian"), "layer_replication": (None, []),
    "trainable_token_indices": (None, []), "alora_invocation_tokens": (None, []),
}  # fmt: skip
KNOWN = ("use_rslora", "loftq_config", "eva_config")  # other use_... and ..._config of theirs are variants, too


@dataclass
class AdapterConfig:
    """adapters"""

    action: Literal["merge", "export", "import"]  # what to do
    source: str  # merge, export: a checkpoint that has an adapter; import: the adapter, a .pt or PEFT's folder
    target: str | None = field(default=None, metadata=POSITIONAL)  # export: .pt or folder to write; import: the base
    out: str | None = None  # merge, import: the checkpoint to write (default: beside the one read, NAME-merged.pt, ...)
    overwrite: bool = False  # replace what is there


def merged(checkpoint: dict) -> dict:
    """The checkpoint as an ordinary one: adapter added, NF4 dequantized, in the number format of its embeddings."""
    model = plain(build_model(checkpoint)).to(checkpoint["model"]["tok_embeddings.weight"].dtype)
    kept = {key: x for key, x in checkpoint.items() if key not in ("lora", "optimizers", "scaler")}
    return {**kept, "model": model.state_dict(), "config": asdict(model.config)}


def fit(settings: LoRAConfig, tensors: dict[str, torch.Tensor], base: dict, where: Path) -> None:
    """Raise UserError unless an adapter has the tensors, in their shapes, that this base asks for."""
    with torch.device("meta"):
        wanted = adapt(Llama(model_config(base)), settings).state_dict()
    wanted = {name: x for name, x in wanted.items() if ".lora_" in name}
    if not wanted:
        raise UserError(f"{where} is no adapter: its rank is {settings.lora_r}")
    for name in sorted(wanted | tensors):
        ask, have = (str(list(state[name].shape)) if name in state else "none" for state in (wanted, tensors))
        if ask != have:
            raise UserError(f"{where} is an adapter of another model: {name} is {have}, and this base asks for {ask}")


def with_adapter(base: dict, settings: LoRAConfig, tensors: dict[str, torch.Tensor], where: str) -> dict:
    """A checkpoint of the base, in NF4 if the adapter was trained on that, with an adapter's tensors."""
    model = adapt(build_model(base), settings)
    model.load_state_dict(tensors, strict=False, assign=True)
    kept = {key: x for key, x in base.items() if key in ("config", "tokenizer", "data", "train")}
    return {**kept, "model": model.state_dict(), "lora": asdict(settings), "source": where}


def adapter_of(path: str) -> tuple[LoRAConfig, dict[str, torch.Tensor], ModelConfig]:
    """Settings and tensors of a checkpoint's adapter, under our names."""
    checkpoint = load(path)
    settings = lora_config(checkpoint)
    if not settings.lora_r:
        raise UserError(f"{path} has no adapter: train one with python train.py --init_from {path} --lora_r 8")
    build_model(checkpoint)  # which compares all names and shapes
    tensors = {name: x for name, x in checkpoint["model"].items() if ".lora_" in name}
    return settings, tensors, model_config(checkpoint)


def read_adapter(source: Path, base: dict) -> tuple[LoRAConfig, dict[str, torch.Tensor]]:
    """Settings and tensors, under our names, of an adapter file. Raises UserError if it is missing, damaged, or of
    another model than the base, a checkpoint."""
    if base.get("lora"):
        raise UserError("the base has an adapter already: merge it first, python lora.py merge CKPT --out merged.pt")
    if not source.exists():
        raise UserError(f"{source}: no such adapter; make one with python lora.py export CKPT {source}")
    if (source / "adapter_config.json").exists():
        return read_peft(source, base)
    try:
        found = map_file(source)
        settings, tensors = checked(LoRAConfig, found["lora"]), found["adapter"]
        check_tensors(tensors, source, source.stat().st_size)
        fit(settings, tensors, base, source)
        return settings, tensors
    except UserError:
        raise
    except Exception:
        remedy = "name a .pt of `lora.py export`, or PEFT's folder with adapter_config.json"
        raise UserError(f"{source} is no adapter, or damaged: {remedy}") from None


# ---- PEFT's format ----


def check_order(c: ModelConfig) -> None:
    """Raise UserError for a model whose heads Hugging Face's format would lay out otherwise."""
    even = [[head * c.n_kv_head // c.n_head for head in range(c.n_head)]] * c.n_layer
    if c.novel or c.gated or c.k_groups != even or c.v_groups != even:
        kind = "has the novel layer" if c.novel else "has gates" if c.gated else "has uneven head groups"
        raise UserError(f"this model {kind}, PEFT's none: merge the adapter instead, or export it to a .pt")


def peft_name(ours: str) -> str:
    """layers.3.attention.wq.lora_A -> base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"""
    layer, module, part = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(lora_[AB])", ours).groups()
    return f"base_model.model.{'model.' + layer if layer else ''}{NAMES[module]}.{part}.weight"


def our_name(theirs: str, where: Path) -> str:
    """The way back. Raises UserError for a tensor that no ordinary LoRA has."""
    found = re.fullmatch(r"base_model\.model\.(?:model\.(layers\.\d+\.))?(.+)\.(lora_[AB])\.weight", theirs)
    if not found or found[2] not in OURS:
        known = ", ".join(SHORT.values())
        raise UserError(f"{where}: {theirs[:100]} is not supported, LoRA on {known} is")
    return f"{found[1] or ''}{OURS[found[2]]}.{found[3]}"


def in_pairs(tensors: dict[str, torch.Tensor], c: ModelConfig, to_pairs: bool) -> None:
    """Put the rows of lora_B of wq and wk in RoPE's order, ours or Hugging Face's; in place."""
    for name, x in tensors.items():
        if name.endswith(("wq.lora_B", "wk.lora_B")):
            permute_rows(x, c.head_dim, to_pairs)


def read_peft(folder: Path, base: dict) -> tuple[LoRAConfig, dict[str, torch.Tensor]]:
    """Settings and tensors, under our names, of PEFT's folder."""
    c, path = model_config(base), folder / "adapter_config.json"
    check_order(c)
    settings = read_json(path)
    unlike = [name for name, fine in PLAIN.items() if settings.get(name) not in fine]
    variants = [name for name, value in settings.items() if value and re.match("use_|.+_config$", name)]
    unlike += [name for name in variants if name not in KNOWN]
    if settings.get("peft_type") != "LORA" or unlike:
        what = f"{unlike[0]} {str(settings[unlike[0]])[:60]}" if unlike else f"peft_type {settings.get('peft_type')}"
        raise UserError(f"{path}: {what} is not supported, plain LoRA is")
    kinds = [folder / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
    weights = next((path for path in kinds if path.exists()), None)
    if weights is None:
        raise UserError(f"{folder} has no {kinds[0].name}: is this all of it?")
    found = open_weights(weights)
    copy = found.pop("base_model.model.lm_head.base_layer.weight", None)  # PEFT adds it where lm_head has an adapter
    if copy is not None and not torch.equal(copy, base["model"]["output.weight"].to(copy.dtype)):
        raise UserError(f"{weights} is an adapter of another model: its copy of lm_head differs from the base's")
    tensors = {our_name(name, weights): x for name, x in found.items()}
    adapted = {name.split(".")[-2] for name in tensors}
    fields = {ours: settings.get(theirs) for ours, theirs in (("lora_r", "r"), ("lora_alpha", "lora_alpha"))}
    fields["lora_targets"] = [name for name in lora.TARGETS if name in adapted]
    ours = checked(LoRAConfig, {**fields, "lora_dropout": settings.get("lora_dropout", 0.0)})
    if settings.get("use_rslora"):  # scales by alpha / sqrt(r)
        ours.lora_alpha *= math.sqrt(ours.lora_r)
    fit(ours, tensors, base, folder)
    in_pairs(tensors, c, to_pairs=True)
    return ours, tensors


def write_peft(folder: Path, settings: LoRAConfig, tensors: dict[str, torch.Tensor], base: str) -> None:
    """Write the folder, whole or not at all."""
    alpha = int(settings.lora_alpha) if settings.lora_alpha == int(settings.lora_alpha) else settings.lora_alpha
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": settings.lora_r, "lora_alpha": alpha, "lora_dropout": settings.lora_dropout, "bias": "none",
        "target_modules": [SHORT[name] for name in settings.lora_targets],
        "fan_in_fan_out": False, "use_dora": False, "use_rslora": False, "modules_to_save": None,
    }  # fmt: skip
    with new_folder(folder) as partial:
        write_safetensors({peft_name(name): x for name, x in tensors.items()}, partial / "adapter_model.safetensors")
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- the command ----


def export(source: str, out: Path, overwrite: bool) -> str:
    """Write the adapter of a checkpoint alone; return what was written, in words."""
    settings, tensors, c = adapter_of(source)
    if out.suffix == ".pt":
        writable(out, overwrite)
        save(out, {"lora": asdict(settings), "adapter": tensors})
        size = out.stat().st_size
    else:
        check_order(c)
        if overwrite or out.suffix in (".safetensors", ".bin"):
            raise UserError(f"{out}: name a .pt, or a folder that is not there yet; --overwrite replaces a .pt alone")
        in_pairs(tensors, c, to_pairs=False)
        write_peft(out, settings, tensors, source)
        size = sum(path.stat().st_size for path in out.iterdir())
    count = sum(x.numel() for x in tensors.values())
    targets = " ".join(settings.lora_targets)
    text = f"wrote {out}, {size:,} bytes: {count:,} parameters, r {settings.lora_r} on {targets}"
    if settings.quantize != "none":
        text += f"\nnote: it was trained on a base in {settings.quantize}: use it on such a one"
    return text


def run() -> None:
    flags = parse(lora.__doc__, AdapterConfig)
    config, source = AdapterConfig(**flags), Path(flags["source"])
    if (config.action == "merge") == bool(config.target):
        usage = {"merge": "CKPT [--out OUT.pt]", "export": "CKPT ADAPTER", "import": "ADAPTER CKPT [--out OUT.pt]"}
        raise UserError(f"{config.action} takes other names: python lora.py {config.action} {usage[config.action]}")
    if config.action == "export":
        if config.out:
            raise UserError(f"export does not use --out {config.out}: leave it out")
        print(export(config.source, Path(config.target), config.overwrite))
        return
    base = Path(config.target or config.source)
    out = Path(config.out or base.with_name(f"{base.stem}-{'merged' if config.action == 'merge' else source.stem}.pt"))
    checkpoint = load(base)
    writable(out, config.overwrite)
    if config.action == "merge":
        if not lora_config(checkpoint).lora_r:
            raise UserError(f"{base} has no adapter: there is nothing to merge")
        checkpoint = merged(checkpoint)
    else:
        checkpoint = with_adapter(checkpoint, *read_adapter(source, checkpoint), str(source))
    save(out, checkpoint)
    show(str(out))
