"""What runs in the training process; the only importer of torch."""
