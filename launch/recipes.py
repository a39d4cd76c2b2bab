"""What ``patchmill recipes`` prints."""
