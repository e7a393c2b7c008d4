"""The models that engines train. They share one call:

forward(tokens [B, S], targets, step, want) -> DecoderOutput for `loss`, else a tensor; targets are [B, S] for the
decoder and [B] for the classifier. And `balance_routers(tallies)` once an optimizer step.
"""

from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder

Trainable = Decoder | Classifier
