"""Replay of traces through the engine's own policy code, with bounds and a clock."""
