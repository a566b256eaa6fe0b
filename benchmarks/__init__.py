"""What a model takes on a device, measured. Imported as ``edge_gemma.benchmarks``.

``dev/`` is what only a source checkout has.
"""
