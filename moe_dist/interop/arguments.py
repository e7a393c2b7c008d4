"""What follows `moe-dist import` and `moe-dist export`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path

_CODES = """
At the end the logits of both sides are compared, for which Transformers must be installed. Exit codes: 0 done and
compared, or --no-compare; 1 the logits differ; 2 a mistake, or something that has no counterpart, a line each;
3 done, but not compared: Transformers is not installed. After 1 and 2 nothing is left behind.
"""

_IMPORT = f"""Make a run of a Hugging Face model: a folder with config.yaml, tokenizer and a checkpoint of step 0.

  moe-dist import hf ~/models/Qwen3-0.6B --output runs/qwen3
  moe-dist generate runs/qwen3 --prompt "Once upon a time"
  moe-dist train runs/qwen3/config.yaml --train.init-from runs/qwen3 --run.name tuned

PATH is a folder with config.json and safetensors files. Every tensor is accounted for: one that is missing, left over
or of another shape is refused by name. Weights are read tensor by tensor, and rounded only where --dtype asks for it.
{_CODES}"""

_EXPORT = f"""Write the model of a run as a Hugging Face folder, which Transformers and others read.

  moe-dist export hf runs/mine --output ~/models/mine --dtype bf16

RUN is a run's folder, whose newest whole checkpoint is taken, or one checkpoint. The family is the one that means the
same as the run's configuration; what has no counterpart in any is refused, each thing in a line.
{_CODES}"""


def import_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("moe-dist import", "Take over the model of another system.")
    sub = parser.add_subparsers(dest="system", required=True)
    hf = _described(sub, "moe-dist import hf", _IMPORT)
    hf.add_argument("path", type=user_path, metavar="PATH", help="folder of the model")
    hf.add_argument("--output", type=user_path, metavar="RUN", required=True, help="the new run folder")
    hf.add_argument("--dtype", choices=["fp32", "bf16"], help="what weights are rounded to (default: as they are)")
    hf.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="NAME",
        help="tensors to leave out, * stands for anything: 'model.layers.46.*', layers that predict further tokens "
        "(default: none)",
    )
    hf.add_argument("--no-compare", action="store_true", help="do not compare logits")
    return parser.parse_args(list(args))


def export_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("moe-dist export", "Write a model for another system.")
    sub = parser.add_subparsers(dest="system", required=True)
    hf = _described(sub, "moe-dist export hf", _EXPORT)
    dtype, shard = "what weights are rounded to (default: as stored)", "size of a safetensors file at most"
    hf.add_argument("run", type=user_path, metavar="RUN", help="folder of a run, or of one of its checkpoints")
    hf.add_argument("--output", type=user_path, metavar="FOLDER", required=True, help="the new folder")
    hf.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help=dtype)
    hf.add_argument("--max-shard-bytes", type=int, metavar="N", default=5_000_000_000, help=shard)
    hf.add_argument("--no-compare", action="store_true", help="do not compare logits")
    own = parser.parse_args(list(args))
    if own.max_shard_bytes < 1:
        raise ValueError(f"--max-shard-bytes {own.max_shard_bytes} is below 1")
    return own


def _described(sub: "argparse._SubParsersAction[Parser]", prog: str, about: str) -> Parser:
    return sub.add_parser("hf", prog=prog, about=about, help="Hugging Face")
