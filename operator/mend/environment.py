"""The variables by which a pod tells its agent, and an agent its ranks, what they need to know."""

from __future__ import annotations

from typing import Final

# Given to the agent by the pod that `render` makes.
ENV_RUN: Final = "MEND_RUN"  # "namespace/name"
ENV_RUN_UID: Final = "MEND_RUN_UID"
ENV_WORKER: Final = "MEND_WORKER"  # this worker's stable index, 0-based
ENV_WORKERS: Final = "MEND_WORKERS"
ENV_RANKS_PER_WORKER: Final = "MEND_RANKS_PER_WORKER"
ENV_TOKEN: Final = "MEND_TOKEN"
ENV_POD_IP: Final = "MEND_POD_IP"
ENV_POD_UID: Final = "MEND_POD_UID"
ENV_AGENT_PORT: Final = "MEND_AGENT_PORT"
ENV_HEARTBEAT_SECONDS: Final = "MEND_HEARTBEAT_SECONDS"
ENV_GRACE_SECONDS: Final = "MEND_GRACE_SECONDS"
ENV_TLS_PEM: Final = "MEND_TLS_PEM"  # key and certificate of the run, by which workers know each other
ENV_SIGNING_KEY: Final = "MEND_SIGNING_KEY"  # of manifests; absent: they are not signed
ENV_STORE_AUTHORITY: Final = "MEND_STORE_AUTHORITY"  # PEM certificates to check the store's against
ENV_STORE_REQUESTS: Final = "MEND_STORE_REQUESTS_PER_SECOND"  # by one process; absent: without limit
ENV_PRELOAD: Final = "MEND_PRELOAD"  # comma-separated modules a standby imports beside torch

# Given to a rank by its agent, beside torchrun's RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, GROUP_RANK,
# MASTER_ADDR, MASTER_PORT, TORCHELASTIC_USE_AGENT_STORE, TORCHELASTIC_RESTART_COUNT, TORCH_WORKER_SERVER_SOCKET.
ENV_ATTEMPT: Final = "MEND_ATTEMPT"
ENV_LAUNCH: Final = "MEND_LAUNCH"  # the `Launch` order as JSON
ENV_PAGE: Final = "MEND_PAGE"  # path of the rank's progress page
ENV_REPORT_FD: Final = "MEND_REPORT_FD"  # pipe for `Report` lines
ENV_STACKS: Final = "MEND_STACKS"  # path that faulthandler writes to on SIGUSR1
ENV_ORDERS_FD: Final = "MEND_ORDERS_FD"  # pipe of `Rejoin` lines from the agent
ENV_FOOTING: Final = "MEND_FOOTING"  # path of what the rank keeps of the steps it completed last
ENV_ARENA: Final = "MEND_ARENA"  # path of the rank's shared memory for snapshots
ENV_SNAPSHOT_TOKEN: Final = "MEND_SNAPSHOT_TOKEN"  # made of the run's token; opens snapshots and gives no orders
ENV_ARENAS: Final = "MEND_ARENAS"  # paths of all arenas of this worker, by commas: where to look when restoring
