"""Checkpoint → bundle, without PyTorch. Imported as ``edge_gemma.convert``; never imported by the
runtime at import time.
"""
