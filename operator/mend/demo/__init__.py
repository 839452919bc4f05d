"""The demonstration: one run is left in peace, one suffers a crash and a hang, and their curves are the same."""
