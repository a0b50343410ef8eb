"""What surrounds the steps of a run: its directory, start, validation, faults, rollbacks and conclusion."""
