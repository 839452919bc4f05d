"""One request about objects: read it, ask the objects, answer in the wanted shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast, get_args

import msgspec
from aiohttp import ClientConnectionResetError, web

from mend_local import bodies, failures, lists, reviews, shapes, tables, watches
from mend_local.faults import Misbehaviour
from mend_local.identity import Identity, Tokens
from mend_local.logs import LogSource
from mend_local.objects import DeleteOptions, FieldValidation, Objects, WriteOptions
from mend_local.resources import ResourceType
from mend_local.targets import Target
from mend_local.times import timestamp

Object = dict[str, Any]

_ONE_HOUR = 3600


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """An answer in JSON."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
    )


class Requests:
    """Answers requests about objects, for callers that are already allowed to make them."""

    def __init__(self, objects: Objects, misbehaviour: Misbehaviour, tokens: Tokens, logs: LogSource) -> None:
        self._objects = objects
        self._misbehaviour = misbehaviour
        self._tokens = tokens
        self._logs = logs
        self._watches: set[asyncio.BaseTransport] = set()

    def drop_watches(self) -> None:
        """Cut the connection of every open watch."""
        for transport in tuple(self._watches):
            cast("asyncio.Transport", transport).abort()

    async def answer(self, request: web.Request, target: Target, who: Identity) -> web.StreamResponse:
        """Answer one request; raises `ApiFailure`."""
        kind = self._kind(target)
        if target.subresource:
            return await self._subresource(request, target, kind)
        if target.verb not in kind.verbs:
            raise failures.not_allowed(target.verb)
        match target.verb:
            case "get":
                return self._shaped(request, kind, self._objects.get(kind, target.namespace, target.name))
            case "list":
                return self._list(request, target, kind)
            case "watch":
                return await self._watch(request, target, kind)
            case "create":
                return await self._create(request, target, kind, who)
            case "update" | "patch":
                return await self._write(request, target, kind)
            case "delete":
                return await self._delete(request, target, kind)
            case _:
                return await self._delete_collection(request, target, kind)

    def _kind(self, target: Target) -> ResourceType:
        kind = self._objects.registry.find(target.group, target.version, target.plural)
        if kind is None or (target.namespace and not kind.namespaced):
            raise failures.no_such_path()
        if kind.namespaced and not target.namespace and target.verb not in ("list", "watch"):
            raise failures.no_such_path()
        return kind

    # ---------------------------------------------------------------- reading
    def _shaped(
        self, request: web.Request, kind: ResourceType, value: Object, status: int = 200, warnings: Sequence[str] = ()
    ) -> web.Response:
        headers = {"Warning": ", ".join(f"299 - {msgspec.json.encode(each).decode()}" for each in warnings)}
        return as_json(_shape(request, kind)(value), status, headers if warnings else None)

    def _list(self, request: web.Request, target: Target, kind: ResourceType) -> web.Response:
        chosen = lists.selection(kind, target.namespace, request.query)
        metadata, values = lists.page(self._objects.storage, kind, chosen, request.query)
        match bodies.shape_wanted(request.headers.get("Accept", "")):
            case "Table":
                include = request.query.get("includeObject", "Metadata")
                return as_json(tables.table(kind, values, metadata, include))
            case "PartialObjectMetadata":
                api_version, list_kind = "meta.k8s.io/v1", "PartialObjectMetadataList"
                values = [tables.partial(value) for value in values]
            case _:
                api_version, list_kind = kind.api_version, kind.list_kind or f"{kind.kind}List"
        return as_json({"kind": list_kind, "apiVersion": api_version, "metadata": metadata, "items": values})

    async def _watch(self, request: web.Request, target: Target, kind: ResourceType) -> web.StreamResponse:
        version = lists.number(request.query, "resourceVersion")
        if version and self._misbehaviour.expires_watch(kind.plural):
            raise failures.expired(f"too old resource version: {version} (fault injection)")
        asked = watches.WatchRequest(
            kind=kind,
            chosen=lists.selection(kind, target.namespace, request.query),
            since=version or None,
            bookmarks=request.query.get("allowWatchBookmarks") in ("true", "1"),
            timeout_seconds=lists.number(request.query, "timeoutSeconds") or watches.DEFAULT_TIMEOUT_SECONDS,
            shape=_shape(request, kind),
        )
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Cache-Control": "no-cache"})
        await response.prepare(request)
        transport = request.transport
        if transport is None:
            return response  # the watcher has gone already
        self._watches.add(transport)
        try:
            async for batch in watches.stream(self._objects.storage, self._misbehaviour, asked):
                await response.write(b"".join(msgspec.json.encode(event) + b"\n" for event in batch))
            await response.write_eof()
        except (ClientConnectionResetError, ConnectionResetError):
            pass  # the watcher has gone; nothing is lost, it resumes from its version
        finally:
            self._watches.discard(transport)
        return response

    # ---------------------------------------------------------------- writing
    async def _create(self, request: web.Request, target: Target, kind: ResourceType, who: Identity) -> web.Response:
        body = await self._body(request)
        if kind.plural in reviews.KINDS:
            return as_json(reviews.review(self._objects.storage, kind, who, body), 201)
        options = _write_options(request)
        created = self._objects.create(kind, target.namespace, body, options)
        return self._shaped(request, kind, created, 201, options.warnings)

    async def _write(self, request: web.Request, target: Target, kind: ResourceType) -> web.Response:
        options = _write_options(request)
        raw = await request.read()
        place = (kind, target.namespace, target.name)
        if target.verb == "patch":
            change = bodies.read_patch(raw, request.content_type, kind)
            written = self._objects.patch(*place, change, options, target.subresource)
        else:
            body = bodies.read(raw, request.content_type)
            written = self._objects.update(*place, body, options, target.subresource)
        return self._shaped(request, kind, written, 200, options.warnings)

    async def _delete(self, request: web.Request, target: Target, kind: ResourceType) -> web.Response:
        options = await self._delete_options(request)
        deleted, gone = self._objects.delete(kind, target.namespace, target.name, options)
        if not gone or kind.qualified in ("pods", "services", "serviceaccounts"):
            return self._shaped(request, kind, deleted)
        metadata = deleted["metadata"]
        details = {"name": metadata["name"], "group": kind.group, "kind": kind.plural, "uid": metadata["uid"]}
        return as_json(
            {
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Success",
                "details": {name: value for name, value in details.items() if value},
            }
        )

    async def _delete_collection(self, request: web.Request, target: Target, kind: ResourceType) -> web.Response:
        options = await self._delete_options(request)
        chosen = lists.selection(kind, target.namespace, request.query)
        metadata, values = lists.page(self._objects.storage, kind, chosen, request.query)
        for value in values:
            self._objects.delete(kind, target.namespace, value["metadata"]["name"], options)
        list_kind = kind.list_kind or f"{kind.kind}List"
        return as_json({"kind": list_kind, "apiVersion": kind.api_version, "metadata": metadata, "items": values})

    async def _body(self, request: web.Request) -> Any:
        return bodies.read(await request.read(), request.content_type)

    async def _delete_options(self, request: web.Request) -> DeleteOptions:
        raw = await request.read()
        body = bodies.read(raw, request.content_type) if raw else {}
        shapes.check_delete_options(body)
        query = request.query
        grace = body.get("gracePeriodSeconds")
        if grace is None and "gracePeriodSeconds" in query:
            grace = lists.number(query, "gracePeriodSeconds")
        propagation = body.get("propagationPolicy") or query.get("propagationPolicy", "")
        if body.get("orphanDependents"):
            propagation = "Orphan"
        conditions = body.get("preconditions") or {}
        return DeleteOptions(
            grace_seconds=grace,
            propagation=propagation,
            uid=conditions.get("uid") or "",
            version=conditions.get("resourceVersion") or "",
            dry_run=bool(body.get("dryRun")) or _is_dry_run(query),
        )

    # ---------------------------------------------------------------- subresources
    async def _subresource(self, request: web.Request, target: Target, kind: ResourceType) -> web.StreamResponse:
        if target.subresource not in kind.subresources:
            raise failures.no_such_path()
        match (target.subresource, target.verb):
            case ("status", "get"):
                return self._shaped(request, kind, self._objects.get(kind, target.namespace, target.name))
            case ("status", "update" | "patch"):
                return await self._write(request, target, kind)
            case ("log", "get"):
                return await self._pod_log(request, self._objects.get(kind, target.namespace, target.name))
            case ("binding", "create"):
                return await self._bind(request, target, kind)
            case ("token", "create"):
                return await self._issue_token(request, target, kind)
            case _:
                raise failures.not_allowed(target.verb)

    async def _pod_log(self, request: web.Request, pod: Object) -> web.StreamResponse:
        query = request.query
        chunks = self._logs.read(
            pod["metadata"]["namespace"],
            pod["metadata"]["name"],
            _container(pod, query.get("container", "")),
            follow=query.get("follow") in ("true", "1"),
            tail_lines=lists.number(query, "tailLines") if "tailLines" in query else None,
            limit_bytes=lists.number(query, "limitBytes") if "limitBytes" in query else None,
            previous=query.get("previous") in ("true", "1"),
        )
        try:
            first = await anext(chunks, b"")
        except LookupError as error:
            raise failures.bad_request(str(error.args[0] if error.args else error)) from error
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        try:
            await response.write(first)
            async for chunk in chunks:
                await self._misbehaviour.thawed()
                await response.write(chunk)
            await response.write_eof()
        except (ClientConnectionResetError, ConnectionResetError):
            pass  # the reader has gone
        return response

    async def _bind(self, request: web.Request, target: Target, kind: ResourceType) -> web.Response:
        body = await self._body(request)
        node = (body.get("target") or {}).get("name") if isinstance(body, dict) else None
        pod = self._objects.get(kind, target.namespace, target.name)
        if not node:
            raise failures.bad_request("target.name: missing; expected the name of a node")
        if pod["spec"].get("nodeName"):
            why = f"pod {target.name} is already assigned to node {pod['spec']['nodeName']!r}"
            raise failures.conflict("", "pods", target.name, why)
        if pod["metadata"].get("deletionTimestamp"):
            why = f"pod {target.name} is being deleted, cannot be assigned to a host"
            raise failures.conflict("", "pods", target.name, why)
        self._objects.settle(kind, {**pod, "spec": {**pod["spec"], "nodeName": node}})
        return as_json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}, 201)

    async def _issue_token(self, request: web.Request, target: Target, kind: ResourceType) -> web.Response:
        account = self._objects.get(kind, target.namespace, target.name)
        body = await self._body(request)
        spec = dict((body.get("spec") if isinstance(body, dict) else None) or {})
        seconds = spec.setdefault("expirationSeconds", _ONE_HOUR)
        token, expires = self._tokens.issue(account, seconds)
        status = {"token": token, "expirationTimestamp": timestamp(datetime.fromtimestamp(expires, UTC))}
        return as_json(
            {
                "kind": "TokenRequest",
                "apiVersion": "authentication.k8s.io/v1",
                "metadata": {"name": target.name, "namespace": target.namespace, "creationTimestamp": timestamp()},
                "spec": spec,
                "status": status,
            },
            201,
        )


def _shape(request: web.Request, kind: ResourceType) -> Callable[[Object], Object]:
    match bodies.shape_wanted(request.headers.get("Accept", "")):
        case "Table":
            include = request.query.get("includeObject", "Metadata")
            return lambda value: tables.table(
                kind, [value], {"resourceVersion": value["metadata"].get("resourceVersion", "")}, include
            )
        case "PartialObjectMetadata":
            return tables.partial
        case _:
            return lambda value: value


def _write_options(request: web.Request) -> WriteOptions:
    validation = request.query.get("fieldValidation") or "Warn"
    if validation not in get_args(FieldValidation):
        raise failures.bad_request(f"fieldValidation: got {validation!r}; expected Ignore, Warn or Strict")
    return WriteOptions(dry_run=_is_dry_run(request.query), field_validation=cast("FieldValidation", validation))


def _is_dry_run(query: Mapping[str, str]) -> bool:
    asked = query.get("dryRun", "")
    if asked not in ("", "All"):
        raise failures.bad_request(f'dryRun: Unsupported value: "{asked}": supported values: "All"')
    return bool(asked)


def _container(pod: Object, asked: str) -> str:
    names = [each["name"] for field in ("containers", "initContainers") for each in pod["spec"].get(field) or ()]
    main: list[str] = [each["name"] for each in pod["spec"]["containers"]]
    name = pod["metadata"]["name"]
    if asked:
        if asked not in names:
            raise failures.bad_request(f"container {asked} is not valid for pod {name}")
        return asked
    if len(main) > 1:
        listed = " ".join(main)
        raise failures.bad_request(f"a container name must be specified for pod {name}, choose one of: [{listed}]")
    return main[0]
