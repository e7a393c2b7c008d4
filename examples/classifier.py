"""Switch text classifier: the snippet, a training loop on a toy task, and experts that come and go.

`configs/classifier.yaml` trains one with the whole trainer, `examples/classifier.ipynb` shows what its experts do.
"""

import torch

from moe_dist import Model

# Define parameters
num_experts = 8
embed_dim = 64
ff_dim = 64
vocab_size = 20000
dropout_rate = 0.1

# Initialize model
model = Model(
    num_experts=num_experts,
    embed_dim=embed_dim,
    ff_dim=ff_dim,
    vocab_size=vocab_size,
    dropout_rate=dropout_rate,
)

# Do most tokens of a text come from 1 to 100, or from 101 to 200? 0 is padding.
generator = torch.Generator().manual_seed(0)


def texts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(2, (count,), generator=generator)
    other = torch.rand(count, 32, generator=generator) < 0.3
    half = labels[:, None] ^ other.long()
    ids = torch.randint(1, 101, (count, 32), generator=generator) + 100 * half
    lengths = torch.randint(16, 33, (count, 1), generator=generator)
    return ids.masked_fill(torch.arange(32) >= lengths, 0), labels


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(1, 61):
    ids, labels = texts(32)
    logits, aux_loss = model(ids)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    (loss + aux_loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (1, 30, 60):
        print(f"step {step}: loss {loss.item():.3f}")

ids, labels = texts(500)
before = model.predict(ids)
print(f"accuracy on new texts: {(before.argmax(-1) == labels).float().mean():.1%}")
model.add_experts(2)  # closed: no token goes to them yet
print(f"two experts more, not a bit has changed: {torch.equal(model.predict(ids), before)}")
