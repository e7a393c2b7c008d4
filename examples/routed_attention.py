"""MixtureOfAutoregressiveAttention: the snippets, and what strict causality means for its routing."""

import torch

from moe_dist import MixtureOfAutoregressiveAttention

attention_layer = MixtureOfAutoregressiveAttention(
    dim=512, num_routed_queries=5, num_routed_key_values=5, local_attn_window_size=32
)
x = torch.randn(10, 60, 512)
out = attention_layer(x)

rotary_emb = torch.randn(60, 512)
out = attention_layer(x, rotary_emb=rotary_emb)

out = attention_layer(x, num_routed_queries=3, num_routed_key_values=7)
print(f"x {tuple(x.shape)} -> {tuple(out.shape)}")

# Tokens 50 to 59 change. By default nothing before them does; the published routing looks at its whole window.
other = x.clone()
other[:, 50:] = torch.randn(10, 10, 512)
for causal_routing in (True, False):
    torch.manual_seed(0)
    layer = MixtureOfAutoregressiveAttention(
        dim=512,
        num_routed_queries=5,
        num_routed_key_values=5,
        local_attn_window_size=32,
        causal_routing=causal_routing,
    ).eval()
    with torch.no_grad():
        change = (layer(x) - layer(other))[:, :50].abs().max()
    print(f"causal_routing={causal_routing}: outputs of tokens 0 to 49 change by {change:.1e}")
