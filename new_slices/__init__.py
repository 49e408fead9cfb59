"""New slices: their code maps, layouts, priors and organs, and what samples are worth."""
