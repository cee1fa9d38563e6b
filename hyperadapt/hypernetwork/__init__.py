"""From task embeddings to the normalised factors of every position."""
