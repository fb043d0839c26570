"""A checkpoint's tensors on their way into a model."""

import mlx.core as mx

from mlx_server.errors import ModelLoadError
from mlx_server.models.quantize import Quantization, QuantizationPlan


class Weights:
    """Tensors under a prefix of their names. Layers take theirs by name and shape; what is left in the end is a fault.

    A tensor is taken once, so that only its layer holds it. Floating point is cast to `dtype`, that of activations.
    """

    def __init__(
        self,
        source: str,
        tensors: dict[str, mx.array],
        plan: QuantizationPlan,
        dtype: mx.Dtype,
        prefix: str = "",
        taken: list[mx.array] | None = None,
    ) -> None:
        self.source = source  # begins each error message: the model's path
        self.dtype = dtype
        self.taken = [] if taken is None else taken
        self._tensors = tensors
        self._plan = plan
        self._prefix = prefix

    def at(self, name: str) -> "Weights":
        """The tensors whose names go on with `name` and a dot."""
        return Weights(self.source, self._tensors, self._plan, self.dtype, f"{self._prefix}{name}.", self.taken)

    @property
    def name(self) -> str:
        """The layer whose tensors these are."""
        return self._prefix.removesuffix(".")

    def has(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def quantization(self) -> Quantization | None:
        """How the layer at this prefix is quantized, None if it is not."""
        return self._plan.of(self.name, has_scales=self.has("scales"))

    def take(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype | mx.DtypeCategory = mx.floating) -> mx.array:
        """The tensor `name`, lazy. ModelLoadError if it is missing or has another shape or kind of dtype."""
        name = self._prefix + name
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise ModelLoadError(f"{self.source}: tensor {name} is missing")
        if tensor.shape != shape:
            raise ModelLoadError(
                f"{self.source}: tensor {name} has shape {tensor.shape}, but the configuration asks for {shape}"
            )
        if not mx.issubdtype(tensor.dtype, dtype):
            raise ModelLoadError(f"{self.source}: tensor {name} has dtype {tensor.dtype}, but it must be {dtype}")
        if dtype == mx.floating:
            tensor = tensor.astype(self.dtype)
        self.taken.append(tensor)
        return tensor

    def drop(self, suffix: str) -> None:
        """Forget the tensors whose names end so: values that the model computes itself."""
        for name in [name for name in self._tensors if name.endswith(suffix)]:
            del self._tensors[name]

    def check_all_taken(self) -> None:
        """ModelLoadError if a tensor is left over."""
        if self._tensors:
            name, tensor = min(self._tensors.items())
            count = len(self._tensors)
            raise ModelLoadError(f"{self.source}: tensor {name} {tensor.shape} is no part of the model ({count} such)")
