"""Text from a trained model: choosing tokens, decoding with a cache, the command."""
