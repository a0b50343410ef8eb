"""Scaling studies: plan a ladder of runs, carry it out, and gather the results in a table."""
