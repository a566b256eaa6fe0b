"""Manifest + device + request → an itemised list of bytes, or a refusal. Pure: no I/O, no clock.

``records`` (what goes in and comes out), ``costs`` (the formulas), ``ladder`` (what is conceded, in
which order).
"""
