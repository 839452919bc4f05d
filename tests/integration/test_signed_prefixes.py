"""A signing key: what the run did not sign is passed over and said so, and it never begins anew because of that."""

from __future__ import annotations

import base64
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from kube_server import a_cluster
from mend.catalog import Catalog, NotSigned
from mend.keys import MANIFEST_NAME, announcement_key
from mend.kube.client import SECRETS
from mend.listing import StoreView
from mend.manifest import MANIFEST_VERSION, decode_manifest, encode_manifest, signing_key
from mend.names import SIGNING_SECRET_KEY
from mend.noted import noted
from mend.ownership import Owner
from mend.prefixes import Prefixes
from mend.spec import Checkpointing
from mend.status import RunStatus
from mend.store import Store, open_store
from stored_checkpoint import save
from waiting import eventually
from world import World, a_spec

SECRET = "a secret of the tests, long enough"
KEY = signing_key(SECRET.encode(), "team/clio")
OWNER = Owner(namespace="team", name="clio", uid="uid-1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/run")


def test_only_what_the_run_signed_counts(store: Store) -> None:
    """Unsigned, signed for another run, and moved: none of them is offered, and nothing is marked as damaged."""
    good = save(store, 5, key=KEY)
    save(store, 6)
    save(store, 7, key=signing_key(SECRET.encode(), "team/dora"))
    moved = save(store, 8, committed=False)
    store.put(f"{moved}/{MANIFEST_NAME}", store.get(f"{good}/{MANIFEST_NAME}"))
    view = Catalog(store, key=KEY).view(OWNER)
    assert [(each.ref.step, each.quarantined) for each in view.checkpoints] == [(5, False), (8, True)]
    assert "2 checkpoints are passed over" in view.passed_over
    assert "it is not signed" in view.passed_over
    assert len(Catalog(store).checkpoints()) == 4


def test_a_run_does_not_begin_anew_because_nothing_is_signed(store: Store) -> None:
    """Signing was switched on, or the key was changed: to start from nothing would be worse than to wait."""
    save(store, 5)
    save(store, 6)
    with pytest.raises(NotSigned, match="mend checkpoint sign"):
        Catalog(store, key=KEY).checkpoints()
    view = Catalog(store, key=KEY).view(OWNER)
    assert (view.listed, view.problem_reason) == (False, "NotSigned")


def test_what_two_listings_at_once_doubt_is_not_mixed_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention lists from another thread: it takes nothing away from what keeps a launch from beginning anew."""
    save(store, 5)
    last = save(store, 6)
    catalog = Catalog(store, key=KEY)
    get, nested = store.get, []

    def interrupted(key: str, *rest: object) -> bytes:
        raw = get(key, *rest)  # type: ignore[arg-type]
        if key.startswith(last) and not nested:
            nested.append(key)
            with pytest.raises(NotSigned):
                catalog.checkpoints()
            monkeypatch.setattr(store, "list", lambda *_, **__: iter(()))
            catalog.checkpoints()  # as of a prefix that is empty: it doubts nothing
        return raw

    monkeypatch.setattr(store, "get", interrupted)
    with pytest.raises(NotSigned, match="2 checkpoints are passed over"):
        catalog.checkpoints()


def test_a_checkpoint_that_was_signed_since_is_not_passed_over_any_more(store: Store) -> None:
    """Also if only a part of the prefix is listed again."""
    folder = save(store, 5)
    save(store, 6, key=KEY)
    catalog = Catalog(store, key=KEY)
    assert len(catalog.checkpoints()) == 1
    assert catalog.passed_over
    store.put(
        f"{folder}/{MANIFEST_NAME}", encode_manifest(decode_manifest(store.get(f"{folder}/{MANIFEST_NAME}")), KEY)
    )
    store.put(announcement_key(folder), b"")
    assert [each.ref.step for each in catalog.newest(lambda found: len(found) == 2)[0]] == [5, 6]
    assert not catalog.passed_over


def test_an_empty_prefix_is_no_problem(store: Store) -> None:
    """A run that begins has nothing that could be signed."""
    assert Catalog(store, key=KEY).view(OWNER).listed


def test_nobody_stops_a_run_with_an_invented_version(store: Store) -> None:
    """A manifest of a newer mend stops an older one; one that is not signed does not."""
    save(store, 5, key=KEY)
    save(store, 6, version=MANIFEST_VERSION + 1)
    assert [each.ref.step for each in Catalog(store, key=KEY).checkpoints()] == [5]


def test_what_is_passed_over_is_a_condition() -> None:
    """For as long as it lies there."""
    world = World(a_spec()).until_training()
    assert world.controller is not None
    seen = world.observe(world.controller)
    view = replace(seen.store, passed_over="2 checkpoints are passed over; the first, s3://b/x: it is not signed")
    told = noted(world.spec, replace(seen, store=view), world.now)
    (condition,) = [each for each in told.conditions if each.type == "CheckpointsSigned"]
    assert (condition.status, condition.reason, condition.message) == ("False", "NotSigned", view.passed_over)
    after = noted(world.spec, replace(seen, status=told), world.now)
    assert "CheckpointsSigned" not in [each.type for each in after.conditions]


async def test_the_key_comes_from_the_secret_that_the_spec_names(tmp_path: Path, store: Store) -> None:
    """A Secret that is not there, or holds no usable key, is named, and nothing is listed without it."""
    save(store, 5, key=signing_key(SECRET.encode(), "default/clio"))
    save(store, 6)
    run = ("default", "clio")
    async with a_cluster(tmp_path) as cluster:
        prefixes = Prefixes(cluster.client, on_news=lambda run: None)

        async def view(rules: Checkpointing) -> StoreView:
            def look() -> StoreView | None:
                prefixes.want(run, "uid-1", rules, RunStatus())
                found = prefixes.view(run, RunStatus(), (), 0.0)
                return found if found.listed or found.problem else None

            found: StoreView = await eventually(look)
            prefixes.forget(run)
            return found

        async def secret(**strings: str) -> None:
            data = {name: base64.b64encode(text.encode()).decode() for name, text in strings.items()}
            body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "signing"}, "data": data}
            await cluster.client.create(SECRETS, "default", body)

        rules = Checkpointing(uri=store.uri, signing_secret="signing")
        try:
            missing = await view(rules)
            assert missing.problem_reason == "SecretNotFound"
            assert "spec.checkpoint.signingSecret: there is no Secret 'signing'" in missing.problem
            await secret(other="x")
            empty = await view(rules)
            assert empty.problem_reason == "NoSigningKey"
            assert f"key {SIGNING_SECRET_KEY} of Secret 'signing': the signing key has 0 bytes" in empty.problem
            await cluster.client.delete(SECRETS, "default", "signing")
            await secret(**{SIGNING_SECRET_KEY: SECRET})
            signed = await view(rules)
            assert [each.ref.step for each in signed.checkpoints] == [5]
            assert "1 checkpoints are passed over" in signed.passed_over
            plain = await view(msgspec.structs.replace(rules, signing_secret=None))
            assert [each.ref.step for each in plain.checkpoints] == [5, 6]
        finally:
            await prefixes.close()
