"""Two runs that want one prefix, in a real bucket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mend.catalog import Catalog, Owner
from mend.model import StoreView
from mend.store import Store, open_store
from s3 import S3Server, ministack, rclone


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
