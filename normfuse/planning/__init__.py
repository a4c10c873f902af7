"""Which rewrites are made, in which order; the only judge of legality."""
