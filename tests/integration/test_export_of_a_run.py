"""What real ranks saved, each its share, is exported whole, with the tokenizer that was trained on the text."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from crds import crd, sample
from kube_server import a_cluster
from mend.apply import TRAINING_RUNS
from mend.cli import main
from mend.kube.client import Resource
from mend.manifest import Manifest
from mend.orders import CheckpointPlan
from mend.states import CheckpointRef
from mend.store import open_store
from mend_trainer.checkpoint.layout import leaves
from mend_trainer.checkpoint.reader import load
from mend_trainer.models.llama import build_model
from mend_trainer.models.sizes import ModelConfig
from trainer_gang import Zygote, a_gang, a_little_text, manifest_of, tiny_arguments

_DEFINITIONS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", namespaced=False)


def the_model(plan: CheckpointPlan, ref: CheckpointRef, manifest: Manifest) -> torch.nn.Module:
    """The reference model with the weights of a checkpoint."""
    sizes = ModelConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=32, context=16)
    rows = manifest.tensors["model.lm_head.weight"].shape[0]
    model = build_model(sizes, vocabulary_size=rows, seed=1, device=torch.device("cpu"))
    tensors = {".".join(path): leaf for path, leaf in leaves({"model": model.state_dict()})}
    load(open_store(plan.uri), ref.uri.removeprefix(f"{plan.uri}/"), manifest, tensors, lambda: None)
    return model.eval()


async def test_a_run_is_found_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its prefix is looked for where its TrainingRun says; a name that is unknown is said to be."""
    async with a_cluster(tmp_path) as cluster:
        run = sample()
        run["spec"]["checkpoint"]["uri"] = f"file://{tmp_path}/store"
        await cluster.client.create(_DEFINITIONS, None, crd())
        await cluster.client.create(TRAINING_RUNS, "default", run)
        words = ["--to", str(tmp_path / "out"), "--kubeconfig", str(cluster.kubeconfig)]
        assert await asyncio.to_thread(main, ["checkpoint", "export", "clio", *words]) == 1
        assert "there is no checkpoint; on the lineage are: none" in capsys.readouterr().err
        assert await asyncio.to_thread(main, ["checkpoint", "export", "clia", *words]) == 1
        assert "clia" in capsys.readouterr().err


def test_a_sharded_run_is_exported_whole(tmp_path: Path) -> None:
    """Two FSDP2 ranks, one model: equal logits, and a tokenizer that reads the text back."""
    (tmp_path / "text").mkdir()
    text = a_little_text(tmp_path / "text")
    plan = CheckpointPlan(uri=f"file://{tmp_path}/store")
    vocabulary = {"data.vocabulary": "bpe", "data.vocabulary_size": 300}
    argv = tiny_arguments(text, steps=4, **{"parallel.strategy": "fsdp2", **vocabulary})
    zygote = Zygote()
    try:
        with a_gang(zygote, tmp_path / "ranks", argv, plan=plan) as gang:
            ref = gang.succeed().commits()[-1]
    finally:
        zygote.close()
    manifest = manifest_of(plan, ref)
    assert {chunk.key for chunk in manifest.tensors["model.lm_head.weight"].chunks} == {"__0_0.distcp", "__1_0.distcp"}
    assert main(["checkpoint", "export", plan.uri, "--to", str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    numbers = tokenizer("7 times 7 is 49", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(numbers).logits, the_model(plan, ref, manifest)(input_ids=numbers).logits)
    assert tokenizer.decode(numbers[0]) == "7 times 7 is 49"
    assert numbers.numel() < 15
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == tokenizer.eos_token_id
