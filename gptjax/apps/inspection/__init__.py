"""Look inside a model at a prompt: probabilities, attention, logit lens, attribution, activation patching."""
