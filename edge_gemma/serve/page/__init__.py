"""The page for a browser: one file, and the routes that only it uses."""
