"""Shared memory between a trainer and its daemon: sealed arenas and their slots."""
