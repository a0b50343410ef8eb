"""Scaling laws: fit a table of finished runs, say how far to trust the fit, and be held to its forecasts."""
