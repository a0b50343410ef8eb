"""Scaling studies: plan a ladder of runs, carry it out, fit its law, forecast, and audit the forecast."""
