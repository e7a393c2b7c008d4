"""Without a GPU these tests rehearse on CPU, with the Triton kernels in Triton's interpreter."""

from tests.unit.conftest import _seed  # noqa: F401  (and TRITON_INTERPRET, which it sets where there is no GPU)
