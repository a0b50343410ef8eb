"""The applications: each uses the trainer below, none uses another, and each could be deleted."""
