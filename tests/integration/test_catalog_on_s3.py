"""Two runs that want one prefix, in a real bucket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mend.catalog import Catalog
from mend.keys import checkpoint_key
from mend.listing import StoreView
from mend.ownership import Owner
from mend.store import Store, Unreachable, open_store
from mend.store.s3 import S3Store
from s3 import FaultyProxy, S3Server, ministack, rclone


@pytest.fixture(scope="module", params=[ministack, rclone])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with request.param(tmp_path_factory.mktemp("s3")) as running:
        yield running


def a_store(server: S3Server, prefix: str) -> Store:
    """The prefix as one more client sees it."""
    return open_store(server.uri(prefix), server.endpoint, server.credentials)


def test_of_many_runs_on_one_prefix_one_remains(server: S3Server) -> None:
    """When many runs claim a prefix at once, in the end exactly one owns it and the others are refused by its name."""
    owners = [Owner(namespace="team", name=f"run-{number}", uid=str(number)) for number in range(6)]

    def look() -> list[StoreView]:
        views: dict[int, StoreView] = {}

        def claim(number: int) -> None:
            views[number] = Catalog(a_store(server, "contested")).view(owners[number])

        threads = [threading.Thread(target=claim, args=(number,)) for number in range(len(owners))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [views[number] for number in range(len(owners))]

    look()
    # A store that ignores conditions may let several through at first; at the next look all but one are refused.
    views = look()
    (winner,) = [number for number, view in enumerate(views) if view.listed]
    refused = [view for view in views if view.problem_reason == "PrefixOwned"]
    assert len(refused) == len(owners) - 1
    assert all(f"team/run-{winner} " in view.problem for view in refused)


def test_a_wrong_endpoint_shows_in_the_view(tmp_path: Path) -> None:
    """A store that does not answer shows as a problem that names it."""
    with ministack(tmp_path) as server:
        store = open_store(server.uri("x"), server.endpoint, server.credentials, deadline_seconds=0.3)
    view = Catalog(store).view(Owner(namespace="team", name="clio", uid="1"))
    assert (view.listed, view.problem_reason) == (False, "Unreachable")
    assert "s3://runs/x" in view.problem


def an_unfinished_upload(server: S3Server, prefix: str, folder: str) -> None:
    """What a saver leaves that dies in the middle of a large object."""
    with FaultyProxy(server) as proxy:
        proxy.answer_with(500, times=1000, method="PUT", part="partNumber=2")
        store = S3Store(server.bucket, prefix, proxy.server.endpoint, server.credentials, 0.3, 5 << 20)
        with pytest.raises(Unreachable):
            store.put(f"{folder}/__0_0.distcp", bytes(11 << 20))


def test_uploads_that_nobody_will_resume_are_ended(server: S3Server) -> None:
    """Those of earlier attempts are ended once they are old; the present attempt's, and another run's, are left."""
    old, present = checkpoint_key(5, 1, "a"), checkpoint_key(6, 2, "a")
    for prefix, folder in (("uploads", old), ("uploads", present), ("uploads-of-another", old)):
        an_unfinished_upload(server, prefix, folder)
    store = a_store(server, "uploads")
    catalog = Catalog(store)
    store.put(f"{present}/share-000000.json", b"{}")
    catalog.end_uploads(2, catalog.saves())
    assert len(list(store.unfinished())) == 2, "they are young"
    catalog.end_uploads(2, catalog.saves(), old_seconds=0.0)
    assert [each.key for each in store.unfinished()] == [f"{present}/__0_0.distcp"]
    assert len(list(a_store(server, "uploads-of-another").unfinished())) == 1


def test_without_the_right_to_see_uploads_the_rest_is_swept(server: S3Server) -> None:
    """A store that does not tell of uploads keeps nobody from sweeping."""
    with FaultyProxy(server) as proxy:
        proxy.refuse("GET", "uploads")
        store = open_store(proxy.server.uri("unseen"), proxy.server.endpoint, server.credentials)
        assert Catalog(store).sweep(2) == ()
