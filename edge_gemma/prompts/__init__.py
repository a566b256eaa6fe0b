"""Turns → an ordered list of spans: token ids and embedding rows."""
