"""What is proven of values: facts, norms, channel affines."""
