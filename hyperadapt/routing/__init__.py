"""Which task each row uses, and the factors of the current forward pass."""
