"""Messages between trainer and daemon, and their framing; no I/O."""
