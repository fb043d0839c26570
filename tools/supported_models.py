"""Writes the README's section of supported models from the code; with --check, says whether it is current."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mlx_server.checkpoint.model_config import GGUF_ARCHITECTURES
from mlx_server.models.gguf_blocks import FLOAT_TYPES, QUANTIZED_TYPES
from mlx_server.models.loader import ARCHITECTURES
from mlx_server.models.quantize import BITS, GROUP_SIZES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- tools/supported_models.py writes this -->\n", "<!-- until here -->\n"


def architectures() -> Iterator[str]:
    """A table: each architecture, linked to its first paper or page, as the docstring of its module begins."""
    gguf = {model_type: arch for arch, model_type in GGUF_ARCHITECTURES.items()}
    yield "| `model_type` | models | in GGUF |"
    yield "|---|---|---|"
    for model_type, architecture in sorted(ARCHITECTURES.items()):
        doc = sys.modules[architecture.__module__].__doc__ or ""
        name, url = re.match(r"(.*?) \((https://[^\s,)]+)", doc).groups()  # type: ignore[union-attr]
        arch = f"`{gguf[model_type]}`" if model_type in gguf else ""
        yield f"| `{model_type}` | [{name}]({url}) | {arch} |"


def weight_forms() -> Iterator[str]:
    exact = [name for name, kind in QUANTIZED_TYPES.items() if kind.is_exact]
    inexact = [f"{name} ({kind.bits} bits)" for name, kind in QUANTIZED_TYPES.items() if not kind.is_exact]
    yield "| files | weights |"
    yield "|---|---|"
    yield "| safetensors | bfloat16, float16, float32 |"
    for mode, bits in BITS.items():
        yield f"| safetensors, MLX's `{mode}` | {either(bits)} bits in groups of {either(GROUP_SIZES[mode])} |"
    yield f"| GGUF | {', '.join((*FLOAT_TYPES, *exact))}; held in the closest form that MLX has: {', '.join(inexact)} |"


def either(values: tuple[int, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def generate(readme: str) -> str:
    """The README with the section as it should be."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    section = "\n".join([*architectures(), "", *weight_forms()])
    return f"{before}{BEGIN}{section}\n{END}{after}"


def main() -> int:
    committed = README.read_text()
    generated = generate(committed)
    if sys.argv[1:] != ["--check"]:
        README.write_text(generated)
        return 0
    if generated != committed:
        print("The supported models changed: run `python tools/supported_models.py` and commit README.md.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
