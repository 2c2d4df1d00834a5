"""The toy world: drawn scenes with exact answers, and the vocabulary to read them."""
