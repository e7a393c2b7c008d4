"""From texts to indexed corpora: what `moe-dist data` does."""
