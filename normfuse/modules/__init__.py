"""A plan on the live `nn.Module`: tune, deploy, restore."""
