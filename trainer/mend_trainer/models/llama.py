"""The decoder-only transformer: Hugging Face's `LlamaForCausalLM`, made from sizes and a seed alone.

The model is made on the meta device, sharded if wanted, and only then given memory and weights, so that no rank ever
holds more than its share. Each parameter is drawn from a generator of its own, seeded by its name: the same seed gives
the same weights at every world size, under DDP and FSDP2 alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Final

import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing here may touch the network

from transformers import LlamaConfig, LlamaForCausalLM

from mend_trainer.models.sizes import ModelConfig

_STANDARD_DEVIATION: Final = 0.02
_INTO_THE_RESIDUAL: Final = ("o_proj.weight", "down_proj.weight")


def build_model(
    config: ModelConfig,
    *,
    vocabulary_size: int,
    seed: int,
    device: torch.device,
    shard: Callable[[nn.Module], None] | None = None,
    checkpoint_activations: bool = False,
) -> nn.Module:
    """A model with fresh float32 weights on `device`; `shard` may apply FSDP2 to it while it has no memory yet."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(_llama(config, vocabulary_size))
    if checkpoint_activations:
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    model: nn.Module = llama
    if shard is not None:
        shard(model)
    model.to_empty(device=device)
    _rebuild_rotary(llama, device)
    _initialise(model, config, seed, device)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that `build_model` made, which are sharded, and gathered, one at a time."""
    return list(model.get_submodule("model.layers").children())


def _llama(config: ModelConfig, vocabulary_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_epsilon,
        attention_dropout=config.attention_dropout,
        attn_implementation="sdpa",
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _rebuild_rotary(model: LlamaForCausalLM, device: torch.device) -> None:
    """Buffers that no checkpoint holds came off the meta device as uninitialised memory: compute them again."""
    rotary = model.model.rotary_emb
    frequencies, _ = rotary.compute_default_rope_parameters(model.config)
    rotary.inv_freq = frequencies.to(device)
    rotary.original_inv_freq = frequencies.to(device)


@torch.no_grad()
def _initialise(model: nn.Module, config: ModelConfig, seed: int, device: torch.device) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)  # the scales of the norms
            continue
        deviation = _STANDARD_DEVIATION
        if name.endswith(_INTO_THE_RESIDUAL):
            deviation /= math.sqrt(2 * config.layers)  # keeps the residual stream's variance independent of depth
        generator = torch.Generator(device).manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()))
        whole = torch.empty(parameter.shape, device=device).normal_(0.0, deviation, generator=generator)
        if isinstance(parameter, DTensor):
            # No source rank: every rank drew the same numbers and keeps its own part without a word on the network.
            mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(mine.to_local())
        else:
            parameter.copy_(whole)
