"""Plans on the live `nn.Module`: which parameters they concern, formulas that are read at every call, and their gradients."""
