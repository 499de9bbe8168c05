// Vercel's ai package with its provider for compatible servers.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const model = (baseURL, c) => createOpenAICompatible({ name: "glm", baseURL, includeUsage: true })(c.model);

export async function chat(baseUrl, c) {
  const texts = new Set();
  for (let i = 0; i < 3; i++) {
    texts.add((await generateText({ model: model(baseUrl, c), prompt: c.say, temperature: 0 })).text);
  }
  return { text: [...texts].join("|") };
}

export async function stream(baseUrl, c) {
  let text = "";
  for await (const part of streamText({ model: model(baseUrl, c), prompt: c.say, temperature: 0 }).textStream) {
    text += part;
  }
  return { text };
}

export async function usage(baseUrl, c) {
  const result = streamText({ model: model(baseUrl, c), prompt: c.say, temperature: 0 });
  await result.consumeStream();
  return { completion_tokens: (await result.usage).outputTokens };
}

export const silence = stream;
