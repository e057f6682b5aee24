"""Policies: routers, evictors, placements, predictors and drafts, their numbers, and presets."""
