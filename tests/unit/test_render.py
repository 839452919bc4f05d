"""The objects of a run: the user's template as it was, its command under mend's agent, and who owns what."""

from __future__ import annotations

import copy
from typing import Any

from msgspec.structs import replace

from mend import render
from mend.environment import (
    ENV_GRACE_SECONDS,
    ENV_HEARTBEAT_SECONDS,
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
from mend.names import ANNOTATION_AVOIDS, LABEL_ATTEMPT, LABEL_MANAGED_BY, LABEL_RUN, LABEL_WORKER
from mend.observation import Observation
from mend.spec import parse_spec
from mend.status import RunStatus

TEMPLATE: dict[str, Any] = {
    "metadata": {"labels": {"team": "clio", LABEL_RUN: "forged"}, "annotations": {"note": "mine"}},
    "spec": {
        "nodeSelector": {"gpu": "h100"},
        "terminationGracePeriodSeconds": 90,
        "containers": [
            {"name": "sidecar", "image": "logs:1"},
            {
                "name": "trainer",
                "image": "clio:1",
                "command": ["python", "-m", "train"],
                "args": ["--size", "3b"],
                "env": [{"name": "LR", "value": "3e-4"}, {"name": ENV_WORKER, "value": "99"}],
                "envFrom": [{"configMapRef": {"name": "settings"}}],
                "ports": [{"containerPort": 9000}],
            },
        ],
    },
}
SPEC = parse_spec(
    {
        "workers": {"replicas": 3, "ranksPerWorker": 8, "template": TEMPLATE},
        "checkpoint": {"uri": "s3://bucket/clio", "credentialsSecret": "s3-keys", "signingSecret": "clio-signing"},
        "priorityClassName": "training",
    }
)
SEEN = Observation(name="clio", namespace="team", uid="u-1", generation=1, created_at=0.0, status=RunStatus())
OWNER = {
    "apiVersion": "mend.dev/v1alpha1",
    "kind": "TrainingRun",
    "name": "clio",
    "uid": "u-1",
    "controller": True,
    "blockOwnerDeletion": True,
}


def a_worker() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of worker 2 in attempt 7, and its trainer."""
    pod = render.worker(SPEC, SEEN, 2, 7)
    return pod, pod["spec"]["containers"][1]


def test_everything_is_owned_by_the_run_and_labelled() -> None:
    """So that it goes when the run goes, and selectors find it."""
    secrets = render.token_secret(SEEN, "secret"), render.tls_secret(SEEN, "pem")
    for made in (render.worker(SPEC, SEEN, 0, 1), render.service(SEEN), *secrets):
        assert made["metadata"]["ownerReferences"] == [OWNER]
        assert made["metadata"]["namespace"] == "team"
        labels = made["metadata"]["labels"]
        assert (labels[LABEL_RUN], labels[LABEL_MANAGED_BY]) == ("clio", "mend")


def test_a_pod_tells_worker_and_attempt() -> None:
    """By name and by label; a name is never used twice. The user's labels stay, but cannot pass for mend's."""
    pod, _ = a_worker()
    labels = pod["metadata"]["labels"]
    assert pod["metadata"]["name"] == "clio-2-a7"
    assert (labels[LABEL_WORKER], labels[LABEL_ATTEMPT]) == ("2", "7")
    assert (labels["team"], labels[LABEL_RUN]) == ("clio", "clio")
    assert pod["metadata"]["annotations"] == {"note": "mine"}
    assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == ("clio-2-a7", "clio")


def test_the_command_runs_under_the_agent_and_its_words_stay() -> None:
    """`args` stay where they are: they follow the command."""
    _, trainer = a_worker()
    assert trainer["command"] == ["mend-agent", "--", "python", "-m", "train"]
    assert trainer["args"] == ["--size", "3b"]


def test_the_users_environment_is_kept_and_mends_wins() -> None:
    """Variables of the user come first; one that would mislead the agent is replaced."""
    _, trainer = a_worker()
    names = [each["name"] for each in trainer["env"]]
    values = {each["name"]: each.get("value") for each in trainer["env"]}
    assert names[0] == "LR"
    assert len(names) == len(set(names))
    assert values["LR"] == "3e-4"
    assert values[ENV_RUN] == "team/clio"
    assert values[ENV_RUN_UID] == "u-1"
    assert values[ENV_WORKER] == "2"
    assert values[ENV_WORKERS] == "3"
    assert values[ENV_RANKS_PER_WORKER] == "8"
    assert values[ENV_HEARTBEAT_SECONDS] == "0.3"
    assert values[ENV_GRACE_SECONDS] == "90"


def test_the_token_comes_from_the_secret_and_stands_nowhere_else() -> None:
    """Whoever may read pods may not give orders."""
    _, trainer = a_worker()
    source = next(each for each in trainer["env"] if each["name"] == ENV_TOKEN)
    secret = render.token_secret(SEEN, "s3cret")
    assert source["valueFrom"]["secretKeyRef"] == {"name": secret["metadata"]["name"], "key": "token"}
    assert secret["stringData"] == {"token": "s3cret"}


def test_the_runs_certificate_and_the_signing_key_come_from_secrets_too() -> None:
    """By reference, in Secrets apart from the token's: those of an older mend are never written to."""
    _, trainer = a_worker()
    sources = {each["name"]: each.get("valueFrom", {}).get("secretKeyRef") for each in trainer["env"]}
    secret = render.tls_secret(SEEN, "key and certificate")
    assert sources[ENV_TLS_PEM] == {"name": secret["metadata"]["name"], "key": "tls.pem"}
    assert secret["stringData"] == {"tls.pem": "key and certificate"}
    assert secret["metadata"]["name"] != render.token_secret(SEEN, "s3cret")["metadata"]["name"]
    assert sources[ENV_SIGNING_KEY] == {"name": "clio-signing", "key": "signing.key"}


def test_without_a_signing_secret_nothing_is_signed() -> None:
    """The variable is absent, not empty."""
    checkpoint = replace(SPEC.checkpoint, signing_secret=None)
    pod = render.worker(replace(SPEC, checkpoint=checkpoint), SEEN, 0, 1)
    assert ENV_SIGNING_KEY not in {each["name"] for each in pod["spec"]["containers"][1]["env"]}


def test_credentials_join_the_users_sources() -> None:
    """Ranks write to the store with the Secret that the spec names."""
    _, trainer = a_worker()
    assert trainer["envFrom"] == [{"configMapRef": {"name": "settings"}}, {"secretRef": {"name": "s3-keys"}}]
    assert trainer["ports"] == [{"containerPort": 9000}, {"name": "mend-agent", "containerPort": 7117}]


def test_the_stores_authority_comes_with_its_credentials() -> None:
    """`ca.crt` of the Secret with the credentials, where there is one, reaches the ranks as a variable of its own."""
    _, trainer = a_worker()
    (found,) = [each for each in trainer["env"] if each["name"] == ENV_STORE_AUTHORITY]
    assert found["valueFrom"] == {"secretKeyRef": {"name": "s3-keys", "key": "ca.crt", "optional": True}}


def test_the_request_budget_reaches_every_process_that_opens_the_store() -> None:
    """As the variable that `open_store` reads, in place of one in the template; without a budget there is none."""
    for budget, given in ((None, []), (200, ["200"])):
        pod = render.worker(replace(SPEC, checkpoint=replace(SPEC.checkpoint, requests_per_second=budget)), SEEN, 0, 1)
        env = pod["spec"]["containers"][1]["env"]
        assert [each["value"] for each in env if each["name"] == ENV_STORE_REQUESTS] == given


def test_the_rest_of_the_template_is_left_alone() -> None:
    """Selectors, sidecars and grace are the user's; restarts are mend's. The spec itself is not written to."""
    before = copy.deepcopy(SPEC.workers.template)
    pod, _ = a_worker()
    assert pod["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert pod["spec"]["containers"][0] == {"name": "sidecar", "image": "logs:1"}
    assert pod["spec"]["terminationGracePeriodSeconds"] == 90
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["priorityClassName"] == "training"
    assert SPEC.workers.template == before


def test_a_bare_template_is_enough() -> None:
    """No metadata, no env, no grace period: defaults fill in."""
    trainer = {"name": "trainer", "image": "clio:1", "command": ["train"]}
    raw = {
        "workers": {"replicas": 1, "template": {"spec": {"containers": [trainer]}}},
        "checkpoint": {"uri": "file:///tmp/x"},
    }
    pod = render.worker(parse_spec(raw), SEEN, 0, 1)
    assert pod["spec"]["terminationGracePeriodSeconds"] == 30
    assert "envFrom" not in pod["spec"]["containers"][0]
    assert "priorityClassName" not in pod["spec"]


def test_the_service_is_headless_and_does_not_wait_for_readiness() -> None:
    """Ranks meet before anything is ready."""
    spec = render.service(SEEN)["spec"]
    assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
    assert spec["selector"][LABEL_RUN] == "clio"


def avoiding(affinity: dict[str, Any] | None) -> dict[str, Any]:
    """The affinity of a pod that is to avoid two nodes, with this one in its template."""
    template = copy.deepcopy(TEMPLATE)
    if affinity is not None:
        template["spec"]["affinity"] = affinity
    raw = {"workers": {"replicas": 1, "template": template}, "checkpoint": {"uri": "s3://bucket/clio"}}
    pod = render.worker(parse_spec(raw), SEEN, 0, 1, ("node-1", "node-7"))
    assert pod["metadata"]["annotations"] == {"note": "mine", ANNOTATION_AVOIDS: "node-1,node-7"}
    found: dict[str, Any] = pod["spec"]["affinity"]
    return found


AWAY = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["node-1", "node-7"]}


def test_a_pod_is_kept_off_nodes() -> None:
    """Required node affinity says so; without nodes to avoid the template's is left alone."""
    required = avoiding(None)["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required == {"nodeSelectorTerms": [{"matchExpressions": [AWAY]}]}
    assert "affinity" not in a_worker()[0]["spec"]
    assert ANNOTATION_AVOIDS not in a_worker()[0]["metadata"]["annotations"]


def test_the_templates_own_affinity_stays() -> None:
    """Its terms are alternatives, so each is barred for these nodes; preferences and other affinities are kept."""
    fast = {"key": "gpu", "operator": "In", "values": ["h200"]}
    field = {"key": "metadata.name", "operator": "In", "values": ["node-3"]}
    own = {
        "podAntiAffinity": {"x": 1},
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}],
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [fast]}, {"matchFields": [field]}]
            },
        },
    }
    found = avoiding(own)
    assert found["podAntiAffinity"] == {"x": 1}
    node = found["nodeAffinity"]
    assert node["preferredDuringSchedulingIgnoredDuringExecution"] == [{"weight": 1}]
    assert node["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"] == [
        {"matchExpressions": [fast, AWAY]},
        {"matchFields": [field], "matchExpressions": [AWAY]},
    ]
