"""The nodes of one job: coordinator, participants, rounds, verdict."""
