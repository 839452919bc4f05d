"""The blueprint of a model: what `transformers` reads beside its weights, carried by every checkpoint for its export.

Its configuration lies in the manifest's values. The files of its tokenizer, which may be large and never change, lie
once in the run's prefix under the digest of their bytes, and the manifest names them.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash
from torch import nn

from mend.keys import TOKENIZERS_FOLDER
from mend.protocol import Message
from mend.store import NotFound, Store, StoreError

BLUEPRINT: Final = "blueprint"  # its name among the values of a manifest
_FILES: Final = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template)[\w-]*\.\w+|(spiece|sentencepiece)[\w.-]*\.model"
)
_OF_TRAINING: Final = ("use_cache", "_from_model_config")  # a cache is switched off to train, not to generate

_log = logging.getLogger(__name__)


class BadBlueprint(ValueError):
    """The blueprint that a checkpoint carries cannot be had; the message says what is missing."""


class _Carried(Message, frozen=True, kw_only=True):
    """What the manifest holds of it."""

    config: dict[str, Any]
    generation: dict[str, Any] = {}
    tokenizer: dict[str, str] = {}  # digest of each file


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Contents of `config.json` and `generation_config.json`, and the tokenizer's files by name."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)

    def value(self) -> dict[str, Any]:
        """What goes into the manifest."""
        digests = {name: xxhash.xxh3_128_hexdigest(raw) for name, raw in self.tokenizer.items()}
        return {"config": dict(self.config), "generation": dict(self.generation), "tokenizer": digests}

    def keep(self, store: Store) -> None:
        """Put the tokenizer's files beside the checkpoints, unless they are there."""
        for name, raw in self.tokenizer.items():
            key = _key(name, xxhash.xxh3_128_hexdigest(raw))
            try:
                there = store.head(key).bytes == len(raw)
            except NotFound:
                there = False
            if not there:
                store.put(key, raw)

    def keep_soon(self, store: Store) -> None:
        """The same without making a start wait. A failure costs the export its tokenizer, never the run a step."""

        def work() -> None:
            try:
                self.keep(store)
            except StoreError as error:
                _log.warning("the tokenizer was not kept, so an export will have to be given it: %s", error)

        threading.Thread(target=work, name="mend-tokenizer", daemon=True).start()


def blueprint_of(model: nn.Module, tokenizer: Any = None) -> Blueprint:
    """That of a `transformers` model, also inside DDP, FSDP2 or torch.compile.

    `tokenizer` is one of `transformers`, or its files by name. Raises TypeError for a model without a configuration.
    """
    while not hasattr(model, "config") and (inner := getattr(model, "module", getattr(model, "_orig_mod", None))):
        model = inner
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        raise TypeError(f"{type(model).__name__} has no configuration of transformers, so it has no blueprint")
    described = {**_plain(config), "architectures": [_architecture(model)]}
    generation = getattr(model, "generation_config", None)
    return Blueprint(
        config=described,
        generation=_plain(generation) if generation is not None else {},
        tokenizer=tokenizer if isinstance(tokenizer, Mapping) else _files_of(tokenizer),
    )


def read_blueprint(values: Mapping[str, Any], store: Store, *, with_tokenizer: bool = True) -> Blueprint | None:
    """The one that these values carry; None if they carry none. Raises `BadBlueprint`, `StoreError`."""
    if BLUEPRINT not in values:
        return None
    try:
        carried = msgspec.convert(values[BLUEPRINT], _Carried)
    except msgspec.ValidationError as error:
        raise BadBlueprint(f"the checkpoint's blueprint: {error}") from error
    files = {name: _fetch(store, name, digest) for name, digest in carried.tokenizer.items()} if with_tokenizer else {}
    return Blueprint(config=carried.config, generation=carried.generation, tokenizer=files)


def is_of_a_tokenizer(name: str) -> bool:
    """Whether a file of that name belongs to a tokenizer."""
    return _FILES.fullmatch(name) is not None


def _fetch(store: Store, name: str, digest: str) -> bytes:
    if not is_of_a_tokenizer(name):  # it would be written under that name, perhaps over something else
        raise BadBlueprint(f"the checkpoint's blueprint: {name!r} is no name of a tokenizer's file")
    key = _key(name, digest)
    try:
        raw = store.get(key)
    except NotFound as error:
        raise BadBlueprint(f"the tokenizer's {name} is not in the store: {error}") from error
    if xxhash.xxh3_128_hexdigest(raw) != digest:
        raise BadBlueprint(f"{store.uri}/{key}: its bytes do not have the digest that the checkpoint names")
    return raw


def _key(name: str, digest: str) -> str:
    return f"{TOKENIZERS_FOLDER}/{digest}-{name}"


def _plain(config: Any) -> dict[str, Any]:
    """As JSON, with infinities written as transformers writes them."""
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {name: value for name, value in plain.items() if name not in _OF_TRAINING}


def _architecture(model: nn.Module) -> str:
    """FSDP2 makes a class of its own for each model, and a user may derive one: others know that of transformers."""
    names = (kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    return next(names, type(model).__name__)


def _files_of(tokenizer: Any) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if is_of_a_tokenizer(path.name)}
