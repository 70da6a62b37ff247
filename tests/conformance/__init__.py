"""The store's contract, the same on every database."""
