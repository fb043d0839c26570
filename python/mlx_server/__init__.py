"""mlx-server: quantized language models on MLX behind OpenAI-compatible HTTP."""
