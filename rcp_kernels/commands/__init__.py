"""The commands ``quantize``, ``eval`` and ``generate``, and what they share: recipes, models by name, text by name."""
