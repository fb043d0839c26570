// OpenAI's SDK: whole and streamed answers, a tool's call, usage, abort.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const ask = {
  model: "default",
  messages: [{ role: "user", content: "What is the capital of France?" }],
  max_tokens: 24,
  temperature: 0,
};

const whole = await client.chat.completions.create(ask);
const text = whole.choices[0].message.content;
assert.match(text, /Paris/);

const stream = client.chat.completions.stream({ ...ask, stream_options: { include_usage: true } });
let deltas = "";
stream.on("content", (delta) => (deltas += delta));
assert.equal(await stream.finalContent(), text);
assert.equal(deltas, text);
assert.deepEqual((await stream.totalUsage()).completion_tokens, whole.usage.completion_tokens);

const parameters = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
const call = await client.chat.completions
  .stream({ ...ask, max_tokens: 64, tools, tool_choice: "required", parallel_tool_calls: false })
  .finalMessage();
assert.equal(call.tool_calls[0].function.name, "get_weather");
assert.match(JSON.parse(call.tool_calls[0].function.arguments).city, /Paris|Rome/);

const long = await client.chat.completions.create({ ...ask, max_tokens: 4000, temperature: 2, stream: true });
for await (const chunk of long) if (chunk.choices[0].delta.content) break; // aborts
await assert.rejects(client.chat.completions.create({ ...ask, stop: 7 }), OpenAI.BadRequestError);
