"""Other serving systems, serving the same defended function, to compare ours with."""
