"""The benchmark behind scripts/bench: everything side by side, in one run, on private servers."""
