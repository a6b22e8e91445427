"""Bytes to values and back: the records, numbers and names of each protocol, and no I/O."""
