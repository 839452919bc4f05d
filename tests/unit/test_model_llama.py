"""The model is what its sizes say, and its weights are a function of the seed alone."""

from __future__ import annotations

import math

import pytest
import torch

from mend_trainer.models.llama import LlamaForCausalLM, build_model
from mend_trainer.models.sizes import PRESETS, ModelConfig

_SMALL = ModelConfig(hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, context=32, rope_theta=500.0)


def a_model(seed: int = 3, checkpoint_activations: bool = False) -> torch.nn.Module:
    """On the CPU, with 100 different tokens."""
    return build_model(
        _SMALL,
        vocabulary_size=100,
        seed=seed,
        device=torch.device("cpu"),
        checkpoint_activations=checkpoint_activations,
    )


def test_the_seed_alone_decides_the_weights() -> None:
    """Not torch's generator, which is left as it was; and no two matrices are alike."""
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    one = a_model().state_dict()
    assert torch.rand(()) == expected
    two, other = a_model().state_dict(), a_model(seed=4).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].ndim == 2)
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], one["model.layers.1.mlp.up_proj.weight"])


def test_nothing_is_left_of_the_meta_device() -> None:
    """Rotary frequencies, which no checkpoint holds, are those that the model would have computed itself."""
    model = a_model()
    assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
    normal = LlamaForCausalLM(model.config)
    rotary = [name for name, _ in normal.named_buffers()]
    assert rotary
    for name in rotary:
        assert torch.equal(model.get_buffer(name), normal.get_buffer(name))


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_it_starts_as_ignorant_as_it_should(checkpoint_activations: bool) -> None:
    """The first loss is that of guessing, and every weight has a gradient."""
    model = a_model(checkpoint_activations=checkpoint_activations).train()
    tokens = torch.randint(0, 100, (4, 33), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(math.log(100), rel=0.02)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_clio_has_three_billion_parameters() -> None:
    """Counted on the meta device, which holds none of them."""
    from mend_trainer.models import llama

    with torch.device("meta"):
        model = LlamaForCausalLM(llama._llama(PRESETS["clio-3b"], 65536))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(3.2e9, rel=0.02)
    assert model.config.max_position_embeddings == 8192
