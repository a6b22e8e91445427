"""C types for lease.py: it has none, and is compiled for another reason."""
