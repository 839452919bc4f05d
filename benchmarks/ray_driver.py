"""Ray Train with the reference trainer: as many restarts as it wants, workers watched as closely as it offers.

    python ray_driver.py RANKS FOLDER --set ...

Ray starts and watches the workers; the loop, model and checkpoints are the same as everywhere. It is told of every step
by `ray.train.report`, its own sign of progress.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Its own knobs, set to look often: seconds between two looks at the workers, and until one that is silent is dead.
SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def work(config: dict[str, Any]) -> None:
    """What every worker runs, inside the process group that Ray has made."""
    from mend_trainer import train

    print(f"rank {os.environ['RANK']} has pid {os.getpid()}", flush=True)
    logging.getLogger().handlers.clear()  # Ray's own would swallow the trainer's lines
    train.join_gang = _gang_of_ray  # type: ignore[assignment]
    train.main(config["arguments"])


@contextlib.contextmanager
def _gang_of_ray(*, deterministic: bool) -> Iterator[Any]:
    import torch
    import torch.distributed as dist

    from mend_trainer.parallel import Place

    yield Place(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))


def main() -> None:
    """Train until killed."""
    ranks, folder, arguments = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    os.environ.update(SETTINGS)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Its controller and coordinators want a share too. The paths of its sockets must be short.
    ray.init(
        num_cpus=ranks + 4, include_dashboard=False, _temp_dir=str(folder / "r"), runtime_env={"env_vars": SETTINGS}
    )
    TorchTrainer(
        work,
        train_loop_config={"arguments": arguments},
        scaling_config=ScalingConfig(num_workers=ranks, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name="bench", storage_path=str(folder), failure_config=FailureConfig(max_failures=-1)),
    ).fit()


if __name__ == "__main__":
    main()
