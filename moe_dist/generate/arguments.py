"""What follows `moe-dist generate`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path

_ABOUT = """Write text with the model of a run, from its newest whole checkpoint or a given one.

RUN is a run's folder, or one checkpoint of it. Alone, the model runs on one process, however it was trained; under
torchrun in the layout it was trained in, or that of --ep and --tp: the text is the same.
Experts drop nothing. The text depends on the checkpoint, the prompt, its number and --seed, on nothing else.
Text goes to standard output; what is said about it, tokens per second included, to standard error.
"""


def generate_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("moe-dist generate", _ABOUT)
    parser.add_argument("run", type=user_path, metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a prompt on each line of a file; - is standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, help="choose among so many of the most likely tokens")
    parser.add_argument("--top-p", type=float, help="among the fewest whose probabilities add up to this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="show the text while it grows")
    parser.add_argument("--context", type=int, help="tokens that the model sees at most; default: as in training")
    parser.add_argument("--ep", type=int, help="with several ranks: over how many the experts are spread")
    parser.add_argument("--tp", type=int, help="with several ranks: how many share each matrix")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    own = parser.parse_args(list(args))
    for name, low in (("max_new_tokens", 1), ("context", 2), ("ep", 1), ("tp", 1), ("seed", 0)):
        value = getattr(own, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value} is below {low}")
    return own
