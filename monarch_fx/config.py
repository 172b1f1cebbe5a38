"""Choices that hold for a whole plan, checked when they are made."""

from dataclasses import dataclass

from monarch_fx.errors import ConfigError


@dataclass(frozen=True)
class MonarchConfig:
    """How structures are chosen.

    Args:
        nblocks: The same number of blocks in both directions for every product, short for equal
            ``nblocks_out`` and ``nblocks_in``.
        nblocks_out: Blocks along the output features, for every product.
        nblocks_in: Blocks along the input features, for every product.
        rank: Rank of every block, for every product; capped at ``min(s, p)``, where blocks are exact.
            A grid and a rank together override budget and time rule; a grid alone leaves the rank to the
            budget, and to the authors' ``min(in, out) / nblocks**2`` where no budget is given.
        nblocks_choices: The block counts that are tried in both directions where no grid is forced.
        rank_multiple: Ranks that are tried are multiples of this (tensor cores and SIMD lanes want 16),
            and with many tokens on a GPU of what fills its kernels, where that leaves enough of them.
        require_speedup: Choose only structures that are predicted clearly (5 %) faster than dense, or were measured 2 %
            faster.
        reorder: With calibration data: put hidden features of MLPs in an order in which blocks have lower rank. The
            dense model computes the same in any.

    Raises:
        ConfigError: A field is not a positive integer, or the fields contradict each other.
    """

    nblocks: int | None = None
    nblocks_out: int | None = None
    nblocks_in: int | None = None
    rank: int | None = None
    nblocks_choices: tuple[int, ...] = (1, 2, 3, 4, 8)
    rank_multiple: int = 16
    require_speedup: bool = True
    reorder: bool = True

    def __post_init__(self) -> None:
        for field in ("nblocks", "nblocks_out", "nblocks_in", "rank", "rank_multiple"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"MonarchConfig.{field} must be a positive integer, got {value!r}.")
        if self.nblocks is not None and (self.nblocks_out is not None or self.nblocks_in is not None):
            raise ConfigError(
                f"MonarchConfig got nblocks={self.nblocks} together with nblocks_out={self.nblocks_out} and "
                f"nblocks_in={self.nblocks_in}: give either nblocks, or the two directions."
            )
        if (self.nblocks_out is None) != (self.nblocks_in is None):
            raise ConfigError(
                f"MonarchConfig got nblocks_out={self.nblocks_out} and nblocks_in={self.nblocks_in}: "
                "a grid needs both (1 is a valid count)."
            )
        if self.rank is not None and self.grid is None:
            raise ConfigError(f"MonarchConfig.rank={self.rank} needs a grid: give nblocks as well.")
        choices = self.nblocks_choices
        are_many = isinstance(choices, (tuple, list)) and len(choices) > 0
        if not are_many or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in choices):
            raise ConfigError(f"MonarchConfig.nblocks_choices must be a tuple of positive integers, got {choices!r}.")

    @property
    def grid(self) -> tuple[int, int] | None:
        """The forced ``(nblocks_out, nblocks_in)``, or None where the planner chooses."""
        if self.nblocks is not None:
            return self.nblocks, self.nblocks
        if self.nblocks_out is None or self.nblocks_in is None:
            return None
        return self.nblocks_out, self.nblocks_in

    @property
    def low_rank_only(self) -> bool:
        """Whether every structure is a single block."""
        return self.grid == (1, 1) or (self.grid is None and set(self.nblocks_choices) == {1})
