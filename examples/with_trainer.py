"""Transformers' Trainer: a Llama whose MLPs are replaced by `MixtureOfExperts`, its auxiliary losses included.

Needs `pip install transformers accelerate`.
"""

import copy
import tempfile
from typing import Any

import torch
from own_model import LENGTH, ROWS, STEPS, VOCAB, batch, compare
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from moe_dist import MixtureOfExperts


class Experts(nn.Module):
    """In the place of an MLP: it remembers the auxiliary loss of its last forward pass."""

    def __init__(self, config: LlamaConfig, seed: int) -> None:
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size)
        self.layer = MixtureOfExperts(*sizes, num_experts=4, dropout=0.0, activation="swiglu", seed=seed)
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.aux_loss = self.layer(x, return_aux_loss=True)
        return y


class MoELlama(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.mlp = Experts(config, seed=number)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + sum(layer.mlp.aux_loss for layer in self.model.layers)
        return output


def main() -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = MoELlama(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=LENGTH))
    by_hand = copy.deepcopy(model)
    rows = [row[:LENGTH] for step in range(STEPS) for row in batch(step)]
    seen: list[dict[str, Tensor]] = []  # the batches, as the Trainer shuffles them

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        labels = ids.clone()
        labels[:, 0] = -100  # nothing predicts it; the Trainer divides by the number of labels
        seen.append({"input_ids": ids, "labels": labels})
        return seen[-1]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_epsilon=1e-4,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row} for row in rows], data_collator=collate)
        trainer.train()
        model.save_pretrained(folder)
        loaded = MoELlama.from_pretrained(folder)

    optimizer, expected = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0), []
    for inputs in seen[:STEPS]:
        loss = by_hand(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    compare("Trainer", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], expected)

    with torch.no_grad():
        outputs = [each.eval()(seen[0]["input_ids"]).logits for each in (model, by_hand, loaded)]
    by_hand_apart, loaded_apart = (float((other - outputs[0]).abs().max()) for other in outputs[1:])
    print(f"logits of the one trained by hand {by_hand_apart:.0e} away, of the one saved and loaded {loaded_apart:.0e}")


if __name__ == "__main__":
    main()
