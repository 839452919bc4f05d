"""The configuration of the reference trainer: YAML into one frozen tree, every mistake named with its remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import msgspec
import yaml
from msgspec import Meta

from mend.orders import CheckpointPlan
from mend_trainer.models.sizes import PRESETS, ModelConfig

AtLeastOne = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
T = TypeVar("T", bound=msgspec.Struct)


class BadConfig(ValueError):
    """The configuration cannot be used; the message names field, value and what is expected."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, and strict about names."""


class DataConfig(_Section, frozen=True, kw_only=True):
    """What to read: `text` is "stdlib", a file or a folder. Shards are kept below `cache` ("": ~/.cache/mend)."""

    text: str = "stdlib"
    vocabulary: Literal["bytes", "bpe"] = "bytes"
    vocabulary_size: Annotated[int, Meta(ge=257)] = 4096  # of a trained one
    sequence_length: Annotated[int, Meta(ge=2)] = 128
    cache: str = ""


class OptimizerConfig(_Section, frozen=True, kw_only=True):
    """AdamW and the clipping of its gradients (0: none)."""

    learning_rate: Positive = 3e-3
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    weight_decay: Annotated[float, Meta(ge=0)] = 0.1
    clip_norm: Annotated[float, Meta(ge=0)] = 1.0
    loss_scale: Positive = 65536.0  # the first one under float16, which adapts it from there


class ScheduleConfig(_Section, frozen=True, kw_only=True):
    """Learning rate over steps: linear warm-up, then a cosine, or level and a linear decay at the end (wsd)."""

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: NotNegative = 20
    decay_steps: NotNegative = 0  # wsd: length of the decay
    final_fraction: Fraction = 0.1


class ParallelConfig(_Section, frozen=True, kw_only=True):
    """How the model is spread over ranks. `bfloat16` and `float16` compute in 16 bits and keep float32 weights.

    `shard_ranks`: FSDP2 shards a copy of the model over at least so many ranks, and replicates it over the rest (0: one
    copy over all).
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU
    checkpoint_activations: bool = False
    shard_ranks: NotNegative = 0


class EvaluationConfig(_Section, frozen=True, kw_only=True):
    """Loss on held-out documents every so many steps (0: never), over `batches` global batches."""

    every_steps: NotNegative = 0
    batches: AtLeastOne = 4


class CheckpointConfig(_Section, frozen=True, kw_only=True):
    """Where a run saves that no controller looks after; under mend the TrainingRun's own checkpoint section holds."""

    uri: str
    endpoint: str | None = None
    every_steps: AtLeastOne | None = None
    every_seconds: Positive | None = None

    def plan(self) -> CheckpointPlan:
        """The same as the session takes it; every ten minutes unless an interval is set."""
        seconds = self.every_seconds if self.every_steps or self.every_seconds else 600.0
        return CheckpointPlan(
            uri=self.uri.rstrip("/"),
            endpoint=self.endpoint,
            interval_steps=self.every_steps,
            interval_seconds=seconds,
        )


class TrainConfig(_Section, frozen=True, kw_only=True):
    """Everything that a training run is made of. `global_batch` and `micro_batch` are in sequences.

    `accept_changes` names what may differ from the checkpoint that is restored: `global_batch` or fields of `model`.
    """

    steps: AtLeastOne = 200
    global_batch: AtLeastOne = 16
    micro_batch: AtLeastOne = 16  # most that a rank computes at once
    seed: NotNegative = 0
    deterministic: bool = True
    log_every_seconds: Annotated[float, Meta(ge=0)] = 2.0
    model: ModelConfig = PRESETS["tiny"]
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig | None = None
    accept_changes: tuple[str, ...] = ()


def read_config(path: Path | None, settings: Iterable[str] = ()) -> TrainConfig:
    """The configuration in the YAML file at `path` (None: the defaults), changed by "field.name=value" `settings`."""
    source = str(path) if path else "defaults"
    raw = _read_yaml(path) if path else {}
    for setting in settings:
        _set(raw, setting)
    return parse_config(raw, source)


def parse_config(raw: dict[str, Any], source: str = "config") -> TrainConfig:
    """The configuration from plain values; raises `BadConfig`."""
    config = _convert({**raw, "model": _with_preset(raw.get("model", {}), source)}, TrainConfig, source)
    for field, expected in config.model.problems().items():
        raise BadConfig(f"{source}: model.{field}: {getattr(config.model, field)!r}, {expected}")
    if config.parallel.precision == "float16" and config.parallel.strategy == "fsdp2":
        raise BadConfig(
            f"{source}: parallel.precision: 'float16', expected bfloat16 or float32 with strategy fsdp2, under which "
            "ranks would not agree on a loss scale"
        )
    acceptable = ("global_batch", *(f"model.{field}" for field in type(config.model).__struct_fields__))
    for name in config.accept_changes:
        if name not in acceptable:
            raise BadConfig(f"{source}: accept_changes: {name!r}, expected some of {', '.join(acceptable)}")
    if config.data.sequence_length > config.model.context:
        raise BadConfig(
            f"{source}: data.sequence_length: {config.data.sequence_length}, "
            f"expected at most model.context ({config.model.context})"
        )
    if config.schedule.warmup_steps + config.schedule.decay_steps > config.steps:
        raise BadConfig(
            f"{source}: schedule.warmup_steps: {config.schedule.warmup_steps}, "
            f"expected at most steps - schedule.decay_steps ({config.steps - config.schedule.decay_steps})"
        )
    return config


def _with_preset(model: Any, source: str) -> Any:
    """`preset` fills the sizes in; others beside it override single ones."""
    if not isinstance(model, dict):
        return model
    rest = dict(model)
    name = rest.pop("preset", "tiny")
    if name not in PRESETS:
        raise BadConfig(f"{source}: model.preset: {name!r}, expected one of {', '.join(PRESETS)}")
    return {**msgspec.to_builtins(PRESETS[name]), **rest}


def _convert(raw: Any, kind: type[T], source: str) -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise BadConfig(f"{source}: {_explained(str(error), raw, kind)}") from error


def _explained(message: str, raw: Any, kind: type[msgspec.Struct]) -> str:
    """msgspec says "Expected `int` >= 1 - at `$.data.x`": put the field first, and the value that it leaves out."""
    expectation, _, path = message.partition(" - at `$")
    fields = [field for field in path.rstrip("`").split(".") if field]
    unknown = re.search(r"unknown field `(.+)`", expectation)
    if unknown:
        known = [each.name for each in msgspec.structs.fields(_section(kind, fields))]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        return f"{'.'.join([*fields, unknown[1]])}: unknown field; {hint}"
    expectation = expectation[0].lower() + expectation[1:]
    if "enum" in expectation:
        found = _field(_section(kind, fields[:-1]), fields[-1])
        expectation = f"expected one of {', '.join(get_args(found.type))}"
    value = raw
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    return f"{'.'.join(fields) or 'the whole'}: {value!r}, {expectation}"


def _section(kind: type[msgspec.Struct], fields: list[str]) -> type[msgspec.Struct]:
    for name in fields:
        options = get_args(_field(kind, name).type) or (_field(kind, name).type,)
        kind = next(option for option in options if isinstance(option, type) and issubclass(option, msgspec.Struct))
    return kind


def _field(kind: type[msgspec.Struct], name: str) -> msgspec.structs.FieldInfo:
    return next(field for field in msgspec.structs.fields(kind) if field.name == name)


def _set(raw: dict[str, Any], setting: str) -> None:
    name, equals, value = setting.partition("=")
    if not equals or not name:
        raise BadConfig(f"--set {setting}: expected FIELD=VALUE, for example optimizer.learning_rate=0.001")
    *sections, field = name.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise BadConfig(f"--set {setting}: {section} holds {raw!r}, expected a section of fields")
    raw[field] = _load_yaml(value, f"--set {setting}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadConfig(f"{path}: {error.strerror}; expected a YAML file") from error
    raw = _load_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise BadConfig(f"{path}: {raw!r}, expected fields such as 'steps: 200'")
    return raw


class _Loader(yaml.SafeLoader):
    """Reads 3e-4 as a number, as YAML 1.2 and everybody does; PyYAML takes it for text."""


_FLOAT: Final = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _load_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise BadConfig(f"{source}: not YAML: {error}") from error
