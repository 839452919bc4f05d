"""Copies of snapshots in another worker's memory: sent to the buddy as they are taken, fetched by its successor."""
