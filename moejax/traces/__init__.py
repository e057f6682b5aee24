"""Routing traces: recorded, imported, synthesised, kept in files, described and drawn."""
