"""What passes share: maps, the walks forward and back that carry them, drafts, zero mean, width and basis of a stream."""
