"""Sizes of a model, and the presets that have names. Light: a configuration is read without importing torch."""

from __future__ import annotations

from typing import Final

import msgspec


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the model; `context` is the longest sequence it is meant for."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    attention_dropout: float = 0.0

    def problems(self) -> dict[str, str]:
        """What cannot be built, by field."""
        found = {
            field: "expected at least 1"
            for field in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "context")
            if getattr(self, field) < 1
        }
        if not found and self.hidden_size % (2 * self.heads):
            found["hidden_size"] = f"expected a multiple of 2 * heads ({2 * self.heads})"
        if not 0 <= self.attention_dropout < 1:
            found["attention_dropout"] = "expected at least 0 and less than 1"
        if not found and self.heads % self.kv_heads:
            found["kv_heads"] = f"expected a divisor of heads ({self.heads})"
        return found


PRESETS: Final[dict[str, ModelConfig]] = {
    # A laptop's: learns the look of Python from bytes within a few hundred steps.
    "tiny": ModelConfig(hidden_size=128, layers=4, heads=4, kv_heads=4, intermediate_size=384, context=512),
    # One GPU's.
    "small": ModelConfig(hidden_size=768, layers=12, heads=12, kv_heads=4, intermediate_size=2048, context=2048),
    # Clio: 3.2 billion parameters with a vocabulary of 65,536.
    "clio-3b": ModelConfig(
        hidden_size=3072,
        layers=28,
        heads=24,
        kv_heads=8,
        intermediate_size=8192,
        context=8192,
        rope_theta=500_000.0,
    ),
}
