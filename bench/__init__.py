"""What checkpoints cost a training job, measured beside other engines on one machine in one run."""
