"""Gemma 3n and small Gemma 3, offline, inside a planned memory budget."""
