"""What the engine counts, as Prometheus reads it."""

from prometheus_client.parser import text_string_to_metric_families

from engine.test_fairness import Clock, submit_all
from engine.test_scheduler import API, Collector, make_core, make_submit
from mlx_server.engine.core import EngineCore


def samples(core: EngineCore) -> dict[str, float]:
    """Value by name, labels other than the model's in braces."""
    values = {}
    for family in text_string_to_metric_families(core.metrics()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            values[sample.name + "".join(f"{{{v}}}" for v in labels.values())] = sample.value
    return values


def test_a_request_is_counted() -> None:
    clock = Clock()
    core, _ = make_core(clock=clock)
    submit_all(core, make_submit("a", [1] * 20, 4))
    clock.now_s += 2
    collector = Collector()
    while core.has_work:
        collector.take(core.step())
        clock.now_s += 0.06
    values = samples(core)
    assert values["vllm:prompt_tokens_total"] == 20
    assert values["vllm:generation_tokens_total"] == 4
    assert values["vllm:request_success_total{length}"] == 1
    assert values["vllm:time_to_first_token_seconds_bucket{2.5}"] == 1
    assert values["vllm:time_to_first_token_seconds_bucket{1.0}"] == 0
    assert values["vllm:inter_token_latency_seconds_count"] == 3
    assert values["vllm:inter_token_latency_seconds_bucket{0.05}"] == 0
    assert values["vllm:inter_token_latency_seconds_bucket{0.075}"] == 3
    assert values["vllm:request_queue_time_seconds_sum"] == 2
    assert values["mlx_server:prefill_tokens_total"] == 20
    assert values["mlx_server:decode_tokens_total"] == 3
    assert values["mlx_server:step_rows_count"] == 5  # two chunks of the prompt
    assert values["vllm:kv_cache_usage_perc"] == 0


def test_gauges_show_the_moment() -> None:
    core, _ = make_core(max_running=2, num_blocks=10, block_size=4)
    submit_all(core, *(make_submit(f"r{i}", [1] * 4, 9) for i in range(3)))
    core.step()
    values = samples(core)
    assert values["vllm:num_requests_running"] == 2
    assert values["vllm:num_requests_waiting"] == 1
    assert values["vllm:kv_cache_usage_perc"] == 0.2
    assert values["vllm:cache_config_info{4}{10}"] == 1


def test_how_requests_end_is_counted() -> None:
    core, runner = make_core()
    submit_all(core, make_submit("cancelled", [1], 9), make_submit("failed", [2], 9))
    core.cancel(API, "cancelled")
    runner.poison = {"failed"}
    while core.has_work:
        try:
            core.step()
        except RuntimeError:
            core.fail_step()
    values = samples(core)
    assert values["vllm:request_success_total{abort}"] == 1
    assert values["mlx_server:request_errors_total"] == 1
    assert values["mlx_server:failed_steps_total"] == 2
    assert values["vllm:request_success_total{stop}"] == 0


def test_preemptions_are_counted() -> None:
    core, _ = make_core(num_blocks=8, block_size=4, max_batch_tokens=32, context=32)
    submit_all(core, *(make_submit(name, [1] * 9, 20) for name in "abc"))
    Collector().run_until_idle(core)
    assert samples(core)["vllm:num_preemptions_total"] >= 2


def test_labels_are_escaped() -> None:
    from mlx_server.engine.stats import EngineStats, Gauges  # noqa: PLC0415

    text = EngineStats('a"b\\c\n').text(Gauges(0, 0, 0.0, 1, 1))
    (family,) = (f for f in text_string_to_metric_families(text) if f.name == "vllm:num_requests_running")
    assert family.samples[0].labels["model_name"] == 'a"b\\c\n'
