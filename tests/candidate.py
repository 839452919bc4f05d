"""A candidate in a process of its own: `python candidate.py KUBECONFIG IDENTITY` writes what it believes, with times.

One JSON line each: `{"what": "write", "at": ...}` every few milliseconds while its fence is open, `"won"` and `"lost"`
for terms. Times are of the clock that all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import sys

from mend.kube.client import KubeClient
from mend.kube.election import Elector, Fence, Timing, uptime_seconds

TIMING = Timing(lease=2, renew_deadline=1.2, retry=0.2)
NAMESPACE = "default"
LEASE = "mend-controller"


def tell(what: str, at: float) -> None:
    """One line to the parent."""
    print(json.dumps({"what": what, "at": at}), flush=True)


async def lead(fence: Fence) -> None:
    """Writes for as long as the fence is open; asks right before each write, as `apply` does."""
    tell("won", uptime_seconds())
    try:
        while True:
            if fence.is_leader():
                tell("write", uptime_seconds())
            await asyncio.sleep(0.005)
    finally:
        tell("lost", uptime_seconds())


async def main(kubeconfig: str, identity: str) -> None:
    """Campaigns until killed."""
    client = await KubeClient.from_kubeconfig(kubeconfig)
    await Elector(client, namespace=NAMESPACE, name=LEASE, identity=identity, timing=TIMING).run(lead)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
