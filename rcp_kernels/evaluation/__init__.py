"""How good a model is: perplexity, divergence from another model, and greedy decoding."""
