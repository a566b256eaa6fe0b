"""Boards as TOML, one file each. Imported as ``edge_gemma.device_profiles``; read by
``edge_gemma.machine``.
"""
