"""Plans, launchers and the command line. May import pipeline and shards."""
