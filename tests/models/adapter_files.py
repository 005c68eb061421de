"""Random LoRA adapters in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.peft import module_shapes
from turbolm.models.registry import decoder_spec

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_random_adapter(
    model: Path, folder: Path, seed: int, rank: int = 8, scale: float = 0.05, targets: list[str] = PROJECTIONS
) -> Path:
    """An adapter of a checkpoint on all matrices of its layers; `scale` of its numbers."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (n, k) in module_shapes(decoder_spec(open_checkpoint(model).config)).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = scale * torch.randn(rank, k, generator=random)
        tensors[f"base_model.model.{name}.lora_B.weight"] = scale * torch.randn(n, rank, generator=random)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
