// The `ai` SDK with its OpenAI-compatible and its Anthropic provider: text, streams, a tool's call, usage.
import assert from "node:assert/strict";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = `${process.argv[2]}/v1`;
const models = [
  createOpenAICompatible({ name: "local", baseURL, apiKey: "none", includeUsage: true })("default"),
  createAnthropic({ baseURL, apiKey: "none" })("default"),
];
for (const model of models) {
  const ask = { model, prompt: "What is the capital of France?", maxOutputTokens: 24, temperature: 0, maxRetries: 0 };
  const { text, usage, finishReason } = await generateText(ask);
  assert.match(text, /Paris/);
  assert.equal(finishReason, "stop");

  const stream = streamText(ask);
  let deltas = "";
  for await (const delta of stream.textStream) deltas += delta;
  assert.equal(deltas, text);
  assert.equal((await stream.usage).outputTokens, usage.outputTokens);

  const get_weather = tool({ inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }) });
  const called = await generateText({ ...ask, maxOutputTokens: 64, tools: { get_weather }, toolChoice: "required" });
  assert.equal(called.toolCalls[0].toolName, "get_weather");
  assert.match(called.toolCalls[0].input.city, /Paris|Rome/);
}
