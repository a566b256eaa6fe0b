"""What a model is on disk.

``manifest`` (the contract between converting and running), ``folder`` (open, verify, write whole),
``gguf`` (read a GGUF header that nobody has checked). Knows nothing of machines, plans or engines.
"""
