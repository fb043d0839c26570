"""The description of the API tells of every route what the code does."""

import re
from pathlib import Path
from typing import Any

import falcon.testing

from fake_engine import Backend, fake_deps
from mlx_server.api.app import make_routes
from mlx_server.api.openapi import document

PAGE = Path(__file__).parents[2] / "python/mlx_server/api/docs.html"


def references(value: Any) -> set[str]:
    """Names of all components that are referred to."""
    if isinstance(value, dict):
        own = {value["$ref"].removeprefix("#/components/schemas/")} if "$ref" in value else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_method_of_every_route_is_described(backend: Backend) -> None:
    for path, resource in make_routes(fake_deps(backend.client)).items():
        methods = {name.removeprefix("on_").upper() for name in dir(resource) if name.startswith("on_")}
        assert methods - {"HEAD"} == set(resource.operations), path


def test_the_description_is_served(client: falcon.testing.TestClient) -> None:
    spec = client.simulate_get("/openapi.json").json
    assert spec["openapi"] == "3.1.0"
    assert references(spec["paths"]) | references(spec["components"]) <= set(spec["components"]["schemas"])
    operations = [operation for methods in spec["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    chat = spec["paths"]["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    temperature = spec["components"]["schemas"]["ChatCompletionRequest"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in temperature["anyOf"]


def test_paths_and_queries_have_parameters(client: falcon.testing.TestClient) -> None:
    paths = client.simulate_get("/openapi.json").json["paths"]
    assert [part["name"] for part in paths["/v1/models"]["get"]["parameters"]] == ["limit", "after_id", "before_id"]
    (name,) = paths["/v1/models/{name}"]["get"]["parameters"]
    assert (name["in"], name["required"]) == ("path", True)


def test_what_needs_a_key_says_so(backend: Backend) -> None:
    routes = make_routes(fake_deps(backend.client))
    spec = document(routes, has_key=True)
    open_paths = {path for path, methods in spec["paths"].items() if not all("security" in m for m in methods.values())}
    assert open_paths == {"/health", "/health/ready", "/docs"}
    assert "security" not in str(document(routes, has_key=False)["paths"])
    client = falcon.testing.TestClient(backend.app(api_key="sesame"), headers={"host": "localhost"})
    for path in spec["paths"]:
        result = client.simulate_get(path)
        assert (result.status_code == 401) is (path not in open_paths), path


def test_the_page_is_one_file_that_asks_nobody_else(client: falcon.testing.TestClient) -> None:
    result = client.simulate_get("/docs")
    assert result.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in result.headers["content-security-policy"]
    page = PAGE.read_text()
    assert result.text == page
    assert not re.search(r"https?://|//\w|innerHTML|\bsrc=|@import|url\(", page)
