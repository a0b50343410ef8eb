"""Measure models: log-likelihoods, multiple choice, answers, translation, bits per byte, and tasks of lm-eval."""
