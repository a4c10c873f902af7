"""What passes share: drafts, walks forward and back, zero mean, width and basis of a stream."""
