"""Products with static weights inside larger kernels: found, and declined by name."""

from collections.abc import Callable, Sequence
from typing import Any

from monarch_fx.rules.base import Product, Refusal, Static


def refuse(reason: str) -> Callable[..., Product | Refusal | None]:
    """A rule that declines every call in which a static matrix takes part."""

    def rule(*args: Any, **kwargs: Any) -> Product | Refusal | None:
        operands = [*args, *kwargs.values()]
        operands += [item for operand in operands if isinstance(operand, Sequence) for item in operand]
        matrices = [operand for operand in operands if isinstance(operand, Static) and operand.ndim > 1]
        return Refusal(reason) if matrices else None

    return rule
