"""MultiQueryAttention: the snippet, and what one key/value head saves."""

import os

import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels need a GPU, or its interpreter

from moe_dist import MultiQueryAttention  # noqa: E402

x = torch.rand(4, 10, 512).to(device)

attn = MultiQueryAttention(
    d_model=512,
    heads=8,
    attn_impl="triton",
    attn_pdrop=0.1,
    device=device,
)

# forward pass
output, attn_weights, past_key_values = attn(x)
print(f"x {tuple(x.shape)} -> output {tuple(output.shape)}")

# The same weights under another implementation, which can show where each token looks.
plain = MultiQueryAttention(d_model=512, heads=8, attn_impl="torch", device=device)
plain.load_state_dict(attn.state_dict())
attn.eval()
plain.eval()
shown, weights, _ = plain(x, needs_weights=True)
print(f"triton and torch differ by {(attn(x)[0] - shown).abs().max():.0e}")
print(f"the third token looks at the first three with {[round(w, 2) for w in weights[0, 0, 2, :3].tolist()]}")

# One key/value head for all query heads: the cache is that much smaller.
_, _, (key, value) = plain(x, past_key_value=())
many = MultiQueryAttention(d_model=512, heads=8, num_kv_heads=8, attn_impl="torch", device=device).eval()
_, _, (many_keys, _) = many(x, past_key_value=())
print(f"keys in the cache: {tuple(key.shape)} with one head, {tuple(many_keys.shape)} with eight")
