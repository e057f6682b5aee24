"""Accuracy through the engine: tasks, scores, paired comparisons, untrusted programs."""
