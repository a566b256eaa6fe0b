"""What the board has and what the kernel counts.

``device`` (profiles), ``probe`` (this machine), ``repack`` (which weights a CPU copies),
``footprint`` and ``peak`` (memory in use).
"""
