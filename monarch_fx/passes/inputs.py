"""Example inputs: the user's, in any of their forms, or those that a model brings itself."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from monarch_fx.errors import ConfigError, ExampleInputsError, MonarchError


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of a model's forward.

    ``given`` tells whether they are the user's: only then do their sizes say how many tokens a run has. ``name`` is
    what messages call them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: bool
    name: str = "its own dummy inputs"

    def on(self, device: torch.device | None) -> Inputs:
        """The same on another device, as tensors that autograd can use; those that are there already stay."""
        if device is None:
            return self
        return self._each(lambda tensor: (tensor.clone() if tensor.is_inference() else tensor).to(device))

    def cloned(self) -> Inputs:
        """A copy for a model that may write into its inputs."""
        return self._each(torch.clone)

    def into(self, model: nn.Module) -> Any:
        """What the model returns for them.

        Raises:
            ExampleInputsError: It can't run on them.
        """
        try:
            return model(*self.args, **self.kwargs)
        except (MonarchError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ExampleInputsError(
                f"{type(model).__name__} can't run on {self.name}: {type(error).__name__}: {first_line(error)}"
            ) from error

    def mask(self, model: nn.Module) -> torch.Tensor | None:
        """The model's ``attention_mask`` (batch, tokens), by name or in its place: False where tokens don't count."""
        named = inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments
        mask = {**named, **self.kwargs}.get("attention_mask")
        return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        args, kwargs = pytree.tree_map_only(torch.Tensor, change, (self.args, self.kwargs))
        return dataclasses.replace(self, args=args, kwargs=kwargs)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def inputs_of(model: nn.Module, example_inputs: Any) -> Inputs | None:
    """The user's, or the model's own where they are None; ``Inputs`` as they are.

    Raises:
        ExampleInputsError: They can't be bound to the model's forward.
    """
    if example_inputs is None or isinstance(example_inputs, Inputs):
        return example_inputs or own_inputs(model)
    return user_inputs(model, example_inputs)


def with_first_batch(model: nn.Module, example_inputs: Any, batches: Any, name: str) -> tuple[Any, Any]:
    """Example inputs, and ``batches``, of which the first one stands in where neither user nor model has any.

    It gives the graph, not how many tokens a run has.

    Raises:
        ConfigError: ``batches``, the argument ``name``, are a single one, or there are none.
        ExampleInputsError: The first can't be bound to the model's forward.
    """
    if example_inputs is not None or not isinstance(batches, Iterable) or own_inputs(model) is not None:
        return example_inputs, batches
    check_batches(batches, name)
    iterator = iter(batches)
    for first in iterator:
        inputs = dataclasses.replace(user_inputs(model, first, f"{name}[0]"), given=False)
        return inputs, itertools.chain([first], iterator) if iterator is batches else batches
    raise ConfigError(f"{name} has no batches; an iterator that was read already gives none again.")


def user_inputs(model: nn.Module, example_inputs: Any, name: str = "example_inputs") -> Inputs:
    """A tensor, a tuple or list of arguments, or a mapping of keyword arguments (``BatchEncoding`` too).

    Raises:
        ExampleInputsError: They can't be bound to the model's forward.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = {str(key): value for key, value in example_inputs.items()}
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        raise ExampleInputsError(
            f"{name} is a {type(example_inputs).__name__}; give a tensor, a tuple of positional arguments, or a dict "
            "of keyword arguments."
        )
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([type(a).__name__ for a in args] + list(kwargs))
        raise ExampleInputsError(
            f"{name} ({given}) can't be passed to {type(model).__name__}.forward{signature}: {error}. A tuple or list "
            "holds positional arguments, a dict keyword arguments; leave labels out."
        ) from error
    return Inputs(args, _without_cache(model, kwargs, len(args)), True, name)


def each_inputs(model: nn.Module, batches: Iterable[Any], name: str) -> Iterator[Inputs]:
    """Of every batch of ``batches``, the argument ``name``.

    Raises:
        ExampleInputsError: One can't be bound to the model's forward.
    """
    for i, batch in enumerate(batches):
        yield user_inputs(model, batch, f"{name}[{i}]")


def check_batches(batches: Any, name: str) -> None:
    """Whether ``batches``, the argument ``name``, are several batches.

    Raises:
        ConfigError: They are a single one.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"{name} is an iterable of batches, such as a list or a DataLoader; got a {type(batches).__name__}. "
            "Put a single batch into a list."
        )


def in_memory(model: nn.Module, batches: Any, name: str) -> list[Any]:
    """All of ``batches``, the argument ``name``.

    Raises:
        ConfigError: They are a single one, or there are none.
        ExampleInputsError: One can't be bound to the model's forward.
    """
    check_batches(batches, name)
    batches = list(batches)
    if not batches:
        raise ConfigError(f"{name} has no batches; an iterator that was read already gives none again.")
    for _ in each_inputs(model, batches, name):
        pass
    return batches


def own_inputs(model: nn.Module) -> Inputs | None:
    """Inputs that the model describes itself (transformers' ``dummy_inputs`` and config, timm's ``default_cfg``)."""
    timm_config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(timm_config, Mapping) and "input_size" in timm_config:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        return Inputs((torch.zeros(2, *_timm_input_size(model, timm_config), dtype=dtype),), {}, given=False)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        return None
    kwargs = _without_cache(model, _transformers_inputs(model, config), 0)
    try:
        inspect.signature(model.forward).bind(**kwargs)
    except TypeError:  # dummy_inputs are text where a class doesn't say otherwise
        return None
    return Inputs((), kwargs, given=False)


def _timm_input_size(model: nn.Module, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The size that this very model was built for: its patch embedding knows it better than the pretrained config."""
    channels, height, width = config["input_size"]
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built or (height, width)
    first = next((p for p in model.parameters() if p.ndim == 4), None)
    return (channels if first is None else first.shape[1]), height, width


def _transformers_inputs(model: nn.Module, config: Any) -> dict[str, Any]:
    """Sizes are distinct and unusual, so that a captured symbol can't be mistaken for a size of the model."""
    text = torch.ones(2, 11, dtype=torch.long)
    parameters = inspect.signature(model.forward).parameters
    vision = getattr(config, "vision_config", config)
    inputs: dict[str, Any] = {}
    if "input_ids" in parameters:
        inputs["input_ids"] = text
    if "pixel_values" in parameters and hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        inputs["pixel_values"] = torch.zeros(2, getattr(vision, "num_channels", 3), height, width)
    if "input_features" in parameters and hasattr(config, "num_mel_bins"):
        inputs["input_features"] = torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = torch.ones(2, 5, dtype=torch.long)
    dummies = getattr(model, "dummy_inputs", None) if not inputs else None
    return dict(dummies) if dummies else inputs


def _without_cache(model: nn.Module, kwargs: dict[str, Any], positional: int) -> dict[str, Any]:
    """A capture needs no KV cache, and a cache object in the outputs stops the export."""
    names = list(inspect.signature(model.forward).parameters)
    if "use_cache" in names and "use_cache" not in kwargs and names.index("use_cache") >= positional:
        return {**kwargs, "use_cache": False}
    return kwargs
