"""ckptd: a distributed training checkpoint daemon for PyTorch."""

__version__ = "0.1.0"
