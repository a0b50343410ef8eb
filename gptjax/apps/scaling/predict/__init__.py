"""Analyse a study's table: its law, how far to trust it, and audited forecasts."""
