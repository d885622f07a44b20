"""The node daemon: socket, process, metrics around the engine."""
