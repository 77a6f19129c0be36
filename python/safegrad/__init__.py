"""safegrad: a trainer of language models, as a native program (__main__) and its tools (tool)."""
