"""Is this derivative right, and which way to it is cheap."""
