"""One CHECKPOINT_DIR on all nodes without shared storage: compare the folders, decide what moves, move it.

docs/checkpoints.md says what a user sees of it. `manifest` and `plan` are facts and decisions; `transfer`, `disk` and
`node` act.
"""
