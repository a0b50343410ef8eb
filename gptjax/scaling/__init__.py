"""Scaling studies: plan a ladder of runs, carry it out, and fit its law."""
