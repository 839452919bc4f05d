"""Pure: the Kubernetes objects of a run, made from its spec and the attempt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from mend.environment import (
    ENV_AGENT_PORT,
    ENV_GRACE_SECONDS,
    ENV_HEARTBEAT_SECONDS,
    ENV_POD_IP,
    ENV_POD_UID,
    ENV_RANKS_PER_WORKER,
    ENV_RUN,
    ENV_RUN_UID,
    ENV_SIGNING_KEY,
    ENV_STORE_AUTHORITY,
    ENV_STORE_REQUESTS,
    ENV_TLS_PEM,
    ENV_TOKEN,
    ENV_WORKER,
    ENV_WORKERS,
)
from mend.names import (
    AGENT_COMMAND,
    AGENT_PORT_NAME,
    ANNOTATION_AVOIDS,
    API_VERSION,
    AUTHORITY_SECRET_KEY,
    KIND,
    LABEL_ATTEMPT,
    LABEL_MANAGED_BY,
    LABEL_RUN,
    LABEL_WORKER,
    SIGNING_SECRET_KEY,
    TLS_SECRET_KEY,
    TOKEN_SECRET_KEY,
    TRAINER_CONTAINER,
)
from mend.observation import Observation
from mend.protocol import AGENT_PORT
from mend.spec import Spec

JsonObject = dict[str, Any]
DEFAULT_GRACE_SECONDS = 30
HOSTNAME = "kubernetes.io/hostname"  # the label by which pods are kept off a node; it is the node's name, as a rule
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def token_secret_name(run: str) -> str:
    """The Secret that holds the token between controller and agents."""
    return f"{run}-mend-token"


def tls_secret_name(run: str) -> str:
    """The Secret that holds the key and certificate by which workers know each other.

    Not the token's: the controller may make Secrets and not change them, and an older mend has made one without it.
    """
    return f"{run}-mend-tls"


def service_name(run: str) -> str:
    """The headless service that gives workers their DNS names."""
    return run


def worker_name(run: str, index: int, attempt: int) -> str:
    """A name never used twice in a run, so that a replacement need not wait for its predecessor's end."""
    return f"{run}-{index}-a{attempt}"


def labels(run: str) -> dict[str, str]:
    """What every object of the run carries."""
    return {LABEL_RUN: run, LABEL_MANAGED_BY: "mend"}


def token_secret(seen: Observation, token: str) -> JsonObject:
    """The Secret with the run's token."""
    return _secret(seen, token_secret_name(seen.name), TOKEN_SECRET_KEY, token)


def tls_secret(seen: Observation, pem: str) -> JsonObject:
    """The Secret with the run's key and certificate."""
    return _secret(seen, tls_secret_name(seen.name), TLS_SECRET_KEY, pem)


def _secret(seen: Observation, name: str, key: str, value: str) -> JsonObject:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": _metadata(seen, name), "stringData": {key: value}}


def service(seen: Observation) -> JsonObject:
    """The headless service; it publishes workers before they are ready, since ranks meet before they train."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(seen, service_name(seen.name)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels(seen.name),
            "ports": [{"name": AGENT_PORT_NAME, "port": AGENT_PORT}],
        },
    }


def worker(spec: Spec, seen: Observation, index: int, attempt: int, avoid: Sequence[str] = ()) -> JsonObject:
    """The pod of one worker: the user's template, its command put under mend's agent, off the nodes to `avoid`."""
    template = copy.deepcopy(spec.workers.template)
    pod_spec: JsonObject = template.get("spec") or {}
    meta = _metadata(seen, worker_name(seen.name, index, attempt))
    own = template.get("metadata") or {}
    meta["labels"] = {
        **(own.get("labels") or {}),
        **meta["labels"],
        LABEL_WORKER: str(index),
        LABEL_ATTEMPT: str(attempt),
    }
    if own.get("annotations"):
        meta["annotations"] = own["annotations"]
    pod_spec["restartPolicy"] = "Never"
    pod_spec.setdefault("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
    pod_spec["subdomain"] = service_name(seen.name)
    pod_spec["hostname"] = meta["name"]
    if spec.priority_class_name:
        pod_spec["priorityClassName"] = spec.priority_class_name
    if avoid:
        pod_spec["affinity"] = _away_from(avoid, pod_spec.get("affinity") or {})
        meta["annotations"] = {**meta.get("annotations", {}), ANNOTATION_AVOIDS: ",".join(avoid)}
    trainer = next(each for each in pod_spec["containers"] if each.get("name") == TRAINER_CONTAINER)
    _put_under_agent(trainer, spec, seen, index, int(pod_spec["terminationGracePeriodSeconds"]))
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod_spec}


def _away_from(nodes: Sequence[str], affinity: JsonObject) -> JsonObject:
    """The template's affinity, with every way to satisfy it barred for these nodes: its terms are alternatives."""
    expression = {"key": HOSTNAME, "operator": "NotIn", "values": list(nodes)}
    node_affinity = affinity.get("nodeAffinity") or {}
    terms = (node_affinity.get(REQUIRED) or {}).get("nodeSelectorTerms") or [{}]
    barred = [{**term, "matchExpressions": [*(term.get("matchExpressions") or []), expression]} for term in terms]
    return {**affinity, "nodeAffinity": {**node_affinity, REQUIRED: {"nodeSelectorTerms": barred}}}


def _put_under_agent(trainer: JsonObject, spec: Spec, seen: Observation, index: int, grace_seconds: int) -> None:
    trainer["command"] = [AGENT_COMMAND, "--", *trainer["command"]]
    trainer["env"] = _merged_env(trainer.get("env") or [], _agent_env(spec, seen, index, grace_seconds))
    if spec.checkpoint.credentials_secret:
        source = {"secretRef": {"name": spec.checkpoint.credentials_secret}}
        trainer["envFrom"] = [*(trainer.get("envFrom") or []), source]
        # By itself and not by envFrom, which leaves out keys that are no names of variables.
        authority = {"name": spec.checkpoint.credentials_secret, "key": AUTHORITY_SECRET_KEY, "optional": True}
        ours = [{"name": ENV_STORE_AUTHORITY, "valueFrom": {"secretKeyRef": authority}}]
        trainer["env"] = _merged_env(trainer["env"], ours)
    port = {"name": AGENT_PORT_NAME, "containerPort": AGENT_PORT}
    trainer["ports"] = [*(trainer.get("ports") or []), port]


def _agent_env(spec: Spec, seen: Observation, index: int, grace_seconds: int) -> list[JsonObject]:
    plain = {
        ENV_RUN: f"{seen.namespace}/{seen.name}",
        ENV_RUN_UID: seen.uid,
        ENV_WORKER: str(index),
        ENV_WORKERS: str(spec.workers.replicas),
        ENV_RANKS_PER_WORKER: str(spec.workers.ranks_per_worker),
        ENV_AGENT_PORT: str(AGENT_PORT),
        ENV_HEARTBEAT_SECONDS: f"{spec.health.heartbeat_seconds:g}",
        ENV_GRACE_SECONDS: str(grace_seconds),
    }
    if spec.checkpoint.requests_per_second:
        plain[ENV_STORE_REQUESTS] = str(spec.checkpoint.requests_per_second)
    secrets = {
        ENV_TOKEN: (token_secret_name(seen.name), TOKEN_SECRET_KEY),
        ENV_TLS_PEM: (tls_secret_name(seen.name), TLS_SECRET_KEY),
    }
    if spec.checkpoint.signing_secret:
        secrets[ENV_SIGNING_KEY] = (spec.checkpoint.signing_secret, SIGNING_SECRET_KEY)
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        {"name": ENV_POD_IP, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": ENV_POD_UID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        *(
            {"name": env, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
            for env, (name, key) in secrets.items()
        ),
    ]


def _merged_env(users: list[JsonObject], ours: list[JsonObject]) -> list[JsonObject]:
    """The user's variables, then mend's, which win."""
    names = {each["name"] for each in ours}
    return [each for each in users if each.get("name") not in names] + ours


def _metadata(seen: Observation, name: str) -> JsonObject:
    return {
        "name": name,
        "namespace": seen.namespace,
        "labels": labels(seen.name),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": seen.name,
                "uid": seen.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }
