"""Packages with kernels for GPUs that a configuration can name: flash-attn and apex.

None is taken because it happens to be there, and none is left out in silence: where one that was named cannot run, that
is an error with the way to build it.
"""

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec


@dataclass(frozen=True)
class Package:
    """name: of the distribution. modules: what it has where it was built whole. build: the command that does so."""

    name: str
    modules: tuple[str, ...]
    build: str

    @property
    def built(self) -> bool:
        return all(is_there(module) for module in self.modules)

    def describe(self) -> str:
        """`flash-attn 2.8.4`, for logs."""
        try:
            return f"{self.name} {metadata.version(self.name)}"
        except metadata.PackageNotFoundError:
            return self.name


FLASH_ATTN = Package("flash-attn", ("flash_attn",), "pip install flash-attn --no-build-isolation")
# PyPI's package of this name is another one. Its extensions: of FusedRMSNorm, and of FusedAdam.
APEX = Package(
    "apex",
    ("apex", "fused_layer_norm_cuda", "amp_C"),
    "pip install -v --no-build-isolation --config-settings '--build-option=--cpp_ext' "
    "--config-settings '--build-option=--cuda_ext' git+https://github.com/NVIDIA/apex",
)


def check_package(package: Package, chosen: str, instead: str, device_type: str) -> None:
    """Raises ValueError, one line, where the package cannot run. chosen: as the user wrote it, `optim.adam=apex`."""
    if device_type == "cpu":
        raise ValueError(f"{chosen} needs a GPU, but this run is on cpu: set it to {instead}")
    if not package.built:
        raise ValueError(
            f"{chosen}, but {package.name} is not installed with its CUDA extensions: {package.build} "
            f"(or set it to {instead})"
        )


def is_there(module: str) -> bool:
    """Whether it can be imported. A folder of that name without a module in it is not the package: other packages, or
    what a package writes, may lie there."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None
