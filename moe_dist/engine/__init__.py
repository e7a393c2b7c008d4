"""Who owns gradients and optimizer state: plain torch, or DeepSpeed ZeRO."""
