"""How the conformance tests talk to a cluster: the official client's transport with plain JSON, and real kubectl."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import yaml
from kubernetes import client, config

Json = dict[str, Any]
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"

_numbers = itertools.count(1)


def a_name(what: str = "x") -> str:
    """A name that no other test uses."""
    return f"{what}-{next(_numbers)}"


class Cluster:
    """Calls to one cluster. A context manager."""

    def __init__(self, kubeconfig: Path, token: str | None = None) -> None:
        self.kubeconfig = kubeconfig
        settings = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=settings)
        settings.disable_strict_ssl_verification = True
        if token is not None:
            settings.api_key = {"authorization": f"Bearer {token}"}
            settings.cert_file = settings.key_file = None
            settings.refresh_api_key_hook = None
        self._client = client.ApiClient(settings)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
        **query: str,
    ) -> tuple[int, Any]:
        """One request: status code and JSON (text, if it is none)."""
        response = self._send(method, path, body, content_type, accept, query)
        raw = response.data
        is_json = "json" in response.headers.get("Content-Type", "")
        return response.status, json.loads(raw) if is_json and raw else raw.decode()

    def _send(self, method: str, path: str, body: Any, content_type: str, accept: str, query: Mapping[str, str]) -> Any:
        """The urllib3 response, unread. Past the client's own request methods, which differ between its versions."""
        settings = self._client.configuration
        headers = {"Accept": accept, "Content-Type": content_type}
        if token := settings.auth_settings().get("BearerToken"):
            headers[token["key"]] = token["value"]
        return self._client.rest_client.pool_manager.request(
            method,
            f"{settings.host}{path}" + (f"?{urlencode(query)}" if query else ""),
            headers=headers,
            body=None if body is None else json.dumps(body),
            preload_content=False,
            retries=False,
            timeout=60.0,
        )

    def get(self, path: str, **query: str) -> Any:
        """An object or list; fails the test if there is none."""
        return _expect((200,), *self.call("GET", path, **query))

    def create(self, path: str, body: Json, **query: str) -> Any:
        """Create and return as created."""
        return _expect((201,), *self.call("POST", path, body, **query))

    def replace(self, path: str, body: Json, **query: str) -> Any:
        """PUT and return as stored."""
        return _expect((200,), *self.call("PUT", path, body, **query))

    def patch(self, path: str, body: Any, content_type: str = MERGE, **query: str) -> Any:
        """PATCH and return as stored."""
        return _expect((200,), *self.call("PATCH", path, body, content_type=content_type, **query))

    def delete(self, path: str, body: Json | None = None, **query: str) -> Any:
        """Delete and return the answer."""
        return _expect((200, 202), *self.call("DELETE", path, body, **query))

    def refused(self, code: int, reason: str, method: str, path: str, body: Any = None, **more: Any) -> Json:
        """A call that must be refused with this code and reason; returns the Status."""
        answered, status = self.call(method, path, body, **more)
        assert (answered, status.get("kind"), status.get("reason")) == (code, "Status", reason), status
        assert status["code"] == code
        return dict(status)

    @contextmanager
    def watching(self, path: str, **query: str) -> Iterator[Iterator[Json]]:
        """The events of a watch; reading on blocks until there is one or the watch ends."""
        query = {"watch": "true", "timeoutSeconds": "30", **query}
        response = self._send("GET", path, None, "application/json", "application/json", query)
        assert response.status == 200, response.data
        try:
            yield _lines(response)
        finally:
            response.close()

    def eventually(self, condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
        """The first true value of a condition."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
            time.sleep(0.02)
        return found

    def eventually_gone(self, path: str) -> None:
        """Wait until an object is no more."""
        self.eventually(lambda: self.call("GET", path)[0] == 404, f"{path} is gone")

    def eventually_condition(self, path: str, kind: str) -> None:
        """Wait until a condition is True."""

        def holds() -> bool:
            conditions = (self.get(path).get("status") or {}).get("conditions") or []
            return any(each["type"] == kind and each["status"] == "True" for each in conditions)

        self.eventually(holds, f"{path} is {kind}")


def _expect(codes: tuple[int, ...], code: int, answer: Any) -> Any:
    assert code in codes, (code, answer)
    return answer


def _lines(response: Any) -> Iterator[Json]:
    held = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield json.loads(line)


class Namespaced:
    """Paths of objects in one namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def core(self, plural: str, name: str = "", subresource: str = "") -> str:
        """Of the core group."""
        return self._path("/api/v1", plural, name, subresource)

    def of(self, group_version: str, plural: str, name: str = "", subresource: str = "") -> str:
        """Of any other group."""
        return self._path(f"/apis/{group_version}", plural, name, subresource)

    def _path(self, root: str, *parts: str) -> str:
        return "/".join([root, "namespaces", self.namespace, *filter(None, parts)])


class Kubectl:
    """A real kubectl, in one namespace of one cluster."""

    def __init__(self, program: str, kubeconfig: Path, namespace: str, home: Path) -> None:
        self._command = [program, f"--kubeconfig={kubeconfig}", f"--namespace={namespace}"]
        self._environment = {**os.environ, "HOME": str(home)}  # its discovery cache
        self.home = home
        version = json.loads(self("version", "--client", "-o", "json"))["clientVersion"]
        self.minor = int(version["minor"].rstrip("+"))

    def run(self, *arguments: str, given: Any = None) -> subprocess.CompletedProcess[str]:
        """Run it with `given` (text or an object) on its standard input."""
        text = given if isinstance(given, str) or given is None else yaml.safe_dump(given)
        return subprocess.run(
            [*self._command, *arguments],
            input=text,
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=120,
            check=False,
        )

    @contextmanager
    def start(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run it in the background; it is ended with the context."""
        with subprocess.Popen(
            [*self._command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def __call__(self, *arguments: str, given: Any = None) -> str:
        """What it prints; fails the test with its error if it fails."""
        done = self.run(*arguments, given=given)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def fails(self, *arguments: str, given: Any = None) -> str:
        """What it complains about; fails the test if it does not."""
        done = self.run(*arguments, given=given)
        assert done.returncode != 0, f"kubectl {' '.join(arguments)} went well: {done.stdout}"
        return done.stderr


def a_pod(name: str, **spec: Any) -> Json:
    """A pod that no node will run, unless told otherwise."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "containers": [{"name": "main", "image": "busybox:1", "command": ["sleep", "3600"]}],
            "nodeSelector": {"mend.dev/no-such-node": "true"},
            **spec,
        },
    }


def a_configmap(name: str, labels: Mapping[str, str] | None = None, **data: str) -> Json:
    """The simplest of objects."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": dict(labels or {})},
        "data": data,
    }


def a_trip(group: str, name: str, **spec: Any) -> Json:
    """A custom resource of `a_definition` with all it needs."""
    return {
        "apiVersion": f"{group}/v1",
        "kind": "Trip",
        "metadata": {"name": name},
        "spec": {"seats": 4, **spec},
    }


def a_definition(group: str) -> Json:
    """A definition with one of everything that mend's own uses."""
    spec = {
        "type": "object",
        "required": ["seats"],
        "x-kubernetes-validations": [
            {"rule": "!has(self.taken) || self.taken <= self.seats", "message": "taken must be at most seats"},
        ],
        "properties": {
            "seats": {"type": "integer", "format": "int32", "minimum": 1, "maximum": 100},
            "taken": {"type": "integer", "format": "int32", "minimum": 0},
            "paused": {"type": "boolean", "default": False},
            "via": {"type": "string", "enum": ["land", "sea"], "default": "land"},
            "ticket": {
                "type": "string",
                "pattern": "^[A-Z]+$",
                "maxLength": 8,
                "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "ticket cannot be changed"}],
            },
            "limits": {"type": "object", "default": {}, "properties": {"speed": {"type": "integer", "default": 50}}},
            "stops": {
                "type": "array",
                "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
            "luggage": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "notes": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    status = {
        "type": "object",
        "properties": {
            "phase": {"type": "string"},
            "step": {"type": "integer"},
            "conditions": {"type": "array", "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
        },
    }
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec, "status": status}}},
        "additionalPrinterColumns": [
            {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
            {"name": "Seats", "type": "integer", "jsonPath": ".spec.seats"},
            {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
            {"name": "Via", "type": "string", "jsonPath": ".spec.via", "priority": 1},
        ],
    }
    random = group.partition(".")[0]
    names = {"plural": "trips", "singular": "trip", "kind": "Trip", "shortNames": [f"trp{random}"]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"trips.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [version]},
    }
