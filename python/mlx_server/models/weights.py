"""A checkpoint's tensors on their way into a model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_server.errors import ModelLoadError
from mlx_server.models.quantize import Quantization, QuantizationPlan

if TYPE_CHECKING:
    from mlx_server.models.layers import Matrix, QuantizedMatrix


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
        matrices: "list[Matrix | QuantizedMatrix] | None" = None,
    ) -> None:
        self.source = source  # begins each error message: the model's path
        self.dtype = dtype
        self.taken = [] if taken is None else taken
        self.matrices = [] if matrices is None else matrices  # those made of what was taken
        self._tensors = tensors
        self._plan = plan
        self._prefix = prefix

    def at(self, name: str) -> "Weights":
        """The tensors whose names go on with `name` and a dot."""
        prefix = f"{self._prefix}{name}."
        return Weights(self.source, self._tensors, self._plan, self.dtype, prefix, self.taken, self.matrices)

    @property
    def name(self) -> str:
        """The layer whose tensors these are."""
        return self._prefix.removesuffix(".")

    def has(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor `name`, None if it is missing; where a checkpoint's form shows in a shape."""
        tensor = self._tensors.get(self._prefix + name)
        return None if tensor is None else tensor.shape

    def quantization(self) -> Quantization | None:
        """How the layer at this prefix is quantized, None if it is not."""
        return self._plan.of(self.name, has_scales=self.has("scales"))

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: mx.Dtype | mx.DtypeCategory = mx.floating,
        *,
        cast_to: mx.Dtype | None = None,
    ) -> mx.array:
        """The tensor `name`, lazy, floating point cast to `cast_to` if given, else to the dtype of activations.

        ModelLoadError if it is missing or has another shape or kind of dtype.
        """
        return self._keep(self._remove(name, shape, dtype), cast_to)

    def take_stacked(
        self, names: list[str], shape: tuple[int, ...], dtype: mx.Dtype | mx.DtypeCategory = mx.floating
    ) -> mx.array:
        """The tensors `names`, each taken as by `take`, along a new first axis."""
        return self._keep(mx.stack([self._remove(name, shape, dtype) for name in names]))

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """What was taken as `parts`, one below the other: only this stays in memory."""
        ids = {id(part) for part in parts}
        self.taken[:] = [tensor for tensor in self.taken if id(tensor) not in ids]
        return self._keep(mx.concatenate(list(parts)), parts[0].dtype)

    def _keep(self, tensor: mx.array, cast_to: mx.Dtype | None = None) -> mx.array:
        if mx.issubdtype(tensor.dtype, mx.floating):
            tensor = tensor.astype(cast_to or self.dtype)
        self.taken.append(tensor)
        return tensor

    def _remove(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype | mx.DtypeCategory) -> mx.array:
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
        return tensor

    def drop(self, *, prefix: str = "", suffix: str = "") -> None:
        """Forget the tensors whose names begin and end so: what the model computes itself or has no use for."""
        for name in [name for name in self._tensors if name.startswith(prefix) and name.endswith(suffix)]:
            del self._tensors[name]

    def check_all_taken(self) -> None:
        """ModelLoadError if a tensor is left over."""
        if self._tensors:
            name, tensor = min(self._tensors.items())
            count = len(self._tensors)
            raise ModelLoadError(f"{self.source}: tensor {name} {tensor.shape} is no part of the model ({count} such)")
