"""An incident's dossier on its way to the store: in the background, and whatever becomes of it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from mend.conditions import with_condition
from mend.keys import incident_key
from mend.listing import StoreView
from mend.noted import noted
from mend.observation import Observation
from mend.prefixes import Prefixes
from mend.spec import Checkpointing
from mend.status import RunStatus
from mend.store import open_store
from waiting import eventually
from world import a_spec

RUN = ("team", "clio")
KEY = incident_key(1, 1, "uid-1")


async def test_a_dossier_arrives(tmp_path: Path) -> None:
    """It is in the store some time after it was handed over, and no problem is told of."""
    rules = Checkpointing(uri=f"file://{tmp_path}/run")
    prefixes = Prefixes(cast("Any", None), on_news=lambda run: None)
    try:
        prefixes.want(RUN, "uid-1", rules, RunStatus(attempt=1))
        prefixes.keep(RUN, KEY, b"{}")
        await eventually(lambda: KEY in {entry.key for entry in open_store(rules.uri).list()}, "the dossier")
        await eventually(lambda: prefixes.view(RUN, RunStatus(attempt=1), (), 0.0).listed, "the listing")
        assert prefixes.view(RUN, RunStatus(attempt=1), (), 0.0).evidence_problem == ""
    finally:
        await prefixes.close()


async def test_a_store_that_refuses_it_is_named_and_holds_nobody_up(tmp_path: Path) -> None:
    """A file lies where the folder should be: the problem is shown, `keep` has long returned, the next one may work."""
    rules = Checkpointing(uri=f"file://{tmp_path}/run")
    prefixes = Prefixes(cast("Any", None), on_news=lambda run: None)
    open_store(rules.uri).put("incidents", b"in the way")

    def problem() -> str:
        return prefixes.view(RUN, RunStatus(attempt=1), (), 0.0).evidence_problem

    try:
        prefixes.want(RUN, "uid-1", rules, RunStatus(attempt=1))
        prefixes.keep(RUN, KEY, b"{}")
        assert problem() == ""
        assert KEY in await eventually(problem, "the problem")
        open_store(rules.uri).delete(["incidents"])
        prefixes.keep(RUN, KEY, b"{}")
        await eventually(lambda: problem() == "", "the end of the problem")
    finally:
        await prefixes.close()


def test_the_status_says_while_evidence_cannot_be_kept() -> None:
    """A condition with the reason, gone once the next dossier was kept."""
    status = with_condition(RunStatus(attempt=1), "Accepted", True, "Valid", "", 1.0)
    seen = Observation(name="clio", namespace="team", uid="u", generation=1, created_at=0.0, status=status)
    bad = replace(seen, store=StoreView(evidence_problem="incidents/x.json: disk full"))
    told = noted(a_spec(), bad, 2.0)
    (condition,) = (each for each in told.conditions if each.type == "EvidenceKept")
    assert (condition.status, condition.reason) == ("False", "WriteFailed")
    assert "disk full" in condition.message
    after = replace(seen, status=told)
    assert all(each.type != "EvidenceKept" for each in noted(a_spec(), after, 3.0).conditions)
