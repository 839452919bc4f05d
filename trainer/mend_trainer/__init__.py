"""The pod side of mend: the agent that supervises ranks, the session of a trainer, checkpoints, a reference trainer."""
