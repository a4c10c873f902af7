"""The residual stream: how it is given zero mean, and how it becomes narrower."""
