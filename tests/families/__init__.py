"""One module per family: its small checkpoints, what its upstream and its releases do, and tests of it alone."""
