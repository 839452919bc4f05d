"""An exported checkpoint is the model: transformers loads it with equal logits, or there is no folder at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from mend.cli import main
from mend.orders import CheckpointPlan
from mend.store import open_store
from mend_trainer.alone import next_attempt
from mend_trainer.blueprint import Blueprint, blueprint_of
from mend_trainer.data.vocabulary import tokenizer_files
from mend_trainer.export import Wanted, export
from mend_trainer.models.llama import build_model
from mend_trainer.models.sizes import ModelConfig
from mend_trainer.session import Session
from waiting import wait_until

_SIZES = ModelConfig(hidden_size=32, layers=3, heads=4, kv_heads=2, intermediate_size=48, context=64, rope_theta=5e5)
_TEXT = "for n in range(7): print('naïve – \x00')\n"


def a_reference_model() -> nn.Module:
    """That of the reference trainer, small."""
    return build_model(_SIZES, vocabulary_size=320, seed=3, device=torch.device("cpu"))


def a_saved_run(folder: Path, model: nn.Module, blueprint: Blueprint | None, steps: int = 1) -> str:
    """The prefix of a run that saved the model after each step; its store is a folder."""
    uri = f"file://{folder}/store/run"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(24).view(2, 12)
    plan = CheckpointPlan(uri=uri, interval_steps=1)
    with Session(model=model, optimizer=optimizer, blueprint=blueprint, checkpoint=plan) as session:
        for step in session.steps(steps):
            model(input_ids=tokens + step).logits.logsumexp(-1).mean().backward()
            optimizer.step()
            session.completed(tokens=24)
            wait_until(lambda step=step: len(list((folder / "store").rglob("manifest.json"))) == step + 1, "a commit")
    if blueprint is not None:
        blueprint.keep(open_store(uri))  # the session does it in a thread that may still be at it
    return uri


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """The folder of a run that saved a reference model, and the model as it was saved last."""
    folder, model = tmp_path_factory.mktemp("original"), a_reference_model()
    files, _ = tokenizer_files(folder, _SIZES.context)
    a_saved_run(folder, model, blueprint_of(model, files), steps=2)
    return folder, model


@pytest.fixture
def saved(original: tuple[Path, nn.Module], tmp_path: Path) -> tuple[str, nn.Module]:
    """The same for a test to spoil: its prefix, and the model."""
    folder, model = original
    shutil.copytree(folder / "store", tmp_path / "store")
    for older in (tmp_path / "store" / "run").glob("step-000000000000"):
        shutil.rmtree(older)
    return f"file://{tmp_path}/store/run", model


def logits(model: Any) -> torch.Tensor:
    """What a model says of some text."""
    with torch.no_grad():
        said: torch.Tensor = model.eval()(input_ids=torch.arange(60).view(3, 20)).logits
    return said


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says when it exports nothing."""
    assert main(["checkpoint", "export", *words]) == 1
    return capsys.readouterr().err


def test_transformers_loads_the_very_model(saved: tuple[str, nn.Module], tmp_path: Path) -> None:
    """Logits are equal bit for bit, and the folder says which checkpoint it is."""
    uri, model = saved
    assert main(["checkpoint", "export", uri, "--to", str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    told = json.loads((tmp_path / "out" / "mend.json").read_text())
    assert (told["step"], told["tokens"]) == (1, 48)
    assert told["checkpoint"] == next_attempt(open_store(uri))[1][0].uri


def test_the_tokenizer_of_bytes_is_exported(saved: tuple[str, nn.Module], tmp_path: Path) -> None:
    """Every byte is its own number, as the trainer packed it, and back."""
    assert main(["checkpoint", "export", saved[0], "--to", str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    numbers = tokenizer(_TEXT)["input_ids"]
    assert numbers == list(_TEXT.encode())
    assert tokenizer.decode(numbers) == _TEXT
    assert tokenizer.eos_token_id == 256


def test_large_weights_come_in_several_files(saved: tuple[str, nn.Module], tmp_path: Path) -> None:
    """With the index by which transformers finds each tensor; no file is larger than asked, unless by one tensor."""
    uri, model = saved
    store = open_store(uri)
    folder = next_attempt(store)[1][0].uri.removeprefix(f"{store.uri}/")
    export(store, Wanted(folder=folder, target=tmp_path / "out", file_bytes=20_000))
    files = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_weights_can_be_halved(saved: tuple[str, nn.Module], tmp_path: Path) -> None:
    """In bfloat16 it is the model that torch makes of it by rounding, and the configuration says so."""
    uri, model = saved
    assert main(["checkpoint", "export", uri, "--to", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in loaded.state_dict().items())


def test_a_model_of_transformers_keeps_its_names(tmp_path: Path) -> None:
    """Tied weights are written once, buffers are kept, and the tokenizer may be given by hand."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    uri = a_saved_run(tmp_path, model, blueprint_of(model))
    hand = tmp_path / "hand"
    hand.mkdir()
    for name, raw in tokenizer_files(tmp_path, 32)[0].items():
        (hand / name).write_bytes(raw)
    assert main(["checkpoint", "export", uri, "--to", str(tmp_path / "out"), "--tokenizer", str(hand)]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[8:]
    assert b"lm_head" not in header[: header.index(b"}}")]


def test_an_earlier_step_can_be_chosen(original: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """By its number or by its own address: the same weights, and not those of the newest."""
    uri = f"file://{original[0]}/store/run"
    assert main(["checkpoint", "export", uri, "--to", str(tmp_path / "one"), "--step", "0"]) == 0
    address = json.loads((tmp_path / "one" / "mend.json").read_text())["checkpoint"]
    assert main(["checkpoint", "export", address, "--to", str(tmp_path / "two")]) == 0
    assert main(["checkpoint", "export", uri, "--to", str(tmp_path / "newest")]) == 0
    one, two, newest = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("one", "two", "newest"))
    assert one == two != newest


def test_a_run_goes_on_with_and_without_a_blueprint(tmp_path: Path) -> None:
    """It is no part of the state: a checkpoint that has one restores where none is given, and the other way round."""
    files, _ = tokenizer_files(tmp_path, _SIZES.context)
    for steps, with_it in ((1, True), (2, False), (3, True)):
        model = a_reference_model()
        uri = a_saved_run(tmp_path, model, blueprint_of(model, files) if with_it else None, steps)
    store = open_store(uri)
    assert [ref.step for ref in next_attempt(store)[1]] == [2, 1, 0]


def test_an_unknown_step_is_answered_with_the_known(
    saved: tuple[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So is a prefix without any checkpoint, and one that is no address."""
    uri, _ = saved
    out = str(tmp_path / "out")
    assert "on the lineage are: 1" in refusal(capsys, uri, "--to", out, "--step", "7")
    assert "on the lineage are: none" in refusal(capsys, f"{uri}-other", "--to", out)
    assert "expected s3://" in refusal(capsys, "gs://bucket/run", "--to", out)
    assert not Path(out).exists()


def _a_config(tmp_path: Path, **changes: Any) -> str:
    config = {**blueprint_of(a_reference_model()).config, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["NobodysModel"]}, "'NobodysModel' is none that transformers"),
        ({"model_type": "nobodys"}, "cannot be built by its configuration"),
        ({"hidden_size": "wide"}, "cannot be built by its configuration"),
        ({"num_hidden_layers": 4}, "layers.3.mlp.down_proj.weight: not in the checkpoint"),
        ({"num_hidden_layers": 2}, "layers.2.mlp.down_proj.weight: not part of the architecture"),
        ({"intermediate_size": 64}, "[32, 48] in the checkpoint, [32, 64] by the configuration"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    config: dict[str, Any],
    said: str,
    saved: tuple[str, nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is written, naming what does not fit and the option that puts it right."""
    words = (saved[0], "--to", str(tmp_path / "out"), "--config", _a_config(tmp_path, **config))
    told = refusal(capsys, *words)
    assert said in told
    assert "--config" in told
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_blueprint_can_be_given_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is asked for what it lacks, one thing after the other, and exported once it has both."""
    model = a_reference_model()
    uri = a_saved_run(tmp_path, model, None)
    out = str(tmp_path / "out")
    assert "config.json by --config" in refusal(capsys, uri, "--to", out)
    config = _a_config(tmp_path)
    assert "--tokenizer" in refusal(capsys, uri, "--to", out, "--config", config)
    assert "expected a folder" in refusal(capsys, uri, "--to", out, "--config", config, "--tokenizer", "/nowhere")
    assert "no tokenizer.json" in refusal(capsys, uri, "--to", out, "--config", config, "--tokenizer", str(tmp_path))
    assert "config.json of transformers" in refusal(capsys, uri, "--to", out, "--config", "/nowhere.json")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_files(tmp_path / "none", 64)[0]["tokenizer.json"])
    assert main(["checkpoint", "export", uri, "--to", out, "--config", config, "--tokenizer", str(tmp_path)]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


def _of(uri: str, pattern: str) -> Path:
    """The one file of that name below the store."""
    (found,) = Path(uri.removeprefix("file://")).rglob(pattern)
    return found


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda uri: _of(uri, "*.distcp").unlink(), "is damaged"),
        (lambda uri: _of(uri, "*.distcp").write_bytes(bytes(1 << 20)), "do not have their digest"),
        (lambda uri: _flip(_of(uri, "manifest.json")), "it is in quarantine"),
        (lambda uri: _of(uri, "manifest.json").with_name("quarantine.json").write_text("{}"), "it is in quarantine"),
        (lambda uri: _of(uri, "*-tokenizer.json").unlink(), "--tokenizer"),
        (lambda uri: _flip(_of(uri, "*-tokenizer.json")), "--tokenizer"),
    ],
)
def test_what_is_damaged_is_not_exported(
    spoil: Callable[[str], object],
    said: str,
    saved: tuple[str, nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An object that is missing or changed leaves no folder, whole or in part."""
    address = next_attempt(open_store(saved[0]))[1][0].uri
    spoil(saved[0])
    assert said in refusal(capsys, address, "--to", str(tmp_path / "out" / "clio"))
    assert not list(tmp_path.glob("out/*"))


def test_with_a_key_only_what_is_signed_is_exported(
    saved: tuple[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same signatures as a restore asks for; what was not signed with the run's key may be anybody's."""
    (tmp_path / "key").write_text("0123456789abcdef")
    words = ("--signing-key", str(tmp_path / "key"), "--run-name", "default/clio")
    assert "sign" in refusal(capsys, saved[0], "--to", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(
    saved: tuple[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a file of that name; an empty folder is taken."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    assert "there is something already" in refusal(capsys, saved[0], "--to", str(tmp_path / "full"))
    assert "there is something already" in refusal(capsys, saved[0], "--to", str(tmp_path / "full" / "thesis.txt"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert main(["checkpoint", "export", saved[0], "--to", str(tmp_path / "empty")]) == 0


def test_a_disk_that_is_too_small_is_told_before(
    saved: tuple[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How much is needed, how much is free, and what helps."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "mend", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        told = refusal(capsys, saved[0], "--to", str(disk / "out"))
        assert "needed" in told
        assert "--dtype bfloat16" in told
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_export_that_was_killed_looks_like_none_and_can_be_repeated(
    saved: tuple[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While one is writing another keeps off; after a SIGKILL the next clears away what it left."""
    uri, model = saved
    out = tmp_path / "out"
    weights = _of(uri, "*.distcp")
    aside = weights.rename(weights.with_name("aside"))
    os.mkfifo(weights)  # whoever reads it waits, as for a store that does not answer
    command = ["checkpoint", "export", uri, "--to", str(out)]
    code = f"import sys; from mend.cli import main; sys.exit(main({command!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    try:
        partial = tmp_path / ".out.unfinished" / "model.safetensors"
        wait_until(partial.exists, "the export to be writing", 60)
        assert "another export is writing there" in refusal(capsys, *command[2:])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert partial.exists()
    assert not out.exists()
    aside.replace(weights)
    assert main(command) == 0
    assert not partial.parent.exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
