"""Versions of what training uses, and which backends can run here."""

import dataclasses
import platform
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import get_args, get_type_hints

import moe_dist
from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.doctor.findings import Findings

PACKAGES = (
    "torch",
    "deepspeed",
    "megatron-core",
    "triton",
    "flash-attn",
    "apex",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "pydantic",
    "tensorboard",
    "wandb",
    "pyarrow",
    "tiktoken",
    "sentencepiece",
)


def look_at_software(found: Findings) -> None:
    facts = {"moe_dist": moe_dist.__version__, "python": f"{platform.python_version()} ({sys.platform})"}
    facts |= {name: version_of(name) or "absent" for name in PACKAGES}
    facts["system"] = f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}".strip(", ")
    facts["c++ compiler"] = shutil.which("c++") or shutil.which("g++") or "absent"
    found.facts["software"] = facts
    found.broken += unmet_requirements("moe_dist")


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet_requirements(package: str) -> list[str]:
    """A line for each package that `package` needs, by what it was installed with, and that is absent or of a version
    that it does not work with. Nothing where `package` is not installed but lies in a folder."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires(package) or []]
    except metadata.PackageNotFoundError:
        return []
    lines = []
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        version = version_of(each.name)
        if version is None or not each.specifier.contains(version, prereleases=True):
            have = "is not installed" if version is None else f"{version} is not {each.specifier}"
            lines.append(f"{each.name} {have}: pip install '{each.name}{each.specifier}'")
    return lines


def look_at_backends(found: Findings, device_type: str) -> None:
    """Every choice of the configuration, with why not where it cannot run. torch has been imported by now."""
    from moe_dist.models.backends import describe_auto_attention, describe_backends, resolve_backends

    facts: dict[str, str] = {"device": device_type}
    for path, section, field in (
        ("model.attention.backend", AttentionConfig, "backend"),
        ("model.kernels", ModelConfig, "kernels"),
        ("model.moe.experts", MoEConfig, "experts"),
    ):
        for choice in get_args(get_type_hints(section)[field]):
            try:
                model = resolve_backends(_model_with(path, choice), 1, device_type)
            except ValueError as error:
                facts[f"{path}={choice}"] = f"no: {error}"
                continue
            named = describe_backends(model, device_type)
            facts[f"{path}={choice}"] = named[{"backend": "attention"}.get(field, field)]
    facts["model.attention.backend=auto"] = describe_auto_attention(device_type)
    facts["engine.name=native"] = "native"
    facts["engine.name=deepspeed"] = _why_no_deepspeed() or "deepspeed"
    found.facts["backends"] = facts


def _model_with(path: str, choice: str) -> ModelConfig:
    """The default one with a backend, at a dotted path from `model` on."""
    model, (*homes, name) = ModelConfig(), path.split(".")[1:]
    for home in homes:
        section = dataclasses.replace(getattr(model, home), **{name: choice})
        return dataclasses.replace(model, **{home: section})
    return dataclasses.replace(model, **{name: choice})  # type: ignore[arg-type]


def _why_no_deepspeed() -> str | None:
    if find_spec("deepspeed") is None:
        return "no: it is not installed: pip install deepspeed"
    if not (shutil.which("c++") or shutil.which("g++")):
        return "no: it compiles its optimizers when first used, and there is no C++ compiler: install g++"
    return None
