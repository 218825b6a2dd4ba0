"""How to read a model: where its block keeps what, and how to record it while the model runs."""
