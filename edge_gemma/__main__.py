"""``python -m edge_gemma`` is ``edge-gemma``."""

from edge_gemma.cli import main

if __name__ == "__main__":
    main()
