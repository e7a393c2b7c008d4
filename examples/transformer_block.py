"""Transformer block with KV cache and Mixture of Experts: the snippets, and what they are good for."""

import time

import torch

from moe_dist import TransformerBlock

# Create a standard transformer block
block = TransformerBlock(
    d_model=128,
    n_heads=8,
    d_ff=512,
    dropout=0.1,
    use_moe=False,
)

# Forward pass
x = torch.randn(2, 10, 128)  # (batch_size, seq_len, d_model)
output, _, _ = block(x)

# Create a transformer block with MoE
block = TransformerBlock(
    d_model=128,
    n_heads=8,
    d_ff=512,
    use_moe=True,
    num_experts=8,
    top_k_experts=2,
)

# Forward pass with auxiliary loss
output, _, aux_loss = block(x, return_aux_loss=True)
print(f"20 tokens, 2 experts each: {block.feed_forward.expert_counts.tolist()}, auxiliary loss {aux_loss:.4f}")

# Create transformer block
block = TransformerBlock(d_model=64, n_heads=4, d_ff=256)
block.eval()

# Create KV cache
cache = block.create_kv_cache(max_batch_size=1, max_seq_len=100)

# Process initial sequence
x1 = torch.randn(1, 5, 64)
output1, _, _ = block(x1, kv_cache=cache, use_cache=True, cache_position=0)

# Process next token (autoregressive)
x2 = torch.randn(1, 1, 64)
output2, _, _ = block(x2, kv_cache=cache, use_cache=True, cache_position=5)

whole, _, _ = block(torch.cat((x1, x2), dim=1))
print(f"the sixth token with the cache and without: {(output2 - whole[:, 5:]).abs().max():.1e} apart")

# What the cache saves: the last of 1,000 tokens, alone or with all that came before.
cache, x = block.create_kv_cache(1, 1000), torch.randn(1, 1000, 64)
with torch.no_grad():
    block(x[:, :998], kv_cache=cache, use_cache=True)
    block(x[:, 998:999], kv_cache=cache, use_cache=True)
    began = time.perf_counter()
    block(x[:, 999:], kv_cache=cache, use_cache=True)
    cached = time.perf_counter() - began
    block(x)
    without = time.perf_counter() - began - cached
    print(f"token 1,000: {1e3 * cached:.2f} ms with the cache, {1e3 * without:.1f} without")

# Create MoE transformer with cache
block = TransformerBlock(
    d_model=64,
    n_heads=4,
    d_ff=256,
    use_moe=True,
    num_experts=4,
    top_k_experts=2,
)

cache = block.create_kv_cache(max_batch_size=2, max_seq_len=50)
x = torch.randn(2, 10, 64)
output, _, _ = block(x, kv_cache=cache, use_cache=True)
