"""Attention layers: rotary position embedding and multi-query / grouped-query attention cut over tp."""
