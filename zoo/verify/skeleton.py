"""Upstream's class without weights: what a layer is read into, and where the buffers that no checkpoint holds are made."""

from __future__ import annotations

from typing import Any

import torch


def skeleton(cls: Any, config: Any, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
    """Upstream's model without storage, but with the buffers that no checkpoint holds (rotary frequencies), on `device`."""
    switches: dict[str, Any] = {"attn_implementation": "eager"}
    if cls._can_set_experts_implementation():
        switches["experts_implementation"] = "eager"
    with torch.device("meta"):
        try:
            model = cls._from_config(config, dtype=dtype, **switches)
        except (TypeError, ValueError):
            model = cls._from_config(config, dtype=dtype)
    kept = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        if name not in kept:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for t in model.state_dict(keep_vars=True).values():
        t._is_hf_initialized = True
    for m in model.modules():
        m._is_hf_initialized = False
    model.initialize_weights()
    for m in model.modules():
        for leaf, b in m._buffers.items():
            if b is not None and not b.is_meta:
                m._buffers[leaf] = b.to(device)
    return model.eval()
