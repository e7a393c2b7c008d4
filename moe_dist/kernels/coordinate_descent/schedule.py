"""How many iterations coordinate descent makes, and at which temperature each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The temperature falls from eps_init by `decay` an iteration down to eps, and the last iteration is at eps
    (CoDA, arXiv 2304.04947, section 3.2). Raises ValueError for numbers that are none of a falling schedule."""

    iterations: int = 20
    eps: float = 0.03
    eps_init: float = 4.0
    decay: float = 0.7

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} is below 1: coordinate descent needs one at least")
        if not 0 < self.eps <= self.eps_init:
            raise ValueError(f"eps={self.eps} is outside 0 < eps <= eps_init={self.eps_init}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay} is outside 0 < decay <= 1")

    def temperatures(self) -> list[float]:
        """One for each iteration."""
        falling = [max(self.eps_init * self.decay**i, self.eps) for i in range(self.iterations - 1)]
        return [*falling, self.eps]
