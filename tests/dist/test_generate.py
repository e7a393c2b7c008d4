"""A checkpoint of one layout writes the same text in every other; decoding in pieces is the whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from moe_dist.checkpoint.find import run_config, whole_checkpoint
from moe_dist.checkpoint.layout import Manifest
from moe_dist.cli import main
from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.generate.command import in_layout, load_decoder
from moe_dist.generate.decode import CachedDecoder, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import create_mesh, single_process_mesh
from moe_dist.step import StepContext
from moe_dist.train.health.signals import StopGuard
from moe_dist.train.loop import Trainer
from tests.dist.helpers import KEY, forget_process_group, run_checks, tiny_config
from tests.dist.nursery import on_ranks

CPU = torch.device("cpu")


def train(root: str, ep: int, position: str) -> None:
    run = dict(run__root=root, run__name="tiny", run__tensorboard=False, run__eval_sequences=2)
    config = tiny_config(parallel__ep=ep, model__attention={"position": position}, train__steps=3, **run)
    trainer = Trainer(config, CPU, Console(quiet=True))
    trainer.run(trainer.checkpoint_to_continue("never"), StopGuard())


def write(root: str, layouts: list[tuple[int | None, int | None]]) -> None:
    """Texts in every layout (ep, tp) of these ranks; None is as trained."""
    for ep, tp in layouts:
        config, checkpoint = run_config(Path(root) / "tiny"), whole_checkpoint(Path(root) / "tiny", print)
        model = CachedDecoder(load_decoder(checkpoint, in_layout(config, dist.get_world_size(), ep, tp), CPU), CPU)
        sampling = Sampling(temperature=1.0, top_k=40)
        texts = list(generate(model, [[100, 101], [102], [7, 8, 9]], 20, 16, 3, sampling))
        if dist.get_rank() == 0:
            Path(root, f"{dist.get_world_size()}-{ep}-{tp}").write_text(json.dumps(texts))


def test_text_is_the_same_in_every_layout(tmp_path: Path) -> None:
    on_ranks(train, 2, str(tmp_path), 2, "rotary")
    on_ranks(write, 1, str(tmp_path), [(None, None)])
    on_ranks(write, 2, str(tmp_path), [(None, None), (1, 2), (2, 2)])
    texts = [path.read_text() for path in tmp_path.glob("?-*")]
    assert len(texts) == 4
    assert len(set(texts)) == 1


MODEL = dict(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=1, d_ff=24)


def pieces_are_the_whole() -> None:
    """ep and tp, rotary and ALiBi, sequence parallelism: the logits of a single process, whole and in pieces."""
    ids_BS = (KEY.uniform(torch.arange(4 * 12)) * 32).long().view(4, 12)
    step = StepContext(KEY, "dropless")
    for position in ("rotary", "alibi"):
        for ep, tp, kv_heads, sp in ((1, 2, 1, False), (2, 1, 1, False), (2, 2, 2, False), (2, 2, 1, True)):
            moe = MoEConfig(num_experts=4, top_k=2, capacity_factor=1.0)
            attention = AttentionConfig(position=position, qk_ln=True, sinks=True, window=7)
            model = ModelConfig(**(MODEL | {"num_kv_heads": kv_heads}), moe=moe, attention=attention)
            alone = Decoder(resolve_backends(model, 1), single_process_mesh())
            cut = Decoder(resolve_backends(model, ep), create_mesh(ep, tp, sequence_parallel=sp))
            with torch.no_grad():
                whole = alone(ids_BS, None, step, "logits")
                torch.testing.assert_close(cut(ids_BS, None, step, "logits"), whole, rtol=0, atol=1e-5)
                caches = cut.new_caches(*ids_BS.shape)
                parts = [cut(part, None, step, "logits", caches) for part in ids_BS.split([5, 1, 1, 4, 1], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_decoding_is_the_same_in_every_layout() -> None:
    run_checks(2, [pieces_are_the_whole])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere", "--prompt=a"], "neither a checkpoint nor a run"),
        (["{run}"], "either --prompt TEXT, or --prompts FILE"),
        (["{run}", "--prompt=a", "--prompts=-"], "either --prompt TEXT, or --prompts FILE"),
        (["{run}", "--prompt="], "no prompt with text"),
        (["{run}", "--prompts=absent.txt"], "--prompts absent.txt: No such file"),
        (["{run}", "--prompt=a", "--prompt=b", "--stream"], "--stream shows one text"),
        (["{run}", "--prompt=a", "--top-p=2"], "top_p=2.0 is outside"),
        (["{run}", "--prompt=a", "--max-new-tokens=0"], "--max-new-tokens 0"),
        (
            ["{run}", "--prompt=a", "--tp=2"],
            "--tp 2 needs 2 processes or a multiple, and this is one: torchrun --nproc_",
        ),
        (
            ["{run}", "--prompt=a", "--ep=2", "--tp=3"],
            "torchrun --nproc_per_node 6 -m moe_dist.cli generate RUN --ep 2",
        ),
    ],
    ids=str,
)
def test_mistakes(args: list[str], words: str, tiny_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *(arg.replace("{run}", tiny_run) for arg in args)]) == 2
    assert words in capsys.readouterr().err
    forget_process_group()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    on_ranks(train, 1, str(folder), 1, "rotary")
    return f"{folder}/tiny"


def test_the_newest_whole_checkpoint_is_taken(
    tiny_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `generate` and `experts` alike; what is wrong with a newer one is said before. They lie on another disk."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "checkpoints").rename(tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    whole, newer = run / "checkpoints/step-000003", run / "checkpoints/step-000007"
    shutil.copytree(whole, newer)
    manifest = Manifest.load(whole)
    there = replace(manifest.data_position, next_step=7)
    (newer / "manifest.json").write_text(replace(manifest, step=7, data_position=there, random_state=there).dumps())
    ask = ["--prompt=import os", "--max-new-tokens=8", "--device=cpu"]
    assert main(["generate", str(run), *ask]) == 0
    printed = capsys.readouterr()
    assert "passed over" not in printed.err and f"{newer}: 1 ranks" in printed.err
    expected = printed.out
    shard = newer / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for command in (["generate", str(run), *ask], ["experts", str(run), "list"]):
        assert main(command) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith(f"passed over: {shard} does not match its SHA-256 in the manifest\n")
        assert printed.out == expected or (command[0] == "experts" and "4 experts" in printed.out)
    assert main(["generate", str(newer), *ask]) == 2
    assert f"{shard} does not match" in capsys.readouterr().err
    forget_process_group()


def test_prompts_from_a_file_and_a_stream(tiny_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\n\nclass A:\n")
    shown = []
    for args in (
        [f"--prompts={prompts}"],
        ["--prompt=import os", "--prompt=class A:"],
        ["--prompt=import os", "--stream"],
    ):
        assert main(["generate", tiny_run, *args, "--max-new-tokens=8", "--device=cpu"]) == 0
        printed = capsys.readouterr()
        assert "tokens/s" in printed.err
        shown.append(printed.out)
    assert shown[0] == shown[1] and shown[0].count("---") == 2
    assert shown[0].split("--- 1\n")[1].split("--- 2\n")[0] == shown[2]
    checkpoint = f"{tiny_run}/checkpoints/step-000003"
    assert main(["generate", checkpoint, "--prompt=import os", "--max-new-tokens=8", "--device=cpu"]) == 0
    assert capsys.readouterr().out == shown[2]
