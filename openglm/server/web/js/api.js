// The server: model description, streamed chat, blanks. Knows the protocol, not the page.

/** message: in the server's words. status: of HTTP, 0 where the server could not be reached. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const KEY = "openglm-api-key";
let askForKey = async () => null;

/** ask: called when the server wants a key; resolves to the key, or null when the user gives none. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

function keptKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function keepKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // no storage: the key is asked for again
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

async function once(path, body, signal, key) {
  const headers = { Accept: "application/json, text/event-stream" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const form = body instanceof FormData;
  if (body !== undefined && !form) headers["Content-Type"] = "application/json";
  const init = { method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store", redirect: "error" };
  try {
    return await fetch(address(path), { ...init, body: body === undefined || form ? body : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, String(error.message || error));
  }
}

/** A response with a good status, or ApiError. Asks for a key as often as the server refuses the one given. */
export async function request(path, body, signal) {
  let key = keptKey();
  for (;;) {
    const response = await once(path, body, signal, key);
    if (response.ok) {
      if (key) keepKey(key);
      return response;
    }
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    key = await askForKey(Boolean(key));
    if (!key) throw error;
  }
}

async function errorOf(response) {
  let message = response.statusText || `HTTP ${response.status}`;
  try {
    const body = JSON.parse((await response.text()).slice(0, 20_000));
    const found = body.error?.message ?? body.detail ?? body.message;
    if (found) message = typeof found === "string" ? found : JSON.stringify(found);
  } catch {
    // not JSON: the status says enough
  }
  const after = Number(response.headers.get("Retry-After"));
  return new ApiError(response.status, message, Number.isFinite(after) && after > 0 ? after : null);
}

/** The first model: {id, context_length, fills, thinks, all_tools}; fields that are absent stay so. */
export async function describeModel() {
  const answer = await (await request("v1/models")).json();
  const first = Array.isArray(answer.data) ? answer.data[0] : null;
  if (!first) throw new ApiError(0, "no model");
  return first;
}

/** Events of a text/event-stream body: the data of each, as text. Comments and other fields are left out. */
export async function* serverEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      held += done ? "\n\n" : value;
      // A lone CR at the end may be half of a CRLF.
      const usable = !done && held.endsWith("\r") ? held.length - 1 : held.length;
      const lines = held.slice(0, usable).split(/\r\n|\n|\r/);
      held = lines.pop() + held.slice(usable);
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Chunks of a streamed chat completion. Raises ApiError for an error in the stream, or one that ends too early. */
export async function* streamChat(body, signal) {
  const full = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", full, signal);
  let finished = false;
  try {
    for await (const data of serverEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.code || 500, String(chunk.error.message || "error"));
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(0, String(error.message || error));
  }
  if (!finished) throw new ApiError(0, "the stream ended early");
}

/** [{text, blanks, probability}], likeliest first. */
export async function fillBlanks(text, n, maxTokens, signal) {
  const answer = await (await request("fill", { text, n, max_tokens: maxTokens }, signal)).json();
  return Array.isArray(answer.fillings) ? answer.fillings : [];
}

/** Put a file where the tools of the server can read it; its id. */
export async function uploadFile(file) {
  const form = new FormData();
  form.append("purpose", "assistants");
  form.append("file", file, file.name);
  const { id } = await (await request("v1/files", form)).json();
  return String(id);
}

/** Answer a tool call that waits for the user. */
export async function decide(id, allow) {
  await request("v1/agent/approvals", { id, decision: allow ? "allow" : "deny" });
}

/** A file of the server as a local address that needs no key in it; data: and blob: addresses stay. */
export async function localAddress(url) {
  const target = new URL(url, document.baseURI);
  if (target.protocol === "blob:" || target.protocol === "data:" || !keptKey()) return target.href;
  const response = await once(target.href, undefined, undefined, keptKey());
  if (!response.ok) throw await errorOf(response);
  return URL.createObjectURL(await response.blob());
}
