"""What a process of a worker needs to talk to other workers' savers, from the environment that its agent gives it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from mend.environment import ENV_SNAPSHOT_TOKEN, ENV_TLS_PEM
from mend_trainer.copies.tls import BadCertificate, RunTls, read_run_tls

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of the run, as each of its workers has them."""

    tls: RunTls
    token: str = field(repr=False)  # for snapshots, and nothing else


def read_credentials(environment: Mapping[str, str] = os.environ) -> Credentials | None:
    """None where the pod was not given any, or unusable ones, which is told: such a worker has no copies elsewhere."""
    pem, token = environment.get(ENV_TLS_PEM, ""), environment.get(ENV_SNAPSHOT_TOKEN, "")
    if not pem or not token:
        return None
    try:
        return Credentials(read_run_tls(pem), token)
    except BadCertificate as error:
        log.error("snapshots are neither copied to other workers nor fetched from them: %s", error)
        return None
