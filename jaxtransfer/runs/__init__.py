"""A run as a thing of the library: its directory, its checkpoints, what it noted, its report."""
