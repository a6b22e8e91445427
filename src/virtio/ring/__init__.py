"""Virtqueues and the memory they live in: everything that shares bytes with a peer."""
