"""Ways to decode beyond plain sampling: prompts in chunks, beams, drafts, forms, scores, several adapters."""
