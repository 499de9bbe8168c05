// The official client for Node over Node's own fetch, which keeps its connections.
import OpenAI from "openai";

const client = (baseURL, options = {}) => new OpenAI({ baseURL, apiKey: "none", ...options });
const request = (c, more = {}) => ({
  model: c.model,
  messages: [{ role: "user", content: c.say }],
  temperature: 0,
  ...more,
});

export async function chat(baseUrl, c) {
  const openai = client(baseUrl);
  const texts = new Set();
  for (let i = 0; i < 3; i++) {
    texts.add((await openai.chat.completions.create(request(c))).choices[0].message.content);
  }
  return { text: [...texts].join("|") };
}

export async function stream(baseUrl, c, headers = {}) {
  let text = "";
  for await (const chunk of await client(baseUrl).chat.completions.create(request(c, { stream: true }), { headers })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  return { text };
}

export async function usage(baseUrl, c) {
  const options = { stream: true, stream_options: { include_usage: true } };
  let last;
  for await (const chunk of await client(baseUrl).chat.completions.create(request(c, options))) last = chunk;
  return { completion_tokens: last.usage.completion_tokens };
}

export const silence = stream;

export const silence_key = (baseUrl, c) => stream(baseUrl, c, { "Idempotency-Key": "silence" });

export async function retry(baseUrl, c) {
  const openai = client(baseUrl, { timeout: 300, maxRetries: 9 });
  const answer = await openai.chat.completions.create(request(c), { headers: { "Idempotency-Key": "retry" } });
  return { text: answer.choices[0].message.content };
}

export async function models(baseUrl) {
  return { model: (await client(baseUrl).models.list()).data[0].id };
}

export async function overflow(baseUrl, c) {
  try {
    await client(baseUrl).chat.completions.create(request({ ...c, say: "x".repeat(20000) }));
  } catch (error) {
    return { is_recognised: error.code === "context_length_exceeded" };
  }
  return { is_recognised: false };
}

export async function refusal(baseUrl, c) {
  try {
    await client(baseUrl).chat.completions.create(request(c, { temprature: 1 }));
  } catch (error) {
    return { is_named: error.param === "temprature" };
  }
  return { is_named: false };
}
