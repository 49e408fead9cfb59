"""What the scripts stand on: files, training, scores, pictures. It knows no study and no model."""
