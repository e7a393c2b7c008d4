"""One folder per operation, a plain reference beside each faster form; `registry` decides which one runs."""
