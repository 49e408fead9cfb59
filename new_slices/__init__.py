"""New slices: the code maps that they are made of, layouts, priors, organs, and what samples are worth."""
