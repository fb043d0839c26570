"""The engine: the one process that owns MLX. Requests come in, `EngineCore.step()` moves all of them one step on."""
