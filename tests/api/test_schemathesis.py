"""Requests made from the server's own description, right and wrong ones: no answer contradicts it, none is a 500."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from fake_engine import Backend, fake_deps
from mlx_server.api.app import create_app, make_routes
from mlx_server.api.openapi import document

# Operations that take something; a path's parameter is any string, so that none is wrong.
OPERATIONS = [
    (path.replace(":path}", "}"), method, mode)
    for path, resource in make_routes(fake_deps(None)).items()
    for method, operation in resource.operations.items()
    for mode in GenerationMode
    if operation.request or operation.query or (mode is GenerationMode.POSITIVE and "{" in path)
]
EXAMPLES = settings(
    max_examples=20,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
ALWAYS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    backend = Backend(tmp_path_factory.mktemp("api"))
    deps = fake_deps(backend.client)
    loaded = schemathesis.openapi.from_dict(document(make_routes(deps), has_key=False))
    loaded.app = create_app(deps)
    yield loaded
    backend.close()


@pytest.mark.parametrize("path, method, mode", OPERATIONS)
def test_no_answer_contradicts_the_description(schema: Any, path: str, method: str, mode: GenerationMode) -> None:
    operation = schema[path][method]
    more = [checks.negative_data_rejection] if mode is GenerationMode.NEGATIVE else []

    @EXAMPLES
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # any other is a 404
        response = case.call()
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=[*ALWAYS, *more])

    run()
