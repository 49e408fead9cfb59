"""What the scripts stand on: files, training, scores and pictures. Nothing here knows a study or a model."""
