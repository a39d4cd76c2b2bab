"""Where raw images come from, one file a source."""
