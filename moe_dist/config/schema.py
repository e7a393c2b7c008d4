"""The configuration of a run, as plain dataclasses.

One field, one meaning, one spelling: the names here are the keys of the YAML files, the flags of the command line
(`--model.moe.top-k 1`) and the words of the documentation. `load.py` reads them, `validate.py` holds the rules that
tie two fields together. Docstrings under fields become the text of `moe-dist train --help`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from moe_dist.config.model import STRICT, ModelConfig
from moe_dist.config.values import Minutes, user_path


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the world is cut. dp = world size / tp; experts fold over tp: ep may be any divisor of the world size."""

    __pydantic_config__ = STRICT

    ep: int = 1
    """Ranks over which one set of experts is spread."""
    etp: int = 1
    """Expert tensor parallelism: ranks that share the hidden units of every expert. One set of experts then lies on
    ep * etp ranks."""
    node_size: int | None = None
    """Ranks of a node, for dispatch = hierarchical. null: LOCAL_WORLD_SIZE as torchrun sets it."""
    tp: int = 1
    """Ranks that share one copy of each dense matrix."""
    sequence_parallel: bool = False
    """Between tensor-parallel regions, each tp rank keeps only its slice of the tokens."""

    @property
    def expert_ranks(self) -> int:
        """Ranks that one set of experts lies on."""
        return self.ep * self.etp


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """What owns gradients, optimizer state and precision."""

    __pydantic_config__ = STRICT

    name: Literal["native", "deepspeed"] = "native"
    """native: plain torch. deepspeed: ZeRO."""
    zero_stage: int = 0
    """With deepspeed: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: parameters and activations in bfloat16, master weights, gradients' accumulation and moments in fp32."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm. null: no clipping."""
    bucket_mib: float | None = 32.0
    """Gradients are exchanged while backward goes on, as many MiB at a time. null: all of them after it (native), or in
    buckets of 2 GB (deepspeed)."""
    cuda_graph: bool = False
    """With native, on a GPU: record micro-steps once and replay them, so that the host launches one thing instead of
    thousands. For models whose shapes depend on no data: capacity limits with wire = padded, or all experts on each
    rank; without anything random in the forward pass."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    __pydantic_config__ = STRICT

    implementation: Literal["torch", "apex"] = "torch"
    """Who takes a step: torch's fused kernel, or with engine.name = native FusedAdam of the package apex, on GPUs."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate over peak."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """After the warm-up. wsd: stay at the peak, then decay linearly over the last decay_fraction of the steps."""
    warmup_steps: int = 100
    """Linear warm-up from lr / warmup_steps."""
    decay_fraction: float = 0.2
    """With wsd: the share of all steps spent decaying."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the square root of that mean."""
    weight_decay: float = 0.1
    """For matrices. Norm scales and biases are not decayed."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where tokens come from."""

    __pydantic_config__ = STRICT

    kind: Literal["stdlib", "text", "indexed", "jsonl", "csv"] = "stdlib"
    """stdlib: the sources of Python's standard library, present on every machine; with task = classification, blocks
    of their lines, labelled by the package that they come from. text: files or folders in `paths`. jsonl, csv: files in
    `paths` of records with a text and, for task = classification, a label. Language models read the bytes of all these,
    or with `tokenizer` its tokens. indexed: token ids in Megatron-core's .bin and .idx files, for language models."""
    paths: list[str] = field(default_factory=list)
    """With kind = text: files, or folders that are searched for files. With jsonl and csv: files.
    indexed: paths without .bin and .idx, which follow one another. ~ is your home folder."""
    blend: dict[str, float] = field(default_factory=dict)
    """indexed, in place of paths: {path: weight}. Of the sequences of a run, and of the weight of its validation loss,
    each corpus has its weight's share; each has a validation loss of its own beside it."""
    validation_paths: list[str] = field(default_factory=list)
    """indexed: held out are these corpora, and nothing of the others. Of several each has a loss of its own too."""
    tokenizer: str | None = None
    """For language models: a tokenizer.json, a Hugging Face folder, a tiktoken file or a SentencePiece model; texts are
    tokenised with it when a run starts. indexed: the one that the corpus was made with. null: bytes; indexed: the one
    that `moe-dist data prepare` left beside the corpus, if it did."""
    end_of_text: str | None = None
    """The token that ends a document. null: as the tokenizer says."""
    mask_documents: bool = False
    """A token sees nothing of the documents before its own in the sequence, in training and validation (Megatron's
    reset_attention_mask). Costs a mask of seq_len * seq_len for each sequence."""
    reset_positions: bool = False
    """Positions count from the first token of a document, not of the sequence (Megatron's reset_position_ids)."""
    validation_fraction: float = 0.1
    """Share held out for validation: whole files, or the end of the text if there is one file only. indexed: the last
    documents of each path. With task = classification: of the texts."""
    test_fraction: float = 0.1
    """With task = classification: share of the texts kept for one test at the end."""
    text_key: str = "text"
    """Of jsonl records and csv columns: where the text is ..."""
    label_key: str = "label"
    """... and where its label is."""
    block_lines: int = 5
    """With task = classification and kind = stdlib: consecutive lines of a file, empty ones left out, in one text."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Steps, batches and seed."""

    __pydantic_config__ = STRICT

    steps: int = 1000
    """Optimizer steps."""
    seq_len: int = 256
    """Tokens in a sequence."""
    global_batch: int = 16
    """Sequences in an optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Sequences per data-parallel rank in one forward pass. null: global_batch / (accumulation * dp)."""
    accumulation: int | None = None
    """Forward passes per optimizer step. null: global_batch / (micro_batch * dp), or 1 if micro_batch is null too.
    Fix this one, not micro_batch, and the tokens that compete for capacity stay the same for every dp."""
    seed: int = 0
    """Of initial weights, data order and random dropping."""
    data_seed: int | None = None
    """Of data order, where it is to change apart from the rest. null: seed."""
    init_from: str | None = None
    """A run's folder, or one checkpoint in it, whose weights this run begins with. Weights alone: optimizer, steps and
    data begin anew, in any layout. The models must agree. Not read by a run that is resumed. null: random weights."""
    freeze: list[str] = field(default_factory=list)
    """Parameters that stay as they are, by patterns over their names such as embedding.* or blocks.*.router.*;
    `moe-dist checkpoint inspect` lists names. They have no gradients and no optimizer state."""
    threads: int | None = None
    """CPU threads per rank. null: OMP_NUM_THREADS, else the CPUs that the rank may use / ranks that share them."""
    deterministic: bool = False
    """Refuse operations whose last digits differ from run to run, so that a resumed run is bit-equal on GPUs too (same
    machine, same layout); slower there. On CPU runs repeat bit by bit anyway."""

    @property
    def order_seed(self) -> int:
        """`data_seed`, and what null stands for."""
        return self.seed if self.data_seed is None else self.data_seed


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """What is written, where and when."""

    __pydantic_config__ = STRICT

    name: str = "default"
    """The run's folder is root/name."""
    root: str = "runs"
    """Where runs lie; ~ is your home folder."""
    log_every: int = 10
    """Steps between progress lines. metrics.jsonl has every step."""
    eval_every: int = 200
    """Steps between evaluations; there is always one at the end."""
    evaluations: int | None = None
    """So many evaluations, at equal fractions of the schedule instead of every eval_every steps: the jth of n after
     step ceil(j * train.steps / n), where runs of unlike length can be compared. null: eval_every decides."""
    eval_sequences: int = 64
    """Validation sequences (texts, with task = classification) per evaluation; fewer when there are fewer."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    async_save: bool = False
    """Checkpoints are copied to host memory, then written while training goes on. Needs memory for one more copy of
    what a rank owns."""
    keep_last: int = 2
    """The newest checkpoints kept."""
    keep_every: int | None = None
    """Besides, the checkpoints of every nth step, for good; a multiple of save_every."""
    keep_best: bool = False
    """Besides, the checkpoint with the lowest validation loss; save_every is then a multiple of eval_every."""
    tensorboard: bool = True
    """Write metrics for TensorBoard too."""
    wandb: str | None = None
    """A project of Weights & Biases that metrics are sent to, too; the rest is said by its own variables, such as
    WANDB_ENTITY and WANDB_MODE=offline. null: none."""
    sample_tokens: int = 0
    """Tokens to generate from the trained model at the end."""
    time_limit: Annotated[float | None, Minutes()] = None
    """Time after which the run saves and leaves with exit code 75, as after a signal: 4h, 90m, 30s, 1:30:00, or a
    number of minutes. null: none."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return user_path(self.root) / self.name


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """What a run watches over itself, and what it does when something is wrong."""

    __pydantic_config__ = STRICT

    max_skipped: int = 3
    """A step whose loss or gradient norm is not finite is left out: weights, optimizer and routers stay as they are.
    After this many in a row the run goes back to its last checkpoint; when that does not help, it ends (exit code
    76)."""
    spike: Literal["off", "log", "skip", "roll_back"] = "log"
    """A loss far above the last ones is noted in metrics.jsonl (log), the step left out (skip), or the run goes back to
    its last checkpoint and leaves the step out when it comes to it again (roll_back)."""
    spike_window: int = 100
    """How many of the last finite losses a loss is compared with; nothing is a spike before there are a fifth."""
    spike_mads: float = 10.0
    """A spike is this many times 1.4826 * MAD above their median. MAD: median distance from the median."""
    stall_seconds: float | None = 300.0
    """When a rank has made no progress for so long, it is named with what it did last, and all ranks end (exit code
    77). Longer than the longest evaluation batch takes, and below 540: collectives themselves give up after 600. null:
    nobody watches."""
    check_replicas: int | None = None
    """Every so many steps, and before each checkpoint, compare the copies of parameters that ranks hold, bit by bit,
    and end when they differ (exit code 78). null: never."""
    max_restarts: int | None = 5
    """A run that was started again so often in a row without a new checkpoint, or a step further than before, is not
    started once more (exit code 79). null: no limit."""


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything that makes a run."""

    __pydantic_config__ = STRICT

    task: Literal["language_modelling", "classification"] = "language_modelling"
    """What is trained: a decoder on the next token, or an encoder on the label of a text."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: RunConfig = field(default_factory=RunConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
