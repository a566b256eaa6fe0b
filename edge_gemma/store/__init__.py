"""Where bundles live, how an existing GGUF becomes one, and how one is pulled.

``installed`` (the store itself), ``importer`` (a GGUF → a bundle), ``reference`` (what to pull),
``hub`` (the network), ``pull`` (a reference → a bundle).
"""
