"""Where bundles live, how an existing GGUF becomes one, and how one is pulled."""
