"""Token shards and a loader whose position is part of the checkpoint."""
