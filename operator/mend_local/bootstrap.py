"""What a new local cluster is given: mend's API and permissions as the chart has them, and the S3 credentials."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from mend_local.client import Api
from mend_local.objectstore import S3Access

Json = dict[str, Any]

S3_SECRET: Final = "mend-local-s3"
CONTROLLER_NAMESPACE: Final = "mend-system"
CONTROLLER_ACCOUNT: Final = "mend-controller"
_TOKEN_SECONDS: Final = 10 * 365 * 24 * 3600  # the cluster ends before it does
_RBAC: Final = "/apis/rbac.authorization.k8s.io/v1"
_COLLECTIONS: Final = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Secret": "/api/v1/namespaces/{namespace}/secrets",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "ClusterRole": f"{_RBAC}/clusterroles",
    "ClusterRoleBinding": f"{_RBAC}/clusterrolebindings",
    "Role": f"{_RBAC}/namespaces/{{namespace}}/roles",
    "RoleBinding": f"{_RBAC}/namespaces/{{namespace}}/rolebindings",
}
_HERE: Final = Path(__file__).parent
_CHECKOUT: Final = _HERE.parents[1]
_PERMISSIONS: Final = ("Namespace", "ServiceAccount", "ClusterRole", "Role", "ClusterRoleBinding", "RoleBinding")


class NoDefinition(FileNotFoundError):
    """mend's CustomResourceDefinition is nowhere to be found."""


@dataclass(frozen=True, slots=True)
class Account:
    """A service account."""

    namespace: str
    name: str


def crd_files() -> list[Path]:
    """mend's CRDs: in a package a copy beside this module, in a checkout the chart's own."""
    places = (_HERE / "crds", _CHECKOUT / "charts/mend/crds")
    for place in places:
        if found := sorted(place.glob("*.yaml")):
            return found
    raise NoDefinition(
        f"no CustomResourceDefinition of mend in {' or '.join(map(str, places))}: "
        "install mend as a package, or run it from a whole checkout"
    )


def permission_files() -> list[Path]:
    """mend's RBAC as plain manifests, found in the same way; none where there are none."""
    places = (_HERE / "rbac.yaml", _CHECKOUT / "manifests/rbac.yaml")
    return [file for file in places if file.exists()][:1]


async def install_definitions(api: Api) -> list[str]:
    """Make mend's API known; returns the names of the definitions."""
    names = []
    for each in _documents(crd_files()):
        await api.put(_COLLECTIONS["CustomResourceDefinition"], each)
        names.append(each["metadata"]["name"])
    return names


async def install_permissions(api: Api) -> Account | None:
    """Apply mend's RBAC; returns the account that the controller is to run as, None without manifests."""
    wanted = [each for each in _documents(permission_files()) if each.get("kind") in _PERMISSIONS]
    accounts = [
        Account(each["metadata"].get("namespace", "default"), CONTROLLER_ACCOUNT)
        for each in wanted
        if each["kind"] == "ServiceAccount" and each["metadata"]["name"] == CONTROLLER_ACCOUNT
    ]
    # The controller's Lease lies there, also where there are no manifests.
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": CONTROLLER_NAMESPACE}}
    await api.apply(_COLLECTIONS["Namespace"], namespace)
    if not accounts:
        return None
    for each in sorted(wanted, key=lambda one: _PERMISSIONS.index(one["kind"])):
        await api.put(_collection(each), each)
    return accounts[0]


async def account_token(api: Api, account: Account) -> str:
    """A token of the account, as long-lived as the cluster."""
    path = f"/api/v1/namespaces/{account.namespace}/serviceaccounts/{account.name}/token"
    body = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"audiences": [], "expirationSeconds": _TOKEN_SECONDS},
    }
    return str((await api.create(path, body))["status"]["token"])


async def put_s3_secret(api: Api, access: S3Access, namespace: str = "default") -> None:
    """Write the object store's credentials where TrainingRuns can name them."""
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": S3_SECRET, "namespace": namespace},
        "type": "Opaque",
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in access.as_env().items()},
    }
    await api.put(_collection(secret), secret)


def _documents(files: list[Path]) -> Iterator[Json]:
    for file in files:
        yield from (each for each in yaml.safe_load_all(file.read_text()) if isinstance(each, dict))


def _collection(each: Json) -> str:
    return _COLLECTIONS[each["kind"]].format(namespace=each["metadata"].get("namespace", "default"))
