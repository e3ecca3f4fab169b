"use strict";
// Everything that a model, a tool or a person wrote is set as text, never as HTML.

const at = (id) => document.getElementById(id);
const conversation = at("conversation");
let messages = [];
let running = null; // the AbortController of the reply under way

function add(parent, kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  parent.append(made);
  return made;
}

function turn(role, text = "") {
  const box = add(conversation, "div", `turn ${role}`);
  const shown = add(box, "div", "text", text);
  conversation.scrollTop = conversation.scrollHeight;
  return { box, shown };
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function body() {
  const system = at("system").value.trim();
  const made = {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (at("temperature").value !== "") made.temperature = Number(at("temperature").value);
  if (at("max_tokens").value !== "") made.max_tokens = Number(at("max_tokens").value);
  const tools = at("tools").value.trim();
  if (tools) {
    try {
      made.tools = JSON.parse(tools);
    } catch (error) {
      throw new Error(`the tools are no JSON: ${error.message}`);
    }
  }
  return made;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
}

async function reply() {
  if (running) return;
  running = new AbortController();
  busy(true);
  const { box, shown } = turn("assistant");
  const said = { role: "assistant", content: "" };
  const own = messages; // a new conversation may begin while this reply is under way
  const begun = performance.now();
  let notes = [];
  try {
    const sent = { method: "POST", headers: headers(), body: JSON.stringify(body()), signal: running.signal };
    const response = await fetch("/v1/chat/completions", sent);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const { delta, finish_reason: reason } of event.choices) {
        said.content += delta.content ?? "";
        if (delta.tool_calls) said.tool_calls = delta.tool_calls.map(({ index, ...call }) => call);
        if (reason === "length") notes.push("cut: it reached the largest number of tokens");
      }
      if (event.usage) {
        const seconds = (performance.now() - begun) / 1000;
        notes.push(`${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`);
      }
      const below = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight;
      shown.textContent = said.content;
      if (below < 80) conversation.scrollTop = conversation.scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") notes.push("stopped");
    else {
      add(box, "div", "note wrong", error.message);
      // Back to the person, who may change it; as a part of the conversation it would be in the way of the next one.
      if (!said.content && own.at(-1).role === "user") {
        const back = takeBack(own.pop().content);
        at("message").value ||= back;
      }
    }
  }
  if (said.content || said.tool_calls) own.push(said);
  drawBoxes(box, said.content);
  for (const call of said.tool_calls ?? []) ask(box, call, said.tool_calls);
  if (notes.length) add(box, "div", "note", notes.join(" · "));
  conversation.scrollTop = conversation.scrollHeight;
  running = null;
  busy(false);
}

function ask(box, call, all) {
  // The page runs no tool: a person gives the result.
  const shown = add(box, "div", "call");
  add(shown, "code", "", `${call.function.name}(${call.function.arguments})`);
  const form = add(shown, "form", "");
  const result = add(form, "input", "");
  result.placeholder = "Result of this call";
  result.setAttribute("aria-label", "Result of this call");
  add(form, "button", "", "Give result");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.remove();
    turn("tool", result.value);
    messages.push({ role: "tool", tool_call_id: call.id, content: result.value });
    if (messages.filter((one) => all.some((other) => other.id === one.tool_call_id)).length === all.length) reply();
  });
  result.focus();
}

function send() {
  const text = at("message").value;
  if ((!text.trim() && !attached.length) || running) return;
  at("message").value = "";
  const content = contentOf(text);
  messages.push({ role: "user", content });
  showPictures(turn("user", text).box, content);
  conversation.scrollTop = conversation.scrollHeight;
  reply();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  latest = null;
  conversation.replaceChildren();
  at("message").focus();
});

async function name() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.ok) {
    const model = (await response.json()).data[0];
    at("model").textContent = model.id;
    at("attach").hidden = !model.input_modalities.includes("image");
  } else {
    at("model").textContent = "This server needs its key";
    at("settings").open = true;
  }
}
at("key").addEventListener("change", name);
name();
