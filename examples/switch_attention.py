"""Switch multi-query attention transformer: the snippet, and who goes to which attention expert."""

import torch

from moe_dist import Transformer

# Define model parameters
vocab_size = 1000
d_model = 64
num_heads = 8
num_experts = 4
num_layers = 2

# Create a Transformer instance
transformer = Transformer(
    d_model=d_model, num_heads=num_heads, num_experts=num_experts, num_layers=num_layers, vocab_size=vocab_size
)

# Prepare input data
x = torch.randint(0, vocab_size, (2, 16))  # Example input tokens

# Forward pass
output = transformer(x)
print(output)  # Output logits

for layer, block in enumerate(transformer.blocks):
    print(f"layer {layer}: 32 tokens, 2 attention experts each: {block.attention.expert_counts.tolist()}")

# A few steps on one batch: the loss falls, and the balancing loss keeps all experts at work.
optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
for step in range(1, 61):
    logits, aux_loss = transformer(x[:, :-1], return_aux_loss=True)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    (loss + aux_loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (1, 20, 60):
        print(f"step {step}: loss {loss.item():.3f}, auxiliary loss {aux_loss.item():.3f}")
