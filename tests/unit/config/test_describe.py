"""What --help says of the configuration."""

import pytest

from moe_dist.config import Config
from moe_dist.config.describe import describe_keys, describe_sections, type_words
from moe_dist.config.parse import field_types, parse_dict, sections_of


def test_every_section_has_a_line_and_every_key_a_text() -> None:
    lines = describe_sections().splitlines()
    assert len(lines) == 1 + len(list(sections_of(Config)))
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
    entries = describe_keys("all", Config()).split("\n\n")
    assert len(entries) == len(field_types(Config))
    bare = [entry for entry in entries if len(entry.splitlines()) < 2]
    assert not bare, "a field without a docstring under it"


def test_a_section_shows_its_own_keys_with_type_value_and_text() -> None:
    config = parse_dict({"model": {"moe": {"capacity_factor": None}}}, "test")
    text = describe_keys("model.moe", config)
    assert "--model.moe.top-k  INTEGER  (2)\n    Experts that each token is sent to." in text
    assert "--model.moe.capacity-factor  NUMBER | null | list of NUMBER or null  (null)" in text
    assert "--model.moe.drop-policy  position | score | random  (position)" in text
    assert "--model.d-model" not in text and "--model.attention.moe.top-k" not in text
    below = "model.attention, model.attention.moe, model.attention.routed, model.moe"
    assert describe_keys("model", config).endswith(f"Sections below it: {below}")


def test_one_key_in_either_spelling() -> None:
    assert describe_keys("--run.save-every", Config()) == describe_keys("run.save_every", Config())
    assert describe_keys("run.tensorboard", Config()).startswith("--run.tensorboard  true | false  (true)\n")


@pytest.mark.parametrize(
    ("topic", "near"), [("modle", "model"), ("top_k", "model.moe.top_k"), ("train.stpes", "train.steps")]
)
def test_an_unknown_topic_names_the_nearest(topic: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"--help {topic}: no such section or key; did you mean {near}"):
        describe_keys(topic, Config())


def test_every_type_of_the_schema_has_words() -> None:
    assert all(type_words(hint) for hint in field_types(Config).values())
