"""Models of every family in, out and in again by the command line; test_families.py compares what they compute."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn

from moe_dist.checkpoint.find import run_config
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.reshard import load_weights
from moe_dist.cli import main
from moe_dist.config.load import load_config
from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.generate.decode import CachedDecoder, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.interop import command, hf_import
from moe_dist.interop.config_json import UNLIKE, read_settings, settings_of
from moe_dist.interop.families import FAMILIES as KNOWN
from moe_dist.interop.hf_export import bytes_as_bpe
from moe_dist.interop.meaning import meaning
from moe_dist.models.backends import plainest
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.train.tasks import make_task
from tests.dist.helpers import forget_process_group
from tests.unit.helpers import context, random_ids
from tests.unit.models.test_families import FAMILIES, Widely, configured, theirs

LENGTH = 24
TWENTY_STEPS = f"""
--data.kind text --train.seq-len {LENGTH} --train.global-batch 4 --train.steps 20 --train.threads 1 --device cpu
--optim.lr 1e-3 --optim.eps 1e-6 --optim.warmup-steps 0 --optim.schedule constant
--run.eval-sequences 2 --run.no-tensorboard
""".split()


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A small model of Transformers, and what it saves."""
    where, settings, ours = FAMILIES[name]
    model = theirs(where, settings | changes, replace(configured(ours), vocab_size=256))
    model.config.dtype = dtype
    values = {name: value.to(dtype) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del values["lm_head.weight"]
    model.save_pretrained(folder, state_dict=values)
    return model


def decoder_of(run: Path) -> Decoder:
    decoder = Decoder(plainest(run_config(run).model), single_process_mesh())
    load_weights(run / "checkpoints" / "step-000000", decoder, checked=True)
    return decoder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same_bytes(folder: Path, other: Path) -> None:
    first, second = tensors_of(folder), tensors_of(other)
    assert sorted(first) == sorted(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", FAMILIES)
def test_out_again_is_byte_equal(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    there, run, back = tmp_path / "theirs", tmp_path / "run", tmp_path / "back"
    saved(name, there)
    assert main(["import", "hf", str(there), "--output", str(run)]) == 0
    assert "the same model: logits of" in capsys.readouterr().out  # by the gate
    assert main(["export", "hf", str(run), "--output", str(back), "--max-shard-bytes", "20000", "--no-compare"]) == 0
    assert_same_bytes(there, back)
    assert (back / "model.safetensors.index.json").is_file() and len(list(back.glob("*.safetensors"))) > 1
    first, second = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (there, back))
    assert first | {"_name_or_path": ""} == second | {"_name_or_path": ""}
    # Without what it came with, the family is found by what the run's configuration means.
    shutil.rmtree(run / "hugging_face")
    assert main(["export", "hf", str(run), "--output", str(tmp_path / "alone"), "--no-compare"]) == 0
    ids = random_ids(2, LENGTH, 256)
    with torch.no_grad():
        expected = decoder_of(run)(ids, None, context(phase="dropless"), "logits")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "alone", attn_implementation="eager")
        loaded.set_experts_implementation("eager")
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "back", "run", "theirs"]  # no drafts


@pytest.mark.parametrize("name", [name for name in FAMILIES if "," not in name])
def test_greedy_text_is_theirs_token_by_token(name: str, tmp_path: Path) -> None:
    other = saved(name, tmp_path / "theirs")
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run"), "--no-compare"]) == 0
    decoder, prompt = decoder_of(tmp_path / "run").double(), random_ids(1, 5, 256)
    other.generation_config.eos_token_id = None  # no token is kept from being chosen
    with Widely(), torch.no_grad():
        expected = other.generate(prompt, do_sample=False, max_new_tokens=16, use_cache=True)
    model = CachedDecoder(decoder, torch.device("cpu"))
    found = [row[0] for row in generate(model, prompt.tolist(), 16, LENGTH, 0, Sampling(temperature=0.0))]
    assert found == expected[0, 5:].tolist()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_training_goes_on_as_there(name: str, tmp_path: Path) -> None:
    """20 steps of the trainer with the imported weights, against torch's AdamW on the library's model."""
    other = saved(name, tmp_path / "theirs").float()
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run"), "--no-compare"]) == 0
    (tmp_path / "text.txt").write_text(" ".join(str(number * number) for number in range(900)))
    where = ["--data.paths", str(tmp_path / "text.txt"), "--train.init-from", str(tmp_path / "run"), "--run.name", "on"]
    router = ["--model.moe.balance-loss-coef", "0"] if "moe" in name else []
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["train", config, *TWENTY_STEPS, *where, *router, "--run.root", str(tmp_path)]) == 0
    forget_process_group()
    ours_left = [json.loads(line)["loss"] for line in (tmp_path / "on/metrics.jsonl").read_text().splitlines()]

    task = make_task(load_config(tmp_path / "on/config.yaml"))
    sampler = task.sampler(4, task.config.train.order_seed)  # type: ignore[attr-defined]
    decayed = [[param for param in other.parameters() if (param.ndim > 1) == matrices] for matrices in (True, False)]
    groups = [dict(params=params, weight_decay=decay) for params, decay in zip(decayed, (0.1, 0.0), strict=True)]
    adamw, theirs_left = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-6), []
    for step in range(20):
        inputs_BS, targets_BS = task.batch(sampler.indices(step))
        loss = F.cross_entropy(other(input_ids=inputs_BS).logits.flatten(0, 1), targets_BS.flatten())
        theirs_left.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    assert ours_left[-1] < ours_left[0] - 0.5
    assert max(abs(a - b) for a, b in zip(ours_left, theirs_left, strict=True)) < 1e-4


def test_bf16_and_fp16(tmp_path: Path) -> None:
    there, run, back = tmp_path / "theirs", tmp_path / "run", tmp_path / "back"
    saved("glm4_moe", there, torch.bfloat16)
    assert main(["import", "hf", str(there), "--output", str(run)]) == 0
    reader = Reader(run / "checkpoints" / "step-000000")
    assert reader.dtypes("weight", "blocks.1.feed_forward.experts.w_up") == ["BF16"]
    assert reader.dtypes("weight", "blocks.1.feed_forward.router.bias_E") == ["F32"]
    assert main(["export", "hf", str(run), "--output", str(back), "--dtype", "fp16"]) == 0
    first, second = tensors_of(there), tensors_of(back)
    assert json.loads((back / "config.json").read_text())["dtype"] == "float16"
    for name, value in first.items():
        kept = "e_score" in name  # no weight: Transformers keeps it in fp32
        assert second[name].dtype == (torch.float32 if kept else torch.float16)
        torch.testing.assert_close(second[name].float(), value.float() if kept else value.half().float())
    assert main(["import", "hf", str(back), "--output", str(tmp_path / "again"), "--dtype", "bf16"]) == 0


def test_config_json_says_the_precision_of_the_files(tmp_path: Path) -> None:
    """fp16 is stored as fp32 and goes out so. Transformers loads in what config.json says, and would round."""
    transformers = pytest.importorskip("transformers")
    there, run, back = tmp_path / "theirs", tmp_path / "run", tmp_path / "back"
    saved("mixtral", there, torch.float16)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert main(["import", "hf", str(there), "--output", str(run)]) == 0
    assert main(["export", "hf", str(run), "--output", str(back)]) == 0
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"
    assert transformers.AutoModelForCausalLM.from_pretrained(back).dtype == torch.float32


def altered(change: Callable[[dict[str, Tensor]], None], folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop(EXPERT), f"{EXPERT} is missing"),
    "extra": (
        lambda tensors: tensors.update({EXPERT.replace("2", "4"): tensors[EXPERT].clone()}),
        f"{EXPERT.replace('2', '4')} [24, 16] is left over: it belongs to nothing",
    ),
    "misshapen": (
        lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1].clone()}),
        f"{EXPERT} has shape [23, 16], but the configuration says [24, 16]",
    ),
    "in float64": (
        lambda tensors: tensors.update({EXPERT: tensors[EXPERT].double()}),
        f"{EXPERT} is stored as F64, and checkpoints here hold fp32 and bf16",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_tensor_that_is_not_as_it_should_be_is_named(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("qwen3_moe", tmp_path / "theirs")
    change, message = DAMAGE[what]
    altered(change, tmp_path / "theirs")
    capsys.readouterr()
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_gate_keeps_nothing_that_is_not_finite(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where both sides have it too."""
    saved("llama", tmp_path / "theirs")
    altered(lambda tensors: tensors["model.norm.weight"].fill_(value), tmp_path / "theirs")
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run")]) == 1
    assert "100% of the tokens are apart, so this is not the same model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_transformers_cannot_load_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("llama", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text()) | {"initializer_range": "wide"}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run")]) == 1
    assert "theirs: Transformers cannot load it: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("weight_map", [None, [], {"lm_head.weight": 5}])
def test_an_index_that_names_no_files_is_refused(
    weight_map: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("llama", tmp_path / "theirs")
    (tmp_path / "theirs/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run")]) == 2
    assert "index.json: weight_map does not name a file for each tensor" in capsys.readouterr().err


def test_what_is_left_out_on_purpose_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("qwen3_moe", tmp_path / "theirs")
    altered(lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(3)}), tmp_path / "theirs")
    args = ["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run"), "--leave-out"]
    assert main([*args, "model.layers.3.*", "--leave-out", EXPERT]) == 2
    assert f"{EXPERT} is missing" not in (error := capsys.readouterr().err)
    assert f"{EXPERT} cannot be left out: the model needs it" in error
    assert main([*args, "model.layers.3.*"]) == 0
    assert "left out, as asked: 1 tensors, model.layers.3.eh_proj.weight" in capsys.readouterr().err


def test_the_gate_keeps_nothing_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there, run = tmp_path / "theirs", tmp_path / "run"
    saved("qwen3_moe", there)
    args = ["import", "hf", str(there), "--output", str(run)]
    wrong = replace(KNOWN["qwen3_moe"], rows=tuple(_exchanged(row) for row in KNOWN["qwen3_moe"].rows))
    with monkeypatch.context() as patched:
        patched.setitem(KNOWN, "qwen3_moe", wrong)
        assert main(args) == 1
    assert "of the tokens are apart, so this is not the same model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    with monkeypatch.context() as patched:
        patched.setattr(command, "can_compare", lambda: False)
        assert main(args) == 3
    assert (
        "not compared: Transformers is not installed: bash launch/install.sh hf in a clone, or pip"
        in capsys.readouterr().err
    )
    assert run.is_dir()
    assert main(args) == 2  # it is there
    assert f"{run} is there already: --output must name a new folder" in capsys.readouterr().err


def _exchanged(row: Any) -> Any:
    """A table that takes the gate for the values."""
    words = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    theirs_name = row.theirs
    for word, other in words.items():
        if word in row.theirs:
            theirs_name = row.theirs.replace(word, other)
            break
    return replace(row, theirs=theirs_name)


@pytest.mark.parametrize(
    "changes, lines",
    [
        ({"hidden_act": "relu"}, ["hidden_act=relu: known here are silu, gelu"]),
        ({"hidden_size": None}, ["config.json has no hidden_size"]),
        (
            {"rope_scaling": {"rope_type": "longrope"}, "hidden_act": "relu"},
            ["rope_type=longrope: rotation here is scaled by linear, dynamic, yarn, llama3", "hidden_act=relu"],
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
            ["rope yarn with attention_factor=1.0, which is not known here"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5: this family turns all of a head"]),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"], "num_key_value_heads": 4},
            ["layer_types names 1 layers, but num_hidden_layers=2"],
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"], "num_hidden_layers": 10**9},
            ["layer_types names 1 layers, but num_hidden_layers=1000000000"],
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, ["weights are quantised (fp8)"]),
        (
            {"model_type": "gpt_bigcode", "n_embd": 16, "n_layer": 2, "n_head": 4, "scale_attn_weights": False},
            ["scale_attn_weights=false: scores here are divided by the root of a head's width"],
        ),
        (
            {"model_type": "falcon", "alibi": True, "num_ln_in_parallel_attn": 2},
            ["alibi=true: ALiBi of Falcon is added", "num_ln_in_parallel_attn=2: the new decoder architecture has 1"],
        ),
        ({"model_type": "deepseek_v2"}, UNLIKE["deepseek_v2"]),
        ({"model_type": "deepseek_v3"}, ["attention by latents (MLA)"]),
        ({"model_type": "mamba"}, ["model_type=mamba is not among those that come in: llama"]),
    ],
)
def test_what_cannot_come_in_is_named(changes: dict[str, Any], lines: list[str]) -> None:
    values = dict(
        model_type="llama",
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
    )
    values = {key: value for key, value in (values | changes).items() if value is not None}
    with pytest.raises(ValueError) as refused:
        read_settings(values)
    found = str(refused.value).splitlines()
    assert len(found) == len(lines)
    for line in lines:
        assert any(line in each for each in found), found


def test_settings_of_older_versions() -> None:
    """rope_theta and rope_scaling beside one another, and keys that say nothing of the model."""
    values = dict(
        model_type="qwen2",
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        rope_theta=5e5,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        attention_dropout=0.1,
        torch_dtype="bfloat16",
        something_new=3,
    )
    read = read_settings(values)
    attention = AttentionConfig(
        qkv_bias=True,
        window=[None, None, 5],
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_len=16,
    )
    wanted = ModelConfig(
        vocab_size=256,
        d_model=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        d_ff=24,
        rope_theta=5e5,
        norm_eps=1e-6,
        tie_embeddings=False,
        attention=attention,
        moe=MoEConfig(num_experts=0),
    )
    assert meaning(read.model) == meaning(wanted)
    assert read.notes == [
        "attention_dropout=0.1 acts in training alone and is not taken over",
        "not known here and not taken over: something_new",
    ]


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_missing_key_means_is_what_it_means_there(name: str) -> None:
    full = pytest.importorskip("transformers").AutoConfig.for_model(name).to_dict()
    whole = meaning(read_settings(full).model)
    for key in full.keys() - {"model_type"}:
        try:
            assert meaning(read_settings({k: v for k, v in full.items() if k != key}).model) == whole, key
        except ValueError as error:
            assert re.search(rf"config\.json has no {key}|num_experts", str(error)), key
            with pytest.raises(ValueError, match=rf"config\.json has no {key}|num_experts"):
                read_settings(full | {key: None})


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2_moe"])
def test_a_billion_layers_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = pytest.importorskip("transformers").AutoConfig.for_model(name).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(full | {"num_hidden_layers": 10**9, "layer_types": None}))
    assert main(["import", "hf", str(tmp_path), "--output", str(tmp_path / "ours")]) == 2
    assert "num_layers=1000000000 is above 10000" in capsys.readouterr().err


def test_what_cannot_go_out_is_named() -> None:
    attention = AttentionConfig(position="alibi", qk_ln=True)
    moe = MoEConfig(router="hash", expert_bias=True)
    with pytest.raises(ValueError) as refused:
        settings_of(ModelConfig(activation="relu2", attention=attention, moe=moe), "mixtral")
    lines = str(refused.value).splitlines()
    for field in (
        "model.attention.position=alibi",
        "model.attention.qk_ln=true",
        "model.moe.router=hash",
        "model.moe.expert_bias=true",
        "model.activation=relu2",
    ):
        assert any(f"the nearest family: {field}, where this family can only have" in line for line in lines), lines


def test_a_top_1_model_is_told_its_ways_out_and_they_lead_there() -> None:
    with pytest.raises(ValueError) as refused:
        settings_of(ModelConfig(moe=MoEConfig(top_k=1)))
    (line,) = str(refused.value).splitlines()
    assert "mixtral, the nearest family: model.moe.top_k=1 with model.moe.renormalize_top_1=false" in line
    assert "model.moe.top_k=2 or more" in line and "model.attention.qk_norm=head" in line
    attention = AttentionConfig(qk_norm="head")
    assert settings_of(ModelConfig(moe=MoEConfig(top_k=2)))[0].model_type == "mixtral"
    assert settings_of(ModelConfig(moe=MoEConfig(top_k=1), attention=attention))[0].model_type == "qwen3_moe"


def test_a_trained_run_goes_out_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of bytes, and one with words; an imported tokenizer is used and goes out as it came."""
    transformers = pytest.importorskip("transformers")
    there, run, back = tmp_path / "theirs", tmp_path / "run", tmp_path / "back"
    saved("mixtral", there)
    words = {f"w{number}": number for number in range(256)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(there / "tokenizer.json"))
    (there / "tokenizer_config.json").write_text('{"eos_token": "w9", "tokenizer_class": "PreTrainedTokenizerFast"}')
    assert main(["import", "hf", str(there), "--output", str(run), "--no-compare"]) == 0
    assert main(["generate", str(run), "--prompt", "w5", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("w5")
    config = load_config(run / "config.yaml")
    assert config.data.tokenizer == str(run / "tokenizer") and config.run.folder == run
    assert main(["export", "hf", str(run), "--output", str(back), "--no-compare"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (there / name).read_bytes()
    shutil.rmtree(run / "hugging_face")
    assert main(["export", "hf", str(run), "--output", str(tmp_path / "own"), "--no-compare"]) == 0
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "own").encode("w7") == [7]
    assert json.loads((tmp_path / "own" / "config.json").read_text())["eos_token_id"] == 9


def test_bytes_are_tokens_there_too() -> None:
    tokenizer, text = bytes_as_bpe(), "a\0 é\n  x" + "".join(map(chr, range(1, 0x250)))
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode()), skip_special_tokens=False) == text


def test_closed_experts_do_not_go_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("qwen3_moe", tmp_path / "theirs")
    monkeypatch.setattr(hf_import, "_open", lambda shape: iter([torch.tensor([1.0, 0.0, 1.0, 0.0])]))
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run"), "--no-compare"]) == 0
    assert main(["export", "hf", str(tmp_path / "run"), "--output", str(tmp_path / "back"), "--no-compare"]) == 2
    assert "blocks.0.feed_forward has closed experts [1, 3], and models there have none" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "theirs"]


def test_other_commands_read_what_came_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("qwen3_moe", tmp_path / "theirs")
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run"), "--no-compare"]) == 0
    assert main(["checkpoint", "inspect", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "step-000000: step 0" in said and "holds       weight;" in said
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 0


def test_text_is_not_longer_than_learned_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("gpt_bigcode", tmp_path / "theirs")
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run"), "--no-compare"]) == 0
    assert load_config(tmp_path / "run/config.yaml").train.seq_len == 40
    assert main(["generate", str(tmp_path / "run"), "--prompt=a", "--context=41", "--device=cpu"]) == 2
    assert "--context 41 is above max_positions=40 of the model, and places" in capsys.readouterr().err
    forget_process_group()


def test_files_are_what_the_library_writes(tmp_path: Path) -> None:
    saved("llama", tmp_path / "theirs")
    assert main(["import", "hf", str(tmp_path / "theirs"), "--output", str(tmp_path / "run"), "--no-compare"]) == 0
    assert main(["export", "hf", str(tmp_path / "run"), "--output", str(tmp_path / "back"), "--no-compare"]) == 0
    with safe_open(tmp_path / "back" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
