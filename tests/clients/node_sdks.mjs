// Run by test_serve_clients.py: the npm packages openai and ollama against a server.
//
// node node_sdks.mjs TASK URL MODEL TOKEN     prints one JSON object
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(path.join(process.env.NODE_CLIENTS, "package.json"));
const OpenAI = require("openai").default ?? require("openai");
const { Ollama } = require("ollama");

const [task, url, model, token] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: token, maxRetries: 0 });
const ollama = new Ollama({ host: url, headers: { Authorization: `Bearer ${token}` } });
const messages = [{ role: "user", content: "Hello" }];
const parameters = {
  type: "object",
  properties: { on: { type: "boolean" } },
  required: ["on"],
};
const light = { type: "function", function: { name: "light", parameters } };
const short = { model, messages, max_tokens: 8, temperature: 0 };

const tasks = {
  async openai() {
    const whole = await openai.chat.completions.create(short);
    const texts = [];
    for await (const piece of await openai.chat.completions.create({ ...short, stream: true })) {
      texts.push(piece.choices[0]?.delta?.content ?? "");
    }
    const asked = { ...short, tools: [light], tool_choice: "required", max_tokens: 200 };
    const call = (await openai.chat.completions.create(asked)).choices[0].message.tool_calls[0];
    const asResponse = { model, input: "Hello", max_output_tokens: 8, temperature: 0 };
    const response = await openai.responses.create(asResponse);
    const deltas = [];
    const events = await openai.responses.create({ ...asResponse, stream: true });
    for await (const event of events) {
      if (event.type === "response.output_text.delta") deltas.push(event.delta);
    }
    let refused = null;
    try {
      await openai.chat.completions.create({ ...short, model: "other" });
    } catch (error) {
      refused = [error.constructor.name, error.status, error.code];
    }
    return {
      texts: [
        whole.choices[0].message.content,
        texts.join(""),
        response.output_text,
        deltas.join(""),
      ],
      call: [call.function.name, Object.keys(JSON.parse(call.function.arguments))],
      refused,
    };
  },

  async ollama() {
    const options = { num_predict: 8, temperature: 0 };
    const whole = await ollama.chat({ model, messages, options });
    const texts = [];
    for await (const piece of await ollama.chat({ model, messages, options, stream: true })) {
      texts.push(piece.message.content);
    }
    const generated = await ollama.generate({ model, prompt: "Hello", options });
    const listed = (await ollama.list()).models.map((found) => found.model);
    const tools = await ollama.chat({ model, messages, options, tools: [light] });
    return {
      texts: [whole.message.content, texts.join(""), generated.response],
      listed,
      tools: tools.done_reason,
    };
  },

  async embed() {
    const input = ["a river", "a bridge"];
    const first = await openai.embeddings.create({ model, input });
    const plain = await openai.embeddings.create({ model, input, encoding_format: "float" });
    const second = await ollama.embed({ model, input });
    return {
      openai: first.data.map((each) => each.embedding),
      plain: plain.data.map((each) => each.embedding),
      ollama: second.embeddings,
    };
  },
};

console.log(JSON.stringify(await tasks[task]()));
