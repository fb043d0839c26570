// Anthropic's SDK: whole and streamed answers, a tool's call, usage, abort, errors.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ask = { model: "default", max_tokens: 24, messages };

const whole = await client.messages.create(ask);
assert.equal(whole.content[0].type, "text");
const count = await client.messages.countTokens({ model: "default", messages });
assert.equal(whole.usage.input_tokens + whole.usage.cache_read_input_tokens, count.input_tokens);

const stream = client.messages.stream(ask);
let deltas = "";
stream.on("text", (delta) => (deltas += delta));
const final = await stream.finalMessage();
assert.equal(final.content[0].text, deltas);
assert.ok(final.usage.output_tokens > 0);

const input_schema = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] };
const tools = [{ name: "get_weather", input_schema }];
const tool_choice = { type: "any", disable_parallel_tool_use: true };
const called = await client.messages.stream({ ...ask, max_tokens: 64, tools, tool_choice }).finalMessage();
assert.equal(called.stop_reason, "tool_use");
assert.match(called.content.at(-1).input.city, /Paris|Rome/);

const long = client.messages.stream({ ...ask, max_tokens: 4000 });
long.on("text", () => long.abort());
await assert.rejects(long.finalMessage(), Anthropic.APIUserAbortError);
await assert.rejects(client.messages.create({ ...ask, max_tokens: -1 }), Anthropic.BadRequestError);
