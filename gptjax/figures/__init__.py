"""The figures: numbers in, a matplotlib figure in the project's one style out."""
