"""Reading a model while it runs: where its block keeps what, and the record of one forward pass."""
