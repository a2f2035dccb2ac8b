// One answer: sends the conversation, puts the pieces that stream in into an assistant message. No document here.

import { ApiError, streamChat } from "./api.js";
import { sourcesIn } from "./sources.js";
import { append, find, toRequest } from "./tree.js";

const MAX_OUTPUT = 200_000; // characters of what a running tool prints that are kept, the last ones
const STATES = ["running", "approval", "ok", "error", "refused", "denied", "repeated", "cut"];

/** Whether more is to come of a call. */
export const goesOn = (part) => part.status === "running" || part.status === "approval";

export const running = new Map(); // conversation id -> {controller, message}

/** Fields of a request out of the settings; what is left at the model's default is not sent. */
export function samplingFields(sampling) {
  const fields = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if (typeof sampling[name] === "number" && Number.isFinite(sampling[name])) fields[name] = sampling[name];
  }
  return fields;
}

/**
 * Answer the message `parent`. onChange(message) is called whenever the answer has grown.
 * Resolves to the message; errors are kept in it: finish is "stop", "length", "stopped" (by the user) or "error".
 */
export async function answer(conversation, parent, { sampling, allTools, askTools, onChange }) {
  const controller = new AbortController();
  const request = { messages: toRequest(conversation, parent, allTools), ...samplingFields(sampling) };
  if (allTools) {
    request.tools = [{ type: "all_tools", ...(askTools && { approval: "ask" }) }];
    request.conversation = conversation.id; // its variables, pages and files stay between answers
    const ids = (find(conversation, parent).files ?? []).map((file) => file.id).filter(Boolean);
    if (ids.length) request.files = ids;
  }
  const message = append(conversation, parent, { role: "assistant", parts: [], finish: null, stats: null });
  const run = { controller, message };
  running.set(conversation.id, run);
  const started = performance.now();
  const clock = { first: null, thinking: null };
  onChange(message);
  try {
    for await (const chunk of streamChat(request, controller.signal)) {
      clock.first ??= performance.now();
      take(message, chunk, clock);
      onChange(message);
    }
    message.finish ??= "stop";
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else {
      message.finish = "error";
      const known = error instanceof ApiError;
      message.error = { status: known ? error.status : -1, text: error.message, retryAfter: error.retryAfter ?? null };
    }
  } finally {
    endThinking(message, clock);
    for (const part of message.parts) {
      if (part.type === "call" && goesOn(part)) part.status = "stopped";
    }
    if (message.stats && clock.first) message.stats.first_s = (clock.first - started) / 1000;
    if (running.get(conversation.id) === run) running.delete(conversation.id);
    conversation.updated = Date.now();
    onChange(message);
  }
  return message;
}

export function stop(conversationId) {
  running.get(conversationId)?.controller.abort();
}

/** An answer that was being written when the page went away. */
export function settle(conversation) {
  for (const message of conversation.messages) {
    if (message.role !== "assistant" || message.finish) continue;
    message.finish = "stopped";
    for (const part of message.parts) if (goesOn(part)) part.status = "stopped";
  }
}

function endThinking(message, clock) {
  const last = message.parts.findLast((part) => part.type === "reasoning");
  if (last && clock.thinking !== null) last.seconds = (performance.now() - clock.thinking) / 1000;
  clock.thinking = null;
}

/** Put one chunk into the message. */
export function take(message, chunk, clock = { thinking: null }) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  if (typeof delta.reasoning_content === "string" && delta.reasoning_content) {
    clock.thinking ??= performance.now();
    extend(message.parts, "reasoning", delta.reasoning_content);
  }
  if (typeof delta.content === "string" && delta.content) {
    if (clock.thinking !== null) endThinking(message, clock);
    extend(message.parts, "text", delta.content);
  }
  for (const call of delta.tool_calls ?? []) takeCall(message.parts, call);
  for (const observation of delta.observations ?? []) takeObservation(message.parts, observation);
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (chunk.model) message.model = String(chunk.model);
  if (chunk.usage || chunk.timings) {
    const { usage = {}, timings = {} } = chunk;
    message.stats = {
      tokens: usage?.completion_tokens ?? null,
      tok_s: timings?.decode_tok_s ?? null,
      prefill_s: timings?.prefill_s ?? null,
      context: timings?.context_used ?? usage?.total_tokens ?? null,
    };
  }
}

function extend(parts, type, text) {
  const last = parts.at(-1);
  if (last?.type === type) last.text += text;
  else parts.push({ type, text });
}

/** A piece of a call: the first one of an index has id and name, later ones continue its arguments. */
function takeCall(parts, call) {
  const index = call.index ?? 0;
  let part = parts.findLast((p) => p.type === "call" && (call.id ? p.id === call.id : p.index === index));
  part ??= startCall(parts, call.id || `call-${parts.length}`, index);
  if (call.function?.name) part.name ||= String(call.function.name);
  if (call.function?.arguments) part.arguments += String(call.function.arguments);
}

function startCall(parts, id, index) {
  const part = { type: "call", id, index, name: "", arguments: "", status: "running", content: "", files: [] };
  parts.push(part);
  return part;
}

/** News of a call: while it runs pieces of its output, in the end what the model is given, files and sources. */
function takeObservation(parts, seen) {
  let part = parts.findLast((p) => p.type === "call" && p.id === seen.id);
  part ??= startCall(parts, String(seen.id), 0);
  if (seen.name) part.name ||= String(seen.name);
  part.status = STATES.includes(seen.status) ? seen.status : "ok";
  if (typeof seen.arguments === "string") part.arguments ||= seen.arguments;
  if (typeof seen.output === "string") part.output = ((part.output ?? "") + seen.output).slice(-MAX_OUTPUT);
  if (typeof seen.content === "string") part.content = seen.content;
  const sources = sourcesIn(seen.data?.sources);
  if (sources.length) part.sources = sources;
  if (typeof seen.seconds === "number") part.seconds = seen.seconds;
  if (!Array.isArray(seen.files)) return;
  part.files = seen.files.map((file) => ({
    name: String(file.name ?? ""), mime: String(file.mime ?? ""), url: String(file.url ?? ""),
  }));
}
