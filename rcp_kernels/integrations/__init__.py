"""Other people's stacks: one thin module for each, which imports that library and nothing of the others."""
