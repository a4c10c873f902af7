"""Are two models one function? On which inputs that is asked, what the truth is, and what noise explains."""
