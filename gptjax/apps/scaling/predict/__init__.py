"""What a study's table says: its law, how far to trust it, and forecasts that it is held to."""
