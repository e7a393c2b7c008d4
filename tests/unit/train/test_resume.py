"""What a checkpoint says of its model, read by a version that knows more options; what may be overridden."""

from dataclasses import replace
from typing import Any

from moe_dist.cli import COMMANDS, parser_of
from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.train.resume import OVERRIDES, _completed, _model_settings


def older(model: ModelConfig) -> Any:
    """As written before pools and balance were options."""
    settings = _model_settings(model)
    for moe in (settings["moe"], settings["attention"]["moe"]):
        for name in ("capacity_pool", "pool_floor", "balance"):
            del moe[name]
    return settings


def test_younger_options_are_taken_at_their_defaults() -> None:
    model = ModelConfig(moe=MoEConfig(top_k=1, capacity_schedule={5: 0.5}))
    told = _completed(older(model), _model_settings(ModelConfig()))
    assert told == _model_settings(model)
    assert told != _model_settings(replace(model, moe=replace(model.moe, capacity_pool=2)))
    assert told != _model_settings(replace(model, moe=replace(model.moe, top_k=2)))


def test_options_that_are_gone_are_still_another_model() -> None:
    told = older(ModelConfig()) | {"former": {"rate": 1}, "norm": "layer"}
    assert _completed(told, _model_settings(ModelConfig())) != _model_settings(ModelConfig())
    assert _completed(None, _model_settings(ModelConfig())) is None


def test_the_help_names_everything_that_may_be_overridden() -> None:
    parser = parser_of(COMMANDS["train"])
    (told,) = (parser.help_of(action) for action in parser._actions if "--override" in action.option_strings)
    assert f": {', '.join(OVERRIDES)} (default: nothing)" in told
