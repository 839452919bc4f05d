"""The CRD says exactly what the code reads and writes: fields, defaults, least values, enumerations, types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from crds import crd, sample, schema, walk
from mend import status
from mend.names import GROUP, KIND, PLURAL, VERSION
from mend.spec import InvalidSpec, Spec, parse_spec
from mend.status import MAX_INCIDENTS, RunStatus
from mend_local.schema import Schema

SPEC = schema()["properties"]["spec"]
STATUS = schema()["properties"]["status"]
TEMPLATE = "workers.template"


class Recorder(dict[str, Any]):
    """An object that remembers which of its fields were asked for."""

    def __init__(self, raw: dict[str, Any], path: str, asked: set[str]) -> None:
        super().__init__(raw)
        self.path, self.asked = path, asked

    def get(self, field: str, default: Any = None) -> Any:
        self.asked.add(f"{self.path}{field}")
        return super().get(field, default)


def recording(raw: dict[str, Any], path: str, asked: set[str]) -> Recorder:
    """A spec all of whose objects, also those in lists, but for the pod template, record."""

    def inner(value: Any, where: str) -> Any:
        if isinstance(value, list):
            return [inner(each, f"{where}[]") for each in value]
        return recording(value, f"{where}.", asked) if isinstance(value, dict) and where != TEMPLATE else value

    return Recorder({name: inner(value, f"{path}{name}") for name, value in raw.items()}, path, asked)


def spec_properties() -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields of the CRD's spec that are mend's own, that is, outside the pod template."""
    for path, below in walk(SPEC):
        if not path[1:].startswith(f"{TEMPLATE}."):
            yield path[1:], below


A_RULE = {
    "name": "broken disk",
    "action": "ExcludeNode",
    "onNodeConditions": [{"type": "ReadonlyFilesystem"}],
    "onExitCodes": {"operator": "In", "values": [3]},
}


def with_a_rule() -> dict[str, Any]:
    """The sample with a rule, so that fields of lists are there to be asked for."""
    run = sample()
    run["spec"]["recovery"] = {"rules": [A_RULE]}
    run["spec"]["checkpoint"]["keepBest"] = {"metric": "lambada_acc"}
    return run


def admitted() -> dict[str, Any]:
    """That sample's spec as the API server stores it: with every default of the CRD."""
    stored, unknown = Schema(schema()).admit(with_a_rule())
    assert unknown == []
    spec: dict[str, Any] = stored["spec"]
    return spec


def test_the_parser_asks_for_the_fields_of_the_crd_and_no_others() -> None:
    """A field in only one of the two would be refused by the API server or silently ignored by mend."""
    asked: set[str] = set()
    parse_spec(recording(admitted(), "", asked))
    assert asked == {path for path, _ in spec_properties()}


def test_defaults_of_crd_and_parser_are_equal() -> None:
    """What kubectl shows as default is what mend does when the field is missing."""
    assert parse_spec(admitted()) == parse_spec(with_a_rule()["spec"])


def test_a_field_without_default_in_the_crd_is_required_or_has_none_in_the_parser() -> None:
    """No default hides in the code: what it fills in, the CRD shows (minReplicas follows replicas).

    A list that is absent is an empty one; the fields of its items are compared where the sample has some.
    """
    spec = parse_spec(sample()["spec"])
    silent = [
        path
        for path, below in spec_properties()
        if below["type"] != "object" and "default" not in below and path.rsplit(".", 1)[-1] not in required_names()
        if "[]" not in path
    ]
    hidden = {path: value_at(spec, path) for path in silent if value_at(spec, path) not in (None, ())}
    assert hidden == {"workers.minReplicas": spec.workers.replicas}


def required_names() -> set[str]:
    """Fields that some object of the spec requires."""
    objects = [SPEC, *(below for _, below in spec_properties())]
    return {name for each in objects for name in each.get("required", ())}


WITH_UNITS = {
    "checkpoint.memory.interval": "checkpoint.memory.intervalSteps",
    "checkpoint.memory.peerBandwidth": "checkpoint.memory.peerBytesPerSecond",
}


def value_at(spec: Spec, path: str) -> Any:
    """The parsed value of a CRD field; where the code's name tells the unit, see `WITH_UNITS`."""
    here: Any = spec
    for name in WITH_UNITS.get(path, path).split("."):
        here = getattr(here, re.sub(r"([A-Z])", r"_\1", name).lower())
    return here


@pytest.mark.parametrize(
    ("path", "least"), [(path, below["minimum"]) for path, below in spec_properties() if "minimum" in below]
)
def test_least_values_of_crd_and_parser_are_equal(path: str, least: int) -> None:
    """The parser takes the least value that the CRD allows; both refuse one less, and name the field."""
    assert path.endswith("minReplicas") or parse_spec(with_value(path, least))
    with pytest.raises(InvalidSpec, match=re.escape(f"spec.{path}: got {least - 1}")):
        parse_spec(with_value(path, least - 1))
    run = sample() | {"spec": with_value(path, least - 1)}
    assert any(path in cause.field for cause in Schema(schema()).problems(run, None))


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The sample's spec with one field set, and what that field requires beside it."""
    spec = sample()["spec"]
    if path.startswith("checkpoint.keepBest."):
        spec["checkpoint"]["keepBest"] = {"metric": "lambada_acc"}
    *parents, last = path.split(".")
    here = spec
    for name in parents:
        here = here.setdefault(name, {})
    here[last] = value
    return spec  # type: ignore[no-any-return]


DURATIONS = [
    "10m",
    "1h30m",
    "300ms",
    "24h",
    "1h2m3s4ms",
    "10",
    "",
    "m",
    "1.5s",
    "-1s",
    "1d",
    " 1s",
    "1s1m",
    "9999999999s",
]


@pytest.mark.parametrize("text", DURATIONS)
def test_patterns_of_crd_and_parser_agree_on_durations(text: str) -> None:
    """The API server refuses the durations that mend would refuse (but for zero, which no pattern tells)."""
    for path in ("health.limits.start", "checkpoint.interval", "recovery.budgets.window"):
        run = sample() | {"spec": with_value(path, text)}
        assert bool(Schema(schema()).problems(run, None)) == bool(refused(run["spec"])), path


URIS = [
    "s3://bucket",
    "s3://bucket/a/b",
    "s3://B/x",
    "s3:///x",
    "gs://b",
    "file:///data/x",
    "file:///",
    "file://x",
    "/data",
]


@pytest.mark.parametrize("text", URIS)
def test_patterns_of_crd_and_parser_agree_on_uris(text: str) -> None:
    """The API server refuses the prefixes that mend would refuse."""
    run = sample() | {"spec": with_value("checkpoint.uri", text)}
    assert bool(Schema(schema()).problems(run, None)) == bool(refused(run["spec"]))


QUANTITIES = [
    "500Mi",
    "1G",
    "1",
    "1024Ki",
    "0",
    "0Mi",
    "-1",
    "1.5G",
    "1m",
    "500 Mi",
    "Mi",
    "9999999999",
    "999999999Gi",
    "1Ti",
]
STEPS = ["1 step", "10 steps", "0 steps", "10", "10m", "1  step", "-1 steps", "9999999999 steps"]


@pytest.mark.parametrize(
    ("path", "text"),
    [("checkpoint.memory.peerBandwidth", each) for each in QUANTITIES]
    + [("checkpoint.memory.interval", each) for each in STEPS],
)
def test_patterns_of_crd_and_parser_agree_on_the_memory_tier(path: str, text: str) -> None:
    """The API server refuses the quantities and intervals that mend would refuse."""
    run = sample() | {"spec": with_value(path, text)}
    assert bool(Schema(schema()).problems(run, None)) == bool(refused(run["spec"]))


def refused(spec: dict[str, Any]) -> tuple[str, ...]:
    """What the parser says against a spec."""
    try:
        parse_spec(spec)
    except InvalidSpec as refusal:
        return refusal.problems
    return ()


# ------------------------------------------------------------------------------------------------ status
def shape_of_crd(raw: dict[str, Any]) -> Any:
    """A schema as nested names, types and enumerations, without words and bounds."""
    if raw["type"] == "object" and "additionalProperties" in raw:
        return {"*": shape_of_crd(raw["additionalProperties"])}
    if raw["type"] == "object":
        return {name: shape_of_crd(below) for name, below in raw["properties"].items()}
    if raw["type"] == "array":
        return [shape_of_crd(raw["items"])]
    if "enum" in raw:
        return set(raw["enum"])
    return raw.get("format") if raw.get("format") == "date-time" else raw["type"]


def shape_of_code(kind: msgspec.inspect.Type, name: str = "") -> Any:
    """The same of a type of the code, as the writer of the status turns it into JSON."""
    match kind:
        case msgspec.inspect.UnionType(types=types):
            (only,) = [each for each in types if not isinstance(each, msgspec.inspect.NoneType)]
            return shape_of_code(only, name)
        case msgspec.inspect.StructType(cls=status.Condition):
            return CONDITION
        case msgspec.inspect.StructType(fields=fields):
            return {each.encode_name: shape_of_code(each.type, each.encode_name) for each in fields}
        case msgspec.inspect.VarTupleType(item_type=item):
            return [shape_of_code(item)]
        case msgspec.inspect.DictType(value_type=value):
            return {"*": shape_of_code(value)}
        case msgspec.inspect.EnumType(cls=cls):
            return {each.value for each in cls}
        case msgspec.inspect.FloatType():
            return "date-time" if name.endswith("At") else "number"
        case msgspec.inspect.IntType():
            return "integer"
        case msgspec.inspect.BoolType():
            return "boolean"
    assert isinstance(kind, msgspec.inspect.StrType), kind
    return "string"


CONDITION = {
    "type": "string",
    "status": {"True", "False", "Unknown"},
    "reason": "string",
    "message": "string",
    "lastTransitionTime": "date-time",
    "observedGeneration": "integer",
}


def test_the_status_in_the_crd_is_what_the_controller_remembers() -> None:
    """A field missing in the schema would be pruned by the API server, and the next leader would have forgotten it."""
    assert shape_of_crd(STATUS) == shape_of_code(msgspec.inspect.type_info(RunStatus))


def test_the_status_defaults_are_the_codes() -> None:
    """The defaults that kubectl's columns need say what a missing field means to mend."""
    shown = {path[1:]: below["default"] for path, below in walk(STATUS) if "default" in below}
    fresh = {field.encode_name: field.default for field in msgspec.structs.fields(RunStatus)}
    assert shown == {name: fresh[name] for name in shown}


def test_the_incidents_are_bounded_as_in_the_code() -> None:
    """The API server would refuse a status with more incidents than the schema allows."""
    assert STATUS["properties"]["incidents"]["maxItems"] == MAX_INCIDENTS


def test_the_names_are_those_of_the_wire_contract() -> None:
    """Group, kind and plural are written twice only, in YAML and in names.py."""
    spec = crd()["spec"]
    assert (spec["group"], spec["names"]["kind"], spec["names"]["plural"]) == (GROUP, KIND, PLURAL)
    assert [each["name"] for each in spec["versions"]] == [VERSION]
    assert crd()["metadata"]["name"] == f"{PLURAL}.{GROUP}"
