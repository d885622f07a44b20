"""Pure decisions: who writes what, what to read, whether a checkpoint is whole."""
