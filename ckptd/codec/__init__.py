"""Bytes to bytes: block codecs, chunks, stored records."""
