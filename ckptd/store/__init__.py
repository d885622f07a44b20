"""Keys to objects."""
