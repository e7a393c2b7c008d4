"""What follows `moe-dist generate`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import DEVICE, Parser
from moe_dist.config.values import user_path

_ABOUT = """Write text with the model of a run, from its newest whole checkpoint or a given one.

RUN is a run's folder, or one checkpoint of it. Alone, the model runs on one process, however it was trained; under
torchrun in the layout it was trained in, or that of --ep and --tp: the text is the same.
Experts drop nothing. The text depends on the checkpoint, the prompt, its number and --seed, on nothing else.
Text goes to standard output; what is said about it, tokens per second included, to standard error.
"""
_PROMPT = "text to continue; may be given several times (default: those of --prompts)"
_PROMPTS = "a prompt on each line of a file; - is standard input (default: those of --prompt)"
_TEMPERATURE = "below 1 likely tokens are drawn more often, above 1 less; 0 takes the most likely one"
_TOP_P = "choose among the fewest tokens whose probabilities add up to X (default: all)"
_CONTEXT = "tokens that the model sees at most (default: as in training)"
_EP = "with several ranks: over how many the experts are spread (default: as in training)"
_TP = "with several ranks: how many share each matrix (default: as in training)"


def generate_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("moe-dist generate", _ABOUT)
    parser.add_argument("run", type=user_path, metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help=_PROMPT)
    parser.add_argument("--prompts", metavar="FILE", help=_PROMPTS)
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help=_TEMPERATURE)
    parser.add_argument("--top-k", type=int, metavar="N", help="choose among the N most likely tokens (default: all)")
    parser.add_argument("--top-p", type=float, metavar="X", help=_TOP_P)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the tokens that are drawn")
    parser.add_argument("--stream", action="store_true", help="show the text while it grows")
    parser.add_argument("--context", type=int, metavar="N", help=_CONTEXT)
    parser.add_argument("--ep", type=int, metavar="N", help=_EP)
    parser.add_argument("--tp", type=int, metavar="N", help=_TP)
    parser.add_argument("--device", **DEVICE)
    own = parser.parse_args(list(args))
    for name, low in (("max_new_tokens", 1), ("context", 2), ("ep", 1), ("tp", 1), ("seed", 0)):
        value = getattr(own, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value} is below {low}")
    return own
